//! The API that an example calls: a simulator by default, SelamAPI itself if `SELAM_API_KEY` is set.

// Each example uses a part of this file.
#![allow(dead_code)]

use std::time::Duration;

use tower_selam::{
    ApiKey, BaseUrl, BoxError, Refreshing, SelamLayer, SelamLayerBuilder, Token, env,
    simulator::{JwtAlgorithm, Server, Simulator},
    source::{Reason, source_fn},
};

use super::transcript::{line, title};

const JWT_LIFETIME: Duration = Duration::from_secs(60);

/// The API in use, and a layer with credentials for it.
pub(crate) struct Api {
    layer: SelamLayer,
    key: ApiKey,
    /// The simulator, and the server that ends when it is dropped.
    local: Option<(Simulator, Server)>,
}

impl Api {
    /// Prints the title of an example and the API in use.
    pub(crate) async fn start(text: &str) -> Result<Self, BoxError> {
        title(text);
        let api = match std::env::var_os(env::SELAM_API_KEY) {
            Some(_) => Self::from_env()?,
            None => Self::simulated().await?,
        };
        match api.is_simulated() {
            true => line(
                "API",
                format_args!("a simulator at {} (set SELAM_API_KEY to call SelamAPI)", api.base_url()),
            ),
            false => line("API", api.base_url()),
        }
        line("key", format_args!("{:?}", api.key));
        match (api.is_simulated(), api.has_jwt()) {
            (true, _) => line("JWT", "from the simulator, refreshed before it expires"),
            (false, true) => line("JWT", format_args!("{:?}", Token::from_env()?)),
            (false, false) => line("JWT", "none (SELAM_JWT is not set)"),
        }
        Ok(api)
    }

    /// Takes the credentials and the base URL from the environment.
    fn from_env() -> Result<Self, BoxError> {
        // `SELAM_BASE_URL` may name a gateway on this machine.
        let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
        Ok(Self { layer, key: ApiKey::from_env()?, local: None })
    }

    /// Starts a simulator that serves TLS on a free loopback port.
    pub(crate) async fn simulated() -> Result<Self, BoxError> {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await?;
        let key = ApiKey::new(simulator.issue_key())?;
        let layer = SelamLayer::builder()
            .with_base_url(BaseUrl::new(server.base_url())?)
            .with_api_key(key.clone())
            .with_jwt(minted_by(&simulator))
            .build()?;
        Ok(Self { layer, key, local: Some((simulator, server)) })
    }

    /// A layer with the key and, if there is one, the JWT.
    pub(crate) fn layer(&self) -> &SelamLayer {
        &self.layer
    }

    /// A layer to be built with other credentials.
    pub(crate) fn builder(&self) -> SelamLayerBuilder {
        SelamLayer::builder().with_base_url(self.base_url().clone())
    }

    pub(crate) fn base_url(&self) -> &BaseUrl {
        self.layer.base_url()
    }

    /// The URL of `path` at the API.
    pub(crate) fn url(&self, path: &str) -> Result<String, BoxError> {
        Ok(self.base_url().endpoint(path)?.to_string())
    }

    pub(crate) fn has_jwt(&self) -> bool {
        self.is_simulated() || std::env::var_os(env::SELAM_JWT).is_some()
    }

    pub(crate) fn is_simulated(&self) -> bool {
        self.local.is_some()
    }

    /// The simulator, to inject faults and to see what it received.
    pub(crate) fn simulator(&self) -> Option<&Simulator> {
        self.local.as_ref().map(|(simulator, _)| simulator)
    }

    /// The simulator's server, which has the certificate authority to trust.
    pub(crate) fn server(&self) -> Option<&Server> {
        self.local.as_ref().map(|(_, server)| server)
    }

    /// A key that the API rejects.
    pub(crate) fn revoked_key(&self) -> Result<ApiKey, BoxError> {
        let Some(simulator) = self.simulator() else {
            return Ok(ApiKey::new("sk-selam-never-issued")?);
        };
        let key = simulator.issue_key();
        simulator.revoke_key(&key);
        Ok(ApiKey::new(key)?)
    }
}

/// JWTs that the simulator mints, as an application's login service would.
pub(crate) fn minted_by(simulator: &Simulator) -> Refreshing<Token> {
    let simulator = simulator.clone();
    Refreshing::new(source_fn(move |_: Reason<Token>| {
        let jwt = simulator.mint_jwt(JwtAlgorithm::Es256, JWT_LIFETIME);
        async move { Ok::<_, BoxError>(Token::new(jwt)?) }
    }))
}
