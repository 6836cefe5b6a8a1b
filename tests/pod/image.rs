//! Content of the container image, and its errors when it is started wrongly.

use std::collections::BTreeSet;

use testbed::repository;

use crate::podman::*;

#[test]
fn entrypoint_without_a_volume_says_what_is_missing() {
    let output = output(&mut podman(&["run", "--rm", "--network=none", IMAGE]));
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("IMS_ACTION is not set"), "{said}");
    assert!(said.contains("/mnt/image does not exist"), "{said}");
}

#[test]
fn entrypoint_sh_is_the_same() {
    let output = output(&mut podman(&["run", "--rm", "--network=none", "--entrypoint=/entrypoint.sh", IMAGE]));
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("IMS_ACTION is not set"), "{output:?}");
}

#[test]
fn it_runs_an_image_root_for_aarch64_with_what_a_jail_needs() {
    let image_root = format!("{}:/mnt/image/image-root:O", cache().join("debian-arm64").display());
    let enter = ["--entrypoint=ims-sshd", IMAGE, "enter", "/mnt/image/image-root", "--", "uname", "-m"];
    // In the tiers that these capabilities allow: namespace and user.
    for capabilities in [&["--cap-add=SYS_ADMIN,SYS_PTRACE"][..], &[]] {
        let mut container = podman(&["run", "--rm", "--network=none", "--volume", &image_root]);
        assert_eq!(succeed(container.args(capabilities).args(enter)), "aarch64", "{capabilities:?}");
    }
}

#[test]
fn it_has_no_file_that_everybody_can_write_to() {
    assert_eq!(in_image("find / -xdev ! -type l -perm -0002 ! -perm -1000 ! -path '/proc/*' ! -path '/dev/*'"), "");
}

#[test]
fn it_has_no_setuid_program_beyond_the_distributions() {
    let list = "find / -xdev -type f -perm /6000 ! -path '/proc/*' | sort";
    let base = in_container(BASE, list);
    let image = in_container(IMAGE, list);
    let own: Vec<_> = image.lines().filter(|path| !base.lines().any(|other| other == *path)).collect();
    // Setuid programs of Debian's package openssh-client.
    assert_eq!(own, ["/usr/bin/ssh-agent", "/usr/lib/openssh/ssh-keysign"]);
    in_image("dpkg --verify openssh-client");
    assert_eq!(in_image("find /usr/bin/ims-sshd /usr/bin/ims-jail-shell /usr/bin/qemu-* ! -perm 0755"), "");
}

#[test]
fn it_has_no_key() {
    assert_eq!(in_image("ls -A /etc/ssh | grep host_key || true"), "");
    assert_eq!(in_image("grep -rlE 'BEGIN [A-Z ]*PRIVATE KEY' /etc /root /home /run /var /opt /srv || true"), "");
    assert_eq!(in_image("find / -xdev -name authorized_keys"), "");
}

#[test]
fn it_has_no_tool_to_build_with_and_only_the_packages_that_it_needs() {
    let tools = "for t in cc gcc ld as make cargo rustc perl-build git curl wget; do command -v $t || true; done";
    assert_eq!(in_image(tools), "");
    let packages = |image: &str| -> BTreeSet<String> {
        let query = ["run", "--rm", "--network=none", "--entrypoint=dpkg-query", image, "-W", "-f", "${Package}\n"];
        succeed(&mut podman(&query)).lines().map(str::to_owned).collect()
    };
    let (base, image) = (packages(BASE), packages(IMAGE));
    let added: Vec<_> = image.difference(&base).map(String::as_str).collect();
    assert_eq!(added, ADDED);
}

