//! Error responses of IMS (RFC 7807) and of OAuth servers (RFC 6749, 5.2).

use reqwest::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::transfer::MOST_QUOTED;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Problem {
    detail: Option<String>,
    error_description: Option<String>,
    title: Option<String>,
    error: Option<String>,
    /// Refused fields, with the reasons.
    errors: Value,
}

/// Says why a request failed: the details of the error, otherwise the first line of the response unless it is HTML.
pub fn reason(status: StatusCode, text: &str) -> String {
    let Problem { detail, error_description, title, error, errors } = serde_json::from_str(text).unwrap_or_default();
    let said = [detail, error_description, title, error].into_iter().flatten().find(|said| !said.is_empty());
    let mut said = said.unwrap_or_default();
    if errors.as_object().is_some_and(|errors| !Map::is_empty(errors)) {
        said = format!("{said} {errors}");
    }
    if said.is_empty() && !text.trim_start().starts_with('<') {
        text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().clone_into(&mut said);
    }
    let said: String = said.chars().take(MOST_QUOTED).collect();
    format!("the server answers {status}: {said}").trim_end_matches([':', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_of_a_problem_are_in_the_message() {
        let conflict = StatusCode::CONFLICT;
        let rfc7807 = r#"{"title": "Conflict", "detail": "The job has ended.", "status": 409}"#;
        assert_eq!(reason(conflict, rfc7807), "the server answers 409 Conflict: The job has ended.");
        let fields = r#"{"title": "Bad", "errors": {"name": ["too short"]}}"#;
        assert_eq!(reason(conflict, fields), r#"the server answers 409 Conflict: Bad {"name":["too short"]}"#);
        assert_eq!(
            reason(conflict, r#"{"error": "invalid_client"}"#),
            "the server answers 409 Conflict: invalid_client"
        );
        assert_eq!(reason(conflict, "<html>\n no"), "the server answers 409 Conflict");
        assert_eq!(reason(conflict, "\nno\nat all"), "the server answers 409 Conflict: no");
        assert_eq!(reason(conflict, &"x".repeat(9000)).len(), "the server answers 409 Conflict: ".len() + MOST_QUOTED);
        assert_eq!(reason(conflict, ""), "the server answers 409 Conflict");
    }
}
