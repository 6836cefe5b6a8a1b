//! The manifests in deploy/service: what Kubernetes takes, and what the service needs of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use clap::Args;
use ims_service::records::Kind;
use serde_json::{Value, json};
use testbed::rendered::rendered_for;
use testbed::repository;

/// Objects of the base, with components.
fn objects(components: &[&str]) -> Vec<Value> {
    let service = repository().join("deploy/service");
    let dir = tempfile::tempdir().unwrap();
    let own = json!({
        "resources": [service],
        "components": components.iter().map(|name| service.join("components").join(name)).collect::<Vec<_>>(),
    });
    std::fs::write(dir.path().join("kustomization.yaml"), own.to_string()).unwrap();
    rendered_for(dir.path(), &["1.31", "newest"]).unwrap_or_else(|complaint| panic!("{complaint}"))
}

fn one(objects: &[Value], kind: &str, name: &str) -> Value {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}")).clone()
}

fn pod(objects: &[Value]) -> Value {
    one(objects, "Deployment", "cray-ims")["spec"]["template"]["spec"].take()
}

/// Spec of the service's pod.
pub fn pod_of_the_service() -> Value {
    pod(&objects(&[]))
}

/// Settings in its ConfigMap.
pub fn settings_of_the_service() -> BTreeMap<String, String> {
    let data = one(&objects(&[]), "ConfigMap", "ims-config")["data"].take();
    data.as_object().unwrap().iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect()
}

#[test]
fn pod_has_what_the_level_restricted_asks_for() {
    for components in [&[][..], &["postgresql"]] {
        let pod = pod(&objects(components));
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for field in ["hostNetwork", "hostPID", "hostIPC"] {
            assert!(pod[field].is_null(), "{field}");
        }
        let kinds = ["configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"];
        for volume in pod["volumes"].as_array().unwrap() {
            assert!(kinds.iter().any(|kind| volume[kind].is_object()), "{volume}");
            assert!(volume["emptyDir"].is_null() || volume["emptyDir"]["sizeLimit"].is_string(), "{volume}");
        }
        for container in pod["containers"].as_array().unwrap() {
            let context = json!({
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
            });
            assert_eq!(container["securityContext"], context);
            let resources = &container["resources"];
            let amounts =
                [&resources["requests"]["cpu"], &resources["requests"]["memory"], &resources["limits"]["memory"]];
            assert!(amounts.iter().all(|amount| amount.is_string()), "{resources}");
            let image = container["image"].as_str().unwrap();
            assert_eq!(image, concat!("registry.example/ims-service:", env!("CARGO_PKG_VERSION")));
            for (probe, path) in [
                ("livenessProbe", "/healthz/live"),
                ("readinessProbe", "/healthz/ready"),
                ("startupProbe", "/healthz/ready"),
            ] {
                assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": "http"}), "{probe}");
            }
        }
    }
}

