//! How an attempt went: out, with evidence, or held, and by what.

use std::fmt::{Display, Formatter};
use std::io;

/// Evidence of having got out, or what held.
pub type Outcome = Result<String, Held>;

/// What stood in the way.
#[derive(Debug)]
pub struct Held {
    step: String,
    why: io::Error,
}

impl Held {
    /// Held by something that is no error of the system's.
    pub fn by(step: impl Display, why: &'static str) -> Self {
        Self { step: step.to_string(), why: io::Error::other(why) }
    }

    /// Whether the kernel lacks what was tried, which is then no way out of anything.
    pub fn is_absent(&self) -> bool {
        matches!(self.why.raw_os_error(), Some(libc::ENOENT | libc::ENOSYS | libc::ENOTTY))
    }
}

impl Display for Held {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.step, self.why)
    }
}

/// Says which step of an attempt a failure held.
pub trait Step<T> {
    /// `what` as in "open /dev/mem".
    fn step(self, what: impl Display) -> Result<T, Held>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: impl Display) -> Result<T, Held> {
        self.map_err(|e| Held { step: what.to_string(), why: e.into() })
    }
}

/// Tries one after the other: the first that gets out, else what held the last one.
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
