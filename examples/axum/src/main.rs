//! Calls SelamAPI from axum handlers, which turn an `AuthError` into a response for their caller.
//!
//! ```console
//! $ cargo run -p example-axum
//! $ cargo run -p example-axum -- --listen 127.0.0.1:3000
//! ```
//!
//! The first command calls the handlers itself and shows what they answer; the second serves them. Both start a
//! simulator of the API and talk to it over TLS; with `SELAM_API_KEY` set (and optionally `SELAM_BASE_URL`) they talk
//! to SelamAPI itself.

#[path = "../../support/hyper.rs"]
mod support;

use std::{error::Error as _, process::ExitCode, time::Duration};

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
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BaseUrl, BoxError, Provider, Refreshing, Selam, SelamLayer,
    source::{Reason, SourceError, source_fn},
    stack::ResponseBody,
};

use self::support::{
    Api, Https,
    transcript::{finish, line, step},
};

/// The state of every handler. axum clones it for each request, which is cheap.
#[derive(Clone)]
struct App {
    selam: Selam<Https>,
    base_url: BaseUrl,
}

fn router(layer: &SelamLayer, client: Https) -> Router {
    let app = App { selam: layer.layer(client), base_url: layer.base_url().clone() };
    Router::new().route("/ask", post(ask)).route("/speak", post(speak)).with_state(app)
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

/// Speaks a text. The audio is passed on as it arrives.
async fn speak(State(app): State<App>, Json(asked): Json<Text>) -> Result<Response, Failure> {
    let body = json!({ "model": "selam-tts", "voice": "mekdes", "input": asked.text });
    let (parts, body) = app.send("audio/speech", &body).await?.into_parts();
    let mut response = Response::new(Body::new(body));
    response.headers_mut().extend(parts.headers.get(CONTENT_TYPE).map(|kind| (CONTENT_TYPE, kind.clone())));
    Ok(response)
}

impl App {
    /// Sends a new request to the API. It carries none of the headers of the handler's caller.
    async fn send(self, path: &str, body: &Value) -> Result<http::Response<ResponseBody<Incoming>>, Failure> {
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

/// Why a handler has no answer.
enum Failure {
    Auth(AuthError),
    Other(BoxError),
}

/// Finds the `AuthError` in any error, so that handlers can use `?` throughout.
impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        match AuthError::find(&*error) {
            Some(error) => Self::Auth(error.clone()),
            None => Self::Other(error),
        }
    }
}

/// A rejected key is the server's fault, not the caller's: the caller gets no 401, and the log has the details.
impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, message, retry_after) = match &self {
            Self::Auth(error) => match error.kind() {
                AuthErrorKind::InsufficientPermissions => {
                    (StatusCode::FORBIDDEN, "this feature is not part of our plan", None)
                }
                // The credential could not be refreshed; a later attempt may succeed.
                AuthErrorKind::RefreshFailed => {
                    (StatusCode::SERVICE_UNAVAILABLE, "try again in a moment", error.retry_after())
                }
                _ => (StatusCode::BAD_GATEWAY, "the upstream API rejected our request", None),
            },
            Self::Other(_) => (StatusCode::BAD_GATEWAY, "the upstream API is not available", None),
        };
        log(&self);
        let mut response = (status, Json(json!({ "error": message }))).into_response();
        if let Some(wait) = retry_after {
            // Rounded up, so that nobody comes too early.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

/// Logs an error and its causes. A real server would use `tracing`.
fn log(failure: &Failure) {
    let (mut text, mut source) = match failure {
        Failure::Auth(error) => (error.to_string(), error.source()),
        Failure::Other(error) => (error.to_string(), error.source()),
    };
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    line("log", text);
}

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let mut arguments = std::env::args().skip(1);
    let listen = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => None,
        (Some("--listen"), Some(address)) => Some(address),
        _ => return Err("usage: example-axum [--listen ADDRESS:PORT]".into()),
    };
    let api = Api::start("tower-selam in axum handlers").await?;
    let app = router(api.layer(), support::client(&api)?);
    if let Some(address) = listen {
        let listener = TcpListener::bind(address).await?;
        line("server", format_args!("http://{}, POST /ask and POST /speak", listener.local_addr()?));
        return Ok(axum::serve(listener, app).await?);
    }

    step("Question: the handler answers with the API's text");
    show(&app, "/ask", r#"{"question":"What does selam mean?"}"#).await?;
    step("Speech: the handler passes the audio on");
    show(&app, "/speak", r#"{"text":"Selam!"}"#).await?;
    if api.is_simulated() {
        for (case, key) in failures(&api)? {
            step(case);
            show(&with_key(&api, key)?, "/speak", r#"{"text":"Selam!"}"#).await?;
        }
    }
    Ok(())
}

/// The handlers with another key.
fn with_key(api: &Api, key: impl Into<Provider<ApiKey>>) -> Result<Router, BoxError> {
    Ok(router(&api.builder().with_api_key(key).build()?, support::client(api)?))
}

/// Keys that lead to each kind of failure.
fn failures(api: &Api) -> Result<[(&'static str, Provider<ApiKey>); 3], BoxError> {
    let limited = api.simulator().ok_or("only a simulator issues keys")?.issue_limited_key();
    let unavailable = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        let error = SourceError::transient("the vault is sealed");
        Err::<ApiKey, _>(error.with_retry_after(Duration::from_secs(20)))
    }));
    Ok([
        ("Revoked key: the caller learns nothing about it", api.revoked_key()?.into()),
        ("Feature above our account's level: the caller gets a 403", ApiKey::new(limited)?.into()),
        ("Key unavailable: the caller is told when to retry", unavailable.into()),
    ])
}

