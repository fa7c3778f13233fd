//! Helpers of the tests: a Redis server, a line to it that fails, and members.

mod forwarder;
mod member;
mod server;

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{process::Child, time};
use tower_selam::{
    fleet::{Fleet, RedisStore, SealingKey, Status},
    oauth::{ClientAuth, RefreshToken, TokenEndpoint},
    simulator::{Server, Simulator},
};

pub(crate) use self::{
    forwarder::{Forwarder, Line},
    member::{Launch, Member},
    server::RedisServer,
};

/// Time limit that only a hanging test reaches.
const HANG: Duration = Duration::from_secs(30);

/// A key in base64.
pub(crate) const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8";

/// What the members of a fleet need: a token endpoint and a store.
pub(crate) struct World {
    pub(crate) issuer: Simulator,
    endpoint: Server,
    client: (String, String),
    pub(crate) redis: RedisServer,
}

impl World {
    /// `None` where Redis is missing.
    pub(crate) async fn start() -> Option<Self> {
        let redis = RedisServer::start().await?;
        let issuer = Simulator::new();
        let endpoint = Server::http(&issuer).await.unwrap();
        let client = issuer.issue_client();
        Some(Self { issuer, endpoint, client, redis })
    }

    /// Configures a member that uses the client's credentials.
    pub(crate) fn launch(&self) -> Launch {
        Launch::default()
            .with("FLEET", "billing")
            .with("KEY", KEY)
            .with("STORE", self.redis.url())
            .with("ENDPOINT", format!("http://{}/oauth/token", self.endpoint.local_addr()))
            .with("CLIENT_ID", &self.client.0)
            .with("CLIENT_SECRET", &self.client.1)
    }

    pub(crate) fn members<const N: usize>(&self, launch: impl Fn(Launch) -> Launch) -> [Member; N] {
        std::array::from_fn(|_| launch(self.launch()).start())
    }

    pub(crate) async fn fleet(&self) -> Fleet {
        join(&self.redis).await
    }

    /// Begins a login of the fleet.
    pub(crate) async fn log_in(&self) -> String {
        let token = self.issuer.issue_refresh_token();
        self.fleet().await.log_in("selam", &RefreshToken::new(&*token).unwrap()).await.unwrap();
        token
    }

    pub(crate) async fn status(&self) -> Option<Status> {
        self.fleet().await.status("selam").await.unwrap()
    }

    /// The token endpoint, as members reach it.
    pub(crate) fn token_endpoint(&self) -> TokenEndpoint {
        let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let url = format!("http://{}/oauth/token", self.endpoint.local_addr());
        let auth = ClientAuth::client_secret_basic(&*self.client.0, &*self.client.1).unwrap();
        TokenEndpoint::allow_insecure_loopback(&url, client).unwrap().with_client_auth(auth)
    }

    pub(crate) fn client_secret(&self) -> &str {
        &self.client.1
    }
}

/// Joins the fleet with this process.
pub(crate) async fn join(redis: &RedisServer) -> Fleet {
    let store = RedisStore::new(redis.connect().await);
    let key = SealingKey::from_base64(KEY).unwrap();
    Fleet::builder("billing", store, key).with_store_timeout(HANG).build().unwrap()
}

/// Polls a condition until it holds, where no event announces it.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let polled = time::timeout(HANG, async {
        let mut ticks = time::interval(Duration::from_millis(10));
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(value) = condition().await {
                return value;
            }
        }
    });
    match polled.await {
        Ok(value) => value,
        Err(_) => panic!("timed out waiting until {what}"),
    }
}

/// Bounds a future that should not take long.
pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    time::timeout(HANG, future).await.expect("in time")
}

fn signal(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)).expect("a running process");
    kill_process(pid, signal).unwrap();
}

/// A temporary directory, removed on drop.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tower-selam-fleet-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
