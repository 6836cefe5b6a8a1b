//! The manifests themselves.

use std::collections::BTreeSet;
use std::path::Path;

use ims_sshd::environment::stage::Stage;
use serde_json::Value;
use testbed::rendered::{containers, manifests, rendered_for};

/// Manifests of a customize job, and all that hold a job.
const CUSTOMIZE: [&str; 5] = ["base", "variants/ordinary", "variants/user-namespace", "variants/kata", "variants/ims"];
const JOBS: [&str; 6] =
    ["base", "variants/ordinary", "variants/user-namespace", "variants/kata", "variants/ims", "create-debug"];

fn job(variant: &str) -> Value {
    let mut objects = manifests(variant);
    assert_eq!((objects.len(), objects[0]["kind"].as_str()), (1, Some("Job")), "{variant}");
    objects.remove(0)
}

fn spec(variant: &str) -> Value {
    job(variant)["spec"]["template"]["spec"].take()
}

fn container(spec: &Value, name: &str) -> Value {
    containers(spec).find(|container| container["name"] == name).unwrap().clone()
}

fn variable(container: &Value, name: &str) -> String {
    let variables = container["env"].as_array().unwrap();
    variables.iter().find(|v| v["name"] == name).unwrap()["value"].as_str().unwrap().to_owned()
}

