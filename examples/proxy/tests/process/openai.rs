//! The official Python client, through the proxy, with no key of its own: `tests/openai.py`.
//!
//! It is installed from PyPI into a virtual environment below cargo's target directory, once.

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

use crate::support::{Launch, assert_clean, secret, unguessable};

/// What is installed.
const CLIENT: &str = "openai>=1.60,<4";

/// PyPI may be slow, or far.
const INSTALLING: Duration = Duration::from_secs(180);

/// Printed even though the test passes: the test harness keeps to itself what goes through `eprintln!`.
fn skip(why: &str) {
    let line = format!("\nSKIPPED the official openai client through the proxy: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

async fn run(program: impl AsRef<OsStr>, arguments: &[&OsStr], limit: Duration) -> Result<Output, String> {
    let mut command = Command::new(program.as_ref());
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let named = || format!("{} {arguments:?}", program.as_ref().display());
    match time::timeout(limit, command.output()).await {
        Err(_) => Err(format!("{} took too long", named())),
        Ok(Err(error)) => Err(format!("{}: {error}", named())),
        Ok(Ok(output)) if output.status.success() => Ok(output),
        Ok(Ok(output)) => {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            Err(format!("{}: {}", named(), said.trim().lines().last().unwrap_or("failed")))
        }
    }
}

/// A Python that has the client, or why there is none.
async fn python() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (ready, new) = (folder.join("openai"), folder.join(format!("openai-{}", std::process::id())));
    if has_client(&ready).await {
        return Ok(python_of(&ready));
    }
    let installed = install(&new).await;
    if installed.is_ok() {
        // Whole, or not at all: others may look for it at the same time.
        let _ = fs::remove_dir_all(&ready);
        let _ = fs::rename(&new, &ready);
    }
    let _ = fs::remove_dir_all(&new);
    installed?;
    if has_client(&ready).await { Ok(python_of(&ready)) } else { Err("it is not there any more".to_owned()) }
}

fn python_of(environment: &Path) -> PathBuf {
    environment.join("bin/python")
}

/// Written when all is there; with what was asked for in it.
fn stamp_of(environment: &Path) -> PathBuf {
    environment.join("installed")
}

async fn has_client(environment: &Path) -> bool {
    let import = ["-c", "import openai"].map(OsStr::new);
    fs::read_to_string(stamp_of(environment)).is_ok_and(|installed| installed == CLIENT)
        && run(python_of(environment), &import, INSTALLING).await.is_ok()
}

async fn install(environment: &Path) -> Result<(), String> {
    let arguments = ["-m", "venv", "--clear"].map(OsStr::new);
    run("python3", &[&arguments[..], &[environment.as_os_str()]].concat(), INSTALLING).await?;
    let arguments =
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLIENT].map(OsStr::new);
    run(python_of(environment), &arguments, INSTALLING).await?;
    fs::write(stamp_of(environment), CLIENT).map_err(|error| error.to_string())
}

async fn simulated() -> (Simulator, Server) {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    (simulator, api)
}

/// As SelamAPI documents it.
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
async fn the_official_client_gets_answers_streams_audio_and_typed_errors() {
    let python = match python().await {
        Ok(python) => python,
        Err(why) => return skip(&why),
    };
    let (simulator, api) = simulated().await;
    let (full, limited, revoked) =
        (simulator.issue_key(), simulator.issue_limited_key(), simulator.issue_key());
    simulator.revoke_key(&revoked);
    let (forgetful, forgetful_api) = simulated().await;
    let missing = forgetful.issue_key();
    forgetful.inject(Fault::Answer(no_key()));
    let token = secret(format!("caller-{}", unguessable()));
    let mut proxies = Vec::new();
    for (api, key) in [(&api, full), (&api, limited), (&api, revoked), (&forgetful_api, missing)] {
        let launch = Launch::toward(api).env("SELAM_API_KEY", secret(key)).callers(&format!("web:{token}\n"));
        proxies.push(launch.start().await);
    }
    // What the audio is to be, from the API without anything between.
    let speech = proxies[0].scratch().write("speech.wav", speech(&simulator).await);

    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai.py"));
    for proxy in &proxies {
        command.arg(format!("http://{}/v1", proxy.address()));
    }
    command.arg(speech);
    // All that it has is the token; and nothing else stands between it and the proxy.
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
    let output = time::timeout(INSTALLING, command.output()).await.unwrap().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
    assert_eq!(said.lines().last(), Some("all is well"), "{said}{errors}");
    // It saw no secret but its own.
    assert_clean("what the client saw", said.replace(&token, "").as_bytes());
}
