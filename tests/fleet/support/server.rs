//! [`RedisServer`]: a Redis of the test's own, which can be killed, stopped and restarted.

use std::{
    env,
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::Stdio,
};

use redis::{
    Client, FromRedisValue,
    aio::{ConnectionManager, MultiplexedConnection},
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy, sink},
    net::TcpStream,
    process::{Child, Command},
};

use super::{Folder, in_time, signal};

/// A Redis of the test's own, without persistence.
pub(crate) struct RedisServer {
    port: u16,
    folder: Folder,
    process: Child,
}

/// Records the calls of a server.
pub(crate) struct Monitor(TcpStream);

impl Monitor {
    /// Returns what was called.
    pub(crate) async fn stop(mut self) -> String {
        self.0.write_all(b"QUIT\r\n").await.unwrap();
        let mut calls = Vec::new();
        in_time(self.0.read_to_end(&mut calls)).await.unwrap();
        String::from_utf8_lossy(&calls).into_owned()
    }
}

/// Where the server is installed. Without it, the tests are skipped, unless the gate asks for them with `REQUIRE_REDIS`.
fn program() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join("redis-server")).find(|path| path.is_file());
    if found.is_none() {
        assert!(env::var_os("REQUIRE_REDIS").is_none(), "redis-server is not installed");
        // The test harness would capture `eprintln!`.
        let _ = std::io::stderr().write_all(b"\nSKIPPED a test with redis-server, which is not installed\n");
    }
    found
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl RedisServer {
    /// `None` where it is not installed.
    pub(crate) async fn start() -> Option<Self> {
        program()?;
        loop {
            // Another program may take the port meanwhile.
            let (port, folder) = (free_port(), Folder::new());
            if let Some(process) = run(port, &folder).await {
                return Some(Self { port, folder, process });
            }
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    pub(crate) async fn connect(&self) -> ConnectionManager {
        in_time(ConnectionManager::new(Client::open(self.url()).unwrap())).await.unwrap()
    }

    pub(crate) async fn run<T: FromRedisValue>(&self, command: &str) -> T {
        let client = Client::open(self.url()).unwrap();
        let mut connection: MultiplexedConnection =
            in_time(client.get_multiplexed_async_connection()).await.unwrap();
        let mut words = command.split(' ');
        let mut command = redis::cmd(words.next().unwrap());
        command.arg(words.collect::<Vec<_>>());
        in_time(command.query_async(&mut connection)).await.unwrap()
    }

    /// Records all calls.
    pub(crate) async fn monitor(&self) -> Monitor {
        let mut connection = in_time(TcpStream::connect(self.address())).await.unwrap();
        connection.write_all(b"MONITOR\r\n").await.unwrap();
        let mut confirmed = [0; 5];
        in_time(connection.read_exact(&mut confirmed)).await.unwrap();
        assert_eq!(&confirmed, b"+OK\r\n");
        Monitor(connection)
    }

    /// Ends the server at once.
    pub(crate) async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }

    /// Starts the server again, empty and under the same address.
    pub(crate) async fn restart(&mut self) {
        self.process = run(self.port, &self.folder).await.expect("the port is free");
    }

    pub(crate) fn stop(&self) {
        signal(&self.process, Signal::STOP);
    }

    pub(crate) fn resume(&self) {
        signal(&self.process, Signal::CONT);
    }
}

/// Returns the server once it accepts connections; `None` if it ends.
async fn run(port: u16, folder: &Folder) -> Option<Child> {
    let mut process = Command::new(program()?)
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"])
        .args(["--repl-diskless-sync-delay", "0"])
        .arg("--port")
        .arg(port.to_string())
        .arg("--dir")
        .arg(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    while let Some(line) = in_time(lines.next_line()).await.unwrap() {
        if line.contains("Ready to accept connections") {
            tokio::spawn(async move { copy(&mut lines.into_inner(), &mut sink()).await });
            return Some(process);
        }
    }
    None
}
