//! IMS: where jobs tell how far they are, and where images are registered.

use std::fmt;
use std::path::Path;
use std::sync::Once;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode, Url};
use serde::Deserializer;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::error::{Attempt, Error, Result};
use crate::ims::id::Id;
use crate::ims::place::Place;
use crate::log::redaction;
use crate::transfer::MOST_QUOTED;
use crate::transfer::SHORTEST;
use crate::transfer::network::is_header_word;
use crate::transfer::{Fault, Work, complaint, is_transient, retry, whole, without_query};

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// The image is fetched and opened.
    FetchingImage,
    /// sshd accepts connections.
    WaitingOnUser,
    /// The image is packed and uploaded.
    PackagingArtifacts,
    /// There is no new image.
    Error,
    /// There is a new image.
    Success,
}

impl Status {
    /// As IMS names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::FetchingImage => "fetching_image",
            Self::WaitingOnUser => "waiting_on_user",
            Self::PackagingArtifacts => "packaging_artifacts",
            Self::Error => "error",
            Self::Success => "success",
        }
    }
}

/// A job's end of IMS; every call says nothing where there is none.
pub(crate) struct Ims<'a> {
    work: &'a Work,
    at: Option<Place>,
    job: Option<Id>,
    token: Option<Token>,
    /// True if an image's record can tell by which request it was made.
    takes_metadata: bool,
    /// True if a request for a record may have reached IMS.
    has_asked: bool,
    /// How long the next request may take.
    limit: Duration,
}

/// Key of an image's metadata: the request that its record was made by.
const REQUEST: &str = "ims-sshd-request";

/// Answers of an IMS that does not know a field.
const REFUSED_FIELDS: [StatusCode; 2] = [StatusCode::UNPROCESSABLE_ENTITY, StatusCode::BAD_REQUEST];

struct Token {
    bearer: String,
    until: Instant,
}

/// A token is not used in its last moments.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);

/// A token is asked for again at least as often, in seconds.
const LONGEST_LIFE: u64 = 24 * 60 * 60;

/// Limits of answers, in bytes: of a token, of a record, and of the list of all images, of which a large site has tens of thousands.
const LONGEST_TOKEN: usize = 1 << 20;
const LONGEST_RECORD: usize = 4 << 20;
const LONGEST_LIST: usize = 128 << 20;

/// For one request of a few bytes with its answer.
const REQUEST_LIMIT: Duration = Duration::from_mins(1);

impl<'a> Ims<'a> {
    /// The end of the job of this id at `place`.
    pub(crate) fn of(work: &'a Work, place: Option<&Place>, job: Option<&str>) -> Self {
        static WARNING: Once = Once::new();
        if let Some(place) = place {
            WARNING.call_once(|| place.in_clear().iter().for_each(|warning| tracing::warn!("{warning}")));
        }
        Self {
            work,
            at: place.cloned(),
            job: job.and_then(Id::parse),
            token: None,
            takes_metadata: true,
            has_asked: false,
            limit: REQUEST_LIMIT,
        }
    }

    /// Whether there is one.
    pub(crate) fn is_there(&self) -> bool {
        self.at.is_some()
    }

    /// Returns whether a request for an image's record may have reached IMS. False means that there is none.
    pub(crate) fn has_asked(&self) -> bool {
        self.has_asked
    }

    /// Returns whether a record of an image tells by which request it was made.
    pub(crate) fn takes_metadata(&self) -> bool {
        self.takes_metadata
    }

