//! The same sources give the same bytes in any directory.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const TOP: &str = env!("CARGO_MANIFEST_DIR");

/// Builds a release with deploy/cargo-release in `directory`, and returns the programs.
fn build(directory: &Path, arguments: &[&str], programs: &[&str]) -> Vec<Vec<u8>> {
    let run = |command: &mut Command| {
        let rust = Path::new(env!("CARGO")).parent().unwrap();
        command.current_dir(directory).env_remove("CARGO_TARGET_DIR").env_remove("CARGO_ENCODED_RUSTFLAGS");
        command.env("PATH", format!("{}:{}", rust.display(), std::env::var("PATH").unwrap()));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(Command::new("deploy/cargo-release").args(["build", "--offline", "--quiet"]).args(arguments));
    let host = run(Command::new("rustc").args(["--print", "host-tuple"]));
    let place = directory.join("target").join(host.trim()).join("release");
    programs.iter().map(|program| std::fs::read(place.join(program)).unwrap()).collect()
}

/// Directories of different lengths, since a path's length could show too.
fn directories() -> [TempDir; 2] {
    ["a", "another-directory"].map(|prefix| TempDir::with_prefix(prefix).unwrap())
}

/// A program with what brings paths in: a crate of Rust that can panic, and one of C.
const CARGO_TOML: &str = "[package]\nname = \"small\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
    [dependencies]\nbytes = \"1\"\nlibdeflater = \"1\"\n";
const MAIN: &str = "fn main() {\n    let bytes = bytes::Bytes::from(std::env::args().next().unwrap());\n    \
    let mut small = [0; 100];\n    let size = libdeflater::Compressor::default().gzip_compress(&bytes, &mut small);\n    \
    println!(\"{:?} {:?}\", size.unwrap(), bytes.slice(3..));\n}\n";

#[test]
fn a_release_has_the_same_bytes_in_any_directory() {
    let built = directories().map(|directory| {
        let top = directory.path();
        for below in ["src", "deploy", ".cargo"] {
            std::fs::create_dir(top.join(below)).unwrap();
        }
        std::fs::write(top.join("Cargo.toml"), CARGO_TOML).unwrap();
        std::fs::write(top.join("src/main.rs"), MAIN).unwrap();
        for file in ["deploy/cargo-release", ".cargo/config.toml", "Cargo.lock"] {
            std::fs::copy(Path::new(TOP).join(file), top.join(file)).unwrap();
        }
        // Cargo drops from the lock what this program has no use for.
        let mut lock = Command::new(env!("CARGO"));
        lock.args(["metadata", "--offline", "--format-version=1"]).current_dir(top);
        assert!(lock.output().unwrap().status.success());
        build(top, &[], &["small"]).remove(0)
    });
    assert!(built[0] == built[1]);
    let path = b"/cargo/registry/src/";
    let places = built[0].windows(path.len()).enumerate().filter(|(_, bytes)| bytes == path);
    let before: Vec<_> = places.map(|(at, _)| built[0][at - 1]).collect();
    assert!(!before.is_empty() && !before.contains(&b'.'), "paths of crates are not mapped");
}

/// The programs themselves. `make test` has no time for it: `cargo test --test deploy reproducible -- --ignored`.
#[test]
#[ignore = "two release builds take half an hour on two cores"]
fn the_programs_have_the_same_bytes_in_any_directory() {
    let built = directories().map(|directory| {
        let mut copy = Command::new("sh");
        copy.args(["-c", "git ls-files -z | tar -c --null -T - | tar -x -C \"$0\""]).arg(directory.path());
        assert!(copy.current_dir(TOP).status().unwrap().success());
        build(directory.path(), &["--workspace", "--bins"], &["ims-sshd", "ims-jail-shell", "ims"])
    });
    assert!(built[0] == built[1]);
}
