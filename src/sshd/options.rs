//! `$SSHD_OPTIONS`: all of sshd's options. They are parsed to find sshd's files and to refuse what cannot work; nothing
//! is added.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// Parsed options of sshd.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// The words as sshd gets them.
    pub(crate) words: Vec<String>,
    /// The words without `-E`, so that `sshd -T` complains on standard error.
    pub(crate) asking: Vec<String>,
    /// `-f`: configuration file.
    pub(crate) config: Option<PathBuf>,
    /// `-E`: log file.
    pub(crate) log: Option<PathBuf>,
}

/// Default of `-f`.
pub(crate) const DEFAULT_CONFIG: &str = "/etc/ssh/sshd_config";

/// Letters of sshd's options with an argument (sshd(8)).
const WITH_ARGUMENT: &str = "bCcEfghkopu";
/// Letters of sshd's options without an argument.
const WITHOUT: &str = "46eq";

impl Options {
    /// Splits `text` into words like a shell, and refuses options that cannot work here, with the reason.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |why: String| Error::bad_input(format!("SSHD_OPTIONS is '{text}': {why}"));
        let words = shell_words::split(text).map_err(|e| refuse(format!("it cannot be split into words ({e})")))?;
        let mut options = Self { words: words.clone(), ..Self::default() };
        let mut rest = words.into_iter();
        while let Some(word) = rest.next() {
            let Some(letters) = word.strip_prefix('-').filter(|l| !l.is_empty() && !l.starts_with('-')) else {
                return Err(refuse(format!("'{word}' is not an option of sshd")));
            };
            let mut letters = letters.chars();
            while let Some(letter) = letters.next() {
                if WITH_ARGUMENT.contains(letter) {
                    let attached: String = letters.by_ref().collect();
                    let argument = if attached.is_empty() { rest.next() } else { Some(attached) };
                    let argument = argument.ok_or_else(|| refuse(format!("-{letter} lacks its argument")))?;
                    options.add(letter, &argument).map_err(&refuse)?;
                } else if WITHOUT.contains(letter) {
                    options.asking.push(format!("-{letter}"));
                } else {
                    return Err(refuse(reason_against(letter)));
                }
            }
        }
        Ok(options)
    }

    fn add(&mut self, letter: char, argument: &str) -> std::result::Result<(), String> {
        if matches!(letter, 'f' | 'E') && !argument.starts_with('/') {
            return Err(format!(
                "-{letter} {argument} is a relative path; sshd restarts itself from / for each connection and would refuse \
                 each one silently, so give the absolute path"
            ));
        }
        match letter {
            'f' => self.config = Some(argument.into()),
            'E' => {
                self.log = Some(argument.into());
                return Ok(());
            }
            _ => {}
        }
        self.asking.extend([format!("-{letter}"), argument.to_owned()]);
        Ok(())
    }

    /// Configuration lines given with `-o`.
    pub(crate) fn settings(&self) -> impl Iterator<Item = &str> {
        self.asking.windows(2).filter(|pair| pair[0] == "-o").map(|pair| pair[1].as_str())
    }

    /// The configuration file that sshd reads. `settings_file` is `$SSHD_CONFIG_FILE`, the file to write settings to;
    /// the two must be the same.
    pub(crate) fn config_file(&self, settings_file: Option<&PathBuf>) -> Result<PathBuf> {
        let read = self.config.clone().unwrap_or_else(|| DEFAULT_CONFIG.into());
        match settings_file {
            Some(written) if *written != read => Err(Error::bad_input(format!(
                "SSHD_CONFIG_FILE is '{}' but sshd reads '{}' ({}): settings would be written where sshd does not look, so \
                 name the same file in both",
                written.display(),
                read.display(),
                if self.config.is_some() { "-f in SSHD_OPTIONS" } else { "no -f in SSHD_OPTIONS" },
            ))),
            _ => Ok(read),
        }
    }
}

