//! People and programs find on a node what they find in a pod, through the pod's port.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::node::{Lab, NodeOptions};
use testbed::*;

use crate::remote::Remote;

/// Names of boot files are searched for: the image has none.
const AUTO: (&str, &str) = ("KERNEL_FILENAME", "auto");

fn open(lab: &Lab, mode: Mode) -> Remote<'_> {
    let mut remote = Remote::managed(lab, &lab.nodes[0], mode);
    remote.start(&[AUTO]);
    remote.job.volume.touch("ready");
    remote.wait_for("sshd_listening");
    remote
}

#[test]
fn ssh_sftp_scp_terminals_and_the_clients_agent_work_on_a_node() {
    let lab = Lab::new();
    let before = lab.nodes[0].state();
    let dir = directory();
    let socket = dir.path().join("agent");
    let agent = Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn().unwrap();
    let _agent = Ended::new(agent);
    wait_until("the agent to listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    for mode in [Mode::Jailed, Mode::Plain] {
        let remote = open(&lab, mode);
        for (command, code) in [("true", 0), ("exit 7", 7), ("exit 255", 255), ("kill -KILL $$", 255)] {
            assert_eq!(remote.run(command).status.code(), Some(code), "{command}");
        }
        let output = remote.run("echo out; echo error >&2");
        assert_eq!((text(&output.stdout), text(&output.stderr)), ("out\n".into(), "error\n".into()));
        let data: Vec<u8> = (0..3_000_000_u32).map(|at| at.to_le_bytes()[1]).collect();
        assert!(feed(remote.ssh(&[]).arg("cat"), &data).stdout == data);
        let terminal = remote.ssh(&["-tt"]).arg("tty; test -t 0 && test -t 1").output().unwrap();
        assert!(terminal.status.success() && text(&terminal.stdout).starts_with("/dev/pts/"), "{terminal:?}");

        let (given, came) = (dir.path().join("given"), dir.path().join("came"));
        std::fs::write(&given, &data).unwrap();
        let options = ssh_options(&remote.job.volume.key);
        let port = remote.job.volume.port.to_string();
        let batch = format!("put {} /root/by-sftp\nget /root/by-sftp {}\n", given.display(), came.display());
        let mut sftp = lab.command("sftp");
        let output = feed(sftp.args(&options).args(["-b", "-", "-P", &port, "root@127.0.0.1"]), batch.as_bytes());
        assert!(output.status.success(), "{output:?}");
        assert!(std::fs::read(&came).unwrap() == data);
        for old in [&["-O"][..], &[]] {
            let mut scp = lab.command("scp");
            scp.args(&options).args(old).args(["-P", &port]).arg(&given).arg("root@127.0.0.1:/root/by-scp");
            succeed(&mut scp);
            assert_eq!(remote.says("cmp /root/by-scp /root/by-sftp; rm /root/by-scp"), "");
        }

        let of_agent = |command: &mut Command| succeed(command.env("SSH_AUTH_SOCK", &socket));
        of_agent(Command::new("ssh-add").arg("-q").arg(&remote.job.volume.key));
        let keys = of_agent(Command::new("ssh-add").arg("-l"));
        assert_eq!(of_agent(remote.ssh(&["-A"]).arg("ssh-add -l")), keys);
        of_agent(Command::new("ssh-add").args(["-q", "-D"]));
        std::fs::write(remote.job.volume.signal("failed"), "").unwrap();
        drop(remote);
        lab.nodes[0].is_as_before(&before);
    }
}

/// A play as the manual has it, whose last task marks the image.
const PLAY: &str = "\
- hosts: all
  tasks:
    - copy: { content: copied, dest: /root/copied }
    - command: cat /root/copied
      register: said
    - assert: { that: said.stdout == 'copied' }
    - shell: exit 7
      register: failing
      failed_when: failing.rc != 7
    - assert: { that: ansible_env.REMOTE_BUILD_NODE == node }
    - file: { path: /tmp/complete, state: touch }
      when: marks | bool
