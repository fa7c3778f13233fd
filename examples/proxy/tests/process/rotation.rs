//! Credentials that are rotated or refreshed under load, without a failed request.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::Response;
use http_body_util::BodyExt;
use tokio::time;
use tower_selam::simulator::{Server, Simulator};

use crate::support::{Api, Caller, Launch, Protocol, Proxy, TlsListener, eventually, full, random, secret};

const CALLERS: usize = 16;
const ROTATIONS: u32 = 3;
const REVOCATIONS: u32 = 2;

/// The pause between two revocations: the library spaces the refreshes after rejections in close succession, by a second at
/// first.
const PAUSE: Duration = Duration::from_millis(1100);

/// Callers that send one request after another; every request must succeed.
struct Load {
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    calling: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn on(proxy: &Proxy, path: &'static str) -> Self {
        let (answered, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let calling = (0..CALLERS).map(|number| {
            let caller = Caller::new(proxy, Protocol::BOTH[number % 2]);
            let (answered, stop) = (answered.clone(), stop.clone());
            tokio::spawn(async move {
                let body = format!(r#"{{"messages":[{{"role":"user","content":"{number}"}}]}}"#);
                while !stop.load(Ordering::Relaxed) {
                    let answer = caller.post(path, body.clone()).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self { calling: calling.collect(), answered, stop }
    }

    /// Waits until more requests have been answered: four per caller on average.
    async fn progress(&self) {
        let goal = self.answered.load(Ordering::Relaxed) + 4 * CALLERS as u64;
        eventually("more requests are answered", async || {
            assert!(!self.calling.iter().any(tokio::task::JoinHandle::is_finished), "a request failed");
            (self.answered.load(Ordering::Relaxed) >= goal).then_some(())
        })
        .await;
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for calling in self.calling {
            calling.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_revoked_on_rotation_fails_no_request() {
    let (simulator, api) = busy().await;
    let mut key = secret(simulator.issue_key());
    let proxy = Launch::for_api(&api).key_file(&key).args(["--log", "debug"]).start().await;
    let load = Load::on(&proxy, "/v1/chat/completions");
    load.progress().await;
    for number in 0..REVOCATIONS {
        if number > 0 {
            time::sleep(PAUSE).await;
        }
        let new = secret(simulator.issue_key());
        proxy.scratch().write("key", &new);
        simulator.revoke_key(&key);
        key = new;
        load.progress().await;
    }
    load.end().await;
    let last = simulator.received().pop().unwrap();
    assert_eq!(last.headers["authorization"], format!("Bearer {key}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_revoked_after_rotation_fails_no_request() {
    let (simulator, api) = busy().await;
    let mut key = secret(simulator.issue_key());
    let proxy = Launch::for_api(&api).key_file(&key).args(["--log", "debug"]).start().await;
    let load = Load::on(&proxy, "/v1/chat/completions");
    load.progress().await;
    for _ in 0..ROTATIONS {
        let new = secret(simulator.issue_key());
        proxy.scratch().write("key", &new);
        // The new key is picked up without a rejection.
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
        load.progress().await;
    }
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expiring_jwts_fail_no_request() {
    let (simulator, api) = busy().await;
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    let proxy = launch.env("SELAM_TOKEN_URL", url).args(["--log", "debug"]).start().await;
    let load = Load::on(&proxy, "/v1/audio/agent/sessions");
    load.progress().await;
    for number in 0..REVOCATIONS {
        if number > 0 {
            time::sleep(PAUSE).await;
        }
        simulator.expire_jwts();
        load.progress().await;
    }
    load.end().await;
    // Single flight: one refresh for all callers, each time.
    assert_eq!(simulator.token_requests(), 1 + u64::from(REVOCATIONS));
}

async fn busy() -> (Simulator, Server) {
    let simulator = Simulator::new();
    simulator.set_rate_limit(u64::MAX);
    let api = Server::tls(&simulator).await.unwrap();
    (simulator, api)
}

/// J10: an endpoint that answers 401 to everybody, while file and token endpoint rightly return the same JWT all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejecting_endpoint_fails_no_request_of_others() {
    let jwt = secret(format!("ey.{}.cached", random()));
    for in_file in [true, false] {
        let token_requests = Arc::new(AtomicU64::new(0));
        let api = TlsListener::listen(Protocol::Http2).await.exchanges().answer_all({
            let (jwt, token_requests) = (jwt.clone(), Arc::clone(&token_requests));
            move |request| {
                let bearer = request.headers().get("authorization").and_then(|value| value.to_str().ok());
                let (status, body) = match request.uri().path() {
                    "/oauth/token" => {
                        token_requests.fetch_add(1, Ordering::Relaxed);
                        (
                            200,
                            format!(r#"{{"access_token":"{jwt}","token_type":"Bearer","expires_in":3600}}"#),
                        )
                    }
                    "/v1/rejecting" => (401, r#"{"error":{"code":"invalid_token"}}"#.to_owned()),
                    _ if bearer == Some(&*format!("Bearer {jwt}")) => (200, "{}".to_owned()),
                    _ => (401, r#"{"error":{"code":"invalid_token"}}"#.to_owned()),
                };
                let response = Response::builder().status(status).header("content-type", "application/json");
                let response = response.body(full(body)).unwrap();
                async move {
                    let _ = request.into_body().collect().await;
                    response
                }
            }
        });
        let launch = Launch::with_key(&api);
        let proxy = if in_file {
            let file = launch.scratch().write("jwt", &jwt);
            launch.env("SELAM_JWT_FILE", file).start().await
        } else {
            let url = api.base_url().replace("/v1", "/oauth/token");
            launch.env("SELAM_TOKEN_URL", url).start().await
        };
        let load = Load::on(&proxy, "/v1/chat/completions");
        let caller = Caller::http1(&proxy);
        load.progress().await;
        for _ in 0..8 {
            let answer = caller.post("/v1/rejecting", "{}").await;
            assert_eq!(
                (answer.status.as_u16(), answer.text()),
                (401, r#"{"error":{"code":"invalid_token"}}"#)
            );
            load.progress().await;
        }
        load.end().await;
        assert!(in_file || (2..8).contains(&token_requests.load(Ordering::Relaxed)), "{token_requests:?}");
    }
}
