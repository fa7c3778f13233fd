//! Counts heap allocations and bytes per request, and shows the sizes of services and futures.
//!
//! ```console
//! $ cargo bench -p benches --bench allocations
//! ```
//!
//! Three kinds of requests: from constants only; with header values made from text, as most programs build them; and
//! with a body that owns its bytes in addition. The first clone of such a value or body allocates its reference count.
//! The run fails if a layer allocates more than its target.

use std::{hint::black_box, process::ExitCode};

use allocation_counter::{AllocationInfo, measure};
use benches::{
    contenders::{Contender, contenders},
    requests::{Body, request, request_of_constants, request_with_owned_body},
    table::{Table, target},
};
use http::Request;
use tokio::runtime::Builder;

const REQUESTS: u64 = 64;
const BUILDERS: [fn() -> Request<Body>; 3] = [request_of_constants, request, request_with_owned_body];

fn main() -> ExitCode {
    let runtime = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let mut contenders = contenders(&runtime);
    let _entered = runtime.enter();
    let cloned = BUILDERS.map(|build| {
        let requests = batch(build);
        measure(|| requests.iter().for_each(|request| drop(black_box(request.clone()))))
    });

    let mut table = Table::new(&[
        "",
        "constants",
        "bytes",
        "headers from text",
        "bytes",
        "owned body",
        "bytes",
        "target",
        "service size",
        "future size",
    ]);
    let mut row = |name: &str, counted: &[AllocationInfo; 3], rest: [String; 3]| {
        let per_request = |total: u64| format!("{:.1}", total as f64 / REQUESTS as f64);
        let cells = counted.iter().flat_map(|counted| [counted.count_total, counted.bytes_total]);
        table.row([name.to_owned()].into_iter().chain(cells.map(per_request)).chain(rest));
    };
    row("Request::clone", &cloned, Default::default());
    let mut all_met = true;
    for contender in &mut contenders {
        let counted = BUILDERS.map(|build| count(contender, build));
        let is_met = counted.iter().zip(&cloned).all(|(counted, cloned)| {
            let (count, bytes) =
                if contender.keeps_request { (cloned.count_total, cloned.bytes_total) } else { (0, 0) };
            counted.count_total <= count && counted.bytes_total <= bytes
        });
        let limit = if contender.keeps_request { "<= Request::clone" } else { "0" };
        let target = if contender.is_ours { target(limit, is_met) } else { String::new() };
        all_met &= is_met || !contender.is_ours;
        let [service, future] = [contender.service.service_bytes(), contender.service.future_bytes()];
        row(contender.name, &counted, [target, service.to_string(), future.to_string()]);
    }
    table.print("Heap allocations and bytes per request, sizes in bytes");
    if all_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Counts what answering already built requests allocates, after a warm-up.
fn count(contender: &mut Contender, build: fn() -> Request<Body>) -> AllocationInfo {
    contender.service.answer_all(batch(build));
    let requests = batch(build);
    measure(|| contender.service.answer_all(requests))
}

fn batch(build: fn() -> Request<Body>) -> Vec<Request<Body>> {
    (0..REQUESTS).map(|_| build()).collect()
}
