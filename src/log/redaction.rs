//! Masks secrets in command lines and messages: people other than the one who typed them read the logs.
//!
//! Each rule finds the ranges of secret values in a text; when in doubt, it masks. Secrets that this program uses
//! itself are registered and masked everywhere: a server may echo what it was sent.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::RwLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// Substrings of names whose values are secret; compared without separators, in lower case.
const SECRET: [&str; 20] = [
    "password",
    "passwd",
    "passphrase",
    "secret",
    "credential",
    "authorization",
    "cookie",
    "apikey",
    "accesskey",
    "privatekey",
    "accountkey",
    "masterkey",
    "signingkey",
    "encryptionkey",
    "activationkey",
    "authkey",
    "regcode",
    "registrationcode",
    "licensekey",
    "sharedaccesssignature",
];

/// Suffixes of a name's parts (between separators) that make the name's value secret.
const SECRET_ENDS: [&str; 3] = ["token", "pass", "pwd"];

/// Whole parts of a name that make the name's value secret.
const SECRET_PARTS: [&str; 7] = ["pw", "rootpw", "bindpw", "psk", "otp", "auth", "authtok"];

/// Names that only look like those of secrets.
const HARMLESS: [&str; 10] =
    ["pwd", "oldpwd", "compass", "bypass", "trespass", "surpass", "encompass", "overpass", "underpass", "multipass"];

/// First parts of names whose values only say something about a secret, such as whether it is required.
const HARMLESS_STARTS: [&str; 10] =
    ["no", "ask", "without", "max", "min", "num", "number", "permit", "require", "prompt"];
/// Last parts of names whose values only say something about a secret, such as the file in which it is stored.
const HARMLESS_ENDS: [&str; 27] = [
    "file",
    "files",
    "path",
    "dir",
    "jar",
    "name",
    "url",
    "uri",
    "endpoint",
    "type",
    "length",
    "len",
    "policy",
    "age",
    "expiry",
    "expires",
    "ttl",
    "timeout",
    "helper",
    "stdin",
    "fd",
    "prompt",
    "prompts",
    "authentication",
    "aging",
    "store",
    "version",
];

/// Names of request signatures, secret only in a URL or form: `Signature:` is a line of `rpm -qi`.
const SIGNATURES: [&str; 4] = ["signature", "sig", "xamzsignature", "hmac"];

/// Options that are secret only with these programs. One-letter options may have the value attached.
const OPTIONS: [(&[&str], &[&str]); 19] = [
    (&["mysql", "mysqldump", "mysqladmin", "mysqlimport", "mysqlcheck", "mysqlsh"], &["-p"]),
    (&["mariadb", "mariadb-dump", "mariadb-admin", "mariadb-import", "mariadb-check"], &["-p"]),
    (&["mongo", "mongosh", "mongodump", "mongorestore", "cqlsh", "rabbitmqadmin", "influx"], &["-p"]),
    (&["sshpass", "useradd", "usermod", "groupmod", "7z", "7za", "7zr", "xfreerdp", "kadmin"], &["-p"]),
    // `login` of docker, podman, helm, oc and az; and a line of netrc.
    (&["login"], &["-p", "password"]),
    (&["curl"], &["-u", "-U", "-b", "--user", "--proxy-user", "--oauth2-bearer"]),
    (&["http", "https", "redis-cli"], &["-a"]),
    (&["lftp"], &["-u"]),
    (&["skopeo", "podman", "buildah", "docker", "oras"], &["--creds", "--src-creds", "--dest-creds"]),
    (&["smbclient", "smbget", "rpcclient", "net", "wmic"], &["-U", "--user"]),
    (&["ldapsearch", "ldapadd", "ldapmodify", "ldapdelete", "ldapwhoami", "ipa-client-install"], &["-w"]),
    (&["ldappasswd"], &["-w", "-a", "-s"]),
    (&["zip", "unzip", "zipcloak", "ipmitool"], &["-P", "password"]),
    (&["ssh-keygen"], &["-N", "-P"]),
    (&["snmpget", "snmpwalk", "snmpset"], &["-c", "-A", "-X"]),
    (&["nmcli"], &["wifi-sec.psk", "password"]),
    // Registration codes and keys for updates.
    (&["SUSEConnect", "suseconnect", "registercloudguest", "register"], &["-r"]),
    (&["rhc"], &["-a", "-p"]),
    (&["pro", "ua"], &["attach"]),
];

/// Long options of some programs that would otherwise be taken for a one-letter option with a value.
const LONG_OPTIONS: [&str; 4] = ["-pass", "-passwd", "-password", "-passphrase"];

