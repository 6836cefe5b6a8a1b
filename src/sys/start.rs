//! The start of `ims-jail-shell`, without the runtime's of Rust: that opens /proc/self/maps, which in the jail may be anything of the image
//! (a fifo would hold every login up), and makes a stack for signals. A session starts the program twice.

use std::os::fd::{AsFd, IntoRawFd};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};

use crate::sys::signals::ignore;

/// Does what of the runtime's start is needed: streams that are closed are opened on /dev/null, lest the next file that is opened becomes
/// one; and to write where nobody reads is an error and not the end.
pub fn prepare_process() {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let mut streams =
        [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].map(|s| PollFd::from_borrowed_fd(s, PollFlags::empty()));
    let polled = rustix::event::poll(&mut streams, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    let closed = streams.iter().filter(|stream| stream.revents().contains(PollFlags::NVAL)).count();
    for _ in 0..closed {
        // It gets the lowest number that is free. Kept open as long as the process lives.
        match rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
            Ok(null) => drop(null.into_raw_fd()),
            Err(_) => std::process::abort(),
        }
    }
    if polled.is_err() || ignore(Signal::SIGPIPE).is_err() {
        std::process::abort();
    }
}

/// Makes `$main`, a function that returns an exit code, the program's start. The crate has to be `no_main`.
#[macro_export]
macro_rules! start_at {
    ($main:path) => {
        /// Called by the C library. `std` has the arguments without it.
        // SAFETY: no other function of the program has this name, which is the one that the C library calls, with these arguments.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        extern "C" fn main(_: std::ffi::c_int, _: *const *const std::ffi::c_char) -> std::ffi::c_int {
            $crate::sys::start::prepare_process();
            let code: u8 = $main();
            // Which writes what is left in standard output's buffer.
            std::process::exit(code.into())
        }
    };
}
