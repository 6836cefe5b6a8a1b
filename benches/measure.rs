//! Measuring time, and taking turns.

use std::process::Command;
use std::time::{Duration, Instant};

/// Runs `action`; returns the time in milliseconds.
pub fn time(action: impl FnOnce()) -> f64 {
    let began = Instant::now();
    action();
    milliseconds(began.elapsed())
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Times of each of `commands`, taking turns, after a warm-up round. A single round is run without one.
#[allow(clippy::needless_pass_by_value)]
pub fn in_turns<const N: usize>(rounds: usize, commands: [&mut Command; N]) -> [Vec<f64>; N] {
    let mut samples = [const { Vec::new() }; N];
    for round in usize::from(rounds == 1)..=rounds {
        for at in order(round, N) {
            let took = succeeding(&mut *commands[at]);
            if round > 0 {
                samples[at].push(took);
            }
        }
    }
    samples
}

/// Time of `command`, which must succeed.
pub fn succeeding(command: &mut Command) -> f64 {
    let mut status = None;
    let took = time(|| status = Some(command.status()));
    let status = status.unwrap().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
    took
}

/// Returns a different order for each round. Caches contain data of the command before, which must not always be the
/// same one.
pub fn order(round: usize, count: usize) -> Vec<usize> {
    let mut order: Vec<_> = (0..count).collect();
    let mut state = round as u64;
    for at in (1..count).rev() {
        // Knuth's linear congruential generator; its upper bits are more random.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(at, (state >> 33) as usize % (at + 1));
    }
    order
}

/// `a / b` for each round.
pub fn ratios(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a / b).collect()
}

/// `a - b` for each round.
pub fn differences(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}
