//! Serves the simulator on a loopback port: feature `test-server`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};
use tower::Service;

use super::{
    Simulator, SimulatorBody,
    agent::{self, Session},
};
use crate::BoxError;

/// Serves a [`Simulator`] over HTTP/1.1 and HTTP/2 on a free port of `127.0.0.1`, until dropped.
///
/// ```
/// use tower_selam::simulator::{Server, Simulator};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let server = Server::tls(&Simulator::new()).await?;
/// assert!(server.base_url().starts_with("https://localhost:"));
/// // Give this to the client as a trusted root.
/// let ca_pem = server.ca_pem().expect("a TLS server has a certificate authority");
/// # assert!(ca_pem.starts_with("-----BEGIN CERTIFICATE-----"));
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    base_url: String,
    authority: Option<Authority>,
    accept_task: JoinHandle<()>,
    /// Ends the WebSockets, whose tasks outlive their connection's.
    hang_up: watch::Sender<()>,
}

impl Server {
    /// Serves `simulator` over plain http; HTTP/2 with prior knowledge.
    ///
    /// # Errors
    ///
    /// When no port is free.
    pub async fn http(simulator: &Simulator) -> io::Result<Self> {
        Self::start(simulator, None).await
    }

    /// Serves `simulator` over TLS as `localhost`, with a newly made certificate; HTTP/2 by ALPN.
    ///
    /// # Errors
    ///
    /// When no port is free or the certificate cannot be made.
    pub async fn tls(simulator: &Simulator) -> Result<Self, BoxError> {
        Ok(Self::start(simulator, Some(make_certificates()?)).await?)
    }

    async fn start(simulator: &Simulator, tls: Option<(ServerConfig, Authority)>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let base_url = match tls {
            None => format!("http://{address}/v1"),
            Some(_) => format!("https://localhost:{}/v1", address.port()),
        };
        let (config, authority) = tls.unzip();
        let tls = config.map(|config| TlsAcceptor::from(Arc::new(config)));
        let (hang_up, hung_up) = watch::channel(());
        let host = Host { simulator: simulator.clone(), tls, hung_up };
        let accept_task = tokio::spawn(host.accept(listener));
        Ok(Self { address, base_url, authority, accept_task, hang_up })
    }

    /// Returns the base URL to give to a client.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Returns the certificate authority that clients must trust, in PEM; `None` without TLS.
    #[must_use]
    pub fn ca_pem(&self) -> Option<&str> {
        self.authority.as_ref().map(|authority| &*authority.pem)
    }

    /// Returns the certificate authority that clients must trust, in DER; `None` without TLS.
    #[must_use]
    pub fn ca_der(&self) -> Option<&[u8]> {
        self.authority.as_ref().map(|authority| &*authority.der)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accept_task.abort();
        self.hang_up.send_replace(());
    }
}

#[derive(Debug)]
struct Authority {
    pem: String,
    der: Vec<u8>,
}

/// Makes a certificate authority, and a server configuration with a certificate it signed.
fn make_certificates() -> Result<(ServerConfig, Authority), BoxError> {
    let mut authority = CertificateParams::new([])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a certificate for self-signed if its issuer has the same name.
    authority.distinguished_name.push(DnType::CommonName, "simulator's certificate authority");
    let authority_key = KeyPair::generate()?;
    let authority_certificate = authority.self_signed(&authority_key)?;

    let key = KeyPair::generate()?;
    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let certificate =
        CertificateParams::new(names)?.signed_by(&key, &Issuer::from_params(&authority, &authority_key))?;

    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let (pem, der) = (authority_certificate.pem(), authority_certificate.der().to_vec());
    Ok((config, Authority { pem, der }))
}

/// The state that every connection gets a clone of.
#[derive(Clone)]
struct Host {
    simulator: Simulator,
    tls: Option<TlsAcceptor>,
    hung_up: watch::Receiver<()>,
}

impl Host {
    async fn accept(self, listener: TcpListener) {
        // Aborts the connections when this task is aborted.
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    if let Ok((stream, _)) = accepted {
                        connections.spawn(self.clone().connection(stream));
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn connection(self, stream: TcpStream) {
        // Otherwise Nagle's algorithm delays small frames.
        let _ = stream.set_nodelay(true);
        match self.tls.clone() {
            None => self.serve(stream).await,
            Some(tls) => {
                if let Ok(stream) = tls.accept(stream).await {
                    self.serve(stream).await;
                }
            }
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(move |request| self.clone().exchange(request));
        let server = auto::Builder::new(TokioExecutor::new());
        // Errors are ignored: a client may disconnect at any time.
        let _ = server.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
    }

    async fn exchange(mut self, mut request: Request<Incoming>) -> Result<Response<SimulatorBody>, BoxError> {
        let upgrade = hyper::upgrade::on(&mut request);
        let mut response = self.simulator.call(request).await?;
        if let Some(session) = response.extensions_mut().remove::<Arc<Session>>() {
            tokio::spawn(async move {
                tokio::select! {
                    _ = self.hung_up.changed() => {}
                    _ = agent::serve(self.simulator, session, upgrade) => {}
                }
            });
        }
        Ok(response)
    }
}
