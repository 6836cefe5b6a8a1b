//! Starts the service and stops it in order.

use ims_sshd::error::Result;

use crate::settings::Settings;

/// Runs the service until SIGTERM or SIGINT.
pub fn serve(_settings: &Settings) -> Result<()> {
    Ok(())
}
