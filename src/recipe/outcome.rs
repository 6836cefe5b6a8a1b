//! Statuses in IMS, by which the rest of a create job hears of a step.

use std::ffi::OsString;

use crate::error::{Error, Result};
use crate::ims::records::Status;
use crate::publish::settings::Settings;
use crate::transfer::Work;

/// Carries out one step of a create job. The job gets the status `begins` before it, and `error` if it fails: IMS hears
/// of a failed init container from nobody else.
pub(crate) fn step(
    settings: &Settings,
    begins: Option<Status>,
    carry_out: impl FnOnce(&Work) -> Result<()>,
) -> Result<u8> {
    build(settings, begins, |work| carry_out(work).map(|()| Outcome::Built))
}

/// Outcome of a build.
pub(crate) enum Outcome {
    /// The image root is whole.
    Built,
    /// It is not, and the job's next container decides what becomes of it.
    Failed(Error),
}

/// Like [`step`], for a step after whose failure the job goes on.
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
        // An init container that ended with another code would end the job.
        tracing::error!("{why}");
    }
    Ok(0)
}

/// Reports to IMS that a step refused its arguments or `variables`.
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
