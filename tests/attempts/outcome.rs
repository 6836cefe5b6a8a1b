//! Outcome of an attempt: out, with evidence, or held, with the reason.

use std::fmt::{Display, Formatter};
use std::io;

/// Evidence of an escape, or what prevented it.
pub type Outcome = Result<String, Held>;

/// The step that failed, and why.
#[derive(Debug)]
pub struct Held {
    step: String,
    why: io::Error,
}

impl Held {
    /// Held by something other than a system error.
    pub fn by(step: impl Display, why: &'static str) -> Self {
        Self { step: step.to_string(), why: io::Error::other(why) }
    }

    /// True if the kernel lacks the feature, so that there is nothing to defend.
    pub fn is_absent(&self) -> bool {
        matches!(self.why.raw_os_error(), Some(libc::ENOENT | libc::ENOSYS | libc::ENOTTY))
    }
}

impl Display for Held {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.step, self.why)
    }
}

/// Names the step at which an attempt failed.
pub trait Step<T> {
    /// `what` is, for example, "open /dev/mem".
    fn step(self, what: impl Display) -> Result<T, Held>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: impl Display) -> Result<T, Held> {
        self.map_err(|e| Held { step: what.to_string(), why: e.into() })
    }
}

/// Tries `ways` in order: returns the first success, or the last failure.
pub fn any<T>(ways: impl IntoIterator<Item = T>, attempt: impl Fn(T) -> Outcome) -> Outcome {
    let mut held = Held::by("find a way to try", "there is none");
    for way in ways {
        match attempt(way) {
            Err(e) => held = e,
            out => return out,
        }
    }
    Err(held)
}