    /// Makes sure that IMS answers, and takes the credentials.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.image(&Id::random()?).map(|_| ())
    }

    /// Tells how far the job is.
    pub(crate) fn set_status(&mut self, status: Status) -> Result<Option<Value>> {
        let Some(job) = self.job.clone().filter(|_| self.is_there()) else { return Ok(None) };
        let attempted = format!("set the job's status to {} in IMS (job {job})", status.name());
        let body = json!({ "status": status.name() });
        let answer = self.call_for_record(&attempted, ["jobs", job.as_str()], Some(&body))?;
        tracing::info!("the job's status is {}", status.name());
        Ok(answer)
    }

    /// The job's record; nothing without a job.
    pub(crate) fn job(&mut self) -> Result<Option<Value>> {
        let Some(job) = self.job.clone() else { return Ok(None) };
        self.call_for_record(&format!("read the record of job {job} in IMS"), ["jobs", job.as_str()], None)
    }

    /// The new image is this job's.
    pub(crate) fn set_resultant_image(&mut self, image: &Id) -> Result<Option<Value>> {
        let Some(job) = self.job.clone() else { return Ok(None) };
        let body = json!({ "resultant_image_id": image.as_str() });
        let attempted = format!("set the resultant image of job {job} in IMS to {image}");
        self.call_for_record(&attempted, ["jobs", job.as_str()], Some(&body))
    }

    /// The record that was made by `request`, whose answer was lost to a connection or to a crash. A name proves nothing: another job may
    /// register one at the same moment.
    pub(crate) fn find_image(&mut self, request: &Id) -> Result<Option<Value>> {
        let attempted = "read the records of all images in IMS";
        let Some(text) = self.call_for_text(attempted, &Method::GET, &["images"], None)? else { return Ok(None) };
        let look = || self.work.heed().is_ok();
        let found = made_by(&text, request, look).attempt(|| attempted);
        // Its parser has another error for it.
        self.work.heed()?;
        found
    }

    /// The record of a new image, made by `request`. Where the answer is lost, a record that names this request is taken, and no other.
    pub(crate) fn create_image(&mut self, name: &str, arch: &str, request: &Id) -> Result<Value> {
        let attempted = format!("register the image '{name}' in IMS");
        let began = Instant::now();
        loop {
            let mut body = json!({ "name": name, "arch": arch });
            if self.takes_metadata {
                body["metadata"] = json!({ REQUEST: request.as_str() });
            }
            match self.call_once(&attempted, &Method::POST, &["images"], Some(&body))? {
                Ok(record) => return record.ok_or_else(|| Error::new(attempted).because("there is no record of it")),
                Err(cause) if began.elapsed() >= self.work.network.retry_limit => {
                    return Err(Error::new(attempted).because(cause));
                }
                Err(cause) => tracing::warn!("cannot {attempted} yet: {cause}; trying again"),
            }
            // Records without metadata do not tell by which request they were made.
            if self.takes_metadata
                && let Some(record) = self.find_image(request)?
            {
                return Ok(record);
            }
        }
    }

    /// Refuses a record of an image `name` that `request` cannot have made just now: what is published next would replace another's.
    pub(crate) fn refuse_foreign(&self, record: &Value, name: &str, request: &Id) -> Result<()> {
        let why = if record.get("link").is_some_and(|link| !link.is_null()) {
            "it has a link already".to_owned()
        } else if record["name"] != name {
            format!("its name is {}", record["name"])
        } else if self.takes_metadata && record["metadata"][REQUEST] != request.as_str() {
            format!("its metadata does not say that it was made by this request ({REQUEST})")
        } else {
            return Ok(());
        };
        let refused = Error::new(format!("register the image '{name}'"));
        Err(refused
            .because(format!("IMS answers with a record of another image, {}: {why}", record["id"]))
            .advise("nothing was written to it; see what answers at IMS_URL"))
    }

    /// Returns a part of a record that cannot be of the image `id`, which `request` has made, as far as that is known,
    /// and into which `link` was put.
    pub(crate) fn difference(record: &Value, id: &Id, request: Option<&Id>, link: Option<&Value>) -> Option<String> {
        let told = &record["link"];
        if record["id"] != id.as_str() {
            return Some(format!("its id is {}", record["id"]));
        }
        if request.is_some_and(|request| record["metadata"][REQUEST] != request.as_str()) {
            return Some(format!("its metadata does not say that it was made by this job's request ({REQUEST})"));
        }
        (!told.is_null() && !link.is_some_and(|link| is_same_link(told, link))).then(|| format!("its link is {told}"))
    }

    /// An image's record; nothing if there is none.
    pub(crate) fn image(&mut self, id: &Id) -> Result<Option<Value>> {
        self.call(&format!("read the record of image {id} in IMS"), &Method::GET, &["images", id.as_str()], None)
    }

    /// Puts content into an image's record.
    pub(crate) fn link_image(&mut self, id: &Id, link: &Value) -> Result<Option<Value>> {
        let attempted = "set the manifest link in the IMS image record";
        self.call_for_record(attempted, ["images", id.as_str()], Some(&json!({ "link": link })))
    }

    /// Takes an image's record back; one that is not there is no error.
    pub(crate) fn delete_image(&mut self, id: &Id) -> Result<()> {
        self.call(&format!("delete the record of image {id} in IMS"), &Method::DELETE, &["images", id.as_str()], None)
            .map(|_| ())
    }

    /// A call that may be repeated. Nothing where there is no IMS, and where a record that is asked for or deleted is not there.
    fn call(&mut self, attempted: &str, method: &Method, path: &[&str], body: Option<&Value>) -> Result<Option<Value>> {
        Ok(self.call_for_text(attempted, method, path, body)?.and_then(|text| serde_json::from_slice(&text).ok()))
    }

    /// A call whose answer is the record at `path`, with the fields `set` in it if those are to be set. An answer without a record, as a
    /// proxy has one, may pass.
    fn call_for_record(&mut self, attempted: &str, path: [&str; 2], set: Option<&Value>) -> Result<Option<Value>> {
        let method = if set.is_some() { Method::PATCH } else { Method::GET };
        let read = |text: Vec<u8>| record_of(attempted, path[1], set, &text);
        self.call_and_read(attempted, &method, &path, set, read)
    }

    /// A call that may be repeated, with its answer as it was sent.
    fn call_for_text(
        &mut self,
        attempted: &str,
        method: &Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<Option<Vec<u8>>> {
        self.call_and_read(attempted, method, path, body, Ok)
    }

    /// A call that is repeated as long as it, or what `read` makes of its answer, fails by what may pass.
    fn call_and_read<T>(
        &mut self,
        attempted: &str,
        method: &Method,
        path: &[&str],
        body: Option<&Value>,
        read: impl Fn(Vec<u8>) -> std::result::Result<T, Fault>,
    ) -> Result<Option<T>> {
        if self.at.is_none() {
            return Ok(None);
        }
        let (work, began) = (self.work, Instant::now());
        let retry_limit = work.network.retry_limit;
        self.limit = REQUEST_LIMIT;
        let this = &mut *self;
        work.wait(retry(retry_limit, attempted, async || {
            let answer = this.request(attempted, method, path, body).await;
            // A further try ends with the time for tries.
            this.limit = retry_limit.saturating_sub(began.elapsed()).clamp(SHORTEST, REQUEST_LIMIT);
            answer?.map(&read).transpose()
        }))
    }

    /// A call that must not be repeated unseen: the inner error is one that may pass.
    #[allow(clippy::type_complexity)]
    fn call_once(
        &mut self,
        attempted: &str,
        method: &Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<std::result::Result<Option<Value>, String>> {
        let work = self.work;
        self.limit = REQUEST_LIMIT;
        let this = &mut *self;
        work.wait(async {
            match this.request(attempted, method, path, body).await {
                Ok(answer) => Ok(Ok(answer.and_then(|text| serde_json::from_slice(&text).ok()))),
                Err(Fault::Transient(cause)) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    Ok(Err(cause))
                }
                Err(Fault::Final(error)) => Err(error),
            }
        })
    }

    async fn request(
        &mut self,
        attempted: &str,
        method: &Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> std::result::Result<Option<Vec<u8>>, Fault> {
        let Some(at) = self.at.clone() else { return Ok(None) };
        let client = if *method == Method::GET { self.work.reader()? } else { self.work.sender()? };
        let mut request = client.request(method.clone(), below(&at.url, path)?).timeout(self.limit);
        if let Some(folder) = &at.oauth {
            request = request.bearer_auth(self.token(folder).await?);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await;
        self.has_asked |= *method == Method::POST && !response.as_ref().is_err_and(reqwest::Error::is_connect);
        let response = response?;
        let status = response.status();
        if status.is_success() {
            let is_list = *method == Method::GET && path.len() == 1;
            return whole(response, if is_list { LONGEST_LIST } else { LONGEST_RECORD }).await.map(Some);
        }
        if status == StatusCode::NOT_FOUND && [Method::GET, Method::DELETE].contains(method) {
            return Ok(None);
        }
        let cause = problem(status, &complaint(response).await);
        if status == StatusCode::UNAUTHORIZED && self.token.take().is_some() {
            // It may have expired, or been taken back: the next try has a new one.
            return Err(Fault::Transient(cause));
        }
        if REFUSED_FIELDS.contains(&status) && body.is_some_and(|body| body.get("metadata").is_some()) {
            // An IMS from before images had metadata. Without it, a record whose answer is lost is left behind.
            self.takes_metadata = false;
            return Err(Fault::Transient(cause));
        }
        Err(if is_transient(status) {
            Fault::Transient(cause)
        } else {
            Fault::Final(Error::new(attempted).because(cause))
        })
    }

    /// A token of OAuth, by client credentials.
    async fn token(&mut self, folder: &Path) -> std::result::Result<String, Fault> {
        if let Some(token) = self.token.as_ref().filter(|t| t.until > Instant::now()) {
            return Ok(token.bearer.clone());
        }
        let read = |name: &str| {
            let file = folder.join(name);
            let text = std::fs::read_to_string(&file).attempt(|| format!("read {}", file.display()))?;
            Ok::<_, Error>(text.trim().to_owned())
        };
        let (endpoint, id, secret) = (read("endpoint")?, read("client-id")?, read("client-secret")?);
        // The secret is masked as it is, and as HTTP Basic encodes it.
        redaction::keep(&secret);
        redaction::keep(&format!("{id}:{secret}"));
        let request = self.work.sender()?.post(&endpoint).timeout(self.limit).basic_auth(id, Some(secret));
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let asked = Instant::now();
        let response = request.body("grant_type=client_credentials").send().await?;
        let status = response.status();
        let attempted = format!("get a token from {}", without_query(&endpoint));
        if !status.is_success() {
            let cause = problem(status, &complaint(response).await);
            let error = Error::new(attempted).because(&cause).advise("see the credentials in OAUTH_CONFIG_DIR");
            return Err(if is_transient(status) { Fault::Transient(cause) } else { Fault::Final(error) });
        }
        let answer: Value = serde_json::from_slice(&whole(response, LONGEST_TOKEN).await?).unwrap_or_default();
        let Some(bearer) = answer["access_token"].as_str() else {
            return Err(Fault::Final(Error::new(attempted).because("there is none in the answer")));
        };
        if !is_header_word(bearer) {
            let why = "the one in the answer holds spaces, newlines or other bytes that no header may hold";
            return Err(Fault::Final(Error::new(attempted).because(why).advise("see what answers at that URL")));
        }
        redaction::keep(bearer);
        let seconds = answer["expires_in"].as_u64().unwrap_or(60).min(LONGEST_LIFE);
        let lives = Duration::from_secs(seconds).saturating_sub(TOKEN_MARGIN);
        self.token = Some(Token { bearer: bearer.to_owned(), until: asked + lives });
        Ok(bearer.to_owned())
    }
}

/// The record in a list that says it was made by `request`. Of all others nothing is kept. `look` says, now and then, whether to go on.
fn made_by(list: &[u8], request: &Id, look: impl FnMut() -> bool) -> serde_json::Result<Option<Value>> {
    struct Records<'a, F>(&'a str, F);
    impl<'de, F: FnMut() -> bool> Visitor<'de> for Records<'_, F> {
        type Value = Option<Value>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of records")
        }

        fn visit_seq<A: SeqAccess<'de>>(mut self, mut records: A) -> std::result::Result<Self::Value, A::Error> {
            let (mut found, mut read) = (None, 0);
            while let Some(record) = records.next_element::<&RawValue>()? {
                read += record.get().len();
                if read > LOOK_EVERY {
                    read = 0;
                    if !(self.1)() {
                        return Err(A::Error::custom("interrupted"));
                    }
                }
                if found.is_none() && record.get().len() <= LONGEST_RECORD && record.get().contains(self.0) {
                    found = serde_json::from_str(record.get()).ok();
                    found = found.filter(|record: &Value| record["metadata"][REQUEST] == self.0);
                }
            }
            Ok(found)
        }
    }
    serde_json::Deserializer::from_slice(list).deserialize_seq(Records(request.as_str(), look))
}

