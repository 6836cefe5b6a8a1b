//! Values out of variables, and what is wrong with them.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::time::Duration;

use crate::error::Result;

/// A checked value of the command line or of a variable, or the format that was expected.
pub(crate) type Checked = std::result::Result<String, String>;

/// Whether a value's letters have to be in the case that is expected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Exact,
    Any,
}

/// Takes values out of the variables and collects what is wrong with them. An empty variable counts as not set.
pub(crate) struct Reader {
    variables: HashMap<OsString, OsString>,
    pub(crate) complaints: Vec<String>,
}

impl Reader {
    /// Where a variable comes twice, the later one counts.
    pub(crate) fn of(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        Self { variables: variables.into_iter().collect(), complaints: Vec::new() }
    }

    pub(crate) fn text(&mut self, name: &str) -> Option<String> {
        let value = self.variables.get(OsStr::new(name)).filter(|v| !v.is_empty())?;
        match value.to_str() {
            Some(text) => Some(text.to_owned()),
            None => {
                self.complaints.push(format!("{name} is '{}': expected UTF-8", value.to_string_lossy()));
                None
            }
        }
    }

    /// A value that ends up as one word of a configuration line; it may be empty.
    pub(crate) fn line(&mut self, name: &str) -> Option<String> {
        self.variables.get(OsStr::new(name))?;
        let value = self.text(name).unwrap_or_default();
        if value.contains(|c: char| c.is_control()) {
            self.complaints
                .push(format!("{name} is '{}': expected one line without control characters", value.escape_debug()));
            return None;
        }
        Some(value)
    }

    pub(crate) fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], case: Case) -> Option<T> {
        let value = self.text(name)?;
        let found = choices.iter().find(|(word, _)| match case {
            Case::Exact => value == *word,
            Case::Any => value.eq_ignore_ascii_case(word),
        });
        if found.is_none() {
            let known: Vec<_> = choices.iter().map(|(word, _)| format!("'{word}'")).collect();
            let exactly = if case == Case::Exact { ", in this spelling" } else { "" };
            self.complaints.push(format!("{name} is '{value}': expected {}{exactly}", known.join(" or ")));
        }
        found.map(|(_, choice)| *choice)
    }

    pub(crate) fn seconds(&mut self, name: &str) -> Option<Duration> {
        let value = self.text(name)?;
        let seconds = value.parse().ok().map(Duration::from_secs);
        if seconds.is_none() {
            self.complaints.push(format!("{name} is '{value}': expected whole seconds"));
        }
        seconds
    }

    /// The value of `name`, if `check` accepts it; it says what it expected else.
    pub(crate) fn check<T>(
        &mut self,
        name: &str,
        value: &str,
        check: impl FnOnce(&str) -> std::result::Result<T, String>,
    ) -> Option<T> {
        let refused = |expected| self.complaints.push(format!("{name} is '{value}': {expected}"));
        check(value).map_err(refused).ok()
    }

    pub(crate) fn accept<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.complaints.push(e.to_string())).ok()
    }
}
