//! Uses hyper-util's client over HTTP/1.1 and HTTP/2: a JSON answer, a stream as it arrives, and audio.
//!
//! ```console
//! $ cargo run --example hyper
//! ```
//!
//! The example starts a simulator of the API and talks to it over TLS. With `SELAM_API_KEY` set (and optionally
//! `SELAM_BASE_URL`) it talks to SelamAPI itself. It prints:
//!
//! ```text
//! 1. HTTP/1.1
//!    status     200 OK over HTTP/1.1
//!    answer     Selam! You said: What does selam mean?
//!    stream     Selam! You said: What does selam mean?
//!    audio      844 bytes of audio/wav
//! ```
//!
//! and the same for HTTP/2.

#[path = "support/stream.rs"]
mod stream;
#[path = "support/hyper.rs"]
mod support;

use std::process::ExitCode;

use http::{Request, Response, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};
use tower::Layer;
use tower_selam::{BoxError, Selam, stack::ResponseBody};

use self::{
    stream::ChatStream,
    support::{
        Api, Https,
        transcript::{finish, line, open_line, step},
    },
};

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let api = Api::start("tower-selam with hyper-util").await?;
    let http1 = support::tls(&api)?.https_or_http().enable_http1().build();
    let http2 = support::tls(&api)?.https_or_http().enable_http2().build();
    let mut builder = Client::builder(TokioExecutor::new());

    // The client is a Tower service, so the layer fits as it is.
    step("HTTP/1.1");
    calls(&api, &api.layer().layer(builder.build(http1))).await?;
    step("HTTP/2");
    calls(&api, &api.layer().layer(builder.http2_only(true).build(http2))).await
}

async fn calls(api: &Api, selam: &Selam<Https>) -> Result<(), BoxError> {
    let question = [json!({ "role": "user", "content": "What does selam mean?" })];

    let body = json!({ "model": "selam-turbo", "messages": question });
    let response = send(api, selam, "chat/completions", &body).await?;
    line("status", format_args!("{} over {:?}", response.status(), response.version()));
    let completion: Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
    line("answer", completion["choices"][0]["message"]["content"].as_str().unwrap_or("(no content)"));

    let body = json!({ "model": "selam-turbo", "stream": true, "messages": question });
    let mut events = send(api, selam, "chat/completions", &body).await?.into_body();
    let mut chat = ChatStream::default();
    let mut text = open_line("stream");
    while let Some(frame) = events.frame().await {
        if let Ok(data) = frame?.into_data() {
            text.push(&chat.push(&data));
        }
    }
    drop(text);
    chat.finish()?;

    let body = json!({ "model": "selam-tts", "input": "Selam!", "voice": "mekdes" });
    let audio = send(api, selam, "audio/speech", &body).await?;
    let content_type = audio.headers().get(CONTENT_TYPE).ok_or("no content type")?.to_str()?.to_owned();
    let length = audio.into_body().collect().await?.to_bytes().len();
    line("audio", format_args!("{length} bytes of {content_type}"));
    Ok(())
}

async fn send(
    api: &Api,
    selam: &Selam<Https>,
    path: &str,
    body: &Value,
) -> Result<Response<ResponseBody<Incoming>>, BoxError> {
    let request = Request::post(api.url(path)?)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::from(body.to_string()))?;
    // An error is either the client's or a typed `AuthError`.
    Ok(selam.send(request).await?)
}
