//! A handler of axum's that calls SelamAPI for its own caller: the client is in its `State`, and an `AuthError` becomes the
//! answer that this caller should get.
//!
//! ```console
//! $ cargo run -p example-axum
//! $ cargo run -p example-axum -- --listen 127.0.0.1:3000
//! ```
//!
//! The first calls itself and shows what it answers. Both talk to a simulator of the API over TLS; with `SELAM_API_KEY` set
//! (and, if you like, `SELAM_BASE_URL`) to the API itself.

use std::{error::Error as _, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::{
        self, HeaderMap, HeaderValue, Request, StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer};
use tower::{Layer, ServiceExt};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BaseUrl, BoxError, Provider, Refreshing, Selam, SelamLayer, env,
    simulator::{Server, Simulator},
    source::{Reason, SourceError, source_fn},
};

type Https = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// What every handler has: cheap to clone, as axum does for each request.
#[derive(Clone)]
struct App {
    selam: Selam<Https>,
    base_url: BaseUrl,
}

fn router(layer: &SelamLayer, client: Https) -> Result<Router, BoxError> {
    let app = App { selam: layer.layer(client), base_url: layer.base_url().clone() };
    Ok(Router::new().route("/ask", post(ask)).route("/speak", post(speak)).with_state(app))
}

#[derive(Deserialize)]
struct Question {
    question: String,
}

#[derive(Deserialize)]
struct Text {
    text: String,
}

/// Answers a question.
async fn ask(State(app): State<App>, Json(asked): Json<Question>) -> Result<Json<Value>, Failure> {
    let body = json!({ "model": "selam-turbo", "messages": [{ "role": "user", "content": asked.question }] });
    let answer = app.send("chat/completions", &body).await?.into_body().collect().await?.to_bytes();
    let answer: Value = serde_json::from_slice(&answer)?;
    Ok(Json(json!({ "answer": answer["choices"][0]["message"]["content"] })))
}

/// Speaks a text. The audio passes on as it comes.
async fn speak(State(app): State<App>, Json(asked): Json<Text>) -> Result<Response, Failure> {
    let body = json!({ "model": "selam-tts", "voice": "mekdes", "input": asked.text });
    let (head, body) = app.send("audio/speech", &body).await?.into_parts();
    let kind = head.headers.get(CONTENT_TYPE).cloned();
    let mut response = Response::new(Body::new(body));
    response.headers_mut().extend(kind.map(|kind| (CONTENT_TYPE, kind)));
    Ok(response)
}

impl App {
    /// Sends a request of our own. What our caller's has of credentials is not in it.
    async fn send(self, path: &str, body: &Value) -> Result<http::Response<Incoming>, Failure> {
        let request = Request::post(self.base_url.endpoint(path)?)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))?;
        let response = self.selam.oneshot(request).await?;
        match response.status() {
            status if status.is_success() => Ok(response),
            status => Err(Failure::Other(format!("the API answered {status}").into())),
        }
    }
}

/// Why there is no answer.
enum Failure {
    Auth(AuthError),
    Other(BoxError),
}

/// Whatever it is: an `AuthError` is found in it.
impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        match AuthError::find(&*error) {
            Some(error) => Self::Auth(error.clone()),
            None => Self::Other(error),
        }
    }
}

/// The caller did nothing wrong where our key is refused, so that it gets no 401. What is wrong stands in our log.
impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, said, retry_after) = match &self {
            Self::Auth(error) => match error.kind() {
                AuthErrorKind::InsufficientPermissions => {
                    (StatusCode::FORBIDDEN, "this is not part of our plan", None)
                }
                // There is no credential now, and may be one in a moment.
                AuthErrorKind::RefreshFailed => {
                    (StatusCode::SERVICE_UNAVAILABLE, "come back in a moment", error.retry_after())
                }
                _ => (StatusCode::BAD_GATEWAY, "the API does not know us; we have been told", None),
            },
            Self::Other(_) => (StatusCode::BAD_GATEWAY, "the API does not answer", None),
        };
        log(&self);
        let mut response = (status, Json(json!({ "error": said }))).into_response();
        if let Some(wait) = retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        response
    }
}

