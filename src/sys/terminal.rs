//! The controlling terminal, as far as one process hands it to another.

use std::os::fd::AsFd;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::Pid;

/// Makes `group` the foreground process group of `terminal`, from the background too.
pub fn set_foreground(terminal: impl AsFd, group: Pid) -> nix::Result<()> {
    // A process of a background group that does this is stopped by SIGTTOU, unless it holds that signal back.
    let mut before = SigSet::empty();
    let ttou: SigSet = [Signal::SIGTTOU].into_iter().collect();
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&ttou), Some(&mut before))?;
    let result = nix::unistd::tcsetpgrp(terminal, group);
    before.thread_set_mask()?;
    result
}
