//! The HTTP clients for the API: [`Upstream`].

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, Request, Response, StatusCode, Uri, header::EXPECT},
};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{
    client::legacy::{Builder, Client, Error, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::{net::TcpStream, sync::watch, time};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};
use tower::{Service, timeout::Timeout, util::BoxCloneSyncService};
use tower_selam::{BoxError, replay::ReplayBody};

use crate::config;

/// How long it may take to connect, with name resolution and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an idle connection is reused. After that, a firewall on the way may have dropped it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How often connections are probed, to detect servers that vanished.
const PING_EVERY: Duration = Duration::from_secs(30);

/// How many requests share an HTTP/2 connection. Few servers allow less than a hundred.
const STREAMS: usize = 100;

/// How far a response may be ahead of a slow caller. The connection's window covers all streams, so that callers who do not read
/// their streams do not block the others.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS as u32;

/// How long a body waits for `100 Continue` ([RFC 9110 section 10.1.1](https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)).
const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a connection stays open after its request was answered without its body.
const UNSENT_BODY_TIMEOUT: Duration = Duration::from_secs(30);

type Connector = BoxCloneSyncService<Uri, MaybeHttpsStream<TokioIo<TcpStream>>, BoxError>;

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

/// The versions of HTTP that a client offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Versions {
    /// HTTP/1.1, and HTTP/2 where the server negotiates it over TLS.
    All,
    /// HTTP/1.1 alone: its connections can be upgraded.
    Http1,
}

/// Builds a plain client, for the token endpoint.
pub fn client(tls: &ClientConfig) -> Client<Connector, Body> {
    builder().build(connector(tls, Versions::All))
}

fn builder() -> Builder {
    let mut builder = Client::builder(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .http2_keep_alive_interval(PING_EVERY)
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW);
    builder
}

fn connector(tls: &ClientConfig, versions: Versions) -> Connector {
    let mut http = HttpConnector::new();
    // The layers enforce https.
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(PING_EVERY));
    let https = HttpsConnectorBuilder::new().with_tls_config(tls.clone()).https_or_http();
    let https = match versions {
        Versions::All => https.enable_all_versions().wrap_connector(http),
        Versions::Http1 => https.enable_http1().wrap_connector(http),
    };
    BoxCloneSyncService::new(Timeout::new(https, CONNECT_TIMEOUT))
}

/// Sends any number of concurrent requests. A hyper-util client opens one HTTP/2 connection per server, and the server limits
/// the streams on it, so there is one client for every hundred requests in flight.
#[derive(Clone, Debug)]
pub struct Upstream {
    connector: Connector,
    lanes: Arc<Mutex<Vec<Lane>>>,
}

/// The request body that the layers produce.
type RequestBody = ReplayBody<Body>;

/// A client, and its number of requests in flight: each holds a clone of `in_flight`.
#[derive(Clone, Debug)]
struct Lane {
    client: Client<Connector, RequestBody>,
    in_flight: Arc<()>,
}

impl Upstream {
    pub fn new(tls: &ClientConfig, versions: Versions) -> Self {
        Self { connector: connector(tls, versions), lanes: Arc::default() }
    }

    /// Returns the first lane with a free slot, or a new one.
    fn lane(&self) -> Lane {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        // `<=`, because the list itself holds one clone.
        if let Some(free) = lanes.iter().find(|lane| Arc::strong_count(&lane.in_flight) <= STREAMS) {
            return free.clone();
        }
        let lane = Lane { client: builder().build(self.connector.clone()), in_flight: Arc::new(()) };
        lanes.push(lane.clone());
        lane
    }
}

impl Service<Request<RequestBody>> for Upstream {
    type Response = Response<ResponseBody>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<RequestBody>) -> Self::Future {
        let Lane { client, in_flight } = self.lane();
        let waiting_body = request.extensions_mut().remove::<ReplySender>();
        Box::pin(async move {
            let response = client.request(request).await?;
            if let Some(waiting_body) = waiting_body {
                waiting_body.send(Reply::Final);
            }
            Ok(response.map(|body| ResponseBody { body, _in_flight: in_flight }))
        })
    }
}

/// The body of a response, which occupies its lane until dropped.
#[derive(Debug)]
pub struct ResponseBody {
    body: Incoming,
    _in_flight: Arc<()>,
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Holds back the body of a request with `Expect: 100-continue` until the API sends `100 Continue` over HTTP/1.1, or for one
/// second. hyper sends `100 Continue` to the caller when the body is first polled, so a caller whose request is refused does
/// not have to send the body.
pub fn await_continue(request: Request<Body>) -> Request<Body> {
    if !expects_continue(request.headers()) || request.body().is_end_stream() {
        return request;
    }
    let (sender, mut receiver) = watch::channel(Reply::None);
    let sender = ReplySender(Arc::new(sender));
    let mut request = request.map(|body| {
        let wanted = async move {
            match time::timeout(CONTINUE_TIMEOUT, receiver.wait_for(|reply| *reply != Reply::None)).await {
                Ok(Ok(reply)) => *reply == Reply::Continue,
                // The request was dropped.
                Ok(Err(_)) => false,
                // The API may not support `100 Continue`.
                Err(_) => true,
            }
        };
        Body::new(ContinueBody::Waiting { wanted: Box::pin(wanted), body: Some(body) })
    });
    request.extensions_mut().insert(sender.clone());
    // hyper does not call this over HTTP/2, and drops it once the head is sent.
    hyper::ext::on_informational(&mut request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            sender.send(Reply::Continue);
        }
    });
    request
}

