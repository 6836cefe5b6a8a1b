//! The API over HTTP: what each request does, and how it is answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Extension, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header};
use futures_util::StreamExt;
use ims_sshd::log::redaction::without_secrets;
use serde::Serialize;
use serde_json::Value;

use crate::database::Database;
use crate::records::{Kind, manifest, rules, wire};
use crate::runner::Runner;
use crate::settings::Settings;
use crate::store::Store;
use access::{Access, Peer};
use metrics::Metrics;
use problem::Problem;
use routes::{Target, Version};

pub mod access;
mod claims;
mod create;
mod delete;
mod health;
mod jobs;
mod links;
mod lists;
mod log;
mod metrics;
mod moves;
mod nodes;
pub mod openapi;
mod owners;
pub mod problem;
pub mod routes;

pub use jobs::LONGEST_START;

/// Maximum size of a request's body, in bytes.
const LONGEST_BODY: usize = 16 << 20;

/// Maximum number of bytes that are read from a body that is too large.
const MOST_DISCARDED: usize = 256 << 20;

/// Maximum length of a path or of a parameter in the log, in bytes.
const LONGEST_SHOWN: usize = 1024;

/// Maximum number of times that a parameter in the log is percent-encoded, one inside the other.
const MOST_ENCODINGS: usize = 4;

/// Time limit for the body of a request.
const SLOWEST_BODY: Duration = Duration::from_mins(1);

/// Extension of a request that comes while too many others are being answered.
#[derive(Debug, Clone, Copy)]
pub struct Overloaded;

/// Everything that answering requests needs.
pub struct Service {
    /// Settings.
    pub settings: Settings,
    /// Records.
    pub database: Database,
    /// Objects.
    pub store: Store,
    /// Runner of jobs.
    pub runner: Arc<dyn Runner>,
    /// Decides which requests are answered.
    pub access: Access,
    metrics: Metrics,
    /// Held from the choice of a node until the start of the job is recorded, so that the next choice counts this job.
    choosing: tokio::sync::Mutex<()>,
}

impl Service {
    /// A service that has not answered any request yet.
    pub fn new(settings: Settings, database: Database, store: Store, runner: Arc<dyn Runner>, access: Access) -> Self {
        let (metrics, choosing) = Default::default();
        Self { settings, database, store, runner, access, metrics, choosing }
    }
}

/// A request with a body.
pub struct Request {
    kind: String,
    body: Bytes,
}

