//! What the example and its tests share: the service `selam.example.Greeter`, and a place to serve it over TLS.

use std::{error::Error, net::Ipv4Addr};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    service::Routes,
    transport::{self, Certificate, Channel, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig},
};

pub use self::{greeter_client::GreeterClient, greeter_server::Greeter, greeter_server::GreeterServer};

tonic::include_proto!("selam.example.Greeter");

/// Somebody to greet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Name {
    #[prost(string, tag = "1")]
    pub name: String,
    /// Whatever else there is to say.
    #[prost(bytes = "vec", tag = "2")]
    pub more: Vec<u8>,
}

/// What is said to them.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Greeting {
    #[prost(string, tag = "1")]
    pub text: String,
}

impl Name {
    pub fn of(name: &str) -> Self {
        Self { name: name.to_owned(), more: Vec::new() }
    }
}

impl Greeting {
    pub fn saying(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }
}

/// Serves on a free port of `localhost` over TLS, with a certificate made for it, until it is dropped.
#[derive(Debug)]
pub struct Server {
    port: u16,
    ca_pem: String,
    serving: JoinHandle<Result<(), transport::Error>>,
}

impl Server {
    /// Serves `routes`.
    pub async fn start(routes: impl Into<Routes>) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let (ca_pem, identity) = identity()?;
        let server = transport::Server::builder()
            .tls_config(ServerTlsConfig::new().identity(identity))?
            .add_routes(routes.into())
            .serve_with_incoming(TcpListenerStream::new(listener));
        Ok(Self { port, ca_pem, serving: tokio::spawn(server) })
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// How to get there: trusting its certificate.
    pub fn endpoint(&self) -> Result<Endpoint, transport::Error> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca_pem));
        Channel::from_shared(self.url()).expect("a URL").tls_config(tls)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn identity() -> Result<(String, Identity), rcgen::Error> {
    let mut authority = CertificateParams::new([])?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let ca_pem = authority.self_signed(&authority_key)?.pem();

    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(["localhost".to_owned()])?
        .signed_by(&key, &Issuer::from_params(&authority, &authority_key))?;
    Ok((ca_pem, Identity::from_pem(certificate.pem(), key.serialize_pem())))
}
