//! A creation that is killed at any of its stages: it leaves nothing that runs or is mounted, nothing half that passes
//! for whole, and the same command succeeds afterwards.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::file_server::{Fault, FileServer};
use testbed::job::*;
use testbed::repository_server::RepositoryServer;
use testbed::s3_server::{Bucket, Closed, Gate};
use testbed::tls_server::certificates;
use testbed::*;

use crate::build::state_of_machine;
use crate::recipes::*;

/// Lines of the recipe's script. They make the image so large that packing takes a while, and that it is uploaded in
/// parts.
const NOISE: &str = "head -c 50000000 /dev/urandom > /var/noise";

/// The signals, in the order in which they end one creation after the other.
const SIGNALS: [Signal; 2] = [Signal::SIGTERM, Signal::SIGKILL];

/// Builds take longer than anything else here.
const LIMIT: Duration = Duration::from_mins(5);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    /// A part of the recipe has come.
    Fetch,
    /// A repository has answered that it has nothing yet.
    Wait,
    /// The repositories are there, and the package of the certificate is made next.
    Package,
    /// kiwi-ng has said this.
    Build(&'static str),
    /// The archive is being written.
    Pack,
    /// A part of the image is being sent.
    Upload,
}

const STAGES: [Stage; 8] = [
    Stage::Fetch,
    Stage::Wait,
    Stage::Package,
    Stage::Build("installing the first packages"),
    Stage::Build("running config.sh"),
    Stage::Build("making the archive"),
    Stage::Pack,
    Stage::Upload,
];

/// Everything that one command needs, until its stage.
struct Creation {
    dir: tempfile::TempDir,
    stage: Stage,
    recipe: FileServer,
    packages: RepositoryServer,
    bucket: Bucket,
    gate: Gate,
}

