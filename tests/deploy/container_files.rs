//! The files of container images: what a builder would refuse, and what experience has forbidden (hadolint's rules
//! that hold here).

use std::path::{Path, PathBuf};

const TOP: &str = env!("CARGO_MANIFEST_DIR");

/// Instructions of the container file, with their lines joined.
fn instructions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty());
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let split = |line: &str| {
        let (name, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        (name.to_owned(), rest.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    joined.lines().map(split).collect()
}

/// What is wrong with the container file.
fn complaints(text: &str) -> Vec<String> {
    let known = ["FROM", "ARG", "RUN", "COPY", "ENV", "ENTRYPOINT", "EXPOSE", "LABEL", "USER", "WORKDIR"];
    let (mut found, mut stages, mut arguments) = (Vec::new(), Vec::new(), Vec::new());
    let instructions = instructions(text);
    for (name, rest) in &instructions {
        let mut complain = |why: &str| found.push(format!("{why}: {name} {rest}"));
        if !known.contains(&name.as_str()) {
            complain("an unknown instruction");
        }
        match name.as_str() {
            "ARG" => arguments.push(rest.split('=').next().unwrap().to_owned()),
            "FROM" => {
                let (base, stage) = rest.split_once(" AS ").unwrap_or((rest, ""));
                let variable = base.strip_prefix("${").and_then(|base| base.strip_suffix('}'));
                let is_argument = variable.is_some_and(|variable| arguments.iter().any(|known| known == variable));
                if !is_argument && !stages.iter().any(|stage| stage == base) {
                    complain("a base that no argument can replace");
                }
                stages.push(stage.to_owned());
            }
            "COPY" if rest.starts_with("--from=") => {
                let from = rest.trim_start_matches("--from=").split(' ').next().unwrap();
                if !stages.iter().any(|stage| stage == from) {
                    complain("a stage that does not exist");
                }
            }
            "ENTRYPOINT" if !rest.starts_with('[') => complain("a shell would be process 1"),
            "RUN" => {
                for (tool, option) in [("apt-get", " -y --no-install-recommends "), ("zypper", "--non-interactive")] {
                    let installs = rest.split("&&").find(|part| {
                        part.split_whitespace().take(4).any(|word| word == tool) && part.contains(" install ")
                    });
                    if installs.is_some_and(|part| !part.contains(option)) {
                        complain(&format!("{tool} without {option}"));
                    }
                }
                let is_clean =
                    rest.contains("rm -rf") && rest.contains("/var/lib/apt/lists") || rest.contains("zypper clean");
                if (rest.contains("apt-get -q update") || rest.contains("zypper --non-interactive refresh"))
                    && !is_clean
                {
                    complain("indexes of packages stay in the layer");
                }
                if rest.contains("sudo ") || rest.contains("curl ") || rest.contains("chmod 777") {
                    complain("not in an image");
                }
                let shell = std::process::Command::new("sh").args(["-n", "-c", rest]).status().unwrap();
                if !shell.success() {
                    complain("no shell would read it");
                }
            }
            _ => {}
        }
    }
    found
}

fn files() -> Vec<PathBuf> {
    let deployed = std::fs::read_dir(Path::new(TOP).join("deploy")).unwrap();
    let below = deployed.map(|entry| entry.unwrap().path().join("Dockerfile")).filter(|file| file.exists());
    below.chain([Path::new(TOP).join("Dockerfile")]).collect()
}

#[test]
fn container_files_are_what_a_builder_takes() {
    assert_eq!(files().len(), 3);
    for file in files() {
        let found = complaints(&std::fs::read_to_string(&file).unwrap());
        assert!(found.is_empty(), "{}: {found:?}", file.display());
    }
    let wrong = "ARG BASE\nFROM debian\nFROM ${BASE} AS a\nRUN apt-get -q update\nCOPY --from=b /x /\nRUN if true\nENTRYPOINT a\nADD b /\n";
    assert_eq!(complaints(wrong).len(), 6, "{:?}", complaints(wrong));
}

#[test]
fn builder_images_start_the_build_of_a_create_job() {
    for file in ["Dockerfile", "deploy/builder-on-suse/Dockerfile"] {
        let text = std::fs::read_to_string(Path::new(TOP).join(file)).unwrap();
        let found = instructions(&text);
        assert!(found.contains(&("ENTRYPOINT".into(), "[\"/usr/bin/ims-sshd\", \"build\"]".into())), "{file}");
        assert!(
            found.contains(&("ENV".into(), "RECIPE_ROOT_PARENT=/mnt/image/recipe IMAGE_ROOT_PARENT=/mnt/image".into())),
            "{file}"
        );
    }
}
