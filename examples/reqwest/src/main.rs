//! SelamAPI through reqwest: `adapter::reqwest::Client`.
//!
//! ```console
//! $ cargo run -p example-reqwest
//! ```
//!
//! talks to a simulator over TLS on a loopback port. With `SELAM_API_KEY` set (and, if you like, `SELAM_JWT` and
//! `SELAM_BASE_URL`) it talks to the API itself.

use std::{io::Write as _, process::ExitCode, time::Duration};

use bytes::Bytes;
use reqwest::{Certificate, Response, StatusCode};
use serde_json::{Value, json};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BaseUrl, BoxError, Credentials, Error, Refreshing, RequestAuth,
    SelamLayer, Token,
    adapter::reqwest::Client,
    env,
    simulator::{Fault, JwtAlgorithm, Server, Simulator},
    source::{Reason, source_fn},
};

#[tokio::main]
async fn main() -> ExitCode {
    // reqwest leaves the choice of it to the program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let run = match std::env::var_os(env::SELAM_API_KEY) {
        Some(_) => with_the_api().await,
        None => with_the_simulator().await,
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn with_the_simulator() -> Result<(), BoxError> {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await?;
    let key = ApiKey::new(simulator.issue_key())?;
    let jwts = {
        let simulator = simulator.clone();
        Refreshing::new(source_fn(move |_: Reason<Token>| {
            let jwt = simulator.mint_jwt(JwtAlgorithm::Es256, Duration::from_secs(60));
            async move { Ok::<_, BoxError>(Token::new(jwt)?) }
        }))
    };
    let base_url = BaseUrl::new(server.base_url())?;
    println!("tower-selam with reqwest");
    println!("  API   a simulator at {base_url} (set {} for the real one)", env::SELAM_API_KEY);
    println!("  key   {key:?}");

    let layer = SelamLayer::builder().with_base_url(base_url).with_api_key(key).with_jwt(jwts).build()?;
    let api = Api::new(&layer)?;
    let trusted = Certificate::from_pem(server.ca_pem().unwrap_or_default().as_bytes())?;
    let builder = reqwest::Client::builder().no_proxy().tls_certs_only([trusted]);
    let selam = Client::new(layer, builder)?;

    chat_completion(&selam, &api).await?;
    streamed(&selam, &api).await?;

    step("A JWT that has expired");
    call(&selam, &api.sessions, RequestAuth::ApiKeyAndJwt, &json!({ "voice": "mekdes" })).await?;
    simulator.expire_jwts();
    println!("  then     every JWT expires");
    let before = simulator.requests();
    call(&selam, &api.sessions, RequestAuth::ApiKeyAndJwt, &json!({ "voice": "mekdes" })).await?;
    println!("  sent     {} times: it was renewed in between", simulator.requests() - before);

    let revoked = simulator.issue_key();
    simulator.revoke_key(&revoked);
    refusal(&selam, "A key that was revoked", &api.chat, own(revoked)?, AuthErrorKind::InvalidApiKey).await?;
    let limited = own(simulator.issue_limited_key())?;
    let title = "A feature beyond the account's level";
    refusal(&selam, title, &api.speech, limited, AuthErrorKind::InsufficientPermissions).await?;

    step("A redirect to somebody else");
    let elsewhere = "https://evil.example/v1/chat/completions";
    let redirect = http::Response::builder().status(307).header("location", elsewhere).body(Bytes::new())?;
    simulator.inject(Fault::Answer(redirect));
    let response = call(&selam, &api.chat, RequestAuth::ApiKey, &question(false)).await?;
    if response.status() != StatusCode::TEMPORARY_REDIRECT {
        return Err("the redirect was followed".into());
    }
    println!("  not followed to {elsewhere}");

    let before = simulator.requests();
    plain_http(&selam).await?;
    if simulator.requests() != before {
        return Err("a request was sent over plain http".into());
    }
    println!("\nAll of it as it should be.");
    Ok(())
}

async fn with_the_api() -> Result<(), BoxError> {
    let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
    println!("tower-selam with reqwest");
    println!("  API   {}", layer.base_url());
    println!("  key   {:?}", ApiKey::from_env()?);
    let api = Api::new(&layer)?;
    let selam = Client::new(layer, reqwest::Client::builder())?;
    chat_completion(&selam, &api).await?;
    streamed(&selam, &api).await?;
    if std::env::var_os(env::SELAM_JWT).is_some() {
        step("A call with JWT and key");
        call(&selam, &api.chat, RequestAuth::ApiKeyAndJwt, &question(false)).await?;
    }
    let unknown = own("sk-selam-not-a-key-of-anybody".to_owned())?;
    refusal(&selam, "A key that nobody has", &api.chat, unknown, AuthErrorKind::InvalidApiKey).await?;
    plain_http(&selam).await?;
    println!("\nAll of it as it should be.");
    Ok(())
}

/// Where things are.
struct Api {
    chat: String,
    sessions: String,
    speech: String,
}

impl Api {
    fn new(layer: &SelamLayer) -> Result<Self, BoxError> {
        let endpoint = |path| Ok::<_, BoxError>(layer.base_url().endpoint(path)?.to_string());
        Ok(Self {
            chat: endpoint("chat/completions")?,
            sessions: endpoint("audio/agent/sessions")?,
            speech: endpoint("audio/speech")?,
        })
    }
}

fn question(stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "What does selam mean?" }]);
    json!({ "model": "selam-turbo", "stream": stream, "messages": messages })
}

