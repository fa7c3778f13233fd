//! SelamAPI through reqwest-middleware, under `reqwest-retry`: `adapter::reqwest_middleware::AuthMiddleware`.
//!
//! ```console
//! $ cargo run -p example-reqwest-middleware
//! ```
//!
//! talks to a simulator over TLS on a loopback port. With `SELAM_API_KEY` set (and, if you like, `SELAM_JWT` and
//! `SELAM_BASE_URL`) it talks to the API itself.

use std::{process::ExitCode, time::Duration};

use reqwest::{Certificate, StatusCode};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use reqwest_retry::{RetryTransientMiddleware, policies::ExponentialBackoff};
use serde_json::{Value, json};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BaseUrl, BoxError, Credentials, Refreshing, RequestAuth, SelamLayer,
    Token,
    adapter::{reqwest::redirect_policy, reqwest_middleware::AuthMiddleware},
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

/// What retries goes outside: each try then has a credential that is fresh when it is made.
fn client(
    layer: SelamLayer,
    builder: reqwest::ClientBuilder,
) -> Result<ClientWithMiddleware, reqwest::Error> {
    let backoff = ExponentialBackoff::builder()
        .retry_bounds(Duration::from_millis(50), Duration::from_secs(5))
        .build_with_max_retries(3);
    // Middlewares do not see redirects: the client has to keep the key from other origins.
    let client = builder.redirect(redirect_policy()).build()?;
    Ok(ClientBuilder::new(client)
        .with(RetryTransientMiddleware::new_with_policy(backoff))
        .with(AuthMiddleware::new(layer))
        .build())
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
    println!("tower-selam with reqwest-middleware");
    println!("  API   a simulator at {base_url} (set {} for the real one)", env::SELAM_API_KEY);
    println!("  key   {key:?}");

    let layer = SelamLayer::builder().with_base_url(base_url).with_api_key(key).with_jwt(jwts).build()?;
    let chat = layer.base_url().endpoint("chat/completions")?.to_string();
    let sessions = layer.base_url().endpoint("audio/agent/sessions")?.to_string();
    let trusted = Certificate::from_pem(server.ca_pem().unwrap_or_default().as_bytes())?;
    let client = client(layer, reqwest::Client::builder().no_proxy().tls_certs_only([trusted]))?;

    chat_completion(&client, &chat).await?;

    step("An API that is out of order, and a JWT that has expired");
    session(&client, &sessions).await?;
    simulator.inject(Fault::Unavailable);
    simulator.expire_jwts();
    println!("  then     every JWT expires, and the next answer is a 503");
    let before = simulator.requests();
    session(&client, &sessions).await?;
    let sent = simulator.requests() - before;
    println!("  sent     {sent} times: for the 503 by reqwest-retry, for the 401 by the layers");
    if sent != 3 {
        return Err("three were expected".into());
    }

    let revoked = simulator.issue_key();
    simulator.revoke_key(&revoked);
    let before = simulator.requests();
    refusal(&client, "A key that was revoked", &chat, own(revoked)?, AuthErrorKind::InvalidApiKey).await?;
    println!("  sent     once: a refusal is final");
    if simulator.requests() - before != 1 {
        return Err("a refused request was sent again".into());
    }
    plain_http(&client).await?;
    println!("\nAll of it as it should be.");
    Ok(())
}

async fn with_the_api() -> Result<(), BoxError> {
    let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
    println!("tower-selam with reqwest-middleware");
    println!("  API   {}", layer.base_url());
    println!("  key   {:?}", ApiKey::from_env()?);
    let chat = layer.base_url().endpoint("chat/completions")?.to_string();
    let client = client(layer, reqwest::Client::builder())?;
    chat_completion(&client, &chat).await?;
    let unknown = own("sk-selam-not-a-key-of-anybody".to_owned())?;
    refusal(&client, "A key that nobody has", &chat, unknown, AuthErrorKind::InvalidApiKey).await?;
    plain_http(&client).await?;
    println!("\nAll of it as it should be.");
    Ok(())
}

fn own(key: String) -> Result<RequestAuth, BoxError> {
    Ok(RequestAuth::Custom(Credentials::bearer(ApiKey::new(key)?)))
}

fn question() -> Value {
    json!({ "model": "selam-turbo", "messages": [{ "role": "user", "content": "What does selam mean?" }] })
}

async fn chat_completion(client: &ClientWithMiddleware, chat: &str) -> Result<(), BoxError> {
    step("A chat completion with the key");
    println!("  request  POST {chat}");
    let request = client.post(chat).json(&question()).with_extension(RequestAuth::ApiKey);
    let response = request.send().await?.error_for_status()?;
    println!("  status   {} over {:?}", response.status(), response.version());
    let completion: Value = response.json().await?;
    let said = completion["choices"][0]["message"]["content"].as_str();
    println!("  answer   {}", said.unwrap_or("(nothing)"));
    Ok(())
}

/// A call that needs JWT and key.
async fn session(client: &ClientWithMiddleware, sessions: &str) -> Result<(), BoxError> {
    println!("  request  POST {sessions}");
    let response = client.post(sessions).json(&json!({ "voice": "mekdes" })).send().await?;
    println!("  status   {}", response.status());
    match response.status() {
        StatusCode::OK => Ok(()),
        status => Err(format!("the API answered {status}").into()),
    }
}

async fn refusal(
    client: &ClientWithMiddleware,
    title: &str,
    url: &str,
    auth: RequestAuth,
    expected: AuthErrorKind,
) -> Result<(), BoxError> {
    step(title);
    println!("  request  POST {url}");
    let result = client.post(url).json(&question()).with_extension(auth).send().await;
    let error = result.err().ok_or_else(|| format!("{expected:?} was expected, but the API answered"))?;
    // Through what reqwest-middleware and reqwest-retry make of it.
    match AuthError::find(&error) {
        Some(found) if found.kind() == expected => {
            println!("  error    AuthErrorKind::{:?}", found.kind());
            println!("  says     {found}");
            Ok(())
        }
        _ => Err(error.into()),
    }
}

async fn plain_http(client: &ClientWithMiddleware) -> Result<(), BoxError> {
    let plain = "http://api.selamgpt.com/v1/chat/completions";
    let title = "Plain http instead of https";
    refusal(client, title, plain, RequestAuth::ApiKey, AuthErrorKind::OriginNotAllowed).await
}

fn step(title: &str) {
    println!("\n{title}");
}
