//! An open environment: its parts, how they are created, and how the image root is released.

use std::time::Instant;

use crate::environment::groundwork::Groundwork;
use crate::environment::recovery::recover;
use crate::environment::restarts::Part;
use crate::environment::script::Script;
use crate::environment::session_list::SessionList;
use crate::environment::settings::Settings;
use crate::environment::sshd_setup::{Asked, configure_sshd, login_shell};
use crate::environment::watchdog::Watchdog;
use crate::error::Result;
use crate::jail::plan::Plan;
use crate::jailer::emulation::{self, Emulation};
use crate::jailer::open::{OpenJail, TIME_TO_CLOSE_FILES, Wanted};
use crate::sshd::daemon::{Clients, Daemon, Running};
use crate::sshd::effective::Effective;
use crate::sshd::refusals::Refusals;
use crate::sys::process::{Entry, Expendable};
use crate::sys::tree::Tree;
use crate::volume::image_root;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::StateDirectory;

/// Settings and directories of an open environment. They outlive the environment, since the verdict is recorded in them
/// after its end.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) settings: &'a Settings,
    pub(super) state: &'a StateDirectory,
    pub(super) files: &'a SignalFiles,
    pub(super) image_root: &'a Tree,
}

/// An environment on an image root.
pub(super) struct Open {
    groundwork: Groundwork,
    /// Questions to sshd about its configuration; `None` once sshd has answered.
    asked: Option<Asked>,
    effective: Effective,
    /// Emulation of an image of another architecture.
    emulation: Emulation,
    /// `None` in plain mode, and if the jail died and no new one could be made yet.
    pub(super) jail: Option<OpenJail>,
    /// `None` between the death of sshd and its restart.
    pub(super) daemon: Option<Daemon>,
    clients: Clients,
    pub(super) session_list: SessionList,
    /// Watches sshd's log for refused logins, if sshd logs to a file.
    pub(super) refusals: Option<Refusals>,
    pub(super) watchdog: Watchdog,
    pub(super) script: Option<Script>,
    /// Parts to restart, and when.
    pub(super) restarts: Vec<(Part, Instant)>,
}

impl Open {
    /// Makes everything but the jail and sshd: cleans up after a killed environment, sets up emulation, configures sshd
    /// (the effective options are collected by [`Open::make_jail`]), and listens for sessions.
    pub(super) fn make(mut groundwork: Groundwork, place: Place<'_>) -> Result<Self> {
        let Place { settings, state, files, image_root } = place;
        let recovered = recover(settings, files, image_root, state, std::mem::take(&mut groundwork.left_over))?;
        if settings.job.jailed && !recovered {
            image_root::remove_old_marks(image_root)?;
        }
        let tier = groundwork.jail.as_ref().map(|kind| kind.tier);
        let emulation = match emulation::prepare(image_root, settings.job.architecture, files.parent(), tier) {
            // In plain mode, go on without emulation: people may need only the image's files, and run none of its
            // programs.
            Err(e) if !settings.job.jailed => {
                tracing::warn!("{e}");
                Emulation::default()
            }
            other => other?,
        };
        Ok(Self {
            groundwork,
            asked: Some(configure_sshd(settings, state)?),
            effective: Effective::default(),
            emulation,
            jail: None,
            daemon: None,
            clients: Clients::default(),
            session_list: SessionList::listen(state.path())?,
            refusals: settings.sshd.log.as_deref().map(|log| Refusals::new(log, settings.job.jailed)),
            watchdog: Watchdog::start(),
            script: None,
            restarts: Vec::new(),
        })
    }