fn own(key: String) -> Result<RequestAuth, BoxError> {
    Ok(RequestAuth::Custom(Credentials::bearer(ApiKey::new(key)?)))
}

async fn chat_completion(selam: &Client, api: &Api) -> Result<(), BoxError> {
    step("A chat completion with the key");
    let response = call(selam, &api.chat, RequestAuth::ApiKey, &question(false)).await?;
    let completion: Value = response.error_for_status()?.json().await?;
    let said = completion["choices"][0]["message"]["content"].as_str();
    println!("  answer   {}", said.unwrap_or("(nothing)"));
    Ok(())
}

async fn streamed(selam: &Client, api: &Api) -> Result<(), BoxError> {
    step("The same, streamed");
    let response = call(selam, &api.chat, RequestAuth::ApiKey, &question(true)).await?;
    let mut response = response.error_for_status()?;
    let (mut text, mut events, mut done) = (Vec::new(), 0, false);
    print!("  answer   ");
    while let Some(chunk) = response.chunk().await? {
        text.extend_from_slice(&chunk);
        // One line is one event: chunks may end anywhere.
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let Some(event) = line.trim_ascii().strip_prefix(b"data:").map(<[u8]>::trim_ascii) else {
                continue;
            };
            done |= event == b"[DONE]";
            if let Ok(chunk) = serde_json::from_slice::<Value>(event) {
                events += 1;
                print!("{}", chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
                std::io::stdout().flush()?;
            }
        }
    }
    println!("\n  events   {events}");
    if done { Ok(()) } else { Err("the stream ended before it was done".into()) }
}

async fn refusal(
    selam: &Client,
    title: &str,
    url: &str,
    auth: RequestAuth,
    expected: AuthErrorKind,
) -> Result<(), BoxError> {
    step(title);
    match call(selam, url, auth, &question(false)).await {
        Err(Error::Auth(error)) if error.kind() == expected => {
            show(&error);
            Ok(())
        }
        Err(error) => Err(error.into_boxed()),
        Ok(_) => Err(format!("{expected:?} was expected, but the API answered").into()),
    }
}

async fn plain_http(selam: &Client) -> Result<(), BoxError> {
    let plain = "http://api.selamgpt.com/v1/chat/completions";
    let title = "Plain http instead of https";
    refusal(selam, title, plain, RequestAuth::ApiKey, AuthErrorKind::OriginNotAllowed).await
}

/// One request: built by reqwest, sent through the layers, with the credentials of its choice.
async fn call(
    selam: &Client,
    url: &str,
    auth: RequestAuth,
    body: &Value,
) -> Result<Response, Error<reqwest::Error>> {
    println!("  request  POST {url}");
    let request = selam.reqwest().post(url).timeout(Duration::from_secs(60)).json(body);
    let response = selam.clone().with_extension(auth).execute(request).await?;
    println!("  status   {} over {:?}", response.status(), response.version());
    Ok(response)
}

fn show(error: &AuthError) {
    println!("  error    AuthErrorKind::{:?}", error.kind());
    if let (Some(status), Some(message)) = (error.status(), error.message()) {
        println!("  answer   {} {}: {message}", status.as_u16(), error.code().unwrap_or("no code"));
    } else {
        println!("  refused  {error}");
    }
    println!("  remedy   {}", error.remedy().unwrap_or("none is documented"));
}

fn step(title: &str) {
    println!("\n{title}");
}
