//! Criterion's samples of the parsers, as part of the report.

use std::path::Path;
use std::time::Duration;

use criterion::Criterion;
use serde_json::Value;

use crate::parsing::{CASES, measure};
use crate::{Bound, Report, Unit};

pub fn reading(_: usize, report: &mut Report) {
    let directory = tempfile::tempdir().unwrap();
    let criterion = Criterion::default().output_directory(directory.path()).without_plots();
    measure(&mut criterion.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)));
    for (name, what) in CASES {
        report.add(what, Unit::Microseconds, samples(&directory.path().join(name)), Bound::Information);
    }
    report.note("`cargo bench --bench micro` shows the same with criterion's own statistics.");
}

/// Microseconds per iteration of each sample; criterion stores nanoseconds.
fn samples(case: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(case.join("new/sample.json")).unwrap();
    let sample: Value = serde_json::from_str(&text).unwrap();
    let numbers = |name: &str| sample[name].as_array().unwrap().iter().map(|number| number.as_f64().unwrap());
    numbers("times").zip(numbers("iters")).map(|(time, iterations)| time / iterations / 1000.0).collect()
}
