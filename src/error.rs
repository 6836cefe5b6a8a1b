//! One error type, for the reader of a pod's log: what was attempted, on what, what the system said, what to do.

use std::any::Any;
use std::{fmt, io};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::printable::Printable;

/// A step that failed.
#[derive(Debug)]
pub struct Error {
    /// Completes "cannot …"; names the object.
    attempted: String,
    /// Reason of the failure: a message of the system or of another program, or a sentence written here.
    cause: Option<String>,
    /// Advice to the reader.
    advice: Option<String>,
    kind: Kind,
}

/// Kind of an error, which decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A step of this program failed.
    Broken,
    /// The same, for a reason that says nothing about this program's rights: a resource ran out, or another program was
    /// killed or too slow.
    Transient,
    /// An option, a variable or a file from outside is wrong.
    BadInput,
    /// A signal arrived.
    Interrupted(Signal),
}

/// Result of a fallible step.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Reports a failed step; `attempted` completes the sentence "cannot …".
    pub fn new(attempted: impl Into<String>) -> Self {
        Self { attempted: attempted.into(), cause: None, advice: None, kind: Kind::Broken }
    }

    /// Refuses an input; `complaint` is a complete clause that names the value and what was expected.
    pub fn bad_input(complaint: impl Into<String>) -> Self {
        Self { attempted: complaint.into(), cause: None, advice: None, kind: Kind::BadInput }
    }

    /// Reports the error of another process of this program, by its sentence.
    pub(crate) fn told(sentence: &str, is_transient: bool) -> Self {
        let error = Self::new(sentence.strip_prefix("cannot ").unwrap_or(sentence));
        if is_transient { error.transient() } else { error }
    }

    /// Reports that `signal` interrupted the work.
    pub fn interrupted(signal: Signal) -> Self {
        let attempted = format!("interrupted by {signal}");
        Self { attempted, cause: None, advice: None, kind: Kind::Interrupted(signal) }
    }

    /// Adds the message of the system.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.cause = Some(with_file_limit(cause.to_string()));
        self
    }

    /// Adds the error of the system, or of a step below, which also decides whether this error is transient.
    #[must_use]
    pub(crate) fn caused_by<E: fmt::Display + 'static>(self, cause: E) -> Self {
        let error = if is_transient(&cause) { self.transient() } else { self };
        error.because(cause)
    }

    /// Makes the error a transient one: a resource ran out, or another program was killed or too slow.
    #[must_use]
    pub(crate) fn transient(self) -> Self {
        Self { kind: Kind::Transient, ..self }
    }

    /// Returns whether a resource ran out, or another program was killed or too slow, so that the failure does not mean
    /// a missing right.
    pub fn is_transient(&self) -> bool {
        self.kind == Kind::Transient
    }

    /// Adds advice to the reader.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds further advice.
    #[must_use]
    pub(crate) fn advise_also(self, advice: &str) -> Self {
        let advice = self.advice.iter().map(String::as_str).chain([advice]).collect::<Vec<_>>().join("; ");
        self.advise(advice)
    }

    /// Returns whether a signal interrupted the work.
    pub(crate) fn is_interruption(&self) -> bool {
        matches!(self.kind, Kind::Interrupted(_))
    }

    /// Adds advice to the reader if a signal interrupted the work.
    #[must_use]
    pub(crate) fn advise_if_interrupted(self, advice: impl FnOnce() -> String) -> Self {
        if self.is_interruption() { self.advise(advice()) } else { self }
    }

    /// The cause and the advice, for another error that says itself what failed.
    pub(crate) fn reason(&self) -> String {
        let parts = [self.cause.as_ref().or(Some(&self.attempted)), self.advice.as_ref()];
        parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join("; ")
    }

    /// Exit code of the program: 2 for refused input, 128 + n for signal n, otherwise 1.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Broken | Kind::Transient => 1,
            Kind::BadInput => 2,
            Kind::Interrupted(signal) => 128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0)),
        }
    }
}

/// Errors of a resource that has run out.
const SHORTAGES: [Errno; 6] = [Errno::EMFILE, Errno::ENFILE, Errno::EFBIG, Errno::ENOMEM, Errno::EAGAIN, Errno::EIO];

