//! `SelamLayer` around reqwest's client, whose requests are not those of the `http` crate.

use http::Request;
use tower::Layer;
use tower_selam::{ApiKey, SelamLayer};

fn main() {
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    let selam = layer.layer(reqwest::Client::new());
    let _ = selam.send(Request::new(String::new()));
}
