//! K5, K6: programs that print a token and end, as processes; the example `cli`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tower_selam::simulator::{Server, Simulator};

use crate::files::Directory;

/// The built example. `cargo test` builds it, unless only some targets are selected.
fn program() -> PathBuf {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(format!("cli{}", env::consts::EXE_SUFFIX));
    if !program.exists() {
        let target = profile.parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--all-features", "--example", "cli", "--target-dir"]).arg(target);
        build.args(profile.ends_with("release").then_some("--release"));
        assert!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
    }
    program
}

/// Returns the access token that a program printed.
fn token(program: Child) -> String {
    let output = program.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(errors.is_empty(), "{errors}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// K5, K6: 200 runs, 20 of them in pairs; the endpoint ends the login if a refresh token is used twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn login_survives_200_runs() {
    let simulator = Simulator::new();
    let server = Server::http(&simulator).await.unwrap();
    let first = simulator.issue_refresh_token();
    let (program, directory) = (program(), Directory::new());
    let file = directory.path().join("state").join("login");
    let url = format!("http://{}/oauth/token", server.local_addr());
    let start = || {
        let mut command = Command::new(&program);
        command.arg(&file).env("SELAM_TOKEN_URL", &url).env("SELAM_REFRESH_TOKEN", &first);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // The first pair also shares the first login.
    for run in 0..190 {
        let pair = if run % 19 == 0 { vec![start(), start()] } else { vec![start()] };
        for program in pair {
            assert_eq!(token(program).split('.').count(), 3);
        }
    }
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (200, 0));
    assert!(simulator.is_refresh_token_valid(fs::read_to_string(&file).unwrap().trim_end()));
}