/// Returns whether an error of the system means that a resource has run out, or an [`Error`] is transient.
fn is_transient(cause: &dyn Any) -> bool {
    if let Some(error) = cause.downcast_ref::<Error>() {
        return error.is_transient();
    }
    let errno = cause
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error)
        .or_else(|| cause.downcast_ref::<rustix::io::Errno>().map(|errno| errno.raw_os_error()))
        .map(Errno::from_raw);
    errno.or_else(|| cause.downcast_ref().copied()).is_some_and(|errno| SHORTAGES.contains(&errno))
}

/// The kernel's words for EFBIG.
const TOO_LARGE: &str = "File too large";

/// Adds the limit of file sizes, if there is one, to the system's words about a file that exceeds it.
fn with_file_limit(cause: String) -> String {
    let limit = || rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    match limit().filter(|_| cause.contains(TOO_LARGE) && !cause.contains("ulimit -f")) {
        Some(bytes) => format!("{cause}: {}", over_file_limit(bytes)),
        None => cause,
    }
}

/// Says that a file exceeds the limit of file sizes (RLIMIT_FSIZE), in bytes, and what to do about it.
pub(crate) fn over_file_limit(bytes: u64) -> String {
    format!(
        "a file would be larger than {bytes} bytes, the limit that this program was started with; raise it (ulimit -f, \
         LimitFSIZE= of a service)"
    )
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if matches!(self.kind, Kind::Broken | Kind::Transient) {
            f.write_str("cannot ")?;
        }
        // The text may contain a file name or a program's output: escape it to stay on one line.
        write!(f, "{}", Printable(&self.attempted))?;
        if let Some(cause) = &self.cause {
            write!(f, ": {}", Printable(cause))?;
        }
        if let Some(advice) = &self.advice {
            write!(f, "; {}", Printable(advice))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Turns a bare system error into an [`Error`] where the object is known.
pub trait Attempt<T> {
    /// Names the failed step; `attempted` completes the sentence "cannot …".
    fn attempt<S: Into<String>>(self, attempted: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: fmt::Display + 'static> Attempt<T> for std::result::Result<T, E> {
    fn attempt<S: Into<String>>(self, attempted: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error::new(attempted()).caused_by(cause))
    }
}

/// Adds advice to an error that already says what failed.
pub(crate) trait Advise<T> {
    /// Adds advice to the reader.
    fn advise(self, advice: &str) -> Result<T>;
}

impl<T> Advise<T> for Result<T> {
    fn advise(self, advice: &str) -> Result<T> {
        self.map_err(|e| e.advise(advice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_on_what_why_and_what_to_do_in_one_line() {
        let error = Err::<(), _>(rustix::io::Errno::PERM)
            .attempt(|| "mount proc on /proc")
            .advise("run the container privileged")
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot mount proc on /proc: Operation not permitted (os error 1); run the container privileged"
        );
        assert_eq!(error.exit_code(), 1);
        let error = Error::new("open 'a\nb'").because("said\r\x1b[2K").advise("remove 'a\nb'");
        assert_eq!(error.to_string(), r"cannot open 'a\nb': said\r\u{1b}[2K; remove 'a\nb'");
        assert_eq!(Error::bad_input("SSH_JAIL is 'yes'").exit_code(), 2);
        let interrupted = Error::interrupted(Signal::SIGINT).advise("run it again");
        assert_eq!(
            (interrupted.to_string(), interrupted.exit_code()),
            ("interrupted by SIGINT; run it again".into(), 130)
        );
    }

    #[test]
    fn a_resource_that_ran_out_makes_an_error_transient_at_every_level() {
        fn of<E: fmt::Display + 'static>(cause: E) -> Error {
            let below: Result<()> = Err(cause).attempt(|| "open a file");
            below.attempt(|| "make a jail").unwrap_err().advise("try again")
        }
        assert!(of(io::Error::from_raw_os_error(libc::EMFILE)).is_transient());
        assert!(of(rustix::io::Errno::NOMEM).is_transient() && of(Errno::EAGAIN).is_transient());
        assert!(of(Error::new("run a program").because("it was killed").transient()).is_transient());
        assert!(!of(io::Error::from_raw_os_error(libc::EPERM)).is_transient() && !of(Errno::EPERM).is_transient());
        // The text does not decide.
        assert!(!of("EMFILE: Too many open files (os error 24)").is_transient());
    }
}
