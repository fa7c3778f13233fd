//! Measures the time per request of each layer and of the stack, next to the same headers written by hand.
//!
//! ```console
//! $ cargo bench -p benches --bench overhead
//! ```

use benches::{
    contenders::{BARE, contenders, position},
    full_or_smoke, is_given,
    requests::request,
    rounds::{interleave, nanos_per_request},
    table::{Table, target},
};
use tokio::runtime::Builder;

const REQUESTS: usize = 1_000;

fn main() {
    let rounds = full_or_smoke(300, 3);
    let runtime = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let mut contenders = contenders(&runtime);
    let _entered = runtime.enter();
    let samples = interleave(rounds, contenders.len(), |at| {
        let requests = (0..REQUESTS).map(|_| request()).collect();
        nanos_per_request(&mut *contenders[at].service, requests)
    });

    let mut table = Table::new(&["", "ns", "net ns", "x floor", "target"]);
    let bare = position(&contenders, BARE);
    for (at, contender) in contenders.iter().enumerate() {
        let ratio = samples.ratio(at, position(&contenders, contender.floor));
        // Times of unoptimized code mean nothing.
        let limit = contender.time_limit.filter(|_| !is_given("--test"));
        let target = limit.map(|limit| target(&format!("<= {limit:.2}"), ratio <= limit));
        table.row([
            contender.name.to_owned(),
            format!("{:.0}", samples.median(at)),
            format!("{:.0}", samples.difference(at, bare)),
            format!("{ratio:.2}"),
            target.unwrap_or_default(),
        ]);
    }
    table.print(&format!("Time per request: medians of {rounds} interleaved rounds of {REQUESTS} requests"));
    println!("\n`net ns` excludes the bare service.");
}
