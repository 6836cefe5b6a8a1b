//! The three tiers of confinement for sessions, best first.

use caps::Capability;
use nix::sched::CloneFlags;

/// Tier of a jail. [`crate::jailer::trial`] chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tier {
    /// Own namespaces, created with CAP_SYS_ADMIN.
    #[default]
    Namespace,
    /// Own namespaces inside a user namespace, in which users have the same IDs as outside.
    User,
    /// `chroot` alone.
    Chroot,
}

/// Name of a namespace below `/proc/PID/ns`, and its flag.
type Namespace = (&'static str, CloneFlags);

/// Namespaces that a jail can have, in the order of entering: the user namespace first, since it gives the right to
/// enter the other namespaces. The network namespace is shared, so that sessions use the pod's addresses.
const NAMESPACES: [Namespace; 5] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
];

impl Tier {
    /// All tiers, best first.
    pub(crate) const ALL: [Self; 3] = [Self::Namespace, Self::User, Self::Chroot];

    /// Name in `IMS_JAIL_TIER` and in the log.
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

    /// Namespaces of a jail of this tier.
    pub(crate) fn namespaces(self) -> &'static [Namespace] {
        match self {
            Self::Namespace => &NAMESPACES[1..],
            Self::User => &NAMESPACES,
            Self::Chroot => &[],
        }
    }

    /// Flags of the tier's namespaces.
    pub(crate) fn flags(self) -> CloneFlags {
        self.namespaces().iter().map(|(_, flag)| *flag).collect()
    }

    /// Capabilities that the tier requires.
    pub(crate) fn capabilities(self) -> &'static [Capability] {
        match self {
            Self::Namespace => &[Capability::CAP_SYS_ADMIN],
            Self::User => &[Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_SETFCAP],
            Self::Chroot => &[Capability::CAP_SYS_CHROOT],
        }
    }

    /// Permissions that the container needs for the tier.
    pub(crate) fn needs(self) -> &'static str {
        match self {
            Self::Namespace => "CAP_SYS_ADMIN (a privileged container)",
            Self::User => {
                "permission to create user namespaces and to mount in them (seccomp, AppArmor, user.max_user_namespaces), and CAP_SETUID, \
                 CAP_SETGID, CAP_SETFCAP"
            }
            Self::Chroot => "CAP_SYS_CHROOT",
        }
    }

    /// Features that a session lacks compared with the next better tier.
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
    fn tiers_have_unique_names_and_enter_the_user_namespace_first() {
        for tier in Tier::ALL {
            assert_eq!(Tier::from_name(tier.name()), Some(tier));
        }
        assert_eq!(Tier::from_name("auto"), None);
        assert_eq!(Tier::User.namespaces()[0].0, "user");
        assert_eq!(Tier::Namespace.flags() | CloneFlags::CLONE_NEWUSER, Tier::User.flags());
        assert!(Tier::Chroot.flags().is_empty());
    }
}