";

/// CFS before and after its plays: a probe, and a mark whose connection is closed at once.
const CFS: &str = "\
import paramiko, sys
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect('127.0.0.1', port=int(sys.argv[1]), username='root', key_filename=sys.argv[2], timeout=5)
_, out, _ = client.exec_command(sys.argv[3])
if sys.argv[3].startswith('echo'):
    assert out.channel.recv_exit_status() == 0 and out.read() == b'/root\\n'
client.close()
";

#[test]
fn ansible_by_default_and_the_sequence_of_cfs_complete_an_image_on_a_node() {
    let lab = Lab::new();
    let before = lab.nodes[0].state();
    for is_cfs in [false, true] {
        let mut remote = open(&lab, Mode::Jailed);
        let dir = directory();
        let write = |name: &str, text: &str| -> PathBuf {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let cfs = |command: &str| {
            let mut python = lab.command("/usr/bin/python3");
            python.args(["-W", "ignore", "-c", CFS, &remote.job.volume.port.to_string()]);
            succeed(python.arg(&remote.job.volume.key).arg(command));
        };
        let host = format!(
            "node ansible_host=127.0.0.1 ansible_port={} ansible_user=root ansible_ssh_private_key_file={}\n",
            remote.job.volume.port,
            remote.job.volume.key.display()
        );
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/ansible/ansible.cfg");
        let config = if is_cfs { own } else { write("ansible.cfg", "[defaults]\n") };
        let mut ansible = lab.command("ansible-playbook");
        ansible.env("ANSIBLE_CONFIG", config).env("ANSIBLE_HOME", dir.path()).env("ANSIBLE_HOST_KEY_CHECKING", "False");
        ansible.env("ANSIBLE_LOCAL_TEMP", dir.path().join("local")).env("LC_ALL", "C.UTF-8");
        ansible.arg("-i").arg(write("hosts", &host)).args(["-e", &format!("node={}", remote.node.address)]);
        ansible.args(["-e", &format!("marks={}", !is_cfs)]).arg(write("play.yml", PLAY)).stdin(Stdio::null());
        if is_cfs {
            cfs("echo ~root && sleep 0");
        }
        let output = ansible.output().unwrap();
        assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
        if is_cfs {
            cfs("touch /tmp/complete");
        }
        assert_eq!(remote.end(), 0, "{}", remote.log());
        let packed = remote.job.volume.signal("transfer.sqsh");
        assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(packed).arg("root/copied")), "copied");
        lab.nodes[0].is_as_before(&before);
    }
}

