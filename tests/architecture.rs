//! The order of the source: which directory may import from which, where `unsafe` may stand, and what a session's
//! program links.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Layers of the library, top to bottom. A file imports from layers below its own, and from its own directory.
const LAYERS: &[&str] = &[
    "cli",
    "manual",
    "pod",
    "local",
    "remote",
    "recipe",
    "publish",
    "environment",
    "jailer",
    "image",
    "store",
    "ims",
    "volume",
    "squashfs",
    "transfer",
    "sshd",
    "session",
    "jail",
    "job",
    "log",
    "sys",
    "panic",
    "error",
    "printable",
    "verdict",
];

/// Layers that `ims-jail-shell` is made of: each of its sessions is a start of this program.
const JAIL_SHELL: &[&str] = &["session", "jail", "sys", "error", "printable", "verdict"];

/// Crates that would lengthen its start, or give it threads.
const TOO_HEAVY: &[&str] = &["tokio", "notify", "clap", "reqwest", "object_store", "tracing_subscriber"];

/// Layers of the service, which is a package of its own.
const SERVICE_LAYERS: &[&str] = &[
    "client",
    "serve",
    "connections",
    "listen",
    "data",
    "http",
    "runner",
    "database",
    "store",
    "records",
    "settings",
    "signals",
];

/// Crates of the service that the pod's programs must not link.
const SERVICE_ONLY: &[&str] = &["axum", "sqlx", "kube"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn service() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("service/src")
}

/// A file of the library: the path of its module, and its text without comments and unit tests.
type Files = BTreeMap<Vec<String>, String>;

fn files(root: &Path) -> Files {
    fn gather(directory: &Path, module: &[String], files: &mut Files) {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let below = [module, std::slice::from_ref(&name)].concat();
            if path.is_dir() {
                gather(&path, &below, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") && name != "lib" {
                let module = if name == "mod" { module.to_vec() } else { below };
                files.insert(module, code(&fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut files = Files::new();
    gather(root, &[], &mut files);
    files
}

fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let lines: Vec<_> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    lines.join("\n")
}

/// Modules of this crate that `text`, of the file `module`, names.
fn named(text: &str, module: &[String], files: &Files) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    for (start, root) in [("crate::", Vec::new()), ("super::", module[..module.len() - 1].to_vec())] {
        for (at, _) in text.match_indices(start) {
            if text[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == ':') {
                continue;
            }
            for path in paths(&text[at + start.len()..]) {
                let whole = [root.clone(), path].concat();
                // The longest beginning that is a file: what follows is an item of it.
                let length = (1..=whole.len()).rev().find(|length| files.contains_key(&whole[..*length]));
                found.extend(length.map(|length| whole[..length].to_vec()));
            }
        }
    }
    found.remove(module);
    found
}

/// Paths that stand at the beginning of `text`: one, or those of a group in braces.
fn paths(text: &str) -> Vec<Vec<String>> {
    let word: String = text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    if !word.is_empty() {
        let rest = &text[word.len()..];
        let below = rest.strip_prefix("::").map_or_else(Vec::new, paths);
        let below = if below.is_empty() { vec![Vec::new()] } else { below };
        return below.into_iter().map(|path| [vec![word.clone()], path].concat()).collect();
    }
    let Some(group) = text.strip_prefix('{') else { return Vec::new() };
    let mut depth = 0;
    let mut members = vec![String::new()];
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => {
                members.push(String::new());
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        members.last_mut().unwrap().push(c);
    }
    members.iter().flat_map(|member| paths(member.trim())).collect()
}

fn imports(root: &Path) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let files = files(root);
    let programs = ["bin", "main"];
    files
        .iter()
        .filter(|(module, _)| !programs.contains(&&*module[0]))
        .map(|(m, text)| (m.clone(), named(text, m, &files)))
        .collect()
}

fn layer(module: &[String], layers: &[&str]) -> usize {
    let found = layers.iter().position(|layer| *layer == module[0]);
    found.unwrap_or_else(|| panic!("src/{} has no layer: give it one in LAYERS", module[0]))
}

#[test]
fn a_file_imports_from_layers_below_its_own() {
    let mut upwards = Vec::new();
    for (root, layers) in [(root(), LAYERS), (service(), SERVICE_LAYERS)] {
        for (module, imported) in imports(&root) {
            let above = imported.iter().filter(|i| layer(i, layers) < layer(&module, layers));
            upwards.extend(above.map(|i| format!("{} imports {}", module.join("::"), i.join("::"))));
        }
    }
    assert!(upwards.is_empty(), "{upwards:#?}");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let imports: BTreeMap<_, _> = imports(&root());
    let reached = |from: &Vec<String>| {
        let mut reached = imports[from].clone();
        let mut left: Vec<_> = reached.iter().cloned().collect();
        while let Some(next) = left.pop() {
            let further = imports[&next].iter().filter(|module| reached.insert((*module).clone()));
            left.extend(further.cloned());
        }
        reached
    };
    let all: BTreeMap<_, _> = imports.keys().map(|module| (module.clone(), reached(module))).collect();
    let in_circles = imports.iter().filter(|(module, _)| all[*module].contains(*module)).map(|(module, imported)| {
        let back = imported.iter().filter(|i| all[*i].contains(module)).map(|i| i.join("::"));
        format!("{} imports {}", module.join("::"), back.collect::<Vec<_>>().join(", "))
    });
    let in_circles: Vec<_> = in_circles.collect();
    assert!(in_circles.is_empty(), "{in_circles:#?}");
}

#[test]
fn unsafe_code_stands_in_sys_alone() {
    let all = files(&root()).into_iter().chain(files(&service()));
    let elsewhere: Vec<_> = all
        .filter(|(module, text)| {
            module[0] != "sys" && text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe")
        })
        .map(|(module, _)| module.join("::"))
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}

#[test]
fn the_sessions_program_imports_nothing_heavy() {
    let mut heavy = Vec::new();
    for (module, text) in files(&root()) {
        let is_of_it = JAIL_SHELL.contains(&module[0].as_str()) || module == ["bin", "ims-jail-shell"];
        if is_of_it {
            let found = TOO_HEAVY.iter().filter(|name| {
                let path = format!("{name}::");
                text.match_indices(&path).any(|(at, _)| !text[..at].ends_with(char::is_alphanumeric))
            });
            heavy.extend(found.map(|name| format!("{} imports {name}", module.join("::"))));
        }
    }
    assert!(heavy.is_empty(), "{heavy:#?}");
}

#[test]
fn the_pods_programs_do_not_link_the_service() {
    let mut tree = std::process::Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--package", "ims-sshd", "--edges", "normal", "--prefix", "none"]);
    let output = tree.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let crates = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && crates.starts_with("ims-sshd "), "{output:?}");
    let linked =
        |name: &&&str| crates.lines().any(|line| line.split(' ').next().unwrap().split('-').next() == Some(**name));
    let found: Vec<_> = SERVICE_ONLY.iter().filter(linked).collect();
    assert!(found.is_empty(), "{found:?}");
}
