//! Environments for the benchmarks: observed by inotify, and ended without leaving anything.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use ims_sshd::sys::poll;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::event::{PollFd, PollFlags};
use testbed::{Environment, Image, LIMIT, Mode, Volume, succeed, wait_until};

/// Starts an entrypoint that has made its preparations and waits for `ready`.
pub fn waiting(volume: Volume, mode: Mode) -> Environment {
    let environment = volume.start(mode);
    until_it_waits(&environment);
    environment
}

/// Waits until an entrypoint waits for `ready`.
pub fn until_it_waits(environment: &Environment) {
    // The entrypoint locks the directory before it waits; /proc/locks shows that.
    let lock = format!(" FLOCK  ADVISORY  WRITE {} ", environment.entrypoint.id());
    wait_until("the entrypoint to wait for 'ready'", || {
        std::fs::read_to_string("/proc/locks").unwrap().contains(&lock)
    });
}

/// The ways to open an image root that are compared: jailed, plain, and sshd's own `ChrootDirectory`. The first two run
/// in containers of the same image as the image root, so that sessions run the same programs everywhere.
pub fn three_ways() -> [(&'static str, Environment); 3] {
    let volume = || {
        let volume = Volume::in_memory(Image::Managed);
        // Debian's bash reads .bashrc when started by sshd, but not below another shell (SHLVL): it must not read it in
        // any of them.
        let mut config = std::fs::File::options().append(true).open(&volume.config).unwrap();
        config.write_all(b"SetEnv SHLVL=1\n").unwrap();
        volume
    };
    let contained = |mode| volume().start_in_container(mode, &[("IMS_JAIL_TIER", "namespace")]).ready();
    [
        ("jailed", contained(Mode::Jailed)),
        ("plain", contained(Mode::Plain)),
        ("ChrootDirectory", volume().chroot_directory()),
    ]
}

/// Ends an environment. Anything that another tool still keeps goes with the enclosure.
pub fn close(mut environment: Environment) {
    if !environment.signal("complete").exists() {
        environment.touch("complete");
    }
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
}

/// Ends all of [`three_ways`].
pub fn close_all(environments: [(&str, Environment); 3]) {
    let [(_, jailed), (_, plain), (_, chroot)] = environments;
    close(jailed);
    close(plain);
    drop(chroot);
}

/// A copy of a program, like an installed one: its pages are contiguous, so it starts a tenth faster than the linker's
/// output.
pub fn installed(program: &Path, directory: &Path) -> String {
    let copy = directory.join(program.file_name().unwrap());
    std::fs::copy(program, &copy).unwrap();
    copy.to_str().unwrap().to_owned()
}

/// The C program that the jail's helper is compared with.
pub fn least(directory: &Path) -> String {
    let linked = directory.join("linked");
    std::fs::create_dir(&linked).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/enter.c");
    succeed(Command::new("cc").args(["-O2", "-static", "-o"]).arg(linked.join("enter")).arg(source));
    installed(&linked.join("enter"), directory)
}

/// Names that inotify reports as created in a directory.
pub struct Creations(Inotify);

impl Creations {
    pub fn in_directory(directory: &Path) -> Self {
        let events = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        events.add_watch(directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO).unwrap();
        Self(events)
    }

    pub fn wait_for(&self, name: &str) {
        loop {
            let ready = poll::wait(&mut [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)], LIMIT);
            assert_ne!(ready, Ok(0), "waited {} s in vain for '{name}'", LIMIT.as_secs());
            if self.0.read_events().unwrap().iter().any(|event| event.name.as_deref() == Some(name.as_ref())) {
                return;
            }
        }
    }
}
