//! podman with a storage of its own, and pods from the manifests in deploy/.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ims_sshd::pod::pod_files::SSHD_CONFIG;
use serde_json::{Value, json};
use tempfile::TempDir;
pub use testbed::podman;
use testbed::rendered::manifests;
use testbed::{cache_directory, free_port, ssh_options, wait_within};

pub const IMAGE: &str = "localhost/ims-sshd-test/ims-sshd:latest";
pub const BASE: &str = "localhost/ims-sshd-test/debian:bookworm-slim";
pub const EXAMPLE: &str = "localhost/ims-sshd-test/example:latest";

/// Timeout of each step.
const LIMIT: Duration = Duration::from_mins(3);

/// Cache of `make test`.
pub fn cache() -> PathBuf {
    let path = cache_directory();
    let path = std::fs::canonicalize(&path).unwrap_or(path);
    assert!(
        path.join("containers/busybox.sqsh").exists(),
        "no container images in {}: run the tests with 'make test'",
        path.display()
    );
    path
}

pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Standard output of a command that has to succeed.
pub fn succeed(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Runs `script` in a container of the image, which is removed afterwards.
pub fn in_image(script: &str) -> String {
    in_container(IMAGE, script)
}

/// The same with another image.
pub fn in_container(image: &str, script: &str) -> String {
    succeed(&mut podman(&["run", "--rm", "--network=none", "--entrypoint=/bin/sh", image, "-c", script]))
}

/// Container in a pod's spec.
pub fn container<'a>(spec: &'a mut Value, name: &str) -> &'a mut Value {
    let list = if name == "prepare" { "initContainers" } else { "containers" };
    let named = |container: &&mut Value| container["name"] == name;
    spec[list].as_array_mut().unwrap().iter_mut().find(named).unwrap_or_else(|| panic!("no container {name}"))
}

/// Running pod of a job.
pub struct Pod {
    pub name: String,
    /// The image root parent.
    pub volume: PathBuf,
    pub port: u16,
    pub key: PathBuf,
    /// The sshd container in the manifest.
    pub sshd: Value,
    volumes: Vec<String>,
    _dir: TempDir,
}

static COUNT: AtomicUsize = AtomicUsize::new(0);
/// The first pod builds the image of the infrastructure container.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The variant of the manifest that is run.
pub const VARIANT: &str = "variants/ordinary";

impl Pod {
    /// Starts the pod of the job `name` on an unpacked `archive`, and waits until logins succeed. `change` may change
    /// the sshd container.
    pub fn open(name: &str, archive: &str, change: impl FnOnce(&mut Value)) -> Self {
        Self::of(name, archive, |spec| change(container(spec, "sshd")))
    }

