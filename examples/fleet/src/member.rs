//! One of the processes: a member of the fleet that sends requests. And its handle in the process that started it.

use std::{
    env,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, stdin},
    process::{Child, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};
use tower::Layer;
use tower_selam::{
    ApiKey, BaseUrl, BoxError, Refreshing, Selam, SelamLayer, Token,
    fleet::{Fleet, SealingKey},
    oauth::{ClientAuth, OAuthSource, TokenEndpoint},
    source::{Reason, Source, source_fn},
};

use crate::redis::store;

/// The login's name in the fleet.
pub(crate) const LOGIN: &str = "login";

/// After how long others take over from a process that was killed.
const LEASE: Duration = Duration::from_secs(1);

/// How many requests are in flight in each process, and how often each is sent.
const CALLERS: usize = 4;
const PAUSE: Duration = Duration::from_millis(20);

const CHAT: &str = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;

/// What a process is started with, in its environment.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) store: String,
    pub(crate) key: String,
    pub(crate) base_url: String,
    pub(crate) api_key: String,
}

const VARIABLES: [&str; 4] = ["DEMO_STORE", "DEMO_KEY", "DEMO_BASE_URL", "DEMO_API_KEY"];

impl Settings {
    pub(crate) fn from_env() -> Option<Self> {
        let [store, key, base_url, api_key] = VARIABLES.map(|name| env::var(name).ok());
        Some(Self { store: store?, key: key?, base_url: base_url?, api_key: api_key? })
    }

    fn values(&self) -> [&str; 4] {
        [&self.store, &self.key, &self.base_url, &self.api_key]
    }
}

/// What a process says of itself, ten times a second.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    /// In milliseconds.
    pub(crate) longest: u64,
    /// How often it asked the token endpoint.
    pub(crate) asked: u64,
    pub(crate) is_leading: bool,
    /// The id of the token in use.
    pub(crate) token: String,
}

/// A process that was started.
pub(crate) struct Process {
    id: u32,
    child: Child,
    input: Option<ChildStdin>,
    reading: JoinHandle<()>,
    report: Arc<Mutex<Report>>,
    is_alive: bool,
}

impl Process {
    pub(crate) fn start(settings: &Settings) -> Result<Self, BoxError> {
        let mut child = Command::new(env::current_exe()?)
            .envs(VARIABLES.into_iter().zip(settings.values()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take().ok_or("no output")?);
        let report = Arc::<Mutex<Report>>::default();
        let reading = tokio::spawn(read(output, Arc::clone(&report)));
        Ok(Self { id: child.id().unwrap_or_default(), child, input, reading, report, is_alive: true })
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.is_alive
    }

    pub(crate) fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills it, so that it can give nothing back.
    pub(crate) async fn kill(&mut self) -> Result<(), BoxError> {
        self.is_alive = false;
        self.child.kill().await?;
        self.report.lock().unwrap_or_else(PoisonError::into_inner).is_leading = false;
        Ok(())
    }

    /// Has it use the login's tokens from now on.
    pub(crate) async fn use_login(&mut self) {
        if let Some(input) = &mut self.input {
            // Fails if the process was killed.
            let _ = input.write_all(b"login\n").await;
        }
    }

    /// Has it leave the fleet and end.
    pub(crate) async fn end(&mut self) -> Result<(), BoxError> {
        self.input = None;
        self.child.wait().await?;
        Ok((&mut self.reading).await?)
    }
}

async fn read(output: ChildStdout, report: Arc<Mutex<Report>>) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(read) = Report::parse(&line) {
            *report.lock().unwrap_or_else(PoisonError::into_inner) = read;
        }
    }
}

impl Report {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let mut number = || words.next()?.parse::<u64>().ok();
        let (requests, failed, longest, asked, is_leading) =
            (number()?, number()?, number()?, number()?, number()? == 1);
        Some(Self { requests, failed, longest, asked, is_leading, token: words.next()?.to_owned() })
    }
}

/// What a process counts.
#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    failed: AtomicU64,
    longest: AtomicU64,
    asked: AtomicU64,
    is_leading: AtomicBool,
    uses_login: AtomicBool,
}

type Http = Client<HttpConnector, Full<Bytes>>;

