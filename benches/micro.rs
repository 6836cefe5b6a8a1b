//! Criterion's own report of the parsers: `cargo bench --bench micro`.

mod parsing;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    parsing::measure(&mut criterion);
    criterion.final_summary();
}
