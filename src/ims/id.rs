//! Ids of jobs and images, which end in URLs, in keys of stores, and in what is deleted.

use std::fmt;

use crate::error::{Attempt, Result};

/// A UUID as IMS writes it: lower case, with hyphens. IMS compares ids as text and finds no other spelling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Id(String);

impl Id {
    /// Takes a UUID and nothing else.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let groups = [8, 4, 4, 4, 12];
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let mut parts = text.split('-');
        let fits =
            groups.iter().all(|length| parts.next().is_some_and(|p| p.len() == *length && p.bytes().all(is_digit)));
        (fits && parts.next().is_none()).then(|| Self(text.to_owned()))
    }

    /// A new one.
    pub(crate) fn random() -> Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").attempt(|| "make an image's id")?;
        Ok(Self(id.trim().to_owned()))
    }

    /// Its text.
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
    fn only_a_uuid_as_ims_writes_it_is_an_id() {
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
