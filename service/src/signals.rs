//! Signals that ask a program to end.

use ims_sshd::error::{Attempt, Result};
use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind};

/// Signals that ask a command to end.
pub const INTERRUPTS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

/// Signals that this process receives as events, instead of being ended by them.
pub struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// Receives signals of these kinds from now on.
    pub fn receive(kinds: &[Signal]) -> Result<Self> {
        let receive = |kind: &Signal| Ok((*kind, unix::signal(SignalKind::from_raw(*kind as i32))?));
        kinds.iter().map(receive).collect::<std::io::Result<_>>().map(Self).attempt(|| "receive signals")
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) -> Signal {
        let received = self.0.iter_mut().map(|(kind, signals)| {
            Box::pin(async {
                signals.recv().await;
                *kind
            })
        });
        futures_util::future::select_all(received).await.0
    }
}
