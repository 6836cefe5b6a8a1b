//! The plan of a jail, and its form as arguments of `ims-jail-shell init`.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::jail::binds::Bind;
use crate::jail::mount_table::Proc;
use crate::jail::programs::Program;
use crate::jail::tier::Tier;
use crate::sys::architecture::Architecture;

/// Everything that determines a jail.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Tier of the jail.
    pub tier: Tier,
    /// Source of the jail's /proc.
    pub proc: Proc,
    /// Path of the image root, for messages: another directory may have it by the time they are read.
    pub image_root: PathBuf,
    /// True if the job builds kernel modules.
    pub dkms: bool,
    /// Architecture of the image's programs, if the jail must register an emulator for it.
    pub emulated: Option<Architecture>,
    /// Requested host name of the jail.
    pub hostname: Option<String>,
    /// Name of the image as a host name label, for people at a shell. It becomes the jail's host name if none is
    /// requested and setting it is possible.
    pub label: Option<String>,
    /// Programs to show in the jail: sftp-server with its loader and libraries, or a script.
    pub programs: Vec<Program>,
    /// Bind mounts whose targets exist and have no link in their paths.
    pub binds: Vec<Bind>,
    /// Path of an almost empty mount namespace of which the jail gets a copy. If `None`, the jail gets a copy of the
    /// container's mount namespace, with all its mounts.
    pub bare: Option<PathBuf>,
}

impl Plan {
    /// The arguments after `init`.
    pub(crate) fn to_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["--tier".into(), self.tier.name().into(), "--root".into(), self.image_root.clone().into()];
        let flags = [(self.dkms, "--dkms"), (self.proc == Proc::Container, "--proc-of-container")];
        arguments.extend(flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag.into()));
        let values: [(&str, Option<OsString>); 4] = [
            ("--emulate", self.emulated.map(|architecture| architecture.name().into())),
            ("--hostname", self.hostname.clone().map(Into::into)),
            ("--label", self.label.clone().map(Into::into)),
            ("--bare", self.bare.clone().map(Into::into)),
        ];
        arguments.extend(values.into_iter().filter_map(|(name, value)| Some([name.into(), value?])).flatten());
        for Bind { source, target, read_only } in &self.binds {
            let mode = if *read_only { "ro" } else { "rw" };
            arguments.extend(["--bind".into(), source.into(), target.into(), mode.into()]);
        }
        for Program { name, file } in &self.programs {
            arguments.extend(["--program".into(), name.into(), file.into()]);
        }
        arguments
    }

    /// Parses the arguments; `None` if they are invalid.
    pub(crate) fn from_arguments(arguments: &[OsString]) -> Option<Self> {
        let mut plan = Self::default();
        let mut arguments = arguments.iter();
        while let Some(option) = arguments.next() {
            let mut value = || arguments.next();
            match option.to_str()? {
                "--tier" => plan.tier = Tier::from_name(value()?.to_str()?)?,
                "--root" => plan.image_root = value()?.into(),
                "--dkms" => plan.dkms = true,
                "--emulate" => plan.emulated = Some(Architecture::from_name(value()?.to_str()?)?),
                "--proc-of-container" => plan.proc = Proc::Container,
                "--hostname" => plan.hostname = Some(value()?.to_str()?.to_owned()),
                "--label" => plan.label = Some(value()?.to_str()?.to_owned()),
                "--bare" => plan.bare = Some(value()?.into()),
                "--bind" => plan.binds.push(Bind {
                    source: value()?.into(),
                    target: value()?.into(),
                    read_only: value()? == "ro",
                }),
                "--program" => {
                    plan.programs.push(Program { name: value()?.to_str()?.to_owned(), file: value()?.into() });
                }
                _ => return None,
            }
        }
        (!plan.image_root.as_os_str().is_empty()).then_some(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    fn path() -> impl Strategy<Value = PathBuf> {
        vec(1..=255_u8, 1..6).prop_map(|bytes| OsString::from_vec(bytes).into())
    }

    fn plan() -> impl Strategy<Value = Plan> {
        let name = || "-{0,2}[a-z=]{0,4}";
        let kind = (prop::sample::select(&Tier::ALL[..]), any::<bool>(), any::<bool>());
        let names = (option::of(prop::sample::select(&Architecture::ALL[..])), option::of(name()), option::of(name()));
        let program = (name(), path()).prop_map(|(name, file)| Program { name, file });
        let bind = (path(), path(), any::<bool>());
        let bind = bind.prop_map(|(source, target, read_only)| Bind { source, target, read_only });
        let parts = (kind, path(), names, vec(program, 0..3), vec(bind, 0..3), option::of(path()));
        parts.prop_map(|((tier, own_proc, dkms), image_root, names, programs, binds, bare)| {
            let (emulated, hostname, label) = names;
            let proc = if own_proc { Proc::New } else { Proc::Container };
            Plan { tier, proc, image_root, dkms, emulated, hostname, label, programs, binds, bare }
        })
    }

    proptest! {
        #[test]
        fn plan_round_trips_through_its_arguments(plan in plan()) {
            prop_assert_eq!(Plan::from_arguments(&plan.to_arguments()), Some(plan));
        }
    }
}