/// Programs with options of their own. After such a word, the options of the program named before it no longer apply.
const OTHERS: [&str; 5] = ["ssh", "scp", "sftp", "rsync", "run"];

/// Programs all of whose arguments are secret.
const WHOLLY_SECRET: [&str; 4] = ["mkpasswd", "wpa_passphrase", "htpasswd", "grub-mkpasswd-pbkdf2"];

/// Programs and options that read a secret from standard input.
const READERS: [&str; 12] = [
    "chpasswd",
    "chgpasswd",
    "passwd",
    "smbpasswd",
    "vncpasswd",
    "cryptsetup",
    "kinit",
    "--stdin",
    "--password-stdin",
    "--stdin-password",
    "--passphrase-fd",
    "-S",
];

/// Prefixes by which services mark their tokens.
const TOKENS: [&str; 17] = [
    "ghp_",
    "gho_",
    "ghs_",
    "ghu_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "xoxb-",
    "xoxp-",
    "AKIA",
    "ASIA",
    "eyJ",
    "hvs.",
    "dckr_pat_",
    "npm_",
    "pypi-",
    "AIza",
];

const KEY_BEGINS: (&str, &str) = ("-----BEGIN ", "PRIVATE KEY");
const KEY_ENDS: &str = "-----END ";

/// Replacement for a secret.
pub(crate) const MASK: &str = "***";

/// Registered secrets, longest first, since one may contain another.
static KNOWN: RwLock<Vec<String>> = RwLock::new(Vec::new());

/// Shortest secret registered, in bytes: a shorter one would match ordinary words.
const SHORTEST: usize = 8;

/// Registers `secret`: [`without_known`] masks it from now on, as it is, in JSON and in base64.
pub(crate) fn keep(secret: &str) {
    let mut known = KNOWN.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let quoted = serde_json::Value::from(secret).to_string();
    for form in [secret.to_owned(), quoted[1..quoted.len() - 1].to_owned(), STANDARD_NO_PAD.encode(secret)] {
        if form.len() >= SHORTEST && !known.contains(&form) {
            known.push(form);
        }
    }
    known.sort_by_key(|form| std::cmp::Reverse(form.len()));
}

/// Masks registered secrets in a message.
pub(crate) fn without_known(text: &str) -> Cow<'_, str> {
    let known = KNOWN.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    known.iter().fold(Cow::Borrowed(text), |text, secret| {
        if text.contains(secret.as_str()) { Cow::Owned(text.replace(secret.as_str(), MASK)) } else { text }
    })
}

/// Masks secrets in a command line or a line of a program's output.
pub fn without_secrets(text: &str) -> String {
    let line = Line { text, quoted: quoted(text), words: words(text) };
    let rules = [Line::named, Line::of_options, Line::read_from_stdin, Line::in_sql, Line::in_urls, Line::tokens];
    let mut found: Vec<_> = rules.iter().flat_map(|rule| rule(&line)).chain(private_keys(text)).collect();
    found.retain(|range| !range.is_empty());
    found.sort_by_key(|range| range.start);
    let mut shown = String::with_capacity(text.len());
    let mut at = 0;
    for range in found {
        if range.start > at || shown.is_empty() {
            shown += &text[at..range.start];
            shown += MASK;
        }
        at = at.max(range.end);
    }
    shown + &text[at..]
}

/// Lines of one program's output; a private key spans several.
#[derive(Default)]
pub(crate) struct Lines {
    in_key: bool,
}

impl Lines {
    /// Masks secrets in the next line.
    pub(crate) fn without_secrets(&mut self, line: &str) -> String {
        if self.in_key {
            self.in_key = !line.contains(KEY_ENDS);
            return MASK.into();
        }
        self.in_key = private_keys(line).any(|key| !line[key].contains(KEY_ENDS));
        without_secrets(line)
    }
}

/// A text with its quotes and words. It is not parsed as by a shell: it may be a program's output, or truncated.
struct Line<'a> {
    text: &'a str,
    /// Ranges between outermost quotes.
    quoted: Vec<Range<usize>>,
    words: Vec<Word<'a>>,
}

#[derive(Clone, Copy)]
struct Word<'a> {
    start: usize,
    /// End including quotes.
    end: usize,
    /// Text without quotes.
    text: &'a str,
    /// True if a command can begin here.
    first: bool,
}

