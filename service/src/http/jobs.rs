//! Starts, changes and removes jobs.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use chrono::{DateTime, Local, NaiveDateTime, TimeDelta};
use serde_json::{Value, json};

use super::create::checked;
use super::problem::Problem;
use super::{Request, Service, created, json as answer, no_content};
use crate::records::manifest;
use crate::records::{Container, Image, Job, Kind, Location, PublicKey, Recipe, STATUSES, new_id, now, rules, wire};
use crate::runner::{Death, Held, NewJob};
use crate::store::Failure;

/// Name of the user metadata that holds an object's MD5.
const MD5: &str = "md5sum";

/// Age from which a job start counts as interrupted. Another replica may still be working on a younger start.
pub const LONGEST_START: TimeDelta = TimeDelta::minutes(15);

/// Image or recipe that a job begins with.
struct Source {
    arch: String,
    require_dkms: bool,
    object: Location,
    download_url: String,
    md5: String,
    recipe_type: Option<String>,
    dictionary: BTreeMap<String, String>,
}

impl Service {
    /// POST of a job.
    pub async fn create_job(&self, request: &Request) -> Result<Response<Body>, Problem> {
        let mut fields = checked(request, rules::NEW_JOB)?;
        let is_create = fields["job_type"] == "create";
        let debug = fields.get("enable_debug").and_then(Value::as_bool).unwrap_or(false);
        let asked = fields.get("ssh_containers").cloned().unwrap_or_default();
        let containers = containers(is_create, debug, serde_json::from_value(asked).expect("checked fields"))?;
        let artifact = fields["artifact_id"].as_str().expect("a checked text").to_owned();
        let key = fields["public_key_id"].as_str().expect("a checked text").to_owned();
        let source = if is_create { self.recipe(&artifact).await? } else { self.image(&artifact).await? };
        let dkms = fields.get("require_dkms").and_then(Value::as_bool);
        let require_dkms = source.arch == "aarch64" || dkms.unwrap_or(source.require_dkms);
        let key = self
            .database
            .record::<PublicKey>(&key)
            .await?
            .ok_or_else(|| Problem::bad_request(format!("cannot start the job: no public key has the id {key}")))?;

        let kernel = if source.arch == "aarch64" { "Image" } else { "vmlinuz" };
        if fields.get("kernel_file_name").is_none_or(|name| name == "") {
            fields.insert("kernel_file_name".into(), json!(kernel));
        }
        fields.entry("build_env_size").or_insert(json!(self.settings.image_size));
        fields.entry("job_mem_size").or_insert(json!(self.settings.job_memory));
        fields.insert("ssh_containers".into(), json!(containers));
        fields.insert("require_dkms".into(), json!(require_dkms));
        fields.insert("arch".into(), json!(source.arch));
        fields.insert("id".into(), json!(new_id()));
        fields.insert("created".into(), json!(now()));
        let job: Job = serde_json::from_value(Value::Object(fields)).expect("checked fields");
        self.start(NewJob {
            job,
            object: source.object,
            download_url: source.download_url,
            download_md5sum: source.md5,
            public_key: key.public_key,
            recipe_type: source.recipe_type,
            template_dictionary: source.dictionary,
        })
        .await
    }

    /// Starts a job. Records it as starting first, so that its leftovers can be found and removed if this process is
    /// killed.
    async fn start(&self, mut new: NewJob) -> Result<Response<Body>, Problem> {
        let is_for_node = self.runner.takes_nodes(&new.job);
        let statuses = if is_for_node { self.probe_nodes().await? } else { Vec::new() };
        let choosing = self.choosing.lock().await;
        if !statuses.is_empty() {
            new.job.remote_build_node = self.choose_node(&statuses, &new.job.arch).await?;
        }
        let mut change = self.database.change(&[Kind::Starting]).await?;
        change.insert_into(Kind::Starting, &new.job).await?;
        change.commit().await?;
        drop(choosing);
        let job = match self.runner.start(&new).await {
            Ok(job) => job,
            Err(failures) => {
                self.end_start(&new.job).await;
                return Err(Problem::steps("cannot start the job", &failures));
            }
        };
        let stored = async {
            let mut change = self.database.change(&[Kind::Jobs, Kind::Starting]).await?;
            change.remove(Kind::Starting, &job.id).await?;
            change.insert(&job).await?;
            change.commit().await
        };
        if let Err(error) = stored.await {
            // The commit may have succeeded although its answer was lost. Then the record exists and the job stays, so
            // remove the job only if there is no record.
            if self.database.record::<Job>(&job.id).await.is_ok_and(|job| job.is_none()) {
                self.end_start(&job).await;
            }
            return Err(error.into());
        }
        self.runner.stored(&job).await;
        tracing::info!("jobs.v3.POST: started the {} job id={}", job.job_type, job.id);
        Ok(created(&job))
    }

