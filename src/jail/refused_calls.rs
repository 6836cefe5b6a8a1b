//! Table of system calls that lead out of the jail although they need no capability, and the seccomp filter that
//! refuses them.

use crate::sys::seccomp::Instruction;

/// The filter's answer to a system call.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// Always fails with this error.
    Always(i32),
    /// Fails with this error if all these tests of its arguments hold.
    If(&'static [Test], i32),
}

use Rule::{Always, If};

/// A test of the lower 32 bits of one argument; arguments are counted from 0.
#[derive(Debug, Clone, Copy)]
enum Test {
    /// The argument has one of these bits.
    HasAny(u32, u32),
    /// The masked argument equals one of these values.
    In(u32, u32, &'static [u32]),
    /// The masked argument equals none of these values.
    NotIn(u32, u32, &'static [u32]),
}

use Test::{HasAny, In, NotIn};

/// A refused call. The test suite compares names and reasons with those in SECURITY.md.
#[allow(dead_code)]
struct Call {
    name: &'static str,
    numbers: Numbers,
    rule: Rule,
    why: &'static str,
}

/// Numbers of a call on x86_64, i386, aarch64 and arm. `None` where the call does not exist.
type Numbers = [Option<u32>; 4];

/// Numbers from arch/x86/entry/syscalls, asm-generic/unistd.h and arch/arm/tools/syscall.tbl of Linux.
const fn numbers(x86_64: u32, i386: u32, aarch64: u32, arm: u32) -> Numbers {
    [Some(x86_64), Some(i386), Some(aarch64), Some(arm)]
}

/// Calls added after Linux 5.1 have the same number everywhere.
const fn everywhere(number: u32) -> Numbers {
    [Some(number); 4]
}

const fn call(name: &'static str, numbers: Numbers, rule: Rule, why: &'static str) -> Call {
    Call { name, numbers, rule, why }
}

/// Refuses new user, cgroup and network namespaces. Root in a build has CAP_SYS_ADMIN in its user namespace: in a
/// cgroup namespace of its own, it could mount the cgroups, whose files root owns, and in a network namespace of its
/// own, /sys.
const NEW_USER: Rule =
    If(&[HasAny(0, (libc::CLONE_NEWUSER | libc::CLONE_NEWCGROUP | libc::CLONE_NEWNET).cast_unsigned())], libc::EPERM);
const INTERNET: &[u32] = &[libc::AF_INET.cast_unsigned(), libc::AF_INET6.cast_unsigned()];
const ALLOWED_FAMILIES: &[u32] = &[
    libc::AF_UNIX.cast_unsigned(),
    libc::AF_INET.cast_unsigned(),
    libc::AF_INET6.cast_unsigned(),
    libc::AF_NETLINK.cast_unsigned(),
];
const OTHER_FAMILY: Rule = If(&[NotIn(0, ALL_BITS, ALLOWED_FAMILIES)], libc::EAFNOSUPPORT);
const ALL_BITS: u32 = u32::MAX;

/// Netlink protocols that programs of an image need. SECURITY.md says why these, and why no others.
const ALLOWED_NETLINK: &[u32] = &[
    libc::NETLINK_ROUTE.cast_unsigned(),
    libc::NETLINK_SOCK_DIAG.cast_unsigned(),
    libc::NETLINK_SELINUX.cast_unsigned(),
    libc::NETLINK_AUDIT.cast_unsigned(),
    libc::NETLINK_KOBJECT_UEVENT.cast_unsigned(),
];

/// Bits of the argument `type` that hold the socket type; the other bits are flags (`SOCK_TYPE_MASK` of linux/net.h).
const TYPE_BITS: u32 = 0xf;
const SOCK_PACKET: u32 = 10;

/// Level and options of sockets that give a process a pidfd (asm-generic/socket.h).
const AT_SOCKET: Test = In(1, ALL_BITS, &[libc::SOL_SOCKET.cast_unsigned()]);
const SO_PASSPIDFD: u32 = 76;
const SO_PEERPIDFD: u32 = 77;

/// Requests of ioctl(2), from asm-generic/ioctls.h.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;

/// A delegation is a lease on a directory (Linux 6.19); the number is from uapi/linux/fcntl.h.
const F_SETDELEG: u32 = F_SETLEASE + 16;
const F_SETLEASE: u32 = libc::F_SETLEASE.cast_unsigned();

/// The error of a file system without leases (`simple_nosetlease` of fs/libfs.c).
const LEASE: Rule = If(&[In(1, ALL_BITS, &[F_SETLEASE, F_SETDELEG])], libc::EINVAL);

/// Calls, answers and reasons. Each error is one that programs expect from a kernel without the call, so that they fall
/// back to something else.
const CALLS: &[Call] = &[
    call(
        "add_key",
        numbers(248, 286, 217, 309),
        Always(libc::ENOSYS),
        "root inside and root outside share one keyring",
    ),
    call("request_key", numbers(249, 287, 218, 310), Always(libc::ENOSYS), "the same"),
    call("keyctl", numbers(250, 288, 219, 311), Always(libc::ENOSYS), "the same"),
    call(
        "unshare",
        numbers(272, 310, 97, 337),
        NEW_USER,
        "the creator of a user namespace has every capability in it, and reaches the container's own cgroup",
    ),
    call("clone", numbers(56, 120, 220, 120), NEW_USER, "the same"),
    // After ENOSYS, C libraries fall back to clone.
    call(
        "clone3",
        everywhere(435),
        Always(libc::ENOSYS),
        "the same: its flags are in memory, which a filter cannot read",
    ),
    call(
        "setns",
        numbers(308, 346, 268, 375),
        Always(libc::EPERM),
        "root would have every capability in the user namespace that owns the jail's host name; no other one can be entered anyway",
    ),
    // The kernel compares only 32 bits of the request (CVE-2019-10063), and so does this filter.
    call(
        "ioctl",
        numbers(16, 54, 29, 54),
        If(&[In(1, ALL_BITS, &[TIOCSTI, TIOCLINUX])], libc::EPERM),
        "injects input into the shell that started 'ims-sshd enter', also on a virtual console (CVE-2016-2568, CVE-2023-28100)",
    ),
    // The kernel compares 32 bits of the command.
    call(
        "fcntl",
        numbers(72, 55, 25, 55),
        LEASE,
        "a lease on a readable file, such as one in /sys, makes everybody outside who opens it wait (45 seconds)",
    ),
    call("fcntl64", [None, Some(221), None, Some(221)], LEASE, "the same"),
    // Reading the init's limits is refused too: allowing it would need comparing both halves of a pointer, which
    // is not worth it.
    call(
        "prlimit64",
        numbers(302, 340, 261, 369),
        If(&[In(0, ALL_BITS, &[1])], libc::EPERM),
        "a CPU time limit would kill the jail's init, and with it every session",
    ),
    call(
        "pidfd_getfd",
        everywhere(438),
        Always(libc::ENOSYS),
        "copies a descriptor of any process of root that has no more capabilities; its pidfd need not come from this PID namespace",
    ),
    call(
        "getsockopt",
        numbers(55, 365, 209, 295),
        If(&[AT_SOCKET, In(2, ALL_BITS, &[SO_PEERPIDFD])], libc::ENOPROTOOPT),
        "gives such a pidfd of the process that listens on a socket outside",
    ),
    call(
        "setsockopt",
        numbers(54, 366, 208, 294),
        If(&[AT_SOCKET, In(2, ALL_BITS, &[SO_PASSPIDFD])], libc::ENOPROTOOPT),
        "attaches such a pidfd to each message from outside",
    ),
    call(
        "socket",
        numbers(41, 359, 198, 281),
        OTHER_FAMILY,
        "AF_PACKET sees all packets of the pod; AF_VSOCK reaches the node's hypervisor; AF_ALG and others reach parts of the \
         kernel that no image needs (CVE-2026-31431)",
    ),
    call(
        "socket",
        numbers(41, 359, 198, 281),
        If(&[In(0, ALL_BITS, INTERNET), In(1, TYPE_BITS, &[SOCK_PACKET])], libc::EAFNOSUPPORT),
        "an old name of AF_PACKET",
    ),
    call(
        "socket",
        numbers(41, 359, 198, 281),
        If(
            &[
                In(0, ALL_BITS, INTERNET),
                In(1, TYPE_BITS, &[libc::SOCK_RAW.cast_unsigned()]),
                NotIn(2, ALL_BITS, &[libc::IPPROTO_ICMP.cast_unsigned(), libc::IPPROTO_ICMPV6.cast_unsigned()]),
            ],
            libc::EPERM,
        ),
        "it receives packets of others in the pod; ping needs only ICMP",
    ),
    call(
        "socket",
        numbers(41, 359, 198, 281),
        If(
            &[In(0, ALL_BITS, &[libc::AF_NETLINK.cast_unsigned()]), NotIn(2, ALL_BITS, ALLOWED_NETLINK)],
            libc::EPROTONOSUPPORT,
        ),
        "NETLINK_CONNECTOR tells of processes outside, NETLINK_GENERIC of quotas, devices and the network, and loads kernel modules",
    ),
    call("socketpair", numbers(53, 360, 199, 288), OTHER_FAMILY, "the same as for socket"),
    call(
        "socketcall",
        [None, Some(102), None, None],
        Always(libc::ENOSYS),
        "all socket calls in one: its arguments are in memory, which a filter cannot read",
    ),
    call(
        "io_uring_setup",
        everywhere(425),
        Always(libc::ENOSYS),
        "its operations, sockets included, bypass this filter",
    ),
    call("io_uring_enter", everywhere(426), Always(libc::ENOSYS), "the same"),
    call("io_uring_register", everywhere(427), Always(libc::ENOSYS), "the same"),
    call(
        "userfaultfd",
        numbers(323, 374, 282, 388),
        Always(libc::ENOSYS),
        "pauses the kernel in the middle of a copy, which helps exploits",
    ),
    call(
        "bpf",
        numbers(321, 357, 280, 386),
        Always(libc::EPERM),
        "loads a program into the kernel, which some nodes allow everybody",
    ),
    call(
        "perf_event_open",
        numbers(298, 336, 241, 364),
        Always(libc::EPERM),
        "monitors other processes, which some nodes allow everybody",
    ),
    call(
        "syslog",
        numbers(103, 103, 116, 103),
        Always(libc::EPERM),
        "reads the node's kernel log, which some nodes allow everybody",
    ),
];

/// A system call convention. Every processor has a 64-bit and a 32-bit one, and any program may use both.
struct Convention {
    /// `AUDIT_ARCH_…` of linux/audit.h.
    architecture: u32,
    /// Column of [`Numbers`].
    column: usize,
}

#[cfg(target_arch = "x86_64")]
const CONVENTIONS: [Convention; 2] =
    [Convention { architecture: 0xc000_003e, column: 0 }, Convention { architecture: 0x4000_0003, column: 1 }];

#[cfg(target_arch = "aarch64")]
const CONVENTIONS: [Convention; 2] =
    [Convention { architecture: 0xc000_00b7, column: 2 }, Convention { architecture: 0x4000_0028, column: 3 }];

/// Offset of the call's number in struct seccomp_data.
const NUMBER: u32 = 0;
/// Offset of the convention in struct seccomp_data.
const ARCHITECTURE: u32 = 4;
/// Offset of the lower half of the first argument in struct seccomp_data (little-endian).
const ARGUMENTS: u32 = 16;

/// Bit in the numbers of x32, a third convention of x86_64.
const X32: u32 = 0x4000_0000;

const ALLOW: Instruction = give(libc::SECCOMP_RET_ALLOW);

const fn fail(error: i32) -> Instruction {
    give(libc::SECCOMP_RET_ERRNO | error.cast_unsigned())
}

const fn instruction(code: u32, value: u32, skip_if: u8, skip_if_not: u8) -> Instruction {
    // Codes are below 256 (linux/bpf_common.h).
    #[allow(clippy::cast_possible_truncation)]
    Instruction { code: code as u16, jt: skip_if, jf: skip_if_not, k: value }
}

const fn give(value: u32) -> Instruction {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

const fn load(place: u32) -> Instruction {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, place, 0, 0)
}

const fn keep_bits(mask: u32) -> Instruction {
    instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask, 0, 0)
}

/// Skips `skip_if` instructions if the loaded value equals `value`, otherwise `skip_if_not`.
const fn if_equal(value: u32, skip_if: u8, skip_if_not: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, skip_if, skip_if_not)
}

