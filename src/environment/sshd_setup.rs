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

/// Writes the settings into sshd's configuration and asks sshd itself for the effective options (`sshd -T`). With a
/// jail, refuses a configuration that would let a session land outside it.
pub(crate) fn configure_sshd(settings: &Settings, state: &StateDirectory) -> Result<Effective> {
    let fragment = state.fragment();
    let options = &settings.sshd.asking;
    let shown = settings.sshd_config.display();
    // Ask first without the fragment: sshd ignores an Include of a file that does not exist.
    let _ = std::fs::remove_file(&fragment);
    let base = Effective::ask(options, "root")?;
    let force_command = settings.job.jailed.then(|| force_command(state)).transpose()?;
    let text = config::fragment(&settings.session_variables, &base, settings.agent, force_command.as_deref());
    std::fs::write(&fragment, &text).attempt(|| format!("write {}", fragment.display()))?;
    let before = std::fs::read(&settings.sshd_config).attempt(|| format!("read {shown}"))?;
    let after = config::including(&before, &fragment);
    if after != before {
        config::write(&settings.sshd_config, &after)?;
    }
    // Run both questions at the same time, since the start waits for them. Collect both answers before an error
    // returns, so that no sshd is left unreaped.
    let nobodys = force_command.is_some().then(|| Question::put(options, "nobody")).transpose()?;
    let roots = Effective::ask(options, "root");
    let nobodys = nobodys.map(Question::answer);
    let effective = roots?;
    if let (Some(command), Some(nobodys)) = (&force_command, nobodys) {
        accept_env::check(&settings.sshd_config, &settings.sshd)?;
        effective.check_jail(command)?;
        nobodys?.check_denied()?;
    }
    Ok(effective)
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
/// tiers where no mount namespace can be made for sshd.
pub(crate) fn login_shell(jail: &Choice, state: &StateDirectory) -> Result<Option<LoginShell>> {
    let shell = || Ok(LoginShell { program: open::program()?, passwd: state.passwd() });
    (jail.tier == Tier::Namespace).then(shell).transpose()
}