    /// Returns the jobs whose start began at least `age` ago and has not finished, so that it counts as interrupted by
    /// a kill.
    pub async fn starts(&self, age: TimeDelta) -> Vec<Job> {
        let starting = self.database.all_in::<Job>(Kind::Starting).await.unwrap_or_else(|error| {
            tracing::warn!("cannot look for jobs whose start was cut off: {error}");
            Vec::new()
        });
        let old = |job: &Job| Local::now().naive_local().signed_duration_since(time(&job.created).unwrap_or_default());
        starting.into_iter().filter(|job| old(job) >= age).collect()
    }

    /// Removes the leftovers of jobs whose start was interrupted.
    pub async fn clear_starts(&self, starts: Vec<Job>) {
        for job in starts {
            tracing::warn!("the start of job {} was cut off: removing what it has left", job.id);
            self.end_start(&job).await;
        }
    }

    /// Removes what the runner holds of jobs without a record, and releases what it holds of ended jobs.
    pub async fn clear_held(&self) {
        // Ask the runner before the database. A job is recorded as starting before the runner creates anything for it,
        // so a job that the runner names without any record in the database is a leftover.
        let held = match self.runner.held().await {
            Ok(held) => held,
            Err(failures) => {
                tracing::warn!("cannot look for what jobs have left: {}; will try again", failures.join("; "));
                return;
            }
        };
        for Held { job: id, is_for_running } in held {
            // Read `Starting` before the jobs: a job whose start finishes between the two reads is then found among the
            // jobs.
            let found = async {
                let starting = self.database.ids(Kind::Starting).await?;
                Ok::<_, sqlx::Error>((starting.contains(&id), self.database.record::<Job>(&id).await?))
            };
            let done = match found.await {
                Ok((false, None)) => {
                    tracing::warn!("job {id} has no record: removing what it has left");
                    self.runner.remove(&Job::without_record(&id)).await
                }
                Ok((_, Some(job))) if job.has_ended() && is_for_running => {
                    tracing::warn!("job {id} has ended: releasing what it still holds");
                    self.runner.release(&job).await
                }
                Ok(_) => Ok(()),
                Err(error) => Err(vec![error.to_string()]),
            };
            if let Err(failures) = done {
                tracing::warn!("cannot clear up after job {id}: {}; will try again", failures.join("; "));
            }
        }
    }

    async fn end_start(&self, job: &Job) {
        match self.runner.remove(job).await {
            Ok(()) => self.forget_start(&job.id).await,
            Err(failures) => {
                tracing::error!("cannot remove what job {} has left: {}; will try again", job.id, failures.join("; "));
            }
        }
    }

    async fn forget_start(&self, id: &str) {
        let forgotten = async {
            let mut change = self.database.change(&[Kind::Starting]).await?;
            change.remove(Kind::Starting, id).await?;
            change.commit().await
        };
        if let Err(error) = forgotten.await {
            tracing::warn!("cannot forget the start of job {id}: {error}; it is cleared up later");
        }
    }

    /// Returns the recipe that a create job begins with.
    async fn recipe(&self, id: &str) -> Result<Source, Problem> {
        let recipe = self.database.record::<Recipe>(id).await?;
        let recipe = recipe.ok_or_else(|| Problem::bad_request(format!("no recipe has the id {id}")))?;
        let link = recipe.link.as_ref();
        let link = link.ok_or_else(|| Problem::bad_request(format!("the recipe {id} has no link to an archive")))?;
        let (at, object) = self.object(link).await?;
        let pairs = recipe.template_dictionary.unwrap_or_default();
        Ok(Source {
            arch: recipe.arch,
            require_dkms: recipe.require_dkms,
            download_url: self.download_url(&at).await?,
            object: at,
            md5: object.metadata.get(MD5).cloned().unwrap_or_default(),
            recipe_type: Some(recipe.recipe_type),
            dictionary: pairs.into_iter().map(|pair| (pair.key, pair.value)).collect(),
        })
    }