/// Returns whether both name the same manifest.
fn is_same_link(one: &Value, other: &Value) -> bool {
    ["path", "etag", "type"].iter().all(|name| one[name] == other[name])
}

/// The record `id` out of an answer to a request that was to `set` some of its fields.
fn record_of(attempted: &str, id: &str, set: Option<&Value>, text: &[u8]) -> std::result::Result<Value, Fault> {
    let record: Value = serde_json::from_slice(text).unwrap_or_default();
    if record["id"].is_null() {
        return Err(Fault::Transient("IMS answers without a record; see what answers at IMS_URL".into()));
    }
    let contradicts = |told: String| {
        let refused = Error::new(attempted).because(format!("IMS answers with {told}"));
        Err(Fault::Final(refused.advise("see what answers at IMS_URL")))
    };
    if record["id"] != id {
        return contradicts(format!("the record of another, {}", quoted(&record["id"])));
    }
    for (name, value) in set.and_then(Value::as_object).into_iter().flatten() {
        let told = &record[name];
        if told != value && !(value.is_object() && is_same_link(told, value)) {
            return contradicts(format!("another value, {name} {}", quoted(told)));
        }
    }
    Ok(record)
}

/// A value of an answer, for a message.
fn quoted(value: &Value) -> String {
    value.to_string().chars().take(MOST_QUOTED).collect()
}

