//! The pages of the repository: every link leads to a file and a heading that are there, and every source that a page
//! names is there too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const TOP: &str = env!("CARGO_MANIFEST_DIR");

/// Pages as (path, text), those of `docs` and those beside the Makefile.
fn pages() -> Vec<(PathBuf, String)> {
    let top = Path::new(TOP);
    let files = [top.to_owned(), top.join("docs")].into_iter().flat_map(|dir| std::fs::read_dir(dir).unwrap());
    let pages = files.map(|file| file.unwrap().path()).filter(|file| file.extension() == Some("md".as_ref()));
    let pages: Vec<_> = pages.map(|page| (page.clone(), std::fs::read_to_string(page).unwrap())).collect();
    assert!(pages.len() > 10, "{pages:?}");
    pages
}

/// The text without its blocks of code, which have no links and no headings.
fn prose(text: &str) -> String {
    let mut is_code = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        is_code ^= fence;
        !fence && !is_code
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Anchors of a page, as GitHub makes them of its headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for heading in prose(text).lines().filter(|line| line.starts_with('#')) {
        let words = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = words.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let further = (1..).map(|n| format!("{anchor}-{n}"));
        let free = std::iter::once(anchor.clone()).chain(further).find(|name| !anchors.contains(name));
        anchors.extend(free);
    }
    anchors
}

/// Targets of the links in it.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    // Text between backticks is no link.
    let outside: String = prose.split('`').step_by(2).collect::<Vec<_>>().join("");
    outside.split("](").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned()).collect()
}

#[test]
fn every_link_of_a_page_leads_to_a_file_and_a_heading_that_are_there() {
    let mut followed = 0;
    for (page, text) in pages() {
        for link in links(&text) {
            let shown = format!("{}: ({link})", page.display());
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{shown}: there is no such file");
            if !anchor.is_empty() {
                let known = anchors(&std::fs::read_to_string(&target).unwrap());
                assert!(known.contains(anchor), "{shown}: expected one of {known:?}");
            }
            followed += 1;
        }
    }
    assert!(followed > 80, "{followed}");
}

#[test]
fn every_page_is_linked_from_another_one() {
    let pages = pages();
    let linked: BTreeSet<_> = pages
        .iter()
        .flat_map(|(page, text)| {
            let beside = |link: String| {
                let file = page.parent().unwrap().join(link.split('#').next().unwrap());
                file.canonicalize().ok().filter(|file| file != page)
            };
            links(text).into_iter().filter_map(beside).collect::<Vec<_>>()
        })
        .collect();
    for (page, _) in &pages {
        let is_start = page.ends_with("README.md");
        assert!(is_start || linked.contains(&page.canonicalize().unwrap()), "no page links to {}", page.display());
    }
}

/// Pages that tests and benchmarks write.
const WRITTEN: [&str; 4] = ["BENCHMARKS.md", "CAPABILITIES.md", "CLIENTS.md", "CONTAINERS.md"];

#[test]
fn lines_of_prose_end_at_120_columns() {
    for (page, text) in pages() {
        if WRITTEN.iter().any(|name| page.ends_with(name)) {
            continue;
        }
        // Rows of a table cannot be broken.
        for line in prose(&text).lines().filter(|line| !line.starts_with('|')) {
            assert!(line.chars().count() <= 120, "{}: {line}", page.display());
        }
    }
}

/// Names between backticks that are paths of this repository.
fn named(text: &str) -> Vec<&str> {
    let tops = ["src/", "tests/", "deploy/", "docs/", "benches/", "sshd_config.d/", ".ci/"];
    let is_path = |code: &&str| {
        tops.iter().any(|top| code.starts_with(top)) && !code.contains([' ', '*', '…', '(', '\n', '{', '<'])
    };
    text.split('`').skip(1).step_by(2).filter(is_path).collect()
}

#[test]
fn every_file_that_a_page_names_is_there() {
    let mut found = 0;
    for (page, text) in pages() {
        // A page on the past may name files that are gone.
        if page.ends_with("CHANGELOG.md") {
            continue;
        }
        for file in named(&prose(&text)) {
            assert!(Path::new(TOP).join(file).exists(), "{} names {file}, which is not there", page.display());
            found += 1;
        }
    }
    assert!(found > 60, "{found}");
}

/// The files below `src`, from the root of the repository.
fn sources() -> BTreeSet<String> {
    let output = Command::new("find").args(["src", "-type", "f"]).current_dir(TOP).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn the_tree_of_the_architecture_is_the_tree() {
    let text = include_str!("../../docs/ARCHITECTURE.md").split_once("\n## The tree\n").unwrap().1;
    let tree = text.split("```text\n").nth(1).unwrap().split("\n```").next().unwrap();
    let (mut floor, mut shown) = (String::new(), BTreeSet::new());
    for line in tree.lines() {
        let mut words = line.split_ascii_whitespace().peekable();
        if !line.starts_with(' ') {
            floor = words.next().unwrap_or_default().to_owned();
        }
        if floor.starts_with("src/") {
            let files = words.take_while(|word| Path::new(word).extension().is_some());
            shown.extend(files.map(|file| format!("{floor}{file}")));
        }
    }
    let there = sources();
    let differ: Vec<_> = shown.symmetric_difference(&there).collect();
    assert!(differ.is_empty(), "docs/ARCHITECTURE.md, The tree, differs from src: {differ:?}");
}
