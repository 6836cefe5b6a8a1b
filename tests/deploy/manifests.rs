//! The manifests themselves.

use std::path::Path;

use crate::rendered::{manifests, object};

#[test]
fn every_variant_is_what_kubernetes_expects() {
    for variant in ["base", "variants/ordinary", "variants/user-namespace", "variants/kata"] {
        let mut objects = manifests(variant);
        for job in ["ims-sshd-customize", "ims-sshd-create-debug"] {
            let spec = object(&mut objects, "Job", job)["spec"]["template"]["spec"].clone();
            for container in spec["containers"].as_array().unwrap() {
                let image = container["image"].as_str().unwrap();
                assert!(image.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))), "{variant}: {image}");
            }
        }
    }
}

#[test]
fn the_variants_differ_in_what_they_are_named_for() {
    let spec =
        |variant| object(&mut manifests(variant), "Job", "ims-sshd-customize")["spec"]["template"]["spec"].clone();
    let security = |spec: &serde_json::Value| spec["containers"][0]["securityContext"].clone();
    let (ordinary, user, kata) = (spec("variants/ordinary"), spec("variants/user-namespace"), spec("variants/kata"));
    for unprivileged in [&ordinary, &user].map(security) {
        assert!(unprivileged.get("privileged").is_none() && unprivileged.get("capabilities").is_none());
    }
    assert_eq!(user["hostUsers"], false);
    assert_eq!(kata["runtimeClassName"], "kata-qemu");
    assert_eq!(security(&kata)["privileged"], true);
    let variable = |spec: &serde_json::Value, name: &str| {
        let variables = spec["containers"][0]["env"].as_array().unwrap().clone();
        variables.into_iter().find(|v| v["name"] == name).unwrap()["value"].as_str().unwrap().to_owned()
    };
    assert_eq!([&ordinary, &user, &kata].map(|spec| variable(spec, "JOB_ENABLE_DKMS")), ["False", "False", "True"]);
    assert_eq!([&ordinary, &user, &kata].map(|spec| variable(spec, "SSH_JAIL")), ["True", "True", "True"]);
}

#[test]
fn three_lines_put_the_image_into_an_existing_chart() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes/ims-chart-values.yaml"))
            .unwrap();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("    ")).collect();
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().any(|line| line.trim() == concat!("tag: ", env!("CARGO_PKG_VERSION"))), "{lines:?}");
}
