//! Keeps a whole stack in a struct field: with its type written out, and boxed.
//!
//! ```console
//! $ cargo run --example stack
//! ```
//!
//! The example starts a simulator of the API and talks to it over TLS. With `SELAM_API_KEY` set (and optionally
//! `SELAM_BASE_URL`) it talks to SelamAPI itself.

#[path = "support/hyper.rs"]
mod support;

use std::{process::ExitCode, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use serde_json::Value;
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    limit::ConcurrencyLimit,
    timeout::Timeout,
    util::{BoxCloneSyncService, MapErr},
};
use tower_selam::{AuthError, BoxError, Error, Selam, stack::ResponseBody};

use self::support::{
    Api, Https,
    transcript::{auth_error, finish, line, step},
};

/// The type of a stack, outermost layer first: a timeout, `Selam`, a concurrency limit, the client.
///
/// tower's `Timeout` has the error type `BoxError`; `MapErr` turns ours into it.
type Named = Timeout<MapErr<Selam<ConcurrencyLimit<Https>>, fn(Error<legacy::Error>) -> BoxError>>;

/// The same stack without its type, at the cost of one allocation per call.
type Boxed = BoxCloneSyncService<Request<Full<Bytes>>, Response<ResponseBody<Incoming>>, BoxError>;

/// Asks questions over any such stack.
#[derive(Clone)]
struct Chat<S> {
    stack: S,
    url: String,
}

impl Chat<Named> {
    fn named(api: &Api, client: Https) -> Result<Self, BoxError> {
        let selam = api.layer().layer(ConcurrencyLimit::new(client, 64));
        let selam = MapErr::new(selam, Error::into_boxed as fn(_) -> _);
        Ok(Self { stack: Timeout::new(selam, Duration::from_secs(30)), url: api.url("chat/completions")? })
    }
}

impl Chat<Boxed> {
    fn boxed(api: &Api, client: Https) -> Result<Self, BoxError> {
        let stack = ServiceBuilder::new()
            .timeout(Duration::from_secs(30))
            .map_err(Error::into_boxed)
            .layer(api.layer())
            .concurrency_limit(64)
            .service(client);
        Ok(Self { stack: BoxCloneSyncService::new(stack), url: api.url("chat/completions")? })
    }
}

impl<S> Chat<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<ResponseBody<Incoming>>, Error = BoxError>,
{
    async fn ask(&mut self, question: &str) -> Result<String, BoxError> {
        let body = serde_json::json!({
            "model": "selam-turbo",
            "messages": [{ "role": "user", "content": question }],
        });
        let request = Request::post(&self.url)
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))?;
        let response = self.stack.ready().await?.call(request).await?;
        let answer: Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
        let content = answer["choices"][0]["message"]["content"].as_str();
        Ok(content.map_or_else(|| answer.to_string(), str::to_owned))
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let api = Api::start("tower-selam in a stack of tower's layers").await?;
    let client = support::client(&api)?;

    step("Named stack: its type is written out, and nothing is boxed");
    let mut named = Chat::named(&api, client.clone())?;
    line("size", format_args!("{} bytes", size_of_val(&named.stack)));
    line("answer", named.ask("What does selam mean?").await?);

    step("Boxed stack: a short type, one allocation per call");
    let mut boxed = Chat::boxed(&api, client)?;
    line("size", format_args!("{} bytes", size_of_val(&boxed.stack)));
    line("answer", boxed.ask("What does selam mean?").await?);

    step("Request to another origin: the typed error is found inside the `BoxError`");
    boxed.url = "https://example.com/v1/chat/completions".to_owned();
    line("request", format_args!("POST {}", boxed.url));
    match boxed.ask("What does selam mean?").await {
        Err(error) => auth_error(AuthError::find(&*error).ok_or("the error is not an `AuthError`")?),
        Ok(answer) => {
            return Err(format!("the key was sent to another origin, which answered: {answer}").into());
        }
    }
    Ok(())
}
