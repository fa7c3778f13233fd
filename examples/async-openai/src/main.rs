//! async-openai's client, as it is, talking to SelamAPI through our layers: a chat completion, a stream, a token that is
//! renewed, and typed errors.
//!
//! ```console
//! $ cargo run -p example-async-openai
//! ```
//!
//! talks to a simulator over TLS on a loopback port. With `SELAM_API_KEY` set (and, if you like, `SELAM_BASE_URL`) it talks
//! to the API itself.

use std::{io::Write as _, time::Duration};

use async_openai::{
    config::OpenAIConfig,
    error::OpenAIError,
    middleware::HttpRequestFactory,
    types::chat::{
        ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
    },
};
use futures_util::StreamExt;
use reqwest::Certificate;
use tower::service_fn;
use tower_selam::{
    ApiKey, AuthError, BaseUrl, BoxError, JwtProvider, Refreshing, SelamLayer, Token,
    adapter::reqwest::Client,
    env,
    simulator::{JwtAlgorithm, Server, Simulator},
    source::{Fetched, Reason, source_fn},
};

type OpenAI = async_openai::Client<OpenAIConfig>;

/// All that there is to it: async-openai builds a request, and our client sends it.
///
/// Of what async-openai writes itself, `Authorization` with the key of its own configuration is replaced.
fn openai(layer: SelamLayer, http: reqwest::ClientBuilder) -> Result<OpenAI, reqwest::Error> {
    let config = OpenAIConfig::new().with_api_base(layer.base_url().to_string()).with_api_key("ours is sent");
    let selam = Client::new(layer, http)?;
    let service = service_fn(move |request: HttpRequestFactory| {
        let selam = selam.clone();
        async move {
            selam.execute(request.build().await?).await.map_err(|error| OpenAIError::Boxed(error.into()))
        }
    });
    Ok(async_openai::Client::with_config(config).with_http_service(service))
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // reqwest leaves the choice of it to the program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if std::env::var_os(env::SELAM_API_KEY).is_some() {
        let layer = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
        println!("API       {}\n", layer.base_url());
        let client = openai(layer, reqwest::Client::builder())?;
        answer(&client).await?;
        return stream(&client).await;
    }

    let world = World::new().await?;
    println!("API       {} (a simulator; set {} for the real one)\n", world.base_url, env::SELAM_API_KEY);
    let key = ApiKey::new(world.simulator.issue_key())?;
    let client = world.client(key.clone(), Some(world.jwts().into()))?;
    answer(&client).await?;
    stream(&client).await?;

    world.simulator.expire_jwts();
    let before = world.simulator.requests();
    println!("\nevery JWT expires");
    answer(&client).await?;
    println!("sent      {} times: the JWT was renewed in between\n", world.simulator.requests() - before);

    refused(&world.client(ApiKey::new("sk-selam-revoked")?, None)?).await?;
    let vault = Refreshing::new(source_fn(|_: Reason<Token>| async {
        Err::<Token, BoxError>("the vault is sealed".into())
    }));
    refused(&world.client(key, Some(vault.into()))?).await
}

fn question(stream: bool) -> Result<CreateChatCompletionRequest, OpenAIError> {
    let message = ChatCompletionRequestUserMessageArgs::default().content("What does selam mean?").build()?;
    CreateChatCompletionRequestArgs::default()
        .model("selam-turbo")
        .messages([message.into()])
        .stream(stream)
        .build()
}

async fn answer(client: &OpenAI) -> Result<(), BoxError> {
    let answer = client.chat().create(question(false)?).await?;
    println!("answer    {}", answer.choices[0].message.content.as_deref().unwrap_or("none"));
    Ok(())
}

async fn stream(client: &OpenAI) -> Result<(), BoxError> {
    let mut events = client.chat().create_stream(question(true)?).await?;
    print!("stream    ");
    while let Some(event) = events.next().await {
        for choice in event?.choices {
            print!("{}", choice.delta.content.unwrap_or_default());
            std::io::stdout().flush()?;
        }
    }
    println!();
    Ok(())
}

async fn refused(client: &OpenAI) -> Result<(), BoxError> {
    match client.chat().create(question(false)?).await {
        Ok(_) => Err("this was to be refused".into()),
        Err(error) => {
            // Ours is found through whatever holds it.
            let found = AuthError::find(&error).ok_or("not ours")?;
            println!("refused   {:?}: {found}", found.kind());
            Ok(())
        }
    }
}

