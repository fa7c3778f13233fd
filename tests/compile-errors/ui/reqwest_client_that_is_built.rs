//! `adapter::reqwest::Client` with a client instead of its builder.

use tower_selam::{ApiKey, SelamLayer, adapter::reqwest::Client};

fn main() {
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    let _ = Client::new(layer, reqwest::Client::new());
}