impl Creation {
    fn new(stage: Stage) -> Self {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        certificates(dir.path());
        std::fs::create_dir(at("work")).unwrap();
        if stage != Stage::Wait {
            std::os::unix::fs::symlink(&*REPOSITORY, at("packages")).unwrap();
        }
        succeed(Command::new("cp").arg("-aT").arg(repository().join("tests/recipe/rpm-local")).arg(at("source")));
        let script = std::fs::read_to_string(at("source/config.sh")).unwrap();
        std::fs::write(at("source/config.sh"), format!("{script}{NOISE}\n")).unwrap();
        let archive = std::fs::read(archive(&at("source"), "recipe.tgz", &["-z"])).unwrap();
        let faults = if stage == Stage::Fetch { &[Fault::Drip; SIGNALS.len()][..] } else { &[] };
        Self {
            stage,
            recipe: FileServer::start(archive, faults),
            packages: RepositoryServer::start(&at("packages")),
            bucket: Bucket::new(),
            gate: Gate::start(0, Closed::Silent),
            dir,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of the build. Its directory has a part of the URL as name.
    fn built(&self, name: &str) -> PathBuf {
        self.at("work/ims-sshd.create/boot-images").join(name)
    }

    fn command(&self) -> Command {
        let to = format!("s3://{}", self.bucket.name);
        let mut command = ims_sshd(&["create", &self.recipe.url, "--output", &to], &self.bucket.variables());
        command.args(["--name", "compute", "--set", "PACKAGE_MANAGER=zypper"]);
        command.args(["--set", &format!("REPOSITORY={}", self.packages.url)]);
        command.arg("--work").arg(self.at("work")).arg("--authority").arg(self.at("ca.crt"));
        command.env("PATH", path()).env("IMS_STALL_LIMIT", "100");
        command
    }

    /// Starts the command, and ends it by `signal` at its stage.
    fn end_at_stage(&self, signal: Signal) {
        let mut command = self.command();
        if self.stage == Stage::Upload {
            command.env("S3_ENDPOINT", &self.gate.endpoint);
        }
        let (asked, sent) = (self.packages.requests().len(), self.gate.parts());
        let mut child = Ended::killed(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = match self.stage {
            Stage::Build(line) => line,
            Stage::Package => "the repository local is there",
            _ => "",
        };
        let mut before = Vec::new();
        let has_begun = lines.by_ref().inspect(|line| before.push(line.clone())).any(|said| said.contains(line));
        assert!(has_begun, "{}", before.join("\n"));
        // The pipe must not fill.
        let said = std::thread::spawn(move || lines.collect::<Vec<_>>().join("\n"));
        let written = |name: &str| self.built(name).metadata().is_ok_and(|file| file.len() > 0);
        let has_begun = || match self.stage {
            Stage::Fetch => written(".recipe.part"),
            Stage::Wait => self.packages.requests().len() > asked,
            Stage::Package | Stage::Build(_) => true,
            Stage::Pack => written("compute.sqsh.part"),
            Stage::Upload => self.gate.parts() > sent,
        };
        wait_within(LIMIT, "the stage", || has_begun() || said.is_finished());
        assert!(!said.is_finished(), "{}", said.join().unwrap());
        if self.stage == Stage::Wait {
            let output = self.command().output().unwrap();
            assert_eq!(output.status.code(), Some(1));
            let reason = "another 'ims-sshd create' of this recipe is at work; wait for its end";
            assert!(text(&output.stderr).contains(reason), "{}", text(&output.stderr));
        }
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let status = child.wait().unwrap();
        let said = said.join().unwrap();
        match signal {
            Signal::SIGKILL => assert_eq!(status.signal(), Some(9), "{said}"),
            _ => assert_eq!(status.code(), Some(128 + signal as i32), "{said}"),
        }
    }

    /// Asserts that the ended command has left neither processes nor mounts, and nothing that passes for whole.
    fn nothing_is_left(&self, signal: Signal) {
        let here = self.dir.path().display().to_string();
        if signal == Signal::SIGKILL {
            // The kernel ends them, and nobody waits for it.
            wait_until("the end of all processes", || processes_with(&here).is_empty());
        }
        assert_eq!(processes_with(&here), [0; 0]);
        assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&here));
        assert!(!succeed(Command::new("losetup").args(["--list", "--noheadings"])).contains(&here));
        let keys = self.bucket.keys();
        assert!(!keys.iter().any(|key| key.ends_with("/manifest.json")), "{keys:?}");
        // Only a killed command leaves anything of what was begun.
        if signal != Signal::SIGKILL {
            assert_eq!((keys.len(), self.bucket.unfinished_uploads()), (0, 0), "{keys:?}");
            for name in [".recipe.part", ".recipe.unpacking", "compute.sqsh.part", ".ims-sshd.build"] {
                assert!(!self.built(name).exists(), "{name}");
            }
        }
        let is_packed = self.built("compute.sqsh").exists();
        assert_eq!(is_packed, self.stage == Stage::Upload, "an archive with this name is whole");
    }

    /// Asserts that the command succeeds, and that its image is the only one.
    fn succeeds(&self) {
        if self.stage == Stage::Wait {
            std::os::unix::fs::symlink(&*REPOSITORY, self.at("packages")).unwrap();
        }
        let output = self.command().output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let report = report(&output);
        let id = report["ims_image_record"]["id"].as_str().unwrap();
        let mut keys = self.bucket.keys();
        keys.sort();
        let names = ["boot_parameters", "initrd", "kernel", "manifest.json", "rootfs"];
        assert_eq!(keys, names.map(|name| format!("{id}/{name}")));
        assert_eq!(self.bucket.unfinished_uploads(), 0);
        std::fs::write(self.at("rootfs"), self.bucket.get(&format!("{id}/rootfs")).body).unwrap();
        let print = |name: &str| succeed(Command::new("unsquashfs").arg("-cat").arg(self.at("rootfs")).arg(name));
        assert_eq!(print("etc/hostname"), "rpm-local\n");
        let authority = std::fs::read_to_string(self.at("ca.crt")).unwrap();
        assert_eq!(print("var/lib/ca-certificates/ca-bundle.pem"), authority);
        assert_eq!(std::fs::read_dir(self.at("work/ims-sshd.create")).unwrap().count(), 0);
    }
}

#[test]
fn creation_that_is_killed_at_any_stage_leaves_nothing_and_succeeds_when_repeated() {
    let before = state_of_machine();
    let failed = run_each(
        &STAGES,
        2,
        |stage| format!("{stage:?}"),
        |stage| {
            let creation = Creation::new(*stage);
            for signal in SIGNALS {
                creation.end_at_stage(signal);
                creation.nothing_is_left(signal);
            }
            creation.succeeds();
        },
    );
    assert_eq!(failed, [""; 0]);
    assert_eq!(state_of_machine(), before);
}
