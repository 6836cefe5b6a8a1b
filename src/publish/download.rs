//! Downloads a file: streams it to disk, resumes after a broken connection, and computes the checksum of the bytes as
//! they arrive.

use std::fs::File;
use std::io::{Seek, Write};
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{CONTENT_RANGE, DATE, ETAG, HeaderMap, IF_MATCH, LAST_MODIFIED, RANGE};
use reqwest::{StatusCode, Url};

use crate::error::{Attempt, Error, Result};
use crate::sys::tree::Tree;
use crate::transfer::checksum::{Expected, Sums, etag_is_md5, is_weak, text_of};
use crate::transfer::progress::Progress;
use crate::transfer::{Fault, Outage, Work, complaint, in_full, is_transient, retry, without_query};

/// Bytes that a connection must receive within the stall limit; with fewer, it has stalled. Progress of this many bytes
/// past the previous maximum restarts the retry clock.
const LEAST: u64 = 64 * 1024;

/// For a file whose length the server does not say: number of bytes between two checks of the disk, and number of bytes
/// that must stay free on the disk.
const WITHOUT_LENGTH: u64 = 16 << 20;

/// Download of one file.
struct Download<'a> {
    work: &'a Work,
    url: &'a str,
    file: File,
    /// Path of the file, for messages.
    path: String,
    /// Number of bytes received.
    length: u64,
    sums: Sums,
    /// Length of the whole file, once the server has said it.
    total: Option<u64>,
    etag: Option<String>,
    /// Last-Modified, as the server writes it.
    modified: Option<String>,
    /// True if the rest of the file may be requested separately: either a strong validator shows that the rest belongs
    /// to the same content, or a checksum will show it at the end.
    is_resumable: bool,
    /// True if a checksum is given.
    is_verified: bool,
    /// True if the ETag can be the content's MD5.
    etag_is_md5: bool,
    progress: Progress,
}

/// Fetches `url` into a new file `name` in a directory, replacing any other. Returns the open file, because `name` may
/// lead to another file by the time the caller uses it. The disk must have room for `copies` files of its size.
pub(crate) fn fetch(
    work: &Work,
    url: &str,
    expected: &Expected,
    directory: &Tree,
    name: &str,
    copies: u64,
) -> Result<File> {
    let shown = without_query(url);
    let attempted = format!("fetch {shown}");
    if url.starts_with("http://") && !expected.is_given() {
        tracing::warn!(
            "{shown} is fetched without TLS and without a checksum: anybody on the way can replace the image; use \
             https, or give its checksum (--sha256, DOWNLOAD_SHA256SUM)"
        );
    }
    let path = directory.shown().join(name).display().to_string();
    let file = directory.create_file(name).attempt(|| format!("create {path}"))?;
    let mut download = Download {
        work,
        url,
        file,
        path,
        length: 0,
        sums: Sums::with_md5(expected),
        total: None,
        etag: None,
        modified: None,
        is_resumable: false,
        is_verified: expected.is_given(),
        etag_is_md5: false,
        progress: Progress::begin("fetching", None),
    };
    let (mut reached, outage) = (0, Outage::default());
    work.wait(async {
        loop {
            let result = retry(work.network.retry_limit, &attempted, &outage, async || {
                match download.go_on(copies).await {
                    // The download made progress, so the retry clock restarts.
                    Err(Fault::Transient(cause)) if download.length >= reached + LEAST => {
                        reached = download.length;
                        tracing::warn!("cannot {attempted} yet: {cause}; received {reached} bytes, trying again");
                        Ok(false)
                    }
                    Err(fault) => Err(fault),
                    Ok(()) => Ok(true),
                }
            });
            if result.await? {
                return Ok(());
            }
        }
    })?;
    download.check(expected).map_err(|why| Error::new(attempted).because(why))?;
    tracing::info!(bytes = download.length, "fetched {shown}");
    download.file.sync_all().attempt(|| format!("write {}", download.path))?;
    Ok(download.file)
}