impl Line<'_> {
    /// Finds secrets after their names: `NAME=value`, `name: value`, `"name": "value"`, `name => value`,
    /// `<name>value</name>`.
    fn named(&self) -> Vec<Range<usize>> {
        let text = self.text;
        let mut found = Vec::new();
        for (at, separator) in text.match_indices(['=', ':', '>']) {
            if separator == ">" {
                let name = &text[text[..at].rfind('<').map_or(at, |open| open + 1)..at];
                if is_secret(name) {
                    found.push(at + 1..text[at..].find('<').map_or(text.len(), |next| at + next));
                }
                continue;
            }
            // Skip what may be between name and separator: a closing quote or bracket, spaces, another sign as in `:=`.
            let before = text[..at].trim_end_matches([' ', '\t', '=', ':', '+', '?', '!']);
            let before = before.trim_end_matches(['"', '\'', '`', '\\', ']', ')']);
            let start = before
                .rfind(|c| !is_of_name(c))
                .map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
            let name = &before[start..];
            let in_form = separator == "=" && SIGNATURES.contains(&parts(name).concat().as_str());
            // A message such as `/etc/passwd: No such file` or `PASS: a test` has no secret.
            let message = separator == ":"
                && (before[..start].ends_with('/')
                    || name.eq_ignore_ascii_case("pass") && text[at + 1..].starts_with(' '));
            if !in_form && !is_secret(name) || message {
                continue;
            }
            let value = at + text[at..].find(|c| !"=:>~ \t".contains(c)).unwrap_or(text.len() - at);
            let limit = self.limit(value);
            let quote = quote_at(text, value);
            let is_quoted = quote.is_some();
            let spaced = separator == ":" && text[at..value].contains([' ', '\t']);
            // A quote before the name ends the value too: '--password=a b', "PASSWORD=a b".
            let around = quote_before(text, start)
                .map(|quote| self.close(start - quote.len(), quote).map_or(limit, |close| close - quote.len()));
            found.push(if let Some(quote) = quote.filter(|_| separator == ":") {
                value..self.close(value, quote).unwrap_or(limit)
            } else if !is_quoted && (spaced || is_header(name)) {
                value..text[value..limit].find('\n').map_or(limit, |end| value + end)
            } else {
                let close = around.filter(|close| !is_quoted && separator == "=" && *close >= value);
                value..close.unwrap_or_else(|| self.end(value))
            });
        }
        found
    }

    /// Finds secrets in arguments: `--password value`, `-pvalue` of some programs, `setenv NAME value`.
    fn of_options(&self) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        let mut options: Vec<&str> = Vec::new();
        let mut before = "";
        for (at, word) in self.words.iter().enumerate() {
            let name = word.text.rsplit('/').next().unwrap_or_default();
            if word.first {
                options.clear();
            }
            let next = || {
                let next = self.words.get(at + 1)?;
                Some(next.start..self.end(next.start))
            };
            if WHOLLY_SECRET.contains(&name) || name == "passwd" && before == "openssl" {
                let rest = self.words[at + 1..].iter().take_while(|word| !word.first);
                found.extend(rest.map(|word| word.start..self.end(word.start)));
            } else if let Some((_, of_program)) = OPTIONS.iter().find(|(programs, _)| programs.contains(&name)) {
                options.extend(*of_program);
            } else if OTHERS.contains(&name) {
                options.clear();
            }
            let is_option = word.text.starts_with('-') && !word.text.contains(['=', ':']);
            let is_known = options.contains(&word.text);
            // Check for an attached value first: '-pPassword1' is the value 'Password1', not a name. But some programs
            // have '-password', too.
            let attached = options.iter().find(|o| o.len() == 2 && word.text.starts_with(*o)).filter(|_| !is_known);
            if let Some(option) = attached {
                let value = word.start + self.text[word.start..word.end].find(option).unwrap_or_default() + 2;
                found.push(value..self.end(value));
            }
            let is_name = attached.is_none() || LONG_OPTIONS.contains(&word.text);
            let named = (is_option && is_name || ["set", "setenv"].contains(&before)) && is_secret(word.text);
            if named || is_known || word.text.eq_ignore_ascii_case("bearer") {
                found.extend(next());
            }
            before = name;
        }
        found
    }

    /// Finds secrets that a program reads from standard input: `echo value | chpasswd`,
    /// `passwd --stdin root <<< value`.
    fn read_from_stdin(&self) -> Vec<Range<usize>> {
        let reads = |word: &&Word| READERS.contains(&word.text.rsplit('/').next().unwrap_or_default());
        let Some(reader) = self.words.iter().rfind(reads) else { return Vec::new() };
        let mut found: Vec<_> =
            self.text[reader.start..].find("<<").map(|at| reader.start + at..self.text.len()).into_iter().collect();
        if self.text[..reader.start].contains('|') {
            let mut in_echo = false;
            for word in self.words.iter().take_while(|word| word.start < reader.start) {
                in_echo &= !word.first;
                if in_echo {
                    found.push(word.start..self.end(word.start).min(reader.start));
                }
                in_echo |= ["echo", "printf"].contains(&word.text);
            }
        }
        found
    }

    /// Finds secrets in SQL statements: `IDENTIFIED BY 'value'`, `CREATE ROLE name PASSWORD 'value'`.
    fn in_sql(&self) -> Vec<Range<usize>> {
        let lower = self.text.to_ascii_lowercase();
        let statement = ["create ", "alter ", "set ", "grant "].iter().any(|verb| lower.contains(verb));
        let mut found = Vec::new();
        for (at, word) in self.words.iter().enumerate().filter(|_| statement) {
            if ["identified", "password"].iter().any(|known| word.text.eq_ignore_ascii_case(known)) {
                let value = self.words[at + 1..].iter().find(|word| quote_at(self.text, word.start).is_some());
                found.extend(value.map(|word| word.start..self.end(word.start)));
            }
        }
        found
    }

    /// Finds logins in URLs: `scheme://user:password@host`.
    fn in_urls(&self) -> Vec<Range<usize>> {
        self.text.match_indices("://").filter_map(|(at, _)| login(self.text, at + 3)).collect()
    }

    /// Tokens of services, anywhere in the text.
    fn tokens(&self) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        for run in self.text.split(|c: char| !c.is_ascii_alphanumeric() && !"_-.".contains(c)) {
            if TOKENS.iter().any(|begin| run.starts_with(begin))
                && run.len() >= 20
                && run.contains(|c: char| c.is_ascii_digit())
            {
                let start = run.as_ptr() as usize - self.text.as_ptr() as usize;
                found.push(start..start + run.len());
            }
        }
        found
    }

    /// End of the quotes around this position, or of the text if there are none.
    fn limit(&self, at: usize) -> usize {
        self.quoted.iter().find(|quoted| quoted.start <= at && at <= quoted.end).map_or(self.text.len(), |q| q.end)
    }

    /// Returns the position after the quoted text that `quote` opens here. The closing quote has as many backslashes
    /// before it as the opening one, and is not within `$(…)`.
    fn close(&self, open: usize, quote: &str) -> Option<usize> {
        let start = open + quote.len();
        let closes = |at: &usize| {
            let before = &self.text[start..*at];
            quote.starts_with('\'')
                || before.matches("$(").count() <= before.matches(')').count()
                    && before.len() - before.trim_end_matches('\\').len() + 1 == quote.len()
        };
        let sign = if quote.starts_with('\'') { quote } else { quote.trim_start_matches('\\') };
        let found = self.text[start..].match_indices(sign).map(|(at, _)| start + at).find(closes)?;
        Some(found + sign.len())
    }

    /// End of the word that begins here, including quoted parts.
    fn end(&self, start: usize) -> usize {
        let limit = self.limit(start);
        let mut at = start;
        while let Some(c) = self.text[at..limit].chars().next() {
            if c.is_whitespace() {
                return at;
            }
            at = match quote_at(self.text, at) {
                Some(quote) => match self.close(at, quote) {
                    Some(close) => close,
                    None => return limit,
                },
                None if c == '(' => match closing(&self.text[at..limit]) {
                    Some(close) => at + close,
                    None => return limit,
                },
                None if c == '\\' => at + 1 + self.text[at + 1..].chars().next().map_or(0, char::len_utf8),
                None => at + c.len_utf8(),
            };
            if at >= limit {
                return at.min(self.text.len());
            }
        }
        at
    }
}

