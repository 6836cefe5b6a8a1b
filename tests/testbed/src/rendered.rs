//! The manifests in deploy/kubernetes as kustomize renders them, checked against the schemas of Kubernetes.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::{cache_directory, repository};

/// Objects of a variant in deploy/kubernetes, or of a file there.
pub fn manifests(variant: &str) -> Vec<Value> {
    let place = repository().join("deploy/kubernetes").join(variant);
    rendered_for(&place, &["1.31", "newest"]).unwrap_or_else(|complaint| panic!("{variant}: {complaint}"))
}

/// Objects of the kustomization or file at `place`; an error if one of these versions of Kubernetes would not accept
/// them.
pub fn rendered_for(place: &Path, versions: &[&str]) -> Result<Vec<Value>, String> {
    let python = cache_directory().join("kubernetes-validate/bin/python");
    assert!(python.exists(), "no {}: run the tests with 'make test'", python.display());
    let mut render = Command::new(python);
    // The directory may be another user's, so write no bytecode to it.
    render.env("PYTHONDONTWRITEBYTECODE", "1").arg(repository().join("tests/deploy/manifests.py"));
    render.args(versions.iter().map(|version| format!("--validate={version}")));
    let output = render.arg(place).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

/// The containers of a pod's spec, in the order in which they start.
pub fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"].into_iter().flat_map(|list| spec[list].as_array().into_iter().flatten())
}
