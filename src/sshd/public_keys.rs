//! Files of authorized keys.

use std::io::Read;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Local, NaiveDateTime, TimeZone, Utc};

use crate::error::{Error, Result};
use crate::sys::named;

/// Reason for which a private key is refused.
pub const IS_PRIVATE: &str = "it is a private key; expected the public one, usually beside it as .pub";

/// Returns whether `text` holds a private key.
pub fn is_private(text: &str) -> bool {
    text.contains("PRIVATE KEY-----")
}

/// Refuses a file without a valid key, and warns of keys that have expired. `option` is named in the error.
pub(crate) fn check_public_keys(option: &str, file: &Path) -> Result<()> {
    let refuse = |why: &str| refused(option, file, why);
    let real = named::resolve(file).map_err(|e| refuse(&e.to_string()))?;
    let found = std::fs::metadata(&real).map_err(|e| refuse(&e.to_string()))?;
    if !found.is_file() {
        return Err(refuse("expected a regular file"));
    }
    let mut text = Vec::new();
    named::open_file(&real).and_then(|mut file| file.read_to_end(&mut text)).map_err(|e| refuse(&e.to_string()))?;
    check_text(option, file, &String::from_utf8_lossy(&text))
}

fn refused(option: &str, file: &Path, why: &str) -> Error {
    Error::bad_input(format!("{option} is '{}': {why}", file.display()))
}

/// Refuses the content of `file` if it has no valid key, and warns of keys that have expired. `option` is named in the
/// error.
pub fn check_text(option: &str, file: &Path, text: &str) -> Result<()> {
    let refuse = |why: &str| refused(option, file, why);
    if is_private(text) {
        return Err(refuse(IS_PRIVATE));
    }
    if text.contains("---- BEGIN SSH2 PUBLIC KEY ----") {
        return Err(refuse("it is a key in the format of RFC 4716; 'ssh-keygen -i -f FILE' converts it"));
    }
    let keys: Vec<_> = text.lines().enumerate().filter(|(_, line)| is_key(line)).collect();
    if keys.is_empty() {
        return Err(refuse("it holds no public key in OpenSSH's format"));
    }
    let expired: Vec<_> =
        keys.iter().filter_map(|(at, line)| Some((at + 1, expired_by(line, Utc::now(), &Local)?))).collect();
    if expired.len() == keys.len() {
        return Err(refuse("every key in it has expired (expiry-time); add one that is valid"));
    }
    for (at, time) in expired {
        let file = file.display();
        tracing::warn!("the key in line {at} of {file} has expired (expiry-time=\"{time}\"): sshd will refuse it");
    }
    Ok(())
}

/// Kinds of host keys (ssh-keygen(1)), without certificates.
const HOST_KEYS: [&str; 5] =
    ["ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"];

/// The host key in `text`, without its comment, as a line of known_hosts takes it. `None` unless `text` is one line
/// with one key of a known kind.
pub(crate) fn host_key(text: &str) -> Option<String> {
    let line = text.strip_suffix('\n').unwrap_or(text);
    let mut words = line.split(' ');
    let (kind, key) = (words.next()?, words.next()?);
    let bytes = STANDARD.decode(key).ok()?;
    // The key begins with the name of its kind and that name's length (RFC 4253, section 6.6).
    let (length, rest) = bytes.split_first_chunk()?;
    let is_of_kind =
        usize::try_from(u32::from_be_bytes(*length)) == Ok(kind.len()) && rest.starts_with(kind.as_bytes());
    let is_one = HOST_KEYS.contains(&kind) && is_of_kind && rest.len() > kind.len() && !line.contains(char::is_control);
    is_one.then(|| format!("{kind} {key}"))
}

/// Returns whether a line holds a key: options, if any, then the name of the key's type, then the key, which begins
/// with the encoded length of that name.
fn is_key(line: &str) -> bool {
    let words: Vec<_> = line.split_whitespace().collect();
    let is_type = |word: &str| ["ssh-", "ecdsa-", "sk-"].iter().any(|begin| word.starts_with(begin));
    !line.trim_start().starts_with('#') && words.windows(2).any(|w| is_type(w[0]) && w[1].starts_with("AAAA"))
}

/// Returns whether the key in `line` has the option `name` with a value.
pub(crate) fn has_option(line: &str, name: &str) -> bool {
    let is_it = |option: &str| option.split_once('=').is_some_and(|(found, _)| found.eq_ignore_ascii_case(name));
    !line.trim_start().starts_with('#') && options(line).into_iter().any(is_it)
}

