//! Changes to sshd's configuration: a fragment of our own, and one line that includes it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::error::{Advise, Attempt, Error, Result};

const ENVIRONMENT: &str = include_str!("../../sshd_config.d/environment.conf");
const JAIL: &str = include_str!("../../sshd_config.d/jail.conf");

/// Returns `config` with the fragment's `Include` as its first line, and nowhere else.
pub fn including(config: &[u8], fragment: &Path) -> Vec<u8> {
    let line = format!("Include {} {MARK}\n", fragment.display());
    [line.as_bytes(), &without_include(config)].concat()
}

/// Removes every line that includes a fragment of this program, whichever environment wrote the line. Does not require
/// UTF-8, since sshd does not either.
pub(crate) fn without_include(config: &[u8]) -> Vec<u8> {
    let is_ours = |line: &[u8]| line.starts_with(b"Include /") && line.trim_ascii_end().ends_with(MARK.as_bytes());
    config.split_inclusive(|&b| b == b'\n').filter(|line| !is_ours(line)).flatten().copied().collect()
}

/// Keywords of limits, and the lines that raise these limits where the configuration does not set them: the number of
/// sessions of one connection, and of unauthenticated connections, some of which sshd drops at random. With more than
/// ten Ansible forks, sshd's defaults make hosts unreachable.
const RAISED_LIMITS: [(&str, &str); 2] = [("maxsessions", "MaxSessions 1000\n"), ("maxstartups", "MaxStartups 200\n")];

/// Marker at the end of our line.
const MARK: &str = "# ims-sshd";

/// Text of the fragment. `variables` of the job override `set_env`, the variables that the configuration sets without
/// our fragment. `keywords` are those that the configuration sets. Without `agent`, agent forwarding is off, whatever
/// the configuration says. With `force_command`, root's sessions are jailed.
pub fn fragment(
    variables: &[(String, String)],
    set_env: &[(String, String)],
    keywords: &BTreeSet<String>,
    agent: bool,
    force_command: Option<&str>,
) -> String {
    let mut merged = variables.to_vec();
    for (name, value) in set_env {
        if !merged.iter().any(|(known, _)| known == name) {
            merged.push((name.clone(), value.clone()));
        }
    }
    let words: Vec<_> = merged.iter().map(|(name, value)| quoted(&format!("{name}={value}"))).collect();
    let set_env = if words.is_empty() { String::new() } else { format!("SetEnv {}", words.join(" ")) };
    let jail = force_command.map_or(String::new(), |command| JAIL.replace("@FORCE_COMMAND@", command));
    let agent = if agent { "" } else { "AllowAgentForwarding no" };
    let limits: String =
        RAISED_LIMITS.iter().filter(|(keyword, _)| !keywords.contains(*keyword)).map(|(_, line)| *line).collect();
    // Variables go last: their values come from outside and may contain a placeholder.
    ENVIRONMENT
        .replace("@JAIL@", &jail)
        .replace("@LIMITS@", &limits)
        .replace("@AGENT@", agent)
        .replace("@SETENV@", &set_env)
}

