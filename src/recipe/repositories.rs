//! `ims-sshd wait-for-repos`: waits until the repositories that a recipe uses can be read.
//!
//! Requests carry no token, since a recipe can name any server. They carry the user and password for the repository if
//! the recipe has them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Client, Method, StatusCode, Url};
use tokio::task::JoinSet;

use crate::error::{Attempt, Error, Result};
use crate::ims::records::Status;
use crate::job::variables::Reader;
use crate::log::redaction;
use crate::printable::listed;
use crate::publish::settings::Settings;
use crate::recipe::description::{Description, Repository, Selection};
use crate::recipe::outcome;
use crate::sys::architecture::Architecture;
use crate::sys::named;
use crate::transfer::{Work, in_full, without_query};
use crate::volume::open_tree;

/// Timeout of one request, the same as in upstream's program.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// First and longest pause between two requests to a repository.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Time limit for the wait if `TIMEOUT` is not set.
const DEFAULT_LIMIT: Duration = Duration::from_secs(500);

/// Statuses of HEAD after which GET is tried: a server that answers HEAD with one of these may still support GET.
const NO_HEAD: [StatusCode; 5] = [
    StatusCode::BAD_REQUEST,
    StatusCode::FORBIDDEN,
    StatusCode::METHOD_NOT_ALLOWED,
    StatusCode::NOT_FOUND,
    StatusCode::NOT_IMPLEMENTED,
];

/// Files that show that a directory of this machine is a repository.
const OF_REPOSITORY: [&str; 4] = ["repodata/repomd.xml", "dists", "Release", "InRelease"];

/// Evidence that a repository is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Sign {
    /// One of these URLs answers.
    Url(Vec<String>),
    /// This directory or file exists.
    Path(PathBuf),
    /// The repository cannot be checked, for this reason.
    Unknown(String),
}

/// Reads the time limit from the variable `TIMEOUT`.
pub fn limit(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Duration> {
    let mut reader = Reader::of(variables);
    let limit = reader.limit("TIMEOUT").unwrap_or(DEFAULT_LIMIT);
    reader.finish(Some(limit))
}

/// Waits, for at most `limit`, for those repositories of the recipe in `directory` that a build of `profiles` uses.
pub fn run(settings: &Settings, directory: &Path, profiles: &[String], limit: Duration) -> Result<u8> {
    outcome::step(settings, Some(Status::WaitingForRepos), |work| {
        let real = named::resolve(directory).attempt(|| format!("open {}", directory.display()))?;
        let description = Description::read(&open_tree(&real)?)?;
        let architecture = settings.job.architecture.unwrap_or(Architecture::OWN).name();
        let selection = description.select(profiles, architecture)?;
        wait(work, &description, &selection, &real, limit)
    })
}

/// A repository for which this step waits.
struct Awaited {
    alias: String,
    urls: Vec<String>,
    paths: Vec<PathBuf>,
    login: Option<(String, String)>,
    client: Client,
}

fn wait(work: &Work, description: &Description, selection: &Selection, recipe: &Path, limit: Duration) -> Result<()> {
    let mut awaited = Vec::new();
    let used = description
        .repositories
        .iter()
        .filter(|(scope, repository)| scope.holds(selection) && !repository.is_for_image_only);
    for (_, repository) in used {
        let shown = without_query(&repository.alias);
        let (urls, paths) = match sign(repository, description, selection, recipe) {
            Sign::Url(urls) => (urls, Vec::new()),
            Sign::Path(path) => (Vec::new(), vec![path]),
            Sign::Unknown(why) => {
                tracing::info!("not waiting for the repository {shown}: {why}");
                continue;
            }
        };
        if let Some((_, password)) = &repository.login {
            redaction::keep(password);
        }
        let has_login = repository.login.is_some()
            || urls
                .iter()
                .any(|url| Url::parse(url).is_ok_and(|url| !url.username().is_empty() || url.password().is_some()));
        let client = if has_login { work.reader()? } else { work.client()? }.clone();
        awaited.push(Awaited { alias: shown, urls, paths, login: repository.login.clone(), client });
    }
    if awaited.is_empty() {
        tracing::info!("there is no repository to wait for");
        return Ok(());
    }
    let missing = work.wait(async move {
        let mut tasks = JoinSet::new();
        for (number, repository) in awaited.into_iter().enumerate() {
            tasks.spawn(async move { (number, repository.alias.clone(), repository.come(limit).await) });
        }
        let mut missing = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            let (number, alias, came) = ended.attempt(|| "wait for a repository")?;
            missing.extend(came.err().map(|why| (number, alias, why)));
        }
        missing.sort();
        Ok(missing)
    })?;
    if missing.is_empty() {
        return Ok(());
    }
    let refused = Error::new("read all repositories of the recipe");
    let (advice, seconds) = ("TIMEOUT sets the time in seconds", limit.as_secs());
    if let [(_, alias, why)] = missing.as_slice() {
        return Err(refused
            .because(format!("the repository {alias} is missing after {seconds} s: {why}"))
            .advise(advice));
    }
    for (_, alias, why) in &missing {
        tracing::error!("the repository {alias} is missing after {seconds} s: {why}");
    }
    let names: Vec<_> = missing.iter().map(|(_, alias, _)| alias).collect();
    let why = format!("{} of them are missing: {}", missing.len(), listed(&names));
    Err(refused.because(why).advise(format!("see the lines above; {advice}")))
}

