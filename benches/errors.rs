//! Measures what it costs to turn the documented 401 into an `AuthError`, and what the error layer costs on a 200.
//!
//! ```console
//! $ cargo bench -p benches --bench errors
//! ```
//!
//! The floor of a 401 is what a program must do by hand to learn the reason: collect the body and parse its JSON.

use std::{
    future::{Ready, ready},
    hint::black_box,
};

use allocation_counter::measure;
use benches::{
    full_or_smoke,
    layers::{fixed_key, selam_with_key},
    requests::{Body, client, request},
    rounds::{interleave, nanos_per_request},
    serve::{Serve, serve, serve_errors},
    table::Table,
};
use http::{HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::runtime::Builder;
use tower::{Layer, service_fn};
use tower_selam::{AuthErrorLayer, BoxError};

const REQUESTS: usize = 500;
const UNAUTHORIZED: &str = r#"{"error":{"message":"Invalid API key provided.","type":"authentication_error","code":"invalid_api_key"}}"#;

/// One row: the status, its name, the row it is compared with, and the service.
struct Row {
    status: &'static str,
    name: &'static str,
    floor: usize,
    service: Box<dyn Serve>,
}

fn main() {
    let rounds = full_or_smoke(201, 2);
    let runtime = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let _entered = runtime.enter();
    let mut rows = rows();
    let requests = || (0..REQUESTS).map(|_| request()).collect::<Vec<_>>();
    let allocated: Vec<_> = rows
        .iter_mut()
        .map(|row| {
            row.service.answer_all(requests());
            let requests = requests();
            measure(|| row.service.answer_all(requests))
        })
        .collect();
    let samples = interleave(rounds, rows.len(), |at| nanos_per_request(&mut *rows[at].service, requests()));

    let mut table = Table::new(&["", "status", "ns", "x floor", "allocations", "bytes"]);
    for (at, row) in rows.iter().enumerate() {
        let per_request = |total: u64| format!("{:.1}", total as f64 / REQUESTS as f64);
        table.row([
            row.name.to_owned(),
            row.status.to_owned(),
            format!("{:.0}", samples.median(at)),
            format!("{:.2}", samples.ratio(at, row.floor)),
            per_request(allocated[at].count_total),
            per_request(allocated[at].bytes_total),
        ]);
    }
    table.print(&format!(
        "Responses without and with an error: medians of {rounds} interleaved rounds of {REQUESTS} requests"
    ));
}

fn rows() -> Vec<Row> {
    let (ok, unauthorized) = (service_fn(client), service_fn(unauthorized));
    let by_hand = service_fn(move |request| async move {
        let response = self::unauthorized(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(BoxError::from)?.to_bytes();
        let ErrorBody { error } = serde_json::from_slice(&body).expect("the body is an error");
        Err::<Response<Body>, _>(ByHand::Api(status, error))
    });
    let row = |status, name, floor, service| Row { status, name, floor, service };
    vec![
        row("200", "bare service", 0, serve(ok)),
        row("200", "AuthErrorLayer", 0, serve(AuthErrorLayer::new().layer(ok))),
        row("401", "bare service, unread", 3, serve(unauthorized)),
        row("401", "by hand: collect, serde_json", 3, serve_errors(by_hand)),
        row("401", "AuthErrorLayer", 3, serve_errors(AuthErrorLayer::new().layer(unauthorized))),
        row("401", "SelamLayer, key fixed", 3, serve_errors(selam_with_key(fixed_key()).layer(unauthorized))),
    ]
}

fn unauthorized(request: Request<Body>) -> Ready<Result<Response<Body>, BoxError>> {
    drop(black_box(request));
    let mut response = Response::new(Body::from(UNAUTHORIZED));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    ready(Ok(response))
}

#[derive(Deserialize)]
struct ErrorBody {
    error: Reason,
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "parsing it is the cost")]
struct Reason {
    message: String,
    r#type: String,
    code: String,
}

#[expect(dead_code, reason = "building it is the cost")]
enum ByHand {
    Api(StatusCode, Reason),
    Client(BoxError),
}

impl From<BoxError> for ByHand {
    fn from(error: BoxError) -> Self {
        Self::Client(error)
    }
}
