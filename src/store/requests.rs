//! Requests to a store, retried within the limits of the variables, with a limit on the length of a response. The
//! crate's own requests read responses of any length, have no timeout for a stalled connection, and neither end their
//! retries in time nor log them.

use std::error::Error as _;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use object_store::client::{
    HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody, HttpService,
};
use reqwest::{Method, StatusCode};

use crate::transfer::SHORTEST;
use crate::transfer::network::Network;
use crate::transfer::{self, MOST_COMPLAINED, PAUSE, in_full, is_transient, without_query};

/// Maximum length of a response, in bytes. Objects, which are longer, are fetched by other means.
const LONGEST: usize = 4 << 20;

/// Size of the pieces in which content is sent, in bytes; each piece that is sent counts as progress.
const PIECE: usize = 64 << 10;

/// Maximum time for all further requests to a store that did not answer within the usual limits.
const SILENT: Duration = Duration::from_secs(5);

/// Error code of S3 for content whose SHA-256 is not the one that its request is signed with. It was altered on the
/// way, and may arrive unaltered the next time.
const ALTERED: &[u8] = b"XAmzContentSHA256Mismatch";

/// Prefix of errors about a response that did arrive, as opposed to errors that none did.
pub(crate) const ANSWERED: &str = "the answer";

/// Sends requests to a store.
#[derive(Debug, Clone)]
pub(crate) struct Requests {
    client: reqwest::Client,
    network: Network,
    outage: Arc<Outage>,
}

/// Outage of a store, shared by all of its clients.
#[derive(Debug, Default)]
pub(crate) struct Outage {
    /// Time at which the store was given up; `None` once it answers again. Until then, a rollback has little time.
    silent_since: Mutex<Option<Instant>>,
    /// Decides when the outage is logged.
    log: transfer::Outage,
}