#[test]
fn every_job_is_what_kubernetes_expects_and_names_one_version() {
    for variant in JOBS {
        let job = job(variant);
        for labels in [&job["metadata"]["labels"], &job["spec"]["template"]["metadata"]["labels"]] {
            assert_eq!(labels["app.kubernetes.io/version"], env!("CARGO_PKG_VERSION"), "{variant}");
        }
        for container in containers(&job["spec"]["template"]["spec"]) {
            let image = container["image"].as_str().unwrap();
            assert!(image.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))), "{variant}: {image}");
        }
    }
    let policy = manifests("networkpolicy.yaml");
    assert_eq!(policy[0]["metadata"]["labels"]["app.kubernetes.io/version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn every_job_ends_and_goes_and_has_no_unbounded_memory() {
    for variant in JOBS {
        let job = job(variant);
        for limit in ["activeDeadlineSeconds", "ttlSecondsAfterFinished"] {
            assert!(job["spec"][limit].as_u64().is_some_and(|seconds| seconds > 0), "{variant}: {limit}");
        }
        let spec = &job["spec"]["template"]["spec"];
        assert_eq!(variable(&container(spec, "sshd"), "IMS_IDLE_LIMIT"), "14400");
        for volume in spec["volumes"].as_array().unwrap() {
            let empty = volume.get("emptyDir");
            assert!(empty.is_none_or(|empty| empty["sizeLimit"].is_string()), "{variant}: {volume}");
        }
        for container in containers(spec) {
            let resources = &container["resources"];
            let all = [&resources["requests"]["cpu"], &resources["requests"]["memory"], &resources["limits"]["memory"]];
            assert!(all.iter().all(|amount| amount.is_string()), "{variant}: {container}");
        }
    }
}

/// Whatever the node lets everybody do: `net.ipv4.ip_unprivileged_port_start` is 0 with some runtimes, and the kernel's
/// 1024 with others.
#[test]
fn sshd_may_bind_its_port_and_nobody_else_is_given_leave() {
    for variant in JOBS {
        let spec = spec(variant);
        assert!(spec["securityContext"]["sysctls"].is_null(), "{variant}: a session could take the port");
        for container in containers(&spec) {
            let security = &container["securityContext"];
            let added = security["capabilities"]["add"].as_array();
            let may =
                security["privileged"] == true || added.is_some_and(|added| added.contains(&"NET_BIND_SERVICE".into()));
            assert_eq!(may, container["name"] == "sshd", "{variant}: {container}");
        }
    }
}

#[test]
fn the_pages_give_sshd_what_the_manifests_give_it() {
    let security = container(&spec("variants/ordinary"), "sshd")["securityContext"].take();
    let list = security["capabilities"]["add"].as_array().unwrap();
    let names: Vec<_> = list.iter().map(|name| name.as_str().unwrap()).collect();
    // Without allowPrivilegeEscalation: false, which the manifests have, the audit log cannot be hidden from sshd.
    for page in ["docs/PODS.md", "docs/ADMIN.md", "docs/KUBERNETES.md"] {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        for line in [
            format!("add: [{}, AUDIT_WRITE", names.join(", ")),
            "appArmorProfile: {type: Unconfined}".into(),
            "container.apparmor.security.beta.kubernetes.io/sshd: unconfined".into(),
            "seccompProfile: {type: Unconfined}".into(),
            "{name: IMS_JAIL_TIER, value: ".into(),
        ] {
            assert!(text.contains(&line), "{page}: {line}");
        }
    }
}

/// Renders a variant with components, and what a kustomization of a site's own may hold.
fn with_components(variant: &str, components: &[&str], versions: &[&str]) -> Result<Value, String> {
    let kubernetes = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes");
    let dir = tempfile::tempdir().unwrap();
    let own = serde_json::json!({
        "resources": [kubernetes.join(variant)],
        "components": components.iter().map(|name| kubernetes.join("components").join(name)).collect::<Vec<_>>(),
    });
    std::fs::write(dir.path().join("kustomization.yaml"), own.to_string()).unwrap();
    Ok(rendered_for(dir.path(), versions)?.remove(0)["spec"]["template"].take())
}

#[test]
fn kubernetes_before_1_30_takes_every_variant_with_a_component() {
    for variant in ["variants/ordinary", "variants/ims", "variants/user-namespace"] {
        let complaint = with_components(variant, &[], &["1.25"]).unwrap_err();
        assert!(complaint.contains("appArmorProfile"), "{variant}: {complaint}");
        let template = with_components(variant, &["before-1.30"], &["1.25", "1.29"]).unwrap();
        let annotation = "container.apparmor.security.beta.kubernetes.io/sshd";
        assert_eq!(template["metadata"]["annotations"][annotation], "unconfined", "{variant}");
        let sshd = container(&template["spec"], "sshd");
        assert_eq!(sshd["securityContext"]["seccompProfile"]["type"], "Unconfined", "{variant}");
    }
    for variant in ["base", "variants/kata", "create-debug"] {
        with_components(variant, &[], &["1.25"]).unwrap_or_else(|complaint| panic!("{variant}: {complaint}"));
    }
}

#[test]
fn every_job_can_have_a_login_to_its_registry() {
    for variant in JOBS {
        let template = with_components(variant, &["registry-login"], &["1.31"]).unwrap();
        assert_eq!(template["spec"]["imagePullSecrets"][0]["name"], "ims-sshd-registry", "{variant}");
    }
}

#[test]
fn a_session_does_not_reach_where_clouds_hand_out_credentials() {
    let policy = manifests("networkpolicy.yaml").remove(0);
    let kept = |at: usize| policy["spec"]["egress"][0]["to"][at]["ipBlock"]["except"].to_string();
    for network in ["169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32"] {
        assert!(kept(0).contains(network), "{network}");
    }
    for network in ["fe80::/10", "fd00:ec2::/64", "fd20:ce::254/128", "fd00:c1::a9fe:a9fe/128"] {
        assert!(kept(1).contains(network), "{network}");
    }
}

#[test]
fn clients_of_another_namespace_reach_one_job_at_its_port() {
    let [policy, service] = <[Value; 2]>::try_from(manifests("from-another-namespace.yaml")).unwrap();
    let pods = &policy["spec"]["podSelector"]["matchLabels"];
    assert_eq!((pods, pods["job-name"].as_str()), (&service["spec"]["selector"], Some("JOB")));
    let from = &policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"];
    assert_eq!(from["kubernetes.io/metadata.name"], "CLIENTS");
    assert_eq!(service["spec"]["ports"][0]["targetPort"], "ssh");
}

/// The store of a site, and IMS, may have certificates of the site's own authority.
#[test]
fn whoever_speaks_to_a_server_is_given_authorities() {
    for variant in JOBS {
        let spec = spec(variant);
        for name in ["prepare", "sidecar"] {
            let container = container(&spec, name);
            assert_eq!(variable(&container, "CA_CERT"), "/ca/ca.crt", "{variant}: {name}");
            let mounts = container["volumeMounts"].as_array().unwrap();
            assert!(
                mounts.iter().any(|mount| mount["name"] == "ca" && mount["mountPath"] == "/ca"),
                "{variant}: {name}"
            );
        }
        let ca = spec["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == "ca").unwrap();
        assert_eq!(ca["configMap"], serde_json::json!({"name": "ims-sshd-ca", "optional": true}), "{variant}");
    }
}

/// Without a store an image would be gone with its volume.
#[test]
fn no_container_that_fetches_or_publishes_starts_without_a_store() {
    let rescue = manifests("publish.yaml").remove(0);
    let specs = JOBS.iter().map(|variant| (*variant, spec(variant)));
    for (variant, spec) in specs.chain([("publish.yaml", rescue["spec"]["template"]["spec"].clone())]) {
        for container in containers(&spec).filter(|container| container["name"] != "sshd") {
            for key in ["S3_ENDPOINT", "S3_BUCKET", "S3_ACCESS_KEY", "S3_SECRET_KEY"] {
                let variables = container["env"].as_array().unwrap();
                let source = variables.iter().find(|variable| variable["name"] == key).map(|found| &found["valueFrom"]);
                let required = serde_json::json!({"secretKeyRef": {"name": "ims-sshd-store", "key": key}});
                assert_eq!(source, Some(&required), "{variant}: {}: {key}", container["name"]);
            }
        }
    }
}

#[test]
fn what_was_packed_is_published_as_the_jobs_own_sidecar_does() {
    let rescue = manifests("publish.yaml").remove(0);
    let spec = &rescue["spec"]["template"]["spec"];
    let (own, of_job) = (container(spec, "sidecar"), container(&self::spec("base"), "sidecar"));
    for field in ["image", "securityContext", "envFrom", "resources"] {
        assert_eq!(own[field], of_job[field], "{field}");
    }
    for name in ["IMAGE_ROOT_PARENT", "KERNEL_FILENAME", "INITRD_FILENAME", "CA_CERT"] {
        assert_eq!(variable(&own, name), variable(&of_job, name));
    }
    assert_eq!(spec["volumes"][0]["persistentVolumeClaim"]["claimName"], "CLAIM");
}

#[test]
fn probes_ask_for_states_by_name() {
    for variant in JOBS {
        let sshd = container(&spec(variant), "sshd");
        let asks = |probe: &str| sshd[probe]["exec"]["command"].clone();
        assert_eq!(asks("readinessProbe"), serde_json::json!(["ims-sshd", "status", "--is", "serving"]), "{variant}");
        let alive = Stage::ALL.map(Stage::name).join(",");
        assert_eq!(asks("livenessProbe"), serde_json::json!(["ims-sshd", "status", "--is", alive]), "{variant}");
    }
}

#[test]
fn every_container_gives_up_what_it_does_not_need() {
    for variant in JOBS {
        for container in containers(&spec(variant)) {
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], true);
            if (variant, container["name"].as_str().unwrap()) == ("variants/kata", "sshd") {
                // Kubernetes refuses a privileged container that may not escalate.
                assert_eq!(
                    (&security["privileged"], &security["allowPrivilegeEscalation"]),
                    (&true.into(), &true.into())
                );
                assert!(security.get("capabilities").is_none());
                continue;
            }
            assert_eq!(security["allowPrivilegeEscalation"], false, "{variant}: {container}");
            assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]), "{variant}: {container}");
        }
    }
}

