//! A site's configuration for its pods holds on a node as well, or the job is refused before anything is sent.

use std::process::Command;

use testbed::node::Lab;
use testbed::*;

use crate::remote::Remote;

#[test]
fn customization_script_runs_on_the_node() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    let script = remote.job.volume.dir.path().join("script");
    let text = "echo \"ö $IMS_JOB_ID\" >$IMAGE_ROOT_PARENT/image-root/etc/by-script\n\
                echo said by it\ntouch $IMAGE_ROOT_PARENT/complete\n";
    std::fs::write(&script, text).unwrap();
    remote.job.volume.touch("ready");
    remote.start(&[("CUSTOMIZATION_SCRIPT", script.to_str().unwrap())]);
    assert_eq!(remote.end(), 0, "{}", remote.log());
    assert!(remote.log().contains("customization script: said by it"), "{}", remote.log());
    let mut changed = Command::new("unsquashfs");
    let changed = succeed(changed.arg("-cat").arg(remote.job.volume.signal("transfer.sqsh")).arg("etc/by-script"));
    assert_eq!(changed, format!("ö {}\n", remote.id()));

    let mut remote = Remote::new(&lab, node, Mode::Plain);
    std::fs::write(&script, "#!/bin/sh\nexit 7\n").unwrap();
    remote.job.volume.touch("ready");
    remote.start(&[("CUSTOMIZATION_SCRIPT", script.to_str().unwrap())]);
    remote.end();
    assert!(remote.job.volume.signal("failed").exists(), "{}", remote.log());
    assert!(remote.log().contains("exit code 7"), "{}", remote.log());
    node.is_as_before(&before);
}

#[test]
fn site_configuration_of_sshd_holds_on_the_node() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    let config = std::fs::read_to_string(&remote.job.volume.config).unwrap();
    let site = "DisableForwarding yes\nAcceptEnv SITE_*\nSetEnv SITES=\"a b\"\nMaxAuthTries 3\nUseDNS yes\n";
    std::fs::write(&remote.job.volume.config, format!("{site}{config}")).unwrap();
    remote.open();
    // Only the address that the configuration names.
    let port = remote.job.volume.port;
    let reaches = |address: &str| {
        let (address, port) = (address.to_owned(), port.to_string());
        let mut connect = lab.command("bash");
        connect.args(["-c", "exec 3<>/dev/tcp/$0/$1", &address, &port]).output().unwrap().status.success()
    };
    assert!(reaches("127.0.0.1") && !reaches("127.0.0.2"), "{}", remote.log());
    // The node's own sshd would greet.
    let through = remote.ssh(&["-W", "127.0.0.1:22"]).output().unwrap();
    assert_eq!(text(through.stdout), "", "{}", text(through.stderr));
    let mut sending = remote.ssh(&["-o", "SendEnv=SITE_VALUE"]);
    let said = succeed(sending.env("SITE_VALUE", "sent").arg("echo \"$SITE_VALUE $SITES\""));
    assert_eq!(said, "sent a b\n");
    assert!(remote.log().contains("usedns yes"), "{}", remote.log());
    remote.run("touch /tmp/failed");
    assert_eq!(remote.end(), 0, "{}", remote.log());
}

#[test]
fn what_cannot_hold_on_a_node_is_refused_before_anything_is_sent() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    for (site, words) in [
        ("DenyUsers root@192.0.2.9\n", "DenyUsers"),
        ("AllowUsers root@192.0.2.*\n", "AllowUsers"),
        ("RevokedKeys /etc/ssh/revoked\n", "RevokedKeys"),
        ("Match Address 192.0.2.0/24\nPermitTTY no\nMatch all\n", "Match Address"),
        ("from=\"192.0.2.9\" ", "from="),
    ] {
        let mut remote = Remote::new(&lab, node, Mode::Jailed);
        let (config, keys) = (&remote.job.volume.config, remote.job.volume.dir.path().join("authorized_keys"));
        let file = if site.starts_with("from") { &keys } else { config };
        let text = std::fs::read_to_string(file).unwrap();
        std::fs::write(file, format!("{site}{text}")).unwrap();
        remote.job.volume.touch("ready");
        remote.start(&[]);
        remote.fails(1, words);
        assert!(!remote.log().contains("connect"), "{}", remote.log());
    }
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.start(&[("IMS_JAIL_BINDS", "/opt:/opt:ro")]);
    remote.fails(2, "IMS_JAIL_BINDS");
    assert!(!node.path("/var/lib/ims-sshd").exists());
    node.is_as_before(&before);
}
