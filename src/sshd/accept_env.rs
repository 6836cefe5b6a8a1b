//! Variables that clients may set, judged by every `AcceptEnv` in sshd's configuration.
//!
//! `sshd -T` answers for one address only, and a `Match` block that applies to another address adds its patterns to the
//! list. (For the other keywords checked here, sshd uses the first value found, which is our fragment's.) So every
//! configuration file is read, and a pattern is judged wherever it stands.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::sshd::options::Options;

/// Names or patterns of variables by which a client could make a shell or the dynamic loader run code or write a file:
/// from bash(1), fish(1), zsh(1), ksh(1), ld.so(8), and glibc's list of variables ignored in setuid programs.
const DANGEROUS: [&str; 22] = [
    "BASH_ENV",
    "BASH_FUNC_*",
    "BASHOPTS",
    "ENV",
    "FPATH",
    "GCONV_PATH",
    "GETCONF_DIR",
    "GLIBC_TUNABLES",
    "HOSTALIASES",
    "IFS",
    "LD_*",
    "LOCPATH",
    "MALLOC_TRACE",
    "NLSPATH",
    "PATH",
    "PROMPT_COMMAND",
    "PS4",
    "SHELLOPTS",
    "TMPDIR",
    "XDG_CONFIG_*",
    "XDG_DATA_*",
    "ZDOTDIR",
];

/// Refuses `pattern`, found at `place`, if it lets a client set a dangerous variable.
pub(crate) fn judge(place: &str, pattern: &str) -> Result<()> {
    let Some(name) = DANGEROUS.iter().find(|name| have_a_name_in_common(pattern.as_bytes(), name.as_bytes())) else {
        return Ok(());
    };
    Err(Error::new("open a jailed environment")
        .because(format!(
            "{place}: AcceptEnv {pattern} lets a client set {name} for the login shell that starts the jail's helper"
        ))
        .advise("remove the pattern, in whichever Match block it is: a client could run code outside the jail"))
}

/// True if some name matches both of these sshd patterns; `*` matches any number of bytes, `?` one.
fn have_a_name_in_common(a: &[u8], b: &[u8]) -> bool {
    // matched[j]: true if some name matches both the part of `a` read so far and the first j bytes of `b`.
    let mut matched = vec![false; b.len() + 1];
    matched[0] = true;
    for j in 0..b.len() {
        matched[j + 1] = matched[j] && b[j] == b'*';
    }
    for &x in a {
        let before = matched.clone();
        matched[0] = before[0] && x == b'*';
        for (j, &y) in b.iter().enumerate() {
            let same = x == y || x == b'?' || y == b'?';
            matched[j + 1] =
                if x == b'*' || y == b'*' { before[j + 1] || matched[j] || before[j] } else { before[j] && same };
        }
    }
    matched[b.len()]
}

/// Judges all patterns in the configuration that `options` select, and in the options themselves.
pub(crate) fn check(config: &Path, options: &Options) -> Result<()> {
    each_line(config, options, &mut |place, line| match line {
        Line::AcceptEnv(patterns) => patterns.iter().try_for_each(|pattern| judge(place, pattern)),
        _ => Ok(()),
    })
}

/// Keywords of all lines of the configuration and of the options, in lower case, wherever they stand.
pub(crate) fn keywords(config: &Path, options: &Options) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    each_line(config, options, &mut |_, line| {
        if let Line::Other(keyword) = line {
            found.insert(keyword);
        }
        Ok(())
    })?;
    Ok(found)
}

/// Criteria of a `Match` block that depend on the client's address, or on the address and port that the client
/// connected to.
const BY_ADDRESS: [&str; 5] = ["address", "host", "localaddress", "localport", "rdomain"];