/// Calls a handler and prints what its caller gets.
async fn show(app: &Router, path: &str, body: &'static str) -> Result<(), BoxError> {
    line("request", format_args!("POST {path} {body}"));
    let (status, headers, body) = call(app, path, body).await?;
    line("status", status);
    if let Some(wait) = headers.get(RETRY_AFTER) {
        line("retry", format_args!("after {} s", wait.to_str()?));
    }
    match std::str::from_utf8(&body) {
        Ok(text) if !text.contains('\0') => line("body", text),
        _ => line("body", format_args!("{} bytes", body.len())),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn callers_get_a_fitting_status_and_no_word_of_our_key() {
        let api = Api::simulated().await.unwrap();
        let app = with_key(&api, ApiKey::new(api.simulator().unwrap().issue_key()).unwrap()).unwrap();
        let (status, _, body) = call(&app, "/ask", r#"{"question":"Selam?"}"#).await.unwrap();
        assert_eq!((status, &body[..]), (StatusCode::OK, &br#"{"answer":"Selam! You said: Selam?"}"#[..]));

        let expected = [(502, None), (403, None), (503, Some("20"))];
        for ((case, key), (expected, retry_after)) in failures(&api).unwrap().into_iter().zip(expected) {
            let app = with_key(&api, key).unwrap();
            let (status, headers, body) = call(&app, "/speak", r#"{"text":"Selam!"}"#).await.unwrap();
            assert_eq!(status.as_u16(), expected, "{case}");
            assert_eq!(headers.get(RETRY_AFTER).map(|wait| wait.to_str().unwrap()), retry_after, "{case}");
            assert!(!String::from_utf8_lossy(&body).contains("key"), "{case}");
        }
    }

    #[tokio::test]
    async fn the_callers_credentials_are_not_sent_upstream() {
        let api = Api::simulated().await.unwrap();
        let key = api.simulator().unwrap().issue_key();
        let app = with_key(&api, ApiKey::new(&*key).unwrap()).unwrap();
        let request = Request::post("/ask").header("content-type", "application/json");
        let request =
            request.header("authorization", "Bearer the-callers").header("x-api-key", "the-callers");
        let answer =
            app.oneshot(request.body(Body::from(r#"{"question":"Selam?"}"#)).unwrap()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let received = api.simulator().unwrap().received();
        assert_eq!(received[0].headers["authorization"], format!("Bearer {key}"));
        assert!(!format!("{:?}", received[0].headers).contains("the-callers"));
    }
}
