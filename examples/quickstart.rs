//! Authenticated SelamAPI calls, from a chat completion to each typed error.
//!
//! ```console
//! $ cargo run --example quickstart
//! ```
//!
//! talks to a simulator over TLS on a loopback port. With `SELAM_API_KEY` set (and, if you like, `SELAM_JWT`
//! and `SELAM_BASE_URL`) it talks to the API itself.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a transcript is what this example is for")]

use std::{io::Write as _, process::ExitCode, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, builderstates::WantsSchemes};
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer};
use tower::{Layer, Service, ServiceExt};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BaseUrl, BoxError, Credentials, Error, RateLimit, RequestAuth,
    SelamLayer, Token, env,
    simulator::{JwtAlgorithm, Server, Simulator},
};

/// The client that is layered: any other would do.
type Https = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;
type Selam = tower_selam::Selam<Https>;
type Refused = Error<legacy::Error>;

const QUESTION: &str =
    r#"{"model":"selam-turbo","messages":[{"role":"user","content":"What does selam mean?"}]}"#;
const QUESTION_STREAMED: &str =
    r#"{"model":"selam-turbo","stream":true,"messages":[{"role":"user","content":"What does selam mean?"}]}"#;

#[tokio::main]
async fn main() -> ExitCode {
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
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(server.ca_der().unwrap_or_default().to_vec()))?;
    let client = client(HttpsConnectorBuilder::new().with_tls_config(trusting(roots)?));

    let key = ApiKey::new(simulator.issue_key())?;
    let jwt = Token::new(simulator.mint_jwt(JwtAlgorithm::Es256, Duration::from_secs(60)))?;
    let base_url = BaseUrl::new(server.base_url())?;
    let layer = SelamLayer::builder().with_base_url(base_url.clone()).with_api_key(key.clone());
    let layer = layer.with_jwt(jwt.clone()).build()?;
    println!("tower-selam quickstart");
    println!("  API   a simulator at {base_url} (set {} for the real one)", env::SELAM_API_KEY);
    println!("  key   {key:?}\n  JWT   {jwt:?}");
    let mut selam = layer.layer(client);

    let chat = base_url.endpoint("chat/completions")?;
    chat_completion(&mut selam, &chat).await?;
    streamed(&mut selam, &chat).await?;

    step("A call that needs JWT and key");
    let response = call(
        &mut selam,
        &base_url.endpoint("audio/agent/sessions")?,
        RequestAuth::ApiKeyAndJwt,
        r#"{"voice":"mekdes"}"#,
    )
    .await?;
    println!("  answer   {}", json(response).await?);

    let revoked = simulator.issue_key();
    simulator.revoke_key(&revoked);
    let limited = simulator.issue_limited_key();
    let own = |key: String| Ok::<_, BoxError>(RequestAuth::Custom(Credentials::bearer(ApiKey::new(key)?)));
    refusal(&mut selam, "A key that was revoked", &chat, own(revoked)?, AuthErrorKind::InvalidApiKey).await?;
    refusal(&mut selam, "No key at all", &chat, RequestAuth::Anonymous, AuthErrorKind::MissingApiKey).await?;
    let speech = base_url.endpoint("audio/speech")?;
    let permissions = AuthErrorKind::InsufficientPermissions;
    refusal(&mut selam, "A feature beyond the account's level", &speech, own(limited)?, permissions).await?;

    let before = simulator.requests();
    plain_http(&mut selam, &chat).await?;
    if simulator.requests() != before {
        return Err("a request was sent over plain http".into());
    }
    println!("  sent     nothing: the API has seen {before} requests, before and after");
    println!("\nAll of it as it should be.");
    Ok(())
}

async fn with_the_api() -> Result<(), BoxError> {
    let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
    let client = client(match layer.base_url().to_string().starts_with("https:") {
        true => HttpsConnectorBuilder::new().with_provider_and_native_roots(ring::default_provider())?,
        false => HttpsConnectorBuilder::new().with_tls_config(trusting(RootCertStore::empty())?),
    });
    println!("tower-selam quickstart");
    println!("  API   {}", layer.base_url());
    println!("  key   {:?}", ApiKey::from_env()?);
    let has_jwt = std::env::var_os(env::SELAM_JWT).is_some();
    if has_jwt {
        println!("  JWT   {:?}", Token::from_env()?);
    }
    let chat = layer.base_url().endpoint("chat/completions")?;
    let mut selam = layer.layer(client);

    chat_completion(&mut selam, &chat).await?;
    streamed(&mut selam, &chat).await?;
    step("A call with JWT and key");
    if has_jwt {
        let response = call(&mut selam, &chat, RequestAuth::ApiKeyAndJwt, QUESTION).await?;
        println!("  answer   {}", said(&json(response).await?));
    } else {
        println!("  skipped  {} is not set", env::SELAM_JWT);
    }
    let unknown = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-not-a-key-of-anybody")?));
    refusal(&mut selam, "A key that nobody has", &chat, unknown, AuthErrorKind::InvalidApiKey).await?;
    refusal(&mut selam, "No key at all", &chat, RequestAuth::Anonymous, AuthErrorKind::MissingApiKey).await?;
    step("A feature beyond the account's level");
    println!("  skipped  which one that is depends on the account; the simulator shows it");
    plain_http(&mut selam, &chat).await?;
    println!("\nAll of it as it should be.");
    Ok(())
}

