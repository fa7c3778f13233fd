//! The backend proxy that SelamAPI's documentation asks for.
//!
//! ```console
//! $ SELAM_API_KEY=sk-selam-… cargo run --release --example proxy -- --listen 127.0.0.1:8080
//! listening on http://127.0.0.1:8080
//! ```
//!
//! How it works: the crate's docs, in `src/lib.rs`. How it is run: `README.md`.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use example_proxy::{
    config::{Command, Config, Error, HELP},
    metrics,
    proxy::router,
    server::{Ending, serve},
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
};
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// The exit code of bad configuration.
const BAD_CONFIGURATION: u8 = 2;

/// For what is cut off to be logged.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1);
    let done = match Command::parse(arguments, |name| std::env::var_os(name).is_some()) {
        Ok(Command::Help) => say(HELP),
        Ok(Command::Serve(config)) => run(&config),
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "proxy: {error}");
            ExitCode::from(BAD_CONFIGURATION)
        }
    }
}

fn run(config: &Config) -> Result<(), Error> {
    let runtime = Runtime::new().map_err(|error| Error::new(format!("runtime: {error}")))?;
    let done = runtime.block_on(listen(config));
    // A file or a name server that does not answer ends when the process does.
    runtime.shutdown_timeout(LAST_WORDS);
    done
}

async fn listen(config: &Config) -> Result<(), Error> {
    // Nothing of other crates: some show what they send.
    let ours = Targets::new().with_target("example_proxy", config.log).with_target("tower_selam", config.log);
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(false).with_target(false);
    tracing_subscriber::registry().with(lines).with(ours).init();

    let counts = metrics::install()?;
    let ending = Ending::default();
    let app = router(config, counts, ending.clone())?;
    let wrong = |error: io::Error| Error::of_flag("--listen", format!("{}: {error}", config.listen));
    let listener = TcpListener::bind(config.listen).await.map_err(wrong)?;
    let mut signals = Signals::new().map_err(|error| Error::new(format!("signals: {error}")))?;
    let mut again = Signals::new().map_err(|error| Error::new(format!("signals: {error}")))?;
    say(&format!("listening on http://{}\n", listener.local_addr().map_err(wrong)?))?;

    let impatient = async {
        again.next().await;
        again.next().await;
    };
    serve(listener, app, ending, signals.next(), impatient).await;
    Ok(())
}

/// What ends a program.
struct Signals([Signal; 2]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]))
    }

    async fn next(&mut self) {
        let [terminate, interrupt] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

fn say(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    let said = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    // Nobody listens: `proxy --help | head`.
    said.or(Ok(()))
}
