//! Metrics for Prometheus, in its text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets of request durations, in seconds.
const REQUEST_SECONDS: [f64; 8] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0];

/// Upper bounds of the buckets of job durations, in seconds.
const JOB_SECONDS: [f64; 6] = [60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0];

/// Counters of this process.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, String, u16), u64>>,
    durations: Mutex<BTreeMap<&'static str, Histogram>>,
    jobs: Mutex<BTreeMap<String, Histogram>>,
    store_failures: AtomicU64,
}

#[derive(Debug, Default, Clone)]
struct Histogram {
    buckets: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Histogram {
    fn add(&mut self, value: Duration, bounds: &[f64]) {
        let value = value.as_secs_f64();
        self.buckets.resize(bounds.len(), 0);
        for (bucket, bound) in self.buckets.iter_mut().zip(bounds) {
            *bucket += u64::from(value <= *bound);
        }
        self.sum += value;
        self.count += 1;
    }

    fn write(&self, text: &mut String, name: &str, label: &str, bounds: &[f64]) {
        for (count, bound) in self.buckets.iter().zip(bounds) {
            let _ = writeln!(text, "{name}_bucket{{{label},le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(text, "{name}_bucket{{{label},le=\"+Inf\"}} {}", self.count);
        let _ = writeln!(text, "{name}_sum{{{label}}} {}\n{name}_count{{{label}}} {}", self.sum, self.count);
    }
}

impl Metrics {
    /// Counts a request that was answered.
    pub fn answered(&self, target: &'static str, method: &str, status: u16, took: Duration) {
        let mut requests = self.requests.lock().expect("no panic");
        *requests.entry((target, method.to_owned(), status)).or_default() += 1;
        self.durations.lock().expect("no panic").entry(target).or_default().add(took, &REQUEST_SECONDS);
    }

    /// Counts a job that has ended.
    pub fn job_ended(&self, status: &str, took: Duration) {
        self.jobs.lock().expect("no panic").entry(status.to_owned()).or_default().add(took, &JOB_SECONDS);
    }

    /// Counts a request to the store that has failed.
    pub fn store_failed(&self) {
        self.store_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns all metrics as text. `jobs` is the number of jobs of each status.
    pub fn text(&self, jobs: &BTreeMap<String, u64>) -> String {
        let mut text = String::new();
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        head(&mut text, "ims_requests_total", "counter", "Requests that were answered.");
        for ((target, method, status), count) in &*self.requests.lock().expect("no panic") {
            let labels = format!("target=\"{target}\",method=\"{method}\",status=\"{status}\"");
            let _ = writeln!(text, "ims_requests_total{{{labels}}} {count}");
        }
        head(&mut text, "ims_request_seconds", "histogram", "Time from a request to its answer.");
        for (target, histogram) in &*self.durations.lock().expect("no panic") {
            histogram.write(&mut text, "ims_request_seconds", &format!("target=\"{target}\""), &REQUEST_SECONDS);
        }
        head(&mut text, "ims_jobs", "gauge", "Jobs by their status.");
        for (status, count) in jobs {
            let _ = writeln!(text, "ims_jobs{{status=\"{status}\"}} {count}");
        }
        head(&mut text, "ims_job_seconds", "histogram", "Time from a job's creation to its end.");
        for (status, histogram) in &*self.jobs.lock().expect("no panic") {
            histogram.write(&mut text, "ims_job_seconds", &format!("status=\"{status}\""), &JOB_SECONDS);
        }
        head(&mut text, "ims_store_errors_total", "counter", "Requests to the store that failed.");
        let _ = writeln!(text, "ims_store_errors_total {}", self.store_failures.load(Ordering::Relaxed));
        text
    }
}