/// Packages named in the Dockerfile, and their dependencies.
const ADDED: [&str; 30] = [
    "bzip2",
    "ca-certificates",
    "libbsd0",
    "libcbor0.8",
    "libedit2",
    "libfido2-1",
    "libgssapi-krb5-2",
    "libk5crypto3",
    "libkeyutils1",
    "libkrb5-3",
    "libkrb5support0",
    "liblzo2-2",
    "libncursesw6",
    "libnsl2",
    "libproc2-0",
    "libssl3",
    "libtirpc-common",
    "libtirpc3",
    "libwrap0",
    "openssh-client",
    "openssh-server",
    "openssh-sftp-server",
    "openssl",
    "procps",
    "runit-helper",
    "sensible-utils",
    "squashfs-tools",
    "ucf",
    "xz-utils",
    "zstd",
];

#[test]
fn its_labels_and_files_tell_what_it_is() {
    let labels = succeed(&mut podman(&["image", "inspect", "--format", "{{json .Labels}}", IMAGE]));
    let labels: serde_json::Value = serde_json::from_str(&labels).unwrap();
    let label = |name: &str| labels[format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default().to_owned();
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));
    assert_eq!(label("licenses"), "MIT");
    assert!(!label("source").is_empty() && !label("created").is_empty());
    assert_eq!(label("base.name"), BASE);
    assert_eq!(in_image("cat /gitInfo.txt"), label("revision"));
    assert_eq!(in_image("ims-sshd --version"), concat!("ims-sshd ", env!("CARGO_PKG_VERSION")));
    assert_eq!(in_image("wc -c < /run_script.sh; readlink /entrypoint.sh"), "0\n/usr/bin/ims-sshd");
    let other = if cfg!(target_arch = "aarch64") { "x86_64" } else { "aarch64" };
    assert!(in_image(&format!("qemu-{other}-static --version")).contains("version"));
}

#[test]
fn it_lists_what_it_consists_of() {
    let names = |file: &str| -> BTreeSet<String> {
        let text = in_image(&format!("cat /usr/share/doc/ims-sshd/{file}"));
        let bill: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&"CycloneDX".into(), &"1.5".into()), "{file}");
        assert_eq!(bill["metadata"]["component"]["version"], env!("CARGO_PKG_VERSION"), "{file}");
        let components = bill["components"].as_array().unwrap();
        components.iter().map(|component| component["name"].as_str().unwrap().to_owned()).collect()
    };
    let packages = in_image("dpkg-query -W -f '${Package}\\n'");
    assert_eq!(names("image.cdx.json"), packages.lines().map(str::to_owned).collect());
    let linked = names("sbom.cdx.json");
    assert!(["tokio", "rustls", "glibc", "rust-std"].iter().all(|name| linked.contains(*name)), "{linked:?}");
    // Paths of the machine that built it would differ from one to the next.
    assert_eq!(
        in_image("grep -c /usr/local/cargo/registry /usr/bin/ims-sshd /usr/bin/ims-jail-shell || true"),
        "/usr/bin/ims-sshd:0\n/usr/bin/ims-jail-shell:0"
    );
}

#[test]
fn it_has_the_licences_of_what_is_linked_into_its_programs() {
    assert_eq!(
        in_image(
            "cd /usr/share/doc/ims-sshd && head -n 1 LICENSE && grep -c '^GNU C library: LGPL' third-party-licenses.txt"
        ),
        "MIT License\n1"
    );
    assert!(in_image("cat /usr/share/doc/ims-sshd/rust-library.html").contains("The Rust Standard Library"));
}

