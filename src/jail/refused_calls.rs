//! System calls that lead out of the jail although they need no capability, as a table, and the program by which the kernel refuses
//! them. Each is one by which an attempt of the test suite got out.

use crate::sys::calls::Instruction;

/// What is done about a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// It does not exist here (ENOSYS).
    Absent,
    /// Refused (EPERM) if this argument, counted from 0, has one of these bits.
    RefusedWith(u32, u32),
    /// Refused (EPERM) if this argument is this.
    RefusedFor(u32, u32),
}

const NEW_USER: Rule = Rule::RefusedWith(0, libc::CLONE_NEWUSER.cast_unsigned());

/// Calls by name, what is done about each, and why.
const RULES: [(&str, Rule, &str); 7] = [
    ("add_key", Rule::Absent, "the keyrings of root outside are those of root inside"),
    ("request_key", Rule::Absent, "the same"),
    ("keyctl", Rule::Absent, "the same"),
    (
        "unshare",
        NEW_USER,
        "who makes a user namespace has every capability in it, and reaches the container's own cgroup",
    ),
    ("clone", NEW_USER, "the same"),
    // C libraries then take clone.
    ("clone3", Rule::Absent, "the same: its flags stand in memory, where a filter cannot look"),
    // The kernel looks at 32 bits of the request only (CVE-2019-10063), and so does this.
    (
        "ioctl",
        Rule::RefusedFor(1, TIOCSTI),
        "types for the shell that 'ims-sshd enter' was started from (CVE-2016-2568)",
    ),
];

/// asm-generic/ioctls.h.
const TIOCSTI: u32 = 0x5412;

/// A way of calling the kernel: every processor has one of 64 and one of 32 bits, and any program may use both.
struct Convention {
    /// AUDIT_ARCH_… of linux/audit.h.
    architecture: u32,
    /// Its numbers of the calls, in the order of the rules.
    numbers: [u32; RULES.len()],
}

/// Numbers are those of arch/x86/entry/syscalls in Linux.
#[cfg(target_arch = "x86_64")]
const CONVENTIONS: [Convention; 2] = [
    Convention { architecture: 0xc000_003e, numbers: [248, 249, 250, 272, 56, 435, 16] },
    Convention { architecture: 0x4000_0003, numbers: [286, 287, 288, 310, 120, 435, 54] },
];

/// Numbers are those of asm-generic/unistd.h and arch/arm/tools/syscall.tbl in Linux.
#[cfg(target_arch = "aarch64")]
const CONVENTIONS: [Convention; 2] = [
    Convention { architecture: 0xc000_00b7, numbers: [217, 218, 219, 97, 220, 435, 29] },
    Convention { architecture: 0x4000_0028, numbers: [309, 310, 311, 337, 120, 435, 54] },
];

/// Where struct seccomp_data has the call's number, its convention, and the lower half of its first argument (little-endian).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// x32, a third convention of x86_64, has the number of the first with this bit.
const X32: u32 = 0x4000_0000;

const ALLOW: Instruction = give(libc::SECCOMP_RET_ALLOW);
const ENOSYS: Instruction = give(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned());
const EPERM: Instruction = give(libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned());

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

/// Goes on if what was loaded is `value`, else skips `otherwise` instructions.
const fn if_equal(value: u32, otherwise: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 0, otherwise)
}

/// Goes on if what was loaded has one of `bits`, else skips `otherwise` instructions.
const fn if_any_bit(bits: u32, otherwise: u8) -> Instruction {
    instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bits, 0, otherwise)
}

/// The program, for [`crate::sys::calls::filter`]. What comes by a convention that is not known does not exist.
pub fn program() -> Vec<Instruction> {
    let mut program = vec![load(ARCHITECTURE)];
    for convention in &CONVENTIONS {
        let answers = convention.answers();
        let length = u8::try_from(answers.len()).expect("a jump is as long as a byte can say");
        program.push(if_equal(convention.architecture, length));
        program.extend(answers);
    }
    program.push(ENOSYS);
    program
}

impl Convention {
    /// What is answered to a call by this convention.
    fn answers(&self) -> Vec<Instruction> {
        let mut answers = vec![load(NUMBER), if_any_bit(X32, 1), ENOSYS];
        for ((_, rule, _), &number) in RULES.iter().zip(&self.numbers) {
            let (argument, test) = match *rule {
                Rule::Absent => {
                    answers.extend([if_equal(number, 1), ENOSYS]);
                    continue;
                }
                Rule::RefusedWith(argument, bits) => (argument, if_any_bit(bits, 1)),
                Rule::RefusedFor(argument, value) => (argument, if_equal(value, 1)),
            };
            answers.extend([if_equal(number, 4), load(ARGUMENTS + 8 * argument), test, EPERM, ALLOW]);
        }
        answers.push(ALLOW);
        answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_this_processor_are_libcs() {
        let libcs = [
            ("add_key", libc::SYS_add_key),
            ("request_key", libc::SYS_request_key),
            ("keyctl", libc::SYS_keyctl),
            ("unshare", libc::SYS_unshare),
            ("clone", libc::SYS_clone),
            ("clone3", libc::SYS_clone3),
            ("ioctl", libc::SYS_ioctl),
        ];
        for (at, (name, number)) in libcs.into_iter().enumerate() {
            assert_eq!((RULES[at].0, i64::from(CONVENTIONS[0].numbers[at])), (name, number));
        }
        assert_eq!(u64::from(TIOCSTI), libc::TIOCSTI);
    }
}
