//! Runs async-openai through the layers: a completion, a stream, a refreshed token, two users and typed errors.
//!
//! ```console
//! $ cargo run -p example-async-openai
//! ```
//!
//! The example starts a simulator of the API and talks to it over TLS. With `SELAM_API_KEY` set (and optionally
//! `SELAM_BASE_URL`) it talks to SelamAPI itself.

#[path = "../../support/reqwest.rs"]
mod support;

use std::process::ExitCode;

use async_openai::{
    config::OpenAIConfig,
    error::OpenAIError,
    middleware::HttpRequestFactory,
    types::chat::{
        ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
    },
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use futures_util::StreamExt;
use serde_json::Value;
use tower::service_fn;
use tower_selam::{
    ApiKey, AuthError, BaseUrl, BoxError, PerSubject, Refreshing, Subject, Token,
    adapter::reqwest::{Client, HttpService},
    oauth::{ClientAuth, OAuthSource, TokenEndpoint, TokenType},
    simulator::{Received, Simulator},
    source::{Reason, source_fn},
};

use self::support::{
    Api, client_builder,
    transcript::{auth_error, finish, line, open_line, step},
};

type OpenAI = async_openai::Client<OpenAIConfig>;

/// Makes a client whose requests are built by async-openai and sent through the layers.
///
/// async-openai writes the key from its `OpenAIConfig` into `Authorization`; the layers replace it. To speak for a user,
/// give it `selam.for_subject(&user)`: that costs no more than a clone.
fn openai(base_url: &BaseUrl, selam: Client) -> OpenAI {
    let config = OpenAIConfig::new().with_api_base(base_url.to_string()).with_api_key("replaced");
    let service = service_fn(move |request: HttpRequestFactory| {
        let selam = selam.clone();
        async move {
            selam.execute(request.build().await?).await.map_err(|error| OpenAIError::Boxed(error.into()))
        }
    });
    async_openai::Client::with_config(config).with_http_service(service)
}

/// A JWT for each user, by token exchange (RFC 8693). A real server exchanges the token with which the user came to it; the
/// simulator takes a name, and makes it the JWT's `sub`.
fn jwts_of_users(api: &Api, key: &ApiKey) -> Result<PerSubject, BoxError> {
    // A token endpoint does not redirect.
    let http = client_builder(api)?.redirect(reqwest::redirect::Policy::none()).build()?;
    let http = HttpService::dangerous_with_client(http);
    let url = api.base_url().to_string().replace("/v1", "/oauth/token");
    let endpoint = TokenEndpoint::new::<_, reqwest::Body, _>(&url, http)?
        .with_client_auth(ClientAuth::api_key(key.clone()));
    let token_of = |user: &Subject| Token::new(user.as_str()).expect("a name without white space");
    Ok(PerSubject::new(move |user: &Subject| {
        OAuthSource::token_exchange(endpoint.clone(), token_of(user), TokenType::AccessToken)
    }))
}

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let api = Api::start("tower-selam under async-openai").await?;
    let client = openai(api.base_url(), Client::new(api.layer().clone(), client_builder(&api)?)?);

    step("Chat completion");
    answer(&client).await?;

    step("Streamed chat completion");
    stream(&client).await?;

    let Some(simulator) = api.simulator() else { return Ok(()) };
    step("Expired JWT: the layers refresh it after the 401 and replay the request");
    simulator.expire_jwts();
    let before = simulator.requests();
    answer(&client).await?;
    line("sent", format_args!("{} times", simulator.requests() - before));

    step("Two users: each request carries the JWT of its user");
    let key = ApiKey::new(simulator.issue_key())?;
    let layer = api.builder().with_api_key(key.clone()).with_jwt(jwts_of_users(&api, &key)?).build()?;
    let selam = Client::new(layer, client_builder(&api)?)?;
    for user in ["almaz", "kaleb"] {
        let client = openai(api.base_url(), selam.for_subject(&Subject::new(user)));
        let before = simulator.requests();
        line("user", user);
        answer(&client).await?;
        stream(&client).await?;
        for sent in users_of_requests(simulator, before) {
            line("sent", format_args!("the JWT of {sent}"));
            if sent != user {
                return Err("a request carried another user's JWT".into());
            }
        }
    }

    step("Forgotten user: nothing is sent, and nobody else's JWT is used");
    error(&openai(api.base_url(), selam)).await?;

    step("Revoked key: the typed error is found inside async-openai's");
    let layer = api.builder().with_api_key(api.revoked_key()?).build()?;
    error(&openai(api.base_url(), Client::new(layer, client_builder(&api)?)?)).await?;

    step("JWT source that fails: nothing is sent");
    let failing = Refreshing::new(source_fn(|_: Reason<Token>| async {
        Err::<Token, BoxError>("the login service is down".into())
    }));
    let layer = api.builder().with_api_key(key).with_jwt(failing).build()?;
    error(&openai(api.base_url(), Client::new(layer, client_builder(&api)?)?)).await
}

