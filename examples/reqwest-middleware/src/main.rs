//! Uses `AuthMiddleware` with reqwest-middleware: it refreshes JWTs, retries outages and speaks for users.
//!
//! ```console
//! $ cargo run -p example-reqwest-middleware
//! ```
//!
//! The example starts a simulator of the API and talks to it over TLS. With `SELAM_API_KEY` set (and optionally
//! `SELAM_JWT` and `SELAM_BASE_URL`) it talks to SelamAPI itself.

#[path = "../../support/reqwest.rs"]
mod support;

use std::{collections::HashMap, process::ExitCode, time::Duration};

use reqwest::StatusCode;
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use serde_json::{Value, json};
use tower::ServiceBuilder;
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BoxError, Credentials, PerSubject, RequestAuth, SelamLayer, Subject,
    Token,
    adapter::{
        reqwest::{TryCloneBody, redirect_policy},
        reqwest_middleware::AuthMiddleware,
    },
    retry::{MayProcessTwice, RetryPolicy, ThrottleLayer},
    simulator::{Fault, JwtAlgorithm, Simulator},
    source::{Reason, source_fn},
};

use self::support::{
    Api, client_builder,
    transcript::{auth_error, finish, line, step},
};

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

/// Stands for a generated client: it is given a `ClientWithMiddleware`, and builds its requests itself.
struct Sessions {
    client: ClientWithMiddleware,
    url: String,
}

impl Sessions {
    async fn open(&self) -> Result<StatusCode, reqwest_middleware::Error> {
        let request = self.client.post(&self.url).json(&json!({ "voice": "mekdes" })).build()?;
        Ok(self.client.execute(request).await?.status())
    }
}

/// Puts the retries outside the authentication, so that every attempt carries a fresh credential.
fn client(
    layer: SelamLayer,
    builder: reqwest::ClientBuilder,
) -> Result<ClientWithMiddleware, reqwest::Error> {
    // `reqwest-retry` would ignore `Retry-After`, and send each POST again after a 5xx.
    let layers = ServiceBuilder::new()
        .retry(RetryPolicy::new().with_clone(TryCloneBody))
        .layer(ThrottleLayer::new())
        .layer(layer.with_replay(TryCloneBody));
    // A middleware does not see redirects, so the client itself has to keep the key from other origins.
    let client = builder.redirect(redirect_policy()).build()?;
    Ok(ClientBuilder::new(client).with(AuthMiddleware::with_layers(layers)).build())
}