/// The API's reply to the head of a request whose body is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    None,
    Continue,
    Final,
}

/// Request extension: passes the API's reply to a body that is held back.
#[derive(Clone, Debug)]
struct ReplySender(Arc<watch::Sender<Reply>>);

impl ReplySender {
    /// Only the first reply counts.
    fn send(&self, reply: Reply) {
        self.0.send_if_modified(|current| {
            let first = *current == Reply::None;
            if first {
                *current = reply;
            }
            first
        });
    }
}

pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// A request body that is held back until the API wants it.
enum ContinueBody {
    Waiting {
        wanted: Pin<Box<dyn Future<Output = bool> + Send>>,
        body: Option<Body>,
    },
    Sending(Body),
    /// Stays pending, so that the API can finish its response, then fails: a body must not end early without an error.
    Unwanted(Pin<Box<time::Sleep>>),
}

impl http_body::Body for ContinueBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        loop {
            match &mut *self {
                Self::Waiting { wanted, body } => match (ready!(wanted.as_mut().poll(cx)), body.take()) {
                    (true, Some(body)) => *self = Self::Sending(body),
                    _ => *self = Self::Unwanted(Box::pin(time::sleep(UNSENT_BODY_TIMEOUT))),
                },
                Self::Sending(body) => return Pin::new(body).poll_frame(cx),
                Self::Unwanted(sleep) => {
                    ready!(sleep.as_mut().poll(cx));
                    return Poll::Ready(Some(Err(axum::Error::new("the API answered without the body"))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Sending(body) if body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Waiting { body: Some(body), .. } | Self::Sending(body) => body.size_hint(),
            _ => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tower::ServiceExt;
    use tower_selam::{
        replay::{BufferBody, Replay},
        simulator::{Fault, Server, Simulator},
    };

    use super::*;

    /// Writes the certificate authority of `server` to a file.
    fn ca_file(server: &Server) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!(
            "selam-proxy-ca-{}-{}",
            std::process::id(),
            server.local_addr().port()
        ));
        std::fs::write(&path, server.ca_pem().unwrap()).unwrap();
        path
    }

    fn request(server: &Server, key: &str) -> Request<RequestBody> {
        let body = BufferBody::new(0)
            .pass_through(Body::from(r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#));
        let request = Request::post(format!("{}/chat/completions", server.base_url()));
        request.header("authorization", format!("Bearer {key}")).body(body).unwrap()
    }

    #[tokio::test]
    async fn streams_exceed_the_limit_of_one_connection() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca_file(&server), simulator.issue_key());
        let upstream = Upstream::new(&tls(Some(&path), true).unwrap(), Versions::All);
        std::fs::remove_file(path).unwrap();

        // hyper's server allows 200 streams per connection.
        let count = 450;
        let mut running = Vec::new();
        for _ in 0..count {
            simulator.inject(Fault::StallBody { after: 10 });
            let response = upstream.clone().oneshot(request(&server, &key));
            running.push(time::timeout(Duration::from_secs(20), response).await.unwrap().unwrap());
        }
        assert!(running.iter().all(|response| response.version() == axum::http::Version::HTTP_2));
        assert_eq!(upstream.lanes.lock().unwrap().len(), 5);

        // Freed slots are reused first.
        drop(running);
        let again = upstream.clone().oneshot(request(&server, &key)).await.unwrap();
        assert_eq!(Arc::strong_count(&upstream.lanes.lock().unwrap()[0].in_flight), 2);
        drop(again);
    }

    #[tokio::test]
    async fn upgrades_use_http1() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca_file(&server), simulator.issue_key());
        let tls = tls(Some(&path), true).unwrap();
        std::fs::remove_file(path).unwrap();
        let mut versions = HashMap::new();
        for wanted in [Versions::All, Versions::Http1] {
            let response = Upstream::new(&tls, wanted).oneshot(request(&server, &key)).await.unwrap();
            versions.insert(format!("{wanted:?}"), response.version());
        }
        assert_eq!(versions["All"], axum::http::Version::HTTP_2);
        assert_eq!(versions["Http1"], axum::http::Version::HTTP_11);
    }

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
