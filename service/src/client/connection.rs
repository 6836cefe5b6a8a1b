//! Sends requests to the service and reads its answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::ims::problem::reason;
use ims_sshd::printable::Printable;
use reqwest::{Certificate, Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::arguments::Place;
use super::value::Value;
use crate::settings;

/// Time limit for connecting.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Maximum size of an answer, in bytes: some hundred thousand records.
const LARGEST_ANSWER: usize = 64 << 20;

/// Time limit of a request: the service may have to move the objects of a large image.
const LIMIT: Duration = Duration::from_hours(1);

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    /// Verb and object of the error message "cannot …".
    pub(super) attempted: String,
    pub(super) method: Method,
    /// Segments of the path that follow the version.
    pub(super) path: Vec<String>,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Option<serde_json::Value>,
}

/// Access to a running service.
pub(super) struct Service {
    client: reqwest::Client,
    url: Url,
    token: Option<String>,
    /// PEM file of CA certificates to trust.
    ca: Option<PathBuf>,
    /// URL of the service as the user gave it.
    shown: String,
}

impl Service {
    pub(super) fn at(place: &Place) -> Result<Self> {
        let shown = place.url.clone().unwrap_or_else(|| format!("unix:{}", socket().display()));
        let attempted = || format!("reach the service at {shown}");
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT_LIMIT).user_agent("ims");
        for authority in place.ca.as_deref().map(authorities).transpose()?.into_iter().flatten() {
            builder = builder.add_root_certificate(authority);
        }
        let (builder, url, shown) = match shown.strip_prefix("unix:") {
            Some(socket) => {
                let socket = std::path::absolute(socket.trim_start_matches("//")).attempt(attempted)?;
                let shown = format!("unix:{}", socket.display());
                (builder.unix_socket(socket), "http://localhost".to_owned(), shown)
            }
            None => (builder, shown.trim_end_matches('/').to_owned(), shown),
        };
        let url = Url::parse(&url).attempt(|| format!("reach the service at {shown}"))?;
        if !["http", "https"].contains(&url.scheme()) {
            let expected = "expected http://HOST:PORT, https://… or unix:PATH";
            return Err(Error::bad_input(format!("the service's URL is '{shown}': {expected}")));
        }
        let is_here = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        // Use no proxy for this machine's loopback address, which a proxy cannot reach.
        let builder = if is_here { builder.no_proxy() } else { builder };
        let client = builder.build().attempt(|| format!("reach the service at {shown}"))?;
        let token = place.token.as_deref().map(token).transpose()?;
        let ca = place.ca.as_deref().map(std::path::absolute).transpose().attempt(|| "find the current directory")?;
        Ok(Self { client, url, token, ca, shown })
    }

    /// Returns the variables by which `ims-sshd` reaches the service. Writes the token into a file in `directory`,
    /// which only this user can enter: `ims-sshd` expects the plain token, and the user's own file may be JSON.
    pub(super) fn variables(&self, directory: &Path) -> Result<Vec<(&'static str, PathBuf)>> {
        let mut variables = vec![("IMS_URL", PathBuf::from(&self.shown))];
        if let Some(token) = &self.token {
            let file = directory.join("token");
            std::fs::write(&file, token).attempt(|| format!("write {}", file.display()))?;
            variables.push(("IMS_TOKEN_FILE", file));
        }
        variables.extend(self.ca.clone().map(|ca| ("CA_CERT", ca)));
        Ok(variables)
    }

    /// Sends a request and returns the service's answer; [`Value::Null`] if the answer has no content.
    pub(super) async fn ask(&self, request: &Request) -> Result<Value> {
        let response = self.send(request, Some(LIMIT)).await?;
        let text = read(request, response).await?;
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&text).attempt(|| format!("{}: read the answer as JSON", request.attempted))
    }

    /// Sends a request, and writes each part of the answer to standard output as it arrives, as `shown` returns it.
    pub(super) async fn copy(&self, request: &Request, mut shown: impl FnMut(&[u8]) -> Vec<u8>) -> Result<()> {
        let mut response = self.send(request, None).await?;
        let mut to = std::io::stdout();
        while let Some(bytes) = response.chunk().await.map_err(|e| failed(request, &e))? {
            to.write_all(&shown(&bytes)).and_then(|()| to.flush()).attempt(|| "write to standard output")?;
        }
        Ok(())
    }

    async fn send(&self, request: &Request, limit: Option<Duration>) -> Result<Response> {
        let mut url = self.url.clone();
        url.path_segments_mut()
            .map_err(|()| Error::bad_input(format!("the service's URL is '{}': expected a host", self.shown)))?
            .pop_if_empty()
            .push("v3")
            .extend(&request.path);
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        let mut sent = self.client.request(request.method.clone(), url);
        if let Some(limit) = limit {
            sent = sent.timeout(limit);
        }
        if let Some(token) = &self.token {
            sent = sent.bearer_auth(token);
        }
        if let Some(body) = &request.body {
            sent = sent.header("content-type", "application/json").body(body.to_string());
        }
        let response = sent.send().await.map_err(|e| {
            let error = failed(request, &e);
            let advice = format!("is there a service at {}? 'ims serve' starts one, --url names another", self.shown);
            if e.is_connect() { error.advise(advice) } else { error }
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = read(request, response).await?;
        let refused =
            Error::new(&request.attempted).because(Printable(reason(status, &String::from_utf8_lossy(&text))));
        Err(match status {
            StatusCode::UNAUTHORIZED => refused.advise("--token names the file of the token, in the service's data"),
            _ => refused,
        })
    }
}

/// Reads an answer. Fails if it has no end that memory could hold.
async fn read(request: &Request, mut response: Response) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    while let Some(part) = response.chunk().await.map_err(|e| failed(request, &e))? {
        if text.len() + part.len() > LARGEST_ANSWER {
            let reason = format!("the answer is longer than {} MiB", LARGEST_ANSWER >> 20);
            return Err(Error::new(&request.attempted).because(reason));
        }
        text.extend_from_slice(&part);
    }
    Ok(text)
}

fn failed(request: &Request, error: &reqwest::Error) -> Error {
    // Show the innermost cause, since the outer errors only name the URL.
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    Error::new(&request.attempted).because(cause)
}

/// Returns the socket of a service that this user has started with the same environment variables.
fn socket() -> PathBuf {
    let named = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let data = || named("IMS_DATA_DIR").unwrap_or_else(|| settings::DATA.into());
    named("IMS_SOCKET").unwrap_or_else(|| settings::default_socket(&data()))
}

/// Reads the CA certificates in a file.
fn authorities(file: &Path) -> Result<Vec<Certificate>> {
    let attempted = || format!("read the authorities in {}", file.display());
    Certificate::from_pem_bundle(&std::fs::read(file).attempt(attempted)?).attempt(attempted)
}

/// Reads the token from a file: plain text, or JSON with `access_token`, as `cray auth login` writes it.
fn token(file: &Path) -> Result<String> {
    #[derive(Deserialize)]
    struct Login {
        access_token: String,
    }
    let attempted = || format!("read the token in {}", file.display());
    let text = std::fs::read_to_string(file).attempt(attempted)?;
    if text.trim_start().starts_with('{') {
        return Ok(serde_json::from_str::<Login>(&text).attempt(attempted)?.access_token);
    }
    let text = text.trim();
    let is_word = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if is_word { Ok(text.to_owned()) } else { Err(Error::new(attempted()).because("it holds no token")) }
}
