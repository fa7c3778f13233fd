//! The program: [`Launch`] it, and it is a [`Proxy`].

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread::JoinHandle,
    time::SystemTime,
};

use tokio::sync::oneshot;

use super::{Api, SYSTEM, Scratch, assert_clean, eventually, secret, soon};

/// The program that cargo built beside this test.
///
/// `cargo test` without a target's name builds the examples too. If it was told to build this test alone, the program may be
/// missing, or older than its source.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
        let program = folder.join("examples/proxy");
        if !is_current(&program) {
            let profile = match folder.file_name().and_then(OsStr::to_str) {
                Some("debug") | None => "dev",
                Some(profile) => profile,
            };
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let built = Command::new(cargo)
                .args(["build", "--package", "example-proxy", "--example", "proxy", "--profile", profile])
                .arg("--target-dir")
                .arg(folder.parent().expect("target/PROFILE"))
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .status();
            assert!(built.unwrap().success());
        }
        program
    })
}

/// Whether it is there, and none of its sources is newer.
fn is_current(program: &Path) -> bool {
    let changed = |path: &Path| -> Option<SystemTime> { fs::metadata(path).ok()?.modified().ok() };
    let (Some(built), Ok(sources)) = (changed(program), fs::read_to_string(program.with_extension("d")))
    else {
        return false;
    };
    let sources = sources.split_once(": ").map_or("", |(_, sources)| sources);
    sources.split_whitespace().all(|source| changed(Path::new(source)).is_some_and(|time| time <= built))
}

/// How the program is to be started: on a free port, with an environment that has nothing of this machine's.
#[derive(Debug)]
pub(crate) struct Launch {
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    scratch: Scratch,
    listen: bool,
}

impl Launch {
    /// With no configuration at all.
    pub(crate) fn bare() -> Self {
        let scratch = Scratch::new();
        let system = scratch.write("system.pem", SYSTEM.ca_pem());
        let launch = Self { arguments: Vec::new(), environment: Vec::new(), scratch, listen: false };
        // Whom the system trusts.
        launch.env("SSL_CERT_FILE", system)
    }

    /// With a key, for an API somewhere.
    pub(crate) fn new() -> Self {
        Self { listen: true, ..Self::bare() }
    }

    /// For this API, with a key that nobody else has.
    pub(crate) fn to(api: &impl Api) -> Self {
        let key = secret(format!("sk-selam-{}", unguessable()));
        Self::toward(api).env("SELAM_API_KEY", key)
    }

    /// For this API.
    pub(crate) fn toward(api: &impl Api) -> Self {
        let launch = Self::new().env("SELAM_BASE_URL", api.base_url());
        match api.ca_pem() {
            None => launch.arg("--allow-insecure-loopback"),
            Some(pem) => {
                let path = launch.scratch.write("ca.pem", pem);
                launch.arg("--ca").arg(path)
            }
        }
    }

    pub(crate) fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub(crate) fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, arguments: I) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub(crate) fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.into()));
        self
    }

    /// With a file of `name:token` lines.
    pub(crate) fn callers(self, lines: &str) -> Self {
        let path = self.scratch.write("tokens", lines);
        self.arg("--client-token-file").arg(path)
    }

    /// With the key in a file, named by the variable for it.
    pub(crate) fn key_file(self, key: &str) -> Self {
        let path = self.scratch.write("key", key);
        self.env("SELAM_API_KEY_FILE", path)
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The program, with what it says to standard error in a file.
    fn command(&self) -> (Command, PathBuf) {
        let errors = self.scratch.path("stderr");
        let mut command = Command::new(program());
        if self.listen {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command
            .args(&self.arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stderr(File::create(&errors).unwrap());
        (command, errors)
    }

    pub(crate) async fn start(self) -> Proxy {
        let (mut command, errors) = self.command();
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (said, heard) = oneshot::channel();
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            let _ = output.read_line(&mut line);
            let _ = said.send(line.clone());
            let _ = output.read_to_string(&mut line);
            line
        });
        // Ends it, should this be in vain.
        let mut proxy = Proxy {
            address: SocketAddr::from(([0; 4], 0)),
            child,
            reader: Some(reader),
            errors,
            scratch: self.scratch,
        };
        let line = soon(heard).await.unwrap();
        proxy.address = line
            .strip_prefix("listening on http://")
            .and_then(|rest| rest.strip_suffix('\n')?.parse().ok())
            .unwrap_or_else(|| panic!("{line:?} is not the line that says where; {}", proxy.errors()));
        proxy
    }

    /// Starts it in vain: what it says on its one line.
    pub(crate) async fn fail(self) -> String {
        let (status, output, errors) = self.run().await;
        assert_eq!(status.code(), Some(2), "{errors}");
        assert_eq!(output, "", "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors:?}");
        assert!(errors.ends_with('\n'), "{errors:?}");
        errors
    }

    /// Runs it to its end: its status, what it printed, and what it printed to standard error.
    pub(crate) async fn run(self) -> (ExitStatus, String, String) {
        let (mut command, errors) = self.command();
        let output = self.scratch.path("stdout");
        let mut child = Ended(command.stdout(File::create(&output).unwrap()).spawn().unwrap());
        let status = eventually("the program has ended", async || child.0.try_wait().unwrap()).await;
        let (output, errors) = (fs::read_to_string(output).unwrap(), fs::read_to_string(errors).unwrap());
        assert_clean("standard output", output.as_bytes());
        assert_clean("standard error", errors.as_bytes());
        (status, output, errors)
    }
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program while it runs. Killed when dropped, and then all that it ever printed is searched for secrets.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    child: Child,
    reader: Option<JoinHandle<String>>,
    errors: PathBuf,
    scratch: Scratch,
}

impl Proxy {
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// What it has said to standard error so far.
    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap()
    }

    /// Waits until a line of the log says this.
    pub(crate) async fn logs(&self, needle: &str) -> String {
        eventually(&format!("the log has {needle:?}"), async || {
            self.errors().lines().find(|line| line.contains(needle)).map(str::to_owned)
        })
        .await
    }

    pub(crate) fn signal(&self, signal: &str) {
        let id = self.child.id();
        let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {id}")]).status();
        assert!(sent.unwrap().success());
    }

    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        eventually("the proxy has ended", async || self.child.try_wait().unwrap()).await
    }

    /// The most memory that it ever took, in KiB, where the system tells.
    pub(crate) fn peak_memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        peak.trim().strip_suffix(" kB")?.parse().ok()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let output = self.reader.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let errors = self.errors();
        if std::thread::panicking() {
            eprintln!("what the proxy said:\n{output}{errors}");
        } else {
            assert_clean("standard output", output.as_bytes());
            assert_clean("standard error", errors.as_bytes());
            assert!(!errors.contains("panicked"), "{errors}");
        }
    }
}

/// Something that stands nowhere by chance.
pub(crate) fn unguessable() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:016x}{:016x}", RandomState::new().hash_one(1), RandomState::new().hash_one(2))
}
