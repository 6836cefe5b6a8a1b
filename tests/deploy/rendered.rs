//! The manifests in deploy/kubernetes as kustomize renders them, checked against the schemas of Kubernetes.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The objects of a variant, or of a file.
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

/// The containers of a pod's spec, those that begin first first.
pub fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"].into_iter().flat_map(|list| spec[list].as_array().into_iter().flatten())
}
