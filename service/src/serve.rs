//! Starts the service and stops it cleanly.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use ims_sshd::error::{Attempt, Result};
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};

use crate::connections::{self, Connections};
use crate::data;
use crate::database::{Database, Place, files};
use crate::http::{self, Service};
use crate::listen;
use crate::records::Job;
use crate::runner::{Kubernetes, Machine, Nothing, Runner};
use crate::settings::{On, Records, Settings};
use crate::signals::Signals;
use crate::store::Store;

/// Interval at which leftovers of jobs are searched for.
const CLEAR_EVERY: Duration = Duration::from_mins(2);

/// Time without a change after which a file that is being written counts as left by a killed process.
const UNFINISHED_FOR: Duration = Duration::from_mins(2);

/// Pause before retrying to record a job's death after the database has failed.
const RECORD_AGAIN: Duration = Duration::from_secs(5);

/// Runs the service until SIGTERM or SIGINT.
pub fn serve(settings: Settings) -> Result<()> {
    runtime()?.block_on(run(settings))
}

/// Writes the records into `directory`, in the format of upstream's files.
pub fn export(records: &Records, directory: &Path) -> Result<()> {
    if records.database.is_none() {
        data::check_export(&records.data, directory)?;
    }
    runtime()?.block_on(async {
        let database = open(records).await?;
        files::export(&database, directory).await?;
        database.close().await;
        Ok(())
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().attempt(|| "start threads")
}

async fn open(records: &Records) -> Result<Database> {
    if records.database.is_none() {
        data::make(&records.data)?;
    }
    data::check(&records.data)?;
    if let Some(url) = &records.database {
        return Database::open(Place::Url(url)).await;
    }
    data::close_database(&records.data)?;
    Database::open(Place::File(&records.data.join(data::DATABASE))).await
}

async fn run(settings: Settings) -> Result<()> {
    // Replicas share a PostgreSQL, but no file of SQLite: each takes the jobs that it did not start for dead.
    let _records = match &settings.records {
        Records { database: Some(_), .. } => None,
        Records { data, .. } => {
            data::make(data)?;
            Some(data::lock(data)?)
        }
    };
    let mut _jobs = None;
    let database = open(&settings.records).await?;
    files::import(&database, &settings.records.data).await?;
    database.free_removals().await.attempt(|| "look for objects to remove")?;
    let store = Store::open(&settings)?;
    let access = listen::access(&settings)?;
    let socket = settings.socket().map(std::path::absolute).transpose().attempt(|| "find the current directory")?;
    let local = socket.as_deref().map(listen::on_socket).transpose()?;
    let mut settings = settings;
    let remote = match settings.listen.address {
        Some(address) => {
            let (remote, tls, address) = listen::on_address(address, &settings.listen).await?;
            settings.listen.address = Some(address);
            Some((remote, tls))
        }
        None => None,
    };
    let runner: Arc<dyn Runner> = match settings.runs_on() {
        On::None => Arc::new(Nothing),
        On::Machine => {
            let program = std::env::current_exe().attempt(|| "find this program")?;
            // Jobs reach the service by the socket, which needs neither a token nor a certificate.
            let url = socket.as_ref().map(|socket| format!("unix:{}", socket.display()));
            let machine = Machine::new(&settings, url.expect("jobs here have a socket"), program)?;
            _jobs = Some(data::lock(&settings.machine.jobs)?);
            Arc::new(machine)
        }
        On::Kubernetes => {
            if !database.is_shared() {
                files::make_missing(&database, &settings.records.data).await?;
            }
            Arc::new(Kubernetes::new(&settings, database.identity()).await?)
        }
    };
    let service = Arc::new(Service::new(settings, database, store, runner, access));
    // If only this process uses the database, no start can be in progress, so every start in the database was
    // interrupted.
    let age = if service.database.is_shared() { http::LONGEST_START } else { TimeDelta::zero() };
    let cut_off = service.starts(age).await;
    let sweeping = service.clone();
    let sweep = tokio::spawn(async move { sweeping.sweep().await });
    let finishing = service.clone();
    let finish = tokio::spawn(async move {
        // Files that a kill has just left are too young at first.
        for pause in [Duration::ZERO, UNFINISHED_FOR] {
            tokio::time::sleep(pause).await;
            let service = finishing.clone();
            let _ = tokio::task::spawn_blocking(move || service.store.remove_unfinished(UNFINISHED_FOR)).await;
        }
    });
    let clearing = service.clone();
    let clear = tokio::spawn(async move {
        // Clear in the background, so that a slow cluster does not delay the service.
        clearing.clear_starts(cut_off).await;
        loop {
            clearing.clear_held().await;
            tokio::time::sleep(CLEAR_EVERY).await;
        }
    });
    let watching = tokio::spawn(watch(service.clone()));
    let places = socket.iter().map(|socket| format!("unix:{}", socket.display()));
    let places: Vec<_> = places.chain(service.settings.listen.address.map(|_| service.settings.url())).collect();
    tracing::info!("listening on {}", places.join(" and "));
    let (stop, stopping) = watch::channel(false);
    let asked = asked_to_stop()?;
    let stopped = tokio::spawn(async move {
        asked.await;
        let _ = stop.send(true);
    });
    let connections = Connections::new(http::router(service.clone()), stopping);
    tokio::join!(
        async {
            if let Some(local) = local {
                connections.accept(local, None, connections::local).await;
            }
        },
        async {
            if let Some((remote, tls)) = remote {
                connections.accept(remote, tls, connections::remote).await;
            }
        }
    );
    connections.ended().await;
    for task in [sweep, finish, clear, watching, stopped] {
        task.abort();
    }
    service.database.close().await;
    tracing::info!("stopped: all requests are answered");
    Ok(())
}

/// Records the deaths of jobs that the runner reports, until the runner stops watching.
async fn watch(service: Arc<Service>) {
    let running = match service.database.records::<Job>().await {
        Ok(jobs) => jobs.into_iter().filter(|job| !job.has_ended()).collect(),
        Err(error) => {
            tracing::error!("cannot watch the running jobs: {error}; start the service again");
            return;
        }
    };
    let (sender, mut deaths) = mpsc::channel(64);
    let runner = service.runner.clone();
    let watching = tokio::spawn(async move { runner.watch(running, sender).await });
    while let Some(death) = deaths.recv().await {
        while let Err(error) = service.job_died(&death).await {
            tracing::error!("cannot record the end of job {}: {error}; will try again", death.id);
            tokio::time::sleep(RECORD_AGAIN).await;
        }
    }
    watching.abort();
}

/// Returns a future that waits for SIGTERM or SIGINT.
fn asked_to_stop() -> Result<impl Future<Output = ()> + Send> {
    let mut signals = Signals::receive(&[Signal::SIGINT, Signal::SIGTERM])?;
    Ok(async move {
        signals.next().await;
        tracing::info!("stopping: requests that have begun are answered");
    })
}