/// Returns the position after the bracket that closes the first one, as in `$(command word)`.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return Some(at + 1),
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// Ranges between outermost quotes. `'\''` is a quote within quotes; an unpaired one is an apostrophe.
fn quoted(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(open) = text[at..].find(['"', '\'']).map(|next| at + next) {
        at = open + 1;
        if is_escaped(text, open) {
            continue;
        }
        let quote = &text[open..at];
        let mut from = at;
        while let Some(close) = text[from..].find(quote).map(|next| from + next) {
            from = close + 1;
            if quote == "'" && text[close..].starts_with(r"'\''") {
                from += 3;
            } else if quote == "'" || !is_escaped(text, close) {
                found.push(at..close);
                at = from;
                break;
            }
        }
    }
    found
}

fn is_escaped(text: &str, at: usize) -> bool {
    (at - text[..at].trim_end_matches('\\').len()) % 2 == 1
}

/// The quotation mark at this position, with what escapes it in nested quotes: `\"`, or the four characters `'\''`.
fn quote_at(text: &str, at: usize) -> Option<&str> {
    let text = &text[at..];
    if text.starts_with(r"'\''") {
        return Some(&text[..4]);
    }
    let sign = text.trim_start_matches('\\');
    sign.starts_with(['"', '\'', '`']).then(|| &text[..=text.len() - sign.len()])
}