/// Quotes one word for sshd_config: in double quotes, with a backslash before `"` and `\`.
fn quoted(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Replaces the file at `path` atomically: sshd reads the old content or the new. Keeps mode and owner of an existing
/// file; follows a link, as sshd does.
pub(crate) fn write(path: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    let attempted = || format!("write {}", path.display());
    let path = match std::fs::canonicalize(path) {
        Ok(real) => real,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => path.to_owned(),
        Err(e) => return Err(e).attempt(attempted),
    };
    let name = path.file_name().ok_or_else(|| Error::new(attempted()).because("it names no file"))?;
    let temporary = path.with_file_name(format!(".{}.ims-sshd", name.to_string_lossy()));
    let before = std::fs::metadata(&path).ok();
    let put = || -> std::io::Result<()> {
        if let Err(e) = std::fs::remove_file(&temporary)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(e);
        }
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let (mode, owner) = before.as_ref().map_or((0o600, (0, 0)), |m| (m.mode() & 0o7777, (m.uid(), m.gid())));
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        file.write_all(text.as_ref())?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)
    };
    put()
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })
        .attempt(attempted)
        .advise("its directory must be writable and have space, and the file must not be a mount point")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sshd::effective::Effective;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn include_is_the_first_line_and_occurs_once() {
        let by_itself = b"PermitTTY no # ims-sshd\n# G\xfcnter's\nPort 22";
        let once = including(by_itself, Path::new("/run/ims-sshd/x/sshd.conf"));
        let line = b"Include /run/ims-sshd/x/sshd.conf # ims-sshd\n";
        assert_eq!(once, [&line[..], by_itself].concat());
        assert_eq!(
            including(&once, Path::new("/elsewhere")),
            [b"Include /elsewhere # ims-sshd\n", &by_itself[..]].concat()
        );
        assert_eq!(without_include(&once), by_itself);
    }

    /// A line with its line ending, and whether it is ours.
    fn line() -> impl Strategy<Value = (Vec<u8>, bool)> {
        let end = || "[ \t]{0,1}(\n|\r\n)";
        let text = |(line, end): (String, String)| ((line + &end).into_bytes(), false);
        prop_oneof![
            ("[ \t]?(Port 22|Match User root|Include|include /etc/ssh/\\*\\.conf|# ims-sshd|[ -~\u{e9}]{0,12})", end())
                .prop_map(text),
            // Lines that are not ours, but have our marker.
            ("(PermitTTY no|#?[ ]?Include|IncludeX /x|[ -~\u{e9}]{0,6}) # ims-sshd", end()).prop_map(text),
            ("/[a-z0-9/._-]{0,12}", end())
                .prop_map(|(path, end)| (format!("Include {path} {MARK}{end}").into_bytes(), true)),
            vec(any::<u8>(), 0..20).prop_map(|mut bytes| {
                bytes.retain(|&b| b != b'\n');
                bytes.push(b'\n');
                (bytes, false)
            }),
        ]
    }

    proptest! {
        #[test]
        fn include_comes_first_and_other_lines_stay(
            lines in vec(line(), 0..8),
            last in "(Port 22|# ims-sshd)?",
            path in "/[a-z0-9/._-]{0,20}",
        ) {
            let all = |ours: bool| -> Vec<u8> {
                let lines = lines.iter().filter(|(_, our)| ours || !our).flat_map(|(line, _)| line.clone());
                lines.chain(last.bytes()).collect()
            };
            let before = all(true);
            let with = including(&before, Path::new(&path));
            prop_assert_eq!(&with, &[format!("Include {path} # ims-sshd\n").as_bytes(), &all(false)].concat());
            prop_assert_eq!(&including(&with, Path::new(&path)), &with);
            prop_assert_eq!(without_include(&with), all(false));
            prop_assert_eq!(without_include(&before), all(false));
        }

        #[test]
        fn fragment_has_each_variable_as_one_word(
            job in vec(("[A-Z_]{1,3}", "[^\0\r\n]{0,12}"), 0..4),
            base in vec(("[A-Z_]{1,3}", "[ -~]{0,12}"), 0..4),
            command in prop::option::of("exec [a-z/' ]{0,12}"),
        ) {
            let text = fragment(&job, &base, &BTreeSet::new(), true, command.as_deref());
            let line = text.lines().map(str::trim_start).find(|line| line.starts_with("SetEnv "));
            let words = shell_words::split(line.unwrap_or("SetEnv")).unwrap();
            let mut wanted = vec!["SetEnv".to_owned()];
            wanted.extend(job.iter().map(|(name, value)| format!("{name}={value}")));
            for (at, (name, value)) in base.iter().enumerate() {
                if !job.iter().chain(&base[..at]).any(|(known, _)| known == name) {
                    wanted.push(format!("{name}={value}"));
                }
            }
            prop_assert_eq!(words, wanted);
            let forced = text.lines().find_map(|line| line.trim_start().strip_prefix("ForceCommand "));
            prop_assert_eq!(forced, command.as_deref());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Compares with the real sshd: sessions must get exactly the value, whatever it contains.
        #[test]
        fn sshd_reads_back_the_variables_that_were_written(value in "[ -~]{0,30}", other in "[^\0\n\r]{0,20}") {
            let variables = [("A".to_owned(), value), ("B".to_owned(), other)];
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("config");
            std::fs::write(&file, fragment(&variables, &[], &BTreeSet::new(), true, None)).unwrap();
            let sshd = Command::new(crate::sshd::program().unwrap()).arg("-T").arg("-f").arg(&file).output().unwrap();
            prop_assert!(sshd.status.success(), "{}", String::from_utf8_lossy(&sshd.stderr));
            prop_assert_eq!(Effective::parse(&sshd.stdout).set_env(), variables);
        }
    }

    #[test]
    fn variables_of_the_configuration_stay_unless_the_job_sets_them() {
        let base = [("IMS_JOB_ID".into(), "old".into()), ("SITE".into(), "x y".into())];
        let text = fragment(&[("IMS_JOB_ID".into(), "new".into())], &base, &BTreeSet::new(), true, None);
        assert!(text.contains("SetEnv \"IMS_JOB_ID=new\" \"SITE=x y\"\n"), "{text}");
    }

    #[test]
    fn limits_are_raised_unless_the_configuration_sets_them() {
        for (set, raised) in [
            (&["port"][..], &["MaxSessions 1000", "MaxStartups 200"][..]),
            (&["maxsessions"], &["MaxStartups 200"]),
            (&["maxsessions", "maxstartups"], &[]),
        ] {
            let text = fragment(&[], &[], &set.iter().map(|keyword| (*keyword).to_owned()).collect(), true, None);
            assert_eq!(text.lines().filter(|line| line.starts_with("Max")).collect::<Vec<_>>(), raised);
        }
    }

    #[test]
    fn writing_keeps_mode_and_link_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        let link = dir.path().join("link");
        std::fs::write(&real, "old").unwrap();
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        write(&link, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "new");
        assert_eq!(std::fs::metadata(&real).unwrap().mode() & 0o777, 0o640);
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