/// Lists what the level 'baseline' of Kubernetes' Pod Security Standards refuses of a pod.
fn refused_by_baseline(spec: &Value) -> Vec<String> {
    const CAPABILITIES: [&str; 13] = [
        "AUDIT_WRITE",
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "MKNOD",
        "NET_BIND_SERVICE",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    ];
    let mut refused = Vec::new();
    for host in ["hostNetwork", "hostPID", "hostIPC"] {
        refused.extend((spec[host] == true).then(|| host.to_owned()));
    }
    for volume in spec["volumes"].as_array().unwrap() {
        refused.extend(volume.get("hostPath").map(|_| "hostPath".to_owned()));
    }
    for container in containers(spec) {
        let security = &container["securityContext"];
        let mut refuse = |what: &str| refused.push(format!("{}: {what}", container["name"].as_str().unwrap()));
        if security["privileged"] == true {
            refuse("privileged");
        }
        for profile in ["appArmorProfile", "seccompProfile"] {
            if security[profile]["type"] == "Unconfined" {
                refuse(profile);
            }
        }
        for capability in security["capabilities"]["add"].as_array().into_iter().flatten() {
            if !CAPABILITIES.contains(&capability.as_str().unwrap()) {
                refuse("capabilities");
            }
        }
    }
    refused
}

