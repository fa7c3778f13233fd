//! Uses reqwest through the layers: a completion, a stream, an expired JWT, typed errors and a redirect.
//!
//! ```console
//! $ cargo run -p example-reqwest
//! ```
//!
//! The example starts a simulator of the API and talks to it over TLS. With `SELAM_API_KEY` set (and optionally
//! `SELAM_JWT` and `SELAM_BASE_URL`) it talks to SelamAPI itself.

#[path = "../../support/stream.rs"]
mod stream;
#[path = "../../support/reqwest.rs"]
mod support;

use std::{process::ExitCode, time::Duration};

use bytes::Bytes;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tower_selam::{
    ApiKey, AuthErrorKind, BoxError, Credentials, Error, RequestAuth, adapter::reqwest::Client,
    simulator::Fault,
};

use self::{
    stream::ChatStream,
    support::{
        Api, client_builder,
        transcript::{auth_error, finish, line, open_line, step},
    },
};

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let api = Api::start("tower-selam with reqwest").await?;
    let selam = Client::new(api.layer().clone(), client_builder(&api)?)?;
    let chat = api.url("chat/completions")?;

    step("Chat completion: the API key is enough");
    let response = call(&selam, &chat, RequestAuth::ApiKey, &question(false)).await?;
    let completion: Value = response.error_for_status()?.json().await?;
    line("answer", completion["choices"][0]["message"]["content"].as_str().unwrap_or("(no content)"));

    step("Streamed chat completion: the layers delay no event");
    let response = call(&selam, &chat, RequestAuth::ApiKey, &question(true)).await?;
    print_stream(response.error_for_status()?).await?;

    if let Some(simulator) = api.simulator() {
        let (sessions, voice) = (api.url("audio/agent/sessions")?, json!({ "voice": "mekdes" }));
        step("Valid JWT: the request is sent once");
        call(&selam, &sessions, RequestAuth::ApiKeyAndJwt, &voice).await?;

        step("Expired JWT: the layers refresh it after the 401 and replay the request");
        simulator.expire_jwts();
        let before = simulator.requests();
        call(&selam, &sessions, RequestAuth::ApiKeyAndJwt, &voice).await?;
        line("sent", format_args!("{} times", simulator.requests() - before));
    } else if api.has_jwt() {
        step("JWT and key");
        call(&selam, &chat, RequestAuth::ApiKeyAndJwt, &question(false)).await?;
    }

    step("Revoked key: the API answers 401");
    let revoked = custom(api.revoked_key()?);
    expect_error(&selam, &chat, revoked, AuthErrorKind::InvalidApiKey).await?;

    if let Some(simulator) = api.simulator() {
        step("Feature above the account's level: the API answers 403");
        let limited = custom(ApiKey::new(simulator.issue_limited_key())?);
        let speech = api.url("audio/speech")?;
        expect_error(&selam, &speech, limited, AuthErrorKind::InsufficientPermissions).await?;

        step("Redirect to another origin: it is returned, not followed");
        let location = "https://evil.example/v1/chat/completions";
        let redirect =
            http::Response::builder().status(307).header("location", location).body(Bytes::new())?;
        simulator.inject(Fault::Answer(redirect));
        let response = call(&selam, &chat, RequestAuth::ApiKey, &question(false)).await?;
        line("location", location);
        if response.status() != StatusCode::TEMPORARY_REDIRECT {
            return Err("the redirect was followed".into());
        }
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

/// Sends a request with the credentials that `auth` asks for.
async fn call(
    selam: &Client,
    url: &str,
    auth: RequestAuth,
    body: &Value,
) -> Result<Response, Error<reqwest::Error>> {
    line("request", format_args!("POST {url}"));
    let request = selam.post(url).with_extension(auth).timeout(Duration::from_secs(60)).json(body);
    let response = request.send().await?;
    line("status", format_args!("{} over {:?}", response.status(), response.version()));
    Ok(response)
}

/// Sends a request that has to end with an error of the kind `expected`.
async fn expect_error(
    selam: &Client,
    url: &str,
    auth: RequestAuth,
    expected: AuthErrorKind,
) -> Result<(), BoxError> {
    match call(selam, url, auth, &question(false)).await {
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

fn question(stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "What does selam mean?" }]);
    json!({ "model": "selam-turbo", "stream": stream, "messages": messages })
}

/// Prints the text of a streamed completion as it arrives.
async fn print_stream(mut response: Response) -> Result<(), BoxError> {
    let mut chat = ChatStream::default();
    let mut answer = open_line("answer");
    while let Some(chunk) = response.chunk().await? {
        answer.push(&chat.push(&chunk));
    }
    drop(answer);
    line("events", chat.finish()?);
    Ok(())
}
