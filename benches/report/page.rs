//! The page in Markdown.

use std::fmt::Write;

use super::machine::Machine;
use super::statistics::Summary;
use super::{Row, Section, number};

const INTRODUCTION: &str = "\
# Benchmarks

`make bench` installs the peers, runs all benchmarks and writes this page. `cargo bench --bench benchmarks -- entering
making` runs only the named groups and writes nothing.

Alternatives take turns within one run, in a different order each time, and ratios and differences are computed within
each turn. The third column has the quartiles: the middle half of the samples lies between them. Each limit applies to
the median.
";

/// Rows that answer the first questions, as the summary has them.
const IN_SHORT: [&str; 10] = [
    "enter / the C program",
    "enter / systemd-nspawn",
    "an existing connection, jailed − plain",
    "100 at once: p99, jailed / plain",
    "rsync upload: time, jailed / plain",
    "`ready` to `sshd_listening` minus bare sshd's start, jailed",
    "`complete` to `exiting`, idle, jailed",
    "all that a session adds, 100 sessions: PSS",
    "package, against mksquashfs",
    "customize a squashfs, until the first ssh has ended",
];

/// Markdown of all results.
pub fn page(machine: &Machine, runs: usize, sections: &[Section]) -> String {
    let mut page = String::from(INTRODUCTION);
    let short = sections.iter().flat_map(|section| &section.rows).filter(|row| IN_SHORT.contains(&row.name.as_str()));
    let _ = write!(page, "\n## In short\n\n{}", table(short));
    let _ = write!(page, "\n## The machine\n\n{}", machine.table());
    let _ = writeln!(page, "| `IMS_SSHD_BENCH_RUNS` | {runs} |");
    for section in sections {
        // Rows without a limit are what the others are computed from.
        let (judged, further): (Vec<_>, Vec<_>) = section.rows.iter().partition(|row| !row.judgement.is_empty());
        let _ = write!(page, "\n## {}\n", section.heading);
        if judged.is_empty() {
            let _ = write!(page, "\n{}", table(further));
        } else {
            let _ = write!(page, "\n{}", table(judged));
            let further = if further.is_empty() { String::new() } else { folded(&table(further)) };
            page += &further;
        }
        for plot in &section.plots {
            let _ = write!(page, "\n![{}](benchmarks/{}.svg)\n", plot.title(), plot.file());
        }
        for note in &section.notes {
            let _ = write!(page, "\n{note}\n");
        }
    }
    page
}

fn folded(table: &str) -> String {
    format!("\n<details><summary>Further figures</summary>\n\n{table}\n</details>\n")
}

fn table<'a>(rows: impl IntoIterator<Item = &'a Row>) -> String {
    let mut table = String::from("| | median | middle half | all | samples | limit |\n|---|--:|---|---|--:|---|\n");
    for row in rows {
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

/// Quartiles of more than one sample.
pub fn spread(summary: &Summary) -> String {
    match (summary.count, summary.quartiles) {
        (1, _) => String::new(),
        (_, [lower, _, upper]) => format!("{} … {}", number(lower), number(upper)),
    }
}
