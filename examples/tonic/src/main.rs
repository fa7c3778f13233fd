//! Authenticates gRPC calls over tonic: unary and streaming calls, a refresh, a replay, a user per call and typed errors.
//!
//! ```console
//! $ cargo run -p example-tonic
//! ```
//!
//! The example serves `selam.example.Greeter` over TLS on a loopback port and calls it. SelamAPI documents no gRPC
//! service: with `SELAM_API_KEY` set (and optionally `SELAM_JWT` and `SELAM_BASE_URL`), the example makes one call to
//! the API's origin and shows the status, which is `Unimplemented`, or `Internal` if a 404 has a JSON body.

#[path = "../../support/transcript.rs"]
mod transcript;

use std::{
    collections::HashMap,
    env,
    error::Error,
    future::ready,
    pin::Pin,
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use example_tonic::{Greeter, GreeterClient, GreeterServer, Greeting, Name, Server};
use tokio::time::{Instant, sleep};
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Code, Request, Response, Status, Streaming,
    service::{Routes, interceptor::InterceptedService},
    transport::{Channel, ClientTlsConfig},
};
use tower::Layer;
use tower_selam::{
    ApiKey, AuthError, BaseUrl, BoxError, PerSubject, RefreshPolicy, Refreshing, SelamLayer, Subject, Token,
    adapter::tonic::{SelamGrpc, SelamGrpcLayer},
    env::SELAM_API_KEY,
    source::{Reason, source_fn},
};

use self::transcript::{auth_error, finish, line, step, title};

/// The generated client over a channel that authenticates.
type Client = GreeterClient<SelamGrpc<Channel>>;

tokio::task_local! {
    /// The user whose request a server is handling, as its own middleware would set it.
    static USER: Subject;
}

const KEY: &str = "sk-selam-example";
const TOKEN_LIFETIME: Duration = Duration::from_millis(500);
const MESSAGE_INTERVAL: Duration = Duration::from_millis(20);

#[tokio::main]
async fn main() -> ExitCode {
    title("tower-selam with tonic");
    finish(match env::var_os(SELAM_API_KEY) {
        Some(_) => call_the_api().await,
        None => call_a_local_server().await,
    })
}

