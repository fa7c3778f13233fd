//! Shared set-up of the examples that use reqwest: the API, TLS and the transcript.

// Each example uses a part of this file.
#![allow(dead_code)]

pub(crate) mod api;
pub(crate) mod transcript;

use reqwest::{Certificate, ClientBuilder};
use tower_selam::BoxError;

pub(crate) use self::api::Api;

/// A builder that trusts the simulator's certificate authority, or the system's for SelamAPI.
pub(crate) fn client_builder(api: &Api) -> Result<ClientBuilder, BoxError> {
    // These examples build reqwest without a TLS provider, so the program installs one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = reqwest::Client::builder();
    Ok(match api.server().and_then(|server| server.ca_pem()) {
        Some(authority) => builder.no_proxy().tls_certs_only([Certificate::from_pem(authority.as_bytes())?]),
        None => builder,
    })
}
