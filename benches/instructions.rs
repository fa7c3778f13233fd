//! Counts instructions per request with valgrind and compares them with the record in `benches/instructions.txt`.
//!
//! ```console
//! $ cargo bench -p benches --bench instructions               # fails if a layer grew by more than 5 %
//! $ cargo bench -p benches --bench instructions -- --update   # rewrites the record
//! ```
//!
//! Counts do not depend on the machine's load. A process under callgrind serves one contender, and callgrind collects
//! only inside `answer_once`, so neither the set-up nor the building of the requests counts. The ratio to the floor is
//! compared, because another compiler or libc changes the counts of both.

use std::{
    env, fs,
    process::{Command, ExitCode},
};

use benches::{
    contenders::{contenders, position},
    is_given,
    requests::request,
    serve::Serve,
    table::{Table, target},
};
use tokio::runtime::Builder;

const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.txt");
const HEAD: &str = "\
# Instructions per request, and as a multiple of the floor. Only the multiples are compared.
# Written by `cargo bench -p benches --bench instructions -- --update`.
";
const REQUESTS: usize = 2_000;
const GROWTH: f64 = 1.05;

fn main() -> ExitCode {
    let runtime = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let mut contenders = contenders(&runtime);
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [option, name, ..] = &arguments[..]
        && option == "--serve"
    {
        let at = position(&contenders, name);
        serve(&mut *contenders[at].service, REQUESTS);
        return ExitCode::SUCCESS;
    }
    // Counts of unoptimized code mean nothing.
    if is_given("--test") {
        contenders.iter_mut().for_each(|contender| serve(&mut *contender.service, 1));
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("valgrind is missing; install it to count instructions (Debian: apt-get install valgrind)");
        return ExitCode::FAILURE;
    }

    let record = fs::read_to_string(RECORD).unwrap_or_default();
    let counts: Vec<f64> = contenders.iter().map(|contender| instructions(contender.name)).collect();
    let mut new_record = HEAD.to_owned();
    let mut table = Table::new(&["", "instructions", "x floor", "recorded", "target"]);
    let mut all_met = true;
    for (contender, count) in contenders.iter().zip(&counts) {
        let name = contender.name;
        let ratio = count / counts[position(&contenders, contender.floor)];
        new_record += &format!("{name:<38}{count:>8.0}{ratio:>8.3}\n");
        let recorded = recorded_ratio(&record, name);
        let is_met = recorded.is_some_and(|recorded| ratio <= recorded * GROWTH);
        all_met &= is_met || !contender.is_ours;
        table.row([
            name.to_owned(),
            format!("{count:.0}"),
            format!("{ratio:.3}"),
            recorded.map_or_else(|| "none".to_owned(), |recorded| format!("{recorded:.3}")),
            if contender.is_ours { target("<= 5 % more", is_met) } else { String::new() },
        ]);
    }
    table.print("Instructions per request");
    if is_given("--update") {
        fs::write(RECORD, new_record).expect("benches/instructions.txt is written");
    } else if !all_met {
        eprintln!("\nA layer grew by more than 5 % or has no record; accept it with `-- --update`.");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn serve(service: &mut dyn Serve, requests: usize) {
    service.answer_all((0..requests).map(|_| request()).collect());
}

/// Runs this program under callgrind for one contender and returns its instructions per request.
fn instructions(contender: &str) -> f64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*answer_once*")
        .arg(env::current_exe().expect("this program has a path"))
        .args(["--serve", contender])
        // Resolves the functions of libc at start, outside of the count.
        .env("LD_BIND_NOW", "1")
        .output()
        .expect("valgrind runs");
    let report = String::from_utf8_lossy(&output.stderr);
    let collected = report.lines().find_map(|line| line.split_once("Collected : "));
    match collected.and_then(|(_, count)| count.trim().parse::<f64>().ok()) {
        Some(count) if output.status.success() && count > 0.0 => count / REQUESTS as f64,
        _ => panic!("callgrind counted nothing for {contender}:\n{report}"),
    }
}

fn recorded_ratio(record: &str, name: &str) -> Option<f64> {
    let figures = record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("  "))?;
    figures.split_whitespace().nth(1)?.parse().ok()
}
