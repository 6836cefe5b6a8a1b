//! Decides whether a job needs a shell at all.

use crate::environment::settings::Settings;
use crate::error::Result;
use crate::job::action::Action;
use crate::volume::layout::BUILD_FAILED;
use crate::volume::signal_files::SignalFiles;

/// Returns whether the job needs a shell. A create job needs a shell only to inspect a failed build, and only if
/// ENABLE_DEBUG is true.
pub(super) fn is_wanted(settings: &Settings) -> Result<bool> {
    if settings.job.action == Some(Action::Customize) {
        return Ok(true);
    }
    let failed = match SignalFiles::open(&settings.job.parent)? {
        Some(files) => files.stands(BUILD_FAILED)?,
        None => false,
    };
    match (failed, settings.job.debug) {
        (true, true) => return Ok(true),
        (true, false) => tracing::info!("the build failed, and ENABLE_DEBUG is not true: no shell is wanted"),
        (false, _) => tracing::info!("the build did not fail: no shell is wanted"),
    }
    Ok(false)
}
