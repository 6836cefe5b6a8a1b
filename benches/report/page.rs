//! The page in Markdown.

use std::fmt::Write;

use super::machine::Machine;
use super::statistics::Summary;
use super::{Section, number};

const INTRODUCTION: &str = "\
# Benchmarks

Measured by `make bench`, which installs the peers, runs them all and writes this page. `cargo bench --bench figures -- entering making`
runs only the groups named and writes nothing.

What is compared takes turns within one run, in another order each time, and a ratio or a difference is taken within each turn. The middle is
the median; half of all samples lie between the two numbers of the third column. A limit is what the median is held to.
";

/// Markdown of all results.
pub fn page(machine: &Machine, runs: usize, sections: &[Section]) -> String {
    let mut page = String::from(INTRODUCTION);
    let _ = write!(page, "\n## The machine\n\n{}", machine.table());
    let _ = writeln!(page, "| `IMS_SSHD_BENCH_RUNS` | {runs} |");
    for section in sections {
        let _ = write!(page, "\n## {}\n\n{}", section.heading, table(section));
        for plot in &section.plots {
            let _ = write!(page, "\n![{}](benchmarks/{}.svg)\n", plot.title(), plot.file());
        }
        for note in &section.notes {
            let _ = write!(page, "\n{note}\n");
        }
    }
    page
}

fn table(section: &Section) -> String {
    let mut table =
        String::from("| | median | half of them within | all within | samples | limit |\n|---|--:|---|---|--:|---|\n");
    for row in &section.rows {
        let Summary { count, least, most, .. } = row.summary;
        let all = if count > 1 { format!("{} … {}", number(least), number(most)) } else { String::new() };
        let median = format!("{} {}", number(row.summary.median()), row.unit.label());
        let _ = writeln!(
            table,
            "| {} | {median} | {} | {all} | {count} | {} |",
            row.name,
            spread(&row.summary),
            row.judgement
        );
    }
    table
}

/// The quartiles, if there are any.
pub fn spread(summary: &Summary) -> String {
    match (summary.count, summary.quartiles) {
        (1, _) => String::new(),
        (_, [lower, _, upper]) => format!("{} … {}", number(lower), number(upper)),
    }
}