/// A `Match` block of the configuration that does not apply to all addresses alike, and its place.
pub(crate) fn match_by_address(config: &Path, options: &Options) -> Result<Option<String>> {
    let mut found = None;
    each_line(config, options, &mut |place, line| {
        if let Line::Match(words) = line
            && let Some(at) = words.iter().position(|word| BY_ADDRESS.iter().any(|own| word.eq_ignore_ascii_case(own)))
        {
            let value = words.get(at + 1).map_or("", String::as_str);
            found = Some(format!("'Match {} {value}' ({place})", words[at]));
        }
        Ok(())
    })?;
    Ok(found)
}

/// Calls `found` with each relevant line, and its place.
fn each_line(config: &Path, options: &Options, found: &mut dyn FnMut(&str, Line) -> Result<()>) -> Result<()> {
    options.settings().filter_map(Line::parse).try_for_each(|line| found("SSHD_OPTIONS", line))?;
    let (mut read, mut unread) = (BTreeSet::new(), vec![config.to_owned()]);
    while let Some(file) = unread.pop() {
        if read.contains(&file) {
            continue;
        }
        let shown = file.display().to_string();
        let text = read_regular(&file).attempt(|| format!("read {shown}, a part of sshd's configuration"))?;
        for (number, line) in (1..).zip(text.split('\n')) {
            let place = format!("{shown} line {number}");
            match Line::parse(line) {
                Some(Line::Include(patterns)) => {
                    for pattern in patterns {
                        let files =
                            included(&pattern).attempt(|| format!("find the files of Include {pattern} ({place})"))?;
                        unread.extend(files);
                    }
                }
                Some(line) => found(&place, line)?,
                None => {}
            }
        }
        read.insert(file);
    }
    Ok(())
}

/// Reads at most [`LARGEST`] bytes of a regular file. sshd has just read the whole file at this path, but another file
/// may have taken its place since: a FIFO must not block, nor a large file fill memory.
fn read_regular(path: &Path) -> io::Result<String> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = Vec::new();
    file.take(LARGEST).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Maximum size of a configuration file, in bytes.
const LARGEST: u64 = 16 << 20;

/// Files matching an Include pattern. Relative patterns start at /etc/ssh, not at the including file.
fn included(pattern: &str) -> std::result::Result<Vec<PathBuf>, Box<dyn std::error::Error>> {
    if pattern.contains(char::REPLACEMENT_CHARACTER) {
        return Err("it is not UTF-8".into());
    }
    let pattern = Path::new("/etc/ssh").join(pattern);
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let found = glob::glob_with(&pattern.to_string_lossy(), options)?;
    Ok(found.collect::<std::result::Result<_, _>>()?)
}

/// A relevant line.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    AcceptEnv(Vec<String>),
    Include(Vec<String>),
    Match(Vec<String>),
    /// A line with another keyword.
    Other(String),
}