/// IMS replaces /entrypoint.sh in its container for a remote build node, by a bash script under `#!/bin/sh`. This
/// script does, in such a container, what IMS's script does.
#[test]
fn a_container_that_ims_derives_from_it_for_a_remote_node_runs_its_script_to_the_end() {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    let (context, volume) = (dir.path().join("context"), dir.path().join("volume"));
    for directory in [&context, &volume] {
        std::fs::create_dir(directory).unwrap();
    }
    std::fs::copy(repository().join("tests/pod/remote-node.sh"), context.join("entrypoint.sh")).unwrap();
    succeed(
        std::process::Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=the site's own",
                "-keyout",
            ])
            .arg(dir.path().join("key"))
            .arg("-out")
            .arg(context.join("site.crt")),
    );
    succeed(
        std::process::Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(context.join("id")),
    );
    let file = format!(
        "FROM {IMAGE}\nCOPY entrypoint.sh /entrypoint.sh\nCOPY site.crt /etc/cray/ca/certificate_authority.crt\n\
         COPY id id.pub /root/.ssh/\nRUN chmod 755 /entrypoint.sh && cp /root/.ssh/id.pub /root/.ssh/authorized_keys\n\
         ENV IMS_JOB_ID=5ec3b0a1-job IMAGE_ROOT_PARENT=/mnt/image SSH_JAIL=True\nENTRYPOINT [\"/entrypoint.sh\"]\n"
    );
    std::fs::write(context.join("Dockerfile"), file).unwrap();
    std::fs::copy(cache().join("containers/debian.sqsh"), volume.join("image.sqsh")).unwrap();
    let name = "localhost/ims-sshd-test/remote:latest";
    succeed(podman(&["build", "--quiet", "--isolation=chroot", "--network=host", "--tag", name]).arg(&context));
    let place = format!("{}:/mnt/image", volume.display());
    let container =
        succeed(&mut podman(&["run", "--detach", "--privileged", "--network=none", "--volume", &place, name]));
    let running = || succeed(&mut podman(&["inspect", "--format", "{{.State.Running}}", &container])) == "true";
    wait_until("sshd of the script", || volume.join("listening").exists() || !running());
    let login = "ssh -i /root/.ssh/id -o StrictHostKeyChecking=no root@localhost 'cat /etc/debian_version && touch /changed /tmp/complete'";
    let session = output(&mut podman(&["exec", &container, "sh", "-c", login]));
    if session.status.success() {
        wait_until("the end of the script", || !running());
    }
    let logs = output(&mut podman(&["logs", &container]));
    let code = succeed(&mut podman(&["inspect", "--format", "{{.State.ExitCode}}", &container]));
    succeed(&mut podman(&["rm", "--force", "--time=0", &container]));
    succeed(&mut podman(&["rmi", "--force", name]));
    assert!(session.status.success(), "{session:?} {logs:?}");
    assert_eq!(code, "0", "{logs:?}");
    assert!(
        volume.join("remote_exiting").exists() && volume.join("complete").exists() && !volume.join("failed").exists(),
        "{logs:?}"
    );
    assert!(String::from_utf8_lossy(&logs.stdout).contains("the site is trusted"), "{logs:?}");
    assert!(packed(&volume.join("transfer.sqsh")).iter().any(|path| path.ends_with("changed")), "{logs:?}");
}

#[test]
fn the_example_changes_an_image_by_itself() {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    succeed(
        std::process::Command::new("unsquashfs")
            .args(["-quiet", "-no-progress", "-d"])
            .arg(dir.path().join("image-root"))
            .arg(cache().join("containers/busybox.sqsh")),
    );
    std::fs::write(dir.path().join("ready"), "").unwrap();
    let volume = format!("{}:/mnt/image", dir.path().display());
    succeed(&mut podman(&[
        "run",
        "--rm",
        "--network=none",
        "--env=IMS_ACTION=customize",
        "--volume",
        &volume,
        EXAMPLE,
    ]));
    let motd = std::fs::read_to_string(dir.path().join("image-root/etc/motd")).unwrap();
    assert!(motd.contains("by an example"), "{motd}");
    assert!(dir.path().join("complete").exists() && dir.path().join("exiting").exists());
}

#[test]
fn it_is_small() {
    let size = |image: &str| -> u64 {
        succeed(&mut podman(&["image", "inspect", "--format", "{{.Size}}", image])).parse().unwrap()
    };
    let added = size(IMAGE) - size(BASE);
    // docs/PODS.md says 63 MB.
    assert!((56_000_000..67_000_000).contains(&added), "{added} bytes on top of the base");
}