    /// The same; `change` may change the whole pod.
    pub fn of(name: &str, archive: &str, change: impl FnOnce(&mut Value)) -> Self {
        let base = cache().join("tests");
        std::fs::create_dir_all(&base).unwrap();
        let dir = tempfile::tempdir_in(base).unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::copy(cache().join("containers").join(archive), volume.join("image.sqsh")).unwrap();
        let key = dir.path().join("id_ed25519");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        // The pod uses the machine's network, which needs no setup; its sshd listens on the loopback address.
        let port = free_port();

        let own = format!("ims-sshd-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut job = manifests(if name == "ims-sshd-create-debug" { "create-debug" } else { VARIANT }).remove(0);
        assert_eq!(job["metadata"]["name"], name);
        let config = SSHD_CONFIG.replace("Port 22\n", &format!("Port {port}\nListenAddress 127.0.0.1\n"));
        let keys = std::fs::read_to_string(key.with_extension("pub")).unwrap();
        // podman stores it as a volume of that name.
        let keys = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("{own}-ims-sshd-keys")},
            "data": {"authorized_keys": keys, "sshd_config": config},
        });

        let mut spec = job["spec"]["template"]["spec"].take();
        spec["hostNetwork"] = true.into();
        let mut volumes = Vec::new();
        for one in spec["volumes"].as_array_mut().unwrap() {
            if one.get("ephemeral").is_some() {
                *one = json!({"name": one["name"], "hostPath": {"path": volume, "type": "Directory"}});
            }
            one["name"] = format!("{own}-{}", one["name"].as_str().unwrap()).into();
            if one["configMap"]["optional"] == true {
                // podman has no optional volumes.
                *one = json!({"name": one["name"], "emptyDir": {}});
                volumes.push(one["name"].as_str().unwrap().to_owned());
            } else if let Some(map) = one.get_mut("configMap") {
                map["name"] = format!("{own}-{}", map["name"].as_str().unwrap()).into();
                volumes.push(map["name"].as_str().unwrap().to_owned());
            } else {
                volumes.push(one["name"].as_str().unwrap().to_owned());
            }
        }
        for list in ["initContainers", "containers"] {
            for container in spec[list].as_array_mut().unwrap() {
                container["image"] = IMAGE.into();
                container["imagePullPolicy"] = "Never".into();
                // Without a store, the image stays on the volume.
                container.as_object_mut().unwrap().remove("envFrom");
                container["env"].as_array_mut().unwrap().retain(|variable| variable.get("valueFrom").is_none());
                for mount in container["volumeMounts"].as_array_mut().unwrap() {
                    mount["name"] = format!("{own}-{}", mount["name"].as_str().unwrap()).into();
                }
            }
        }
        let source = json!({"name": "IMAGE_SOURCE", "value": "/mnt/image/image.sqsh"});
        let prepare = container(&mut spec, "prepare");
        prepare["env"].as_array_mut().unwrap().retain(|variable| variable["name"] != "IMAGE_SOURCE");
        prepare["env"].as_array_mut().unwrap().push(source.clone());
        for word in prepare["command"].as_array_mut().unwrap().iter_mut().filter(|word| *word == "$(IMAGE_SOURCE)") {
            *word = source["value"].clone();
        }
        let sshd = container(&mut spec, "sshd").clone();
        let container = self::container(&mut spec, "sshd").as_object_mut().unwrap();
        // podman would turn probes into systemd timers; the test runs them itself.
        for only_kubernetes in ["readinessProbe", "livenessProbe", "ports"] {
            container.remove(only_kubernetes).unwrap();
        }
        // Compression is not tested here.
        let sidecar = self::container(&mut spec, "sidecar");
        sidecar["command"].as_array_mut().unwrap().extend(["--sshd-config", "/keys/sshd_config"].map(Into::into));
        let variables = sidecar["env"].as_array_mut().unwrap();
        variables.push(json!({"name": "IMAGE_COMPRESSION", "value": "none"}));
        change(&mut spec);
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": own}, "spec": spec});
        let file = dir.path().join("pod.yaml");
        std::fs::write(&file, [keys, pod].map(|o| o.to_string()).join("\n---\n")).unwrap();

        let pod = Self { name: own, volume, port, key, sshd, volumes, _dir: dir };
        {
            let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            succeed(podman(&["play", "kube", "--quiet"]).arg(file));
        }
        pod
    }

    /// Waits until logins succeed.
    pub fn listening(self) -> Self {
        self.wait_for("sshd_listening");
        self
    }

    pub fn wait_for(&self, signal: &str) {
        let (path, end) = (self.volume.join(signal), self.volume.join("exiting"));
        wait_until(&format!("'{signal}' to appear"), || {
            assert!(!end.exists() || path.exists(), "the environment has ended before '{signal}'");
            path.exists()
        });
    }

    pub fn container(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// Waits for the end of a container, and returns its exit code.
    pub fn end(&self, name: &str) -> i32 {
        let container = self.container(name);
        wait_until(&format!("{name} to end"), || self.state(name)["Running"] == false);
        succeed(&mut podman(&["wait", &container])).parse().unwrap()
    }

    pub fn state(&self, name: &str) -> Value {
        let text = succeed(&mut podman(&["inspect", "--format", "{{json .State}}", &self.container(name)]));
        serde_json::from_str(&text).unwrap()
    }

    pub fn logs(&self, name: &str) -> String {
        let output = output(&mut podman(&["logs", &self.container(name)]));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// Runs a probe of the manifest as a kubelet would.
    pub fn probe(&self, name: &str) -> bool {
        let command = self.sshd[name]["exec"]["command"].as_array().unwrap();
        let command: Vec<_> = command.iter().map(|word| word.as_str().unwrap()).collect();
        let container = self.container("sshd");
        output(podman(&["exec", &container]).args(command)).status.success()
    }

    pub fn ssh_options(&self) -> Vec<String> {
        ssh_options(&self.key)
    }

    /// `ssh` to the pod, without a command.
    pub fn ssh(&self, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.ssh_options()).args(options).args(["-p", &self.port.to_string(), "root@127.0.0.1"]);
        command.stdin(Stdio::null());
        command
    }

    /// Standard output of a session's command line, which has to succeed.
    pub fn says(&self, command: &str) -> String {
        succeed(self.ssh(&[]).arg(command))
    }

    /// Checks that both containers succeed and report the image.
    pub fn ends_well(&self) {
        assert_eq!(self.end("sshd"), 0);
        assert_eq!(self.end("sidecar"), 0);
        assert!(self.volume.join("exiting").exists());
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["prepare", "sshd", "sidecar"] {
                eprintln!("--- log of {name}\n{}", self.logs(name));
            }
        }
        let _ = output(&mut podman(&["pod", "rm", "--force", "--time=0", &self.name]));
        for volume in &self.volumes {
            let _ = output(&mut podman(&["volume", "rm", "--force", volume]));
        }
    }
}

pub fn wait_until(what: &str, holds: impl FnMut() -> bool) {
    wait_within(LIMIT, what, holds);
}

/// Paths in a packed image, with their types.
pub fn packed(archive: &Path) -> std::collections::BTreeSet<String> {
    let list = succeed(Command::new("unsquashfs").args(["-no-progress", "-lls"]).arg(archive));
    let paths = list.lines().filter_map(|line| {
        let (kind, path) = (line.chars().next()?, line.split_once("squashfs-root")?.1);
        Some(format!("{kind} {path}"))
    });
    paths.collect()
}