impl Request {
    /// Parses the body as JSON. Fails with 415 for another media type, and with 400 for a body that cannot be parsed or
    /// that Python takes for false.
    fn json(&self) -> Result<Value, Problem> {
        let kind = self.kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if kind != "application/json" && !(kind.starts_with("application/") && kind.ends_with("+json")) {
            let message = format!("the Content-Type is '{kind}': expected application/json");
            return Err(Problem::message(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let value: Value = serde_json::from_slice(&self.body)
            .map_err(|e| Problem::message(StatusCode::BAD_REQUEST, format!("the body is no JSON: {e}")))?;
        if manifest::is_empty(&value) {
            return Err(Problem::bad_request("the body is empty JSON: expected an object with fields"));
        }
        Ok(value)
    }
}

/// Returns the handler of all requests to the API.
pub fn router(service: Arc<Service>) -> Router {
    Router::new().fallback(answer).with_state(service)
}

async fn answer(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    overloaded: Option<Extension<Overloaded>>,
    request: axum::extract::Request,
) -> Response<Body> {
    let began = Instant::now();
    let (method, uri, version) = (request.method().clone(), request.uri().clone(), request.version());
    let target = routes::target(uri.path());
    let name = target.map_or("none", |target| target.name());
    let answer = match service.access.refusal(peer, target, request.headers()) {
        Some(refusal) => refusal,
        None if overloaded.is_some() && !matches!(target, Some(Target::Health)) => {
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "there are too many requests: try again").answer()
        }
        None => {
            let shared = service.clone();
            // Handle the request in a task of its own, so that a client that disconnects does not stop it half-way.
            let answer = tokio::spawn(async move { handle(&shared, request).await }).await;
            answer.unwrap_or_else(|error| {
                tracing::error!("a request has failed: {error}; this is a bug of ims: report it with this line");
                Problem::message(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error").answer()
            })
        }
    };
    let (status, took) = (answer.status().as_u16(), began.elapsed());
    tracing::info!("{peer} \"{method} {} {version:?}\" {status} {} ms", shown(&uri), took.as_millis());
    // Count only known methods: clients could otherwise fill the memory with made-up label values.
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PATCH, Method::DELETE, Method::OPTIONS];
    let counted = known.iter().find(|known| **known == method).map_or("other", Method::as_str);
    service.metrics.answered(name, counted, status, took);
    answer
}

async fn handle(service: &Arc<Service>, request: axum::extract::Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let Some(target) = routes::target(&path) else { return Problem::not_found("URL").answer() };
    let allowed = target.allowed();
    let method = if head.method == Method::HEAD { Method::GET } else { head.method.clone() };
    if method == Method::OPTIONS {
        let mut answer = Response::new(Body::empty());
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
        return answer;
    }
    if !allowed.split(", ").any(|name| name == method.as_str()) {
        return problem::no_such_method(allowed, matches!(target, Target::Health | Target::Release));
    }
    // No GET has a use for a body, and some need no token: whoever sent it would fill the memory and hold a place.
    let read = async { if method == Method::GET { Some(Bytes::new()) } else { read(body).await } };
    let Ok(body) = tokio::time::timeout(SLOWEST_BODY, read).await else {
        let limit = SLOWEST_BODY.as_secs();
        return Problem::new(StatusCode::REQUEST_TIMEOUT, format!("the body has not come within {limit} s")).answer();
    };
    let Some(body) = body else {
        return Problem::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has {LONGEST_BODY} bytes or more"))
            .answer();
    };
    let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let request = Request { kind: kind.to_owned(), body };
    let query = head.uri.query().unwrap_or_default();
    let done = dispatch(service, &method, target, &path, query, &head.headers, &request).await;
    done.unwrap_or_else(|problem| {
        if problem.status.is_server_error() {
            tracing::error!("{} {}: {problem}", head.method, shown(&head.uri));
        }
        problem.answer()
    })
}

/// Reads a body; returns `None` if it is too long. The rest of a too long body is read as well: closing a connection
/// with unread data resets it, and the client would never see the answer.
async fn read(body: Body) -> Option<Bytes> {
    let (mut chunks, mut kept, mut length) = (body.into_data_stream(), Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.ok()?;
        length += chunk.len();
        if length <= LONGEST_BODY {
            kept.extend_from_slice(&chunk);
        } else if length > MOST_DISCARDED {
            break;
        }
    }
    (length <= LONGEST_BODY).then(|| kept.into())
}

async fn dispatch(
    service: &Arc<Service>,
    method: &Method,
    target: Target<'_>,
    path: &str,
    query: &str,
    headers: &HeaderMap,
    request: &Request,
) -> Result<Response<Body>, Problem> {
    match (method.as_str(), target) {
        ("GET", Target::All(kind, _) | Target::AllDeleted(kind)) => service.list(kind, path, query, headers).await,
        ("GET", Target::One(kind, _, id) | Target::OneDeleted(kind, id)) => service.one(kind, &decoded(id)).await,
        ("GET", Target::Log(id)) => service.log(&decoded(id), query).await,
        ("GET", Target::NodeStatuses) => service.node_statuses().await,
        ("GET", Target::NodeStatus(xname)) => service.node_status(&decoded(xname)).await,
        ("GET", Target::Health) => Ok(Service::health()),
        ("GET", Target::Release) => Ok(Service::release()),
        ("GET", Target::Metrics) => service.metrics_text().await,
        ("GET", Target::OpenApi) => Ok(Service::openapi()),
        ("GET", Target::Download) => service.download(path, query, headers).await,
        ("POST", Target::All(Kind::PublicKeys, _)) => service.create_public_key(request).await,
        ("POST", Target::All(Kind::Recipes, _)) => service.create_recipe(request).await,
        ("POST", Target::All(Kind::Images, _)) => service.create_image(request).await,
        ("POST", Target::All(Kind::Nodes, _)) => service.create_node(request).await,
        ("POST", Target::All(Kind::Jobs, _)) => service.create_job(request).await,
        ("PATCH", Target::One(Kind::Recipes, _, id)) => service.patch_recipe(id, request).await,
        ("PATCH", Target::One(Kind::Images, _, id)) => service.patch_image(id, request).await,
        ("PATCH", Target::One(Kind::Jobs, _, id)) => service.patch_job(id, request).await,
        ("PATCH", Target::OneDeleted(kind, id)) => {
            service.database.text(kind, id).await?.ok_or_else(|| Problem::not_found(kind.noun()))?;
            create::checked(request, rules::UNDELETE)?;
            service.undelete(kind, id).await
        }
        ("PATCH", Target::AllDeleted(kind)) => {
            create::checked(request, rules::UNDELETE)?;
            service.undelete_all(kind, query).await
        }
        ("DELETE", Target::All(Kind::Jobs, _)) => service.delete_jobs(query).await,
        ("DELETE", Target::One(Kind::Jobs, _, id)) => service.delete_job(id).await,
        ("DELETE", Target::All(kind, version)) => service.delete_all(kind, version, query).await,
        ("DELETE", Target::One(kind, version, id)) => service.delete(kind, version, &decoded(id), query).await,
        ("DELETE", Target::AllDeleted(kind)) => service.delete_all(kind, Version::V3, query).await,
        ("DELETE", Target::OneDeleted(kind, id)) => service.delete(kind, Version::V3, id, query).await,
        _ => Err(Problem::not_found("URL")),
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        // Clients retry after a 503.
        Self::new(StatusCode::SERVICE_UNAVAILABLE, format!("cannot use the database: {error}"))
    }
}

/// An answer of JSON.
fn json(status: StatusCode, text: impl Into<Body>) -> Response<Body> {
    let mut answer = Response::new(text.into());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// The answer to a POST.
fn created(record: &impl Serialize) -> Response<Body> {
    json(StatusCode::CREATED, wire::in_order(record))
}

/// An answer without a body, which has a media type nevertheless.
fn no_content() -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// Parameters of a query, decoded.
fn pairs(query: &str) -> Vec<(String, String)> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.filter(|(name, _)| !name.is_empty()).map(|(name, value)| (form_decoded(name), form_decoded(value))).collect()
}

/// Path and query of a request for the log. A path or a parameter may hold a secret, such as a presigned URL or a
/// token.
fn shown(uri: &Uri) -> String {
    let path = if has_secret(uri.path()) { "***" } else { uri.path() };
    let parameters = uri.query().into_iter().flat_map(|query| query.split('&')).map(|parameter| {
        let (name, value) = parameter.split_once('=').unwrap_or_default();
        if has_secret(parameter) || has_secret(value) { format!("{name}=***") } else { parameter.to_owned() }
    });
    let query = parameters.collect::<Vec<_>>().join("&");
    if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") }
}

/// Returns whether a text may have a secret, percent-encoded or not. One that is too long to look for it may have one.
fn has_secret(text: &str) -> bool {
    let mut text = text.to_owned();
    for _ in 0..MOST_ENCODINGS {
        if text.len() > LONGEST_SHOWN || without_secrets(&text) != text {
            return true;
        }
        let plain = form_decoded(&text);
        if plain == text {
            return false;
        }
        text = plain;
    }
    true
}

/// Decodes a percent-encoded segment of a path. Returns an empty text, which names nothing, if the result is not UTF-8.
fn decoded(segment: &str) -> String {
    // PostgreSQL refuses NUL in texts.
    String::from_utf8(percent_decoded(segment)).ok().filter(|text| !text.contains('\0')).unwrap_or_default()
}

/// Decodes a name or value of a query, in which `+` is a blank.
fn form_decoded(text: &str) -> String {
    String::from_utf8_lossy(&percent_decoded(&text.replace('+', " "))).into_owned()
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        // `from_str_radix` takes a sign for a digit.
        let digits = after.get(..2).filter(|two| *first == b'%' && two.iter().all(u8::is_ascii_hexdigit));
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_signs_are_decoded_alike_in_paths_and_queries() {
        let pairs = pairs("a=%2B+%C3%A4&%61b&=x&&c=1=2&d=%zz%4&e=%+f");
        let texts: Vec<_> = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(texts, [("a", "+ ä"), ("ab", ""), ("c", "1=2"), ("d", "%zz%4"), ("e", "% f")]);
        assert_eq!(decoded("%C3%A4+%zz%4"), "ä+%zz%4");
        assert_eq!(decoded("%+f"), "%+f", "a sign is no digit");
        assert_eq!(decoded("%00"), "");
    }
}