fn reason_against(letter: char) -> String {
    match letter {
        'D' => "-D keeps sshd in the foreground, but it must run in the background; leave it out".into(),
        'd' => "-d serves one connection in the foreground and ends; use -o LogLevel=DEBUG".into(),
        'i' => "-i serves one connection on standard input, but sshd must listen; leave it out".into(),
        't' | 'T' | 'G' | 'V' | 'Q' => format!("-{letter} makes sshd print something and end; leave it out"),
        other => format!("-{other} is not an option for starting sshd"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn options_are_split_like_shell_words() {
        let options = Options::parse("-E /etc/cray/ims/sshd.log -f '/a b/sshd_config' -qo 'Port 2222' -p22").unwrap();
        assert_eq!(options.config, Some("/a b/sshd_config".into()));
        assert_eq!(options.log, Some("/etc/cray/ims/sshd.log".into()));
        assert_eq!(options.words.len(), 7);
        assert_eq!(options.asking, ["-f", "/a b/sshd_config", "-q", "-o", "Port 2222", "-p", "22"]);
        assert_eq!(Options::parse("").unwrap(), Options::default());
        assert_eq!(Options::parse("-f/x").unwrap().config, Some("/x".into()));
    }

    #[test]
    fn options_that_cannot_work_are_refused_with_the_reason() {
        for (text, reason) in [
            ("-D", "background"),
            ("-4De", "background"),
            ("-i", "standard input"),
            ("-d", "LogLevel"),
            ("-T", "print"),
            ("-f sshd_config", "relative"),
            ("-E log", "relative"),
            ("-f", "lacks"),
            ("-z", "not an option"),
            ("extra", "not an option"),
            ("--help", "not an option"),
            ("'open", "split"),
        ] {
            let message = Options::parse(text).unwrap_err().to_string();
            assert!(message.contains(reason) && message.contains("SSHD_OPTIONS"), "{text}: {message}");
        }
    }

    #[test]
    fn settings_file_must_be_the_one_that_sshd_reads() {
        let with = Options::parse("-f /a").unwrap();
        assert_eq!(with.config_file(None).unwrap(), PathBuf::from("/a"));
        assert_eq!(with.config_file(Some(&"/a".into())).unwrap(), PathBuf::from("/a"));
        assert!(with.config_file(Some(&"/b".into())).unwrap_err().to_string().contains("SSHD_CONFIG_FILE"));
        let without = Options::default();
        assert_eq!(without.config_file(None).unwrap(), PathBuf::from(DEFAULT_CONFIG));
        assert!(without.config_file(Some(&"/b".into())).is_err());
    }

    /// One or more letters after a dash; the last may have an argument, in the same word or the next.
    #[derive(Debug, Clone)]
    struct Group {
        flags: String,
        with: Option<(char, String, bool)>,
    }

    impl Group {
        fn words(&self) -> Vec<String> {
            match &self.with {
                None => vec![format!("-{}", self.flags)],
                Some((letter, argument, true)) => vec![format!("-{}{letter}{argument}", self.flags)],
                Some((letter, argument, false)) => vec![format!("-{}{letter}", self.flags), argument.clone()],
            }
        }

        fn last_of(groups: &[Self], wanted: char) -> Option<PathBuf> {
            let mut arguments = groups.iter().filter_map(|g| g.with.as_ref()).filter(|(letter, ..)| *letter == wanted);
            arguments.next_back().map(|(_, argument, _)| argument.into())
        }
    }

    fn group() -> impl Strategy<Value = Group> {
        let path = "/[ -~]{0,12}";
        let argument = prop_oneof![
            (prop::sample::select(vec!['f', 'E']), path.boxed()),
            (prop::sample::select(vec!['b', 'C', 'c', 'g', 'h', 'k', 'o', 'p', 'u']), "[ -~\t\n\u{e9}]{1,12}".boxed()),
        ];
        let with = (argument, any::<bool>()).prop_map(|((letter, argument), attached)| (letter, argument, attached));
        prop_oneof![
            "[46eq]{1,3}".prop_map(|flags| Group { flags, with: None }),
            ("[46eq]{0,3}", with).prop_map(|(flags, with)| Group { flags, with: Some(with) }),
        ]
    }

    /// Quotes a word in one of several ways.
    fn quoted(word: &str, way: u8) -> String {
        match way {
            0 => shell_words::quote(word).into_owned(),
            1 => format!("'{}'", word.replace('\'', "'\\''")),
            _ => {
                let mut text = String::from("\"");
                for c in word.chars() {
                    if "\"\\$`".contains(c) {
                        text.push('\\');
                    }
                    text.push(c);
                }
                text + "\""
            }
        }
    }

    fn line(words: &[String], ways: &[(u8, String)]) -> String {
        words.iter().zip(ways.iter().cycle()).map(|(word, (way, space))| quoted(word, *way) + space).collect()
    }

    fn ways() -> impl Strategy<Value = Vec<(u8, String)>> {
        prop::collection::vec((0..3_u8, "[ \t\n]{1,2}"), 1..6)
    }

    proptest! {
        #[test]
        fn options_are_parsed_whatever_their_quoting(groups in prop::collection::vec(group(), 0..6), ways in ways()) {
            let words: Vec<String> = groups.iter().flat_map(Group::words).collect();
            let options = Options::parse(&line(&words, &ways)).unwrap();
            prop_assert_eq!(options.config, Group::last_of(&groups, 'f'));
            prop_assert_eq!(options.log, Group::last_of(&groups, 'E'));
            let mut asking = Vec::new();
            for Group { flags, with } in &groups {
                asking.extend(flags.chars().map(|letter| format!("-{letter}")));
                if let Some((letter, argument, _)) = with.as_ref().filter(|(letter, ..)| *letter != 'E') {
                    asking.extend([format!("-{letter}"), argument.clone()]);
                }
            }
            prop_assert_eq!(options.asking, asking);
            prop_assert_eq!(options.words, words);
        }

        #[test]
        fn options_that_cannot_work_are_refused_at_any_position(
            groups in prop::collection::vec(group(), 0..5),
            at in any::<prop::sample::Index>(),
            bad in "-[46eq]{0,2}[DditTGVQRrz\u{e9}][46eq]{0,2}|-[46eq]{0,2}[fE]([a-z.]/?.{0,4})|[a-z/]{0,5}|--?|--[a-z]{1,5}",
            ways in ways(),
        ) {
            let before = at.index(groups.len() + 1);
            let mut words: Vec<String> = groups[..before].iter().flat_map(Group::words).collect();
            words.push(bad);
            words.extend(groups[before..].iter().flat_map(Group::words));
            prop_assert!(Options::parse(&line(&words, &ways)).is_err());
        }

        #[test]
        fn arbitrary_text_does_not_panic(text in "[-fEDiop /a'\"\\\\\\$# \t\n]{0,30}|\\PC{0,20}") {
            if let Ok(options) = Options::parse(&text) {
                prop_assert!(options.config.is_none_or(|path| path.is_absolute()));
                prop_assert!(options.log.is_none_or(|path| path.is_absolute()));
                prop_assert_eq!(shell_words::split(&text).unwrap(), options.words);
            }
        }
    }
}
