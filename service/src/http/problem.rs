//! Answers to requests that fail.

use std::fmt;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::records::rules::Errors;
use crate::records::wire;

/// Answer to a failed request, in the format of RFC 7807.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Status of the answer.
    pub status: StatusCode,
    /// Reason, for people; the `detail` of most answers.
    pub detail: String,
    /// Complaints by field, or a list of the steps that failed.
    pub errors: Option<Value>,
    /// True if the failure is an outage: something that the service relies on (store, database) does not answer.
    pub is_outage: bool,
    shape: Shape,
}

/// Shape of the answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Problem,
    /// The reason is the title, and there is no detail. Used for a wrong filter.
    Title,
    /// Only `{"message": …}`. Used for a body that cannot be read.
    Message,
}

impl Problem {
    /// A problem without a list of errors.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: None, is_outage: false, shape: Shape::Problem }
    }

    /// 404: there is no such record.
    pub fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("no such {what}: see the ids in its list"))
    }

    /// 400: the request cannot be carried out as it is.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 422: a value cannot be accepted.
    pub fn unprocessable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    }

    /// 401: the request does not say who sends it.
    pub fn unauthorized(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }

    /// 409: the request conflicts with the current state of a record or object.
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    /// 500: something that the service relies on has failed.
    pub fn failed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, detail)
    }

    /// 400: a filter of the query is wrong.
    pub fn filter(sentence: impl Into<String>) -> Self {
        Self { shape: Shape::Title, ..Self::bad_request(sentence) }
    }

    /// The body of the request cannot be read; the answer holds only `message`.
    pub fn message(status: StatusCode, message: impl Into<String>) -> Self {
        Self { shape: Shape::Message, ..Self::new(status, message) }
    }

    /// 422: the fields in `errors` are wrong.
    pub fn fields(errors: &Errors) -> Self {
        let names: Vec<_> = errors.keys().map(String::as_str).collect();
        let detail = format!("cannot accept the request: wrong or unknown fields: {}", names.join(", "));
        Self { errors: Some(json!(errors)), ..Self::unprocessable(detail) }
    }

    /// Sets whether the failure is an outage: something that the service relies on does not answer.
    #[must_use]
    pub fn outage(mut self, outage: bool) -> Self {
        self.is_outage = outage;
        self
    }

    /// 500: steps have failed; `failures` has a sentence for each.
    pub fn steps(detail: impl Into<String>, failures: &[String]) -> Self {
        Self { errors: Some(json!(failures)), ..Self::failed(detail) }
    }

    /// Returns the answer: JSON with `status`, `title`, `detail` and `errors`, without a newline at the end.
    pub fn answer(&self) -> Response<Body> {
        #[derive(serde::Serialize)]
        struct Fields<'a> {
            status: u16,
            title: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            detail: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            errors: Option<&'a Value>,
        }
        let (title, detail) = match self.shape {
            Shape::Problem => (title(self.status), Some(&*self.detail)),
            Shape::Title => (&*self.detail, None),
            Shape::Message => return message(self.status, &self.detail),
        };
        let fields = Fields { status: self.status.as_u16(), title, detail, errors: self.errors.as_ref() };
        answer(self.status, "application/problem+json", wire::spaced(&fields))
    }
}

/// Returns the name that Python has for a status.
fn title(status: StatusCode) -> &'static str {
    status.canonical_reason().unwrap_or("Error")
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)?;
        // The errors of fields are for the client alone; failed steps are the reason of the failure.
        let steps: Vec<_> =
            self.errors.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str).collect();
        if steps.is_empty() { Ok(()) } else { write!(f, ": {}", steps.join("; ")) }
    }
}

/// An answer whose body is `{"message": …}`, for JSON that cannot be parsed and for unexpected media types.
fn message(status: StatusCode, message: &str) -> Response<Body> {
    answer(status, "application/json", wire::in_order(&json!({ "message": message })))
}

/// The answer to a method that the URL does not support. With `short`, it holds only the message.
pub fn no_such_method(allowed: &str, short: bool) -> Response<Body> {
    #[derive(serde::Serialize)]
    struct Fields<'a> {
        message: &'a str,
        status: u16,
        title: &'a str,
        detail: &'a str,
    }
    let status = StatusCode::METHOD_NOT_ALLOWED;
    let message = "The URL does not have this method.";
    let mut answer = if short {
        self::message(status, message)
    } else {
        let fields = Fields { message, status: 405, title: title(status), detail: message };
        answer(status, "application/json", wire::in_order(&fields))
    };
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_str(allowed).expect("names of methods"));
    answer
}

fn answer(status: StatusCode, kind: &'static str, body: String) -> Response<Body> {
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_steps_are_named_in_the_log() {
        let failures = ["no port is free".to_owned(), "the store is gone".to_owned()];
        let problem = Problem::steps("cannot start the job", &failures);
        assert_eq!(problem.to_string(), "cannot start the job: no port is free; the store is gone");
        assert_eq!(Problem::failed("cannot start").to_string(), "cannot start");
    }
}
