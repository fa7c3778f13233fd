//! A Redis of the example's own.

use std::{env, fs, path::PathBuf, process::Stdio, time::Duration};

use redis::{
    Client,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::sleep,
};
use tower_selam::{BoxError, fleet::RedisStore};

const MISSING: &str = "redis-server does not start; to install it: apt install redis-server, brew install redis, or dnf install valkey-compat-redis";

/// The server, which keeps nothing on disk. It ends, and its folder is removed, when this is dropped.
pub(crate) struct Redis {
    server: Child,
    folder: PathBuf,
    url: String,
}

impl Redis {
    pub(crate) async fn start() -> Result<Self, BoxError> {
        let folder = env::temp_dir().join(format!("selam-fleet-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let socket = folder.join("redis.sock");
        let server = spawn(&socket)?;
        let redis = Self { server, folder, url: format!("unix://{}", socket.display()) };
        redis.is_ready().await?;
        Ok(redis)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn store(&self) -> Result<RedisStore<ConnectionManager>, BoxError> {
        store(&self.url)
    }

    pub(crate) async fn kill(&mut self) -> Result<(), BoxError> {
        Ok(self.server.kill().await?)
    }

    pub(crate) async fn restart(&mut self) -> Result<(), BoxError> {
        self.server = spawn(&self.socket())?;
        self.is_ready().await
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("redis.sock")
    }

    async fn is_ready(&self) -> Result<(), BoxError> {
        for _ in 0..100 {
            if UnixStream::connect(self.socket()).await.is_ok() {
                return Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
        Err(MISSING.into())
    }
}

/// A store that connects when it is first used, and again after a failure.
pub(crate) fn store(url: &str) -> Result<RedisStore<ConnectionManager>, BoxError> {
    let config = ConnectionManagerConfig::new().set_number_of_retries(0);
    Ok(RedisStore::new(ConnectionManager::new_lazy_with_config(Client::open(url)?, config)?))
}

fn spawn(socket: &std::path::Path) -> Result<Child, BoxError> {
    let _ = fs::remove_file(socket);
    let mut command = Command::new("redis-server");
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(socket);
    let server = command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true).spawn();
    server.map_err(|error| format!("{MISSING} ({error})").into())
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.server.start_kill();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
