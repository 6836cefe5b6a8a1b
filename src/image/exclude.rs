//! Patterns of paths that a packed image leaves out (`--exclude`). They are matched here, and mksquashfs gets the paths
//! one by one, because its own patterns differ: `*` skips names that begin with a dot, `... a/b` matches everything
//! beside `b`, and a pattern without a match passes silently.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use glob::Pattern as Name;

use crate::sys::tree::Tree;
use crate::sys::walk::refuse_long;

/// Prefix of a pattern that matches at any depth.
const ANYWHERE: &str = "... ";

/// A pattern of paths below the image root (`--exclude`).
#[derive(Debug, Clone)]
pub struct Pattern {
    text: String,
    /// One pattern for each component of the path.
    names: Vec<Name>,
    is_anywhere: bool,
}

impl Pattern {
    /// Parses a pattern. The error says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (is_anywhere, path) = match text.strip_prefix(ANYWHERE) {
            Some(path) => (true, path),
            None => (false, text),
        };
        let names: Vec<_> = path.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
        match names.as_slice() {
            [] => return Err("expected a pattern of paths below the image root, such as 'boot/*'".into()),
            ["*"] => return Err("it matches everything in the image: expected a pattern such as 'boot/*'".into()),
            _ => {}
        }
        if names.contains(&"..") {
            return Err("expected a pattern without '..'".into());
        }
        if let Some(at) = names.iter().rposition(|name| name.contains("**")) {
            let rest = names.get(at + 1..).filter(|rest| !rest.is_empty()).unwrap_or(&["NAME"]).join("/");
            return Err(format!("expected '*' within a name, or '{ANYWHERE}{rest}' for any depth"));
        }
        let parsed =
            names.iter().map(|name| Name::new(name).map_err(|e| format!("expected a pattern: {} in '{name}'", e.msg)));
        let names = parsed.collect::<Result<_, _>>()?;
        Ok(Self { text: text.to_owned(), names, is_anywhere })
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Paths of an image root that match patterns, and what is wrong with the patterns.
#[derive(Debug, Default)]
pub(crate) struct Excluded {
    /// Matching paths, of which none lies below another.
    pub(crate) paths: Vec<PathBuf>,
    /// Patterns that match nothing.
    pub(crate) useless: Vec<String>,
    /// True if nothing of the image root would be left.
    pub(crate) is_all: bool,
}

/// A directory that is still to be searched.
struct Ahead {
    /// Patterns of which a beginning matches the path: the index of each pattern, and the number of its names that
    /// match.
    begun: Vec<(usize, usize)>,
    is_excluded: bool,
}

/// Finds the entries of `image_root` that the patterns match. Follows no link, and descends only into directories where
/// something can still match.
pub(crate) fn find(image_root: &Tree, patterns: &[Pattern]) -> io::Result<Excluded> {
    let mut excluded = Excluded::default();
    let mut has_matched = vec![false; patterns.len()];
    let anywhere: Vec<_> = (0..patterns.len()).filter(|number| patterns[*number].is_anywhere).map(|n| (n, 0)).collect();
    let mut is_any_kept = false;
    let first = Ahead { begun: (0..patterns.len()).map(|number| (number, 0)).collect(), is_excluded: false };
    image_root.walk_with(&first, |above: &Ahead, path, _, name, _| {
        let text = name.to_string_lossy();
        let (mut further, mut is_matched) = (anywhere.clone(), false);
        for &(number, depth) in &above.begun {
            let names = &patterns[number].names;
            if !names[depth].matches(&text) {
                continue;
            }
            if depth + 1 == names.len() {
                (has_matched[number], is_matched) = (true, true);
            } else {
                further.push((number, depth + 1));
            }
        }
        if is_matched && !above.is_excluded {
            refuse_long(path)?;
            excluded.paths.push(path.to_owned());
        }
        is_any_kept |= !is_matched && path == Path::new(name);
        let is_excluded = is_matched || above.is_excluded;
        // Below an excluded path, continue only with patterns that have matched nothing so far: a match there shows
        // that such a pattern is not useless.
        further.retain(|(number, _)| !is_excluded || !has_matched[*number]);
        Ok((!further.is_empty()).then_some(Ahead { begun: further, is_excluded }))
    })?;
    excluded.is_all = !is_any_kept && !excluded.paths.is_empty();
    let useless = patterns.iter().zip(has_matched).filter(|(_, has_matched)| !has_matched);
    excluded.useless = useless.map(|(pattern, _)| pattern.text.clone()).collect();
    Ok(excluded)
}

/// Escapes a path so that mksquashfs's patterns (`-wildcards`, fnmatch(3)) match it and nothing else.
pub(crate) fn escaped(path: &Path) -> Vec<u8> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-".contains(byte) || !byte.is_ascii();
    let bytes = path.as_os_str().as_bytes();
    bytes.iter().flat_map(|byte| (!is_plain(byte)).then_some(b'\\').into_iter().chain([*byte])).collect()
}

/// Maximum length of a line in mksquashfs's exclude file in bytes, with a margin.
const LONGEST_LINE: usize = 16_000;

/// Exclude file for mksquashfs (`-ef`) with the escaped paths, and arguments for paths that such a file cannot hold.
pub(crate) fn listed<'a>(paths: impl IntoIterator<Item = &'a Path>) -> (Vec<u8>, Vec<std::ffi::OsString>) {
    let (mut list, mut arguments) = (Vec::new(), Vec::new());
    for path in paths {
        let path = escaped(path);
        if path.contains(&b'\n') || path.len() > LONGEST_LINE {
            arguments.push(OsStr::from_bytes(&path).to_owned());
        } else {
            // mksquashfs strips this backslash; without it, a space or # at the start of a line would not be part of
            // the path.
            list.push(b'\\');
            list.extend(path);
            list.push(b'\n');
        }
    }
    (list, arguments)
}
