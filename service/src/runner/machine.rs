//! Runs jobs on this machine: each job runs the programs of a pod, with its own directory and its own port.
//!
//! Logins always enter the image itself, in a jail that cannot load kernel modules: outside the jail, users would be
//! root on this machine.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use ims_sshd::environment::own_sshd;
use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::job::variables::{Program as Reader, VARIABLES};
use ims_sshd::local::names;
use ims_sshd::volume::layout::REMOTE_HOST_KEY;
use ims_sshd::volume::mounts_below::refuse_mounts_below;
use tokio::sync::mpsc;

use super::nodes::Nodes;
use super::pod::{self, POD, Pod, Program, State};
use super::{Death, Failures, Log, NewJob, NodeStatus, Runner, Started, programs};
use crate::records::{Address, Job};
use crate::settings::{MachineSettings, Settings};

/// Runs jobs on this machine.
pub struct Machine {
    shared: Arc<Shared>,
}

struct Shared {
    settings: MachineSettings,
    nodes: Nodes,
    /// Private key for logging in as root on the nodes.
    key: PathBuf,
    /// Path of `ims`, which runs the programs of a job.
    program: PathBuf,
    /// URL at which the programs reach the service.
    url: String,
    /// Variables that name the store.
    store: BTreeMap<String, String>,
    /// Directory of the store's objects; `None` if they are in S3.
    objects: Option<PathBuf>,
    /// Ports of jobs, by the jobs' IDs.
    ports: Mutex<BTreeMap<String, u16>>,
    deaths: Mutex<Option<mpsc::Sender<Death>>>,
}

/// Directory, in the job's directory, of the image root and the signal files.
const VOLUME: &str = "volume";
/// File, in the job's directory, with the public key that may log in.
const AUTHORIZED_KEYS: &str = "authorized_keys";
/// File, in the job's directory, with the values for the recipe's templates as JSON.
const VALUES: &str = "values.json";
/// Directory, in the job's directory, with the files of the build environment's sshd.
const SSHD: &str = "sshd";
/// File, in the job's directory, that exists once the job is to be removed.
const REMOVED: &str = "removed";

/// Time that a job's programs get to end by themselves after the record says that the job has ended.
const LAST_STEPS: Duration = Duration::from_mins(1);

