//! Nodes that keep a job waiting: they send keepalives, so that the connection is never lost, but not what is their turn.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use testbed::node::Lab;
use testbed::*;

use crate::remote::Remote;

/// In place of ssh: speaks as the program on the node, by the lines of Python in $SAYS.
pub const NODE: &str = r#"#!/usr/bin/python3
import json, os, sys, threading, time
if not sys.argv[-1].endswith(' node'):
    config = os.path.join(os.path.dirname(sys.argv[0]), '../config')
    own = ['-F', config] if os.path.exists(config) else []
    os.execv('/usr/bin/ssh', ['ssh'] + own + sys.argv[1:])
def put(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
def say(kind, **fields):
    put(json.dumps({'is': kind, **fields}).encode() + b'\n')
def beat(data=b''):
    while True:
        put(data + b'\n')
        time.sleep(0 if data else 0.2)
def hello():
    say('hello', arch='x86_64', kernel='6', free=1 << 40, refusals=[])
def source():
    while b'"is":"sum"' not in (line := sys.stdin.buffer.readline()):
        if line.startswith(b'@'):
            sys.stdin.buffer.read(int(line[1:]))
    # From here on, it ends as it is told to.
    threading.Thread(target=gone, daemon=True).start()
def listening():
    say('listening', port=22, host_key=os.environ['HOST_KEY'])
def closed(verdict='complete'):
    say('closed', verdict=verdict, exit_code=0)
def opened():
    hello(), source(), listening(), closed()
def file(part='image', data=b'hsqs', end=True):
    say('file', part=part, size=len(data) if end else 1 << 20)
    for at in range(0, len(data), 65536):
        part = data[at:at + 65536]
        put(b'@%d\n' % len(part) + part)
    if end:
        import hashlib
        say('sum', sha256=hashlib.sha256(data).hexdigest())
def gone():
    while b'"is":"end"' not in sys.stdin.buffer.readline():
        pass
    say('gone')
exec(os.environ['SAYS'])
"#;

/// Puts a program in the place of ssh. Returns its path, and the value of PATH by which it is found.
pub fn in_place_of_ssh(lab: &Lab, program: &str) -> (PathBuf, String) {
    let programs = lab.dir.path().join("programs");
    std::fs::create_dir(&programs).unwrap();
    let ssh = programs.join("ssh");
    std::fs::write(&ssh, program).unwrap();
    std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).unwrap();
    (ssh, format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display()))
}

/// A key that a node may show as the one of the environment's sshd.
pub fn host_key(lab: &Lab) -> String {
    let key = std::fs::read_to_string(lab.key.with_extension("pub")).unwrap();
    key.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn node_that_answers_out_of_order_or_with_keepalives_alone_fails_the_job_within_the_limit() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let (_, path) = in_place_of_ssh(&lab, NODE);
    let host_key = host_key(&lab);
    let silent = "nothing but keepalives was heard from the other side for 5 s";
    for (says, words) in [
        ("beat()", silent),
        ("hello(), beat()", silent),
        ("hello(), listening(), beat()", "it has sent 'listening' out of order"),
        ("hello(), source(), hello(), beat()", "it has sent 'hello' out of order"),
        ("hello(), source(), closed(), file(), say('sent'), beat()", "it has closed before anybody could log in"),
        ("hello(), source(), file(), beat()", "it has sent 'file' out of order"),
        ("hello(), source(), beat(b'{\"is\":\"report\",\"report\":null}')", "it has sent 'report' out of order"),
        ("hello(), source(), listening(), listening(), beat()", "it has sent 'listening' out of order"),
        ("opened(), closed(), beat()", "it has sent 'closed' out of order"),
        ("opened(), say('sent'), beat()", "it has sent no image"),
        ("opened(), file(end=False), beat()", silent),
        ("opened(), file('kernel'), beat()", silent),
        ("opened(), file(end=False), beat(b'@0')", "the length of data is wrong"),
        ("opened(), file(), say('sent'), beat(b'{\"is\":\"sent\"}')", "the node sent something after the last file"),
    ] {
        let large = says == "hello(), beat()";
        let mut remote = if large { Remote::large(&lab, node) } else { Remote::new(&lab, node, Mode::Jailed) };
        remote.start(&[("PATH", &path), ("SAYS", says), ("HOST_KEY", &host_key)]);
        remote.job.volume.touch("ready");
        remote.fails(1, words);
        let log = remote.log();
        assert!(log.contains(&format!("root@{}: ", node.address)), "{says}: the node is not named:\n{log}");
        node.is_as_before(&before);
    }
}