impl Outage {
    fn silent_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.silent_since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time of a request's last progress.
#[derive(Clone)]
struct Moved(Arc<Mutex<Instant>>);

impl Moved {
    fn now() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn again(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Failure of a request that got no usable response.
enum Failure {
    /// A transient error: a retry may succeed.
    Transient(String),
    /// A permanent error.
    Final(String),
}

impl Requests {
    /// Sends requests with `client`.
    pub(crate) fn new(client: reqwest::Client, network: Network, outage: Arc<Outage>) -> Self {
        Self { client, network, outage }
    }

    /// Sends a request, with `content` as its body if that is given.
    pub(crate) async fn send(&self, request: HttpRequest, content: Option<&Slice>) -> Result<HttpResponse, HttpError> {
        let Network { mut stall_limit, mut retry_limit, mut is_shortened, .. } = self.network;
        let (mut shortest, mut until) = (SHORTEST, None);
        if let Some(since) = *self.outage.silent_since() {
            // The retry limit was used up before, and a rollback must not use it up once more.
            let short = SILENT.min(retry_limit / 4);
            (stall_limit, retry_limit, is_shortened) = (stall_limit.min(SILENT), short, true);
            (shortest, until) = (short.max(SHORTEST), Some(since + short));
        }
        let asked = format!("{} {}", request.method(), without_query(&request.uri().to_string()));
        let (mut pause, mut is_first) = (PAUSE.0, true);
        let began = Instant::now();
        loop {
            let (moved, sent) = (Moved::now(), Moved::now());
            let left = until.map(|until: Instant| until.saturating_duration_since(Instant::now()).max(shortest));
            let stall_limit = stall_limit.min(left.unwrap_or(stall_limit));
            let answer_limit = left.unwrap_or_else(|| retry_limit.max(stall_limit));
            let tried = self.try_once((request.clone(), content), (&moved, &sent), stall_limit, answer_limit).await;
            // The retry clock starts when the first attempt has sent its last piece.
            let until = *until.get_or_insert_with(|| sent.last() + retry_limit);
            // The last attempt is made when the limit ends.
            let left = until.saturating_duration_since(Instant::now());
            let is_over = left.is_zero();
            let why = match tried {
                Ok((answer, false)) => {
                    self.outage.log.end();
                    return Ok(self.heard(answer));
                }
                Ok((answer, true)) if is_over => return Ok(self.heard(answer)),
                Ok((answer, true)) => format!("the server answers {}", answer.status()),
                Err(Failure::Final(why)) => return Err(error(why)),
                Err(Failure::Transient(why)) if is_over => {
                    self.outage.silent_since().get_or_insert_with(Instant::now);
                    let tried = if is_first {
                        String::new()
                    } else {
                        format!("; tried for {}", shown(began.elapsed(), is_shortened))
                    };
                    return Err(error(format!("{why}{tried}")));
                }
                Err(Failure::Transient(why)) => why,
            };
            if self.outage.log.is_due(Instant::now()) {
                let left = shown(left, is_shortened);
                tracing::warn!("no good answer to {asked} yet: {why}; trying again for {left}");
            } else {
                tracing::debug!("no good answer to {asked} yet: {why}; trying again");
            }
            is_first = false;
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    fn heard(&self, answer: HttpResponse) -> HttpResponse {
        *self.outage.silent_since() = None;
        answer
    }

    /// Sends a request once. Returns the response, and whether it reports a transient error. Fails after `stall_limit`
    /// without progress, or if the response is not complete `answer_limit` after the request was `sent`.
    async fn try_once(
        &self,
        (request, content): (HttpRequest, Option<&Slice>),
        (moved, sent): (&Moved, &Moved),
        stall_limit: Duration,
        answer_limit: Duration,
    ) -> Result<(HttpResponse, bool), Failure> {
        let mut exchange = std::pin::pin!(self.exchange(request, content, moved, sent));
        loop {
            let left = stall_limit.saturating_sub(moved.last().elapsed());
            let left = left.min(answer_limit.saturating_sub(sent.last().elapsed()));
            if let Ok(done) = tokio::time::timeout(left, &mut exchange).await {
                return done;
            }
            if moved.last().elapsed() >= stall_limit {
                let seconds = stall_limit.as_secs();
                return Err(Failure::Transient(format!("no progress for {seconds} s (IMS_STALL_LIMIT)")));
            }
            if sent.last().elapsed() >= answer_limit {
                let seconds = answer_limit.as_secs();
                return Err(Failure::Transient(format!("the answer had not ended after {seconds} s")));
            }
        }
    }

    async fn exchange(
        &self,
        request: HttpRequest,
        content: Option<&Slice>,
        moved: &Moved,
        sent: &Moved,
    ) -> Result<(HttpResponse, bool), Failure> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string().parse().map_err(|e| Failure::Final(format!("{e}")))?;
        let is_post = parts.method == Method::POST;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        let progress = [moved.clone(), sent.clone()];
        *request.body_mut() = Some(match (content, body.as_bytes()) {
            (Some(content), _) => reqwest::Body::wrap(Streamed { content: content.clone(), progress }),
            (None, Some(bytes)) => bytes.clone().into(),
            (None, None) => reqwest::Body::wrap(Watched { body, piece: Bytes::new(), progress }),
        });
        let failed = |e: reqwest::Error| {
            let is_final = e.is_redirect() || e.is_builder() || is_unreadable(&e);
            let why = in_full(&e.without_url());
            if is_final { Failure::Final(why) } else { Failure::Transient(why) }
        };
        let mut response = self.client.execute(request).await.map_err(failed)?;
        moved.again();
        let status = response.status();
        let limit = if status.is_success() { LONGEST } else { MOST_COMPLAINED };
        let mut text = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(failed)? {
            moved.again();
            let fits = piece.len().min(limit - text.len());
            text.extend_from_slice(&piece[..fits]);
            if fits == piece.len() {
                // Lets the signal check run even if data arrives faster than it is read.
                tokio::task::yield_now().await;
            } else if status.is_success() {
                return Err(Failure::Final(format!("{ANSWERED} is longer than {} MiB", limit >> 20)));
            } else {
                break;
            }
        }
        // The crate would reject an error page that is truncated within a character.
        let text = if status.is_success() { text } else { String::from_utf8_lossy(&text).into_owned().into_bytes() };
        // S3 reports some errors after it has sent the status 200 (CompleteMultipartUpload).
        let is_late = status.is_success()
            && is_post
            && [&b"InternalError"[..], b"SlowDown"].iter().any(|word| holds(&text, word));
        let is_altered = status == StatusCode::BAD_REQUEST && holds(&text, ALTERED);
        let mut answer = HttpResponse::new(HttpResponseBody::from(text));
        *answer.status_mut() = status;
        *answer.headers_mut() = response.headers().clone();
        Ok((answer, is_transient(status) || is_late || is_altered))
    }
}

impl HttpService for Requests {
    // The signature that async_trait generates.
    fn call<'a, 'call>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'call>>
    where
        'a: 'call,
        Self: 'call,
    {
        Box::pin(self.send(request, None))
    }
}

fn holds(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

/// Describes the time for which a request is retried, with the variable that sets it unless the time is shortened.
fn shown(limit: Duration, is_shortened: bool) -> String {
    let variable = if is_shortened { "" } else { " (IMS_RETRY_LIMIT)" };
    format!("{} s{variable}", limit.as_secs_f64().round())
}

fn error(why: String) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, io::Error::other(why))
}

/// Body of a request that records its progress.
struct Watched {
    body: HttpRequestBody,
    /// Rest of the current frame.
    piece: Bytes,
    progress: [Moved; 2],
}

impl Body for Watched {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        self.progress.iter().for_each(Moved::again);
        if self.piece.is_empty() {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => self.piece = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                other => return other,
            }
        }
        let length = self.piece.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.piece.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.piece.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.piece.len() as u64 + self.body.size_hint().lower())
    }
}

