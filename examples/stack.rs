//! A whole stack in a field of a struct: by its name, and boxed.
//!
//! ```console
//! $ cargo run --example stack
//! ```
//!
//! talks to a simulator over TLS on a loopback port. With `SELAM_API_KEY` set (and, if you like, `SELAM_BASE_URL`) it talks
//! to the API itself.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    limit::ConcurrencyLimit,
    timeout::Timeout,
    util::{BoxCloneSyncService, MapErr},
};
use tower_selam::{
    ApiKey, AuthError, BaseUrl, BoxError, Error, Selam, SelamLayer, env,
    simulator::{Server, Simulator},
};

type Https = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;
type HttpsError = hyper_util::client::legacy::Error;

/// A stack by its name, from the outside in: a timeout, our layers, a limit, the client.
///
/// `MapErr` stands between because tower's `Timeout` has a `BoxError`, which our error has to become.
type Named = Timeout<MapErr<Selam<ConcurrencyLimit<Https>>, fn(Error<HttpsError>) -> BoxError>>;

/// The same without its name, for an allocation a call.
type Boxed = BoxCloneSyncService<Request<Full<Bytes>>, Response<Incoming>, BoxError>;

/// Asks questions.
#[derive(Clone)]
struct Chat<S> {
    stack: S,
    uri: Uri,
}

impl Chat<Named> {
    fn named(layer: &SelamLayer, client: Https) -> Result<Self, BoxError> {
        let selam = layer.layer(ConcurrencyLimit::new(client, 64));
        let selam = MapErr::new(selam, Error::into_boxed as fn(_) -> _);
        let uri = layer.base_url().endpoint("chat/completions")?;
        Ok(Self { stack: Timeout::new(selam, Duration::from_secs(30)), uri })
    }
}

impl Chat<Boxed> {
    fn boxed(layer: &SelamLayer, client: Https) -> Result<Self, BoxError> {
        let stack = ServiceBuilder::new()
            .timeout(Duration::from_secs(30))
            .map_err(Error::into_boxed)
            .layer(layer)
            .concurrency_limit(64)
            .service(client);
        let uri = layer.base_url().endpoint("chat/completions")?;
        Ok(Self { stack: BoxCloneSyncService::new(stack), uri })
    }
}

impl<S> Chat<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<Incoming>, Error = BoxError>,
{
    async fn ask(&mut self, question: &str) -> Result<String, BoxError> {
        let body = serde_json::json!({
            "model": "selam-turbo",
            "messages": [{ "role": "user", "content": question }],
        });
        let request = Request::post(&self.uri)
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))?;
        let response = self.stack.ready().await?.call(request).await?;
        let answer: Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
        let content = answer["choices"][0]["message"]["content"].as_str();
        Ok(content.map_or_else(|| answer.to_string(), str::to_owned))
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let tls = HttpsConnectorBuilder::new();
    let (layer, tls, server) = if std::env::var_os(env::SELAM_API_KEY).is_some() {
        (SelamLayer::builder().allow_insecure_loopback().build_with_env()?, tls.with_native_roots()?, None)
    } else {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await?;
        let layer = SelamLayer::builder()
            .with_api_key(ApiKey::new(simulator.issue_key())?)
            .with_base_url(BaseUrl::new(server.base_url())?)
            .build()?;
        (layer, tls.with_tls_config(trusting(&server)?), Some(server))
    };
    let client =
        Client::builder(TokioExecutor::new()).build(tls.https_or_http().enable_all_versions().build());
    println!("API      {}{}", layer.base_url(), if server.is_some() { " (a simulator)" } else { "" });

    let mut named = Chat::named(&layer, client.clone())?;
    println!("named    {} bytes: {}", size_of_val(&named.stack), named.ask("What does selam mean?").await?);
    let mut boxed = Chat::boxed(&layer, client)?;
    println!("boxed    {} bytes: {}", size_of_val(&boxed.stack), boxed.ask("What does selam mean?").await?);

    // Whatever stands around them, our errors are found.
    boxed.uri = "https://example.com/v1/chat/completions".parse()?;
    match boxed.ask("Who are you?").await {
        Err(error) => println!("refused  {}", AuthError::find(&*error).ok_or("not ours")?),
        Ok(answer) => return Err(format!("the key went to another origin, which said: {answer}").into()),
    }
    Ok(())
}

/// TLS that trusts the simulator's own authority.
fn trusting(server: &Server) -> Result<ClientConfig, BoxError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(server.ca_der().unwrap_or_default().to_vec()))?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    Ok(config.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth())
}
