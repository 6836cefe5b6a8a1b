//! Client of IMS for one job: reports the job's status, and registers its image.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode, Url};
use serde::de::{DeserializeOwned, Deserializer as _, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::error::{Attempt, Error, Result};
use crate::ims::id::Id;
use crate::ims::place::Place;
use crate::ims::problem::reason;
use crate::ims::records::{Image, Job, Link, NewImage, REQUEST, Record, Status};
use crate::log::redaction;
use crate::transfer::network::is_header_word;
use crate::transfer::{
    Fault, MOST_QUOTED, Outage, SHORTEST, Work, complaint, is_transient, retry, whole, without_query,
};

/// Client of IMS. Without an IMS, every call returns `None`.
pub(crate) struct Ims<'a> {
    /// Sends requests, until a signal arrives.
    pub(crate) work: &'a Work,
    place: Option<Place>,
    job: Option<Id>,
    token: RefCell<Option<Token>>,
    /// True if image records can hold the ID of the request that created them.
    takes_metadata: Cell<bool>,
    /// True if a request to create a record may have reached IMS.
    has_asked: Cell<bool>,
    /// True if IMS has no record of the job.
    lacks_job: Cell<bool>,
    outage: Outage,
    /// Timeout of the next request.
    timeout: Cell<Duration>,
}

/// Result of a request that may be retried.
type Tried<T> = std::result::Result<T, Fault>;

/// Statuses with which an IMS refuses fields that it does not know.
const REFUSED_FIELDS: [StatusCode; 2] = [StatusCode::UNPROCESSABLE_ENTITY, StatusCode::BAD_REQUEST];

struct Token {
    bearer: String,
    until: Instant,
}

/// Response of an OAuth server (RFC 6749, 5.1).
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenAnswer {
    access_token: Option<String>,
    /// Lifetime of the token, in seconds; some servers send it as text.
    expires_in: Value,
}

/// Remaining lifetime below which a token is replaced.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);

/// Maximum time for which a token is kept, in seconds.
const LONGEST_LIFE: u64 = 24 * 60 * 60;

/// Maximum length of a token response, in bytes.
const LONGEST_TOKEN: usize = 1 << 20;
/// Maximum length of a record, in bytes.
const LONGEST_RECORD: usize = 4 << 20;
/// Maximum length of the list of all images, in bytes. A large site has tens of thousands of images.
const LONGEST_LIST: usize = 128 << 20;

/// Timeout of one request.
const REQUEST_LIMIT: Duration = Duration::from_mins(1);

impl<'a> Ims<'a> {
    /// Client for the job `job` of the IMS at `place`. Warns if credentials are sent without encryption.
    pub(crate) fn of(work: &'a Work, place: Option<&Place>, job: Option<&str>) -> Self {
        place.map(Place::in_clear).into_iter().flatten().for_each(|warning| tracing::warn!("{warning}"));
        Self {
            work,
            place: place.cloned(),
            job: job.and_then(Id::parse),
            token: RefCell::default(),
            takes_metadata: Cell::new(true),
            has_asked: Cell::new(false),
            lacks_job: Cell::new(false),
            outage: Outage::default(),
            timeout: Cell::new(REQUEST_LIMIT),
        }
    }

    /// Returns whether there is an IMS.
    pub(crate) fn is_there(&self) -> bool {
        self.place.is_some()
    }

    /// Returns whether a request to create a record may have reached IMS. If not, no record was created.
    pub(crate) fn has_asked(&self) -> bool {
        self.has_asked.get()
    }

    /// Returns whether image records can hold the ID of the request that created them.
    pub(crate) fn takes_metadata(&self) -> bool {
        self.takes_metadata.get()
    }

    /// Returns whether IMS has answered that the job does not exist.
    pub(crate) fn lacks_job(&self) -> bool {
        self.lacks_job.get()
    }

    /// Checks that IMS answers and accepts the credentials. Logs the ID that it asks for, so that a person who finds
    /// the request in IMS's log knows its origin.
    pub(crate) fn check(&self) -> Result<()> {
        let (Some(place), id) = (&self.place, Id::random()?) else { return Ok(()) };
        let attempted = format!("check that IMS answers, by a request for image {id}, which does not exist");
        self.call(&attempted, async || {
            self.request(&attempted, &Method::GET, &["images", id.as_str()], None).await.map(|_| ())
        })?;
        let url = without_query(&place.url);
        tracing::info!("IMS at {url} answers to a probe, a request for image {id}, which does not exist");
        Ok(())
    }

