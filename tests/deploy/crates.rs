//! The crates that may be linked: .cargo/deny.toml, checked with cargo alone, since cargo-deny takes longer to build than
//! the programs.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const TOP: &str = env!("CARGO_MANIFEST_DIR");

/// Texts of the list `name` in deny.toml.
fn list(name: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(Path::new(TOP).join(".cargo/deny.toml")).unwrap();
    let list = text.split_once(&format!("\n{name} = [")).unwrap().1.split_once(']').unwrap().0;
    let lines = list.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(|line| line.split('"').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// All packages of Cargo.lock.
fn packages() -> Vec<Value> {
    let mut metadata = Command::new(env!("CARGO"));
    metadata.args(["metadata", "--locked", "--offline", "--format-version=1"]).current_dir(TOP);
    let output = metadata.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let packages = serde_json::from_slice::<Value>(&output.stdout).unwrap()["packages"].take();
    packages.as_array().unwrap().clone()
}

/// True if a licence expression can be met by licences of `allowed`. Of expressions with both operators it knows those
/// whose alternatives are in parentheses.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    // The slash is an older way to write OR.
    let expression = expression.replace('/', " OR ");
    expression.split(" AND ").all(|part| {
        let alternatives = part.trim().trim_start_matches('(').trim_end_matches(')');
        alternatives.split(" OR ").any(|license| allowed.contains(license.trim()))
    })
}

#[test]
fn every_crate_has_a_licence_that_allows_linking() {
    let allowed = list("allow");
    for package in packages().iter().filter(|package| !package["source"].is_null()) {
        let license = package["license"].as_str().unwrap_or_default();
        assert!(is_met(license, &allowed), "{} is under '{license}', which deny.toml does not allow", package["name"]);
    }
    for (license, met) in [
        ("MIT/GPL-3.0", true),
        ("(GPL-3.0 OR MIT) AND Unicode-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("GPL-3.0 OR LGPL-3.0", false),
        ("", false),
    ] {
        assert_eq!(is_met(license, &allowed), met, "{license}");
    }
}

#[test]
fn no_crate_is_banned_or_from_elsewhere_than_a_registry() {
    let banned = list("deny");
    assert!(banned.contains("openssl-sys"));
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        assert!(!banned.contains(name), "deny.toml bans {name}");
        let source = &package["source"];
        assert!(source.as_str().is_none_or(|source| source.starts_with("registry+")), "{name}: {source}");
    }
}