impl Awaited {
    /// Waits, for at most `limit`, until the repository answers. Fails with the reason why the last complete attempt
    /// failed.
    async fn come(&self, limit: Duration) -> std::result::Result<(), String> {
        let mut reason = "it has not answered yet".to_owned();
        // Requests, which have a longer limit of their own, count as well.
        tokio::time::timeout(limit, self.answer(&mut reason)).await.map_err(|_| reason)
    }

    /// Sends requests until the repository answers, and records why the last one failed.
    async fn answer(&self, reason: &mut String) {
        let mut pause = PAUSE.0;
        while let Err(why) = self.ask().await {
            // Log each reason once: a log of every attempt would be long.
            if *reason != why {
                tracing::info!("waiting for the repository {}: {why}", self.alias);
                *reason = why;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
        tracing::info!("the repository {} is there", self.alias);
    }

    async fn ask(&self) -> std::result::Result<(), String> {
        let mut reason = String::new();
        for url in &self.urls {
            match self.request(url).await {
                Ok(()) => return Ok(()),
                // If all URLs fail, report the failure of the first one, which is the usual URL.
                Err(why) if reason.is_empty() => reason = why,
                Err(_) => {}
            }
        }
        for path in &self.paths {
            match std::fs::metadata(path) {
                Ok(_) => return Ok(()),
                Err(e) => reason = format!("{}: {e}", path.display()),
            }
        }
        Err(reason)
    }

    async fn request(&self, url: &str) -> std::result::Result<(), String> {
        let shown = without_query(url);
        for method in [Method::HEAD, Method::GET] {
            let is_last = method == Method::GET;
            let mut request = self.client.request(method, url).timeout(REQUEST_LIMIT);
            if let Some((user, password)) = &self.login {
                request = request.basic_auth(user, Some(password));
            }
            match request.send().await {
                Ok(response) if response.status().is_success() => return Ok(()),
                Ok(response) if !is_last && NO_HEAD.contains(&response.status()) => {}
                Ok(response) => return Err(format!("{shown} answers {}", response.status())),
                Err(e) => return Err(in_full(&e)),
            }
        }
        Err(format!("{shown} does not answer"))
    }
}

/// Returns the evidence by which `repository` counts as ready.
fn sign(repository: &Repository, description: &Description, selection: &Selection, recipe: &Path) -> Sign {
    let path = variables_replaced(&repository.path, description, selection);
    if path.is_empty() {
        return Sign::Unknown("the recipe names no source for it".into());
    }
    if path.starts_with('/') {
        return Sign::Path(path.into());
    }
    let Some((scheme, rest)) = path.split_once("://").or_else(|| path.split_once(":/")) else {
        return Sign::Unknown(format!("its address, {}, has no scheme", without_query(&path)));
    };
    match scheme {
        "http" | "https" if path.contains('$') => {
            Sign::Unknown(format!("only the package manager knows the variables in {}", without_query(&path)))
        }
        "http" | "https" => Sign::Url(urls(repository, description, selection, &path)),
        // An absolute path follows the scheme, after `://` as well as after `:/`.
        "dir" | "file" | "iso" => Sign::Path(format!("/{}", rest.trim_start_matches('/')).into()),
        "this" => Sign::Path(recipe.join(rest.trim_start_matches('/'))),
        _ => Sign::Unknown(format!("only kiwi-ng knows where {scheme}: leads")),
    }
}

/// Returns the directories of this machine from which the build may read packages. Leaves out directories that are no
/// repository, since a recipe can name any directory.
pub(crate) fn of_machine(description: &Description, selection: &Selection, recipe: &Path) -> Vec<PathBuf> {
    let used = description.repositories.iter().filter(|(scope, _)| scope.holds(selection));
    let named = used.filter_map(|(_, repository)| match sign(repository, description, selection, recipe) {
        Sign::Path(path) => Some(path),
        Sign::Url(_) | Sign::Unknown(_) => None,
    });
    named.filter(|path| OF_REPOSITORY.iter().any(|name| path.join(name).exists())).collect()
}

/// Refuses a repository in a disk image: kiwi-ng 9.24 and newer do not read one, and nobody can mount it in a user
/// namespace.
pub(crate) fn refuse_disk_images(description: &Description, selection: &Selection) -> Result<()> {
    let mut used = description.repositories.iter().filter(|(scope, _)| scope.holds(selection));
    let Some((_, repository)) = used.find(|(_, repository)| repository.path.trim().starts_with("iso:")) else {
        return Ok(());
    };
    let why = format!("{} is a disk image, which kiwi-ng cannot read", repository.path.trim());
    Err(Error::new(format!("read the repository {}", without_query(&repository.alias)))
        .because(why)
        .advise("mount it before, and name its directory in the recipe as dir://…"))
}

/// Returns the URLs of which one must answer.
fn urls(repository: &Repository, description: &Description, selection: &Selection, path: &str) -> Vec<String> {
    if ["mirrorlist", "metalink"].contains(&repository.source_type.as_str()) {
        return vec![path.to_owned()];
    }
    let is_apt = match repository.kind.as_str() {
        "" => {
            description.package_managers.iter().any(|(scope, name)| scope.holds(selection) && name.starts_with("apt"))
        }
        kind => kind == "apt-deb",
    };
    let below = |name: &str| {
        let Ok(mut url) = Url::parse(path) else { return format!("{}/{name}", path.trim_end_matches('/')) };
        url.set_path(&format!("{}/{name}", url.path().trim_end_matches('/')));
        url.into()
    };
    if !is_apt {
        return vec![below("repodata/repomd.xml")];
    }
    // Without a release, or if the release ends in '/', the repository is flat (sources.list(5)).
    let distribution = repository.distribution.as_str();
    let place = match distribution.strip_suffix('/') {
        Some(flat) => format!("{flat}/").trim_start_matches('/').to_owned(),
        None if distribution.is_empty() => String::new(),
        None => format!("dists/{distribution}/"),
    };
    ["InRelease", "Release"].map(|name| below(&format!("{place}{name}"))).into()
}

/// Returns `path` with the package managers' variables replaced, as far as their values are known.
fn variables_replaced(path: &str, description: &Description, selection: &Selection) -> String {
    let mut path = path.trim().to_owned();
    let release = description.release.as_deref();
    let known =
        [("basearch", Some(selection.architecture)), ("arch", Some(selection.architecture)), ("releasever", release)];
    for (name, value) in known.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        for form in [format!("${{{name}}}"), format!("${name}")] {
            path = path.replace(&form, value);
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sign_of(attributes: &str, path: &str) -> Sign {
        let recipe = format!(
            "<image><preferences><packagemanager>zypper</packagemanager><release-version>15.5</release-version>\
             </preferences><repository {attributes}><source path='{path}'/></repository></image>"
        );
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.xml"), recipe).unwrap();
        let description = Description::read(&open_tree(dir.path()).unwrap()).unwrap();
        let selection = description.select(&[], "x86_64").unwrap();
        sign(&description.repositories[0].1, &description, &selection, Path::new("/recipe"))
    }

    #[test]
    fn each_kind_of_repository_has_its_sign() {
        let url = |attributes: &str, path: &str| match sign_of(attributes, path) {
            Sign::Url(urls) => urls.join(" "),
            other => format!("{other:?}"),
        };
        for (attributes, path, wanted) in [
            ("", "https://h/r", "https://h/r/repodata/repomd.xml"),
            ("type='rpm-md'", "http://h/r/", "http://h/r/repodata/repomd.xml"),
            ("", "https://h/r?token=a", "https://h/r/repodata/repomd.xml?token=a"),
            ("", "https://h/$basearch/${releasever}", "https://h/x86_64/15.5/repodata/repomd.xml"),
            ("sourcetype='mirrorlist'", "https://h/list?repo=a", "https://h/list?repo=a"),
            ("sourcetype='metalink'", "https://h/list", "https://h/list"),
            (
                "type='apt-deb' distribution='bookworm'",
                "http://h/debian",
                "http://h/debian/dists/bookworm/InRelease http://h/debian/dists/bookworm/Release",
            ),
            ("type='apt-deb'", "http://h/flat", "http://h/flat/InRelease http://h/flat/Release"),
            ("type='apt-deb' distribution='./'", "http://h/flat", "http://h/flat/InRelease http://h/flat/Release"),
        ] {
            assert_eq!(url(attributes, path), wanted, "{attributes} {path}");
        }
        for (path, wanted) in [
            ("dir:///srv/r", "/srv/r"),
            ("/srv/r", "/srv/r"),
            ("file:///srv/r", "/srv/r"),
            ("iso:///srv/a.iso", "/srv/a.iso"),
            ("this://repo", "/recipe/repo"),
        ] {
            assert_eq!(sign_of("", path), Sign::Path(wanted.into()), "{path}");
        }
        for path in ["obs://openSUSE:Leap/standard", "ftp://h/r", "https://h/$stream/r", "nothing", ""] {
            assert!(matches!(sign_of("", path), Sign::Unknown(_)), "{path}");
        }
    }
}
