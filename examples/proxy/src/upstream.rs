//! The clients that talk to the API: [`Upstream`].

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

/// From a name to a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that nobody used for so long may have been forgotten on the way.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How a connection whose other side is gone without a word is noticed.
const PING_EVERY: Duration = Duration::from_secs(30);

/// How many requests share an HTTP/2 connection. Few servers let less than a hundred.
const STREAMS: usize = 100;

/// What the API may be ahead of a slow caller by. The connection's window has room for all, so that callers who do not
/// read their streams hold nobody else's up.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS as u32;

/// How long a body waits for `100 Continue` ([RFC 9110 section 10.1.1](https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)).
const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a connection may stay open whose request was answered without its body.
const UNWANTED_TIMEOUT: Duration = Duration::from_secs(30);

type Connector = BoxCloneSyncService<Uri, MaybeHttpsStream<TokioIo<TcpStream>>, BoxError>;

/// Who is trusted with the API's name: the system's authorities, and those in the file.
///
/// # Errors
///
/// When the file holds no certificates; or there is nobody to trust, unless there is no `need` to.
pub fn tls(ca: Option<&Path>, need: bool) -> Result<ClientConfig, config::Error> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca {
        let wrong = |said: &dyn std::fmt::Display| {
            config::Error::of_flag("--ca", format!("{}: {said}", path.display()))
        };
        let content =
            std::fs::read(path).map_err(|error| wrong(&format_args!("cannot be read: {}", error.kind())))?;
        let mut found = false;
        for certificate in CertificateDer::pem_slice_iter(&content) {
            let certificate = certificate.map_err(|_| wrong(&"is damaged PEM"))?;
            roots.add(certificate).map_err(|_| wrong(&"holds a certificate that cannot be read"))?;
            found = true;
        }
        if !found {
            return Err(wrong(&"holds no certificate in PEM"));
        }
    }
    if need && roots.is_empty() {
        return Err(config::Error::new("this system trusts no certificate authority: name one by --ca FILE"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| config::Error::new(format!("TLS: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Which versions of HTTP a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Versions {
    /// HTTP/2 where the server does, over TLS.
    All,
    /// What can be upgraded.
    Http1,
}

/// A plain client, for now and then a token.
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
    // Https is the layers' to insist on.
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

/// Clients for any number of requests at once. hyper-util's has one HTTP/2 connection to a server, and on that no more
/// requests than the server allows; so there is another client for every hundred.
#[derive(Clone, Debug)]
pub struct Upstream {
    connector: Connector,
    lanes: Arc<Mutex<Vec<Lane>>>,
}

/// What the layers make of a request's body.
type Sent = ReplayBody<Body>;

/// A client, and as many clones of `taken` as it has requests under way.
#[derive(Clone, Debug)]
struct Lane {
    client: Client<Connector, Sent>,
    taken: Arc<()>,
}

impl Upstream {
    pub fn new(tls: &ClientConfig, versions: Versions) -> Self {
        Self { connector: connector(tls, versions), lanes: Arc::default() }
    }

    fn lane(&self) -> Lane {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        // The vector's own is one of them.
        if let Some(free) = lanes.iter().find(|lane| Arc::strong_count(&lane.taken) <= STREAMS) {
            return free.clone();
        }
        let lane = Lane { client: builder().build(self.connector.clone()), taken: Arc::new(()) };
        lanes.push(lane.clone());
        lane
    }
}

impl Service<Request<Sent>> for Upstream {
    type Response = Response<Answer>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Sent>) -> Self::Future {
        let Lane { client, taken } = self.lane();
        let expecting = request.extensions_mut().remove::<Expecting>();
        Box::pin(async move {
            let response = client.request(request).await?;
            if let Some(expecting) = expecting {
                expecting.hear(Heard::Answer);
            }
            Ok(response.map(|body| Answer { body, _taken: taken }))
        })
    }
}

/// The body of an answer, which takes its place until it ends.
#[derive(Debug)]
pub struct Answer {
    body: Incoming,
    _taken: Arc<()>,
}

impl http_body::Body for Answer {
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

/// Has the body of a request that expects `100 Continue` wait until the API says so, over HTTP/1.1, or for a second. hyper
/// says so to the caller when the body is first asked for; so a caller whose request is refused need not send it.
pub fn await_continue(request: Request<Body>) -> Request<Body> {
    if !expects_continue(request.headers()) || request.body().is_end_stream() {
        return request;
    }
    let (said, mut heard) = watch::channel(Heard::Nothing);
    let expecting = Expecting(Arc::new(said));
    let mut request = request.map(|body| {
        let wait = async move {
            match time::timeout(CONTINUE_TIMEOUT, heard.wait_for(|heard| *heard != Heard::Nothing)).await {
                Ok(Ok(heard)) if *heard == Heard::Continue => Wanted::Yes,
                Err(_) => Wanted::Yes,
                // It was answered, or nobody waits for an answer any more.
                Ok(_) => Wanted::No,
            }
        };
        Body::new(Waiting::For { wanted: Box::pin(wait), body: Some(body) })
    });
    request.extensions_mut().insert(expecting.clone());
    // Over HTTP/2 nobody calls this, and it is dropped when the head is sent.
    hyper::ext::on_informational(&mut request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            expecting.hear(Heard::Continue);
        }
    });
    request
}

/// What the API has said to a request whose body waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Nothing,
    Continue,
    Answer,
}

/// In the extensions of a request whose body waits: where to tell it what the API says.
#[derive(Clone, Debug)]
struct Expecting(Arc<watch::Sender<Heard>>);

impl Expecting {
    /// What is said first counts.
    fn hear(&self, said: Heard) {
        self.0.send_if_modified(|heard| {
            let first = *heard == Heard::Nothing;
            if first {
                *heard = said;
            }
            first
        });
    }
}

pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Whether the API wants a body, or has answered without it.
enum Wanted {
    Yes,
    No,
}

/// A body that waits until it is wanted.
enum Waiting {
    For {
        wanted: Pin<Box<dyn Future<Output = Wanted> + Send>>,
        body: Option<Body>,
    },
    Wanted(Body),
    /// The API's connection ends when it likes to, with the answer whole; a caller that sends what it was not asked for
    /// is not read any more.
    Unwanted(Pin<Box<time::Sleep>>),
}

impl http_body::Body for Waiting {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        loop {
            match &mut *self {
                Self::For { wanted, body } => match (ready!(wanted.as_mut().poll(cx)), body.take()) {
                    (Wanted::Yes, Some(body)) => *self = Self::Wanted(body),
                    _ => *self = Self::Unwanted(Box::pin(time::sleep(UNWANTED_TIMEOUT))),
                },
                Self::Wanted(body) => return Pin::new(body).poll_frame(cx),
                Self::Unwanted(sleep) => {
                    ready!(sleep.as_mut().poll(cx));
                    return Poll::Ready(Some(Err(axum::Error::new("the body was not wanted"))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Wanted(body) if body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::For { body: Some(body), .. } | Self::Wanted(body) => body.size_hint(),
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

    /// A file with the certificate authority that `server` has its name from.
    fn ca(server: &Server) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!(
            "selam-proxy-ca-{}-{}",
            std::process::id(),
            server.local_addr().port()
        ));
        std::fs::write(&path, server.ca_pem().unwrap()).unwrap();
        path
    }

    fn request(server: &Server, key: &str) -> Request<Sent> {
        let body = BufferBody::new(0)
            .pass_through(Body::from(r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#));
        let request = Request::post(format!("{}/chat/completions", server.base_url()));
        request.header("authorization", format!("Bearer {key}")).body(body).unwrap()
    }

    #[tokio::test]
    async fn more_streams_run_at_once_than_a_server_lets_one_connection_have() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca(&server), simulator.issue_key());
        let upstream = Upstream::new(&tls(Some(&path), true).unwrap(), Versions::All);
        std::fs::remove_file(path).unwrap();

        // hyper's server allows 200.
        let count = 450;
        let mut running = Vec::new();
        for _ in 0..count {
            simulator.inject(Fault::StallBody { after: 10 });
            let response = upstream.clone().oneshot(request(&server, &key));
            running.push(time::timeout(Duration::from_secs(20), response).await.unwrap().unwrap());
        }
        assert!(running.iter().all(|response| response.version() == axum::http::Version::HTTP_2));
        assert_eq!(upstream.lanes.lock().unwrap().len(), 5);

        // Places that are free again are taken first.
        drop(running);
        let again = upstream.clone().oneshot(request(&server, &key)).await.unwrap();
        assert_eq!(Arc::strong_count(&upstream.lanes.lock().unwrap()[0].taken), 2);
        drop(again);
    }

    #[tokio::test]
    async fn what_is_to_be_upgraded_goes_over_http_1() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca(&server), simulator.issue_key());
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
    fn a_file_without_certificates_is_refused_by_name() {
        let path = std::env::temp_dir().join(format!("selam-proxy-no-ca-{}", std::process::id()));
        for (content, said) in [
            ("", "holds no certificate in PEM"),
            ("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", "is damaged PEM"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "holds a certificate that cannot be read",
            ),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = tls(Some(&path), true).unwrap_err().to_string();
            assert_eq!(error, format!("--ca: {}: {said}", path.display()));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(tls(Some(&path), true).unwrap_err().to_string().contains("cannot be read"));
    }
}