/// Sends requests until standard input ends.
pub(crate) async fn run(settings: Settings) -> Result<(), BoxError> {
    let fleet = Fleet::builder("demo", store(&settings.store)?, SealingKey::from_base64(&settings.key)?)
        .with_lease(LEASE)
        .build()?;
    let client: Http = Client::builder(TokioExecutor::new()).build_http();
    let key = ApiKey::new(settings.api_key)?;
    let url = settings.base_url.replace("/v1", "/oauth/token");
    let endpoint = TokenEndpoint::allow_insecure_loopback(&url, client.clone())?
        .with_client_auth(ClientAuth::api_key(key.clone()));
    let tally = Arc::<Tally>::default();

    let source = OAuthSource::client_credentials(endpoint.clone());
    let service = Refreshing::new(fleet.share("service", counted(source, &tally)));
    let login = |login| counted(OAuthSource::refresh_token(endpoint, login), &tally);
    let login = Refreshing::new(fleet.share_login(LOGIN, login));
    let stack = |jwts: &Refreshing<Token>| -> Result<_, BoxError> {
        let layer = SelamLayer::builder()
            .with_api_key(key.clone())
            .with_jwt(jwts.clone())
            .with_base_url(BaseUrl::allow_insecure_loopback(&settings.base_url)?)
            .build()?;
        Ok(layer.layer(client.clone()))
    };
    let stacks = [stack(&service)?, stack(&login)?];
    for _ in 0..CALLERS {
        tokio::spawn(call(
            stacks.clone(),
            format!("{}/chat/completions", settings.base_url),
            Arc::clone(&tally),
        ));
    }

    let (mut commands, mut ticks) = (BufReader::new(stdin()).lines(), interval(Duration::from_millis(100)));
    loop {
        tokio::select! {
            command = commands.next_line() => match command? {
                Some(_) => tally.uses_login.store(true, Relaxed),
                None => break,
            },
            _ = ticks.tick() => {
                let jwts = if tally.uses_login.load(Relaxed) { &login } else { &service };
                tally.print(jwts.current().as_ref());
            }
        }
    }
    fleet.leave().await;
    tally.print(login.current().as_ref());
    // The line that `finish` prints is not read.
    Ok(())
}

/// Counts the fetches of a source.
fn counted(source: OAuthSource, tally: &Arc<Tally>) -> impl Source<Token> + use<> {
    let tally = Arc::clone(tally);
    source_fn(move |reason: Reason<Token>| {
        let (source, tally) = (source.clone(), Arc::clone(&tally));
        async move {
            tally.asked.fetch_add(1, Relaxed);
            tally.is_leading.store(true, Relaxed);
            let fetched = source.fetch(reason).await;
            tally.is_leading.store(false, Relaxed);
            fetched
        }
    })
}

/// Sends one request after another.
async fn call(stacks: [Selam<Http>; 2], url: String, tally: Arc<Tally>) {
    let mut ticks = interval(PAUSE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let stack = &stacks[usize::from(tally.uses_login.load(Relaxed))];
        let began = Instant::now();
        let result = send(stack, &url).await;
        let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tally.longest.fetch_max(millis, Relaxed);
        tally.requests.fetch_add(1, Relaxed);
        if let Err(error) = result
            && tally.failed.fetch_add(1, Relaxed) == 0
        {
            eprintln!("\nprocess {}: the first failed request: {}", std::process::id(), with_causes(&*error));
        }
    }
}

/// Sends a request, and reads the answer.
async fn send(stack: &Selam<Http>, url: &str) -> Result<(), BoxError> {
    let response = stack.send(Request::post(url).body(Full::from(CHAT))?).await?;
    let status = response.status();
    response.into_body().collect().await?;
    if status.is_success() { Ok(()) } else { Err(status.to_string().into()) }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

impl Tally {
    #[allow(clippy::print_stdout, reason = "the process reports on standard output")]
    fn print(&self, token: Option<&Token>) {
        let [requests, failed, longest, asked] =
            [&self.requests, &self.failed, &self.longest, &self.asked].map(|count| count.load(Relaxed));
        let is_leading = u8::from(self.is_leading.load(Relaxed));
        let token = token.map_or("none".to_owned(), |token| token.id().to_string());
        println!("{requests} {failed} {longest} {asked} {is_leading} {token}");
    }
}
