//! `RetryPolicy` within reqwest's client, without the way to clone reqwest's body.

use tower::ServiceBuilder;
use tower_selam::{ApiKey, SelamLayer, adapter::reqwest::{Client, HttpService, TryCloneBody}, retry::RetryPolicy};

fn main() {
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    let layers = ServiceBuilder::new().retry(RetryPolicy::new()).layer(layer.with_replay(TryCloneBody));
    let client = Client::with_layers(&layers, HttpService::new(reqwest::Client::builder()).unwrap());
    let _ = client.post("https://api.selamgpt.com/v1/chat/completions").send();
}