#[test]
fn baseline_takes_the_base_and_the_debug_shell_and_refuses_the_variants_for_what_the_page_says() {
    for variant in ["base", "create-debug"] {
        assert_eq!(refused_by_baseline(&spec(variant)), <[&str; 0]>::default(), "{variant}");
    }
    for variant in ["variants/ordinary", "variants/user-namespace", "variants/ims"] {
        assert_eq!(refused_by_baseline(&spec(variant)), ["sshd: appArmorProfile", "sshd: seccompProfile"], "{variant}");
    }
    assert_eq!(refused_by_baseline(&spec("variants/kata")), ["sshd: privileged"]);
}

/// Lists what the level 'restricted' refuses of a pod beyond 'baseline'.
fn refused_by_restricted(spec: &Value) -> BTreeSet<String> {
    const VOLUMES: [&str; 4] = ["configMap", "emptyDir", "ephemeral", "secret"];
    let mut refused = BTreeSet::new();
    for volume in spec["volumes"].as_array().unwrap() {
        let is_allowed = VOLUMES.iter().any(|kind| volume.get(kind).is_some());
        refused.extend((!is_allowed).then(|| format!("volume {}", volume["name"])));
    }
    for container in containers(spec) {
        let security = &container["securityContext"];
        let name = container["name"].as_str().unwrap();
        if security["runAsNonRoot"] != true {
            refused.insert(format!("{name}: runAsNonRoot"));
        }
        if security["allowPrivilegeEscalation"] != false {
            refused.insert(format!("{name}: allowPrivilegeEscalation"));
        }
        if security["seccompProfile"]["type"] != "RuntimeDefault" {
            refused.insert(format!("{name}: seccompProfile"));
        }
        let added = security["capabilities"]["add"].as_array().into_iter().flatten();
        if security["capabilities"]["drop"] != serde_json::json!(["ALL"])
            || added.clone().any(|name| name != "NET_BIND_SERVICE")
        {
            refused.insert(format!("{name}: capabilities"));
        }
    }
    refused
}