    /// Returns the image that a customize job begins with.
    async fn image(&self, id: &str) -> Result<Source, Problem> {
        let image = self.database.record::<Image>(id).await?;
        let image = image.ok_or_else(|| Problem::bad_request(format!("no image has the id {id}")))?;
        let link = image.link.as_ref();
        let link = link.ok_or_else(|| Problem::bad_request(format!("the image {id} has no link to a manifest")))?;
        let text = self.manifest(link).await?;
        let rootfs = manifest::rootfs(&text).map_err(|refusal| {
            let (manifest::Refusal::Malformed(why) | manifest::Refusal::Rootfs(why)) = refusal;
            Problem::bad_request(format!("cannot start the job: {why}"))
        })?;
        let at = rootfs.location;
        let object = self.store.head(&at).await;
        let object = object.map_err(|failure| self.told(super::links::problem(&at, &failure)))?;
        Ok(Source {
            arch: image.arch,
            require_dkms: self.settings.dkms_by_default(),
            download_url: self.download_url(&at).await?,
            object: at,
            md5: object.metadata.get(MD5).cloned().or(rootfs.md5).unwrap_or_default(),
            recipe_type: None,
            dictionary: BTreeMap::new(),
        })
    }

    async fn download_url(&self, at: &Location) -> Result<String, Problem> {
        let valid = Duration::from_secs(self.settings.s3_url_expiration);
        let url = self.store.signed_url(at, valid).await;
        let url = url.map_err(|failure: Failure| Problem::failed(format!("cannot sign a URL of {at}: {failure}")))?;
        Ok(if url.starts_with('/') { format!("{}{url}", self.settings.url()) } else { url })
    }

    /// PATCH of a job. If the new status ends the job, what the job holds is released before the status is stored, so
    /// the client can repeat the request if the release fails.
    pub async fn patch_job(&self, id: &str, request: &Request) -> Result<Response<Body>, Problem> {
        let job = self.found::<Job>(id).await?;
        let patch = checked(request, rules::PATCH_JOB)?;
        let text = |name: &str| patch.get(name).and_then(Value::as_str).map(str::to_owned);
        let (status, image) = (text("status"), text("resultant_image_id"));
        if status.as_deref().is_some_and(|status| matches!(status, "error" | "success")) {
            let released = self.runner.release(&job).await;
            released.map_err(|failures| Problem::steps("cannot release what the job holds", &failures))?;
        }
        let host_key = status.as_deref().filter(|status| *status == "waiting_on_user");
        let host_key = host_key.and_then(|_| self.runner.host_key(&job));
        let job = self.update_job(id, |job| {
            for container in job.ssh_containers.iter_mut().flatten().filter(|_| host_key.is_some()) {
                for address in container.connection_info.iter_mut().flat_map(|addresses| addresses.values_mut()) {
                    address.host_key.clone_from(&host_key);
                }
            }
            job.resultant_image_id = image.or(job.resultant_image_id.take());
            job.status = status.unwrap_or_else(|| std::mem::take(&mut job.status));
        });
        Ok(answer(StatusCode::OK, wire::sorted(&job.await?)))
    }

    async fn update_job(&self, id: &str, apply: impl FnOnce(&mut Job) + Send) -> Result<Job, Problem> {
        let mut change = self.database.change(&[Kind::Jobs]).await?;
        let mut job = change.record::<Job>(id).await?.ok_or_else(|| Problem::not_found("job"))?;
        let had_ended = job.has_ended();
        apply(&mut job);
        change.update(&job).await?;
        change.commit().await?;
        if job.has_ended() && !had_ended {
            let age = time(&job.created).map(|created| Local::now().naive_local().signed_duration_since(created));
            self.metrics.job_ended(&job.status, age.and_then(|age| age.to_std().ok()).unwrap_or_default());
        }
        Ok(job)
    }