/// What IMS asks each node at every job.
#[test]
fn ims_finds_the_node_able_and_counts_its_jobs() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    // As docs/REMOTE_NODES.md has it for a Debian.
    for (path, text) in [
        ("/usr/local/bin/uname", "#!/bin/sh\n[ \"$*\" != -i ] || exec /usr/bin/uname -m\nexec /usr/bin/uname \"$@\"\n"),
        ("/usr/bin/podman", "#!/bin/sh\n"),
    ] {
        std::fs::write(node.path(path), text).unwrap();
        std::fs::set_permissions(node.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let says = |command: &str| text(lab.ssh(node, command).stdout).trim().to_owned();
    let load = || says("ls -d1 /tmp/* | grep /tmp/ims_ | wc -l");
    assert!(says("uname -i").contains("x86"));
    assert!(says("which podman").contains("/usr/bin/podman"));
    assert_eq!(load(), "0");
    let mut jobs: Vec<_> = [Mode::Jailed, Mode::Plain].map(|mode| Remote::new(&lab, node, mode)).into();
    for (number, job) in jobs.iter_mut().enumerate() {
        job.open();
        assert_eq!(load(), (number + 1).to_string());
    }
    for job in &mut jobs {
        std::fs::write(job.job.volume.signal("failed"), "").unwrap();
        assert_eq!(job.end(), 0, "{}", job.log());
    }
    assert_eq!(load(), "0");
}

#[test]
fn job_beside_a_real_podman_is_counted_and_touches_nothing_of_it() {
    let lab = Lab::with(&[NodeOptions { can_build: true, ..NodeOptions::default() }]);
    let node = &lab.nodes[0];
    assert!(node.path("/usr/bin/podman").metadata().unwrap().len() > 1 << 20, "install podman");
    let says = |command: &str| {
        let output = lab.ssh(node, command);
        assert!(output.status.success(), "{command}: {output:?}");
        text(output.stdout).trim().to_owned()
    };
    assert!(says("which podman").contains("/usr/bin/podman"));
    let podman = "podman --storage-driver=vfs --root=/var/lib/administrator";
    says(&format!("{podman} volume create unused"));
    says(&format!("tar -C {} -c . | {podman} import -q - localhost/administrator", cache().join("busybox").display()));
    let objects = || {
        let lists = ["volume ls -q", "images -q", "ps -a -q"].map(|list| format!("{podman} {list}"));
        says(&lists.join(" && "))
    };
    let (own, before) = (objects(), node.state());
    assert!(own.contains("unused"), "{own}");
    for (number, mark) in ["complete", "failed"].into_iter().enumerate() {
        let mut remote = Remote::new(&lab, node, if number == 0 { Mode::Jailed } else { Mode::Plain });
        remote.open();
        assert_eq!(says("ls -d1 /tmp/* | grep /tmp/ims_ | wc -l"), "1");
        remote.job.volume.touch(mark);
        assert_eq!(remote.end(), 0, "{}", remote.log());
        node.is_as_before(&before);
    }
    assert_eq!(objects(), own);
}

/// Attempts that SECURITY.md does not claim to defend against.
const NOT_DEFENDED: &str = "abstract-socket";

#[test]
fn hostile_image_leaves_the_jail_on_a_node_as_little_as_in_a_pod() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let program = Path::new(&IMS_SSHD).with_file_name("examples").join("attempts");
    assert!(program.exists(), "no attempts: 'cargo build --example attempts' makes them");
    std::fs::copy(&program, node.path("/root/attempts")).unwrap();
    std::fs::create_dir(node.path("/root/decoys")).unwrap();
    let mut decoys = Command::new("nsenter");
    decoys.args(["-t", &node.pid.to_string(), "-a", "/root/attempts", "decoys", "/root/decoys"]);
    let mut decoys = decoys.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(decoys.stdout.take().unwrap())).map(Result::unwrap);
    let mut variables: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
    let secret = std::fs::read_to_string(node.path("/root/decoys/file")).unwrap();
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.open();
    variables.push("OUTSIDE_CONTROL=/run/ims-sshd/mnt-image/control".into());
    let line = shell_words::join(["env"].into_iter().chain(variables.iter().map(String::as_str)));
    let mut scp = lab.command("scp");
    scp.args(ssh_options(&remote.job.volume.key)).args(["-P", &remote.job.volume.port.to_string()]);
    succeed(scp.arg(&program).arg("root@127.0.0.1:/root/attempts"));
    let output = remote.run(&format!("{line} /root/attempts all"));
    let said = text(&output.stdout);
    let bad =
        said.lines().filter(|line| !line.starts_with("held\t") && !line.starts_with(&format!("OUT\t{NOT_DEFENDED}\t")));
    assert_eq!(bad.collect::<Vec<_>>(), [""; 0], "{said}{}", text(&output.stderr));
    assert!(said.lines().count() > 30, "{said}");
    assert_eq!(std::fs::read_to_string(node.path("/root/decoys/file")).unwrap(), secret);
    std::fs::write(remote.job.volume.signal("failed"), "").unwrap();
    assert_eq!(remote.end(), 0, "{}", remote.log());
    drop(decoys.stdin.take());
    let _ = decoys.wait();
}