/// The rows of docs/KUBERNETES.md that say why a field stays.
#[test]
fn restricted_refuses_no_more_than_the_page_gives_reasons_for() {
    let page = include_str!("../../docs/KUBERNETES.md").split_once("\n## Level restricted\n").unwrap().1;
    let rows = page.split("\n## ").next().unwrap().lines().filter_map(|line| line.strip_prefix("| `"));
    let rows: BTreeSet<String> =
        rows.map(|row| row.replacen("` | ", ": ", 1).split(" |").next().unwrap().to_owned()).collect();
    let mut refused = BTreeSet::new();
    for variant in JOBS {
        let own = refused_by_restricted(&spec(variant));
        for complaint in &own {
            let (container, field) = complaint.split_once(": ").unwrap();
            let row = format!("{field}: {container}");
            assert!(rows.contains(&row), "{variant}: docs/KUBERNETES.md gives no reason for '{row}': {rows:?}");
            refused.insert(row);
        }
    }
    assert_eq!(refused, rows);
}

/// Checkers of manifests (kube-linter, kube-score) ask for more than the tests above.
#[test]
fn every_pod_is_what_checkers_of_manifests_ask_for() {
    let selector = manifests("networkpolicy.yaml").remove(0)["spec"]["podSelector"]["matchLabels"].take();
    let jobs = JOBS.iter().map(|variant| (*variant, job(variant)));
    for (variant, job) in jobs.chain([("publish.yaml", manifests("publish.yaml").remove(0))]) {
        let template = &job["spec"]["template"];
        for (label, value) in selector.as_object().unwrap() {
            assert_eq!(&template["metadata"]["labels"][label], value, "{variant}: no network policy selects it");
        }
        let spec = &template["spec"];
        assert_eq!(spec["restartPolicy"], "Never", "{variant}");
        for field in ["automountServiceAccountToken", "enableServiceLinks"] {
            assert_eq!(spec[field], false, "{variant}: {field}");
        }
        let names = |list: &Value, key: &str| -> Vec<String> {
            let items = list.as_array().into_iter().flatten();
            items.map(|item| item[key].as_str().unwrap().to_owned()).collect()
        };
        let volumes: BTreeSet<_> = names(&spec["volumes"], "name").into_iter().collect();
        let mounted: BTreeSet<_> = containers(spec).flat_map(|own| names(&own["volumeMounts"], "name")).collect();
        assert_eq!(volumes, mounted, "{variant}: a volume that nobody mounts, or a mount of none");
        for container in containers(spec) {
            let shown = format!("{variant}: {}", container["name"]);
            let variables = names(&container["env"], "name");
            assert_eq!(variables.iter().collect::<BTreeSet<_>>().len(), variables.len(), "{shown}: a variable twice");
            for variable in container["env"].as_array().unwrap() {
                let name = variable["name"].as_str().unwrap();
                let is_secret = ["SECRET", "ACCESS_KEY", "PASSWORD", "TOKEN"].iter().any(|word| name.contains(word));
                assert!(!is_secret || variable.get("value").is_none(), "{shown}: {name} is written down");
            }
            for probe in ["readinessProbe", "livenessProbe"] {
                assert_eq!(container.get("ports").is_some(), container.get(probe).is_some(), "{shown}: {probe}");
            }
        }
    }
}

#[test]
fn the_variants_differ_in_what_they_are_named_for() {
    let [ordinary, user, kata, ims] =
        ["ordinary", "user-namespace", "kata", "ims"].map(|variant| spec(&format!("variants/{variant}")));
    assert_eq!((&user["hostUsers"], ordinary.get("hostUsers")), (&false.into(), None));
    assert_eq!(kata["runtimeClassName"], "kata-qemu");
    assert!(variable(&container(&ims, "sidecar"), "IMS_URL").ends_with("/apis/ims"));
    for variant in CUSTOMIZE {
        let sshd = container(&spec(variant), "sshd");
        assert_eq!(variable(&sshd, "SSH_JAIL"), "True");
        let (dkms, tier) = if variant == "variants/kata" { ("True", "namespace") } else { ("False", "user") };
        assert_eq!(
            (variable(&sshd, "JOB_ENABLE_DKMS").as_str(), variable(&sshd, "IMS_JAIL_TIER").as_str()),
            (dkms, tier)
        );
    }
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
