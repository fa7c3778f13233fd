//! Makes authenticated SelamAPI calls: a chat completion, a stream, a call with JWT and key, and each typed error.
//!
//! ```console
//! $ cargo run --example quickstart
//! ```
//!
//! The example starts a simulator of the API and talks to it over TLS. With `SELAM_API_KEY` set (and optionally
//! `SELAM_JWT` and `SELAM_BASE_URL`) it talks to SelamAPI itself. `examples/minimal.rs` is the shortest program.
//!
//! A step shows what was sent and what came back:
//!
//! ```text
//! 4. Revoked key: the API answers 401
//!    request    POST https://localhost:44625/v1/chat/completions
//!    auth       Credentials(ApiKey([redacted] id=cae3b5))
//!    error      AuthErrorKind::InvalidApiKey
//!    answer     401 invalid_api_key: Invalid API key provided.
//!    remedy     verify the API key and check that it was not revoked
//! ```

#[path = "support/stream.rs"]
mod stream;
#[path = "support/hyper.rs"]
mod support;

use std::process::ExitCode;

use bytes::Bytes;
use http::{Request, Response, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use serde_json::Value;
use tower::Layer;
use tower_selam::{
    ApiKey, AuthErrorKind, BoxError, Credentials, Error, ErrorBody, RateLimit, RequestAuth, Selam,
    stack::ResponseBody,
};

use self::{
    stream::ChatStream,
    support::{
        Api, Https,
        transcript::{auth_error, finish, line, open_line, step},
    },
};

const QUESTION: &str =
    r#"{"model":"selam-turbo","messages":[{"role":"user","content":"What does selam mean?"}]}"#;
const QUESTION_STREAMED: &str =
    r#"{"model":"selam-turbo","stream":true,"messages":[{"role":"user","content":"What does selam mean?"}]}"#;

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let api = Api::start("tower-selam quickstart").await?;
    // Any client that is a Tower service can be layered; this one is hyper-util's.
    let selam = api.layer().layer(support::client(&api)?);
    let chat = api.url("chat/completions")?;

    step("Chat completion: the API key is enough");
    let response = call(&selam, request(&chat, RequestAuth::ApiKey, QUESTION)?).await?;
    line("answer", answer(&json(response).await?));

    step("Streamed chat completion: the layers delay no event");
    let response = call(&selam, request(&chat, RequestAuth::ApiKey, QUESTION_STREAMED)?).await?;
    print_stream(response).await?;

    step("JWT and key: the JWT as bearer, the key in its own header");
    if api.is_simulated() {
        let sessions = api.url("audio/agent/sessions")?;
        let request = request(&sessions, RequestAuth::ApiKeyAndJwt, r#"{"voice":"mekdes"}"#)?;
        let response = call(&selam, request).await?;
        line("answer", json(response).await?);
    } else if api.has_jwt() {
        let response = call(&selam, request(&chat, RequestAuth::ApiKeyAndJwt, QUESTION)?).await?;
        line("answer", answer(&json(response).await?));
    } else {
        line("skipped", "SELAM_JWT is not set");
    }

    step("Revoked key: the API answers 401");
    let revoked = custom(api.revoked_key()?);
    expect_error(&selam, &chat, revoked, AuthErrorKind::InvalidApiKey).await?;

    step("No key: the API answers 401 with another code");
    expect_error(&selam, &chat, RequestAuth::Anonymous, AuthErrorKind::MissingApiKey).await?;

    step("Feature above the account's level: the API answers 403");
    if let Some(simulator) = api.simulator() {
        let limited = custom(ApiKey::new(simulator.issue_limited_key())?);
        let speech = api.url("audio/speech")?;
        expect_error(&selam, &speech, limited, AuthErrorKind::InsufficientPermissions).await?;
    } else {
        line("skipped", "which features are missing depends on the account");
    }

    step("Plain http: the layers refuse to send the key");
    let plain = "http://api.selamgpt.com/v1/chat/completions";
    let requests = api.simulator().map(|simulator| simulator.requests());
    expect_error(&selam, plain, RequestAuth::ApiKey, AuthErrorKind::OriginNotAllowed).await?;
    if api.simulator().map(|simulator| simulator.requests()) != requests {
        return Err("a request was sent over plain http".into());
    }
    line("sent", "nothing");
    Ok(())
}

/// Builds a request that chooses its credentials. Without `RequestAuth` it would carry every credential of the layer.
fn request(url: &str, auth: RequestAuth, body: &'static str) -> Result<Request<Full<Bytes>>, http::Error> {
    line("request", format_args!("POST {url}"));
    line("auth", credentials(&auth));
    Request::post(url).header(CONTENT_TYPE, "application/json").extension(auth).body(Full::from(body))
}

/// Sends one request through the layers.
async fn call(
    selam: &Selam<Https>,
    request: Request<Full<Bytes>>,
) -> Result<Response<ResponseBody<Incoming>>, Error<legacy::Error>> {
    let response = selam.send(request).await?;
    line("status", response.status());
    if let Some(RateLimit { limit: Some(limit), remaining: Some(remaining), .. }) =
        RateLimit::from_headers(response.headers())
    {
        line("quota", format_args!("{remaining} of {limit} requests left"));
    }
    Ok(response)
}

/// Sends a request that has to end with an error of the kind `expected`.
async fn expect_error(
    selam: &Selam<Https>,
    url: &str,
    auth: RequestAuth,
    expected: AuthErrorKind,
) -> Result<(), BoxError> {
    match call(selam, request(url, auth, QUESTION)?).await {
        Err(Error::Auth(error)) if error.kind() == expected => {
            auth_error(&error);
            Ok(())
        }
        Err(error) => Err(error.into_boxed()),
        Ok(_) => Err(format!("expected {expected:?}, but the request succeeded").into()),
    }
}

/// Makes one request use `key` instead of the layer's credentials.
fn custom(key: ApiKey) -> RequestAuth {
    RequestAuth::Custom(Credentials::bearer(key))
}

fn credentials(auth: &RequestAuth) -> String {
    match auth {
        RequestAuth::ApiKey => "Authorization: Bearer <key>".to_owned(),
        RequestAuth::ApiKeyAndJwt => "Authorization: Bearer <JWT>, X-API-Key: <key>".to_owned(),
        RequestAuth::Custom(credentials) => format!("{credentials:?}"),
        _ => "no credentials".to_owned(),
    }
}

/// Prints the text of a streamed completion as it arrives.
async fn print_stream(response: Response<ResponseBody<Incoming>>) -> Result<(), BoxError> {
    let mut body = response.into_body();
    let mut chat = ChatStream::default();
    let mut answer = open_line("answer");
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            answer.push(&chat.push(&data));
        }
    }
    drop(answer);
    line("events", chat.finish()?);
    Ok(())
}

/// Reads a JSON body; a status other than 2xx is an error with the API's message.
async fn json(response: Response<ResponseBody<Incoming>>) -> Result<Value, BoxError> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        let body = ErrorBody::parse(&body);
        return Err(format!("the API answered {status}: {}", body.message().unwrap_or("no message")).into());
    }
    Ok(serde_json::from_slice(&body)?)
}

/// The text of a chat completion.
fn answer(completion: &Value) -> &str {
    completion["choices"][0]["message"]["content"].as_str().unwrap_or("(no content)")
}
