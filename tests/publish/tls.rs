//! TLS: the server's certificate is verified unless that is switched off.

use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::s3_server::Bucket;
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::*;

#[test]
fn server_certificate_is_verified_against_ca_cert() {
    let dir = directory();
    certificates(dir.path());
    let server = FileServer::start(std::fs::read(squashfs_of(&image(dir.path()))).unwrap(), &[]);
    let tls = Tls::start(dir.path(), port_of(&server.url));
    let url = format!("https://127.0.0.1:{}/rootfs", tls.port);
    let parent = dir.path().join("parent");
    let mut command = ims_sshd(&["prepare", parent.to_str().unwrap(), &url], &[("IMS_RETRY_LIMIT", "1".into())]);
    let refused = command.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("certificate"), "{}", text(&refused.stderr));
    let output = command.env("CA_CERT", dir.path().join("ca.crt")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(parent.join("image-root/etc/passwd").exists());
}

#[test]
fn store_certificate_is_verified_unless_s3_ssl_validate_is_false() {
    let dir = directory();
    certificates(dir.path());
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let bucket = Bucket::new();
    let tls = Tls::start(dir.path(), port_of(&bucket.endpoint));
    let authority = dir.path().join("ca.crt").display().to_string();
    let nowhere = "/nowhere".to_owned();
    for (validate, ca, bundle, goes) in [
        ("true", &nowhere, "", false),
        ("true", &authority, "", true),
        (authority.as_str(), &nowhere, "", true),
        ("", &nowhere, authority.as_str(), true),
        ("False", &nowhere, "", true),
    ] {
        let mut variables = bucket.variables();
        variables.push(("S3_ENDPOINT", format!("https://127.0.0.1:{}", tls.port)));
        variables.push(("S3_SSL_VALIDATE", validate.into()));
        variables.push(("CA_CERT", ca.clone()));
        variables.push(("AWS_CA_BUNDLE", bundle.into()));
        variables.push(("IMS_RETRY_LIMIT", "2".into()));
        let mut command = ims_sshd(&["upload", "--archive"], &variables);
        let output = command.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
        assert_eq!(output.status.success(), goes, "{validate} {ca} {bundle}: {}", text(&output.stderr));
        assert!(goes || text(&output.stderr).contains("certificate"), "{}", text(&output.stderr));
    }
    assert_eq!(bucket.keys().len(), 4 * 5);
}
