//! The backend proxy that SelamAPI's documentation recommends.
//!
//! ```console
//! $ SELAM_API_KEY=sk-selam-… cargo run --release --example proxy -- --listen 127.0.0.1:8080
//! listening on http://127.0.0.1:8080
//! ```
//!
//! `README.md` describes its use, `src/lib.rs` how it works.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use example_proxy::{
    config::{Command, Config, Error, HELP},
    metrics,
    proxy::router,
    server::{Shutdown, serve},
};
use tikv_jemallocator::Jemalloc;
use tokio::{
    net::TcpListener,
    runtime::Builder,
    signal::unix::{Signal, SignalKind, signal},
    time::timeout,
};
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// Takes less memory for the buffers of many connections than the C library's allocator.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// The exit code for an invalid configuration.
const INVALID_CONFIGURATION: u8 = 2;

/// How many names are looked up, and key files read, at once. A burst of new connections would start hundreds of threads.
const BLOCKING_THREADS: usize = 16;

/// How long the shutdown may be delayed by leaving the fleet.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long tasks may take to log that they were cut off.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1);
    let result = match Command::parse(arguments, |name| std::env::var_os(name)) {
        Ok(Command::Help) => {
            print(HELP);
            Ok(())
        }
        Ok(Command::Serve(config)) => run(&config),
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "proxy: {error}");
            ExitCode::from(INVALID_CONFIGURATION)
        }
    }
}

fn run(config: &Config) -> Result<(), Error> {
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(|error| Error::new(format!("runtime: {error}")))?;
    let result = runtime.block_on(listen(config));
    // Do not wait for a blocked read of a file or name lookup.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    result
}

async fn listen(config: &Config) -> Result<(), Error> {
    // Only our own crates: others log headers, and so secrets.
    let targets =
        Targets::new().with_target("example_proxy", config.log).with_target("tower_selam", config.log);
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(false).with_target(false);
    tracing_subscriber::registry().with(lines).with(targets).init();

    let metrics = metrics::install()?;
    let shutdown = Shutdown::default();
    let fleet = config.join_fleet()?;
    let app = router(config, fleet.as_ref(), metrics, shutdown.clone())?;
    config.warn();
    let failed = |error: io::Error| Error::for_flag("--listen", format!("{}: {error}", config.listen));
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let mut signals = Signals::new().map_err(|error| Error::new(format!("signals: {error}")))?;
    let mut repeated = Signals::new().map_err(|error| Error::new(format!("signals: {error}")))?;
    print(&format!("listening on http://{}\n", listener.local_addr().map_err(failed)?));

    // While its requests end, this replica leads nothing that others would wait for.
    let stop = async {
        signals.next().await;
        if let Some(fleet) = &fleet {
            let _ = timeout(LEAVE_TIMEOUT, fleet.leave()).await;
        }
    };
    // The first signal begins the shutdown, the second one ends the wait for requests in flight.
    let abort = async {
        repeated.next().await;
        repeated.next().await;
    };
    serve(listener, app, config.limits, shutdown, stop, abort).await;
    Ok(())
}

/// SIGTERM and SIGINT.
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

/// Prints the text, unless standard output is closed (`proxy --help | head`).
fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}