    /// Starts sshd, and waits until it listens.
    pub(super) fn start_sshd(&mut self, place: Place<'_>) -> Result<()> {
        let Place { settings, state, .. } = place;
        let shell = self.groundwork.jail.as_ref().map(|kind| login_shell(kind, state)).transpose()?.flatten();
        let _expendable = Expendable::children();
        let daemon = Daemon::start(&settings.sshd, &self.effective, shell.as_ref())?;
        daemon.record(&state.sshd())?;
        tracing::info!(pid = daemon.pid.as_raw(), "sshd is listening");
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Makes the jail, except in plain mode, and collects sshd's effective options.
    pub(super) fn make_jail(&mut self, place: Place<'_>) -> Result<()> {
        let Place { settings, state, files, image_root } = place;
        let (asked, effective) = (&mut self.asked, &mut self.effective);
        let mut hear = || -> Result<Vec<String>> {
            if let Some(asked) = asked.take() {
                *effective = asked.answer(settings, state)?;
            }
            let names = effective.set_env().into_iter().map(|(name, _)| name);
            Ok(names.chain(effective.accept_env().map(str::to_owned)).collect())
        };
        let Some(kind) = &self.groundwork.jail else { return hear().map(drop) };
        let wanted = Wanted {
            plan: Plan {
                dkms: settings.dkms,
                emulated: self.emulation.in_jail,
                hostname: settings.hostname.clone(),
                label: settings.image.clone(),
                programs: self.groundwork.sftp.clone(),
                binds: settings.binds.clone(),
                ..kind.plan(&files.path().join(settings.job.image_root()))
            },
            image_root,
            record_directory: files.parent(),
            job: settings.job.id.as_deref(),
            in_place: settings.in_place,
        };
        let _expendable = Expendable::children();
        self.jail = Some(OpenJail::open(wanted, state, hear)?);
        tracing::info!(tier = kind.tier.name(), dkms = settings.dkms, "the jail is made");
        Ok(())
    }

    fn remake_jail(&mut self, place: Place<'_>) -> Result<()> {
        // Seal the image root while the old jail still exists: a file that is open on the old jail's mount would not be
        // found through the mount of the new jail.
        if self.jail.is_some() {
            OpenJail::seal(place.state, Instant::now() + TIME_TO_CLOSE_FILES, None)?;
        }
        if let Some(jail) = self.jail.take() {
            jail.clear(place.image_root, place.files.parent())?;
        }
        self.make_jail(place)
    }

    /// Restarts parts whose wait is over. Returns those that could not be restarted.
    pub(super) fn restart_due(&mut self, place: Place<'_>) -> Vec<Part> {
        let now = Instant::now();
        let mut due: Vec<_> = self.restarts.extract_if(.., |(_, at)| *at <= now).map(|(part, _)| part).collect();
        due.retain(|part| {
            let tried = match part {
                Part::Sshd => self.start_sshd(place),
                Part::Jail => self.remake_jail(place),
            };
            tried.inspect_err(|e| tracing::error!("{e}")).is_err()
        });
        due
    }

    /// Starts the customization script, if there is one.
    pub(super) fn start_script(&mut self, settings: &Settings) -> Result<()> {
        let Some(path) = settings.script.as_ref().filter(|p| p.exists()) else { return Ok(()) };
        let mut variables = settings.session_variables.clone();
        variables.push(("IMAGE_ROOT_PARENT".into(), settings.job.parent.display().to_string()));
        tracing::info!("starting the customization script {}", path.display());
        let _expendable = Expendable::children();
        self.script = Some(Script::start(path, &variables)?);
        Ok(())
    }

    /// Returns whether the customization script is running.
    pub(super) fn script_runs(&self) -> bool {
        self.script.as_ref().is_some_and(|script| script.pid().is_some())
    }

    /// Processes that sshd runs for clients. In plain mode, this is also how sessions are found and logged.
    pub(super) fn running(&mut self) -> Running {
        let running = self.clients.look(self.daemon.as_ref().map(|daemon| daemon.pid));
        if self.groundwork.jail.is_none() {
            self.session_list.compare(&running.sessions);
        }
        running
    }

    /// Logs logins that sshd refused, or ended before their session.
    pub(super) fn look_at_refusals(&mut self) {
        if let Some(refusals) = &mut self.refusals {
            refusals.look(|client, port| self.session_list.has_begun(client, port));
        }
    }

    /// Interactive shells among `running`.
    pub(super) fn interactive(&self, running: Running) -> Vec<Entry> {
        let mut sessions = running.sessions;
        sessions.retain(|leader| self.session_list.is_interactive(leader));
        sessions
    }

    /// Releases the image root after all processes have ended. Waits until `limit` for processes outside the jail that
    /// have a file of the image root open for writing; with `is_failed`, such a file is only logged. Logs errors, and
    /// returns whether there were none.
    pub(super) fn release(self, place: Place<'_>, limit: Instant, is_failed: bool) -> bool {
        let mut cleanly = true;
        if let Some(jail) = self.jail {
            let in_place = place.settings.in_place.then_some(place.image_root);
            cleanly = match OpenJail::seal(place.state, limit, in_place) {
                Err(e) if is_failed => {
                    tracing::warn!("{e}");
                    true
                }
                result => succeeded(result),
            };
            cleanly &= succeeded(jail.clear(place.image_root, place.files.parent()));
        }
        if let Some(refusals) = self.refusals {
            refusals.close(|client, port| self.session_list.has_begun(client, port));
        }
        self.session_list.close();
        cleanly
    }
}

/// Logs an error without stopping. Returns whether there was none.
pub(super) fn succeeded(result: Result<()>) -> bool {
    result.inspect_err(|e| tracing::error!("{e}")).is_ok()
}