/// Skips `skip` instructions if the loaded value has none of `bits`.
const fn unless_any_bit(bits: u32, skip: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bits, 0, skip)
}

/// Placeholder for a jump to the end of the current part, until the part's length is known.
const END: u8 = u8::MAX;

/// A filter while it is being assembled. [`PROGRAM`] is assembled at compile time, so no session waits for it.
struct Program {
    instructions: [Instruction; 512],
    length: usize,
}

impl Program {
    const fn new() -> Self {
        Self { instructions: [ALLOW; 512], length: 0 }
    }

    const fn add(&mut self, instruction: Instruction) {
        self.instructions[self.length] = instruction;
        self.length += 1;
    }

    /// Ends the part that began at `start`, and resolves its jumps.
    const fn end_part(&mut self, start: usize) {
        let mut at = start;
        while at < self.length {
            let distance = self.length - at - 1;
            let jump = &mut self.instructions[at];
            if jump.jt == END || jump.jf == END {
                assert!(distance < END as usize, "a jump is as long as a byte can say");
            }
            #[allow(clippy::cast_possible_truncation)]
            let distance = distance as u8;
            if jump.jt == END {
                jump.jt = distance;
            }
            if jump.jf == END {
                jump.jf = distance;
            }
            at += 1;
        }
    }