/// The `sub` of the JWT of each chat completion, except for the `skipped` first requests.
fn users_of_requests(simulator: &Simulator, skipped: u64) -> Vec<String> {
    let received = simulator.received().into_iter().skip(skipped as usize);
    received
        .filter(|request| request.uri.path().ends_with("/chat/completions"))
        .map(|request| user(&request))
        .collect()
}

/// The `sub` of the JWT of a request.
fn user(request: &Received) -> String {
    let authorization = request.headers["authorization"].to_str().unwrap_or_default();
    let claims =
        authorization.split('.').nth(1).and_then(|claims| BASE64_URL_SAFE_NO_PAD.decode(claims).ok());
    let claims: Value = serde_json::from_slice(&claims.unwrap_or_default()).unwrap_or_default();
    claims["sub"].as_str().unwrap_or("nobody").to_owned()
}

fn question(stream: bool) -> Result<CreateChatCompletionRequest, OpenAIError> {
    saying("What does selam mean?", stream)
}

fn saying(text: &str, stream: bool) -> Result<CreateChatCompletionRequest, OpenAIError> {
    let message = ChatCompletionRequestUserMessageArgs::default().content(text).build()?;
    CreateChatCompletionRequestArgs::default()
        .model("selam-turbo")
        .messages([message.into()])
        .stream(stream)
        .build()
}

async fn answer(client: &OpenAI) -> Result<(), BoxError> {
    let completion = client.chat().create(question(false)?).await?;
    line("answer", completion.choices[0].message.content.as_deref().unwrap_or("(no content)"));
    Ok(())
}

async fn stream(client: &OpenAI) -> Result<(), BoxError> {
    let mut events = client.chat().create_stream(question(true)?).await?;
    let mut text = open_line("answer");
    while let Some(event) = events.next().await {
        for choice in event?.choices {
            text.push(&choice.delta.content.unwrap_or_default());
        }
    }
    Ok(())
}

