//! IDs of jobs and images. Their form is checked, because they become part of URLs and of keys in stores, and decide
//! what is deleted.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Attempt, Result};

/// A UUID as IMS writes it: lower case, with hyphens. IMS compares IDs as text and finds no other spelling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Id(String);

impl TryFrom<String> for Id {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("the id is '{text}': expected a UUID"))
    }
}

impl Id {
    /// Parses a UUID; refuses any other text.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let groups = [8, 4, 4, 4, 12];
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let mut parts = text.split('-');
        let fits =
            groups.iter().all(|length| parts.next().is_some_and(|p| p.len() == *length && p.bytes().all(is_digit)));
        (fits && parts.next().is_none()).then(|| Self(text.to_owned()))
    }

    /// Generates a random ID.
    pub(crate) fn random() -> Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").attempt(|| "generate an id")?;
        Ok(Self(id.trim().to_owned()))
    }

    /// The ID as text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lower_case_uuid_is_an_id() {
        let id = Id::random().unwrap();
        assert_eq!(Id::parse(id.as_str()), Some(id.clone()));
        let uuid = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";
        assert_eq!(Id::parse(uuid).unwrap().as_str(), uuid);
        let refused = ["", "7", "..", "../../smd", &uuid[1..], &uuid.to_uppercase(), &uuid.replace('-', "")];
        let added = ["/", "-", "\n", "?x", " ", "%2e"].map(|more| format!("{uuid}{more}"));
        let before = ["/", "-", "\n", "../", " "].map(|more| format!("{more}{uuid}"));
        for text in refused.into_iter().map(str::to_owned).chain(added).chain(before) {
            assert_eq!(Id::parse(&text), None, "{text:?}");
        }
    }
}