    /// Adds the answers to all calls of a convention.
    const fn answer_calls(&mut self, convention: &Convention) {
        let start = self.length;
        self.add(if_equal(convention.architecture, 0, END));
        self.add(load(NUMBER));
        self.add(unless_any_bit(X32, 1));
        self.add(fail(libc::ENOSYS));
        let mut at = 0;
        while at < CALLS.len() {
            if let Some(number) = CALLS[at].numbers[convention.column] {
                self.answer_call(number, CALLS[at].rule);
            }
            at += 1;
        }
        self.add(ALLOW);
        self.end_part(start);
    }

    /// Adds the answer to the call `number`; for any other call, the filter continues after this answer.
    const fn answer_call(&mut self, number: u32, rule: Rule) {
        let start = self.length;
        // Reload the number, because the tests of the previous call may have loaded an argument.
        self.add(load(NUMBER));
        self.add(if_equal(number, 0, END));
        let (tests, error) = match rule {
            Always(error) => (&[] as &[Test], error),
            If(tests, error) => (tests, error),
        };
        let mut at = 0;
        while at < tests.len() {
            self.test(tests[at]);
            at += 1;
        }
        self.add(fail(error));
        self.end_part(start);
    }

    /// Refuses the call `number` if its argument `argument`, a user or group, is -1. -1 is no valid ID, and the kernel
    /// would keep the file's owner, which is root for a file that was just created.
    fn answer_owner(&mut self, number: libc::c_long, argument: u32) {
        const NOBODY: &[u32] = &[u32::MAX];
        const USER: Rule = If(&[In(1, ALL_BITS, NOBODY)], libc::EINVAL);
        const GROUP: Rule = If(&[In(2, ALL_BITS, NOBODY)], libc::EINVAL);
        const GROUP_AT: Rule = If(&[In(3, ALL_BITS, NOBODY)], libc::EINVAL);
        if let (Ok(number), Some(rule)) = (u32::try_from(number), [USER, GROUP, GROUP_AT].get(argument as usize - 1)) {
            self.answer_call(number, *rule);
        }
    }

