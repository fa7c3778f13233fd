//! gRPC calls with a JWT that renews itself, through tonic.
//!
//! ```console
//! $ cargo run -p example-tonic
//! ```
//!
//! serves `selam.example.Greeter` over TLS on a loopback port and calls it. SelamAPI documents no gRPC service of its
//! own: with `SELAM_API_KEY` set (and, if you like, `SELAM_JWT` and `SELAM_BASE_URL`), the example makes one call to
//! the API's origin and shows the status that comes: `Unimplemented`, or `Internal` where a 404 has a JSON body.

use std::{
    collections::HashMap,
    env,
    error::Error,
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
    service::interceptor::InterceptedService,
    transport::{Channel, ClientTlsConfig},
};
use tower::Layer;
use tower_selam::{
    ApiKey, AuthError, BaseUrl, BoxError, RefreshPolicy, Refreshing, SelamLayer, Token,
    adapter::tonic::{SelamGrpc, SelamGrpcLayer},
    env::SELAM_API_KEY,
    source::{Reason, source_fn},
};

/// The generated client, over a channel that authenticates.
type Client = GreeterClient<SelamGrpc<Channel>>;

const KEY: &str = "sk-selam-example";
const LIFETIME: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    let run = match env::var_os(SELAM_API_KEY) {
        Some(_) => with_the_api().await,
        None => with_a_server_of_our_own().await,
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn with_a_server_of_our_own() -> Result<(), BoxError> {
    let desk = Desk::default();
    let door = desk.clone();
    let greeter = InterceptedService::new(GreeterServer::new(Greets), move |request| door.admit(request));
    let server = Server::start(tonic::service::Routes::new(greeter)).await?;

    // Where the tokens come from: a login, in a program of yours. That they expire is not said in them.
    let issuing = desk.clone();
    let source = source_fn(move |_: Reason<Token>| {
        let token = issuing.issue();
        async move { Ok::<_, BoxError>(Token::new(token)?) }
    });
    // Tokens that are refused one after the other are renewed at intervals; these live so short that they would be.
    let policy = RefreshPolicy::new().with_backoff(LIFETIME / 10, LIFETIME);
    let jwts = Refreshing::with_policy(source, policy);
    let selam = SelamLayer::builder()
        .with_base_url(BaseUrl::new(&server.url())?)
        .with_api_key(ApiKey::new(KEY)?)
        .with_jwt(jwts)
        .build()?;
    let endpoint = server.endpoint()?;
    let layer = SelamGrpcLayer::new(selam, endpoint.uri())?;
    let mut greeter: Client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));
    println!("tower-selam over tonic");
    println!("  server   selam.example.Greeter at {} (set {SELAM_API_KEY} for the real API)", server.url());
    println!("  tokens   live {LIFETIME:?}");

    step("A unary call");
    println!("  answer   {}", greeter.greet(Name::of("Almaz")).await?.into_inner().text);
    desk.show();

    step("A stream of answers");
    let mut greetings = greeter.greet_in_every_language(Name::of("Almaz")).await?.into_inner();
    while let Some(greeting) = greetings.message().await? {
        println!("  answer   {}", greeting.text);
    }
    let before = desk.show();

    step("The same call once the token has expired");
    sleep(2 * LIFETIME).await;
    println!("  answer   {}", greeter.greet(Name::of("Almaz")).await?.into_inner().text);
    let after = desk.show();
    expect(after.0 > before.0 && after.1 > before.1, "a refusal and a renewal")?;

    step("A stream of requests, refused on its way");
    sleep(2 * LIFETIME).await;
    let names = ["Almaz", "Kaleb", "Selamawit"].map(Name::of);
    let pace = Duration::from_millis(20);
    let names = tokio_stream::iter(names).throttle(pace);
    println!("  answer   {}", greeter.greet_all(names).await?.into_inner().text);
    let before = after;
    let after = desk.show();
    expect(after.0 > before.0 && after.1 > before.1, "a refusal and a renewal")?;

    step("A conversation");
    let names = tokio_stream::iter(["Almaz", "Kaleb"].map(Name::of)).throttle(pace);
    let mut greetings = greeter.converse(names).await?.into_inner();
    while let Some(greeting) = greetings.message().await? {
        println!("  answer   {}", greeting.text);
    }

    step("A call that is not permitted");
    show(&refusal(greeter.forget(Name::of("Almaz")).await, Code::PermissionDenied)?);

    step("An account that was closed");
    desk.close();
    show(&refusal(greeter.greet(Name::of("Almaz")).await, Code::Unauthenticated)?);

    step("Another origin than the channel's");
    let selam = SelamLayer::builder().with_api_key(ApiKey::new(KEY)?).build()?;
    match SelamGrpcLayer::new(selam, endpoint.uri()) {
        Err(error) => println!("  refused  {error}"),
        Ok(_) => return Err("a key would have gone to another origin".into()),
    }

    println!("\nAll of it as it should be.");
    Ok(())
}

