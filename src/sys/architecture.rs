//! Determines which machine a program is for (from its ELF header), and whether such programs run here.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use rustix::fs::MemfdFlags;

/// Machine architecture of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm, little-endian.
    Aarch64,
}

/// Number of bytes at the start of a file that identify its machine: ELF's identification, type and machine.
pub(crate) const HEADER: usize = 20;

/// ELF identification of a 64-bit little-endian file, up to the version; the ABI follows.
const IDENTIFICATION: [u8; 7] = *b"\x7fELF\x02\x01\x01";

/// ELF types of programs: ET_EXEC (fixed address) and ET_DYN (PIE, and loaders).
const TYPES: [u8; 2] = [2, 3];

impl Architecture {
    /// All known architectures.
    pub(crate) const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// The architecture of this machine.
    pub(crate) const OWN: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };

    /// Name as in `uname -m` and `BUILD_ARCH`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The architecture called `name`.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// ELF's `e_machine`.
    fn machine(self) -> u8 {
        match self {
            Self::X86_64 => 62,
            Self::Aarch64 => 183,
        }
    }

    /// The architecture of a program that begins with `header`; `None` if it is no ELF program for a known
    /// architecture.
    pub(crate) fn of_elf(header: &[u8]) -> Option<Self> {
        let header = header.get(..HEADER)?;
        let known = header.starts_with(&IDENTIFICATION) && TYPES.contains(&header[16]) && header[17] == 0;
        Self::ALL.into_iter().find(|a| known && header[18..] == [a.machine(), 0])
    }

    /// The two possible headers of a program for this architecture, one for each ELF type.
    pub(crate) fn headers(self) -> [[u8; HEADER]; 2] {
        TYPES.map(|kind| {
            let mut header = [0; HEADER];
            header[..IDENTIFICATION.len()].copy_from_slice(&IDENTIFICATION);
            header[16] = kind;
            header[18] = self.machine();
            header
        })
    }

    /// True if programs for this architecture run here, determined by running one.
    pub(crate) fn runs(self) -> bool {
        self.try_smallest().unwrap_or(false)
    }

    fn try_smallest(self) -> io::Result<bool> {
        // Do not set close-on-exec: a binfmt_misc interpreter opens the program after exec, by its /proc/self/fd name.
        let mut file = File::from(rustix::fs::memfd_create("program", MemfdFlags::empty())?);
        file.write_all(&self.smallest_program())?;
        let mut program = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let status = program.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        Ok(status.code() == Some(EXIT_CODE.into()))
    }

    /// A program that only exits with [`EXIT_CODE`].
    fn smallest_program(self) -> Vec<u8> {
        const ADDRESS: u64 = 0x40_0000;
        let code: [u8; 12] = match self {
            // mov eax, 60 (exit); mov edi, 42; syscall
            Self::X86_64 => [0xb8, 60, 0, 0, 0, 0xbf, EXIT_CODE, 0, 0, 0, 0x0f, 0x05],
            // mov x8, #93 (exit); mov x0, #42; svc #0
            Self::Aarch64 => [0xa8, 0x0b, 0x80, 0xd2, 0x40, EXIT_CODE >> 3, 0x80, 0xd2, 0x01, 0, 0, 0xd4],
        };
        let (header, segment) = (64_u16, 56_u16);
        let before_code = u64::from(header + segment);
        let size = before_code + code.len() as u64;
        let mut program = self.headers()[0].to_vec();
        program.extend(1_u32.to_le_bytes());
        // Entry point, offset of the program headers, no section headers.
        program.extend([ADDRESS + before_code, header.into(), 0].map(u64::to_le_bytes).concat());
        program.extend(0_u32.to_le_bytes());
        program.extend([header, segment, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
        // One segment: the whole file, loaded readable and executable.
        program.extend([1_u32, 5].map(u32::to_le_bytes).concat());
        program.extend([0, ADDRESS, ADDRESS, size, size, 0x1_0000].map(u64::to_le_bytes).concat());
        program.extend(code);
        program
    }
}

const EXIT_CODE: u8 = 42;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elf_header_names_the_architecture() {
        for architecture in Architecture::ALL {
            for header in architecture.headers() {
                assert_eq!(Architecture::of_elf(&header), Some(architecture));
            }
            assert_eq!(Architecture::of_elf(&architecture.smallest_program()), Some(architecture));
        }
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(Architecture::of_elf(&own), Some(Architecture::OWN));
    }

    #[test]
    fn other_files_have_no_architecture() {
        let header = Architecture::Aarch64.headers()[0];
        for (at, value) in [(0, b'#'), (4, 1), (5, 2), (16, 1), (17, 1), (18, 40), (19, 1)] {
            let mut other = header;
            other[at] = value;
            assert_eq!(Architecture::of_elf(&other), None, "byte {at}");
        }
        assert_eq!(Architecture::of_elf(&header[..19]), None);
        assert_eq!(Architecture::of_elf(b"#!/bin/sh\n# a long script"), None);
    }

    #[test]
    fn program_for_this_machine_runs() {
        assert!(Architecture::OWN.runs());
    }
}
