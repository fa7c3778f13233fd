//! One line per process, drawn again while it changes.

use std::io::{IsTerminal, Write, stdout};

use crate::member::Process;

/// The lines drawn last, which are overwritten on a terminal.
#[derive(Default)]
pub(crate) struct Screen {
    lines: usize,
}

impl Screen {
    /// Leaves the lines as they are, and draws further ones below.
    pub(crate) fn begin(&mut self) {
        self.lines = 0;
    }

    /// Draws the processes. Without a terminal, only the last state of a phase is shown.
    pub(crate) fn draw(&mut self, processes: &[Process], token_requests: u64, is_last: bool) {
        let is_terminal = stdout().is_terminal();
        if !is_terminal && !is_last {
            return;
        }
        let mut out = stdout().lock();
        if self.lines > 0 {
            let _ = write!(out, "\x1b[{}A", self.lines);
        }
        let end = if is_terminal { "\x1b[K\n" } else { "\n" };
        for process in processes {
            let report = process.report();
            let state = match (process.is_alive(), report.is_leading) {
                (false, _) => "killed",
                (true, true) => "asks for a token",
                (true, false) => "",
            };
            let _ = write!(
                out,
                "   {:>7} {:>6} requests {:>3} failed   token {:<6}   asked {:>2} times   {state}{end}",
                process.id(),
                report.requests,
                report.failed,
                report.token,
                report.asked,
            );
        }
        let _ = write!(out, "   token endpoint: {token_requests} requests{end}");
        let _ = out.flush();
        self.lines = processes.len() + 1;
    }
}