    /// Sets the job's status. If IMS has answered before that the job does not exist, the same answer is no error now.
    pub(crate) fn set_status(&self, status: Status) -> Result<Option<Job>> {
        let Some(job) = self.job.as_ref().filter(|_| self.is_there()) else { return Ok(None) };
        let attempted = format!("set the job's status to {status} in IMS (job {job})");
        let body = json!({ "status": status });
        let was_missing = self.lacks_job.take();
        let answer = self.call_for_record(&attempted, ["jobs", job.as_str()], Some(&body), |record: &Job| {
            (record.status != status).then(|| format!("status {}", record.status))
        });
        if was_missing && self.lacks_job() {
            return Ok(None);
        }
        let answer = answer?;
        tracing::info!("the job's status is {status}");
        Ok(answer)
    }

    /// Reads the job's record; `None` without a job or an IMS. A job that does not exist is an error.
    pub(crate) fn job(&self) -> Result<Option<Job>> {
        let Some(job) = &self.job else { return Ok(None) };
        let attempted = format!("read the record of job {job} in IMS");
        self.call_for_record(&attempted, ["jobs", job.as_str()], None, |_| None)
    }

    /// Records `image` as the result of the job.
    pub(crate) fn set_resultant_image(&self, image: &Id) -> Result<Option<Job>> {
        let Some(job) = &self.job else { return Ok(None) };
        let body = json!({ "resultant_image_id": image });
        let attempted = format!("set the resultant image of job {job} in IMS to {image}");
        self.call_for_record(&attempted, ["jobs", job.as_str()], Some(&body), |record: &Job| {
            let told = record.resultant_image_id.as_deref();
            (told != Some(image.as_str())).then(|| format!("resultant_image_id {}", told.unwrap_or("null")))
        })
    }

    /// Finds the image record that `request` created, if the response was lost with a connection or in a crash. An
    /// equal name would prove nothing, because another job may register the same name at the same time.
    pub(crate) fn find_image(&self, request: &Id) -> Result<Option<Image>> {
        self.call(LIST, async || self.find(request).await)
    }

    async fn find(&self, request: &Id) -> Tried<Option<Image>> {
        let Some(text) = self.request(LIST, &Method::GET, &["images"], None).await? else { return Ok(None) };
        let found = made_by(&text, request, || self.work.heed().is_ok()).attempt(|| LIST);
        // If a signal arrives, the parser ends with an error of its own, so check for a signal before using the result.
        self.work.heed()?;
        Ok(found?)
    }

    /// Creates the record of a new image. If a response was lost, only a record that names `request` is taken for the
    /// new one.
    pub(crate) fn create_image(&self, name: &str, arch: &str, request: &Id) -> Result<Image> {
        let attempted = format!("register the image '{name}' in IMS");
        let created = self.call(&attempted, async || {
            // Only records with metadata say which request created them.
            if self.has_asked()
                && self.takes_metadata()
                && let Some(record) = self.find(request).await?
            {
                return Ok(Some(record));
            }
            let metadata = self.takes_metadata().then(|| BTreeMap::from([(REQUEST, request)]));
            let body = NewImage { name, arch, metadata };
            let answer = self.request(&attempted, &Method::POST, &["images"], Some(json_of(&body))).await?;
            // Fail without a retry, because the record may have been created.
            let read = |text: Vec<u8>| serde_json::from_slice(&text).attempt(|| attempted.clone());
            Ok(answer.map(read).transpose()?)
        })?;
        created.ok_or_else(|| Error::new(attempted).because("IMS is not configured"))
    }

    /// Refuses a record that `request` cannot have created just now for an image called `name`: publishing with that
    /// record would overwrite another image.
    pub(crate) fn refuse_foreign(&self, record: &Image, name: &str, request: &Id) -> Result<()> {
        let why = if record.link.is_some() {
            "it has a link already".to_owned()
        } else if record.name != name {
            format!("its name is {:?}", record.name)
        } else if self.takes_metadata() && !record.was_made_by(request) {
            format!("its metadata does not say that it was made by this request ({REQUEST})")
        } else {
            return Ok(());
        };
        let refused = Error::new(format!("register the image '{name}'"));
        Err(refused
            .because(format!("IMS answers with a record of another image, {}: {why}", record.id))
            .advise("nothing was written to it; see what answers at IMS_URL"))
    }

