//! Moving the controlling terminal's foreground from one process group to another.

use std::os::fd::AsFd;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::Pid;

/// Makes `group` the foreground process group of `terminal`; works from the background too.
pub(crate) fn set_foreground(terminal: impl AsFd, group: Pid) -> nix::Result<()> {
    // Block SIGTTOU, by which the kernel would stop a background process that changes the foreground group.
    let mut before = SigSet::empty();
    let ttou: SigSet = [Signal::SIGTTOU].into_iter().collect();
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&ttou), Some(&mut before))?;
    let result = nix::unistd::tcsetpgrp(terminal, group);
    before.thread_set_mask()?;
    result
}
