//! The manifests in deploy/kubernetes as kustomize renders them, checked against the schemas of Kubernetes.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The objects of a variant.
pub fn manifests(variant: &str) -> Vec<Value> {
    let cache = std::env::var_os("IMS_SSHD_CACHE")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/ims-sshd"), PathBuf::from);
    let python = cache.join("kubernetes-validate/bin/python");
    assert!(python.exists(), "no {}: run the tests with 'make test'", python.display());
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut render = Command::new(python);
    // The folder may be another user's.
    render.env("PYTHONDONTWRITEBYTECODE", "1").arg(repository.join("tests/deploy/manifests.py")).arg("--validate");
    let output = render.arg(repository.join("deploy/kubernetes").join(variant)).output().unwrap();
    assert!(output.status.success(), "{variant}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// One object of them.
pub fn object<'a>(objects: &'a mut [Value], kind: &str, name: &str) -> &'a mut Value {
    let named = |o: &&mut Value| o["kind"] == kind && o["metadata"]["name"] == name;
    objects.iter_mut().find(named).unwrap_or_else(|| panic!("no {kind} {name}"))
}