/// Poll interval for the end of a job's programs: they are no children of this process, so nothing reports their end.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Value of `PATH` for programs if this process has none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables that a step inherits in addition to those of `ims-sshd`: search path, home, time zone, proxies.
const KEPT: [&str; 9] =
    ["PATH", "HOME", "TZ", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"];

impl Machine {
    /// A runner whose programs use the service at `url` and the store that `settings` names. `program` is the path of
    /// `ims`.
    pub fn new(settings: &Settings, url: String, program: PathBuf) -> Result<Self> {
        let store = programs::store_variables(settings).into_iter().collect();
        let objects = settings.directory().map(Path::to_owned);
        let (nodes, key) = (Nodes::new(&settings.remote_key), settings.remote_key.clone());
        let settings = settings.machine.clone();
        if !rustix::process::geteuid().is_root() {
            let advice = "run 'ims serve' as root; --runner none only keeps records";
            return Err(Error::new("run jobs on this machine").because("they need root").advise(advice));
        }
        let jobs = std::path::absolute(&settings.jobs).attempt(|| format!("find {}", settings.jobs.display()))?;
        // The path appears in sshd's options and configuration, where blanks separate words.
        let is_word = |path: &str| path.chars().all(|c| c.is_alphanumeric() || "/._-+".contains(c));
        if !jobs.to_str().is_some_and(is_word) {
            let complaint =
                format!("the directory of the jobs is '{}': expected a path without blanks", jobs.display());
            return Err(Error::bad_input(complaint));
        }
        let settings = MachineSettings { jobs, ..settings };
        make(&settings.jobs, true)?;
        let (ports, deaths) = Default::default();
        Ok(Self { shared: Arc::new(Shared { settings, nodes, key, program, url, store, objects, ports, deaths }) })
    }

    /// Returns the file that a job's programs write their log to.
    pub fn log_file(&self, job: &str) -> PathBuf {
        self.shared.directory(job).join(pod::LOG)
    }
}

/// Creates a directory that other users cannot enter: image roots contain setuid programs.
fn make(path: &Path, may_exist: bool) -> Result<()> {
    DirBuilder::new().recursive(may_exist).mode(0o700).create(path).attempt(|| format!("create {}", path.display()))
}

impl Shared {
    fn directory(&self, job: &str) -> PathBuf {
        self.settings.jobs.join(job)
    }

    /// Takes a free port for the job.
    fn take_port(&self, job: &str) -> Result<u16> {
        let address = self.settings.job_address;
        let mut taken = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |port: &u16| !taken.values().any(|other| other == port);
        let can_listen = |port: &u16| TcpListener::bind((address, *port)).is_ok();
        let range = &self.settings.job_ports;
        let free = range.clone().find(|port| is_free(port) && can_listen(port));
        let port = free.ok_or_else(|| {
            Error::new("start the job")
                .because(format!("no port of {}-{} is free on {address}", range.start(), range.end()))
                .advise("delete jobs that are no longer needed, or name more ports with --job-ports")
        })?;
        taken.insert(job.to_owned(), port);
        Ok(port)
    }

    fn free_port(&self, job: &str) {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).remove(job);
    }

    /// Creates the directory of a job with everything that its programs need, but does not start the programs.
    fn lay_out(&self, new: &NewJob) -> Result<Job> {
        let job = &new.job;
        let directory = self.directory(&job.id);
        make(&directory, false)?;
        let volume = directory.join(VOLUME);
        make(&volume, false)?;
        let written = |name: &str, text: &str| {
            let path = directory.join(name);
            std::fs::write(&path, text).attempt(|| format!("write {}", path.display()))
        };
        written(AUTHORIZED_KEYS, &new.public_key)?;
        let port = self.take_port(&job.id)?;
        let address = SocketAddr::new(self.settings.job_address, port);
        let sshd = directory.join(SSHD);
        let config =
            own_sshd::configure(&directory, address, &sshd.join(AUTHORIZED_KEYS), &job.id, own_sshd::SESSIONS)?;
        let pod = Pod {
            port,
            before: match new.recipe_type {
                None => vec![self.prepare(new, &volume)],
                Some(_) => {
                    let values = serde_json::to_string(&new.template_dictionary);
                    written(VALUES, &values.attempt(|| "write the values of the recipe")?)?;
                    self.build(new, &directory, &volume)
                }
            },
            environment: self.environment(job, &directory, &sshd.join("sshd_config"), &volume),
            sidecar: self.sidecar(job, &directory, &config, &sshd, &volume),
        };
        pod.write(&directory)?;
        let mut started = job.clone();
        let host = self.settings.job_address.to_string();
        let address = Address { host, port, host_key: None };
        for container in started.ssh_containers.iter_mut().flatten() {
            let networks = ["customer_access", "cluster.local"];
            container.connection_info = Some(networks.map(|name| (name.to_owned(), address.clone())).into());
            container.jail = true;
        }
        Ok(started)
    }

    /// Returns the variables of a step: those of this process that the step reads, overridden by those of the job.
    fn variables(&self, job: &Job, volume: &Path, readers: &[Reader]) -> BTreeMap<String, String> {
        let is_read = |name: &&str| {
            VARIABLES.iter().any(|variable| {
                variable.name == *name && variable.readers.iter().any(|reader| readers.contains(reader))
            })
        };
        let names = VARIABLES.iter().map(|variable| variable.name).filter(is_read).chain(KEPT);
        let mut variables: BTreeMap<_, _> =
            names.filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?))).collect();
        variables.entry("PATH".into()).or_insert_with(|| PATH.into());
        // Do not pass on variables that name another service or store, format this service's own log, or name a script.
        for other in ["OAUTH_CONFIG_DIR", "IMAGE_STORE", "LOG_FORMAT", "LOG_LEVEL", "CUSTOMIZATION_SCRIPT"] {
            variables.remove(other);
        }
        let truth = |is: bool| if is { "True" } else { "False" }.to_owned();
        variables.extend([
            ("IMS_ACTION".to_owned(), job.job_type.clone()),
            ("IMS_JOB_ID".to_owned(), job.id.clone()),
            ("IMS_URL".to_owned(), self.url.clone()),
            ("IMAGE_ROOT_PARENT".to_owned(), volume.display().to_string()),
            ("IMAGE_ROOT_ARCHIVE_NAME".to_owned(), job.image_root_archive_name.clone()),
            ("KERNEL_FILENAME".to_owned(), job.kernel_file_name.clone()),
            ("INITRD_FILENAME".to_owned(), job.initrd_file_name.clone()),
            ("KERNEL_PARAMETERS_FILENAME".to_owned(), job.kernel_parameters_file_name.clone()),
            ("BUILD_ARCH".to_owned(), job.arch.clone()),
            ("ENABLE_DEBUG".to_owned(), truth(job.enable_debug)),
            ("SSH_JAIL".to_owned(), truth(true)),
            ("JOB_ENABLE_DKMS".to_owned(), truth(false)),
            ("REMOTE_BUILD_NODE".to_owned(), job.remote_build_node.clone()),
            ("IMS_REMOTE_KEY".to_owned(), self.key.display().to_string()),
        ]);
        variables
    }

    fn prepare(&self, new: &NewJob, volume: &Path) -> Program {
        let mut variables = self.variables(&new.job, volume, &[Reader::Publishing]);
        variables.insert("DOWNLOAD_MD5SUM".into(), new.download_md5sum.clone());
        variables.extend(self.store.clone());
        Program { arguments: words(&[&"prepare", &volume.display(), &self.source(new)]), variables }
    }

    /// Returns the source of an image or recipe for a command line. Does not use the presigned URL: it is a secret, and
    /// `ps` would show it to every user of the machine.
    fn source(&self, new: &NewJob) -> String {
        match &self.objects {
            Some(objects) => objects.join(&new.object.bucket).join(&new.object.key).display().to_string(),
            None => new.object.to_string(),
        }
    }

    fn build(&self, new: &NewJob, directory: &Path, volume: &Path) -> Vec<Program> {
        let recipe = volume.join("recipe");
        let mut variables = self.variables(&new.job, volume, &[Reader::Publishing, Reader::Recipe]);
        variables.insert("DOWNLOAD_MD5SUM".into(), new.download_md5sum.clone());
        variables.extend(self.store.clone());
        variables.insert("RECIPE_ROOT_PARENT".into(), recipe.display().to_string());
        let values = directory.join(VALUES);
        let fetch: [&dyn std::fmt::Display; 5] =
            [&"fetch-recipe", &recipe.display(), &self.source(new), &"--values", &values.display()];
        let steps = [words(&fetch), words(&[&"wait-for-repos"]), words(&[&"build", &"--authority-if-any"])];
        steps.map(|arguments| Program { arguments, variables: variables.clone() }).into()
    }

    fn environment(&self, job: &Job, directory: &Path, config: &Path, volume: &Path) -> Program {
        let mut variables = self.variables(job, volume, &[Reader::Environment]);
        let log = directory.join("sshd.log");
        variables.insert("SSHD_OPTIONS".into(), format!("-E {} -f {}", log.display(), config.display()));
        variables.insert("SSHD_CONFIG_FILE".into(), config.display().to_string());
        variables.insert("IMS_JAIL_HOSTNAME".into(), names::host_label(&job.image_root_archive_name));
        Program { arguments: words(&[&"entrypoint", &volume.display()]), variables }
    }

    fn sidecar(&self, job: &Job, directory: &Path, config: &Path, sshd: &Path, volume: &Path) -> Program {
        let mut variables = self.variables(job, volume, &[Reader::Publishing, Reader::Sidecar]);
        variables.extend(self.store.clone());
        let keys = directory.join(AUTHORIZED_KEYS);
        let arguments = words(&[
            &"sidecar",
            &volume.display(),
            &"--authorized-keys",
            &keys.display(),
            &"--sshd-config",
            &config.display(),
            &"--sshd-directory",
            &sshd.display(),
        ]);
        Program { arguments, variables }
    }

    /// Starts the programs of a job, and watches them.
    fn run(self: &Arc<Self>, job: &str) {
        match pod::start(&self.program, &self.directory(job)) {
            Ok(()) => self.follow(job),
            Err(error) => self.report(job, error.to_string()),
        }
    }

    /// Waits in the background until the job's programs have ended; reports a death if they failed or were killed.
    fn follow(self: &Arc<Self>, job: &str) {
        let (shared, job) = (self.clone(), job.to_owned());
        tokio::spawn(async move {
            let directory = shared.directory(&job);
            // Check in the order in which a removal creates `REMOVED` and deletes `POD`.
            let is_removed = || directory.join(REMOVED).exists() || !directory.join(POD).exists();
            let failure = loop {
                if is_removed() {
                    return;
                }
                match pod::state(&directory) {
                    Ok(State::New | State::Running) => tokio::time::sleep(LOOK_EVERY).await,
                    Ok(State::Ended(failure)) => break failure,
                    Ok(State::Killed) => {
                        let stopped = directory.clone();
                        let _ = tokio::task::spawn_blocking(move || pod::stop(&stopped)).await;
                        break Some(
                            "the parent process of its programs was killed, or the machine was restarted".into(),
                        );
                    }
                    Err(error) => break Some(error.to_string()),
                }
            };
            if let Some(failure) = failure.filter(|_| !is_removed()) {
                shared.report(&job, failure);
            }
        });
    }

    fn report(&self, job: &str, reason: String) {
        let deaths = self.deaths.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let death = Death { id: job.to_owned(), reason };
        if let Some(deaths) = deaths {
            tokio::spawn(async move { deaths.send(death).await });
        }
    }

    /// Removes what an ended job holds, after its last program has ended. Works in the background.
    fn clear(self: &Arc<Self>, job: &str) {
        let (shared, job) = (self.clone(), job.to_owned());
        tokio::spawn(async move {
            let directory = shared.directory(&job);
            let until = tokio::time::Instant::now() + LAST_STEPS;
            while matches!(pod::state(&directory), Ok(State::Running)) && tokio::time::Instant::now() < until {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            let cleared = tokio::task::spawn_blocking({
                let shared = shared.clone();
                let job = job.clone();
                move || shared.clear_now(&job)
            });
            if let Ok(Err(error)) = cleared.await {
                tracing::error!("{error}; job {job} still takes space");
            }
        });
    }

    /// Ends a job's processes and removes its volume, or its whole directory if the job is being deleted.
    fn clear_now(&self, job: &str) -> Result<()> {
        let directory = self.directory(job);
        pod::stop(&directory);
        pod::end_sshd(&directory.join(SSHD).join("sshd_config"));
        let is_removed = directory.join(REMOVED).exists();
        let place = if is_removed { directory } else { directory.join(VOLUME) };
        if place.exists() {
            let attempted = format!("remove {}", place.display());
            refuse_mounts_below(&place, &attempted, "removal")?;
            // Remove the description first: a directory without it counts as removed and is not reported as a job that
            // died.
            let description = std::fs::remove_file(place.join(POD));
            let removed =
                description.or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) });
            removed.and_then(|()| std::fs::remove_dir_all(&place)).attempt(|| attempted)?;
        }
        self.free_port(job);
        Ok(())
    }

    /// Clears ended jobs that an earlier process of the service could not clear.
    fn clear_left_over(self: &Arc<Self>, running: &[Job]) -> Result<()> {
        let attempted = || format!("look for jobs in {}", self.settings.jobs.display());
        for entry in std::fs::read_dir(&self.settings.jobs).attempt(attempted)? {
            let entry = entry.attempt(attempted)?;
            let Ok(job) = entry.file_name().into_string() else { continue };
            if uuid::Uuid::try_parse(&job).is_err() || running.iter().any(|running| running.id == job) {
                continue;
            }
            if entry.path().join(REMOVED).exists() || entry.path().join(VOLUME).exists() {
                self.clear(&job);
            }
        }
        Ok(())
    }
}