fn log(failure: &Failure) {
    let (error, mut cause): (&dyn std::fmt::Display, _) = match failure {
        Failure::Auth(error) => (error, error.source()),
        Failure::Other(error) => (&**error, error.source()),
    };
    eprint!("    log: {error}");
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut arguments = std::env::args().skip(1);
    let listen = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => None,
        (Some("--listen"), Some(address)) => Some(address),
        _ => return Err("usage: example-axum [--listen ADDRESS:PORT]".into()),
    };
    let world = World::new().await?;
    let real = std::env::var_os(env::SELAM_API_KEY).is_some();
    let (layer, app) = if real {
        let tls =
            HttpsConnectorBuilder::new().with_native_roots()?.https_or_http().enable_all_versions().build();
        let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
        let app = router(&layer, Client::builder(TokioExecutor::new()).build(tls))?;
        (layer, app)
    } else {
        world.app(ApiKey::new(world.simulator.issue_key())?)?
    };
    println!("API       {}{}", layer.base_url(), if real { "" } else { " (a simulator)" });
    if let Some(address) = listen {
        let listener = TcpListener::bind(address).await?;
        println!("listening on http://{}, POST /ask and /speak", listener.local_addr()?);
        return Ok(axum::serve(listener, app).await?);
    }

    println!("calls itself; with --listen 127.0.0.1:3000 it waits for others\n");
    show("a question", &app, "/ask", r#"{"question":"What does selam mean?"}"#).await?;
    show("a text to speak", &app, "/speak", r#"{"text":"Selam!"}"#).await?;
    if !real {
        for (case, key) in world.troubles()? {
            let (_, app) = world.app(key)?;
            show(case, &app, "/speak", r#"{"text":"Selam!"}"#).await?;
        }
    }
    Ok(())
}

/// What the caller gets.
async fn show(case: &str, app: &Router, path: &str, body: &'static str) -> Result<(), BoxError> {
    let (status, headers, body) = call(app, path, body).await?;
    let said = match std::str::from_utf8(&body) {
        Ok(text) if !text.contains('\0') => text.to_owned(),
        _ => format!("{} bytes", body.len()),
    };
    let retry = headers.get(RETRY_AFTER).map(|wait| format!(" (Retry-After: {wait:?})")).unwrap_or_default();
    println!("{case:<32} {} {said}{retry}", status.as_u16());
    Ok(())
}

async fn call(
    app: &Router,
    path: &str,
    body: &'static str,
) -> Result<(StatusCode, HeaderMap, Bytes), BoxError> {
    let request = Request::post(path).header("content-type", "application/json").body(Body::from(body))?;
    let (head, body) = app.clone().oneshot(request).await?.into_parts();
    Ok((head.status, head.headers, body.collect().await?.to_bytes()))
}

/// A simulator of the API behind TLS.
struct World {
    simulator: Simulator,
    server: Server,
}

impl World {
    async fn new() -> Result<Self, BoxError> {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await?;
        Ok(Self { simulator, server })
    }

    fn app(&self, key: impl Into<Provider<ApiKey>>) -> Result<(SelamLayer, Router), BoxError> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.server.ca_der().unwrap_or_default().to_vec()))?;
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tls =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_all_versions().build();
        let base_url = BaseUrl::new(self.server.base_url())?;
        let layer = SelamLayer::builder().with_api_key(key).with_base_url(base_url).build()?;
        let app = router(&layer, Client::builder(TokioExecutor::new()).build(tls))?;
        Ok((layer, app))
    }

    /// Keys with which nobody gets an answer.
    fn troubles(&self) -> Result<[(&'static str, Provider<ApiKey>); 3], BoxError> {
        let vault = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
            Err::<ApiKey, _>(
                SourceError::transient("the vault is sealed").with_retry_after(Duration::from_secs(20)),
            )
        }));
        Ok([
            ("a key that was revoked", ApiKey::new("sk-selam-revoked")?.into()),
            ("an account without the feature", ApiKey::new(self.simulator.issue_limited_key())?.into()),
            ("no key to be had", vault.into()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn callers_get_a_status_of_their_own_and_no_word_of_our_key() {
        let world = World::new().await.unwrap();
        let (_, app) = world.app(ApiKey::new(world.simulator.issue_key()).unwrap()).unwrap();
        let (status, _, body) = call(&app, "/ask", r#"{"question":"Selam?"}"#).await.unwrap();
        assert_eq!((status, &body[..]), (StatusCode::OK, &br#"{"answer":"Selam! You said: Selam?"}"#[..]));

        let expected = [(502, None), (403, None), (503, Some("20"))];
        for ((case, key), (expected, retry_after)) in world.troubles().unwrap().into_iter().zip(expected) {
            let (_, app) = world.app(key).unwrap();
            let (status, headers, body) = call(&app, "/speak", r#"{"text":"Selam!"}"#).await.unwrap();
            assert_eq!(status.as_u16(), expected, "{case}");
            assert_eq!(headers.get(RETRY_AFTER).map(|wait| wait.to_str().unwrap()), retry_after, "{case}");
            assert!(!String::from_utf8_lossy(&body).contains("key"), "{case}");
        }
    }

    #[tokio::test]
    async fn what_a_caller_sends_of_credentials_stays_here() {
        let world = World::new().await.unwrap();
        let key = world.simulator.issue_key();
        let (_, app) = world.app(ApiKey::new(&*key).unwrap()).unwrap();
        let request = Request::post("/ask").header("content-type", "application/json");
        let request =
            request.header("authorization", "Bearer the-callers").header("x-api-key", "the-callers");
        let answer =
            app.oneshot(request.body(Body::from(r#"{"question":"Selam?"}"#)).unwrap()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let received = world.simulator.received();
        assert_eq!(received[0].headers["authorization"], format!("Bearer {key}"));
        assert!(!format!("{:?}", received[0].headers).contains("the-callers"));
    }
}