    /// Continues if the test holds, and otherwise jumps to the end of the part.
    const fn test(&mut self, test: Test) {
        let (argument, mask, values, equal, none_equal) = match test {
            HasAny(argument, bits) => {
                self.add(load(ARGUMENTS + 8 * argument));
                self.add(unless_any_bit(bits, END));
                return;
            }
            In(argument, mask, values) => (argument, mask, values, 0, END),
            NotIn(argument, mask, values) => (argument, mask, values, END, 0),
        };
        self.add(load(ARGUMENTS + 8 * argument));
        self.add(keep_bits(mask));
        let mut further = values.len();
        while further > 0 {
            further -= 1;
            // If equal, skip the remaining comparisons.
            #[allow(clippy::cast_possible_truncation)]
            let equal = if equal == END { END } else { further as u8 };
            let value = values[values.len() - 1 - further];
            self.add(if_equal(value, equal, if further == 0 { none_equal } else { 0 }));
        }
    }
}

const PROGRAM: Program = {
    let mut program = Program::new();
    program.add(load(ARCHITECTURE));
    program.answer_calls(&CONVENTIONS[0]);
    program.answer_calls(&CONVENTIONS[1]);
    // Calls of an unknown convention fail as if they did not exist.
    program.add(fail(libc::ENOSYS));
    program
};

