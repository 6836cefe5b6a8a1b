//! Many concurrent `ssh host true`, each over a connection of its own.

use std::process::Stdio;
use std::sync::Barrier;
use std::time::Instant;

use testbed::Environment;

use crate::environments::{close_all, three_ways};
use crate::measure::{milliseconds, order};
use crate::report::LineChart;
use crate::report::statistics::{median, quantile};
use crate::{Bound, Report, Unit, ratios};

const AT_ONCE: [usize; 4] = [1, 10, 50, 100];

/// Results of one way of opening an image root with one number of clients; one value per round.
#[derive(Default)]
struct Crowds {
    per_second: Vec<f64>,
    /// Median latency in milliseconds.
    p50: Vec<f64>,
    /// 99th percentile.
    p99: Vec<f64>,
    failures: usize,
}

pub fn crowd(runs: usize, report: &mut Report) {
    let environments = three_ways();
    let seen = AT_ONCE.map(|clients| {
        // A hundred clients yield a hundred samples per round, but one client only one.
        let rounds = runs.div_ceil(3) * if clients == 1 { 10 } else { 1 };
        let mut ways: [Crowds; 3] = Default::default();
        for round in 0..rounds {
            for at in order(round, ways.len()) {
                meet(&environments[at].1, clients, &mut ways[at]);
            }
        }
        ways
    });
    let failures = [0, 1, 2].map(|at| seen.iter().map(|ways| ways[at].failures as f64).sum());
    let mut lines = Vec::new();
    for (at, (way, _)) in environments.iter().enumerate() {
        let line = |value: fn(&Crowds) -> &Vec<f64>| {
            AT_ONCE.iter().zip(&seen).map(|(clients, ways)| (*clients as f64, median(value(&ways[at])))).collect()
        };
        lines.push((format!("{way}, 99 of 100"), line(|crowds| &crowds.p99)));
        lines.push((format!("{way}, half"), line(|crowds| &crowds.p50)));
    }
    for (clients, ways) in AT_ONCE.iter().zip(seen) {
        let [jailed, plain, _] = &ways;
        let slowest = ratios(&jailed.p99, &plain.p99);
        for ((way, _), crowds) in environments.iter().zip(ways) {
            let what = format!("{clients} at once, {way}");
            report.add(&format!("{what}: throughput"), Unit::SessionsPerSecond, crowds.per_second, Bound::Information);
            report.add(&format!("{what}: p50"), Unit::Milliseconds, crowds.p50, Bound::Information);
            report.add(&format!("{what}: p99"), Unit::Milliseconds, crowds.p99, Bound::Information);
        }
        let bound = if *clients == 100 { Bound::Limit(1.3) } else { Bound::Information };
        report.add(&format!("{clients} at once: p99, jailed / plain"), Unit::Times, slowest, bound);
    }
    for ((way, _), failures) in environments.iter().zip(failures) {
        report.add(&format!("failures of all clients, {way}"), Unit::Failures, vec![failures], Bound::Limit(0.0));
    }
    report.note("`MaxStartups` is 200 everywhere. The clients run on the same machine and take most of its time.");
    report.lines(LineChart {
        file: "crowd",
        title: "ssh host true, many concurrent new connections",
        x: "clients at once",
        y: "milliseconds until the answer (logarithmic)",
        of_a_colour: 2,
        lines,
    });
    close_all(environments);
}

/// Starts all clients at the same time and measures each one's latency.
fn meet(environment: &Environment, clients: usize, crowds: &mut Crowds) {
    let start = Barrier::new(clients + 1);
    let seen: Vec<_> = std::thread::scope(|scope| {
        let client = || {
            let mut ssh = environment.ssh(&[]);
            ssh.arg("true").stdout(Stdio::null());
            start.wait();
            let status = ssh.status().unwrap();
            (Instant::now(), status.success())
        };
        let started: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        let began = Instant::now();
        start.wait();
        let ended = started.into_iter().map(|client| client.join().unwrap());
        ended.map(|(end, success)| (milliseconds(end - began), success)).collect()
    });
    let latencies: Vec<_> = seen.iter().map(|(latency, _)| *latency).collect();
    crowds.per_second.push(clients as f64 / quantile(&latencies, 1.0) * 1000.0);
    crowds.p50.push(quantile(&latencies, 0.5));
    crowds.p99.push(quantile(&latencies, 0.99));
    crowds.failures += seen.iter().filter(|(_, success)| !success).count();
}
