//! What each layer costs in time over a bare service, beside writing the headers by hand, tower-http, and what programs do.
//!
//! ```console
//! $ cargo bench -p benches --bench overhead
//! ```

use std::time::Instant;

use benches::{
    contenders::{BARE, contenders, position},
    or_short,
    rounds::interleave,
    table::{Table, verdict},
    traffic::request,
};
use tokio::runtime::Builder;

const REQUESTS: usize = 1_000;

fn main() {
    let rounds = or_short(300, 3);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut contenders = contenders(&runtime);
    let _entered = runtime.enter();
    let samples = interleave(rounds, contenders.len(), |at| {
        let requests: Vec<_> = (0..REQUESTS).map(|_| request()).collect();
        let started = Instant::now();
        contenders[at].service.answers(requests);
        started.elapsed().as_nanos() as f64 / REQUESTS as f64
    });

    println!("\nTime per request: medians of {rounds} interleaved rounds of {REQUESTS} requests\n");
    let mut table = Table::new(&["", "ns", "net ns", "x floor", "target", ""]);
    let bare = position(&contenders, BARE);
    for (at, contender) in contenders.iter().enumerate() {
        let floor = position(&contenders, contender.floor);
        let ratio = samples.ratio(at, floor);
        table.row([
            contender.name.to_owned(),
            format!("{:.0}", samples.median(at)),
            format!("{:.0}", samples.difference(at, bare)),
            format!("{ratio:.2}"),
            contender.target.map(|target| format!("<= {:.2}", target.times())).unwrap_or_default(),
            contender.target.map(|target| verdict(ratio <= target.times())).unwrap_or_default(),
        ]);
    }
    table.print();
    println!(
        "\nThe targets are set for instructions (see the bench `instructions`) and shown here beside the time."
    );
}