/// The filter that refuses [`CALLS`], for [`crate::sys::seccomp::filter`].
pub(crate) fn program() -> &'static [Instruction] {
    const LENGTH: usize = PROGRAM.length;
    static INSTRUCTIONS: [Instruction; LENGTH] = {
        let mut all = [ALLOW; LENGTH];
        let mut at = 0;
        while at < LENGTH {
            all[at] = PROGRAM.instructions[at];
            at += 1;
        }
        all
    };
    &INSTRUCTIONS
}

/// A seccomp filter that refuses `calls` (`SYS_…` of libc), system calls that pass -1 as an owner, and the creation of
/// user namespaces, in which a process would have every capability. Only calls of the first convention are allowed.
pub(crate) fn refusing(calls: &[libc::c_long]) -> Vec<Instruction> {
    let convention = &CONVENTIONS[0];
    let mut program = Program::new();
    program.add(load(ARCHITECTURE));
    program.add(if_equal(convention.architecture, 1, 0));
    program.add(fail(libc::ENOSYS));
    program.add(load(NUMBER));
    program.add(unless_any_bit(X32, 1));
    program.add(fail(libc::ENOSYS));
    for number in calls.iter().filter_map(|number| u32::try_from(*number).ok()) {
        program.answer_call(number, Always(libc::EPERM));
    }
    for call in CALLS.iter().filter(|call| ["clone", "clone3"].contains(&call.name)) {
        if let Some(number) = call.numbers[convention.column] {
            program.answer_call(number, call.rule);
        }
    }
    for (number, owner) in OWNING {
        for argument in [*owner, *owner + 1] {
            program.answer_owner(*number, argument);
        }
    }
    program.add(ALLOW);
    program.instructions[..program.length].to_vec()
}

/// Calls that set an owner, each with the index of the argument that is the user; the next argument is the group.
const OWNING: &[(libc::c_long, u32)] = &[
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chown, 1),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lchown, 1),
    (libc::SYS_fchown, 1),
    (libc::SYS_fchownat, 2),
];