fn trusting(roots: RootCertStore) -> Result<ClientConfig, BoxError> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn client(connector: HttpsConnectorBuilder<WantsSchemes>) -> Https {
    let connector = connector.https_or_http().enable_all_versions().build();
    Client::builder(TokioExecutor::new()).build(connector)
}

async fn chat_completion(selam: &mut Selam, chat: &Uri) -> Result<(), BoxError> {
    step("A chat completion with the key");
    let response = call(selam, chat, RequestAuth::ApiKey, QUESTION).await?;
    println!("  answer   {}", said(&json(response).await?));
    Ok(())
}

async fn streamed(selam: &mut Selam, chat: &Uri) -> Result<(), BoxError> {
    step("The same, streamed");
    let response = call(selam, chat, RequestAuth::ApiKey, QUESTION_STREAMED).await?;
    let mut body = response.into_body();
    let mut text = Vec::new();
    let (mut events, mut done) = (0, false);
    print!("  answer   ");
    while let Some(frame) = body.frame().await {
        text.extend_from_slice(&frame?.into_data().unwrap_or_default());
        // One line is one event: frames may end anywhere.
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
    selam: &mut Selam,
    title: &str,
    uri: &Uri,
    auth: RequestAuth,
    expected: AuthErrorKind,
) -> Result<(), BoxError> {
    step(title);
    match call(selam, uri, auth, QUESTION).await {
        Err(Error::Auth(error)) if error.kind() == expected => {
            show(&error);
            Ok(())
        }
        Err(error) => Err(error.into_boxed()),
        Ok(_) => Err(format!("{expected:?} was expected, but the API answered").into()),
    }
}

async fn plain_http(selam: &mut Selam, chat: &Uri) -> Result<(), BoxError> {
    step("Plain http instead of https");
    let plain =
        Uri::builder().scheme("http").authority("api.selamgpt.com").path_and_query(chat.path()).build()?;
    match call(selam, &plain, RequestAuth::ApiKey, QUESTION).await {
        Err(Error::Auth(error)) if error.kind() == AuthErrorKind::OriginNotAllowed => {
            show(&error);
            Ok(())
        }
        Err(error) => Err(error.into_boxed()),
        Ok(_) => Err("a key was sent over plain http".into()),
    }
}

/// One request through the layers, with the credentials of its choice.
async fn call(
    selam: &mut Selam,
    uri: &Uri,
    auth: RequestAuth,
    body: &'static str,
) -> Result<Response<Incoming>, Refused> {
    println!("  request  POST {uri}");
    println!("  with     {}", credentials(&auth));
    let mut request = Request::new(Full::from(body));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = uri.clone();
    request.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    request.extensions_mut().insert(auth);

    let response = selam.ready().await?.call(request).await?;
    print!("  status   {}", response.status());
    match RateLimit::from_headers(response.headers()) {
        Some(RateLimit { limit: Some(limit), remaining: Some(remaining), .. }) => {
            println!(", {remaining} of {limit} requests left");
        }
        _ => println!(),
    }
    Ok(response)
}

fn credentials(auth: &RequestAuth) -> String {
    match auth {
        RequestAuth::ApiKey => "the key as `Authorization: Bearer`".to_owned(),
        RequestAuth::ApiKeyAndJwt => "the JWT as `Authorization: Bearer`, the key as `X-API-Key`".to_owned(),
        RequestAuth::Custom(own) => format!("{own:?}"),
        _ => "no credentials".to_owned(),
    }
}

fn show(error: &AuthError) {
    println!("  error    AuthErrorKind::{:?}", error.kind());
    if let (Some(status), Some(message)) = (error.status(), error.message()) {
        let code = error.code().unwrap_or("no code");
        println!("  answer   {} {code}: {message}", status.as_u16());
    } else {
        println!("  refused  {error}");
    }
    println!("  remedy   {}", error.remedy().unwrap_or("none is documented"));
}

fn step(title: &str) {
    println!("\n{title}");
}

async fn json(response: Response<Incoming>) -> Result<Value, BoxError> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        let body = tower_selam::ErrorBody::parse(&body);
        return Err(
            format!("the API answered {status}: {}", body.message().unwrap_or("no reason given")).into()
        );
    }
    Ok(serde_json::from_slice(&body)?)
}

fn said(completion: &Value) -> &str {
    completion["choices"][0]["message"]["content"].as_str().unwrap_or("(nothing)")
}
