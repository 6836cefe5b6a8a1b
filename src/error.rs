//! One error for the person who reads a pod's log: what was attempted, on what, what the system said, what to do.

use std::fmt;

use nix::sys::signal::Signal;

use crate::printable::Printable;

/// A step that could not be done.
#[derive(Debug)]
pub struct Error {
    /// Completes "cannot …" and names the object.
    attempted: String,
    /// What the system, or another program, said.
    cause: Option<String>,
    /// What the reader can do about it.
    advice: Option<String>,
    kind: Kind,
}

/// Cause of an error, which decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The environment broke.
    Broken,
    /// An option, a variable or a file that we were given is wrong.
    BadInput,
    /// A signal came.
    Interrupted(Signal),
}

/// What a fallible step returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// `attempted` completes the sentence "cannot …".
    pub fn new(attempted: impl Into<String>) -> Self {
        Self { attempted: attempted.into(), cause: None, advice: None, kind: Kind::Broken }
    }

    /// An input that is refused: `complaint` is a whole clause that names the value and what was expected.
    pub fn bad_input(complaint: impl Into<String>) -> Self {
        Self { attempted: complaint.into(), cause: None, advice: None, kind: Kind::BadInput }
    }

    /// Work that was ended by `signal`.
    pub fn interrupted(signal: Signal) -> Self {
        let attempted = format!("interrupted by {signal}");
        Self { attempted, cause: None, advice: None, kind: Kind::Interrupted(signal) }
    }

    /// Adds what the system said.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Adds what the reader can do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Adds a further thing that the reader can do.
    #[must_use]
    pub fn advise_also(self, advice: &str) -> Self {
        let advice = self.advice.iter().map(String::as_str).chain([advice]).collect::<Vec<_>>().join("; ");
        self.advise(advice)
    }

    /// The program's exit code for this error: 2 for refused input, 128 + n after signal n, else 1.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Broken => 1,
            Kind::BadInput => 2,
            Kind::Interrupted(signal) => 128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0)),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == Kind::Broken {
            f.write_str("cannot ")?;
        }
        // A file's name, or what a program said, is in it: one line, wherever it is printed.
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

/// Turns the bare error of a system call into an [`Error`] at the place that knows the object.
pub trait Attempt<T> {
    /// `attempted` completes "cannot …".
    fn attempt<S: Into<String>>(self, attempted: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: fmt::Display> Attempt<T> for std::result::Result<T, E> {
    fn attempt<S: Into<String>>(self, attempted: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error::new(attempted()).because(cause))
    }
}

/// Adds advice to an error that already says what failed.
pub trait Advise<T> {
    /// What the reader can do.
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
}