    /// Records that a job died. Fails if the database fails. A job that has already ended stays as it is.
    pub async fn job_died(&self, death: &Death) -> Result<(), sqlx::Error> {
        let Death { id, reason } = death;
        let Some(job) = self.database.record::<Job>(id).await?.filter(|job| !job.has_ended()) else { return Ok(()) };
        tracing::error!("job {id} died: {reason}");
        if let Err(failures) = self.runner.release(&job).await {
            tracing::warn!("cannot release what job {id} holds: {}; will try again", failures.join("; "));
        }
        let mut is_new = false;
        let ended = self.update_job(id, |job| {
            is_new = !job.has_ended();
            if is_new {
                job.status = "error".into();
            }
        });
        match ended.await {
            Ok(job) if is_new => self.runner.died(&job, reason).await,
            Ok(_) => {}
            Err(problem) if problem.status == StatusCode::NOT_FOUND => {}
            Err(problem) => return Err(sqlx::Error::Protocol(problem.to_string())),
        }
        Ok(())
    }

    /// DELETE of a job.
    pub async fn delete_job(&self, id: &str) -> Result<Response<Body>, Problem> {
        let job = self.found::<Job>(id).await?;
        self.remove_job(&job).await.map_err(|failures| Problem::steps("cannot remove all of the job", &failures))?;
        Ok(no_content())
    }

    /// DELETE of all jobs that match the filters of the query.
    pub async fn delete_jobs(&self, query: &str) -> Result<Response<Body>, Problem> {
        let filters = Filters::parse(query)?;
        let now = Local::now().naive_local();
        let mut failures = Vec::new();
        for job in self.database.records::<Job>().await? {
            if filters.fit(&job, now)
                && let Err(failed) = self.remove_job(&job).await
            {
                failures.extend(failed);
            }
        }
        if failures.is_empty() { Ok(no_content()) } else { Err(Problem::steps("cannot remove all jobs", &failures)) }
    }

    async fn remove_job(&self, job: &Job) -> Result<(), Vec<String>> {
        self.runner.remove(job).await?;
        let removed = async {
            let mut change = self.database.change(&[Kind::Jobs]).await?;
            change.remove(Kind::Jobs, &job.id).await?;
            change.commit().await
        };
        removed.await.map_err(|error| vec![format!("cannot remove the record of job {}: {error}", job.id)])
    }
}

/// Returns the containers that users log in to; none for a create job without debug.
fn containers(is_create: bool, debug: bool, asked: Option<Vec<Container>>) -> Result<Option<Vec<Container>>, Problem> {
    let asked = asked.filter(|list| !list.is_empty());
    let named = |name: &str| Container { name: Some(name.into()), jail: false, status: None, connection_info: None };
    let mut list = match asked {
        Some(_) if is_create => {
            return Err(Problem::bad_request("ssh_containers are not for a create job: see enable_debug"));
        }
        Some(list) if list.len() > 1 => {
            return Err(Problem::bad_request("a job has one SSH container at most: expected one in ssh_containers"));
        }
        Some(list) => list,
        None if is_create && !debug => return Ok(None),
        None => vec![named(if is_create { "debug" } else { "customize" })],
    };
    list[0].status = Some("pending".into());
    Ok(Some(list))
}

/// Filters of a request that deletes all jobs.
#[derive(Debug, Default, PartialEq)]
struct Filters {
    statuses: Vec<String>,
    job_type: Option<String>,
    age: Option<TimeDelta>,
}

impl Filters {
    fn parse(query: &str) -> Result<Self, Problem> {
        let mut filters = Self::default();
        let mut seen = Vec::new();
        for (name, value) in super::pairs(query) {
            match name.as_str() {
                "status" => {
                    let status = value.to_ascii_lowercase();
                    if !STATUSES.contains(&status.as_str()) {
                        let expected = STATUSES.join(", ");
                        return Err(Problem::filter(format!("the status is '{value}': expected one of {expected}")));
                    }
                    filters.statuses.push(status);
                }
                "job_type" if !seen.contains(&name) => filters.job_type = Some(value).filter(|value| !value.is_empty()),
                "age" if !seen.contains(&name) => {
                    let wrong = || format!("the age is '{value}': expected weeks, days, hours, minutes, as in 1d12h");
                    filters.age = Some(age(&value).ok_or_else(|| Problem::filter(wrong()))?);
                }
                // Like upstream, use only the first one of these.
                "job_type" | "age" => {}
                name => return Err(super::delete::unknown(name)),
            }
            seen.push(name);
        }
        Ok(filters)
    }