/// Value of the option `expiry-time` because of which sshd refuses a key at `now`: a time that has passed, or text that
/// is no time (parse_absolute_time in OpenSSH's misc.c). sshd reads times in its time zone, `local`.
fn expired_by<'a>(line: &'a str, now: DateTime<Utc>, local: &impl TimeZone) -> Option<&'a str> {
    let mut times = options(line).into_iter().filter_map(|option| {
        let (name, value) = option.split_once('=')?;
        name.eq_ignore_ascii_case("expiry-time").then(|| value.trim_matches('"'))
    });
    times.find(|time| parse(time, local).is_none_or(|until| until < now))
}

/// The options before a key, which end at a blank outside quotes.
fn options(line: &str) -> Vec<&str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let mut is_in_quotes = |c: char| {
        is_quoted ^= c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        is_quoted
    };
    let line = line.trim_start();
    let (mut found, mut begin) = (Vec::new(), 0);
    for (at, c) in line.char_indices() {
        if is_in_quotes(c) || c != ',' && !c.is_whitespace() {
            continue;
        }
        found.push(&line[begin..at]);
        begin = at + 1;
        if c != ',' {
            break;
        }
    }
    found
}

/// Parses `YYYYMMDD[HHMM[SS]]`, in UTC if `Z` or `UTC` follows.
fn parse(time: &str, local: &impl TimeZone) -> Option<DateTime<Utc>> {
    let upper = time.to_ascii_uppercase();
    let digits = upper.strip_suffix("UTC").or_else(|| upper.strip_suffix('Z'));
    let text = digits.unwrap_or(&upper);
    let full = format!("{text}{}", "0".repeat(14_usize.saturating_sub(text.len())));
    let is_known = [8, 12, 14].contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let time = NaiveDateTime::parse_from_str(&full, "%Y%m%d%H%M%S").ok().filter(|_| is_known)?;
    if digits.is_some() { Some(time.and_utc()) } else { Some(local.from_local_datetime(&time).earliest()?.to_utc()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_key_is_one_key_of_a_known_kind_on_one_line() {
        let key = "AAAAC3NzaC1lZDI1NTE5AAAAIDfcMyPkBBsmqY4WPQUBB5gAPbPXgvzHT8qDYVkkQC6l";
        let line = format!("ssh-ed25519 {key}");
        for text in [line.clone(), format!("{line}\n"), format!("{line} ims-sshd node\n")] {
            assert_eq!(host_key(&text).as_deref(), Some(line.as_str()), "{text}");
        }
        for text in [
            String::new(),
            "ssh-ed25519".into(),
            format!("{line} x\n* {line}\n"),
            format!("{line}\r* {line}"),
            format!("{line}\n\n"),
            format!("ssh-ed25519\n{key}"),
            format!("@cert-authority * {line}"),
            format!("x,* {line}"),
            format!("ssh-rsa {key}"),
            format!("ssh-ed25519 {}", &key[..20]),
            "ssh-ed25519 AAAA".into(),
            "ssh-ed25519 key".into(),
        ] {
            assert_eq!(host_key(&text), None, "{text:?}");
        }
    }
    use chrono::FixedOffset;

    #[test]
    fn expired_keys_are_found_as_sshd_does() {
        let now = Utc.with_ymd_and_hms(2026, 11, 26, 12, 0, 0).unwrap();
        let zone = FixedOffset::east_opt(2 * 3600).unwrap();
        for (options, expired) in [
            ("", false),
            ("no-pty,command=\"expiry-time=20200101\" ", false),
            ("no-pty,command=\"a \\\" b,expiry-time=20200101\" ", false),
            ("expiry-time=\"20200101\" ", true),
            ("no-pty,Expiry-Time=\"20200101\",no-pty ", true),
            ("expiry-time=\"20991231\" ", false),
            ("expiry-time=\"20991231\",expiry-time=\"20200101\" ", true),
            // Local time unless Z or UTC says otherwise; here two hours ahead of UTC.
            ("expiry-time=\"202611261359\" ", true),
            ("expiry-time=\"202611261401\" ", false),
            ("expiry-time=\"20261126120001Z\" ", false),
            ("expiry-time=\"20261126115959z\" ", true),
            ("expiry-time=\"20261126115959UTC\" ", true),
            // sshd ignores the whole line.
            ("expiry-time=\"tomorrow\" ", true),
            ("expiry-time=\"20261341\" ", true),
        ] {
            let line = format!("{options}ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 comment");
            assert_eq!(expired_by(&line, now, &zone).is_some(), expired, "{line}");
        }
    }
}
