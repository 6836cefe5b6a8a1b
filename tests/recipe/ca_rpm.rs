//! The package of the site's certificate authority, installed by the real rpm.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use testbed::ims_server::ImsServer;
use testbed::job::*;
use testbed::tls_server::certificates;
use testbed::*;

const FILE: &str = "cray_ca_cert-1.0.1-1.noarch.rpm";

fn make(certificate: &Path, to: &Path) -> PathBuf {
    let arguments = ["ca-rpm", certificate.to_str().unwrap(), "--output", to.to_str().unwrap()];
    let output = ims_sshd(&arguments, &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    to.join(FILE)
}

/// A package whose tool makes one file of the certificates in `anchors`.
fn tool(dir: &Path, name: &str, anchors: &str) -> PathBuf {
    let spec = format!(
        "Name: ca-certificates\nVersion: 1\nRelease: 1\nSummary: s\nLicense: MIT\nBuildArch: noarch\n\
         %description\nd\n%install\nmkdir -p %{{buildroot}}/usr/sbin\n\
         printf '#!/bin/sh\\ncat {anchors}/* > /bundle\\n' > %{{buildroot}}/usr/sbin/{name}\n\
         chmod 755 %{{buildroot}}/usr/sbin/{name}\n%files\n/usr/sbin/{name}\n"
    );
    let top = dir.join(name);
    std::fs::create_dir(&top).unwrap();
    std::fs::write(top.join("a.spec"), spec).unwrap();
    let define = |name: &str, path: &Path| format!("{name} {}", path.display());
    let mut build = Command::new("rpmbuild");
    build.args(["-bb", "--quiet", "--define", &define("_topdir", &top), "--define", &define("_rpmdir", &top)]);
    succeed(build.args(["--define", &define("_dbpath", &top.join("db"))]).arg(top.join("a.spec")));
    top.join("noarch/ca-certificates-1-1.noarch.rpm")
}

fn rpm(root: &Path, arguments: &[&str], packages: &[&Path]) -> String {
    let mut rpm = Command::new("rpm");
    rpm.arg("--root").arg(root).args(["--dbpath", "/var/lib/rpm", "--force-debian"]).args(arguments).args(packages);
    let output = rpm.output().unwrap();
    assert!(output.status.success(), "{rpm:?}: {}", text(&output.stderr));
    text(&output.stdout) + &text(&output.stderr)
}

#[test]
fn authority_is_in_the_store_of_suse_and_rhel_in_any_order() {
    let dir = directory();
    certificates(dir.path());
    let certificate = dir.path().join("ca.crt");
    let package = make(&certificate, dir.path());
    let families = [
        tool(dir.path(), "update-ca-certificates", "/usr/share/pki/trust/anchors"),
        tool(dir.path(), "update-ca-trust", "/etc/pki/ca-trust/source/anchors"),
    ];
    let mut number = 0;
    for tool in &families {
        let orders: [&[&[&Path]]; 4] =
            [&[&[tool], &[&package]], &[&[&package], &[tool]], &[&[tool, &package]], &[&[&package, tool]]];
        for order in orders {
            number += 1;
            let root = dir.path().join(format!("root-{number}"));
            succeed(Command::new("cp").arg("-aT").arg(Image::Busybox.root()).arg(&root));
            for packages in order {
                // The busybox tree is not a package, so that nothing provides /bin/sh.
                let said = rpm(&root, &["-i", "--nodeps"], packages);
                assert!(!said.contains("scriptlet"), "{said}");
            }
            let bundle = std::fs::read(root.join("bundle")).unwrap_or_default();
            assert!(bundle == std::fs::read(&certificate).unwrap(), "{tool:?} {order:?}");
        }
    }
    // Without a tool it installs all the same.
    let root = dir.path().join("root");
    succeed(Command::new("cp").arg("-aT").arg(Image::Busybox.root()).arg(&root));
    let said = rpm(&root, &["-i", "--nodeps"], &[&package]);
    assert!(!said.contains("scriptlet"), "{said}");
    assert_eq!(rpm(&root, &["-V", "--nodeps", "cray_ca_cert"], &[]), "");
}

#[test]
fn package_is_reproducible_and_has_the_name_and_paths_of_upstreams() {
    let dir = directory();
    certificates(dir.path());
    let certificate = dir.path().join("ca.crt");
    let [one, two] = ["one", "two"].map(|name| std::fs::read(make(&certificate, &dir.path().join(name))).unwrap());
    assert!(one == two);
    let file = dir.path().join("one").join(FILE);
    let query = |arguments: &[&str]| succeed(Command::new("rpm").arg("-qp").args(arguments).arg(&file));
    assert_eq!(query(&["--qf", "%{NEVRA} %{LICENSE}"]), "cray_ca_cert-1.0.1-1.noarch MIT");
    assert_eq!(
        query(&["--qf", "[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}\n]"]),
        "/etc/pki/ca-trust/source/anchors/cray_certificate_authority.crt -rw-r--r-- root\n\
         /usr/share/pki/trust/anchors/cray_certificate_authority.crt -rw-r--r-- root\n"
    );
    let said = succeed(Command::new("rpm").arg("-Kv").arg(&file));
    assert!(said.contains("digest: OK") && !said.contains("BAD"), "{said}");
}

#[test]
fn script_of_the_pods_container_is_replaced_and_its_failure_reaches_ims() {
    let dir = directory();
    certificates(dir.path());
    let ims = ImsServer::start();
    let script = dir.path().join("build_ca_rpm.py");
    symlink(&*IMS_SSHD, &script).unwrap();
    let specification = dir.path().join("cray_ca_cert.spec");
    std::fs::write(&specification, "Name: cray_ca_cert\nVersion: 1.0.1\nRelease: 1\nRequires: openssl\n").unwrap();
    let run = |ca: &str| {
        let mut command = Command::new(&script);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("CA_CERT", dir.path().join(ca)).envs(ims.variables());
        command.arg("--output").arg(dir.path().join("ca-rpm")).arg("--specification").arg(&specification);
        command.output().unwrap()
    };
    let output = run("ca.crt");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("is not used: Requires: openssl"), "{}", text(&output.stderr));
    assert!(dir.path().join("ca-rpm").join(FILE).exists());
    assert_eq!(ims.statuses(), [""; 0]);
    std::fs::write(dir.path().join("empty.crt"), "nothing").unwrap();
    let output = run("empty.crt");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("it holds no certificate"), "{}", text(&output.stderr));
    assert_eq!(ims.statuses(), ["error"]);
    let both = ["ca.crt", "server.key"].map(|name| std::fs::read_to_string(dir.path().join(name)).unwrap());
    std::fs::write(dir.path().join("both.pem"), both.concat()).unwrap();
    succeed(Command::new("mkfifo").arg(dir.path().join("fifo")));
    succeed(Command::new("truncate").args(["-s", "1T"]).arg(dir.path().join("sparse")));
    std::fs::remove_file(dir.path().join("ca-rpm").join(FILE)).unwrap();
    for (wrong, why) in [
        ("both.pem", "it holds a private key"),
        ("fifo", "it is a fifo"),
        ("sparse", "larger than"),
        ("/dev/zero", "it is a character device"),
    ] {
        let output = run(wrong);
        assert_eq!(output.status.code(), Some(1), "{wrong}");
        assert!(text(&output.stderr).contains(why), "{}", text(&output.stderr));
        assert!(!dir.path().join("ca-rpm").join(FILE).exists());
    }
}