fn words(words: &[&dyn std::fmt::Display]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

#[async_trait]
impl Runner for Machine {
    async fn start(&self, job: &NewJob) -> std::result::Result<Started, Failures> {
        let (shared, job) = (self.shared.clone(), job.clone());
        let laid_out = tokio::task::spawn_blocking(move || {
            shared.lay_out(&job).inspect_err(|_| {
                shared.free_port(&job.job.id);
                let _ = std::fs::remove_dir_all(shared.directory(&job.job.id));
            })
        });
        let laid_out = laid_out.await.map_err(|e| vec![e.to_string()])?;
        laid_out.map_err(|error| vec![error.to_string()])
    }

    async fn stored(&self, job: &Job) {
        self.shared.run(&job.id);
    }

    async fn log(&self, job: &Job, _is_followed: bool) -> std::result::Result<Option<Log>, Failures> {
        Ok(Some(Log::File(self.log_file(&job.id))))
    }

    fn host_key(&self, job: &Job) -> Option<String> {
        let directory = self.shared.directory(&job.id);
        let of_node = std::fs::read_to_string(directory.join(VOLUME).join(REMOTE_HOST_KEY));
        let own = || std::fs::read_to_string(directory.join(own_sshd::HOST_KEY).with_extension("pub"));
        let key = if job.remote_build_node.is_empty() { own() } else { of_node };
        // Leave out the comment.
        Some(key.ok()?.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
    }

    async fn release(&self, job: &Job) -> std::result::Result<(), Failures> {
        // Clear in the background: the sidecar, which reports the end of its job, ends only after the answer to this
        // call.
        self.shared.clear(&job.id);
        Ok(())
    }

    async fn remove(&self, job: &Job) -> std::result::Result<(), Failures> {
        let directory = self.shared.directory(&job.id);
        let marked = std::fs::File::create(directory.join(REMOVED));
        match marked {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.attempt(|| format!("remove {}", directory.display())).map_err(|e| vec![e.to_string()])?,
        };
        let (shared, job) = (self.shared.clone(), job.id.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = shared.clear_now(&job) {
                tracing::error!("{error}; remove it by hand");
            }
        });
        Ok(())
    }

    fn takes_nodes(&self, job: &Job) -> bool {
        // Remote build nodes customize images only; recipes are built on this machine.
        job.job_type == "customize" && self.shared.nodes.has_key()
    }

    async fn probe(&self, xname: &str) -> NodeStatus {
        self.shared.nodes.probe(xname).await
    }

    async fn watch(&self, running: Vec<Job>, deaths: mpsc::Sender<Death>) {
        *self.shared.deaths.lock().unwrap_or_else(PoisonError::into_inner) = Some(deaths.clone());
        for job in &running {
            let directory = self.shared.directory(&job.id);
            match (Pod::read(&directory), pod::state(&directory)) {
                (Ok(pod), Ok(state)) => {
                    self.shared.ports.lock().unwrap_or_else(PoisonError::into_inner).insert(job.id.clone(), pod.port);
                    // In state `New`, the service was killed before it started the programs.
                    if state == State::New { self.shared.run(&job.id) } else { self.shared.follow(&job.id) }
                }
                (Err(error), _) | (_, Err(error)) => self.shared.report(&job.id, error.to_string()),
            }
        }
        if let Err(error) = self.shared.clear_left_over(&running) {
            tracing::error!("{error}");
        }
        deaths.closed().await;
    }
}