    /// Reads an image's record; `None` if there is none.
    pub(crate) fn image(&self, id: &Id) -> Result<Option<Image>> {
        let attempted = format!("read the record of image {id} in IMS");
        self.call(&attempted, async || {
            self.request(&attempted, &Method::GET, &["images", id.as_str()], None)
                .await?
                .map(|text| record_of(&text))
                .transpose()
        })
    }

    /// Sets the manifest link in an image's record.
    pub(crate) fn link_image(&self, id: &Id, link: &Link) -> Result<Option<Image>> {
        let attempted = "set the manifest link in the IMS image record";
        let body = json!({ "link": link });
        self.call_for_record(attempted, ["images", id.as_str()], Some(&body), |record: &Image| match &record.link {
            Some(told) if told == link => None,
            told => Some(format!("link {}", json_of(told))),
        })
    }

    /// Deletes an image's record, if there is one.
    pub(crate) fn delete_image(&self, id: &Id) -> Result<()> {
        let attempted = format!("delete the record of image {id} in IMS");
        self.call(&attempted, async || {
            self.request(&attempted, &Method::DELETE, &["images", id.as_str()], None).await.map(|_| ())
        })
    }

    /// Reads the record at `path`, or sets the fields `set` in it. Refuses a record with another ID, and a record in
    /// which `contradiction` finds a value other than the one that was set. Tries again after a response without a
    /// record, which may come from a proxy.
    fn call_for_record<R: Record>(
        &self,
        attempted: &str,
        path: [&str; 2],
        set: Option<&Value>,
        contradiction: impl Fn(&R) -> Option<String>,
    ) -> Result<Option<R>> {
        let method = if set.is_some() { Method::PATCH } else { Method::GET };
        self.call(attempted, async || {
            let answer = self.request(attempted, &method, &path, set.map(Value::to_string)).await?;
            let Some(record) = answer.map(|text| record_of::<R>(&text)).transpose()? else { return Ok(None) };
            let told = if record.id().as_str() == path[1] {
                contradiction(&record).map(|told| format!("another value, {told}"))
            } else {
                Some(format!("the record of another ID, {}", record.id()))
            };
            let Some(told) = told else { return Ok(Some(record)) };
            let told: String = told.chars().take(MOST_QUOTED).collect();
            let refused = Error::new(attempted).because(format!("IMS answers with {told}"));
            Err(Fault::Final(refused.advise(SEE_IMS)))
        })
    }

    /// Retries `attempt` with backoff.
    fn call<T>(&self, attempted: &str, mut attempt: impl AsyncFnMut() -> Tried<T>) -> Result<T> {
        let (retry_limit, began) = (self.work.network.retry_limit, Instant::now());
        self.timeout.set(REQUEST_LIMIT);
        self.work.wait(retry(retry_limit, attempted, &self.outage, async || {
            let answer = attempt().await;
            // A retry must end when the time for retries is over.
            self.timeout.set(retry_limit.saturating_sub(began.elapsed()).clamp(SHORTEST, REQUEST_LIMIT));
            answer
        }))
    }

