//! System calls that lead out of the jail although they need no capability, as a table, and the program by which the kernel refuses
//! them.

use crate::sys::seccomp::Instruction;

/// What is done about a call.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// It always fails with this error.
    Always(i32),
    /// It fails with this error if all these tests of its arguments hold.
    If(&'static [Test], i32),
}

use Rule::{Always, If};

/// A test of the lower 32 bits of one argument, counted from 0.
#[derive(Debug, Clone, Copy)]
enum Test {
    /// It has one of these bits.
    HasAny(u32, u32),
    /// Its bits in the mask equal one of these values.
    In(u32, u32, &'static [u32]),
    /// They are none of these values.
    NotIn(u32, u32, &'static [u32]),
}

use Test::{HasAny, In, NotIn};

/// One call. A test compares the names and reasons with SECURITY.md.
#[allow(dead_code)]
struct Call {
    name: &'static str,
    numbers: Numbers,
    rule: Rule,
    why: &'static str,
}

/// A call's numbers on x86_64, i386, aarch64 and arm. `None` where it does not exist.
type Numbers = [Option<u32>; 4];

/// Numbers are those of arch/x86/entry/syscalls, asm-generic/unistd.h and arch/arm/tools/syscall.tbl in Linux.
const fn numbers(x86_64: u32, i386: u32, aarch64: u32, arm: u32) -> Numbers {
    [Some(x86_64), Some(i386), Some(aarch64), Some(arm)]
}

/// Calls that came after Linux 5.1 have one number everywhere.
const fn everywhere(number: u32) -> Numbers {
    [Some(number); 4]
}

const fn call(name: &'static str, numbers: Numbers, rule: Rule, why: &'static str) -> Call {
    Call { name, numbers, rule, why }
}

const NEW_USER: Rule = If(&[HasAny(0, libc::CLONE_NEWUSER.cast_unsigned())], libc::EPERM);
const INTERNET: &[u32] = &[libc::AF_INET.cast_unsigned(), libc::AF_INET6.cast_unsigned()];
const ALLOWED_FAMILIES: &[u32] = &[
    libc::AF_UNIX.cast_unsigned(),
    libc::AF_INET.cast_unsigned(),
    libc::AF_INET6.cast_unsigned(),
    libc::AF_NETLINK.cast_unsigned(),
];
const OTHER_FAMILY: Rule = If(&[NotIn(0, ALL_BITS, ALLOWED_FAMILIES)], libc::EAFNOSUPPORT);
const ALL_BITS: u32 = u32::MAX;

/// A socket's type has flags beside it (`SOCK_TYPE_MASK` of linux/net.h).
const TYPE_BITS: u32 = 0xf;
const SOCK_PACKET: u32 = 10;

/// A pidfd is asked for at this level, by these options (asm-generic/socket.h).
const AT_SOCKET: Test = In(1, ALL_BITS, &[libc::SOL_SOCKET.cast_unsigned()]);
const SO_PASSPIDFD: u32 = 76;
const SO_PEERPIDFD: u32 = 77;

/// asm-generic/ioctls.h.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;

/// A delegation is a lease on a directory too (Linux 6.19); its number is that of uapi/linux/fcntl.h.
const F_SETDELEG: u32 = F_SETLEASE + 16;
const F_SETLEASE: u32 = libc::F_SETLEASE.cast_unsigned();

/// A file system without leases gives this error (`simple_nosetlease` of fs/libfs.c).
const LEASE: Rule = If(&[In(1, ALL_BITS, &[F_SETLEASE, F_SETDELEG])], libc::EINVAL);

/// Calls, what is done about each, and why. The error is one that programs expect of a kernel without the call, so that they go on by
/// another way.
const CALLS: &[Call] = &[
    call(
        "add_key",
        numbers(248, 286, 217, 309),
        Always(libc::ENOSYS),
        "the keyrings of root outside are those of root inside",
    ),
    call("request_key", numbers(249, 287, 218, 310), Always(libc::ENOSYS), "the same"),
    call("keyctl", numbers(250, 288, 219, 311), Always(libc::ENOSYS), "the same"),
    call(
        "unshare",
        numbers(272, 310, 97, 337),
        NEW_USER,
        "who makes a user namespace has every capability in it, and reaches the container's own cgroup",
    ),
    call("clone", numbers(56, 120, 220, 120), NEW_USER, "the same"),
    // C libraries then take clone.
    call(
        "clone3",
        everywhere(435),
        Always(libc::ENOSYS),
        "the same: its flags stand in memory, where a filter cannot look",
    ),
    call(
        "setns",
        numbers(308, 346, 268, 375),
        Always(libc::EPERM),
        "root would have every capability in the user namespace that the jail's host name belongs to; into any other it may not",
    ),
    // The kernel looks at 32 bits of the request only (CVE-2019-10063), and so does this.
    call(
        "ioctl",
        numbers(16, 54, 29, 54),
        If(&[In(1, ALL_BITS, &[TIOCSTI, TIOCLINUX])], libc::EPERM),
        "types for the shell that 'ims-sshd enter' was started from, on a virtual console too (CVE-2016-2568, CVE-2023-28100)",
    ),
    // The kernel looks at 32 bits of the command.
    call(
        "fcntl",
        numbers(72, 55, 25, 55),
        LEASE,
        "on a file that can only be read, such as one in /sys, everybody outside who opens it would wait (45 seconds)",
    ),
    call("fcntl64", [None, Some(221), None, Some(221)], LEASE, "the same"),
    // Limits are not read either: a filter compares halves of the address of the new ones, which costs more than it gives.
    call(
        "prlimit64",
        numbers(302, 340, 261, 369),
        If(&[In(0, ALL_BITS, &[1])], libc::EPERM),
        "a limit of processor time ends the jail's init, and with it every session",
    ),
    call(
        "pidfd_getfd",
        everywhere(438),
        Always(libc::ENOSYS),
        "takes a descriptor of any process of root's that has no more capabilities: the handle on it need not come from this PID namespace",
    ),
    call(
        "getsockopt",
        numbers(55, 365, 209, 295),
        If(&[AT_SOCKET, In(2, ALL_BITS, &[SO_PEERPIDFD])], libc::ENOPROTOOPT),
        "gives such a handle on whoever listens at a socket outside",
    ),
    call(
        "setsockopt",
        numbers(54, 366, 208, 294),
        If(&[AT_SOCKET, In(2, ALL_BITS, &[SO_PASSPIDFD])], libc::ENOPROTOOPT),
        "has one come with each message from outside",
    ),
    call(
        "socket",
        numbers(41, 359, 198, 281),
        OTHER_FAMILY,
        "AF_PACKET sees all packets of the pod; AF_VSOCK reaches the machine that the node runs on; AF_ALG and others reach parts of the \
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
        "it sees what others in the pod are sent; ping needs no more than ICMP",
    ),
    call("socketpair", numbers(53, 360, 199, 288), OTHER_FAMILY, "the same as for socket"),
    call(
        "socketcall",
        [None, Some(102), None, None],
        Always(libc::ENOSYS),
        "all calls about sockets in one: its arguments stand in memory, where a filter cannot look",
    ),
    call(
        "io_uring_setup",
        everywhere(425),
        Always(libc::ENOSYS),
        "what is done through it, sockets too, passes by this filter",
    ),
    call("io_uring_enter", everywhere(426), Always(libc::ENOSYS), "the same"),
    call("io_uring_register", everywhere(427), Always(libc::ENOSYS), "the same"),
    call(
        "userfaultfd",
        numbers(323, 374, 282, 388),
        Always(libc::ENOSYS),
        "holds the kernel up in the middle of a copy, by which holes in it are used",
    ),
    call(
        "bpf",
        numbers(321, 357, 280, 386),
        Always(libc::EPERM),
        "a program in the kernel, which some nodes leave to everybody",
    ),
    call(
        "perf_event_open",
        numbers(298, 336, 241, 364),
        Always(libc::EPERM),
        "counts what others do, which some nodes leave to everybody",
    ),
    call(
        "syslog",
        numbers(103, 103, 116, 103),
        Always(libc::EPERM),
        "the kernel's log is the node's, and some nodes leave it to everybody",
    ),
];

/// A way of calling the kernel: every processor has one of 64 and one of 32 bits, and any program may use both.
struct Convention {
    /// `AUDIT_ARCH_…` of linux/audit.h.
    architecture: u32,
    /// Which of a call's numbers.
    column: usize,
}

#[cfg(target_arch = "x86_64")]
const CONVENTIONS: [Convention; 2] =
    [Convention { architecture: 0xc000_003e, column: 0 }, Convention { architecture: 0x4000_0003, column: 1 }];

#[cfg(target_arch = "aarch64")]
const CONVENTIONS: [Convention; 2] =
    [Convention { architecture: 0xc000_00b7, column: 2 }, Convention { architecture: 0x4000_0028, column: 3 }];

/// Where struct seccomp_data has the call's number, its convention, and the lower half of its first argument (little-endian).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// x32, a third convention of x86_64, has the number of the first with this bit.
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

/// Skips so many instructions if what was loaded is `value`, or if it is not.
const fn if_equal(value: u32, skip_if: u8, skip_if_not: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, skip_if, skip_if_not)
}

/// Skips so many instructions if what was loaded has none of `bits`.
const fn unless_any_bit(bits: u32, skip: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bits, 0, skip)
}

