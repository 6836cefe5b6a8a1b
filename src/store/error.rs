//! Errors of stores in readable form.

use std::io;

use object_store::client::HttpError;
use reqwest::StatusCode;

use crate::log::redaction::without_known;
use crate::store::requests::ANSWERED;
use crate::transfer::{MOST_QUOTED, in_full};

/// Turns an error of our own into one of the store crate's type.
pub(crate) fn failure(key: &str, cause: impl std::error::Error + Send + Sync + 'static) -> object_store::Error {
    let source: Box<dyn std::error::Error + Send + Sync> = Box::new(cause);
    let is_missing = source.downcast_ref().is_some_and(|e: &io::Error| e.kind() == io::ErrorKind::NotFound);
    if is_missing {
        return object_store::Error::NotFound { path: key.to_owned(), source };
    }
    object_store::Error::Generic { store: "the store", source }
}

/// Cause of a store's error. The crate's own text repeats the object, which our message names already, adds the crate's
/// settings, and quotes the server's whole page.
pub(crate) fn cause(error: &object_store::Error) -> String {
    let below = std::error::Error::source(error);
    told(&below.map_or_else(|| in_full(error), in_full))
}

/// Extracts the cause from the text of a failed request: `Error performing METHOD URL in TIME, SETTINGS - WHAT`.
fn told(text: &str) -> String {
    // Mask secrets before the text is shortened: a shortened secret would not be recognized.
    let text = &*without_known(text);
    let parts = text.strip_prefix("Error performing ").and_then(|rest| rest.split_once(" - "));
    let Some((request, what)) = parts else { return text.to_owned() };
    let url = request.split_whitespace().nth(1).and_then(|url| reqwest::Url::parse(url).ok());
    let server = url.map_or_else(|| "the server".into(), |url| url.origin().ascii_serialization());
    let Some(answer) = what.strip_prefix("Server returned non-2xx status code: ") else {
        return silence(&server, what);
    };
    let (status, page) = answer.split_once(": ").unwrap_or((answer, ""));
    refusal(&server, status, page)
}

/// The error of a request that got no response.
pub(crate) fn unanswered(key: &str, server: &str, error: &HttpError) -> object_store::Error {
    failure(key, io::Error::other(silence(server, &in_full(error))))
}

/// The error of a request whose response reports an error.
pub(crate) fn answered(key: &str, server: &str, status: StatusCode, page: &[u8]) -> object_store::Error {
    failure(key, io::Error::other(refusal(server, &status.to_string(), &String::from_utf8_lossy(page))))
}

/// Describes, in words, a request that got no response.
fn silence(server: &str, what: &str) -> String {
    let after = |phrase| what.rsplit_once(phrase).map(|(_, after)| after);
    let why = after("client error (Connect): ").or_else(|| after("error sending request: "));
    let why = why.or_else(|| what.strip_prefix("HTTP error: ")).unwrap_or(what);
    match why.strip_prefix(ANSWERED) {
        Some(rest) => format!("{ANSWERED} of {server}{rest}"),
        None => format!("no answer from {server}: {why}"),
    }
}

/// Describes, in words, a response that reports an error: its status, and the text on its page.
fn refusal(server: &str, status: &str, page: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = page.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(text, _)| text)
    };
    let mut said: Vec<_> = [element("Code"), element("Message")].into_iter().flatten().collect();
    if said.is_empty() && !page.contains('<') && !page.is_empty() {
        said.push(page);
    }
    let said: String = said.join(", ").chars().take(MOST_QUOTED).collect();
    format!("{server} answers {status}{}{said}", if said.is_empty() { "" } else { ": " })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cause_of_a_store_error_is_quoted_once() {
        let request = "Error performing PUT http://s3:9000/b/k?partNumber=1 in 1.07s, after 5 retries, \
            max_retries: 50, retry_timeout: 1s ";
        let page = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>No.</Message><Key>k</Key></Error>";
        for (what, wanted) in [
            (
                format!("- Server returned non-2xx status code: 403 Forbidden: {page}"),
                "answers 403 Forbidden: AccessDenied, No.",
            ),
            (
                "- Server returned non-2xx status code: 502 Bad Gateway: <html>x</html>".into(),
                "answers 502 Bad Gateway",
            ),
            (
                "- Server returned non-2xx status code: 500 Internal Server Error: full".into(),
                "answers 500 Internal Server Error: full",
            ),
        ] {
            assert_eq!(told(&format!("{request}{what}")), format!("http://s3:9000 {wanted}"));
        }
        let refused =
            "- HTTP error: error sending request: client error (Connect): tcp connect error: Connection refused";
        assert_eq!(
            told(&format!("{request}{refused}")),
            "no answer from http://s3:9000: tcp connect error: Connection refused"
        );
        let ours = failure("k", io::Error::other("no space"));
        assert_eq!(cause(&ours), "no space");
        assert_eq!(cause(&failure("k", io::Error::from_raw_os_error(2))), "No such file or directory (os error 2)");
    }
}
