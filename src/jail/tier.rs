//! The three ways to hold a session in the image root, best first.

use caps::Capability;
use nix::sched::CloneFlags;

/// How strong a jail is. [`crate::jailer::trial`] chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tier {
    /// Namespaces of its own, made with CAP_SYS_ADMIN.
    #[default]
    Namespace,
    /// The same inside a user namespace, in which users have the numbers that they have outside.
    User,
    /// `chroot` alone.
    Chroot,
}

/// A namespace's name below `/proc/PID/ns`, and its flag.
type Namespace = (&'static str, CloneFlags);

/// The namespaces that a jail can have of its own, in the order in which they are entered: the user namespace gives the right to enter
/// the others. The network is the container's: sessions work with the pod's addresses.
const NAMESPACES: [Namespace; 5] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
];

impl Tier {
    /// All of them, best first.
    pub(crate) const ALL: [Self; 3] = [Self::Namespace, Self::User, Self::Chroot];

    /// As `IMS_JAIL_TIER` and the log have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "namespace",
            Self::User => "user",
            Self::Chroot => "chroot",
        }
    }

    /// The tier of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tier| tier.name() == name)
    }

    /// The namespaces that its jail has of its own.
    pub(crate) fn namespaces(self) -> &'static [Namespace] {
        match self {
            Self::Namespace => &NAMESPACES[1..],
            Self::User => &NAMESPACES,
            Self::Chroot => &[],
        }
    }

    /// Their flags.
    pub(crate) fn flags(self) -> CloneFlags {
        self.namespaces().iter().map(|(_, flag)| *flag).collect()
    }

    /// Capabilities without which it cannot be had.
    pub(crate) fn capabilities(self) -> &'static [Capability] {
        match self {
            Self::Namespace => &[Capability::CAP_SYS_ADMIN],
            Self::User => &[Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_SETFCAP],
            Self::Chroot => &[Capability::CAP_SYS_CHROOT],
        }
    }

    /// What a container must be allowed for it.
    pub(crate) fn needs(self) -> &'static str {
        match self {
            Self::Namespace => "CAP_SYS_ADMIN (a privileged container)",
            Self::User => {
                "leave to make user namespaces and to mount in them (seccomp, AppArmor, user.max_user_namespaces), and CAP_SETUID, \
                 CAP_SETGID, CAP_SETFCAP"
            }
            Self::Chroot => "CAP_SYS_CHROOT",
        }
    }

    /// What a session lacks that it has in the tier above it.
    pub(crate) fn lacks(self) -> Option<&'static str> {
        match self {
            Self::Namespace => None,
            Self::User => {
                Some("device nodes in the image, ports below 1024 and ping unless the container allows them to all")
            }
            Self::Chroot => Some(
                "/proc, /sys, a named terminal, a host name and processes of its own, the client's ssh-agent; a session can leave the image root",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_known_by_their_names_and_the_user_namespace_is_entered_first() {
        for tier in Tier::ALL {
            assert_eq!(Tier::from_name(tier.name()), Some(tier));
        }
        assert_eq!(Tier::from_name("auto"), None);
        assert_eq!(Tier::User.namespaces()[0].0, "user");
        assert_eq!(Tier::Namespace.flags() | CloneFlags::CLONE_NEWUSER, Tier::User.flags());
        assert!(Tier::Chroot.flags().is_empty());
    }
}
