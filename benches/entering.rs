//! Time to run a program in an existing jail, compared with tools that do the same and tools that create one each time.

use std::path::Path;
use std::process::Command;

use testbed::{Environment, IMS_JAIL_SHELL, IMS_SSHD, Image, Mode};

use crate::environments::{close, installed, least};
use crate::measure::in_turns;
use crate::peers::{self, Container, quiet};
use crate::report::BarChart;
use crate::{Bound, Report, Unit, ratios};

pub fn entering(runs: usize, report: &mut Report) {
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let (directory, root) = (environment.dir.path(), environment.image_root.as_path());
    let record = environment.state_directory().join("jail");
    let init = environment.jails_init().to_string();
    let (helper, least) = (installed(Path::new(&IMS_JAIL_SHELL), directory), least(directory));
    let container = Container::run(root, directory);

    let mut enter = quiet(&helper);
    enter.arg("enter").arg(&record).args(["--", "/bin/true"]);
    let mut c = quiet(&least);
    c.args([&init, "/bin/true"]);
    let mut nsenter = nsenter(&init, &["/bin/true"]);
    let mut chroot = quiet("chroot");
    chroot.arg(root).arg("/bin/true");
    let mut unshare = peers::unshare(root);
    let mut bwrap = peers::bwrap(root);
    let mut session = quiet(&helper);
    session.arg("session").arg(&record).env("SSH_ORIGINAL_COMMAND", "true");
    let in_shell = ["/bin/bash", "-c", "true"];
    let mut nsenter_shell = self::nsenter(&init, &in_shell);
    let mut c_shell = quiet(&least);
    c_shell.arg(&init).args(in_shell);
    let fast = [
        &mut enter,
        &mut c,
        &mut nsenter,
        &mut chroot,
        &mut unshare,
        &mut bwrap,
        &mut session,
        &mut nsenter_shell,
        &mut c_shell,
    ];
    let [entered, c, nsenter, chroot, unshare, bwrap, session, nsenter_shell, c_shell] = in_turns(runs * 20, fast);

    let mut nspawn = peers::nspawn(root);
    let mut exec = container.exec("/bin/true");
    let mut whole = quiet(&IMS_SSHD);
    whole.arg("enter").arg(root).args(["--", "/bin/true"]);
    let slow = [&mut enter, &mut nspawn, &mut exec, &mut whole];
    let [beside_slow, nspawn, exec, whole] = in_turns(runs * 2, slow);

    let bars = [
        ("a C program of 30 lines", &c),
        ("ims-jail-shell enter", &entered),
        ("chroot", &chroot),
        ("nsenter -m -p -i -u", &nsenter),
        ("unshare, chroot (creates it)", &unshare),
        ("bwrap (creates it)", &bwrap),
        ("ims-sshd enter (creates it)", &whole),
        ("systemd-nspawn (creates it)", &nspawn),
        ("podman exec", &exec),
    ];
    for (name, samples) in bars {
        report.add(&format!("{name}: `/bin/true`"), Unit::Milliseconds, samples.clone(), Bound::Information);
    }
    report.add("enter / the C program", Unit::Times, ratios(&entered, &c), Bound::Limit(1.15));
    report.add("enter / nsenter", Unit::Times, ratios(&entered, &nsenter), Bound::Limit(0.5));
    report.add("enter / chroot", Unit::Times, ratios(&entered, &chroot), Bound::Information);
    report.add("enter / unshare", Unit::Times, ratios(&entered, &unshare), Bound::Information);
    report.add("enter / bwrap", Unit::Times, ratios(&entered, &bwrap), Bound::Limit(0.3));
    report.add("enter / systemd-nspawn", Unit::Times, ratios(&beside_slow, &nspawn), Bound::Limit(0.05));
    report.add("enter / podman exec", Unit::Times, ratios(&beside_slow, &exec), Bound::Information);
    report.add("the C program / nsenter", Unit::Times, ratios(&c, &nsenter), Bound::Information);
    report.add("the C program / bwrap", Unit::Times, ratios(&c, &bwrap), Bound::Information);
    // Most of the time is the start of the shell itself.
    let of_shells = ratios(&session, &nsenter_shell);
    report.add("`true` in the image's bash, by ims-jail-shell", Unit::Milliseconds, session, Bound::Information);
    report.add("`true` in the image's bash, by the C program", Unit::Milliseconds, c_shell, Bound::Information);
    report.add("`true` in the image's bash: ims-jail-shell / nsenter", Unit::Times, of_shells, Bound::Limit(0.8));
    report.note(
        "All tools run `/bin/true` of the same Debian image root: the first four and `podman exec` in an \
         existing jail, root or container, the others in one that they create. The C program, \
         `benches/enter.c`, makes only the necessary calls: setns, fork, exec, wait. nspawn and podman \
         alternate with `enter` in separate rounds. No program can enter a jail faster than the C program, so \
         a limit below its ratio cannot be reached on that machine.",
    );
    report.bars(BarChart {
        file: "entering",
        title: "Enter and run /bin/true",
        axis: "milliseconds, median and quartiles (logarithmic)",
        bars: bars.map(|(name, samples)| (name.to_owned(), samples.clone())).to_vec(),
    });
    drop(container);
    close(environment);
}

/// Enters the jail's namespaces.
fn nsenter(init: &str, program: &[&str]) -> Command {
    let mut nsenter = quiet("nsenter");
    nsenter.args(["-t", init, "-m", "-p", "-i", "-u"]).args(program);
    nsenter
}