/// Asks a question that has to end with one of our errors.
async fn error(client: &OpenAI) -> Result<(), BoxError> {
    match client.chat().create(question(false)?).await {
        Ok(_) => Err("expected an error, but the request succeeded".into()),
        Err(error) => {
            // `find` looks through every error that wraps ours.
            auth_error(AuthError::find(&error).ok_or("the error is not an `AuthError`")?);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use tokio::task::JoinSet;
    use tower_selam::{AuthErrorKind, JwtProvider, simulator::Fault};

    use super::*;
    use crate::support::api::minted_by;

    fn client(api: &Api, key: ApiKey, jwt: Option<JwtProvider>) -> OpenAI {
        let builder = api.builder().with_api_key(key);
        let layer = match jwt {
            Some(jwt) => builder.with_jwt(jwt).build().unwrap(),
            None => builder.build().unwrap(),
        };
        openai(api.base_url(), Client::new(layer, client_builder(api).unwrap()).unwrap())
    }

    /// A client for all users, with a JWT for each.
    fn for_users(api: &Api) -> Client {
        let key = ApiKey::new(api.simulator().unwrap().issue_key()).unwrap();
        let jwts = jwts_of_users(api, &key).unwrap();
        let layer = api.builder().with_api_key(key).with_jwt(jwts).build().unwrap();
        Client::new(layer, client_builder(api).unwrap()).unwrap()
    }

    /// H4: also of requests that are under way at the same time, streamed ones included.
    #[tokio::test]
    async fn each_user_speaks_with_their_own_jwt() {
        let api = Api::simulated().await.unwrap();
        let simulator = api.simulator().unwrap();
        let selam = for_users(&api);
        let mut calls = JoinSet::new();
        for user in ["almaz", "kaleb"] {
            let client = openai(api.base_url(), selam.for_subject(&Subject::new(user)));
            for _ in 0..4 {
                let (asking, streaming) = (client.clone(), client.clone());
                calls.spawn(async move {
                    asking.chat().create(saying(user, false).unwrap()).await.unwrap();
                    let events = streaming.chat().create_stream(saying(user, true).unwrap()).await.unwrap();
                    assert!(events.count().await > 1);
                });
            }
        }
        calls.join_all().await;
        let received = simulator.received();
        let (exchanges, completions): (Vec<_>, Vec<_>) =
            received.into_iter().partition(|request| request.uri.path() == "/oauth/token");
        assert_eq!((exchanges.len(), completions.len()), (2, 16), "one exchange for each user");
        for request in completions {
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            assert_eq!(body["messages"][0]["content"], user(&request));
        }
    }

    /// H4: a request without a user is refused, whoever was served before.
    #[tokio::test]
    async fn a_forgotten_user_is_refused() {
        let api = Api::simulated().await.unwrap();
        let simulator = api.simulator().unwrap();
        let selam = for_users(&api);
        answer(&openai(api.base_url(), selam.for_subject(&Subject::new("almaz")))).await.unwrap();
        let sent = simulator.requests();
        let client = openai(api.base_url(), selam);
        let error = client.chat().create(question(false).unwrap()).await.unwrap_err();
        let streamed = match client.chat().create_stream(question(true).unwrap()).await {
            Err(error) => error,
            Ok(mut events) => events.next().await.unwrap().unwrap_err(),
        };
        for error in [error, streamed] {
            assert_eq!(AuthError::find(&error).unwrap().kind(), AuthErrorKind::CredentialUnavailable);
        }
        assert_eq!(simulator.requests(), sent);
    }

    #[tokio::test]
    async fn async_openai_sends_only_our_credentials() {
        let api = Api::simulated().await.unwrap();
        let simulator = api.simulator().unwrap();
        let key = simulator.issue_key();
        let client = client(&api, ApiKey::new(&*key).unwrap(), Some(minted_by(simulator).into()));
        answer(&client).await.unwrap();
        stream(&client).await.unwrap();
        for sent in simulator.received() {
            assert_eq!(sent.headers["x-api-key"], key);
            let bearer = sent.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
            assert!(Token::new(bearer).unwrap().expires_at().is_some(), "the bearer is a JWT");
        }
    }

    #[tokio::test]
    async fn an_expired_jwt_is_refreshed_and_the_request_replayed() {
        let api = Api::simulated().await.unwrap();
        let simulator = api.simulator().unwrap();
        let key = ApiKey::new(simulator.issue_key()).unwrap();
        let client = client(&api, key, Some(minted_by(simulator).into()));
        answer(&client).await.unwrap();
        simulator.expire_jwts();
        answer(&client).await.unwrap();
        assert_eq!(simulator.requests(), 3);
    }

    /// O4: async-openai's own client would follow the redirect and send the key along.
    #[tokio::test]
    async fn a_redirect_to_another_origin_is_not_followed() {
        let (api, other) = (Api::simulated().await.unwrap(), Api::simulated().await.unwrap());
        let (simulator, elsewhere) = (api.simulator().unwrap(), other.simulator().unwrap());
        let key = simulator.issue_key();
        let client = client(&api, ApiKey::new(&*key).unwrap(), None);
        for status in [301, 302, 307, 308] {
            let location = other.url("chat/completions").unwrap();
            let redirect = http::Response::builder().status(status).header("location", location);
            simulator.inject(Fault::Answer(redirect.body(bytes::Bytes::new()).unwrap()));
            client.chat().create(question(false).unwrap()).await.unwrap_err();
        }
        assert_eq!((simulator.requests(), elsewhere.requests()), (4, 0));
        assert_eq!(simulator.received()[3].headers["authorization"], format!("Bearer {key}"));
    }

    #[tokio::test]
    async fn our_error_is_found_in_async_openais_error() {
        let api = Api::simulated().await.unwrap();
        let client = client(&api, ApiKey::new("sk-selam-revoked").unwrap(), None);
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
