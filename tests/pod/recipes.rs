//! Create jobs as IMS starts them: its containers in its order, from a recipe to a published image.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::file_server::FileServer;
use testbed::ims_server::ImsServer;
use testbed::repository_server::RepositoryServer;
use testbed::rpms::REPOSITORY;
use testbed::s3_server::Bucket;
use testbed::tls_server::certificates;
use testbed::{job, repository};

use crate::podman::*;

const BUILDER: &str = "localhost/ims-sshd-test/builder:latest";

/// Containers of a create job before the last two, in IMS's order.
const INIT: [&str; 4] = ["fetch-recipe", "wait-for-repos", "build-ca-rpm", "build-image"];

/// A create job on this machine's network.
struct CreateJob {
    name: String,
    dir: TempDir,
    bucket: Bucket,
    ims: ImsServer,
    recipe: FileServer,
}

impl CreateJob {
    /// Runs the pod of a job that builds a recipe of tests/recipe with these values. The URL of a repository of
    /// `packages` is a further value, with the name `mirror`.
    fn run(recipe: &str, (mirror, packages): (&str, &Path), values: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
        let at = |name: &str| dir.path().join(name);
        certificates(dir.path());
        for name in ["volume", "ca"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::copy(at("ca.crt"), at("ca/certificate_authority.crt")).unwrap();
        let archive = at("recipe.tgz");
        let tree = repository().join("tests/recipe").join(recipe);
        succeed(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(tree).arg("."));
        let archive = std::fs::read(archive).unwrap();
        let checksum = job::md5(&archive);
        let job = Self {
            name: format!("ims-sshd-test-{}-create-{recipe}", std::process::id()),
            bucket: Bucket::new(),
            ims: ImsServer::start(),
            recipe: FileServer::start(archive, &[]),
            dir,
        };
        let mut dictionary: serde_json::Map<_, _> =
            values.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        dictionary.insert(mirror.into(), RepositoryServer::start(packages).url.into());
        std::fs::write(job.at("template_dictionary"), Value::from(dictionary).to_string()).unwrap();
        let spec = job.spec(&checksum);
        // podman removes others when they have ended.
        let metadata =
            json!({"name": job.name, "annotations": {"io.podman.annotations.init.container.type": "always"}});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        let file = job.at("pod.yaml");
        std::fs::write(&file, pod.to_string()).unwrap();
        // An init container that fails ends it.
        let _ = output(podman(&["play", "kube", "--quiet"]).arg(file));
        job
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The pod: volumes, variables and commands are those of IMS's template.
    fn spec(&self, checksum: &str) -> Value {
        let oauth = self.ims.oauth.path().display().to_string();
        let mut variables = self.ims.variables();
        variables.extend([
            ("RECIPE_ROOT_PARENT", "/mnt/image/recipe".into()),
            ("IMAGE_ROOT_PARENT", "/mnt/image".into()),
            ("ENABLE_DEBUG", "False".into()),
            ("BUILD_ARCH", "x86_64".into()),
            ("JOB_ENABLE_DKMS", "False".into()),
            ("IMS_ACTION", "create".into()),
            ("DOWNLOAD_MD5SUM", checksum.to_owned()),
        ]);
        let mut publishing = self.bucket.variables();
        publishing.extend([("IMAGE_ROOT_ARCHIVE_NAME", "compute-ö".into()), ("IMAGE_COMPRESSION", "zstd".into())]);
        let env = |variables: &[(&str, String)]| -> Value {
            variables.iter().map(|(name, value)| json!({"name": name, "value": value})).collect()
        };
        let own = |name: &str| format!("{}-{name}", self.name);
        let mount = |name: &str, place: &str| json!({"name": own(name), "mountPath": place});
        let container = |name: &str, image: &str, mounts: &[(&str, &str)]| {
            let mut mounts: Vec<_> = mounts.iter().map(|(name, place)| mount(name, place)).collect();
            mounts.push(mount("oauth", &oauth));
            json!({
                "name": name, "image": image, "imagePullPolicy": "Never", "env": env(&variables), "volumeMounts": mounts,
            })
        };
        let (image, ca) = (("image", "/mnt/image"), ("ca", "/etc/cray/ca"));
        let mut fetch = container("fetch-recipe", IMAGE, &[image, ("dictionary", "/etc/cray/template_dictionary")]);
        let script = format!("/scripts/fetch-recipe.sh /mnt/image/recipe \"{}\"", self.recipe.url);
        fetch["command"] = json!(["sh", "-ce", script]);
        let mut wait = container("wait-for-repos", IMAGE, &[image]);
        wait["command"] = json!(["sh", "-ce", "/scripts/wait_for_kiwi_repos.py"]);
        let mut package = container("build-ca-rpm", IMAGE, &[ca, ("ca-rpm", "/mnt/ca-rpm")]);
        package["command"] = json!(["/scripts/build_ca_rpm.py"]);
        let mut build = container("build-image", BUILDER, &[image, ca, ("ca-rpm", "/mnt/ca-rpm")]);
        build["securityContext"] = json!({"privileged": true});
        let mut sidecar = container("buildenv-sidecar", IMAGE, &[image, ca, ("config", "/etc/cray/ims")]);
        sidecar["command"] = json!(["ims-sshd", "sidecar"]);
        sidecar["env"].as_array_mut().unwrap().extend(env(&publishing).as_array().unwrap().clone());
        let mut sshd = container("sshd", IMAGE, &[image, ("config", "/etc/cray/ims")]);
        let options = "-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config";
        sshd["env"].as_array_mut().unwrap().push(json!({"name": "SSHD_OPTIONS", "value": options}));
        let host =
            |name: &str, path: &Path, kind: &str| json!({"name": own(name), "hostPath": {"path": path, "type": kind}});
        json!({
            "hostNetwork": true,
            "restartPolicy": "Never",
            "initContainers": [fetch, wait, package, build],
            "containers": [sidecar, sshd],
            "volumes": [
                host("image", &self.at("volume"), "Directory"),
                host("ca", &self.at("ca"), "Directory"),
                host("dictionary", &self.at("template_dictionary"), "File"),
                host("oauth", self.ims.oauth.path(), "Directory"),
                {"name": own("ca-rpm"), "emptyDir": {}},
                {"name": own("config"), "emptyDir": {}},
            ],
        })
    }

    fn container(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    fn logs(&self, name: &str) -> String {
        let output = output(&mut podman(&["logs", &self.container(name)]));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    fn end(&self, name: &str) -> i32 {
        let container = self.container(name);
        succeed(&mut podman(&["wait", &container])).parse().unwrap()
    }

    /// Asserts that the job has published an image, and unpacks it.
    fn publishes(&self) -> PathBuf {
        // sshd ends before the image is packed, and podman forgets an exit code after five minutes.
        assert_eq!((self.end("sshd"), self.end("buildenv-sidecar")), (0, 0));
        let statuses = ["fetching_recipe", "waiting_for_repos", "building_image", "packaging_artifacts", "success"];
        assert_eq!(self.ims.statuses(), statuses);
        let published = job::Published { bucket: &self.bucket, ims: &self.ims };
        published.is_whole(&self.logs("buildenv-sidecar"));
        published.unpacked(self.dir.path())
    }

    /// Asserts that the next job customizes the published image: `line` of a session in it prints `said`.
    fn is_customized(&self, line: &str, said: &str) {
        let pod = Pod::open("ims-sshd-customize", self.at("rootfs").to_str().unwrap(), |_| {}).listening();
        assert_eq!(pod.says(line), said);
        pod.says("touch /tmp/complete");
        pod.ends_well();
    }
}

impl Drop for CreateJob {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in INIT.into_iter().chain(["buildenv-sidecar", "sshd"]) {
                eprintln!("--- log of {name}\n{}", self.logs(name));
            }
        }
        let _ = output(&mut podman(&["pod", "rm", "--force", "--time=0", &self.name]));
        for name in ["ca-rpm", "config"] {
            let _ = output(&mut podman(&["volume", "rm", "--force", &format!("{}-{name}", self.name)]));
        }
    }
}

#[test]
fn a_create_job_of_ims_builds_a_recipe_and_publishes_an_image_that_opens() {
    let values = [("SUITE", "bookworm"), ("KERNEL", "true")];
    let job = CreateJob::run("debian", ("MIRROR", &cache().join("debian-archive")), &values);
    let tree = job.publishes();
    let read = |name: &str| std::fs::read(tree.join(name)).unwrap();
    // The kernel of this machine mounts it.
    let mounts = "mount -t squashfs -o loop,ro \"$0\" /mnt && cat /mnt/etc/hostname";
    let hostname = succeed(Command::new("unshare").args(["--mount", "sh", "-ec", mounts]).arg(job.at("rootfs")));
    assert_eq!(hostname, "debian");
    let status = String::from_utf8(read("var/lib/dpkg/status")).unwrap();
    for package in ["ca-certificates", "kmod", "initramfs-tools", "linux-image-cloud-amd64"] {
        assert!(status.contains(&format!("Package: {package}\nStatus: install ok installed\n")), "{package}");
    }
    let object = |name: &str| {
        let keys = job.bucket.keys();
        job.bucket.get(keys.iter().find(|key| key.ends_with(name)).unwrap()).body
    };
    // The magic of a kernel for x86, and modules that belong to it.
    assert_eq!(&object("/kernel")[0x202..0x206], b"HdrS");
    assert!(object("/kernel") == read("boot/vmlinuz") && object("/initrd") == read("boot/initrd"));
    assert!(object("/initrd").len() > 1 << 20);
    assert!(tree.join("etc/cray/ca/certificate_authority.crt").exists());
    let (authority, bundle) =
        (std::fs::read_to_string(job.at("ca.crt")).unwrap(), read("etc/ssl/certs/ca-certificates.crt"));
    assert!(String::from_utf8(bundle).unwrap().contains(authority.lines().nth(2).unwrap()));

    job.is_customized("cat /etc/hostname; dpkg-query -W -f '${Status}' kmod", "debian\ninstall ok installed");
}

#[test]
fn a_create_job_of_ims_builds_a_recipe_of_rpm_packages_too() {
    // The image's kiwi-ng, 9.24, knows dnf by no other name.
    let job = CreateJob::run("rpm-local", ("REPOSITORY", &REPOSITORY), &[("PACKAGE_MANAGER", "dnf")]);
    job.publishes();
    let authority = std::fs::read_to_string(job.at("ca.crt")).unwrap();
    let line = "cat /etc/hostname /var/lib/ca-certificates/ca-bundle.pem";
    job.is_customized(line, &format!("rpm-local\n{}", authority.trim_end()));
}

#[test]
fn ordinary_container_builds_a_recipe_of_rpm_packages() {
    let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
    let at = |name: &str| dir.path().join(name);
    certificates(dir.path());
    let volume = format!("{}:/mnt/image", dir.path().display());
    let certificate = format!("{}:/etc/cray/ca/certificate_authority.crt", at("ca.crt").display());
    // The container's own packages: what is tried is the container, not the recipe.
    let script = "set -e; mkdir /repository; cd /repository
        for spec in /recipe/specs/*.spec; do
            rpmbuild -bb --quiet --nodeps --define '_rpmdir /repository' --define 'busybox /bin/busybox' \"$spec\"; done
        createrepo_c --quiet .; ims-sshd fetch-recipe /mnt/image/recipe /recipe --set PACKAGE_MANAGER=zypper \
            --set REPOSITORY=dir:///repository; ims-sshd build";
    let recipe = format!("{}:/recipe:ro", repository().join("tests/recipe/rpm-local").display());
    let busybox = format!("{}:/bin/busybox:ro", std::fs::canonicalize("/bin/busybox").unwrap().display());
    let mut build = podman(&["run", "--rm", "--network=none", "--entrypoint=/bin/sh"]);
    for place in [&volume, &certificate, &recipe, &busybox] {
        build.args(["--volume", place]);
    }
    succeed(build.args([BUILDER, "-c", script]));
    let read = |name: &str| std::fs::read_to_string(at("build/image-root").join(name)).unwrap();
    assert_eq!(read("etc/hostname"), "rpm-local\n");
    assert_eq!(read("var/lib/ca-certificates/ca-bundle.pem"), std::fs::read_to_string(at("ca.crt")).unwrap());
}