async fn with_the_api() -> Result<(), BoxError> {
    let selam = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
    let mut endpoint = Channel::from_shared(selam.base_url().to_string())?;
    if endpoint.uri().scheme_str() == Some("https") {
        endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots())?;
    }
    println!("tower-selam over tonic");
    println!("  API   {}", selam.base_url());
    println!("  key   {:?}", ApiKey::from_env()?);
    let layer = SelamGrpcLayer::new(selam, endpoint.uri())?;
    let mut greeter: Client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));

    step("A call of a service that the API does not document");
    match greeter.greet(Name::of("Almaz")).await {
        Ok(response) => println!("  answer   {}", response.into_inner().text),
        // Nobody answered.
        Err(status) if status.source().is_some() && AuthError::find(&status).is_none() => {
            return Err(status.into());
        }
        Err(status) => show(&status),
    }
    Ok(())
}

fn step(title: &str) {
    println!("\n{title}");
}

fn expect(is: bool, what: &str) -> Result<(), BoxError> {
    if is { Ok(()) } else { Err(format!("{what} expected").into()) }
}

fn refusal<T>(result: Result<Response<T>, Status>, expected: Code) -> Result<Status, BoxError> {
    match result {
        Err(status) if status.code() == expected && AuthError::find(&status).is_some() => Ok(status),
        Err(status) => Err(status.into()),
        Ok(_) => Err(format!("{expected:?} was expected, but the server answered").into()),
    }
}

fn show(status: &Status) {
    println!("  status   {:?}: {}", status.code(), status.message());
    if let Some(error) = AuthError::find(status) {
        println!("  error    AuthErrorKind::{:?}", error.kind());
        println!("  because  {error}");
    }
}

/// Issues tokens, and lets in who has one.
#[derive(Clone, Default)]
struct Desk(Arc<Tally>);

#[derive(Default)]
struct Tally {
    good_until: Mutex<HashMap<String, Instant>>,
    issued: AtomicUsize,
    refused: AtomicUsize,
    closed: AtomicBool,
}

impl Desk {
    fn issue(&self) -> String {
        let token = format!("token-{}", self.0.issued.fetch_add(1, Relaxed) + 1);
        self.good_until().insert(token.clone(), Instant::now() + LIFETIME);
        token
    }

    /// Tokens are issued as before, and good for nothing.
    fn close(&self) {
        self.0.closed.store(true, Relaxed);
    }

    fn admit(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let token = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token = token.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        let refusal = match self.good_until().get(token) {
            _ if self.0.closed.load(Relaxed) => "the account is closed",
            Some(until) if Instant::now() < *until => return Ok(request),
            _ => "the token has expired",
        };
        self.0.refused.fetch_add(1, Relaxed);
        Err(Status::unauthenticated(refusal))
    }

    fn good_until(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.0.good_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self) -> (usize, usize) {
        let (issued, refused) = (self.0.issued.load(Relaxed), self.0.refused.load(Relaxed));
        println!("  so far   tokens issued: {issued}, calls refused: {refused}");
        (issued, refused)
    }
}

/// The service, which leaves who is let in to the desk.
struct Greets;

type Greetings = Pin<Box<dyn Stream<Item = Result<Greeting, Status>> + Send>>;

#[tonic::async_trait]
impl Greeter for Greets {
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
        Err(Status::permission_denied("greetings are for ever"))
    }
}
