//! The proxy as a child process: [`Launch`] configures it, [`Proxy`] is the running process.

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

use super::{Api, SYSTEM, Scratch, assert_clean, eventually, secret, with_timeout};

/// Returns the path of the program, and builds it if necessary.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| example("proxy"))
}

/// Returns the path of an example, and builds it if necessary.
///
/// `cargo test` without a target builds the examples too, but `cargo test --test process` does not: the example may then be
/// missing or older than its sources.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let program = folder.join("examples").join(name);
    if !is_current(&program) {
        let profile = match folder.file_name().and_then(OsStr::to_str) {
            Some("debug") | None => "dev",
            Some(profile) => profile,
        };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--package", "example-proxy", "--example", name, "--profile", profile])
            .arg("--target-dir")
            .arg(folder.parent().expect("target/PROFILE"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(built.unwrap().success());
    }
    program
}

/// Whether the program exists and is newer than all its sources.
fn is_current(program: &Path) -> bool {
    let changed = |path: &Path| -> Option<SystemTime> { fs::metadata(path).ok()?.modified().ok() };
    let (Some(built), Ok(sources)) = (changed(program), fs::read_to_string(program.with_extension("d")))
    else {
        return false;
    };
    let sources = sources.split_once(": ").map_or("", |(_, sources)| sources);
    sources.split_whitespace().all(|source| changed(Path::new(source)).is_some_and(|time| time <= built))
}

/// Configures the program, which starts with an empty environment.
#[derive(Debug)]
pub(crate) struct Launch {
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    scratch: Scratch,
    listen: bool,
}

impl Launch {
    /// Without any configuration.
    pub(crate) fn bare() -> Self {
        let scratch = Scratch::new();
        let system = scratch.write("system.pem", SYSTEM.ca_pem());
        let launch = Self { arguments: Vec::new(), environment: Vec::new(), scratch, listen: false };
        // Replaces the system's certificate authorities.
        launch.env("SSL_CERT_FILE", system)
    }

    /// On a free port of the loopback address.
    pub(crate) fn new() -> Self {
        Self { listen: true, ..Self::bare() }
    }

    /// For this API, with a random key.
    pub(crate) fn with_key(api: &impl Api) -> Self {
        let key = secret(format!("sk-selam-{}", random()));
        Self::for_api(api).env("SELAM_API_KEY", key)
    }

    /// For this API, without credentials.
    pub(crate) fn for_api(api: &impl Api) -> Self {
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

    /// With a client token file of these `name:token` lines.
    pub(crate) fn callers(self, lines: &str) -> Self {
        let path = self.scratch.write("tokens", lines);
        self.arg("--client-token-file").arg(path)
    }

    /// With the key in a file, named by `SELAM_API_KEY_FILE`.
    pub(crate) fn key_file(self, key: &str) -> Self {
        let path = self.scratch.write("key", key);
        self.env("SELAM_API_KEY_FILE", path)
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Returns the command, and the file that receives its standard error.
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
        let (sender, first_line) = oneshot::channel();
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            let _ = output.read_line(&mut line);
            let _ = sender.send(line.clone());
            let _ = output.read_to_string(&mut line);
            line
        });
        // Created first, so that a panic below kills the child.
        let mut proxy = Proxy {
            address: SocketAddr::from(([0; 4], 0)),
            child,
            reader: Some(reader),
            errors,
            scratch: self.scratch,
        };
        let line = with_timeout(first_line).await.unwrap();
        proxy.address = line
            .strip_prefix("listening on http://")
            .and_then(|rest| rest.strip_suffix('\n')?.parse().ok())
            .unwrap_or_else(|| panic!("{line:?} does not contain the address; {}", proxy.errors()));
        proxy
    }

    /// Runs the program, which must fail with one line on standard error; returns that line.
    pub(crate) async fn fail(self) -> String {
        let (status, output, errors) = self.run().await;
        assert_eq!(status.code(), Some(2), "{errors}");
        assert_eq!(output, "", "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors:?}");
        assert!(errors.ends_with('\n'), "{errors:?}");
        errors
    }

    /// Runs the program to its end; returns its status, standard output and standard error.
    pub(crate) async fn run(self) -> (ExitStatus, String, String) {
        let (mut command, errors) = self.command();
        let output = self.scratch.path("stdout");
        let mut child = KillOnDrop(command.stdout(File::create(&output).unwrap()).spawn().unwrap());
        let status = eventually("the program has ended", async || child.0.try_wait().unwrap()).await;
        let (output, errors) = (fs::read_to_string(output).unwrap(), fs::read_to_string(errors).unwrap());
        assert_clean("standard output", output.as_bytes());
        assert_clean("standard error", errors.as_bytes());
        (status, output, errors)
    }
}

/// Kills the child when dropped.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The running program. When dropped, it is killed, and its output is searched for secrets.
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

    /// Returns its standard error so far.
    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap()
    }

    /// Waits for a log line that contains this text.
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

    /// Waits until the program exits.
    pub(crate) async fn exit_status(&mut self) -> ExitStatus {
        eventually("the proxy has ended", async || self.child.try_wait().unwrap()).await
    }

    /// Returns its peak memory in KiB, if the system reports it.
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
            eprintln!("output of the proxy:\n{output}{errors}");
        } else {
            assert_clean("standard output", output.as_bytes());
            assert_clean("standard error", errors.as_bytes());
            assert!(!errors.contains("panicked"), "{errors}");
        }
    }
}

/// Returns a random string that cannot occur in the output by chance.
pub(crate) fn random() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:016x}{:016x}", RandomState::new().hash_one(1), RandomState::new().hash_one(2))
}
