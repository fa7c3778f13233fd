//! Tables that are read in a terminal and, as they are, in Markdown.

/// Rows of cells, the first column to the left, the others to the right.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(columns: &[&str]) -> Self {
        Self { rows: vec![columns.iter().map(ToString::to_string).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn print(&self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|at| self.rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max())
            .map(|width| width.unwrap_or_default().max(3))
            .collect();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::from("|");
            for (at, width) in widths.iter().enumerate() {
                let cell = row.get(at).map_or("", String::as_str);
                line += &if at == 0 { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") };
            }
            println!("{line}");
            if number == 0 {
                let mut line = String::from("|");
                for (at, width) in widths.iter().enumerate() {
                    let dashes = "-".repeat(width + 1);
                    line += &if at == 0 { format!("{dashes}-|") } else { format!("{dashes}:|") };
                }
                println!("{line}");
            }
        }
    }
}

/// Whether a target is met, in a word.
pub fn verdict(met: bool) -> String {
    if met { "met" } else { "missed" }.to_owned()
}
