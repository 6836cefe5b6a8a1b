//! What a log does not show: it is read by others than the one who typed.

/// A name that holds one of these has a value that is nobody's business.
const TELLING: [&str; 12] = [
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "apikey",
    "api_key",
    "access_key",
    "private_key",
    "credential",
    "authorization",
    "cookie",
];

/// What of the words that follow belongs to a value that is left out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hidden {
    Nothing,
    /// The next word.
    Next,
    /// All up to this quote.
    To(char),
    /// All.
    Rest,
}

/// `line` without the value of what looks like `PASSWORD=…`, `--token …` or `Authorization: …`, quoted or not, and without the
/// credentials of a URL; in one line and without control characters. Rather too much is left out than too little.
pub fn without_secrets(line: &str) -> String {
    // Its input is NAME:PASSWORD.
    let telling = |name: &str, separator: char| {
        let name = name.to_ascii_lowercase().replace('-', "_");
        TELLING.iter().any(|t| name.contains(t)) || separator == ':' && line.contains("chpasswd")
    };
    let mut hidden = Hidden::Nothing;
    let mut shown: Vec<String> = Vec::new();
    for word in line.split(|c: char| c.is_whitespace() || c.is_control()) {
        let was_hidden = std::mem::replace(&mut hidden, Hidden::Nothing);
        match was_hidden {
            Hidden::To(quote) if !word.contains(quote) => hidden = was_hidden,
            Hidden::Rest => hidden = was_hidden,
            Hidden::To(_) => {}
            Hidden::Next if word.is_empty() => hidden = was_hidden,
            Hidden::Next => {
                shown.push("***".into());
                hidden = open_quote(word).map_or(Hidden::Nothing, Hidden::To);
            }
            Hidden::Nothing => {
                let mut separators = word.match_indices(['=', ':']);
                let found = separators.find(|(at, found)| telling(&word[..*at], if *found == "=" { '=' } else { ':' }));
                if let Some((at, found)) = found {
                    shown.push(format!("{}=***", &word[..at]));
                    hidden = match open_quote(word) {
                        Some(quote) => Hidden::To(quote),
                        None if found == ":" && at + 1 == word.len() => Hidden::Rest,
                        None => Hidden::Nothing,
                    };
                } else {
                    if word.trim_start_matches(['"', '\'']).starts_with('-') && telling(word, ' ') {
                        hidden = open_quote(word).map_or(Hidden::Next, Hidden::To);
                    }
                    shown.push(without_login(word));
                }
            }
        }
    }
    shown.join(" ")
}

/// The quote that is opened in `word` and not closed in it.
fn open_quote(word: &str) -> Option<char> {
    let first = word.find(['"', '\''])?;
    let quote = word[first..].chars().next()?;
    (word.matches(quote).count() % 2 == 1).then_some(quote)
}

/// A URL without the name and password before its host.
fn without_login(word: &str) -> String {
    if let Some((scheme, rest)) = word.split_once("://")
        && let Some((_, host)) = rest.split_once('@')
    {
        return format!("{scheme}://***@{host}");
    }
    word.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_secret_is_shown() {
        for (line, shown) in [
            ("PASSWORD=abc run --x", "PASSWORD=*** run --x"),
            ("PASSWORD='a b c' run", "PASSWORD=*** run"),
            ("PASSWORD=\"a 'b c\" run", "PASSWORD=*** run"),
            ("tool --token abc --user me", "tool --token *** --user me"),
            ("tool --token\tabc", "tool --token ***"),
            ("tool --token 'a b' --user me", "tool --token *** --user me"),
            ("tool --api-key=abc", "tool --api-key=***"),
            ("curl -H X-Auth-Token:abc", "curl -H X-Auth-Token=***"),
            ("curl -H 'Authorization: Bearer abc' host", "curl -H 'Authorization=*** host"),
            ("curl https://me:abc@host/x?y=z", "curl https://***@host/x?y=z"),
            ("curl https://host/?token=abc", "curl https://host/?token=***"),
            ("password: abc def", "password=***"),
            ("echo root:abc | chpasswd", "echo root=*** | chpasswd"),
            ("a=1\nS3_SECRET_KEY=abc\nb", "a=1 S3_SECRET_KEY=*** b"),
            ("echo a\nb\x1b[1m", "echo a b [1m"),
            ("touch /tmp/complete; cat /etc/passwd", "touch /tmp/complete; cat /etc/passwd"),
        ] {
            assert_eq!(without_secrets(line), shown);
        }
    }

    proptest! {
        #[test]
        fn a_value_is_left_out_whatever_stands_around_it(before in "[ -~\n]{0,20}", after in "[ -~\n]{0,20}") {
            let shown = without_secrets(&format!("{before} PASSWORD=hidden {after}"));
            prop_assert!(!shown.contains("hidden"), "{shown}");
            let shown = without_secrets(&format!("{before} --token hidden {after}"));
            prop_assert!(!shown.contains("hidden"), "{shown}");
        }
    }
}
