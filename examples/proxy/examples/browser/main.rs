//! A chat page in the browser that calls the simulator through the proxy.
//!
//! ```console
//! $ cargo run --example browser
//! open       http://127.0.0.1:40123/
//! or, to see a page that the proxy does not list,
//!            http://localhost:40123/
//! ```
//!
//! Page, proxy and simulator each have a port of this machine. The page needs no build step and loads nothing from elsewhere.

use std::{ffi::OsString, fs, future::pending, io, path::PathBuf, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE},
    routing::get,
};
use example_proxy::{
    config::{Command, Limits},
    metrics,
    proxy::router,
    server::{Shutdown, serve},
};
use tokio::{net::TcpListener, signal};
use tokio_stream::StreamExt;
use tower::ServiceExt;
use tower_selam::{BoxError, simulator::Simulator};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// The pause between two words of an answer.
const PACE: Duration = Duration::from_millis(60);

/// What the page authenticates with. An app would give one to a user who has logged in.
const TOKEN: &str = "a-token-that-the-operator-issued";

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let lines = fmt::layer().with_writer(io::stderr).with_target(false);
    let targets = Targets::new().with_target("example_proxy", LevelFilter::INFO);
    tracing_subscriber::registry().with(lines).with(targets).init();

    let (page, proxy, api) = (bind().await?, bind().await?, bind().await?);
    let (origin, proxy_url, base_url) = (url(&page)?, url(&proxy)?, format!("{}/v1", url(&api)?));
    let simulator = Simulator::new();
    let secrets = Secrets::write(&simulator.issue_key())?;
    let flags = [
        "--allow-insecure-loopback".into(),
        format!("--base-url={base_url}"),
        format!("--api-key-file={}", secrets.path("key").display()),
        format!("--client-token-file={}", secrets.path("tokens").display()),
        format!("--allow-origin={origin}"),
    ];
    let Command::Serve(config) = Command::parse(flags.map(OsString::from), |_| None)? else { return Ok(()) };
    let shutdown = Shutdown::default();
    let router = router(&config, None, metrics::install()?, shutdown.clone())?;

    println!("open       {origin}/");
    println!("or, to see a page that the proxy does not list,");
    println!("           http://localhost:{}/", page.local_addr()?.port());
    let others = |listener, app| {
        serve(listener, app, Limits::default(), Shutdown::default(), pending(), pending::<()>())
    };
    tokio::select! {
        () = others(page, pages(&origin, &proxy_url)) => {}
        () = others(api, paced(simulator)) => {}
        () = serve(proxy, router, config.limits, shutdown, pending(), pending()) => {}
        stopped = signal::ctrl_c() => stopped?,
    }
    Ok(())
}

async fn bind() -> io::Result<TcpListener> {
    TcpListener::bind("127.0.0.1:0").await
}

fn url(listener: &TcpListener) -> io::Result<String> {
    Ok(format!("http://{}", listener.local_addr()?))
}

/// Serves the files of the page, and what it has to know.
fn pages(origin: &str, proxy: &str) -> Router {
    let policy = format!("default-src 'self'; connect-src 'self' {proxy}");
    let file = |content_type: &str, content: &str| {
        let headers = [(CONTENT_TYPE, content_type.to_owned()), (CONTENT_SECURITY_POLICY, policy.clone())];
        let content = content.to_owned();
        get(async move || (headers, content))
    };
    let config = format!(r#"{{"origin":"{origin}","proxy":"{proxy}","token":"{TOKEN}"}}"#);
    Router::new()
        .route("/", file("text/html", include_str!("index.html")))
        .route("/style.css", file("text/css", include_str!("style.css")))
        .route("/chat.js", file("text/javascript", include_str!("chat.js")))
        .route("/icon.svg", file("image/svg+xml", include_str!("icon.svg")))
        .route("/config.json", file("application/json", &config))
}

/// Serves the simulator, at the pace of a model.
fn paced(simulator: Simulator) -> Router {
    Router::new().fallback(async move |request: Request| {
        let Ok(answer) = simulator.oneshot(request).await;
        answer.map(|body| Body::from_stream(Body::new(body).into_data_stream().throttle(PACE)))
    })
}

/// A folder for the key and the token, which the proxy reads from files. Removed when dropped.
struct Secrets(PathBuf);

impl Secrets {
    fn write(key: &str) -> io::Result<Self> {
        let this = Self(std::env::temp_dir().join(format!("selam-browser-{}", std::process::id())));
        fs::create_dir_all(&this.0)?;
        fs::write(this.path("key"), key)?;
        fs::write(this.path("tokens"), format!("page:{TOKEN}\n"))?;
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
