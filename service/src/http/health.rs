//! Requests that return no records: health, version, metrics, the OpenAPI document and downloads.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Service, json as answer, openapi};
use crate::records::{Kind, wire};

/// Upstream's release that has this API.
const API_VERSION: &str = "3.33.0";

impl Service {
    /// GET of the health: always `{}`, since an answer shows that the program runs.
    pub fn health() -> Response<Body> {
        answer(StatusCode::OK, wire::in_order(&json!({})))
    }

    /// GET of the version.
    pub fn release() -> Response<Body> {
        answer(StatusCode::OK, wire::in_order(&json!({ "version": API_VERSION })))
    }

    /// GET of the metrics.
    pub async fn metrics_text(&self) -> Result<Response<Body>, Problem> {
        let mut jobs = BTreeMap::new();
        for text in self.database.list(Kind::Jobs).await?.records() {
            let job: Value = serde_json::from_str(text).unwrap_or_default();
            *jobs.entry(job["status"].as_str().unwrap_or_default().to_owned()).or_insert(0) += 1;
        }
        Ok(text("text/plain; version=0.0.4", self.metrics.text(&jobs)))
    }

    /// GET of the OpenAPI document.
    pub fn openapi() -> Response<Body> {
        text("application/yaml", openapi::document())
    }

    /// GET of an object by a signed URL; only for a store in a directory.
    pub async fn download(&self, path: &str, query: &str, headers: &HeaderMap) -> Result<Response<Body>, Problem> {
        use tokio::io::{AsyncReadExt, AsyncSeekExt};
        let no = || Problem::new(StatusCode::FORBIDDEN, "the URL is not signed by this service, or has expired");
        let file = self.store.signed_file(&super::decoded(path), query).ok_or_else(no)?;
        let missing = |_| Problem::not_found("object");
        let mut file = tokio::fs::File::open(file).await.map_err(missing)?;
        let size = file.metadata().await.map_err(missing)?.len();
        let range = headers.get(header::RANGE).and_then(|range| from(range.to_str().ok()?));
        let start = range.unwrap_or(0);
        if start >= size && range.is_some() {
            return Err(Problem::new(StatusCode::RANGE_NOT_SATISFIABLE, format!("the object has {size} bytes")));
        }
        file.seek(std::io::SeekFrom::Start(start)).await.map_err(missing)?;
        let chunks = futures_util::stream::try_unfold(file, |mut file| async move {
            let mut chunk = vec![0; CHUNK];
            let length = file.read(&mut chunk).await?;
            chunk.truncate(length);
            Ok::<_, std::io::Error>((length > 0).then_some((chunk, file)))
        });
        let mut answer = Response::new(Body::from_stream(chunks));
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size - start));
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        if range.is_some() {
            let range = format!("bytes {start}-{}/{size}", size - 1);
            headers.insert(header::CONTENT_RANGE, HeaderValue::from_str(&range).expect("numbers"));
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        Ok(answer)
    }
}

/// Maximum number of bytes of a download that are in memory at once.
const CHUNK: usize = 256 << 10;

/// Returns the start of a range that has no end, as clients send it to continue a download. Other ranges are ignored,
/// as HTTP allows.
fn from(range: &str) -> Option<u64> {
    range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

fn text(kind: &'static str, body: String) -> Response<Body> {
    let mut answer = Response::new(Body::from(body));
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
