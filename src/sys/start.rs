//! Start of `ims-jail-shell` in place of Rust's runtime. The runtime opens /proc/self/maps, which in a jail may be a
//! file of the image (a FIFO would block every login), and sets up a signal stack, a cost that each session would pay
//! twice.

use std::os::fd::{AsFd, IntoRawFd};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};

use crate::sys::signals::ignore;

/// Does the necessary part of the runtime's startup: opens closed standard streams on /dev/null, so that no later file
/// takes their numbers, and ignores SIGPIPE, so that writing to a closed pipe is an error.
pub fn prepare_process() {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let mut streams =
        [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].map(|s| PollFd::from_borrowed_fd(s, PollFlags::empty()));
    let polled = rustix::event::poll(&mut streams, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    let closed = streams.iter().filter(|stream| stream.revents().contains(PollFlags::NVAL)).count();
    for _ in 0..closed {
        // open(2) returns the lowest free number. The descriptor stays open until the process exits.
        match rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
            Ok(null) => drop(null.into_raw_fd()),
            Err(_) => std::process::abort(),
        }
    }
    if polled.is_err() || ignore(Signal::SIGPIPE).is_err() {
        std::process::abort();
    }
}

/// Makes `$main`, a function that returns an exit code, the program's entry point. The crate must be `no_main`.
#[macro_export]
macro_rules! start_at {
    ($main:path) => {
        /// Called by the C library. `std` gets the arguments by itself.
        // SAFETY: no other function of the program is named `main`, and the C library calls it with these arguments.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        extern "C" fn main(_: std::ffi::c_int, _: *const *const std::ffi::c_char) -> std::ffi::c_int {
            $crate::sys::start::prepare_process();
            let code: u8 = $main();
            // Flushes standard output.
            std::process::exit(code.into())
        }
    };
}