/// A part of a file.
#[derive(Debug, Clone)]
pub(crate) struct Slice {
    pub(crate) file: Arc<File>,
    /// Offset at which the part begins, in bytes.
    pub(crate) at: u64,
    /// Length in bytes.
    pub(crate) length: u64,
}

impl Slice {
    /// Reads the next piece, of at most `most` bytes, and removes it from the slice.
    fn next(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.length).map_or(most, |length| length.min(most));
        let mut piece = vec![0; length];
        self.file.read_exact_at(&mut piece, self.at)?;
        self.at += length as u64;
        self.length -= length as u64;
        Ok(piece)
    }

    /// Reads the whole slice.
    pub(crate) fn read(mut self) -> io::Result<Vec<u8>> {
        self.next(usize::MAX)
    }
}

/// Body of a request that is read from a file while it is sent.
struct Streamed {
    content: Slice,
    progress: [Moved; 2],
}

/// Error: the content of a request cannot be read.
#[derive(Debug)]
struct Unreadable(io::Error);

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot read the file to upload: {}", self.0)
    }
}

impl std::error::Error for Unreadable {}

fn is_unreadable(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(this) = cause {
        if this.is::<Unreadable>() {
            return true;
        }
        cause = this.source();
    }
    false
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = Unreadable;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unreadable>>> {
        self.progress.iter().for_each(Moved::again);
        if self.content.length == 0 {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(self.content.next(PIECE).map(|piece| Frame::data(piece.into())).map_err(Unreadable)))
    }

    fn is_end_stream(&self) -> bool {
        self.content.length == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.content.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn retry_limit_is_named_only_where_it_applies() {
        let limit = Duration::from_secs(10);
        assert_eq!([false, true].map(|short| shown(limit, short)), ["10 s (IMS_RETRY_LIMIT)", "10 s"]);
    }

    /// Some stores keep a response open by sending blanks while they complete an upload.
    #[test]
    fn answer_that_never_ends_is_aborted_at_the_retry_limit() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/key", server.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut client in server.incoming().flatten() {
                std::thread::spawn(move || {
                    let _ = client.read(&mut [0; 4096]);
                    let _ = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
                    while client.write_all(b" ").is_ok() {
                        std::thread::sleep(Duration::from_millis(100));
                    }
                });
            }
        });
        let network = Network {
            stall_limit: Duration::from_secs(1),
            retry_limit: Duration::from_secs(2),
            is_shortened: false,
            ca: None,
        };
        let requests = Requests::new(reqwest::Client::new(), network, Arc::default());
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = url.parse().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let began = Instant::now();
        let answer = runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), requests.send(request, None)).await });
        let error = in_full(&answer.expect("the request ends by itself").unwrap_err());
        assert!(error.contains("the answer had not ended after 2 s"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    }

    #[test]
    fn file_that_is_cut_off_meanwhile_ends_its_request_at_once() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/key", server.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut client in server.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut client, &mut std::io::sink()));
            }
        });
        let network = Network {
            stall_limit: Duration::from_mins(1),
            retry_limit: Duration::from_mins(1),
            is_shortened: false,
            ca: None,
        };
        let requests = Requests::new(reqwest::Client::new(), network, Arc::default());
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = Method::PUT;
        *request.uri_mut() = url.parse().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(100_000).unwrap();
        let content = Slice { file: file.into(), at: 50_000, length: 1_000_000 };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let sent = async {
            let sent = requests.send(request, Some(&content));
            tokio::time::timeout(Duration::from_secs(20), sent).await
        };
        let error = in_full(&runtime.block_on(sent).expect("the request ends by itself").unwrap_err());
        assert!(error.contains("cannot read the file to upload: "), "{error}");
    }
}