/// The quote right before this position.
fn quote_before(text: &str, at: usize) -> Option<&str> {
    let text = &text[..at];
    if text.ends_with(r"'\''") {
        return Some(&text[at - 4..]);
    }
    let before = text.strip_suffix(['"', '\''])?;
    Some(&text[before.trim_end_matches('\\').len()..])
}

fn words(text: &str) -> Vec<Word<'_>> {
    let mut found = Vec::new();
    let mut first = true;
    for run in text.split_inclusive(|c: char| c.is_whitespace() || ";|&()".contains(c)) {
        let start = run.as_ptr() as usize - text.as_ptr() as usize;
        let ending = run.chars().next_back().filter(|c| c.is_whitespace() || ";|&()".contains(*c));
        let word = &run[..run.len() - ending.map_or(0, char::len_utf8)];
        // True if a backslash continues the line.
        let goes_on = ending == Some('\n') && is_escaped(text, start + word.len());
        if !(word.is_empty() || goes_on && word == "\\") {
            let bare = word.trim_matches(['"', '\'', '`', '\\', '{', '}', '$']);
            found.push(Word { start, end: start + word.len(), text: bare, first });
            first = false;
        }
        first |= ending.is_some_and(|c| c == '\n' || ";|&()".contains(c)) && !goes_on;
    }
    found
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-.".contains(c)
}