/// A jump to the end of the part of the program that it stands in, until that is known.
const END: u8 = u8::MAX;

/// The program while it is made, by the compiler: a session does not wait for it.
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

    /// Ends the part that began when the program had this length.
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

    /// Answers the calls of a convention.
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

    /// Answers one call, if it is to fail; what comes after it, if not.
    const fn answer_call(&mut self, number: u32, rule: Rule) {
        let start = self.length;
        // The tests of the call before may have loaded something else.
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

    /// Goes on if the test holds; else to the end of the part.
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
            // If equal, over the comparisons that are left.
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
    // Calls by an unknown convention fail as if they did not exist.
    program.add(fail(libc::ENOSYS));
    program
};

/// The program, for [`crate::sys::seccomp::filter`].
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

/// A program that refuses `calls` (`SYS_…` of libc) to one that has no use for them, and user namespaces, in which it would have every
/// capability. Only the first convention exists.
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
    program.add(ALLOW);
    program.instructions[..program.length].to_vec()
}

/// A program by which a kernel seems to have no audit (linux/netlink.h), to programs of the first convention.
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
    fn numbers_of_this_processor_are_those_of_libc() {
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

    /// The kernel's answer to a call by `program`: carries out the instructions that are used here.
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

    /// The table's rule for a call, read literally.
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
    fn the_program_does_what_the_table_says() {
        let program = program();
        let values = [
            0,
            1,
            2,
            3,
            10,
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
