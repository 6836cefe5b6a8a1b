//! A file from a server: streamed to disk, resumed where a connection broke, its checksum taken on the way.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use md5::{Digest, Md5};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, IF_MATCH, RANGE};

use crate::error::{Attempt, Error, Result};
use crate::publish::progress::Progress;
use crate::publish::work::{Fault, Work, in_full, is_passing, patiently, without_query};

/// A connection that brings less than this within the stall limit is one that stalls. What has come further by as much than ever before
/// begins the time for further tries anew.
const LEAST: u64 = 64 * 1024;

/// One file on its way.
struct Download<'a> {
    work: &'a Work,
    url: &'a str,
    file: File,
    /// What has come of it.
    length: u64,
    sum: Md5,
    /// What it comes to, once the server has said so.
    total: Option<u64>,
    /// The server's mark of its content.
    etag: Option<String>,
    /// Whether the mark can be the content's MD5.
    etag_is_md5: bool,
    progress: Progress,
}

/// Fetches `url` to `path`. `md5` is what it has to come to; `copies` how often its size has to fit on the disk.
pub fn fetch(work: &Work, url: &str, md5: Option<&str>, path: &Path, copies: u64) -> Result<()> {
    let shown = without_query(url);
    let attempted = format!("fetch {shown}");
    // An image holds its /etc/shadow.
    let mut open = File::options();
    let file = open
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .attempt(|| format!("create {}", path.display()))?;
    let mut download = Download {
        work,
        url,
        file,
        length: 0,
        sum: Md5::new(),
        total: None,
        etag: None,
        etag_is_md5: false,
        progress: Progress::begin("fetching", None),
    };
    let mut reached = 0;
    work.wait(async {
        loop {
            let result = patiently(work.network.retry_limit, &attempted, async || {
                match download.go_on(path, copies).await {
                    // The patience of another round.
                    Err(Fault::Passing(cause)) if download.length >= reached + LEAST => {
                        reached = download.length;
                        tracing::warn!("cannot {attempted} yet: {cause}; going on at {} bytes", download.length);
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
    download.check(md5).map_err(|why| Error::new(attempted).because(why))?;
    tracing::info!(bytes = download.length, "fetched {shown}");
    download.file.sync_all().attempt(|| format!("write {}", path.display()))
}

impl Download<'_> {
    /// One request, from where the last one ended.
    async fn go_on(&mut self, path: &Path, copies: u64) -> std::result::Result<(), Fault> {
        let mut request = self.work.client()?.get(self.url);
        if self.length > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.length));
            if let Some(etag) = &self.etag {
                request = request.header(IF_MATCH, etag);
            }
        }
        let mut response = request.send().await?;
        let status = response.status();
        match status {
            StatusCode::OK => self.begin_anew()?,
            StatusCode::PARTIAL_CONTENT if starts_at(response.headers(), self.length) => {}
            StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT => {
                self.begin_anew()?;
                return Err(Fault::Passing("it has changed on the server; beginning again".into()));
            }
            _ => {
                let said = response.text().await.unwrap_or_default();
                let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
                let cause = format!("the server answers {status} {}", said.chars().take(300).collect::<String>());
                let cause = cause.trim().to_owned();
                return Err(if is_passing(status) {
                    Fault::Passing(cause)
                } else {
                    Fault::Final(Error::new(format!("fetch {}", without_query(self.url))).because(cause))
                });
            }
        }
        if status == StatusCode::OK {
            let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
            self.etag = header(ETAG.as_str());
            // With keys of the store's own the mark is something else.
            self.etag_is_md5 = header("x-amz-server-side-encryption").is_none();
            self.total = response.content_length();
            if let Some(total) = self.total {
                self.progress.expect(total);
                check_space(path, total.saturating_mul(copies))?;
            }
        }
        let window = self.work.network.stall_limit;
        let (mut since, mut there) = (Instant::now(), self.length);
        loop {
            if since.elapsed() >= window {
                let brought = self.length - there;
                if brought < LEAST {
                    let slow = format!("{brought} bytes within {} s (IMS_STALL_LIMIT)", window.as_secs());
                    return Err(Fault::Passing(slow));
                }
                (since, there) = (Instant::now(), self.length);
            }
            let left = window.saturating_sub(since.elapsed());
            let Ok(chunk) = tokio::time::timeout(left, response.chunk()).await else { continue };
            let Some(chunk) = chunk.map_err(|e| Fault::Passing(in_full(&e)))? else { break };
            self.file.write_all(&chunk).attempt(|| format!("write {}", path.display()))?;
            self.sum.update(&chunk);
            self.length += chunk.len() as u64;
            self.progress.at(self.length);
            if self.total.is_some_and(|total| self.length > total) {
                let longer =
                    Error::new(format!("fetch {}", without_query(self.url))).because("it is longer than it said");
                return Err(Fault::Final(longer));
            }
        }
        match self.total {
            Some(total) if self.length < total => Err(Fault::Passing(format!("{} of {total} bytes came", self.length))),
            _ => Ok(()),
        }
    }

    fn begin_anew(&mut self) -> Result<()> {
        (self.length, self.total, self.etag) = (0, None, None);
        self.sum.reset();
        self.file.set_len(0).and_then(|()| self.file.rewind()).attempt(|| "begin the file again")
    }

    fn check(&self, md5: Option<&str>) -> std::result::Result<(), String> {
        let sum = format!("{:x}", self.sum.clone().finalize());
        let etag = self.etag.as_deref().map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let from_etag = etag.filter(|e| self.etag_is_md5 && e.len() == 32 && e.bytes().all(|b| b.is_ascii_hexdigit()));
        match md5.or(from_etag) {
            Some(expected) if !expected.eq_ignore_ascii_case(&sum) => {
                Err(format!("its MD5 is {sum}, expected {expected}"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a partial answer begins at `length`.
fn starts_at(headers: &HeaderMap, length: u64) -> bool {
    let range = headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
    range.and_then(|r| r.strip_prefix("bytes ")?.split('-').next()?.parse().ok()) == Some(length)
}

/// Refuses what will not fit.
fn check_space(path: &Path, needed: u64) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let attempted = || format!("put {needed} bytes into {}", folder.display());
    let disk = rustix::fs::statvfs(folder).attempt(attempted)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < needed {
        return Err(Error::new(attempted()).because(format!("{free} are free")).advise("give the volume more space"));
    }
    Ok(())
}