async fn call_a_local_server() -> Result<(), BoxError> {
    let issuer = Issuer::default();
    let checks = issuer.clone();
    let greeter =
        InterceptedService::new(GreeterServer::new(GreeterService), move |request| checks.check(request));
    let server = Server::start(Routes::new(greeter)).await?;

    // An application would log in here. These tokens do not say when they expire, so only a rejection shows it.
    let login = issuer.clone();
    let source = source_fn(move |_: Reason<Token>| {
        let token = login.issue("service");
        async move { Ok::<_, BoxError>(Token::new(token)?) }
    });
    // Refreshes after repeated rejections are spaced out; tokens with such a short lifetime need a short back-off.
    let policy = RefreshPolicy::new().with_backoff(TOKEN_LIFETIME / 10, TOKEN_LIFETIME);
    let selam = SelamLayer::builder()
        .with_base_url(BaseUrl::new(&server.url())?)
        .with_api_key(ApiKey::new(KEY)?)
        .with_jwt(Refreshing::with_policy(source, policy))
        .build()?;
    let endpoint = server.endpoint()?;
    let layer = SelamGrpcLayer::new(selam, endpoint.uri())?;
    let mut client: Client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));
    line(
        "server",
        format_args!("selam.example.Greeter at {} (set SELAM_API_KEY to call SelamAPI)", server.url()),
    );
    line("tokens", format_args!("live {TOKEN_LIFETIME:?}"));

    step("Unary call: the first token is fetched");
    line("answer", client.greet(Name::of("Almaz")).await?.into_inner().text);
    issuer.show();

    step("Server stream: the token is used again");
    let mut greetings = client.greet_in_every_language(Name::of("Almaz")).await?.into_inner();
    while let Some(greeting) = greetings.message().await? {
        line("answer", greeting.text);
    }
    let counts = issuer.show();

    step("Expired token: the layers refresh it and replay the call");
    sleep(2 * TOKEN_LIFETIME).await;
    line("answer", client.greet(Name::of("Almaz")).await?.into_inner().text);
    let counts = issuer.show_more_than(counts)?;

    step("Client stream with an expired token: its messages are replayed");
    sleep(2 * TOKEN_LIFETIME).await;
    let names = tokio_stream::iter(["Almaz", "Kaleb", "Selamawit"].map(Name::of)).throttle(MESSAGE_INTERVAL);
    line("answer", client.greet_all(names).await?.into_inner().text);
    issuer.show_more_than(counts)?;

    step("Bidirectional stream");
    let names = tokio_stream::iter(["Almaz", "Kaleb"].map(Name::of)).throttle(MESSAGE_INTERVAL);
    let mut greetings = client.converse(names).await?.into_inner();
    while let Some(greeting) = greetings.message().await? {
        line("answer", greeting.text);
    }

    step("Two users: a handle for each, over the same channel");
    let selam = for_users(&issuer, &server)?;
    for user in ["Almaz", "Kaleb"] {
        let mut client = GreeterClient::new(selam.for_subject(&Subject::new(user)));
        line("answer", client.greet(Name::of(user)).await?.into_inner().text);
        issuer.show_token_of(user)?;
    }

    step("Two users: an interceptor names the user of each call");
    let interceptor = |mut request: Request<()>| {
        if let Ok(user) = USER.try_with(Subject::clone) {
            request.extensions_mut().insert(user);
        }
        Ok(request)
    };
    let mut client = GreeterClient::with_interceptor(selam, interceptor);
    for user in ["Almaz", "Kaleb"] {
        let greeting = USER.scope(Subject::new(user), client.greet(Name::of(user))).await?;
        line("answer", greeting.into_inner().text);
        issuer.show_token_of(user)?;
    }

    step("Forgotten user: nothing is sent");
    show(&expect_error(client.greet(Name::of("Almaz")).await, Code::Unauthenticated)?);

    let mut client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));
    step("Permission denied: the status carries a typed error");
    show(&expect_error(client.forget(Name::of("Almaz")).await, Code::PermissionDenied)?);

    step("Closed account: one refresh, one replay, then the second status is returned");
    issuer.close_account();
    show(&expect_error(client.greet(Name::of("Almaz")).await, Code::Unauthenticated)?);
    issuer.show();

    step("Channel to another origin: the layer refuses to be built");
    let selam = SelamLayer::builder().with_api_key(ApiKey::new(KEY)?).build()?;
    line("channel", endpoint.uri());
    line("allowed", selam.base_url());
    match SelamGrpcLayer::new(selam, endpoint.uri()) {
        Err(error) => line("error", error),
        Ok(_) => return Err("the layer would send the key to another origin".into()),
    }
    Ok(())
}

/// A channel for all users, with a token for each.
fn for_users(issuer: &Issuer, server: &Server) -> Result<SelamGrpc<Channel>, BoxError> {
    let issuer = issuer.clone();
    let tokens = PerSubject::new(move |user: &Subject| {
        let (login, user) = (issuer.clone(), user.clone());
        source_fn(move |_: Reason<Token>| ready(Token::new(login.issue(user.as_str()))))
    });
    let selam = SelamLayer::builder()
        .with_base_url(BaseUrl::new(&server.url())?)
        .with_api_key(ApiKey::new(KEY)?)
        .with_jwt(tokens)
        .build()?;
    let endpoint = server.endpoint()?;
    Ok(SelamGrpcLayer::new(selam, endpoint.uri())?.layer(endpoint.connect_lazy()))
}

async fn call_the_api() -> Result<(), BoxError> {
    let selam = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
    let mut endpoint = Channel::from_shared(selam.base_url().to_string())?;
    if endpoint.uri().scheme_str() == Some("https") {
        endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots())?;
    }
    line("API", selam.base_url());
    line("key", format_args!("{:?}", ApiKey::from_env()?));
    let layer = SelamGrpcLayer::new(selam, endpoint.uri())?;
    let mut client: Client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));

    step("Unary call of a service that the API does not document");
    match client.greet(Name::of("Almaz")).await {
        Ok(response) => line("answer", response.into_inner().text),
        // The status has a cause that is not ours: the connection failed.
        Err(status) if status.source().is_some() && AuthError::find(&status).is_none() => {
            return Err(status.into());
        }
        Err(status) => show(&status),
    }
    Ok(())
}

/// Returns the status of a call that has to fail with `expected` and one of our errors.
fn expect_error<T>(result: Result<Response<T>, Status>, expected: Code) -> Result<Status, BoxError> {
    match result {
        Err(status) if status.code() == expected && AuthError::find(&status).is_some() => Ok(status),
        Err(status) => Err(status.into()),
        Ok(_) => Err(format!("expected {expected:?}, but the call succeeded").into()),
    }
}

