//! Shared by the example and its tests: the service `selam.example.Greeter`, and a server for it over TLS.

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

/// The person to greet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Name {
    #[prost(string, tag = "1")]
    pub name: String,
    /// Makes a request as large as a test needs it.
    #[prost(bytes = "vec", tag = "2")]
    pub padding: Vec<u8>,
}

/// The greeting of one person.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Greeting {
    #[prost(string, tag = "1")]
    pub text: String,
}

impl Name {
    pub fn of(name: &str) -> Self {
        Self { name: name.to_owned(), padding: Vec::new() }
    }
}

impl Greeting {
    pub fn saying(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }
}

/// A gRPC server over TLS on a free port of `localhost`, with a generated certificate. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    port: u16,
    ca_pem: String,
    serving: JoinHandle<Result<(), transport::Error>>,
}

impl Server {
    /// Starts to serve `routes`.
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

    /// The origin of the server.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// An endpoint that trusts the certificate of the server.
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

/// Makes a certificate authority and a certificate for `localhost`.
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
