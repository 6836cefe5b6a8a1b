//! All attempts, as a table.

use crate::outcome::Outcome;
use crate::{devices, kernel_files, mounts, namespaces, privileges, processes, roots, sockets, terminals};

/// A possible escape from a jail.
pub struct Attempt {
    /// Name on the command line.
    pub name: &'static str,
    /// Place where it succeeds, which proves that it would detect a hole.
    pub bites: Place,
    /// Source that describes it.
    pub source: &'static str,
    /// Runs it.
    pub run: fn() -> Outcome,
}

/// A place weaker than a jail.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A chroot with every capability, the machine's /proc, /sys and /dev, and an inherited descriptor.
    Chroot,
    /// The machine's own root, in a new mount namespace.
    Machine,
    /// Like `Chroot`, if the kernel is built with the feature; otherwise there is nothing to defend.
    ChrootIfBuilt,
    /// Like `Machine`, if the kernel is new enough for the feature.
    MachineIfBuilt,
}

const fn attempt(name: &'static str, bites: Place, run: fn() -> Outcome, source: &'static str) -> Attempt {
    Attempt { name, bites, source, run }
}

use Place::{Chroot, ChrootIfBuilt, Machine, MachineIfBuilt};

/// Grouped by subject. Attempts that damage what they find come last.
pub const ATTEMPTS: &[Attempt] = &[
    attempt("double-chroot", Chroot, roots::double_chroot, "chroot(2), NOTES: the escape by mkdir, chroot, chdir .."),
    attempt("chroot-fchdir", Chroot, roots::chroot_fchdir, "chroot(2), NOTES: open directories"),
    attempt("inherited-descriptors", Chroot, roots::inherited_descriptors, "CVE-2024-21626 (runc), CVE-2016-9962"),
    attempt("inherited-working-directory", Machine, roots::inherited_working_directory, "CVE-2024-21626 (runc)"),
    attempt("dot-dot", Machine, roots::dot_dot, "path_resolution(7)"),
    attempt("roots-of-processes", Chroot, roots::roots_of_processes, "proc_pid_root(5); CVE-2018-15664 (docker cp)"),
    attempt("roots-of-threads", Chroot, roots::roots_of_threads, "proc_pid_task(5)"),
    attempt("working-directories-of-processes", Chroot, roots::working_directories_of_processes, "proc_pid_cwd(5)"),
    attempt("descriptors-of-processes", Chroot, roots::descriptors_of_processes, "proc_pid_fd(5); CVE-2016-9962"),
    attempt("programs-of-processes", Chroot, roots::programs_of_processes, "CVE-2019-5736 (runc)"),
    attempt("attributes-of-programs", Chroot, roots::attributes_of_programs, "proc_pid_exe(5); CVE-2019-5736 (runc)"),
    attempt("file-handle", Chroot, roots::file_handle, "open_by_handle_at(2); the 'shocker' exploit of Docker 0.11"),
    attempt("trace", Chroot, processes::trace, "ptrace(2); CVE-2016-9962"),
    attempt("memory", Chroot, processes::memory, "process_vm_readv(2)"),
    attempt("memory-file", Chroot, processes::memory_file, "proc_pid_mem(5)"),
    attempt("environment", Chroot, processes::environment, "proc_pid_environ(5)"),
    attempt(
        "settings-of-process",
        Chroot,
        processes::settings,
        "proc_pid_oom_score_adj(5), proc_pid_coredump_filter(5)",
    ),
    attempt("kill", Chroot, processes::kill, "kill(2)"),
    attempt("kill-session-leader", Chroot, processes::kill_session_leader, "kill(2), getsid(2)"),
    attempt("steal-descriptor", Chroot, processes::steal_descriptor, "pidfd_getfd(2)"),
    attempt("process-handle", MachineIfBuilt, processes::process_handle, "open_by_handle_at(2) on pidfs, Linux 6.14"),
    attempt("limits", Chroot, processes::limits, "prlimit(2)"),
    attempt("limits-of-init", Chroot, processes::limits_of_init, "prlimit(2), RLIMIT_CPU"),
    attempt("settings-of-init", Chroot, processes::settings_of_init, "proc_pid_oom_score_adj(5), sched(7), autogroup"),
    attempt("disk", Chroot, devices::disk, "mknod(2); runtime-spec, devices"),
    attempt("kernel-log", Chroot, devices::kernel_log, "mknod(2)"),
    attempt("fuse", Chroot, devices::fuse, "mknod(2)"),
    attempt("loop-control", Chroot, devices::loop_control, "mknod(2), loop(4)"),
    attempt("tun", ChrootIfBuilt, devices::tun, "mknod(2)"),
    attempt("console-screen", Chroot, devices::console_screen, "mknod(2), vcs(4)"),
    attempt("planted-node", Chroot, devices::planted_node, "mount(8), nodev"),
    attempt("found-nodes", Chroot, devices::found_nodes, "runtime-spec, default devices"),
    attempt("sysrq-trigger", ChrootIfBuilt, kernel_files::sysrq_trigger, "proc_sysrq-trigger(5)"),
    attempt("core-pattern", Chroot, kernel_files::core_pattern, "core(5)"),
    attempt("modprobe", ChrootIfBuilt, kernel_files::modprobe, "proc_sys_kernel(5), modprobe"),
    attempt("poweroff-command", Chroot, kernel_files::poweroff_command, "proc_sys_kernel(5), poweroff_cmd"),
    attempt("uevent-helper", ChrootIfBuilt, kernel_files::uevent_helper, "CONFIG_UEVENT_HELPER"),
    attempt("binfmt-register", Chroot, kernel_files::binfmt_register, "Linux: binfmt-misc.rst"),
    attempt("release-agent", ChrootIfBuilt, kernel_files::release_agent, "cgroups(7); CVE-2022-0492"),
    attempt("cgroup", Chroot, kernel_files::cgroup, "cgroups(7)"),
    attempt("mode-in-proc", Chroot, kernel_files::mode_in_proc, "fs/proc/generic.c: one inode's mode for all"),
    attempt("any-in-proc", Chroot, kernel_files::any_in_proc, "runtime-spec, read-only paths"),
    attempt("any-in-sys", Chroot, kernel_files::any_in_sys, "runtime-spec, masked paths; sysfs(5)"),
    attempt("kernel-memory", ChrootIfBuilt, kernel_files::kernel_memory, "proc_kcore(5)"),
    attempt("shown-programs", Chroot, kernel_files::shown_programs, "CVE-2019-5736 (runc)"),
    attempt("lease-on-shown-programs", Chroot, kernel_files::lease_on_shown_programs, "F_SETLEASE(2const)"),
    attempt("lease-on-kernel-files", Chroot, kernel_files::lease_on_kernel_files, "F_SETLEASE(2const)"),
    attempt("shown-programs-remounted", Chroot, kernel_files::shown_programs_remounted, "mount_setattr(2)"),
    attempt("new-proc", Chroot, mounts::new_proc, "mount(2)"),
    attempt("new-sys", Chroot, mounts::new_sys, "mount(2)"),
    attempt("new-cgroup", Chroot, mounts::new_cgroup, "mount(2), cgroups(7)"),
    attempt("new-dev", Chroot, mounts::new_dev, "mount(2)"),
    attempt("fsmount-proc", Chroot, mounts::fsmount_proc, "fsopen(2), fsmount(2)"),
    attempt("copy-of-proc", Chroot, mounts::copy_of_proc, "open_tree(2)"),
    attempt("bind-of-proc", Chroot, mounts::bind_of_proc, "mount(2), MS_BIND; CVE-2019-16884, CVE-2019-19921 (runc)"),
    attempt("unmount-covers", Chroot, mounts::unmount_covers, "umount(2)"),
    attempt("move-covers", Chroot, mounts::move_covers, "mount(2), MS_MOVE"),
    attempt("remount", Chroot, mounts::remount, "mount_setattr(2)"),
    attempt("devices-in-a-new-tmpfs", Chroot, mounts::devices_in_a_new_tmpfs, "mount(2), MS_NODEV"),
    attempt("pivot-root", Chroot, mounts::pivot_root, "pivot_root(2)"),
    attempt("namespaces-of-processes", Chroot, namespaces::of_visible_processes, "setns(2), proc_pid_ns(5)"),
    attempt("other-namespaces", Chroot, namespaces::other_kinds_of_visible_processes, "setns(2), namespaces(7)"),
    attempt("namespaces-of-process", Chroot, namespaces::of_process, "setns(2) on a pidfd, Linux 5.8"),
    attempt("namespace-handle", ChrootIfBuilt, namespaces::by_handle, "open_by_handle_at(2) on nsfs, Linux 6.18"),
    attempt(
        "namespace-neighbours",
        ChrootIfBuilt,
        namespaces::neighbours,
        "ioctl_nsfs(2), NS_MNT_GET_NEXT, Linux 6.12",
    ),
    attempt("owner-of-the-name", ChrootIfBuilt, namespaces::owner_of_the_name, "ioctl_nsfs(2), user_namespaces(7)"),
    attempt("new-mounts", Chroot, namespaces::new_mounts, "unshare(2)"),
    attempt(
        "nested-uncover",
        Machine,
        namespaces::nested_uncover,
        "user_namespaces(7); mount_namespaces(7), locked mounts",
    ),
    attempt(
        "nested-proc",
        Machine,
        namespaces::nested_proc,
        "user_namespaces(7); mount_too_revealing() in fs/namespace.c",
    ),
    attempt("nested-sys", Machine, namespaces::nested_sys, "user_namespaces(7), network_namespaces(7)"),
    attempt("nested-cgroup", Machine, namespaces::nested_cgroup, "cgroup_namespaces(7); CVE-2022-0492"),
    attempt(
        "nested-by-32-bits",
        MachineIfBuilt,
        namespaces::nested_by_32_bits,
        "seccomp(2), caveats: several architectures",
    ),
    attempt("socket", Machine, sockets::path, "unix(7)"),
    attempt("abstract-socket", Machine, sockets::abstract_name, "unix(7); CVE-2020-15257 (containerd-shim)"),
    attempt("supervisor", Machine, sockets::supervisor, "unix(7)"),
    attempt("peer-handle", MachineIfBuilt, sockets::peer, "SO_PEERPIDFD, Linux 6.5; pidfd_getfd(2)"),
    attempt("peer-handle-by-32-bits", MachineIfBuilt, sockets::peer_by_32_bits, "the same; socketcall(2)"),
    attempt("sender-handle", MachineIfBuilt, sockets::sender, "SCM_PIDFD, Linux 6.5; pidfd_getfd(2)"),
    attempt("packets", Chroot, sockets::packets, "packet(7), capabilities(7), CAP_NET_RAW"),
    attempt("packets-by-their-old-name", Chroot, sockets::packets_by_their_old_name, "packet(7), SOCK_PACKET"),
    attempt("raw-sockets", Chroot, sockets::raw, "raw(7), capabilities(7), CAP_NET_RAW"),
    attempt(
        "other-sockets",
        Chroot,
        sockets::other_families_of_any_type,
        "address_families(7); vsock(7); CVE-2026-31431",
    ),
    attempt("other-sockets-by-32-bits", ChrootIfBuilt, sockets::other_families_by_32_bits, "socketcall(2)"),
    attempt("other-netlink", Chroot, sockets::other_netlink, "netlink(7); connector.rst, events of processes"),
    attempt("other-netlink-by-32-bits", ChrootIfBuilt, sockets::other_netlink_by_32_bits, "socketcall(2)"),
    attempt("shared-memory", Chroot, sockets::shared_memory, "sysvipc(7), ipc_namespaces(7)"),
    attempt("message-queue", Chroot, sockets::message_queue, "mq_overview(7), ipc_namespaces(7)"),
    attempt("user-key", Chroot, sockets::user_key, "keyrings(7), user-keyring(7)"),
    attempt("session-key", Chroot, sockets::session_key, "keyrings(7), session-keyring(7)"),
    attempt("load-module", ChrootIfBuilt, privileges::load_module, "init_module(2)"),
    attempt("load-kernel", ChrootIfBuilt, privileges::load_kernel, "kexec_load(2)"),
    attempt("reboot", Chroot, privileges::reboot, "reboot(2)"),
    attempt("set-clock", Chroot, privileges::set_clock, "adjtimex(2)"),
    attempt("load-bpf", Chroot, privileges::load_bpf, "bpf(2); CVE-2021-31440, CVE-2022-23222"),
    attempt("watch-processors", Chroot, privileges::watch_processors, "perf_event_open(2)"),
    attempt("ring", ChrootIfBuilt, privileges::ring, "io_uring(7)"),
    attempt("page-fault-handler", ChrootIfBuilt, privileges::page_fault_handler, "userfaultfd(2)"),
    attempt("read-kernel-log", Chroot, privileges::read_kernel_log, "syslog(2)"),
    attempt("watch-file-system", Chroot, privileges::watch_file_system, "fanotify(7), FAN_MARK_FILESYSTEM"),
    attempt("change-network", Chroot, privileges::change_network, "netdevice(7), CAP_NET_ADMIN"),
    attempt("terminal-input", Chroot, terminals::push_input, "TIOCSTI(2const); CVE-2016-2568, CVE-2017-5226"),
    attempt("terminal-steal", Chroot, terminals::steal, "TIOCSCTTY(2const)"),
];
