//! hyper-util's client over TLS, in HTTP/1.1 and HTTP/2: an answer, a stream as it comes, and audio.
//!
//! ```console
//! $ cargo run --example hyper
//! ```
//!
//! talks to a simulator over TLS on a loopback port. With `SELAM_API_KEY` set (and, if you like, `SELAM_BASE_URL`) it talks
//! to the API itself.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::{io::Write as _, sync::Arc};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, builderstates::WantsSchemes};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer};
use tower::{Layer, ServiceExt};
use tower_selam::{
    ApiKey, BaseUrl, BoxError, Selam, SelamLayer, env,
    simulator::{Server, Simulator},
};

type Https = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    if std::env::var_os(env::SELAM_API_KEY).is_some() {
        let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
        println!("API       {}", layer.base_url());
        return with_both(&layer, || Ok(HttpsConnectorBuilder::new().with_native_roots()?)).await;
    }
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await?;
    let layer = SelamLayer::builder()
        .with_api_key(ApiKey::new(simulator.issue_key())?)
        .with_base_url(BaseUrl::new(server.base_url())?)
        .build()?;
    println!("API       {} (a simulator; set {} for the real one)", layer.base_url(), env::SELAM_API_KEY);
    with_both(&layer, || Ok(HttpsConnectorBuilder::new().with_tls_config(trusting(&server)?))).await
}

type Tls = HttpsConnectorBuilder<WantsSchemes>;

async fn with_both(layer: &SelamLayer, tls: impl Fn() -> Result<Tls, BoxError>) -> Result<(), BoxError> {
    // Plain http, to a gateway on this machine, where the layers let it through.
    let http1 = tls()?.https_or_http().enable_http1().build();
    let http2 = tls()?.https_or_http().enable_http2().build();
    let mut executor = Client::builder(TokioExecutor::new());
    calls(layer, executor.build(http1)).await?;
    calls(layer, executor.http2_only(true).build(http2)).await
}

async fn calls(layer: &SelamLayer, client: Https) -> Result<(), BoxError> {
    // The layers fit as they are: the client is a Tower service.
    let selam = layer.layer(client);
    let question = [json!({ "role": "user", "content": "What does selam mean?" })];

    let answer =
        send(layer, &selam, "chat/completions", &json!({ "model": "selam-turbo", "messages": question }))
            .await?;
    println!("\n{:?}", answer.version());
    let answer: Value = serde_json::from_slice(&answer.into_body().collect().await?.to_bytes())?;
    println!("answer    {}", answer["choices"][0]["message"]["content"].as_str().unwrap_or("none"));

    let streamed = json!({ "model": "selam-turbo", "stream": true, "messages": question });
    let mut events = send(layer, &selam, "chat/completions", &streamed).await?.into_body();
    print!("stream    ");
    while let Some(frame) = events.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        for event in String::from_utf8_lossy(&data).lines().filter_map(|line| line.strip_prefix("data: ")) {
            let event: Value = serde_json::from_str(event).unwrap_or_default();
            print!("{}", event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
            std::io::stdout().flush()?;
        }
    }

    let speech = json!({ "model": "selam-tts", "input": "Selam!", "voice": "mekdes" });
    let audio = send(layer, &selam, "audio/speech", &speech).await?;
    let kind = audio.headers().get("content-type").cloned();
    let length = audio.into_body().collect().await?.to_bytes().len();
    println!("\naudio     {length} bytes of {:?}", kind.ok_or("no content type")?);
    Ok(())
}

async fn send(
    layer: &SelamLayer,
    selam: &Selam<Https>,
    path: &str,
    body: &Value,
) -> Result<Response<Incoming>, BoxError> {
    let request = Request::post(layer.base_url().endpoint(path)?)
        .header("content-type", "application/json")
        .body(Full::from(body.to_string()))?;
    Ok(selam.clone().oneshot(request).await?)
}

/// TLS that trusts the simulator's own authority.
fn trusting(server: &Server) -> Result<ClientConfig, BoxError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(server.ca_der().unwrap_or_default().to_vec()))?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    Ok(config.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth())
}