/// Parts of a name: `DB_PASS`, `db-pass` and `dbPass` are `db`, `pass`.
fn parts(name: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut before = ' ';
    for c in name.chars() {
        if !c.is_ascii_alphanumeric() || before.is_ascii_lowercase() && c.is_ascii_uppercase() {
            parts.push(String::new());
        }
        if let Some(part) = parts.last_mut().filter(|_| c.is_ascii_alphanumeric()) {
            part.push(c.to_ascii_lowercase());
        }
        before = c;
    }
    for part in &mut parts {
        part.truncate(part.trim_end_matches(|c: char| c.is_ascii_digit()).len());
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// True if the value of this name is secret.
fn is_secret(name: &str) -> bool {
    let parts = parts(name);
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return false };
    if HARMLESS_STARTS.contains(&first.as_str()) || parts.len() > 1 && HARMLESS_ENDS.contains(&last.as_str()) {
        return false;
    }
    let whole = parts.concat();
    if HARMLESS.contains(&whole.as_str()) {
        return false;
    }
    SECRET.iter().any(|known| whole.contains(known))
        || parts.iter().any(|part| {
            SECRET_PARTS.contains(&part.as_str())
                || SECRET_ENDS.iter().any(|end| part.ends_with(end))
                    && (part == "pwd" || !HARMLESS.contains(&part.as_str()))
        })
}

/// True if `name` is a header whose value is the rest of the line: `Authorization: Bearer value`, `Cookie: a=b; c=d`.
fn is_header(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["authorization", "cookie"].iter().any(|header| name.ends_with(header))
}

/// Range of the credentials before a host; `authority` is where they would begin.
pub(crate) fn login(text: &str, authority: usize) -> Option<Range<usize>> {
    let rest = &text[authority..];
    let word = &rest[..rest.find(|c: char| c.is_whitespace() || "\"'<>".contains(c)).unwrap_or(rest.len())];
    let host = &word[..word.find(['/', '?', '#']).unwrap_or(word.len())];
    // A password may contain an unescaped '/': the text after the colon is then no port.
    let odd = || {
        let (_, port) = host.split_once(':')?;
        port.contains(|c: char| !c.is_ascii_digit()).then(|| word.rfind('@')).flatten()
    };
    let end = host.rfind('@').or_else(odd)?;
    Some(authority..authority + end)
}

/// Private keys, each up to its end or the end of the text.
fn private_keys(text: &str) -> impl Iterator<Item = Range<usize>> {
    text.match_indices(KEY_BEGINS.0).filter_map(|(at, _)| {
        let key = &text[at..];
        let kind = key[KEY_BEGINS.0.len()..].split("-----").next()?;
        let end = key
            .find(KEY_ENDS)
            .and_then(|end| Some(end + KEY_ENDS.len() + key[end + KEY_ENDS.len()..].find("-----")? + 5));
        kind.contains(KEY_BEGINS.1).then(|| at..at + end.unwrap_or(key.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Command lines in which the word that contains `hidden` is secret.
    const STYLES: [&str; 136] = [
        // Variables.
        "PASSWORD=hidden run --x",
        "DB_PASS=hidden run",
        "dbPass=hidden run",
        "DBPASSWORD2=hidden run",
        "MYSQL_PWD=hidden mysql",
        "PGPASSWORD=hidden psql -h db",
        "RESTIC_PASSWORD='hidden a hidden' restic",
        "PASSWORD=\"hidden 'b hidden\" run",
        "PASSWORD=a\" hidden\" run",
        r"PASSWORD=hidden\ hidden run",
        "export AWS_SECRET_ACCESS_KEY=hidden",
        "export AWS_SESSION_TOKEN=hidden",
        "AWS_ACCESS_KEY_ID=hidden aws s3 ls",
        "docker run -e \"DB_PASSWORD=hidden hidden\" image",
        "env 'SSH_PASSPHRASE=hidden hidden' run",
        "sh -c 'DB_PASS=hidden run'",
        r#"sh -c "PASSWORD=\"hidden hidden\" run""#,
        r"sh -c 'PASSWORD='\''hidden hidden'\'' run'",
        "a=1\nS3_SECRET_KEY=hidden\nb",
        "setenv MYSQL_PWD hidden",
        "aws configure set aws_secret_access_key hidden",
        "kubectl create secret generic x --from-literal=password=hidden",
        "VAULT_TOKEN=hidden vault read x",
        "rootpw=hidden",
        "ENCRYPTION_KEY=hidden run",
        "export API_KEY=$(echo hidden); run",
        "PASSWORD=\"$(echo \"a hidden\" hidden)\" run",
        "tool --token $(printf %s $(echo hidden) hidden) x",
        "PASSWORDS=(hidden hidden)",
        "sed -i 's/^PASSWORD=.*/PASSWORD=hidden/' /etc/app.conf",
        "HTTP_AUTH=hidden run",
        // Options.
        "tool --pass hidden x",
        "tool --pass=hidden x",
        "tool --password hidden x",
        "tool -password hidden",
        "tool --db-password 'hidden hidden' --user me",
        "tool '--password=hidden hidden' x",
        "tool \"--api-key=hidden hidden\"",
        "tool '--token' 'hidden hidden'",
        "tool --token\thidden",
        r#"PASSWORD="a\"hidden hidden" run"#,
        "tool --passphrase hidden",
        "tool --secret-key hidden",
        "tool --private-key hidden",
        "tool --client-secret hidden",
        "tool --activationkey=hidden",
        "keytool -storepass hidden -keypass hidden",
        "openssl rsa -passin pass:hidden -passout pass:hidden",
        "openssl passwd -6 hidden",
        "mysql -phidden -u root",
        "/usr/bin/mysqldump -u root -phidden db",
        "mysql -u root -p hidden",
        "mysql -pPasswordhidden",
        "mysql -ppasshidden -u root",
        "mysqldump -uroot -pSecrethidden db",
        "mysql -psEcrethidden",
        "sshpass -psEcrethidden ssh host",
        "sshpass -p'pass hidden' ssh host",
        "7z a -pTokenhidden x.7z x",
        "docker login -password hidden registry",
        "tool --token \\\n  hidden",
        "tool --token\\\n  hidden",
        "mysql \\\n  -u root \\\n  -phidden",
        "echo root:hidden | \\\n chpasswd",
        "SUSEConnect -r hidden",
        "SUSEConnect --regcode hidden",
        "registercloudguest --regcode=hidden",
        "transactional-update register -r hidden",
        "tailscale up --authkey hidden",
        "pro attach hidden",
        "sudo sshpass -p hidden ssh -p 2222 host",
        "sshpass -phidden scp x host:",
        "sshpass -p'hidden hidden' ssh host",
        "useradd -m -p hidden me",
        "usermod --password hidden root",
        "curl -u me:hidden https://host",
        "curl --user me:hidden https://host",
        "curl -ume:hidden https://host",
        "curl --proxy-user 'me:hidden hidden' https://host",
        "curl -b 'session=hidden; id=hidden' https://host",
        "curl --cookie session=hidden https://host",
        "http -a me:hidden GET host",
        "docker login -u me -p hidden registry",
        "podman --log-level=info login -p hidden registry",
        "skopeo copy --src-creds me:hidden docker://a docker://b",
        "redis-cli -a hidden ping",
        "ldapsearch -D cn=admin -w hidden",
        "smbclient -U me%hidden //host/share",
        "zip -P hidden x.zip x",
        "7z a -phidden x.7z x",
        "ssh-keygen -t ed25519 -N hidden -f key",
        "ipmitool -H bmc -U root -P hidden chassis status",
        "snmpwalk -c hidden host",
        "nmcli device wifi connect net password hidden",
        "htpasswd -bc /etc/htpasswd me hidden",
        "mkpasswd -m sha-512 hidden",
        "wget --http-password=hidden https://host",
        "true; mysql -phidden; true",
        // Standard input.
        "echo root:hidden | chpasswd",
        "echo 'root:hidden hidden' | sudo /usr/sbin/chpasswd -e",
        "printf '%s\\n' hidden | passwd --stdin root",
        "(echo hidden; echo hidden) | passwd root",
        "echo hidden | sudo -S id",
        "echo hidden | docker login --password-stdin",
        "echo -n hidden | cryptsetup luksFormat /dev/x -",
        "passwd --stdin root <<< hidden",
        "chpasswd <<EOF\nroot:hidden\nEOF",
        // Headers and URLs.
        "curl -H 'Authorization: Bearer hidden' host",
        "curl -H 'Authorization: Basic hidden' host",
        "curl -H Authorization:hidden host",
        "Authorization: token hidden",
        "got Bearer hidden",
        "curl -H X-Auth-Token:hidden",
        "curl -H \"X-Vault-Token: hidden\" -H 'x-api-key: hidden' host",
        "curl -H 'Cookie: a=hidden; b=hidden' host",
        "wget --header='PRIVATE-TOKEN: hidden' https://host",
        "curl https://me:hidden@host/x?y=z",
        "git clone https://hidden@host/x.git",
        "curl https://me:hidden@hidden@host/x",
        "curl https://me:hidden/hidden@host/x",
        "psql postgresql://me:hidden@db:5432/x",
        "curl https://host/?token=hidden",
        "curl 'https://s3/b/k?X-Amz-Credential=hidden%2F1&X-Amz-Signature=hidden'",
        "curl 'https://s3/b/k?X-Amz-Algorithm=AWS4&X-Amz-Security-Token=hidden'",
        "curl https://s3/b/k?AWSAccessKeyId=hidden&Expires=1&Signature=hidden",
        "curl 'https://x.blob.core.windows.net/c/b?sv=2020&sig=hidden%3D'",
        // Files.
        r#"curl -d '{"user": "me", "password": "hidden hidden", "x": 1}' host"#,
        r#"curl -d "{\"password\": \"hidden hidden\"}" host"#,
        r#"curl -d '{"password":"a\" hidden","x":1}' host"#,
        "password: hidden hidden",
        "config['password'] = 'hidden hidden'",
        "password => 'hidden hidden',",
        "\"password\" = hidden",
        "<server><password>hidden</password></server>",
        "mysql -e \"ALTER USER me IDENTIFIED BY 'hidden hidden'\"",
        "echo '-----BEGIN OPENSSH PRIVATE KEY-----\nhidden\nhidden\n-----END OPENSSH PRIVATE KEY-----' > key",
    ];

    #[test]
    fn registered_secrets_are_masked_in_each_encoding() {
        for secret in ["known-\"secret\"", "known-\"secret\"-and-more", "short"] {
            keep(secret);
        }
        let base64 = "a25vd24tInNlY3JldCI";
        let text = format!(r#"known-"secret", {{"known-\"secret\"-and-more": "{base64}="}}, short"#);
        assert_eq!(without_known(&text), r#"***, {"***": "***="}, short"#);
        assert!(matches!(without_known("nothing of it"), Cow::Borrowed(_)));
    }

    #[test]
    fn every_style_of_secret_is_masked() {
        let lines = STYLES.iter().flat_map(|line| [(*line).to_owned(), shell_words::join(["sh", "-c", line])]);
        let shown: Vec<_> = lines.map(|line| (without_secrets(&line), line)).collect();
        let left: Vec<_> = shown.iter().filter(|(s, _)| s.contains("hidden") || !s.contains(MASK)).collect();
        assert!(left.is_empty(), "{left:#?}");
        let tokens = ["ghp_", "github_pat_", "glpat-", "AKIA", "hvs.", "npm_", "eyJ"];
        for token in tokens.map(|begin| format!("{begin}0123456789abcdefghijABCDEFGHIJ")) {
            assert_eq!(without_secrets(&format!("npm publish {token} x")), "npm publish *** x");
        }
    }

    #[test]
    fn text_around_a_secret_is_shown() {
        for (line, shown) in [
            ("PASSWORD=abc run --x", "PASSWORD=*** run --x"),
            ("PASSWORD='a b c' run", "PASSWORD=*** run"),
            ("sh -c 'run -e \"PASSWORD=a b\" image'", "sh -c 'run -e \"PASSWORD=***\" image'"),
            ("tool --token 'a b' --user me", "tool --token *** --user me"),
            ("sudo sshpass -p abc ssh -p 2222 host", "sudo sshpass -p *** ssh -p 2222 host"),
            ("mysql -pPassword1 -u root -P 3306", "mysql -p*** -u root -P 3306"),
            ("export API_KEY=$(echo abc); run", "export API_KEY=*** run"),
            ("tool --token \\\n  abc x", "tool --token \\\n  *** x"),
            ("mysql -pabc -u root -P 3306", "mysql -p*** -u root -P 3306"),
            ("curl -H 'Authorization: Bearer abc' host", "curl -H 'Authorization: ***' host"),
            ("curl https://me:abc@host/x?y=z", "curl https://***@host/x?y=z"),
            (
                "curl 'https://h/?X-Amz-Expires=60&X-Amz-Signature=abc' x",
                "curl 'https://h/?X-Amz-Expires=60&X-Amz-Signature=***' x",
            ),
            (r#"{"password":"a\" b","x":1}"#, r#"{"password":***,"x":1}"#),
            (r#"curl -d '{"password": "a b", "x": 1}' host"#, r#"curl -d '{"password": ***, "x": 1}' host"#),
            ("echo root:abc | chpasswd; touch x", "echo *** | chpasswd; touch x"),
            ("a=1\nS3_SECRET_KEY=abc\nb", "a=1\nS3_SECRET_KEY=***\nb"),
            ("<password>abc</password>", "<password>***</password>"),
        ] {
            assert_eq!(without_secrets(line), shown);
        }
    }

    #[test]
    fn what_only_looks_like_a_secret_is_shown() {
        for line in [
            "touch /tmp/complete; cat /etc/passwd",
            "passwd -l user",
            "passwd -d root && chage -d 0 root",
            "gpasswd -a me wheel",
            "tool --password-file /etc/secret --verbose",
            "PASSWORD_FILE=/run/secret run",
            "PATH=/usr/bin:/bin PWD=/root OLDPWD=/ run",
            "compass=north bypass=1 run",
            "ansible-playbook --ask-pass --ask-become-pass site.yml",
            "docker login --password-stdin registry.example",
            "ssh -p 2222 -o PasswordAuthentication=no -o NumberOfPasswordPrompts=0 host",
            "podman run -p 8080:80 image",
            "mkdir -p /a && cp -u a b && sort -u x && tar -xpf x",
            "git clone https://host/org/repo@v1 && curl https://host:8080/@scope/x",
            "git clone ssh.example:me/repo && scp x me@host:/tmp",
            "apt-get install -y passwd libsecret-1-0 python3-keyring",
            "pip install tokenizers secretstorage",
            "MAX_TOKENS=10 run",
            "grep -r password /etc/pam.d",
            "sed -i s/PermitEmptyPasswords/x/ /etc/ssh/sshd_config",
            "ssh-keygen -t ed25519 -f key",
            "rpm -qi bash: Signature   : RSA/SHA256, Key ID 6af9",
            "bash: syntax error near unexpected token `)'",
            "curl --cookie-jar jar -o out https://host/x?list=all&page=2",
            "npm_config_cache=/root/.npm npm ci",
            "cat: /etc/passwd: No such file",
            "PASS: test_one",
            "don't print what isn't there",
        ] {
            assert_eq!(without_secrets(line), line);
        }
    }

    #[test]
    fn a_private_key_that_a_program_prints_is_masked_line_by_line() {
        let mut lines = Lines::default();
        let key = "+ cat key\n-----BEGIN EC PRIVATE KEY-----\nhidden\nhidden\n-----END EC PRIVATE KEY-----\n+ true";
        let shown: Vec<_> = key.lines().map(|line| lines.without_secrets(line)).collect();
        assert_eq!(shown, ["+ cat key", "***", "***", "***", "***", "+ true"]);
    }

    proptest! {
        #[test]
        fn a_secret_is_masked_whatever_stands_around_it(
            style in proptest::sample::select(&["PASSWORD=hidden", "--token hidden", "https://a:hidden@b", "Bearer hidden"][..]),
            before in "[ -~\n]{0,20}",
            after in "[ -~\n]{0,20}",
        ) {
            let shown = without_secrets(&format!("{before} {style} {after}"));
            prop_assert!(!shown.contains("hidden"), "{}", shown);
        }

        #[test]
        fn any_text_is_taken(text in "([a-z]|[ =:'\"\\\\<>@/|\n-]|PASSWORD|://|é|--pass|echo|chpasswd|<<|-----BEGIN ){0,20}", any: String) {
            without_secrets(&text);
            without_secrets(&any);
        }
    }
}
