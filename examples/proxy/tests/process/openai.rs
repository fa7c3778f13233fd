//! The official OpenAI client for Python, which uses the proxy with a client token: `tests/openai.py`.
//!
//! The client is installed from PyPI into a virtual environment in cargo's target directory, once.

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::{process::Command, time};
use tower::ServiceExt;
use tower_selam::simulator::{Fault, Server, Simulator};

use crate::support::{Launch, assert_clean, random, secret};

/// The requirement that is installed.
const CLIENT: &str = "openai>=1.60,<4";

/// Generous, since PyPI may be slow.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Prints the reason although the test passes: the test harness would capture `eprintln!`.
fn skip(why: &str) {
    let line = format!("\nSKIPPED the test with the official openai client: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

async fn run(program: impl AsRef<OsStr>, arguments: &[&OsStr], limit: Duration) -> Result<Output, String> {
    let mut command = Command::new(program.as_ref());
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let command_line = || format!("{} {arguments:?}", program.as_ref().display());
    match time::timeout(limit, command.output()).await {
        Err(_) => Err(format!("{} timed out", command_line())),
        Ok(Err(error)) => Err(format!("{}: {error}", command_line())),
        Ok(Ok(output)) if output.status.success() => Ok(output),
        Ok(Ok(output)) => {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            Err(format!("{}: {}", command_line(), text.trim().lines().last().unwrap_or("failed")))
        }
    }
}

/// Returns a Python interpreter with the client installed, or why there is none.
async fn python() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (ready, new) = (folder.join("openai"), folder.join(format!("openai-{}", std::process::id())));
    if has_client(&ready).await {
        return Ok(python_of(&ready));
    }
    let installed = install(&new).await;
    if installed.is_ok() {
        // Renamed into place, since another process may use it at the same time.
        let _ = fs::remove_dir_all(&ready);
        let _ = fs::rename(&new, &ready);
    }
    let _ = fs::remove_dir_all(&new);
    installed?;
    if has_client(&ready).await {
        Ok(python_of(&ready))
    } else {
        Err("the installed client has disappeared".to_owned())
    }
}

fn python_of(environment: &Path) -> PathBuf {
    environment.join("bin/python")
}

/// A file written after the installation, with the installed requirement.
fn stamp_of(environment: &Path) -> PathBuf {
    environment.join("installed")
}

async fn has_client(environment: &Path) -> bool {
    let import = ["-c", "import openai"].map(OsStr::new);
    fs::read_to_string(stamp_of(environment)).is_ok_and(|installed| installed == CLIENT)
        && run(python_of(environment), &import, TIMEOUT).await.is_ok()
}

async fn install(environment: &Path) -> Result<(), String> {
    let arguments = ["-m", "venv", "--clear"].map(OsStr::new);
    run("python3", &[&arguments[..], &[environment.as_os_str()]].concat(), TIMEOUT).await?;
    let arguments =
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLIENT].map(OsStr::new);
    run(python_of(environment), &arguments, TIMEOUT).await?;
    fs::write(stamp_of(environment), CLIENT).map_err(|error| error.to_string())
}

async fn simulated() -> (Simulator, Server) {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    (simulator, api)
}

/// The documented response to a request without a key.
fn no_key() -> Response<Bytes> {
    let body = r#"{"error":{"message":"No API key provided.","type":"authentication_error","code":"missing_api_key"}}"#;
    Response::builder().status(401).header("content-type", "application/json").body(body.into()).unwrap()
}

async fn speech(simulator: &Simulator) -> Bytes {
    let request = Request::post("https://localhost/v1/audio/speech")
        .header("authorization", format!("Bearer {}", simulator.issue_key()))
        .body("{}".to_owned());
    let response = simulator.clone().oneshot(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap().to_bytes()
}

#[tokio::test]
async fn the_official_client_works() {
    let python = match python().await {
        Ok(python) => python,
        Err(why) => return skip(&why),
    };
    let (simulator, api) = simulated().await;
    let (full, limited, revoked) =
        (simulator.issue_key(), simulator.issue_limited_key(), simulator.issue_key());
    simulator.revoke_key(&revoked);
    let (keyless, keyless_api) = simulated().await;
    let missing = keyless.issue_key();
    keyless.inject(Fault::Answer(no_key()));
    let token = secret(format!("caller-{}", random()));
    let mut proxies = Vec::new();
    for (api, key) in [(&api, full), (&api, limited), (&api, revoked), (&keyless_api, missing)] {
        let launch =
            Launch::for_api(api).env("SELAM_API_KEY", secret(key)).callers(&format!("web:{token}\n"));
        proxies.push(launch.start().await);
    }
    // The expected audio, directly from the API.
    let speech = proxies[0].scratch().write("speech.wav", speech(&simulator).await);

    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai.py"));
    for proxy in &proxies {
        command.arg(format!("http://{}/v1", proxy.address()));
    }
    command.arg(speech);
    // The client has the token alone, and connects to the proxy directly.
    command.env("OPENAI_API_KEY", &token).env("NO_PROXY", "*").kill_on_drop(true);
    for name in [
        "OPENAI_BASE_URL",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    let output = time::timeout(TIMEOUT, command.output()).await.unwrap().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert_eq!(stdout.lines().last(), Some("all is well"), "{stdout}{stderr}");
    // The client saw no secret except its own token.
    assert_clean("output of the client", stdout.replace(&token, "").as_bytes());
}