    fn fit(&self, job: &Job, now: NaiveDateTime) -> bool {
        let is_old = |age: TimeDelta| {
            let since = now.checked_sub_signed(age);
            time(&job.created).zip(since).is_some_and(|(created, since)| created <= since)
        };
        (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && self.job_type.as_ref().is_none_or(|kind| *kind == job.job_type)
            && self.age.is_none_or(is_old)
    }
}

/// Parses an age: numbers, each followed by a unit.
fn age(text: &str) -> Option<TimeDelta> {
    let text = text.to_ascii_lowercase();
    let mut rest = text.as_str();
    let mut age = TimeDelta::zero();
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let letters = after.len() - after.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, after) = after.split_at(letters);
        let number: i64 = number.parse().ok()?;
        let part = match unit {
            "w" | "week" | "weeks" => TimeDelta::try_weeks(number),
            "d" | "day" | "days" => TimeDelta::try_days(number),
            "h" | "hour" | "hours" => TimeDelta::try_hours(number),
            "m" | "min" | "minute" | "minutes" => TimeDelta::try_minutes(number),
            _ => None,
        };
        age = age.checked_add(&part?)?;
        rest = after;
    }
    let fits = Local::now().naive_local().checked_sub_signed(age).is_some();
    (!text.is_empty() && fits).then_some(age)
}

/// Parses the time of a record; older releases wrote times with a zone.
fn time(text: &str) -> Option<NaiveDateTime> {
    let zoned = || DateTime::parse_from_rfc3339(text).map(|time| time.with_timezone(&Local).naive_local());
    text.parse().or_else(|_| zoned()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_numbers_with_units_and_nothing_else() {
        for (text, minutes) in [("3d", 3 * 1440), ("2weeks", 20160), ("1d12h", 2160), ("90M", 90), ("0h", 0)] {
            assert_eq!(age(text), Some(TimeDelta::minutes(minutes)), "{text}");
        }
        for text in ["", "foo", "90", "2 days", "2months", "d", "-1d", "1d-", "99999999999999999999w", "999999999w"] {
            assert_eq!(age(text), None, "{text}");
        }
    }

    #[test]
    fn filters_are_joined_by_and() {
        let now: NaiveDateTime = "2026-02-01T00:00:00".parse().unwrap();
        let job = |status: &str, created: &str| -> Job {
            serde_json::from_value(json!({
                "artifact_id": "a", "public_key_id": "k", "job_type": "create", "image_root_archive_name": "n",
                "id": "i", "created": created, "status": status,
            }))
            .unwrap()
        };
        let fit = |query: &str, job: &Job| Filters::parse(query).unwrap().fit(job, now);
        let old = job("success", "2026-01-01T00:00:00+00:00");
        let young = job("error", "2026-01-31T23:59:59");
        assert!(fit("", &old) && fit("job_type=", &young) && fit("job_type=create&job_type=x", &young));
        assert!(fit("age=3d&status=SUCCESS&status=error", &old));
        assert!(!fit("age=3d", &young) && !fit("status=creating", &young) && !fit("job_type=customize", &young));
        for wrong in ["status=", "status=x", "age=", "age=foo", "AGE=3d", "Status=success", "agee=3d"] {
            assert!(Filters::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_job_has_one_container_at_most() {
        let asked = |value: Value| serde_json::from_value::<Option<Vec<Container>>>(value).unwrap();
        assert_eq!(containers(true, false, None).unwrap(), None);
        assert_eq!(containers(true, true, None).unwrap().unwrap()[0].name.as_deref(), Some("debug"));
        assert_eq!(containers(false, false, asked(json!([]))).unwrap().unwrap()[0].name.as_deref(), Some("customize"));
        let own = containers(false, false, asked(json!([{"jail": true}]))).unwrap().unwrap();
        assert!(own[0].name.is_none() && own[0].jail && own[0].status.as_deref() == Some("pending"));
        assert!(containers(true, true, asked(json!([{"name": "x"}]))).is_err());
        assert!(containers(false, false, asked(json!([{}, {}]))).is_err());
    }
}