fn show(status: &Status) {
    line("status", format_args!("{:?}: {}", status.code(), status.message()));
    if let Some(error) = AuthError::find(status) {
        auth_error(error);
    }
}

/// Issues tokens, and checks those of each call.
#[derive(Clone, Default)]
struct Issuer(Arc<State>);

#[derive(Default)]
struct State {
    expiries: Mutex<HashMap<String, Instant>>,
    /// The token of the last call.
    last: Mutex<String>,
    issued: AtomicUsize,
    rejected: AtomicUsize,
    closed: AtomicBool,
}

impl Issuer {
    fn issue(&self, owner: &str) -> String {
        let token = format!("token-{}-of-{owner}", self.0.issued.fetch_add(1, Relaxed) + 1);
        lock(&self.0.expiries).insert(token.clone(), Instant::now() + TOKEN_LIFETIME);
        token
    }

    /// From now on tokens are still issued, but none is accepted.
    fn close_account(&self) {
        self.0.closed.store(true, Relaxed);
    }

    fn check(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let token = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token = token.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        token.clone_into(&mut lock(&self.0.last));
        let message = match lock(&self.0.expiries).get(token) {
            _ if self.0.closed.load(Relaxed) => "the account is closed",
            Some(expiry) if Instant::now() < *expiry => return Ok(request),
            _ => "the token has expired",
        };
        self.0.rejected.fetch_add(1, Relaxed);
        Err(Status::unauthenticated(message))
    }

    /// Prints the token of the last call; an error if it is not one of `user`.
    fn show_token_of(&self, user: &str) -> Result<(), BoxError> {
        let token = lock(&self.0.last).clone();
        line("sent", &token);
        let is_theirs = token.ends_with(&format!("-of-{user}"));
        is_theirs
            .then_some(())
            .ok_or_else(|| format!("the call carried a token that is not of {user}").into())
    }

    /// Prints and returns the tokens issued and the calls rejected so far.
    fn show(&self) -> (usize, usize) {
        let (issued, rejected) = (self.0.issued.load(Relaxed), self.0.rejected.load(Relaxed));
        line("so far", format_args!("tokens issued: {issued}, calls rejected: {rejected}"));
        (issued, rejected)
    }

    /// The same; an error if there was neither a rejection nor a refresh since `before`.
    fn show_more_than(&self, before: (usize, usize)) -> Result<(usize, usize), BoxError> {
        let now = self.show();
        if now.0 > before.0 && now.1 > before.1 {
            Ok(now)
        } else {
            Err("expected a rejection and a refresh".into())
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Greets. The interceptor in front of it checks the tokens.
struct GreeterService;

type Greetings = Pin<Box<dyn Stream<Item = Result<Greeting, Status>> + Send>>;

#[tonic::async_trait]
impl Greeter for GreeterService {
    async fn greet(&self, request: Request<Name>) -> Result<Response<Greeting>, Status> {
        Ok(Response::new(Greeting::saying(format!("Selam, {}!", request.get_ref().name))))
    }

    type GreetInEveryLanguageStream = Greetings;

    async fn greet_in_every_language(&self, request: Request<Name>) -> Result<Response<Greetings>, Status> {
        let name = request.into_inner().name;
        let greetings =
            ["Selam", "Akkam", "Hello"].map(|word| Ok(Greeting::saying(format!("{word}, {name}!"))));
        Ok(Response::new(Box::pin(tokio_stream::iter(greetings))))
    }

    async fn greet_all(&self, request: Request<Streaming<Name>>) -> Result<Response<Greeting>, Status> {
        let mut names = Vec::new();
        let mut stream = request.into_inner();
        while let Some(name) = stream.message().await? {
            names.push(name.name);
        }
        Ok(Response::new(Greeting::saying(format!("Selam, {}!", names.join(", ")))))
    }

    type ConverseStream = Greetings;

    async fn converse(&self, request: Request<Streaming<Name>>) -> Result<Response<Greetings>, Status> {
        let greetings =
            request.into_inner().map(|name| Ok(Greeting::saying(format!("Selam, {}!", name?.name))));
        Ok(Response::new(Box::pin(greetings)))
    }

    async fn forget(&self, _: Request<Name>) -> Result<Response<Greeting>, Status> {
        Err(Status::permission_denied("greetings cannot be forgotten"))
    }
}