#[test]
fn service_is_found_and_only_by_namespaces_that_need_it() {
    let objects = objects(&[]);
    let deployment = one(&objects, "Deployment", "cray-ims");
    let labels = deployment["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    let service = one(&objects, "Service", "cray-ims");
    let policy = one(&objects, "NetworkPolicy", "cray-ims");
    let selectors = [
        &deployment["spec"]["selector"]["matchLabels"],
        &service["spec"]["selector"],
        &policy["spec"]["podSelector"]["matchLabels"],
    ];
    for selector in selectors {
        assert!(
            selector.as_object().unwrap().iter().all(|(name, value)| labels.get(name) == Some(value)),
            "{selector}"
        );
    }
    // The manual's procedures find the pod by it.
    assert_eq!(labels["app.kubernetes.io/instance"], "cray-ims");
    assert_eq!(labels["app.kubernetes.io/version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(service["spec"]["ports"][0]["targetPort"], "http");
    let port = deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"].as_u64().unwrap();
    assert_eq!(settings_of_the_service()["IMS_LISTEN"], format!("0.0.0.0:{port}"));
    let from = &policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchExpressions"][0]["values"];
    assert_eq!(from, &json!(["istio-system", "services", "ims"]));
    // Jobs report to this address.
    let job = std::fs::read_to_string(
        repository().join("deploy/service/job-templates/customize/image_job_customize.yaml.template"),
    );
    assert!(job.unwrap().contains("http://cray-ims.services.svc.cluster.local\""));
}

#[test]
fn settings_and_templates_are_those_that_the_service_reads() {
    let objects = objects(&["postgresql"]);
    let command = ims_service::settings::Settings::augment_args(clap::Command::new("serve"));
    let known: BTreeSet<_> =
        command.get_arguments().filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned())).collect();
    let pod = pod(&objects);
    let container = &pod["containers"][0];
    let variables =
        container["env"].as_array().unwrap().iter().map(|variable| variable["name"].as_str().unwrap().to_owned());
    for name in variables.chain(settings_of_the_service().into_keys()) {
        assert!(known.contains(&name), "{name}");
    }
    // Each template is in the directory where the service looks for it.
    let mounts = container["volumeMounts"].as_array().unwrap();
    let volumes = pod["volumes"].as_array().unwrap();
    for (directory, kind) in [("customize", "customize"), ("create/kiwi-ng", "create")] {
        let path = Path::new("/mnt/ims/v2/job_templates").join(directory);
        let mount = mounts.iter().find(|mount| mount["mountPath"] == path.to_str().unwrap()).unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        let map = one(&objects, "ConfigMap", volume["configMap"]["name"].as_str().unwrap());
        assert_eq!(map["metadata"]["namespace"], "services");
        let files: Vec<_> = map["data"].as_object().unwrap().keys().cloned().collect();
        let expected = ["configmap", "job", "pvc", "service"].map(|part| format!("image_{part}_{kind}.yaml.template"));
        assert_eq!(files, expected);
        let kept = repository().join("deploy/service/job-templates").join(directory);
        assert_eq!(std::fs::read_dir(kept).unwrap().count(), files.len(), "{directory}: a template is not mounted");
    }
    // With PostgreSQL, no volume keeps it to one replica.
    let deployment = one(&objects, "Deployment", "cray-ims");
    assert_eq!(
        (&deployment["spec"]["replicas"], &deployment["spec"]["strategy"]),
        (&json!(2), &json!({"type": "RollingUpdate"}))
    );
    assert!(!objects.iter().any(|object| object["kind"] == "PersistentVolumeClaim"));
    let base = self::objects(&[]);
    assert_eq!(one(&base, "Deployment", "cray-ims")["spec"]["strategy"], json!({"type": "Recreate"}));
    assert_eq!(pod_of_the_service()["volumes"][0]["persistentVolumeClaim"]["claimName"], "cray-ims-data-claim");
}

#[test]
fn names_of_upstreams_files_are_where_the_manual_reads_them() {
    let text = std::fs::read_to_string(repository().join("deploy/service/app.py")).unwrap();
    let named: BTreeSet<_> = text.split('\'').filter(|word| word.starts_with('v')).collect();
    assert_eq!(named, Kind::ALL.into_iter().filter_map(Kind::file).collect());
}

/// Verbs of the requests that the service has sent to the stand-in in `kubernetes.rs` would be circular: the rights are
/// compared with the calls in the code by hand. This holds them to what is written there, so that none is added unseen.
#[test]
fn rights_are_no_more_than_the_documented_ones() {
    let objects = objects(&[]);
    assert!(!objects.iter().any(|object| object["kind"] == "ClusterRole" || object["kind"] == "ClusterRoleBinding"));
    let jobs = one(&objects, "Role", "ims-service-jobs");
    for rule in jobs["rules"].as_array().unwrap() {
        let all = ["verbs", "resources", "apiGroups"].map(|field| rule[field].as_array().unwrap().clone()).concat();
        assert!(!all.contains(&json!("*")), "{rule}");
    }
    let keys = one(&objects, "Role", "ims-service-signing-keys");
    assert_eq!(
        keys["rules"],
        json!([
            {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["hpe-signing-key"], "verbs": ["get"]},
        ])
    );
    assert_eq!(pod(&objects)["serviceAccountName"], "ims-service-launch-job");
}
