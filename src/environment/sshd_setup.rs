//! Sets up sshd's configuration and login shell for a build environment.

use crate::environment::settings::Settings;
use crate::error::{Attempt, Result};
use crate::jail::arguments::Arguments;
use crate::jail::tier::Tier;
use crate::jailer::open;
use crate::jailer::trial::Choice;
use crate::sshd::accept_env;
use crate::sshd::config;
use crate::sshd::effective::{Effective, Question};
use crate::sshd::login_shell::LoginShell;
use crate::volume::state_directory::StateDirectory;

/// Questions to sshd about its effective configuration, which sshd answers while the jail is being made.
pub(super) struct Asked {
    roots: Question,
    /// In jailed mode: the question about a user who must not get in, and the forced command.
    nobodys: Option<(Question, String)>,
}

/// Writes the settings into sshd's configuration, and has sshd itself print the effective options (`sshd -T`).
pub(super) fn configure_sshd(settings: &Settings, state: &StateDirectory) -> Result<Asked> {
    let fragment = state.fragment();
    let options = &settings.sshd.asking;
    let shown = settings.sshd_config.display();
    // Remove an old fragment before the configuration is read: sshd ignores an Include of a file that does not exist.
    let _ = std::fs::remove_file(&fragment);
    // Ignore a configuration that cannot be read: sshd is asked next and says what is wrong with it.
    let keywords = accept_env::keywords(&settings.sshd_config, &settings.sshd).ok();
    let is_simple = keywords.as_ref().is_some_and(|keywords| !keywords.contains("setenv"));
    let set_env = if is_simple { Vec::new() } else { Effective::ask(options, "root")?.set_env() };
    let force_command = settings.job.jailed.then(|| force_command(state)).transpose()?;
    let text = config::fragment(
        &settings.session_variables,
        &set_env,
        &keywords.unwrap_or_default(),
        settings.agent,
        force_command.as_deref(),
    );
    std::fs::write(&fragment, &text).attempt(|| format!("write {}", fragment.display()))?;
    let before = std::fs::read(&settings.sshd_config).attempt(|| format!("read {shown}"))?;
    let after = config::including(&before, &fragment);
    if after != before {
        config::write(&settings.sshd_config, &after)?;
    }
    let nobodys = force_command.map(|command| Ok((Question::put(options, "nobody")?, command))).transpose()?;
    Ok(Asked { roots: Question::put(options, "root")?, nobodys })
}

impl Asked {
    /// Waits for the effective options. With a jail, refuses a configuration that would let a session land outside it.
    pub(super) fn answer(self, settings: &Settings, state: &StateDirectory) -> Result<Effective> {
        // Collect both answers before an error returns, so that no sshd is left unreaped.
        let roots = self.roots.answer();
        let nobodys = self.nobodys.map(|(question, command)| (question.answer(), command));
        let effective = roots.map_err(|error| {
            // Ask again without our line, which shifts the line numbers in sshd's complaint.
            let _ = std::fs::remove_file(state.fragment());
            let own = unconfigure_sshd(settings).and_then(|_| Effective::ask(&settings.sshd.asking, "root"));
            own.err().unwrap_or(error)
        })?;
        if let Some((nobodys, command)) = nobodys {
            accept_env::check(&settings.sshd_config, &settings.sshd)?;
            effective.check_jail(&command)?;
            nobodys?.check_denied()?;
        }
        Ok(effective)
    }
}

/// Removes the settings from sshd's configuration. Returns whether there were any.
pub(crate) fn unconfigure_sshd(settings: &Settings) -> Result<bool> {
    let shown = settings.sshd_config.display();
    let before = match std::fs::read(&settings.sshd_config) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        other => other.attempt(|| format!("read {shown}"))?,
    };
    let after = config::without_include(&before);
    if after == before {
        return Ok(false);
    }
    config::write(&settings.sshd_config, &after).map(|()| true)
}

fn force_command(state: &StateDirectory) -> Result<String> {
    Ok(Arguments::forced_command(&open::program()?, &state.jail()))
}

/// Login shell that sshd finds for root, so that no shell of the container runs before the jail is entered. `None` in
/// tiers in which sshd cannot get a mount namespace of its own.
pub(crate) fn login_shell(jail: &Choice, state: &StateDirectory) -> Result<Option<LoginShell>> {
    let shell = || Ok(LoginShell { program: open::program()?, passwd: state.passwd() });
    (jail.tier == Tier::Namespace).then(shell).transpose()
}
