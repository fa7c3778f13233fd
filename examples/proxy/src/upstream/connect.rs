//! Connections to the API and the token endpoint: TCP, TLS, and the HTTP proxy on the way.

use std::{
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{
    client::legacy::connect::{HttpConnector, proxy::Tunnel},
    rt::TokioIo,
};
use tokio::net::TcpStream;
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};
use tower::{Service, ServiceBuilder, util::BoxCloneSyncService};
use tower_selam::BoxError;

use super::{connection::Recorded, http_proxy::HttpProxy};
use crate::{config, server::GIVE_UP_AFTER};

/// How long it may take to connect, with name resolution and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// When a quiet connection is probed, how often, and how many probes may stay unanswered.
const PROBE_AFTER: Duration = Duration::from_secs(15);
const PROBE_EVERY: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;

/// The versions of HTTP that a client offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Versions {
    /// HTTP/1.1, and HTTP/2 where the server negotiates it over TLS.
    All,
    /// HTTP/1.1 alone: its connections can be upgraded.
    Http1,
}

/// A connection to the API or to the HTTP proxy.
type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

pub type Connector = BoxCloneSyncService<Uri, Recorded<MaybeHttpsStream<Stream>>, BoxError>;

pub(super) fn connector(tls: &ClientConfig, proxy: &HttpProxy, versions: Versions) -> Connector {
    let mut http = HttpConnector::new();
    // The layers enforce https.
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(PROBE_AFTER));
    http.set_keepalive_interval(Some(PROBE_EVERY));
    http.set_keepalive_retries(Some(PROBES));
    #[cfg(target_os = "linux")]
    http.set_tcp_user_timeout(Some(GIVE_UP_AFTER));
    let dial = Dial { https: (http.clone(), tls.clone()).into(), http, proxy: proxy.clone() };
    let https = HttpsConnectorBuilder::new().with_tls_config(tls.clone()).https_or_http();
    let https = match versions {
        Versions::All => https.enable_all_versions().wrap_connector(dial),
        Versions::Http1 => https.enable_http1().wrap_connector(dial),
    };
    let service = ServiceBuilder::new().timeout(CONNECT_TIMEOUT).map_response(Recorded::new).service(https);
    BoxCloneSyncService::new(service)
}

/// Connects to a server, directly or through a tunnel of the HTTP proxy.
#[derive(Clone)]
struct Dial {
    http: HttpConnector,
    /// To the proxy, which may itself be reached over TLS.
    https: HttpsConnector<HttpConnector>,
    proxy: HttpProxy,
}

impl Service<Uri> for Dial {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let Some(proxy) = self.proxy.intercept(&server) else {
            let connecting = self.http.call(server);
            return Box::pin(async move { Ok(MaybeHttpsStream::Http(connecting.await?)) });
        };
        let mut tunnel = Tunnel::new(proxy.uri().clone(), self.https.clone());
        if let Some(auth) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(auth.clone());
        }
        let connecting = tunnel.call(server);
        Box::pin(async move { Ok(connecting.await?) })
    }
}

/// Builds the TLS configuration, which trusts the system's certificate authorities and those in the file.
///
/// # Errors
///
/// The file contains no valid certificates; or no authority is trusted although TLS is `required`.
pub fn tls(ca: Option<&Path>, required: bool) -> Result<ClientConfig, config::Error> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca {
        let invalid = |reason: &dyn std::fmt::Display| {
            config::Error::for_flag("--ca", format!("{}: {reason}", path.display()))
        };
        let content = std::fs::read(path)
            .map_err(|error| invalid(&format_args!("cannot be read: {}", error.kind())))?;
        let mut found = false;
        for certificate in CertificateDer::pem_slice_iter(&content) {
            let certificate = certificate.map_err(|_| invalid(&"contains invalid PEM"))?;
            roots.add(certificate).map_err(|_| invalid(&"contains an invalid certificate"))?;
            found = true;
        }
        if !found {
            return Err(invalid(&"contains no PEM certificate"));
        }
    }
    if required && roots.is_empty() {
        return Err(config::Error::new("the system has no trusted certificate authorities; set --ca FILE"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| config::Error::new(format!("TLS: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ca_files_without_certificates_are_refused() {
        let path = std::env::temp_dir().join(format!("selam-proxy-no-ca-{}", std::process::id()));
        for (content, expected) in [
            ("", "contains no PEM certificate"),
            ("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", "contains invalid PEM"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "contains an invalid certificate",
            ),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = tls(Some(&path), true).unwrap_err().to_string();
            assert_eq!(error, format!("--ca: {}: {expected}", path.display()));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(tls(Some(&path), true).unwrap_err().to_string().contains("cannot be read"));
    }
}