impl Download<'_> {
    /// Sends one request, for the bytes after those received so far.
    async fn go_on(&mut self, copies: u64) -> std::result::Result<(), Fault> {
        // If the download is not resumable, start over: the rest may belong to another file.
        if !self.is_resumable {
            if self.length > 0 {
                tracing::warn!(
                    "{} is fetched from the beginning: the server names no strong validator (ETag, or Last-Modified \
                     with Date), and no checksum is given (--sha256, DOWNLOAD_SHA256SUM)",
                    without_query(self.url)
                );
            }
            self.begin_anew()?;
        }
        let has_login = Url::parse(self.url).is_ok_and(|url| !url.username().is_empty() || url.password().is_some());
        let client = if has_login { self.work.reader()? } else { self.work.client()? };
        let mut request = client.get(self.url);
        if self.length > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.length));
            // A weak ETag never matches in If-Match (RFC 9110, 13.1.1), so it is compared with the response's ETag
            // below.
            if let Some(etag) = self.etag.as_ref().filter(|etag| !is_weak(etag)) {
                request = request.header(IF_MATCH, etag);
            }
        }
        let mut response = request.send().await?;
        let status = response.status();
        match status {
            StatusCode::OK => self.begin_anew()?,
            StatusCode::PARTIAL_CONTENT if self.length == 0 => {
                let part = Error::new(format!("fetch {}", without_query(self.url)));
                return Err(Fault::Final(
                    part.because(format!("the server answers {status} to a request for the whole file")),
                ));
            }
            StatusCode::PARTIAL_CONTENT if self.goes_on(response.headers()) => {}
            StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT => {
                self.begin_anew()?;
                return Err(Fault::Transient("it has changed on the server; starting again".into()));
            }
            _ => {
                let said = complaint(response).await;
                let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
                let cause = format!("the server answers {status} {}", said.chars().take(300).collect::<String>());
                let cause = cause.trim().to_owned();
                return Err(if is_transient(status) {
                    Fault::Transient(cause)
                } else {
                    Fault::Final(Error::new(format!("fetch {}", without_query(self.url))).because(cause))
                });
            }
        }
        if status == StatusCode::OK {
            self.etag = text_of(response.headers(), ETAG.as_str()).map(str::to_owned);
            self.modified = text_of(response.headers(), LAST_MODIFIED.as_str()).map(str::to_owned);
            let has_any = self.etag.is_some() || self.modified.is_some();
            self.is_resumable = has_strong_validator(response.headers()) || self.is_verified && has_any;
            self.etag_is_md5 = etag_is_md5(response.headers());
            self.total = response.content_length();
            if let Some(total) = self.total {
                self.progress.expect(total);
                check_space(&self.file, &self.path, total.saturating_mul(copies))?;
            }
        }
        let window = self.work.network.stall_limit;
        let (mut since, mut there) = (Instant::now(), self.length);
        loop {
            if since.elapsed() >= window {
                let brought = self.length - there;
                if brought < LEAST {
                    let slow = format!("only {brought} bytes within {} s (IMS_STALL_LIMIT)", window.as_secs());
                    return Err(Fault::Transient(slow));
                }
                (since, there) = (Instant::now(), self.length);
            }
            let left = window.saturating_sub(since.elapsed());
            let Ok(chunk) = tokio::time::timeout(left, response.chunk()).await else { continue };
            let Some(chunk) = chunk.map_err(|e| Fault::Transient(in_full(&e)))? else { break };
            self.file.write_all(&chunk).attempt(|| format!("write {}", self.path))?;
            self.sums.update(&chunk);
            let before = self.length;
            self.length += chunk.len() as u64;
            if self.total.is_none() && before / WITHOUT_LENGTH != self.length / WITHOUT_LENGTH {
                let copies = self.length.saturating_mul(copies.saturating_sub(1));
                check_space(&self.file, &self.path, WITHOUT_LENGTH.saturating_add(copies))?;
            }
            self.progress.at(self.length);
            // Lets the signal check run, as in `transfer::whole`.
            tokio::task::yield_now().await;
            if self.total.is_some_and(|total| self.length > total) {
                let longer = Error::new(format!("fetch {}", without_query(self.url)))
                    .because("it is longer than the server announced");
                return Err(Fault::Final(longer));
            }
        }
        match self.total {
            Some(total) if self.length < total => {
                Err(Fault::Transient(format!("only {} of {total} bytes were received", self.length)))
            }
            _ => Ok(()),
        }
    }

    fn begin_anew(&mut self) -> Result<()> {
        (self.length, self.total, self.etag, self.modified) = (0, None, None, None);
        self.is_resumable = false;
        self.sums.reset();
        self.file.set_len(0).and_then(|()| self.file.rewind()).attempt(|| format!("truncate {}", self.path))
    }

    /// Returns whether a partial response continues the same content, and its end is known.
    fn goes_on(&mut self, headers: &HeaderMap) -> bool {
        // A partial response has all headers of the whole one (RFC 9110, 15.3.7).
        let is_same_tag = text_of(headers, ETAG.as_str()) == self.etag.as_deref();
        let is_same = match &self.etag {
            Some(etag) if !is_weak(etag) => is_same_tag,
            _ => is_same_tag && text_of(headers, LAST_MODIFIED.as_str()) == self.modified.as_deref(),
        };
        let Some((start, total)) = text_of(headers, CONTENT_RANGE.as_str()).and_then(range) else { return false };
        let fits = total.is_none() || self.total.is_none() || total == self.total;
        self.total = self.total.or(total);
        is_same && fits && start == self.length && self.total.is_some()
    }

    fn check(&self, expected: &Expected) -> std::result::Result<(), String> {
        let etag = self.etag.as_deref().map(|etag| etag.trim_matches('"')).filter(|_| self.etag_is_md5);
        let md5 = expected.md5.clone().or_else(|| etag.map(str::to_owned));
        self.sums.check(&Expected { md5, sha256: expected.sha256.clone() })
    }
}

