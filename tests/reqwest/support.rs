//! A simulator on a port, and a reqwest client for it.

use std::{
    error::Error as StdError,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Response, Version, header::LOCATION};
use http_body::Frame;
use http_body_util::StreamBody;
use reqwest::ClientBuilder;
use tower_selam::{
    ApiKey, BaseUrl, BoxError, Refreshing, SelamLayer, SelamLayerBuilder, Token,
    adapter::reqwest::Client,
    simulator::{Fault, JwtAlgorithm, Received, Server, Simulator},
    source::{Reason, source_fn},
};

pub(crate) const CHAT: &str = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
pub(crate) const SESSION: &str = r#"{"voice":"mekdes"}"#;

/// Far longer than any loopback exchange; a test that reaches it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

const MINUTE: Duration = Duration::from_secs(60);

/// The protocol between client and simulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    #[cfg_attr(feature = "tls", expect(dead_code, reason = "used only without TLS"))]
    Plain,
    #[cfg(feature = "tls")]
    Http1OverTls,
    #[cfg(feature = "tls")]
    Http2OverTls,
}

#[cfg(feature = "tls")]
pub(crate) const PROTOCOLS: &[Protocol] = &[Protocol::Http1OverTls, Protocol::Http2OverTls];
#[cfg(not(feature = "tls"))]
pub(crate) const PROTOCOLS: &[Protocol] = &[Protocol::Plain];

impl Protocol {
    pub(crate) fn version(self) -> Version {
        match self {
            #[cfg(feature = "tls")]
            Self::Http2OverTls => Version::HTTP_2,
            _ => Version::HTTP_11,
        }
    }
}

pub(crate) struct World {
    pub(crate) simulator: Simulator,
    pub(crate) server: Server,
    pub(crate) key: String,
    protocol: Protocol,
}

pub(crate) async fn world(protocol: Protocol) -> World {
    install_provider();
    let simulator = Simulator::new();
    let server = match protocol {
        Protocol::Plain => Server::http(&simulator).await.unwrap(),
        #[cfg(feature = "tls")]
        _ => Server::tls(&simulator).await.unwrap(),
    };
    let key = simulator.issue_key();
    World { simulator, server, key, protocol }
}

/// Plain http, for tests where TLS does not matter.
pub(crate) async fn plain() -> World {
    install_provider();
    let simulator = Simulator::new();
    let server = Server::http(&simulator).await.unwrap();
    let key = simulator.issue_key();
    World { simulator, server, key, protocol: PROTOCOLS[0] }
}

/// With TLS, reqwest needs a crypto provider to build any client.
fn install_provider() {
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
}

impl World {
    pub(crate) fn base_url(&self) -> BaseUrl {
        BaseUrl::allow_insecure_loopback(self.server.base_url())
            .or_else(|_| BaseUrl::new(self.server.base_url()))
            .unwrap()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        self.base_url().endpoint(path).unwrap().to_string()
    }

    /// The URL of the voice agent's handshake, with this in its query too.
    pub(crate) fn voice_agent(&self, more: &str) -> String {
        let origin = self.url("").replace("/v1/", "");
        format!("{origin}/socket.io/?EIO=4&transport=websocket{more}")
    }

    /// A builder that trusts the server and uses the HTTP version of the protocol.
    pub(crate) fn reqwest(&self) -> ClientBuilder {
        let builder = reqwest::Client::builder().no_proxy();
        #[cfg(feature = "tls")]
        let builder = match self.server.ca_pem() {
            Some(pem) => builder.tls_certs_only([reqwest::Certificate::from_pem(pem.as_bytes()).unwrap()]),
            None => builder,
        };
        match self.protocol.version() {
            Version::HTTP_11 => builder.http1_only(),
            _ => builder,
        }
    }

    pub(crate) fn api_key(&self) -> ApiKey {
        ApiKey::new(&*self.key).unwrap()
    }

    pub(crate) fn jwt(&self) -> Token {
        Token::new(self.simulator.mint_jwt(JwtAlgorithm::Es256, MINUTE)).unwrap()
    }

    /// JWTs from the simulator, and the number of refreshes.
    pub(crate) fn refreshing(&self) -> (Refreshing<Token>, Arc<AtomicUsize>) {
        let (simulator, refreshes) = (self.simulator.clone(), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&refreshes);
        let source = source_fn(move |_: Reason<Token>| {
            counter.fetch_add(1, SeqCst);
            let jwt = simulator.mint_jwt(JwtAlgorithm::Es256, MINUTE);
            async move { Ok::<_, BoxError>(Token::new(jwt)?) }
        });
        (Refreshing::new(source), refreshes)
    }

    pub(crate) fn builder(&self) -> SelamLayerBuilder {
        SelamLayer::builder().with_api_key(self.api_key()).with_base_url(self.base_url())
    }

    pub(crate) fn key_alone(&self) -> Client {
        Client::new(self.builder().build().unwrap(), self.reqwest()).unwrap()
    }

    pub(crate) fn last(&self) -> Received {
        self.simulator.received().pop().unwrap()
    }

    /// Makes the simulator answer its next request with a redirect.
    pub(crate) fn redirect(&self, status: u16, location: &str) {
        let answer = Response::builder().status(status).header(LOCATION, location);
        self.simulator.inject(Fault::Answer(answer.body(Bytes::new()).unwrap()));
    }
}

pub(crate) fn header(received: &Received, name: &str) -> Vec<String> {
    received.headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}

/// A body that reqwest cannot clone.
pub(crate) fn stream(text: &'static str) -> reqwest::Body {
    reqwest::Body::wrap(StreamBody::new(Once(Some(Frame::data(Bytes::from_static(text.as_bytes()))))))
}

struct Once(Option<Frame<Bytes>>);

impl futures_core::Stream for Once {
    type Item = Result<Frame<Bytes>, BoxError>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.take().map(Ok))
    }
}

/// The voice agent's handshake, with the nonce of RFC 6455 section 1.3.
pub(crate) fn handshake(reqwest: &reqwest::Client, url: &str) -> reqwest::RequestBuilder {
    let request = reqwest.get(url).header("connection", "Upgrade").header("upgrade", "websocket");
    request.header("sec-websocket-version", "13").header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
}

/// Everything that an error and its causes show.
pub(crate) fn shown(error: &(dyn StdError + 'static)) -> String {
    let mut text = format!("{error} {error:?} {error:#?}");
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(" {cause} {cause:?} {cause:#?}");
        next = cause.source();
    }
    text
}

pub(crate) async fn in_time<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.expect("no answer in time")
}
