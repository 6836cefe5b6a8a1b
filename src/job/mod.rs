//! A job: its description, and the variables that describe it.

pub mod action;
pub mod variables;

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::job::action::Action;
use crate::job::variables::{Case, Reader, TRUTH};
use crate::sys::architecture::Architecture;

/// Default path of the image root's parent.
pub const DEFAULT_PARENT: &str = "/mnt/image";

/// The variables that every program of a job reads.
#[derive(Debug, Clone)]
pub struct Job {
    /// `IMS_ACTION`.
    pub(crate) action: Option<Action>,
    /// The argument, else `IMAGE_ROOT_PARENT`, else the default.
    pub(crate) parent: PathBuf,
    /// `IMS_JOB_ID`.
    pub(crate) id: Option<String>,
    /// `REMOTE_BUILD_NODE`: the host on which the image root is, and from which the packed image comes.
    pub(crate) node: Option<String>,
    /// `SSH_JAIL`.
    pub(crate) jailed: bool,
    /// `ENABLE_DEBUG`.
    pub(crate) debug: bool,
    /// `BUILD_ARCH`.
    pub(crate) architecture: Option<Architecture>,
}

impl Job {
    /// Reads the job's variables; `argument` is the command line's image root parent.
    pub(crate) fn read(reader: &mut Reader, argument: Option<PathBuf>) -> Self {
        Self {
            action: Action::read(reader),
            parent: parent(reader, argument),
            id: reader.line("IMS_JOB_ID").filter(|id| !id.is_empty()),
            node: reader.line("REMOTE_BUILD_NODE").filter(|node| !node.is_empty()),
            jailed: reader.choice("SSH_JAIL", &[("True", true), ("False", false)], Case::Exact).unwrap_or(false),
            debug: reader.choice("ENABLE_DEBUG", &TRUTH, Case::Any).unwrap_or(false),
            architecture: reader.choice("BUILD_ARCH", &Architecture::ALL.map(|a| (a.name(), a)), Case::Exact),
        }
    }

    /// The action, for a program that does nothing without one.
    pub(crate) fn required_action(&self) -> Result<Action> {
        self.action.ok_or_else(|| Error::bad_input("IMS_ACTION is not set: expected 'customize' or 'create'"))
    }

    /// Name of the image's architecture; this machine's if the job names none.
    pub(crate) fn arch(&self) -> &'static str {
        self.architecture.unwrap_or(Architecture::OWN).name()
    }
}

/// The image root's parent: the argument, else `IMAGE_ROOT_PARENT`, else the default.
fn parent(reader: &mut Reader, argument: Option<PathBuf>) -> PathBuf {
    let argument = argument.map(|argument| std::path::absolute(&argument).unwrap_or(argument));
    let named = argument.or_else(|| reader.text("IMAGE_ROOT_PARENT").map(Into::into));
    let parent = named.unwrap_or_else(|| DEFAULT_PARENT.into());
    if !parent.is_absolute() {
        reader.complain(format!("the image root parent is '{}': expected an absolute path", parent.display()));
    }
    parent
}
