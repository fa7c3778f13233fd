//! [`Member`]: a member of a fleet as a process.

use std::{process::Stdio, time::Duration};

use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{Instant, sleep},
};

use super::{Folder, HANG, in_time, signal};

/// Configures a member by its environment.
#[derive(Default)]
pub(crate) struct Launch(Vec<(&'static str, String)>);

impl Launch {
    pub(crate) fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.0.push((name, value.to_string()));
        self
    }

    /// Lets the member use the login that the fleet shares.
    pub(crate) fn login(self) -> Self {
        self.with("MODE", "login")
    }

    pub(crate) fn start(self) -> Member {
        let folder = Folder::new();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_fleet-member"))
            .env_clear()
            .envs(self.0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap()).lines();
        Member { process, input, output, folder }
    }
}

/// A member of a fleet as a process.
pub(crate) struct Member {
    process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    folder: Folder,
}

impl Member {
    /// Sends a command.
    pub(crate) async fn tell(&mut self, command: &str) {
        self.input.write_all(format!("{command}\n").as_bytes()).await.unwrap();
    }

    /// Returns the answer to a command; `None` if the member has ended.
    pub(crate) async fn answer(&mut self) -> Option<String> {
        in_time(self.output.next_line()).await.unwrap()
    }

    pub(crate) async fn ask(&mut self, command: &str) -> String {
        self.tell(command).await;
        match self.answer().await {
            Some(answer) => answer,
            None => panic!("the member has ended: {}", self.log()),
        }
    }

    /// Asks for a token, which is to be served.
    pub(crate) async fn token(&mut self) -> String {
        let answer = self.ask("token").await;
        assert!(answer.starts_with("token ") && !answer.contains(','), "{answer}");
        answer
    }

    /// Asks for a token until it is served.
    pub(crate) async fn is_served(&mut self) {
        let start = Instant::now();
        loop {
            let answer = self.ask("token").await;
            if answer.starts_with("token ") {
                return;
            }
            assert!(start.elapsed() < HANG, "{answer}: {}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    pub(crate) async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }

    /// Waits until the member has ended.
    pub(crate) async fn ended(&mut self) {
        assert_eq!(self.answer().await, None);
        in_time(self.process.wait()).await.unwrap();
    }

    pub(crate) fn stop(&self) {
        signal(&self.process, Signal::STOP);
    }

    pub(crate) fn resume(&self) {
        signal(&self.process, Signal::CONT);
    }
}