    /// Sends one request. Returns `None` without an IMS, and if the record to read or delete does not exist.
    async fn request(
        &self,
        attempted: &str,
        method: &Method,
        path: &[&str],
        body: Option<String>,
    ) -> Tried<Option<Vec<u8>>> {
        let Some(place) = &self.place else { return Ok(None) };
        let client = match place.socket() {
            Some(socket) => self.work.local(socket)?,
            None if *method == Method::GET => self.work.reader()?,
            None => self.work.sender()?,
        };
        let mut request = client.request(method.clone(), below(place.base(), path)?).timeout(self.timeout.get());
        if let Some(directory) = &place.oauth {
            request = request.bearer_auth(self.token(directory).await?);
        } else if let Some(file) = &place.token {
            request = request.bearer_auth(token_in(file)?);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await;
        let is_new = *method == Method::POST;
        if is_new && !response.as_ref().is_err_and(reqwest::Error::is_connect) {
            self.has_asked.set(true);
        }
        let response = response?;
        let status = response.status();
        if status.is_success() {
            let is_list = *method == Method::GET && path.len() == 1;
            return whole(response, if is_list { LONGEST_LIST } else { LONGEST_RECORD }).await.map(Some);
        }
        if status == StatusCode::NOT_FOUND && path[0] == "images" && [Method::GET, Method::DELETE].contains(method) {
            return Ok(None);
        }
        let cause = reason(status, &complaint(response).await);
        if let (StatusCode::NOT_FOUND, ["jobs", job]) = (status, path) {
            self.lacks_job.set(true);
            let missing = Error::new(format!("find job {job} in IMS at {}", without_query(&place.url))).because(cause);
            let advice = "see IMS_JOB_ID and IMS_URL; if the job was deleted, create a new one";
            return Err(Fault::Final(missing.advise(advice)));
        }
        if status == StatusCode::UNAUTHORIZED && self.token.take().is_some() {
            // The token has expired or was revoked; the next attempt gets a new one.
            return Err(Fault::Transient(cause));
        }
        if is_new && REFUSED_FIELDS.contains(&status) && self.takes_metadata.replace(false) {
            // In an older IMS, images have no metadata, so try again without metadata. If the response to that request
            // is lost, its record cannot be found again, and is left behind.
            return Err(Fault::Transient(cause));
        }
        Err(if is_transient(status) {
            Fault::Transient(cause)
        } else {
            Fault::Final(Error::new(attempted).because(cause))
        })
    }

    /// Gets an OAuth token by client credentials.
    async fn token(&self, directory: &Path) -> Tried<String> {
        if let Some(token) = self.token.borrow().as_ref().filter(|token| token.until > Instant::now()) {
            return Ok(token.bearer.clone());
        }
        let read = |name: &str| {
            let file = directory.join(name);
            let text = std::fs::read_to_string(&file).attempt(|| format!("read {}", file.display()))?;
            Ok::<_, Error>(text.trim().to_owned())
        };
        let (endpoint, id, secret) = (read("endpoint")?, read("client-id")?, read("client-secret")?);
        // The log masks the secret both as it is and as HTTP Basic encodes it.
        redaction::keep(&secret);
        redaction::keep(&format!("{id}:{secret}"));
        let request = self.work.sender()?.post(&endpoint).timeout(self.timeout.get()).basic_auth(id, Some(secret));
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let asked = Instant::now();
        let response = request.body("grant_type=client_credentials").send().await?;
        let status = response.status();
        let attempted = format!("get a token from {}", without_query(&endpoint));
        if !status.is_success() {
            let cause = reason(status, &complaint(response).await);
            let error = Error::new(attempted).because(&cause).advise("see the credentials in OAUTH_CONFIG_DIR");
            return Err(if is_transient(status) { Fault::Transient(cause) } else { Fault::Final(error) });
        }
        let text = whole(response, LONGEST_TOKEN).await?;
        let answer: TokenAnswer = serde_json::from_slice(&text).unwrap_or_default();
        let Some(bearer) = answer.access_token else {
            return Err(Fault::Final(Error::new(attempted).because("the answer has no access_token")));
        };
        if !is_header_word(&bearer) {
            let why = "the token in the answer holds spaces, newlines or other bytes that no header may hold";
            return Err(Fault::Final(Error::new(attempted).because(why).advise("see what answers at that URL")));
        }
        redaction::keep(&bearer);
        let seconds = answer.expires_in.as_u64().unwrap_or(60).min(LONGEST_LIFE);
        let lives = Duration::from_secs(seconds).saturating_sub(TOKEN_MARGIN);
        self.token.replace(Some(Token { bearer: bearer.clone(), until: asked + lives }));
        Ok(bearer)
    }
}

/// Reads the token in a file. This is done for each request, since the token may be replaced.
fn token_in(file: &Path) -> Result<String> {
    let attempted = || format!("read the token in {}", file.display());
    let text = std::fs::read_to_string(file).attempt(attempted)?;
    let token = text.trim();
    redaction::keep(token);
    if is_header_word(token) { Ok(token.to_owned()) } else { Err(Error::new(attempted()).because("it holds no token")) }
}

/// Operation in error messages: "cannot read the records ...".
const LIST: &str = "read the records of all images in IMS";

/// Advice after a response that an IMS would not give.
const SEE_IMS: &str = "see what answers at IMS_URL";

/// Finds the record that `request` created in a list, keeping no other record in memory. `look` is called regularly,
/// and returns whether to continue.
fn made_by(list: &[u8], request: &Id, look: impl FnMut() -> bool) -> serde_json::Result<Option<Image>> {
    struct Records<'a, F>(&'a Id, F);
    impl<'de, F: FnMut() -> bool> Visitor<'de> for Records<'_, F> {
        type Value = Option<Image>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of records")
        }

        fn visit_seq<A: SeqAccess<'de>>(mut self, mut records: A) -> std::result::Result<Self::Value, A::Error> {
            let (mut found, mut read) = (None, 0);
            while let Some(record) = records.next_element::<&RawValue>()? {
                let record = record.get();
                read += record.len();
                if read > LOOK_EVERY {
                    read = 0;
                    if !(self.1)() {
                        return Err(A::Error::custom("interrupted"));
                    }
                }
                if found.is_none() && record.len() <= LONGEST_RECORD && record.contains(self.0.as_str()) {
                    found = serde_json::from_str(record).ok().filter(|record: &Image| record.was_made_by(self.0));
                }
            }
            Ok(found)
        }
    }
    serde_json::Deserializer::from_slice(list).deserialize_seq(Records(request, look))
}