/// A file that was changed at least this long before the response does not change again within the second that its
/// Last-Modified names, even if the two clocks differ (RFC 9110, 8.8.2.2; RFC 7232 names this time).
const LONG_AGO: Duration = Duration::from_mins(1);

/// Returns whether any two responses with the same validators as this one have the same bytes (RFC 9110, 8.8.1).
fn has_strong_validator(headers: &HeaderMap) -> bool {
    if text_of(headers, ETAG.as_str()).is_some_and(|etag| !is_weak(etag)) {
        return true;
    }
    let [modified, answered] = [LAST_MODIFIED, DATE].map(|name| text_of(headers, name.as_str()).and_then(time_of));
    let age = modified.zip(answered).and_then(|(modified, answered)| answered.duration_since(modified).ok());
    age.is_some_and(|age| age >= LONG_AGO)
}

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Parses a date in the format that servers send, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7). The two obsolete
/// formats are not read.
fn time_of(text: &str) -> Option<SystemTime> {
    let fields: Vec<_> = text.split_once(", ")?.1.split(' ').collect();
    let [day, month, year, time, "GMT"] = fields[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    humantime::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")).ok()
}

/// Parses a Content-Range: start of the partial response, and length of the whole if given (RFC 9110, 14.4).
fn range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let start = range.split('-').next()?.parse().ok()?;
    Some((start, if total == "*" { None } else { Some(total.parse().ok()?) }))
}

/// Refuses a download that does not fit on the disk.
fn check_space(file: &File, path: &str, needed: u64) -> Result<()> {
    let attempted = || format!("find {needed} bytes of free space for {path}");
    let disk = rustix::fs::fstatvfs(file).attempt(attempted)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < needed {
        return Err(Error::new(attempted())
            .because(format!("only {free} bytes are free for the download and what is unpacked from it"))
            .advise("give the volume more space"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use reqwest::header::HeaderName;

    #[test]
    fn validators_are_strong_as_rfc_9110_says() {
        let of = |headers: &[(&'static str, &'static str)]| {
            let pairs = headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
            has_strong_validator(&pairs.collect())
        };
        let modified = ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT");
        assert!(of(&[("etag", "\"1\"")]) && of(&[modified, ("date", "Sun, 06 Nov 1994 08:50:37 GMT")]));
        assert!(of(&[("etag", "W/\"1\""), modified, ("date", "Mon, 01 Jan 2024 00:00:00 GMT")]));
        assert!(!of(&[]) && !of(&[("etag", "W/\"1\"")]) && !of(&[modified]));
        for date in [
            "Sun, 06 Nov 1994 08:50:36 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:00:00 GMT",
            "Sunday, 06-Nov-95 08:49:37 GMT",
            "Mon, 06 Nov 1995 08:49:37 CET",
            "Mon, 31 Feb 1995 08:49:37 GMT",
            "Mon, ü",
            "",
        ] {
            assert!(!of(&[modified, ("date", date)]), "{date}");
        }
    }
}
