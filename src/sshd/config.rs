//! What is written into sshd's configuration: a fragment of our own, and one line that includes it.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::error::{Advise, Attempt, Error, Result};
use crate::sshd::effective::Effective;

const ENVIRONMENT: &str = include_str!("../../sshd_config.d/environment.conf");
const JAIL: &str = include_str!("../../sshd_config.d/jail.conf");

/// The configuration's text with the fragment's `Include` as its first line, and nowhere else.
pub fn including(config: &str, fragment: &Path) -> String {
    format!("{}\n{}", include_line(fragment), without_include(config))
}

/// The configuration's text without any line that includes a fragment of ours, whatever environment wrote it.
pub fn without_include(config: &str) -> String {
    config.split_inclusive('\n').filter(|line| !line.trim_end().ends_with(MARK)).collect()
}

/// By this the line is known again.
const MARK: &str = "# ims-sshd";

fn include_line(fragment: &Path) -> String {
    format!("Include {} {MARK}", fragment.display())
}

/// The fragment's text. `variables` are the job's; those that the configuration sets already (`base`, without our fragment) are kept
/// where the job has none of that name. With `force_command`, root's sessions are jailed.
pub fn fragment(variables: &[(String, String)], base: &Effective, force_command: Option<&str>) -> String {
    let mut merged = variables.to_vec();
    for (name, value) in base.set_env() {
        if !merged.iter().any(|(known, _)| *known == name) {
            merged.push((name, value));
        }
    }
    let words: Vec<_> = merged.iter().map(|(name, value)| quoted(&format!("{name}={value}"))).collect();
    let set_env = if words.is_empty() { String::new() } else { format!("SetEnv {}", words.join(" ")) };
    let jail = force_command.map_or(String::new(), |command| JAIL.replace("@FORCE_COMMAND@", command));
    // The variables last: they are not ours, and may hold anything.
    ENVIRONMENT.replace("@JAIL@", &jail).replace("@SETENV@", &set_env)
}

/// One word of sshd_config: in double quotes, in which a backslash stands before a quote and before a backslash.
fn quoted(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Puts `text` at `path` in one step: sshd sees the old file or the new one. Keeps the mode and owner of a file that stands there;
/// a link is followed, as sshd does.
pub fn write(path: &Path, text: &str) -> Result<()> {
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
        let mut file = File::create(&temporary)?;
        let (mode, owner) = before.as_ref().map_or((0o600, (0, 0)), |m| (m.mode() & 0o7777, (m.uid(), m.gid())));
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)
    };
    put()
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })
        .attempt(attempted)
        .advise("its folder has to be writable and to have space, and the file must not be a mount of its own")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    const FRAGMENT: &str = "/run/ims-sshd/x/sshd.conf";

    #[test]
    fn the_include_is_the_first_line_once() {
        let once = including("Port 22\nSubsystem sftp internal-sftp", Path::new(FRAGMENT));
        assert_eq!(once.lines().next(), Some("Include /run/ims-sshd/x/sshd.conf # ims-sshd"));
        assert_eq!(including(&once, Path::new(FRAGMENT)), once);
        let moved = including(&once, Path::new("/elsewhere"));
        assert_eq!(moved.matches("Include").count(), 1);
        assert_eq!(without_include(&once), "Port 22\nSubsystem sftp internal-sftp");
    }

    proptest! {
        #[test]
        fn including_changes_nothing_else(config in "(?s).{0,200}") {
            prop_assume!(!config.lines().any(|l| l.trim_end().ends_with(MARK)));
            let with = including(&config, Path::new(FRAGMENT));
            prop_assert_eq!(&without_include(&with), &config);
            prop_assert_eq!(including(&with, Path::new(FRAGMENT)), with);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Compared with the real sshd: whatever a value holds, sessions get just that.
        #[test]
        fn sshd_reads_back_the_variables_that_were_written(value in "[ -~]{0,30}", other in "[^\0\n\r]{0,20}") {
            let variables = [("A".to_owned(), value), ("B".to_owned(), other)];
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("config");
            std::fs::write(&file, fragment(&variables, &Effective::default(), None)).unwrap();
            let sshd = Command::new(crate::sshd::program().unwrap()).arg("-T").arg("-f").arg(&file).output().unwrap();
            prop_assert!(sshd.status.success(), "{}", String::from_utf8_lossy(&sshd.stderr));
            prop_assert_eq!(Effective::parse(&sshd.stdout).set_env(), variables);
        }
    }

    #[test]
    fn a_variable_that_the_configuration_sets_is_kept_unless_the_job_has_it() {
        let base = Effective::parse(b"setenv IMS_JOB_ID=old\nsetenv SITE=x y\n");
        let text = fragment(&[("IMS_JOB_ID".into(), "new".into())], &base, None);
        assert!(text.contains("SetEnv \"IMS_JOB_ID=new\" \"SITE=x y\"\n"), "{text}");
    }

    #[test]
    fn writing_keeps_mode_and_link_and_leaves_nothing_beside() {
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