async fn run() -> Result<(), BoxError> {
    let api = Api::start("tower-selam with reqwest-middleware").await?;
    let client = client(api.layer().clone(), client_builder(&api)?)?;
    let chat = api.url("chat/completions")?;

    step("Chat completion: the API key is enough");
    line("request", format_args!("POST {chat}"));
    let response = client.post(&chat).json(&question()).with_extension(RequestAuth::ApiKey).send().await?;
    let response = response.error_for_status()?;
    line("status", format_args!("{} over {:?}", response.status(), response.version()));
    let completion: Value = response.json().await?;
    line("answer", completion["choices"][0]["message"]["content"].as_str().unwrap_or("(no content)"));

    if let Some(simulator) = api.simulator() {
        let sessions = api.url("audio/agent/sessions")?;
        step("Valid JWT: the request is sent once");
        open_session(&client, &sessions).await?;

        step("Outage and expired JWT: the policy retries the 503, and the layers replay the 401");
        simulator.inject(Fault::Unavailable);
        simulator.expire_jwts();
        let before = simulator.requests();
        open_session(&client, &sessions).await?;
        let sent = simulator.requests() - before;
        line("sent", format_args!("{sent} times"));
        if sent != 3 {
            return Err("expected a 503, a 401 and a 200".into());
        }

        step("Generated client: it sends the JWT of the user whose middleware it was given");
        let http = client_builder(&api)?.redirect(redirect_policy()).build()?;
        let jwts = ["almaz", "kaleb"].map(|user| (user, simulator.mint_jwt(JwtAlgorithm::Es256, MINUTE)));
        let auth = AuthMiddleware::new(for_users(&api, simulator, HashMap::from(jwts.clone()))?);
        for (user, jwt) in jwts {
            let auth = auth.for_subject(&Subject::new(user));
            let client = ClientBuilder::new(http.clone()).with(auth).build();
            let status = Sessions { client, url: sessions.clone() }.open().await?;
            line("user", format_args!("{user}: {status}"));
            let sent = simulator.received().pop().ok_or("nothing was sent")?;
            if sent.headers["authorization"] != format!("Bearer {jwt}") {
                return Err("the request carried another JWT".into());
            }
        }

        step("Forgotten user: nothing is sent");
        let client = ClientBuilder::new(http).with(auth).build();
        match (Sessions { client, url: sessions }).open().await {
            Ok(status) => return Err(format!("expected an error, but the API answered {status}").into()),
            Err(error) => auth_error(AuthError::find(&error).ok_or("the error is not an `AuthError`")?),
        }
    }

    step("Revoked key: the 401 is final and is not retried");
    let revoked = RequestAuth::Custom(Credentials::bearer(api.revoked_key()?));
    let before = api.simulator().map(|simulator| simulator.requests());
    expect_error(&client, &chat, revoked, AuthErrorKind::InvalidApiKey).await?;
    if let (Some(simulator), Some(before)) = (api.simulator(), before) {
        let sent = simulator.requests() - before;
        line("sent", format_args!("{sent} time"));
        if sent != 1 {
            return Err("a rejected request was sent again".into());
        }
    }

    step("Plain http: the layers refuse to send the key");
    let plain = "http://api.selamgpt.com/v1/chat/completions";
    expect_error(&client, plain, RequestAuth::ApiKey, AuthErrorKind::OriginNotAllowed).await
}

/// A layer with a JWT for each user. A real server would exchange the token with which the user came to it.
fn for_users(
    api: &Api,
    simulator: &Simulator,
    jwts: HashMap<&'static str, String>,
) -> Result<SelamLayer, BoxError> {
    let jwts = PerSubject::new(move |user: &Subject| {
        let jwt = jwts.get(user.as_str()).cloned();
        source_fn(move |_: Reason<Token>| {
            let jwt = jwt.clone();
            async { Ok::<_, BoxError>(Token::new(jwt.ok_or("there is no such user")?)?) }
        })
    });
    let key = ApiKey::new(simulator.issue_key())?;
    Ok(api.builder().with_api_key(key).with_jwt(jwts).build()?)
}

fn question() -> Value {
    json!({ "model": "selam-turbo", "messages": [{ "role": "user", "content": "What does selam mean?" }] })
}

/// Sends a request that needs a JWT and the key.
async fn open_session(client: &ClientWithMiddleware, sessions: &str) -> Result<(), BoxError> {
    line("request", format_args!("POST {sessions}"));
    // A session may be opened twice, so the request is repeated even if it was perhaps processed.
    let request = client.post(sessions).json(&json!({ "voice": "mekdes" })).with_extension(MayProcessTwice);
    let response = request.send().await?;
    line("status", response.status());
    match response.status() {
        StatusCode::OK => Ok(()),
        status => Err(format!("the API answered {status}").into()),
    }
}

/// Sends a request that has to end with an error of the kind `expected`.
async fn expect_error(
    client: &ClientWithMiddleware,
    url: &str,
    auth: RequestAuth,
    expected: AuthErrorKind,
) -> Result<(), BoxError> {
    line("request", format_args!("POST {url}"));
    let result = client.post(url).json(&question()).with_extension(auth).send().await;
    let error = result.err().ok_or_else(|| format!("expected {expected:?}, but the request succeeded"))?;
    // reqwest-middleware wraps the error; `find` looks through it.
    match AuthError::find(&error) {
        Some(found) if found.kind() == expected => {
            auth_error(found);
            Ok(())
        }
        _ => Err(error.into()),
    }
}