/// A filter that makes the kernel appear to lack audit (linux/netlink.h). Only calls of the first convention are
/// filtered.
pub(crate) fn without_audit() -> Vec<Instruction> {
    const FAMILY: Test = In(0, ALL_BITS, &[libc::AF_NETLINK.cast_unsigned()]);
    const PROTOCOL: Test = In(2, ALL_BITS, &[libc::NETLINK_AUDIT.cast_unsigned()]);
    const RULE: Rule = If(&[FAMILY, PROTOCOL], libc::EPROTONOSUPPORT);
    let convention = &CONVENTIONS[0];
    let mut program = Program::new();
    program.add(load(ARCHITECTURE));
    program.add(if_equal(convention.architecture, 1, 0));
    program.add(ALLOW);
    for call in CALLS.iter().filter(|call| call.name == "socket") {
        if let Some(number) = call.numbers[convention.column] {
            program.answer_call(number, RULE);
        }
    }
    program.add(ALLOW);
    program.instructions[..program.length].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_numbers_agree_with_libc() {
        for (name, number) in [
            ("add_key", libc::SYS_add_key),
            ("request_key", libc::SYS_request_key),
            ("keyctl", libc::SYS_keyctl),
            ("unshare", libc::SYS_unshare),
            ("clone", libc::SYS_clone),
            ("clone3", libc::SYS_clone3),
            ("setns", libc::SYS_setns),
            ("ioctl", libc::SYS_ioctl),
            ("fcntl", libc::SYS_fcntl),
            ("prlimit64", libc::SYS_prlimit64),
            ("pidfd_getfd", libc::SYS_pidfd_getfd),
            ("getsockopt", libc::SYS_getsockopt),
            ("setsockopt", libc::SYS_setsockopt),
            ("socket", libc::SYS_socket),
            ("socketpair", libc::SYS_socketpair),
            ("io_uring_setup", libc::SYS_io_uring_setup),
            ("io_uring_enter", libc::SYS_io_uring_enter),
            ("io_uring_register", libc::SYS_io_uring_register),
            ("userfaultfd", libc::SYS_userfaultfd),
            ("bpf", libc::SYS_bpf),
            ("perf_event_open", libc::SYS_perf_event_open),
            ("syslog", libc::SYS_syslog),
        ] {
            let calls: Vec<_> = CALLS.iter().filter(|call| call.name == name).collect();
            assert!(!calls.is_empty(), "{name}");
            for call in calls {
                let known = call.numbers[CONVENTIONS[0].column].map(i64::from);
                assert_eq!(known, Some(number), "{name}");
            }
        }
        assert_eq!(u64::from(TIOCSTI), libc::TIOCSTI);
        assert_eq!(u64::from(TIOCLINUX), libc::TIOCLINUX);
    }

    /// Runs the filter `program` on a call and returns its answer. Knows only the instructions used here.
    fn answer(program: &[Instruction], architecture: u32, number: u32, arguments: [u32; 3]) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            let code = u32::from(code);
            at += 1;
            if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS {
                loaded = match k {
                    NUMBER => number,
                    ARCHITECTURE => architecture,
                    place => arguments[((place - ARGUMENTS) / 8) as usize],
                };
            } else if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K {
                loaded &= k;
            } else if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K {
                at += usize::from(if loaded == k { jt } else { jf });
            } else if code == libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K {
                at += usize::from(if loaded & k == 0 { jf } else { jt });
            } else {
                assert_eq!(code, libc::BPF_RET | libc::BPF_K);
                return k;
            }
        }
    }

    /// The answer to a call according to the table, which the filter has to give too.
    fn meant(convention: &Convention, number: u32, arguments: [u32; 3]) -> u32 {
        let holds = |test: &Test| match *test {
            HasAny(at, bits) => arguments[at as usize] & bits != 0,
            In(at, mask, values) => values.contains(&(arguments[at as usize] & mask)),
            NotIn(at, mask, values) => !values.contains(&(arguments[at as usize] & mask)),
        };
        for call in CALLS.iter().filter(|call| call.numbers[convention.column] == Some(number)) {
            match call.rule {
                Always(error) => return fail(error).k,
                If(tests, error) if tests.iter().all(holds) => return fail(error).k,
                If(..) => {}
            }
        }
        libc::SECCOMP_RET_ALLOW
    }

    #[test]
    fn seccomp_program_agrees_with_the_table() {
        let program = program();
        let values = [
            0,
            1,
            2,
            3,
            10,
            4,
            7,
            9,
            11,
            15,
            16,
            17,
            40,
            58,
            76,
            77,
            TIOCSTI,
            TIOCLINUX,
            F_SETLEASE,
            F_SETDELEG,
            0x1000_0000,
            0x0008_000a,
        ];
        for convention in &CONVENTIONS {
            let numbers = CALLS.iter().filter_map(|call| call.numbers[convention.column]).chain([0, 1, 57, 449]);
            for number in numbers {
                for (a, b) in values.iter().flat_map(|a| values.map(|b| (*a, b))) {
                    for arguments in values.map(|c| [a, b, c]) {
                        let got = answer(program, convention.architecture, number, arguments);
                        assert_eq!(got, meant(convention, number, arguments), "{number} {arguments:?}");
                    }
                }
            }
            assert_eq!(answer(program, convention.architecture, X32 | 1, [0; 3]), fail(libc::ENOSYS).k);
        }
        assert_eq!(answer(program, 0, 1, [0; 3]), fail(libc::ENOSYS).k);
    }
}
