//! Shared set-up of the examples that use hyper-util's client: the API, TLS and the transcript.

// Each example uses a part of this file.
#![allow(dead_code)]

mod api;
pub(crate) mod transcript;

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, builderstates::WantsSchemes};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer};
use tower_selam::BoxError;

pub(crate) use self::api::Api;

/// The client under the layers.
pub(crate) type Https = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A client that speaks HTTP/2 where the server offers it, and HTTP/1.1 elsewhere.
pub(crate) fn client(api: &Api) -> Result<Https, BoxError> {
    // The layers decide where a credential may be sent: plain http passes only to a loopback gateway.
    let connector = tls(api)?.https_or_http().enable_all_versions().build();
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

/// TLS that trusts the simulator's certificate authority, or the system's for SelamAPI.
pub(crate) fn tls(api: &Api) -> Result<HttpsConnectorBuilder<WantsSchemes>, BoxError> {
    let builder = HttpsConnectorBuilder::new();
    let provider = ring::default_provider();
    let mut roots = RootCertStore::empty();
    match api.server().and_then(|server| server.ca_der()) {
        Some(authority) => roots.add(CertificateDer::from(authority.to_vec()))?,
        None if api.base_url().to_string().starts_with("https:") => {
            return Ok(builder.with_provider_and_native_roots(provider)?);
        }
        // A loopback gateway over plain http presents no certificate.
        None => {}
    }
    let config =
        ClientConfig::builder_with_provider(Arc::new(provider)).with_safe_default_protocol_versions()?;
    Ok(builder.with_tls_config(config.with_root_certificates(roots).with_no_client_auth()))
}
