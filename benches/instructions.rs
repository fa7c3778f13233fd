//! How many instructions a request takes, counted by valgrind: whatever else the machine does, they are the same.
//!
//! ```console
//! $ benches/instructions.sh            # fails when one has grown by more than 5 %, or by 1 % beyond its target
//! $ benches/instructions.sh --update   # says so too, and records them anew in benches/instructions.txt
//! ```
//!
//! A run of this program under `valgrind --tool=callgrind` serves one contender, and callgrind collects in two functions
//! alone: `measured_round_trip`, which builds a request as a program does and has it answered, and `measured_answer`, which
//! does not build it. So neither the start of the program counts nor what the contender sets up.
//!
//! Compared is what is the same on another machine: a contender's count beside its floor's, of one run, without the
//! building of the request, which would hide a growth.

use std::{
    env, fs,
    process::{Command, ExitCode},
};

use benches::{
    contenders::{BARE, Contender, contenders},
    record::{self, Change, Count},
    table::{Table, verdict},
};
use tokio::runtime::Builder;

const REQUESTS: usize = 2_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let contenders = contenders(&Builder::new_current_thread().enable_all().build().expect("a runtime"));
    if let [serve, name, requests, ..] = arguments.as_slice()
        && serve == "--serve"
    {
        serve_one(contenders, name, requests.parse().expect("a number of requests"));
        return ExitCode::SUCCESS;
    }
    // Cargo passes `--test` to a run that is only to show that it works; unoptimized counts say nothing.
    if arguments.iter().any(|argument| argument == "--test") {
        for mut contender in contenders {
            contender.service.round_trips(1);
        }
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("valgrind is missing: instructions cannot be counted (Debian: apt-get install valgrind)");
        return ExitCode::FAILURE;
    }

    let counted: Vec<Counted> = contenders.into_iter().map(Counted::count).collect();
    show(&counted);
    if arguments.iter().any(|argument| argument == "--update") {
        // Not on standard output, which `run.sh` keeps.
        for (name, change) in changes(&counted).filter(|(_, change)| change.is_worse()) {
            eprintln!("{name}: {change}");
        }
        keep(&counted);
        println!("\nRecorded in benches/instructions.txt.");
        return ExitCode::SUCCESS;
    }
    compare(&counted)
}

fn serve_one(contenders: Vec<Contender>, name: &str, requests: usize) {
    let contender = contenders.into_iter().find(|contender| contender.name == name);
    contender.expect("a contender of that name").service.round_trips(requests);
}

/// A contender, and the instructions of a request.
struct Counted {
    contender: Contender,
    built: f64,
    answered: f64,
}

impl Counted {
    fn count(contender: Contender) -> Self {
        let built = instructions(contender.name, "measured_round_trip");
        let answered = instructions(contender.name, "measured_answer");
        Self { contender, built, answered }
    }
}

/// What callgrind collects in the functions whose name contains `function`, for each request.
fn instructions(contender: &str, function: &str) -> f64 {
    let program = env::current_exe().expect("this program's path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--callgrind-out-file=/dev/null"])
        .arg(format!("--toggle-collect=*{function}*"))
        .arg(program)
        .args(["--serve", contender, &REQUESTS.to_string()])
        // Or else the first call of each function of libc would look for it.
        .env("LD_BIND_NOW", "1")
        .output()
        .expect("valgrind runs");
    let report = String::from_utf8_lossy(&output.stderr);
    let collected = report.lines().find_map(|line| line.split_once("Collected : "));
    match collected.and_then(|(_, count)| count.trim().parse::<f64>().ok()) {
        Some(count) if output.status.success() && count > 0.0 => count / REQUESTS as f64,
        _ => panic!("callgrind counted nothing in {function}, for {contender}:\n{report}"),
    }
}

fn floor<'a>(counted: &'a [Counted], of: &Counted) -> &'a Counted {
    let floor = counted.iter().find(|other| other.contender.name == of.contender.floor);
    floor.expect("the floor was counted")
}

fn show(counted: &[Counted]) {
    println!("\nInstructions per request\n");
    let mut table =
        Table::new(&["", "answered", "net", "x floor", "target", "", "built, answered", "x floor", ""]);
    let bare = counted.iter().find(|one| one.contender.name == BARE).expect("it was counted");
    for one in counted {
        let Counted { contender, built, answered } = one;
        let floor = floor(counted, one);
        let judge = |value, floor| {
            contender.target.map_or_else(String::new, |target| verdict(target.is_met(value, floor)))
        };
        table.row([
            contender.name.to_owned(),
            format!("{answered:.0}"),
            format!("{:.0}", answered - bare.answered),
            format!("{:.3}", answered / floor.answered),
            contender.target.map(|target| target.to_string()).unwrap_or_default(),
            judge(*answered, floor.answered),
            format!("{built:.0}"),
            format!("{:.3}", built / floor.built),
            judge(*built, floor.built),
        ]);
    }
    table.print();
    println!("\n`net` is without the bare service; on the right, the building of the request counts too.");
}

fn keep(counted: &[Counted]) {
    let mut lines = record::head(&compiler());
    for one in counted {
        let ratio = one.answered / floor(counted, one).answered;
        lines += &record::line(one.contender.name, one.answered, ratio);
    }
    fs::write(record::PATH, lines).expect("benches/instructions.txt is written");
}

/// As it calls itself, without the commit.
fn compiler() -> String {
    let output = Command::new(env::var_os("RUSTC").unwrap_or("rustc".into())).arg("--version").output();
    let version = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    version.unwrap_or_default().split(" (").next().unwrap_or_default().trim().to_owned()
}

/// What has become of each of ours since it was recorded, beside its name.
fn changes(counted: &[Counted]) -> impl Iterator<Item = (&str, Change)> {
    let recorded = record::read();
    counted.iter().filter(|one| one.contender.is_ours).flat_map(move |one| {
        let Contender { name, floor: floor_name, target, .. } = one.contender;
        let count = Count {
            name,
            instructions: one.answered,
            floor: floor_name,
            floor_instructions: floor(counted, one).answered,
            target,
        };
        count.changes(&recorded).into_iter().map(move |change| (name, change))
    })
}

fn compare(counted: &[Counted]) -> ExitCode {
    let (mut failed, same_compiler) = (false, record::is_of(&compiler()));
    println!();
    for (name, change) in changes(counted) {
        println!("{name}: {change}");
        failed |= change.fails(same_compiler);
    }
    if failed {
        return ExitCode::FAILURE;
    }
    println!("None has grown by more than 5 %, nor by more than 1 % beyond its target.");
    ExitCode::SUCCESS
}
