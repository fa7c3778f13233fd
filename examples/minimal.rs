//! Sends one authenticated request with hyper-util: `SELAM_API_KEY=sk-… cargo run --example minimal`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]
use http_body_util::BodyExt;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::Layer;
use tower_selam::{BoxError, Error, SelamLayer};

#[tokio::main]
async fn main() {
    let Err(error) = ask().await else { return };
    eprintln!("error: {error}");
    std::process::exit(1);
}

async fn ask() -> Result<(), BoxError> {
    let layer = SelamLayer::from_env()?; // SELAM_API_KEY, and SELAM_JWT and SELAM_BASE_URL if they are set
    let tls = hyper_rustls::HttpsConnectorBuilder::new().with_native_roots()?.https_only();
    let selam = layer.layer(Client::builder(TokioExecutor::new()).build(tls.enable_all_versions().build()));
    let question = r#"{"model":"selam-turbo","messages":[{"role":"user","content":"Selam!"}]}"#.to_owned();
    let url = layer.base_url().endpoint("chat/completions")?;
    let request = http::Request::post(url).header("content-type", "application/json").body(question)?;
    let response = selam.send(request).await.map_err(Error::into_boxed)?;
    println!("{}", String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()));
    Ok(())
}