/// A simulator of the API behind TLS.
struct World {
    simulator: Simulator,
    server: Server,
    base_url: BaseUrl,
}

impl World {
    async fn new() -> Result<Self, BoxError> {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await?;
        let base_url = BaseUrl::new(server.base_url())?;
        Ok(Self { simulator, server, base_url })
    }

    fn client(&self, key: ApiKey, jwts: Option<JwtProvider>) -> Result<OpenAI, BoxError> {
        let builder = SelamLayer::builder().with_api_key(key).with_base_url(self.base_url.clone());
        let layer = match jwts {
            Some(jwts) => builder.with_jwt(jwts).build()?,
            None => builder.build()?,
        };
        Ok(openai(layer, self.http()?)?)
    }

    fn http(&self) -> Result<reqwest::ClientBuilder, BoxError> {
        let trusted = Certificate::from_pem(self.server.ca_pem().unwrap_or_default().as_bytes())?;
        Ok(reqwest::Client::builder().no_proxy().tls_certs_only([trusted]))
    }

    fn jwts(&self) -> Refreshing<Token> {
        let simulator = self.simulator.clone();
        Refreshing::new(source_fn(move |_: Reason<Token>| {
            let jwt = simulator.mint_jwt(JwtAlgorithm::Es256, Duration::from_secs(60));
            async move { Ok::<_, BoxError>(Fetched::new(Token::new(jwt)?)) }
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use tower_selam::{AuthErrorKind, simulator::Fault};

    use super::*;

    async fn world() -> World {
        let _ = rustls::crypto::ring::default_provider().install_default();
        World::new().await.unwrap()
    }

    #[tokio::test]
    async fn chat_and_stream_have_our_credentials_and_no_other() {
        let world = world().await;
        let key = world.simulator.issue_key();
        let client = world.client(ApiKey::new(&*key).unwrap(), Some(world.jwts().into())).unwrap();
        answer(&client).await.unwrap();
        stream(&client).await.unwrap();
        for sent in world.simulator.received() {
            assert_eq!(sent.headers["x-api-key"], key);
            let bearer = sent.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
            assert!(Token::new(bearer).unwrap().expires_at().is_some(), "a JWT");
        }
    }

    #[tokio::test]
    async fn an_expired_jwt_is_renewed_and_the_request_sent_once_more() {
        let world = world().await;
        let key = ApiKey::new(world.simulator.issue_key()).unwrap();
        let client = world.client(key, Some(world.jwts().into())).unwrap();
        answer(&client).await.unwrap();
        world.simulator.expire_jwts();
        answer(&client).await.unwrap();
        assert_eq!(world.simulator.requests(), 3);
    }

    /// O4: what async-openai's own client would follow, key and all.
    #[tokio::test]
    async fn o4_a_redirect_to_another_origin_is_not_followed() {
        let (world, other) = (world().await, world().await);
        let key = world.simulator.issue_key();
        let client = world.client(ApiKey::new(&*key).unwrap(), None).unwrap();
        for status in [301, 302, 307, 308] {
            let away = other.base_url.endpoint("chat/completions").unwrap().to_string();
            let away = http::Response::builder().status(status).header("location", away);
            world.simulator.inject(Fault::Answer(away.body(bytes::Bytes::new()).unwrap()));
            client.chat().create(question(false).unwrap()).await.unwrap_err();
        }
        assert_eq!((world.simulator.requests(), other.simulator.requests()), (4, 0));
        assert_eq!(world.simulator.received()[3].headers["authorization"], format!("Bearer {key}"));
    }

    #[tokio::test]
    async fn our_error_is_found_in_theirs() {
        let world = world().await;
        let client = world.client(ApiKey::new("sk-selam-revoked").unwrap(), None).unwrap();
        let error = client.chat().create(question(false).unwrap()).await.unwrap_err();
        let found = AuthError::find(&error).unwrap();
        assert_eq!((found.kind(), found.code()), (AuthErrorKind::InvalidApiKey, Some("invalid_api_key")));
        assert!(error.source().is_some() && !format!("{error} {error:?}").contains("sk-selam-revoked"));

        let streamed = client.chat().create_stream(question(true).unwrap()).await;
        let error = match streamed {
            Err(error) => error,
            Ok(mut events) => events.next().await.unwrap().unwrap_err(),
        };
        assert_eq!(
            AuthError::find(&error).map(AuthError::kind),
            Some(AuthErrorKind::InvalidApiKey),
            "{error:?}"
        );
    }
}
