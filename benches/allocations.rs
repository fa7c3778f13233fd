//! Heap allocations and bytes per request, and the sizes of services and futures.
//!
//! ```console
//! $ cargo bench -p benches --bench allocations
//! ```
//!
//! Three kinds of requests: of constants alone; with header values made from text, as most programs make them; with a body
//! made of bytes besides. What was made so shares memory from its first clone on, and that clone allocates: a layer that
//! keeps a head copies its text, and one that keeps a body clones it. It fails when a layer allocates for the first two.

use std::process::ExitCode;

use allocation_counter::{AllocationInfo, measure};
use benches::{
    contenders::{BARE, Contender, contenders, position},
    table::{Table, verdict},
    traffic::{Body, request, request_of_constants, request_of_owned},
};
use http::Request;
use tokio::runtime::Builder;

const REQUESTS: u64 = 64;
const LARGER: usize = 128;

fn main() -> ExitCode {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut contenders = contenders(&runtime);
    let _entered = runtime.enter();

    println!("\nHeap allocations and bytes per request\n");
    let mut table = Table::new(&[
        "",
        "constants",
        "bytes",
        "headers from text",
        "bytes",
        "owned body too",
        "bytes",
        "target",
        "",
    ]);
    let mut allocated = false;
    for contender in &mut contenders {
        let counted = [request_of_constants, request, request_of_owned].map(|build| count(contender, build));
        let is_ours = contender.is_ours;
        let [constants, text, _] = &counted;
        allocated |= is_ours && constants.count_total + text.count_total > 0;
        let each = |number: u64| format!("{:.1}", number as f64 / REQUESTS as f64);
        let cells = counted.iter().flat_map(|counted| [each(counted.count_total), each(counted.bytes_total)]);
        let met = verdict(counted.iter().all(|counted| counted.count_total == 0));
        let target = if is_ours { ["0".to_owned(), met] } else { Default::default() };
        table.row([contender.name.to_owned()].into_iter().chain(cells).chain(target));
    }
    table.print();

    println!("\nSizes in bytes\n");
    let inner = contenders[position(&contenders, BARE)].service.future_bytes();
    let mut table = Table::new(&["", "service", "future", "more than inner", "target", ""]);
    for Contender { name, is_ours, service, .. } in &contenders {
        let larger = service.future_bytes().saturating_sub(inner);
        let target =
            if *is_ours { [format!("<= {LARGER}"), verdict(larger <= LARGER)] } else { Default::default() };
        let sizes = [service.service_bytes(), service.future_bytes(), larger].map(|bytes| bytes.to_string());
        table.row([(*name).to_owned()].into_iter().chain(sizes).chain(target));
    }
    table.print();
    if allocated { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What is allocated to answer requests that are there already, once the first few have been.
fn count(contender: &mut Contender, build: fn() -> Request<Body>) -> AllocationInfo {
    contender.service.answers((0..REQUESTS).map(|_| build()).collect());
    let requests = (0..REQUESTS).map(|_| build()).collect();
    measure(|| contender.service.answers(requests))
}
