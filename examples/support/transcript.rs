//! What the examples print: a title, numbered steps, and one aligned line per fact.

// Each example uses a part of this file.
#![allow(dead_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the transcript is the point of an example")]

use std::{
    fmt::Display,
    io::Write as _,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use tower_selam::{AuthError, BoxError};

static STEPS: AtomicUsize = AtomicUsize::new(0);

/// Prints the first line of a transcript.
pub(crate) fn title(text: &str) {
    println!("{text}\n");
}

/// Begins a numbered step: what is shown, and what to look for.
pub(crate) fn step(text: &str) {
    println!("\n{}. {text}", STEPS.fetch_add(1, Relaxed) + 1);
}

/// Prints one fact of a step.
pub(crate) fn line(label: &str, value: impl Display) {
    println!("   {label:<10} {value}");
}

/// Prints a label; the value follows piece by piece.
pub(crate) fn open_line(label: &str) -> OpenLine {
    print!("   {label:<10} ");
    OpenLine
}

/// A line that is still being written. Dropping it ends the line.
pub(crate) struct OpenLine;

impl OpenLine {
    /// Prints `text` at once, so that a stream is seen as it arrives.
    pub(crate) fn push(&mut self, text: &str) {
        print!("{text}");
        let _ = std::io::stdout().flush();
    }
}

impl Drop for OpenLine {
    fn drop(&mut self) {
        println!();
    }
}

/// Prints a typed error: its kind, the API's answer or the reason nothing was sent, and the remedy.
pub(crate) fn auth_error(error: &AuthError) {
    line("error", format_args!("AuthErrorKind::{:?}", error.kind()));
    match (error.status(), error.message()) {
        (Some(status), Some(message)) => {
            let code = error.code().map(|code| format!(" {code}")).unwrap_or_default();
            line("answer", format_args!("{}{code}: {message}", status.as_u16()));
        }
        _ => {
            // The error's text ends with the remedy, which has a line to itself here.
            let text = error.to_string();
            let remedy = error.remedy().map(|remedy| format!("; {remedy}"));
            line("reason", remedy.and_then(|remedy| text.strip_suffix(&remedy)).unwrap_or(&text));
        }
    }
    if let Some(remedy) = error.remedy() {
        line("remedy", remedy);
    }
}

/// Prints how an example ended: as it should, or with an error and each of its causes.
pub(crate) fn finish(result: Result<(), BoxError>) -> ExitCode {
    match result {
        Ok(()) => {
            println!("\nEvery step went as expected.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nerror: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  caused by: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}
