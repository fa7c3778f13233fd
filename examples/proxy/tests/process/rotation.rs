//! Credentials that change while callers send: no request is lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time;
use tower_selam::simulator::{Server, Simulator};

use crate::support::{Caller, Launch, Protocol, Proxy, eventually, secret};

const CALLERS: usize = 16;
const ROTATIONS: u32 = 5;
const REVOCATIONS: u32 = 3;

/// Callers that send one request after the other, every one of which has to succeed.
struct Load {
    answered: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    calling: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn on(proxy: &Proxy, path: &'static str) -> Self {
        let (answered, enough) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let calling = (0..CALLERS).map(|number| {
            let caller = Caller::new(proxy, Protocol::BOTH[number % 2]);
            let (answered, enough) = (answered.clone(), enough.clone());
            tokio::spawn(async move {
                let body = format!(r#"{{"messages":[{{"role":"user","content":"{number}"}}]}}"#);
                while !enough.load(Ordering::Relaxed) {
                    let answer = caller.post(path, body.clone()).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self { calling: calling.collect(), answered, enough }
    }

    /// Waits until every caller has had some answers more.
    async fn goes_on(&self) {
        let goal = self.answered.load(Ordering::Relaxed) + 4 * CALLERS as u64;
        eventually("more requests are answered", async || {
            assert!(!self.calling.iter().any(tokio::task::JoinHandle::is_finished), "a request was lost");
            (self.answered.load(Ordering::Relaxed) >= goal).then_some(())
        })
        .await;
    }

    async fn end(self) {
        self.enough.store(true, Ordering::Relaxed);
        for calling in self.calling {
            calling.await.unwrap();
        }
    }
}

/// A key is rotated for the `number`th time, from 0 on, and the old one is worth nothing from the same moment: refusals that
/// follow each other closely are spaced by the library, a second at first, then twice as long each time.
async fn space(number: u32) {
    time::sleep(Duration::from_millis(100) + Duration::from_secs(1) * 2_u32.pow(number)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_revoked_as_it_is_rotated_under_load_loses_no_request() {
    let (simulator, api) = busy().await;
    let mut key = secret(simulator.issue_key());
    let proxy = Launch::toward(&api).key_file(&key).args(["--log", "debug"]).start().await;
    let load = Load::on(&proxy, "/v1/chat/completions");
    load.goes_on().await;
    for number in 0..REVOCATIONS {
        let new = secret(simulator.issue_key());
        proxy.scratch().write("key", &new);
        simulator.revoke_key(&key);
        key = new;
        load.goes_on().await;
        space(number).await;
    }
    load.end().await;
    let last = simulator.received().pop().unwrap();
    assert_eq!(last.headers["authorization"], format!("Bearer {key}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_rotated_before_it_is_revoked_loses_no_request_however_often() {
    let (simulator, api) = busy().await;
    let mut key = secret(simulator.issue_key());
    let proxy = Launch::toward(&api).key_file(&key).args(["--log", "debug"]).start().await;
    let load = Load::on(&proxy, "/v1/chat/completions");
    load.goes_on().await;
    for _ in 0..ROTATIONS {
        let new = secret(simulator.issue_key());
        proxy.scratch().write("key", &new);
        // Found without any refusal.
        let bearer = format!("Bearer {new}");
        eventually("the new key is in use", async || {
            simulator
                .received()
                .last()
                .is_some_and(|sent| sent.headers["authorization"] == bearer)
                .then_some(())
        })
        .await;
        simulator.revoke_key(&key);
        key = new;
        load.goes_on().await;
    }
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jwts_that_expire_under_load_lose_no_request() {
    let (simulator, api) = busy().await;
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = Launch::toward(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    let proxy = launch.env("SELAM_TOKEN_URL", url).args(["--log", "debug"]).start().await;
    let load = Load::on(&proxy, "/v1/audio/agent/sessions");
    load.goes_on().await;
    for number in 0..REVOCATIONS {
        simulator.expire_jwts();
        load.goes_on().await;
        space(number).await;
    }
    load.end().await;
    // One renewal for all of them, each time.
    assert_eq!(simulator.token_requests(), 1 + u64::from(REVOCATIONS));
}

async fn busy() -> (Simulator, Server) {
    let simulator = Simulator::new();
    simulator.set_rate_limit(u64::MAX);
    let api = Server::tls(&simulator).await.unwrap();
    (simulator, api)
}
