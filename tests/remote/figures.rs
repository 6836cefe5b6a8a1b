//! Times of a remote job beside a local one and scp. They are no test, since the machine may do other things:
//! `cargo test --release --test remote figures -- --ignored --nocapture`.

use std::process::Command;
use std::time::{Duration, Instant};

use testbed::node::Lab;
use testbed::*;

use crate::remote::Remote;

/// Median of some runs.
fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..15)
        .map(|_| {
            let began = Instant::now();
            run();
            began.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "measures"]
fn figures() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let environment = Volume::new(Image::Busybox).start(Mode::Jailed);
    wait_until("it to wait", || environment.log_text().contains("waiting for 'ready'"));
    let began = Instant::now();
    let _environment = environment.ready();
    let local = began.elapsed();

    let open = || {
        let mut remote = Remote::large(&lab, node);
        remote.start(&[]);
        remote.wait_for_log("waiting for 'ready'");
        let began = Instant::now();
        remote.job.volume.touch("ready");
        remote.wait_for("sshd_listening");
        (began.elapsed(), remote)
    };
    let (first, remote) = open();
    drop(remote);
    let image = lab.dir.path().join("image");
    let mut copy = Command::new("cp");
    let (second, remote) = open();
    succeed(copy.arg(remote.job.volume.signal("image.sqsh")).arg(&image));
    let mut scp = lab.command("scp");
    scp.args(ssh_options(&lab.dir.path().join("own-key"))).arg(&image).arg(format!("root@{}:/tmp/image", node.address));
    let began = Instant::now();
    succeed(&mut scp);
    let sent = began.elapsed();
    std::fs::remove_file(node.path("/tmp/image")).unwrap();

    let through = median(|| drop(remote.says("true")));
    let direct = median(|| assert!(lab.ssh(node, "true").status.success()));
    let mut remote = remote;
    let began = Instant::now();
    lab.cut(node);
    println!("cut within {:?}", began.elapsed());
    remote.fails(1, "cannot go on with the job");
    let lost = began.elapsed();
    lab.mend(node);

    let limit = local + sent.div_f64(0.9) + Duration::from_millis(500);
    println!(
        "open: local {local:?}, on the node {first:?} with the program, {second:?} without (200 MB; limit {limit:?})"
    );
    println!("scp of the image: {sent:?}");
    println!("ssh true: through the pod {through:?}, to the node's own sshd {direct:?}");
    println!("loss noticed after {lost:?} (limit 5 s + 2 s)");
    assert!(second <= limit);
    assert!(through <= direct + Duration::from_millis(5));
    // The job was there until then.
    assert!(lost > Duration::from_secs(1) && lost <= Duration::from_secs(7), "{}", remote.log());
}