/// Parses a record. A response without one is a transient error.
fn record_of<R: DeserializeOwned>(text: &[u8]) -> Tried<R> {
    serde_json::from_slice(text).map_err(|cause| {
        let cause: String = cause.to_string().chars().take(MOST_QUOTED).collect();
        Fault::Transient(format!("the answer of IMS is not the expected record ({cause}); {SEE_IMS}"))
    })
}

fn json_of(value: &impl Serialize) -> String {
    json!(value).to_string()
}

/// Number of bytes of a list that are read between two checks for signals.
const LOOK_EVERY: usize = 1 << 20;

/// URL of `path` below `base`. Each name is escaped into one segment.
fn below(base: &str, path: &[&str]) -> Result<Url> {
    let attempted = || format!("use the URL {base}");
    let mut url = Url::parse(base).attempt(attempted)?;
    url.path_segments_mut()
        .map_err(|()| Error::new(attempted()).because("it has no path"))?
        .pop_if_empty()
        .extend(path);
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_in_a_path_becomes_one_segment() {
        let url = |path: &[&str]| below("http://ims/apis/ims", path).unwrap().to_string();
        assert_eq!(url(&["images", "46a2731e"]), "http://ims/apis/ims/images/46a2731e");
        assert_eq!(below("http://ims/", &["jobs"]).unwrap().as_str(), "http://ims/jobs");
        assert_eq!(url(&["images", "../../smd?a#b"]), "http://ims/apis/ims/images/..%2F..%2Fsmd%3Fa%23b");
        assert!(!url(&["images", ".."]).contains(".."));
    }

    #[test]
    fn record_is_found_in_a_list_by_its_request_only() {
        let request = Id::random().unwrap();
        let ours = json!({"id": Id::random().unwrap(), "link": null, "name": "a", "metadata": {REQUEST: request}});
        let named = json!({"id": Id::random().unwrap(), "name": request, "metadata": {"x": request}});
        let found = |list: &str| {
            let found = made_by(list.as_bytes(), &request, || true).map_err(|e| e.to_string());
            found.map(|found| found.map(|image| json!(image)))
        };
        assert_eq!(found(&json!([named, null, [request.as_str()], ours, 1]).to_string()), Ok(Some(ours.clone())));
        assert_eq!(found(&json!([named]).to_string()), Ok(None));
        assert_eq!(found("[]"), Ok(None));
        for wrong in ["", "{}", "[{}", "null"] {
            assert!(found(wrong).is_err(), "{wrong}");
        }
        let long = format!("[{ours},{}0]", "\"12345678\",".repeat(400_000));
        let mut looks = 0;
        let count = || {
            looks += 1;
            looks < 3
        };
        assert!(made_by(long.as_bytes(), &request, count).unwrap_err().to_string().contains("interrupted"));
        assert_eq!(looks, 3);
    }
}