impl Line {
    /// Parses a line in every way a version of sshd may. If versions split it into words differently, both results are
    /// judged; a trailing comment counts as words, as it did before OpenSSH 8.5.
    fn parse(line: &str) -> Option<Self> {
        // A quote may begin anywhere in a keyword, and its end also ends the keyword.
        let mut open = false;
        let ended: String = line
            .chars()
            .filter_map(|c| match c {
                '"' => {
                    open = !open;
                    (!open).then_some(' ')
                }
                c => Some(c),
            })
            .collect();
        let joined: String = line.chars().filter(|c| !matches!(c, '"' | '\'' | '\\')).collect();
        let words = |text: &str| -> Vec<String> {
            let separates = |c: char| c.is_ascii_whitespace() || c == '=';
            text.split(separates).filter(|word| !word.is_empty()).map(str::to_owned).collect()
        };
        let read = words(&ended);
        let (keyword, arguments) = read.split_first()?;
        let mut arguments = arguments.to_vec();
        arguments.extend(words(&joined).into_iter().skip(1));
        // Words as a shell would split them: a quoted path may contain spaces.
        arguments.extend(shell_words::split(line).unwrap_or_default().into_iter().skip(1));
        match keyword.to_ascii_lowercase().as_str() {
            "acceptenv" => Some(Self::AcceptEnv(arguments)),
            "include" => Some(Self::Include(arguments)),
            "match" => Some(Self::Match(arguments)),
            comment if comment.starts_with('#') => None,
            other => Some(Self::Other(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::variables::matches;
    use proptest::prelude::*;

    #[test]
    fn lines_are_parsed_as_any_version_of_sshd_may_parse_them() {
        for line in [
            "AcceptEnv LD_PRELOAD",
            "acceptenv=LD_PRELOAD",
            " \t=ACCEPTENV\tLANG LD_PRELOAD\r",
            "\"AcceptEnv\"LD_PRELOAD",
            "Accept\"Env\"LD_PRELOAD",
            "AcceptEnv L\"D\"_PRELOAD",
            "AcceptEnv 'LD_PRELOAD'",
            "AcceptEnv \"LANG\" \"LD_PRELOAD\"",
            "AcceptEnv LANG # LD_PRELOAD",
        ] {
            let Some(Line::AcceptEnv(patterns)) = Line::parse(line) else { panic!("{line}") };
            assert!(patterns.iter().any(|pattern| judge("x", pattern).is_err()), "{line}: {patterns:?}");
        }
        for line in ["", "#AcceptEnv LD_PRELOAD", "# AcceptEnv *"] {
            assert_eq!(Line::parse(line), None, "{line}");
        }
        for line in ["SetEnv A=x", "\"setenv\"A=x", "Set\"Env\" A=x", "\tSETENV=A=x"] {
            assert_eq!(Line::parse(line), Some(Line::Other("setenv".into())), "{line}");
        }
        assert_eq!(Line::parse("AcceptEnvironment x"), Some(Line::Other("acceptenvironment".into())));
        let Some(Line::Include(files)) = Line::parse("include \"/a b\" c") else { panic!("not parsed as an Include") };
        assert!(files.contains(&"/a b".into()) && files.contains(&"c".into()), "{files:?}");
    }

    #[test]
    fn harmless_patterns_are_accepted() {
        for pattern in ["LANG", "LC_*", "LANGUAGE", "XMODIFIERS", "COLORTERM", "TZ", "GIT_*", "LC_????", "NO_COLOR"] {
            judge("x", pattern).unwrap();
        }
        for pattern in ["*", "?*", "L*", "LD_X", "BASH_FUNC_exec%%", "BASH_*", "????", "*_PATH", "PATH", "XDG_*"] {
            assert!(judge("x", pattern).is_err(), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn pattern_that_matches_a_dangerous_name_is_refused(
            name in prop::sample::select(&DANGEROUS[..]),
            end in "[A-Z%]{1,4}",
            wild in prop::collection::vec(0..6_u8, 22),
        ) {
            let name = name.replace('*', &end);
            let pattern: String = name
                .chars()
                .zip(wild)
                .map(|(letter, wild)| match wild {
                    0 => "?".into(),
                    1 => "*".into(),
                    2 => format!("*{letter}**"),
                    _ => letter.to_string(),
                })
                .collect();
            prop_assert!(judge("x", &pattern).is_err(), "{}", pattern);
        }

        #[test]
        fn patterns_have_a_name_in_common_if_one_is_found(a in "[AB*?]{0,4}", b in "[AB*?]{0,4}") {
            // Names of up to eight letters suffice: the shortest common match is no longer than both patterns together.
            let names = (0..=8_u32).flat_map(|length| {
                (0..2_u32.pow(length)).map(move |bits| (0..length).map(|at| b"AB"[(bits >> at & 1) as usize]).collect::<Vec<u8>>())
            });
            let mut names = names;
            let found = names.any(|name| matches(a.as_bytes(), &name) && matches(b.as_bytes(), &name));
            prop_assert_eq!(have_a_name_in_common(a.as_bytes(), b.as_bytes()), found, "{} {}", a, b);
        }
    }
}
