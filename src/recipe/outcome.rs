//! Sets the status of a create job in IMS when its steps begin or fail.

use std::ffi::OsString;

use crate::error::{Error, Result};
use crate::ims::records::Status;
use crate::publish::settings::Settings;
use crate::transfer::Work;

/// Carries out one step of a create job. Sets the job's status to `begins` before the step, and to `error` if the step
/// fails: IMS does not otherwise learn that an init container has failed.
pub(crate) fn step(
    settings: &Settings,
    begins: Option<Status>,
    carry_out: impl FnOnce(&Work) -> Result<()>,
) -> Result<u8> {
    build(settings, begins, |work| carry_out(work).map(|()| Outcome::Built))
}

/// Outcome of a build.
pub(crate) enum Outcome {
    /// The image root is complete.
    Built,
    /// The image root is incomplete; the job's next container decides how the job continues.
    Failed(Error),
}

/// Like [`step`], but a failed build ([`Outcome::Failed`]) does not end the job.
pub(crate) fn build(
    settings: &Settings,
    begins: Option<Status>,
    carry_out: impl FnOnce(&Work) -> Result<Outcome>,
) -> Result<u8> {
    let work = Work::begin(&settings.network)?;
    let ims = settings.ims_client(&work);
    let status = begins.map_or(Ok(()), |status| ims.set_status(status).map(drop));
    let result = status.and_then(|()| carry_out(&work));
    let outcome = work.unless_interrupted(result).inspect_err(|_| {
        work.finish_regardless();
        if let Err(e) = ims.set_status(Status::Error) {
            tracing::error!("{e}");
        }
    })?;
    if let Outcome::Failed(why) = outcome {
        // Return 0 nevertheless: another exit code of an init container would end the job.
        tracing::error!("{why}");
    }
    Ok(0)
}

/// Reports to IMS that a step has refused its arguments or its environment `variables`.
pub fn report_refusal(variables: Vec<(OsString, OsString)>) {
    let Ok(settings) = Settings::to_report(variables) else { return };
    let reported = Work::begin(&settings.network).and_then(|work| {
        let reported = settings.ims_client(&work).set_status(Status::Error).map(drop);
        work.unless_interrupted(reported)
    });
    if let Err(e) = reported {
        tracing::error!("{e}");
    }
}