/// So many bytes of a list are read before one looks whether a signal came.
const LOOK_EVERY: usize = 1 << 20;

/// The id in a record; `None` in one whose id is none that IMS makes.
pub(crate) fn id_of(record: &Value) -> Option<Id> {
    record["id"].as_str().and_then(Id::parse)
}

/// The URL of `path` below `base`: each of its names is one segment, whatever stands in it.
fn below(base: &str, path: &[&str]) -> Result<Url> {
    let attempted = || format!("call {base}");
    let mut url = Url::parse(base).attempt(attempted)?;
    url.path_segments_mut()
        .map_err(|()| Error::new(attempted()).because("it has no path"))?
        .pop_if_empty()
        .extend(path);
    Ok(url)
}

/// Extracts the reason from an error answer: RFC 7807's details, or OAuth's, or the first line of the text, but for a page of HTML.
fn problem(status: StatusCode, text: &str) -> String {
    let answer: Value = serde_json::from_str(text).unwrap_or_default();
    let fields =
        ["detail", "error_description", "title", "error"].map(|name| answer[name].as_str().unwrap_or_default());
    let mut said = fields.into_iter().find(|said| !said.is_empty()).unwrap_or_default().to_owned();
    if let Some(errors) = answer["errors"].as_object().filter(|e| !e.is_empty()) {
        said = format!("{said} {}", Value::from(errors.clone()));
    }
    if said.is_empty() && !text.trim_start().starts_with('<') {
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        first.trim().clone_into(&mut said);
    }
    let said: String = said.chars().take(MOST_QUOTED).collect();
    format!("the server answers {status}: {said}").trim_end_matches([':', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_of_a_path_is_one_segment() {
        let url = |path: &[&str]| below("http://ims/apis/ims", path).unwrap().to_string();
        assert_eq!(url(&["images", "46a2731e"]), "http://ims/apis/ims/images/46a2731e");
        assert_eq!(below("http://ims/", &["jobs"]).unwrap().as_str(), "http://ims/jobs");
        assert_eq!(url(&["images", "../../smd?a#b"]), "http://ims/apis/ims/images/..%2F..%2Fsmd%3Fa%23b");
        assert!(!url(&["images", ".."]).contains(".."));
    }

    #[test]
    fn a_record_is_found_in_a_list_by_its_request_and_nothing_else_is_kept() {
        let request = Id::random().unwrap();
        let ours = json!({"id": "a", "metadata": {REQUEST: request.as_str()}});
        let named = json!({"id": "b", "name": request.as_str(), "metadata": {"x": request.as_str()}});
        let found = |list: &str| made_by(list.as_bytes(), &request, || true).map_err(|e| e.to_string());
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

    #[test]
    fn the_details_of_a_problem_are_told() {
        let conflict = StatusCode::CONFLICT;
        let rfc7807 = r#"{"title": "Conflict", "detail": "The job has ended.", "status": 409}"#;
        assert_eq!(problem(conflict, rfc7807), "the server answers 409 Conflict: The job has ended.");
        let fields = r#"{"title": "Bad", "errors": {"name": ["too short"]}}"#;
        assert_eq!(problem(conflict, fields), r#"the server answers 409 Conflict: Bad {"name":["too short"]}"#);
        assert_eq!(
            problem(conflict, r#"{"error": "invalid_client"}"#),
            "the server answers 409 Conflict: invalid_client"
        );
        assert_eq!(problem(conflict, "<html>\n no"), "the server answers 409 Conflict");
        assert_eq!(problem(conflict, "\nno\nat all"), "the server answers 409 Conflict: no");
        assert_eq!(problem(conflict, &"x".repeat(9000)).len(), "the server answers 409 Conflict: ".len() + MOST_QUOTED);
        assert_eq!(problem(conflict, ""), "the server answers 409 Conflict");
    }
}
