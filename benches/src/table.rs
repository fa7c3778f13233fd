//! Prints tables in Markdown, aligned for the terminal.

/// Rows of cells: the first column is left-aligned, the others right-aligned.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    #[must_use]
    pub fn new(columns: &[&str]) -> Self {
        Self { rows: vec![columns.iter().map(ToString::to_string).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints the table under a caption.
    pub fn print(&self, caption: &str) {
        println!("\n{caption}\n");
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<usize> =
            (0..self.rows[0].len()).map(|column| width(column).unwrap_or(0).max(3)).collect();
        let rule = widths.iter().enumerate().map(|(column, width)| match column {
            0 => "-".repeat(*width),
            _ => "-".repeat(width - 1) + ":",
        });
        let rule: Vec<String> = rule.collect();
        let (head, rows) = self.rows.split_first().expect("the head is a row");
        for row in [head, &rule].into_iter().chain(rows) {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            println!("| {} |", cells.collect::<Vec<_>>().join(" | "));
        }
    }
}

/// The cell of a target: the limit, and whether it is met.
#[must_use]
pub fn target(limit: &str, is_met: bool) -> String {
    format!("{limit}: {}", if is_met { "met" } else { "missed" })
}
