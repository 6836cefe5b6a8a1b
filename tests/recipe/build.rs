//! kiwi-ng builds image roots: the real one, of PyPI, with Debian's zypper and dnf, from a repository of four tiny rpms.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::ims_server::{ImsServer, JOB};
use testbed::job::*;
use testbed::repository_server::RepositoryServer;
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::*;

use crate::recipes::*;

/// Builds take longer than anything else here.
const LIMIT: Duration = Duration::from_mins(5);

/// A volume with a recipe that has been fetched.
pub struct Volume {
    pub dir: tempfile::TempDir,
    ims: ImsServer,
}

impl Volume {
    pub fn new(manager: &str) -> Self {
        Self::from(&REPOSITORY, manager)
    }

    fn from(packages: &Path, manager: &str) -> Self {
        let values = [format!("REPOSITORY=dir://{}", packages.display()), format!("PACKAGE_MANAGER={manager}")];
        Self::of("rpm-local", &values)
    }

    pub fn of(recipe: &str, values: &[String]) -> Self {
        let dir = directory();
        certificates(dir.path());
        let volume = Self { dir, ims: ImsServer::start() };
        std::fs::create_dir(volume.at("image")).unwrap();
        let recipe = repository().join("tests/recipe").join(recipe);
        let mut command = ims_sshd(&["fetch-recipe"], &[]);
        command.arg(volume.at("image/recipe")).arg(recipe);
        for value in values {
            command.args(["--set", value]);
        }
        succeed(&mut command);
        volume
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds lines to the script that runs in the new root.
    pub fn with_script(self, lines: &str) -> Self {
        let file = self.at("image/recipe/config.sh");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(file, text + "\n" + lines + "\n").unwrap();
        self
    }

    /// Replaces text of the description.
    pub fn with(self, old: &str, new: &str) -> Self {
        let file = self.at("image/recipe/config.xml");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(old), "{text}");
        std::fs::write(file, text.replace(old, new)).unwrap();
        self
    }

    pub fn build(&self, variables: &[(&str, String)]) -> Command {
        let mut command = Command::new(&IMS_SSHD);
        command.arg("build").arg(self.at("image/recipe")).arg(self.at("image"));
        command.arg("--authority").arg(self.at("ca.crt")).env_clear().env("PATH", path());
        command.envs(std::env::var("SUDO_UID").map(|user| ("SUDO_UID", user)));
        command.envs(variables.iter().map(|(n, v)| (*n, v.as_str())));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The build of a job.
    fn build_of_job(&self, variables: &[(&'static str, String)]) -> Command {
        let package = ims_sshd(&["ca-rpm"], &[]).arg(self.at("ca.crt")).arg("--output").arg(self.at("ca-rpm")).output();
        assert!(package.unwrap().status.success());
        let mut all = self.ims.variables();
        all.extend_from_slice(variables);
        let mut command = self.build(&all);
        command.arg("--ca-rpm").arg(self.at("ca-rpm/cray_ca_cert-1.0.1-1.noarch.rpm"));
        command
    }

    pub fn root(&self) -> PathBuf {
        self.at("image/build/image-root")
    }

    pub fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Asserts that the build has left no mount, no process, and nothing of its own on the volume.
    fn nothing_is_left(&self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.dir.path().display().to_string();
        assert!(!mounts.contains(&here), "{mounts}");
        assert_eq!(processes_with(&here), [0; 0], "{here}");
        assert!(!self.at("image/.ims-sshd.build").exists());
    }

    /// Asserts that the image root is the recipe's, with the site's authority.
    pub fn is_built(&self) {
        assert_eq!(self.file("etc/hostname"), "rpm-local\n");
        let authority = std::fs::read_to_string(self.at("ca.crt")).unwrap();
        assert_eq!(self.file("var/lib/ca-certificates/ca-bundle.pem"), authority);
        let mut rpm = Command::new("rpm");
        rpm.arg("--dbpath").arg(self.root().join("var/lib/rpm")).args(["-qa", "--qf", "%{NAME}\n"]);
        let packages = succeed(&mut rpm);
        let packages: BTreeSet<_> = packages.lines().collect();
        let wanted = ["cray_ca_cert", "tiny-busybox", "tiny-certificates", "tiny-filesystem", "tiny-kernel"];
        assert_eq!(packages, wanted.into());
        for name in [".kconfig", ".profile"] {
            assert!(!self.root().join(name).exists(), "/{name}");
        }
        let mode = self.root().join("image").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700, "it may hold passwords of repositories");
        let names: Vec<_> = std::fs::read_dir(self.at("image")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().ends_with(".tar.xz")), "{names:?}");
        self.nothing_is_left();
    }
}

pub fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
}

/// What a package manager would change of the machine.
pub fn state_of_machine() -> String {
    let places = ["/var/cache/kiwi", "/var/cache/zypp", "/var/cache/dnf", "/var/lib/dnf", "/var/lib/dpkg", "/etc/zypp"];
    let mut find = Command::new("find");
    let there = places.into_iter().filter(|place| Path::new(place).exists());
    succeed(find.args(there).args(["-printf", "%p %s %T@\n"]))
}

#[test]
fn image_root_is_built_by_zypper_and_by_dnf_and_the_machine_stays_as_it_is() {
    let before = state_of_machine();
    for manager in ["zypper", "dnf4"] {
        let volume = Volume::new(manager);
        let output = volume.build(&[]).output().unwrap();
        succeeded(&output);
        volume.is_built();
        let said = text(&output.stderr);
        for stage in ["preparing the image root", "installing the first packages", "running config.sh"] {
            assert_eq!(said.matches(stage).count(), 1, "{stage}: {said}");
        }
        assert!(text(&output.stdout).contains("Installing bootstrap packages"), "kiwi-ng's own lines");
        assert!(volume.at("image/kiwi.log").exists());
        // A second build over the first is refused.
        let output = volume.build(&[]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("build/image-root exists; remove it"), "{}", text(&output.stderr));
    }
    assert_eq!(state_of_machine(), before);
}

/// The same command as root without CAP_SYS_ADMIN.
pub fn without_privileges(build: &Command) -> Command {
    let mut command = Command::new("capsh");
    command.args(["--drop=cap_sys_admin", "--", "-c", "exec \"$0\" \"$@\""]);
    command.arg(build.get_program()).args(build.get_args()).env_clear();
    command.envs(build.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

#[test]
fn container_without_privileges_builds_in_a_user_namespace() {
    let script = "stat -c '%u' /usr/bin/busybox > /owner; ls /sys > /sys-of-build; mkdir -p ~/.ssh";
    let volume = Volume::new("zypper").with_script(script);
    succeeded(&without_privileges(&volume.build(&[])).output().unwrap());
    volume.is_built();
    assert_eq!((volume.file("owner").as_str(), volume.file("sys-of-build").as_str()), ("0\n", ""));
    // A script's home directory is root's of the image.
    assert!(volume.root().join("root/.ssh").is_dir());
}

#[test]
fn build_of_a_job_sets_its_status_and_has_no_secret() {
    let script = "env > /environment; cat /proc/1/environ > /environment-of-init
        for number in /proc/[0-9]*; do cat $number/environ >> /environment-of-all; done
        ls -A /oauth-place > /hidden 2>&1; ls /proc > /processes";
    let volume = Volume::new("zypper").with_script(script);
    let secrets = volume.at("oauth");
    succeed(Command::new("cp").arg("-aT").arg(volume.ims.oauth.path()).arg(&secrets));
    let oauth = ("OAUTH_CONFIG_DIR", secrets.display().to_string());
    // The recipe's own script runs in the new root, and another one of kiwi-ng's hooks beside it, outside.
    let output =
        volume.build_of_job(&[oauth, ("S3_SECRET_KEY", "hidden-7".into()), ("S3_ACCESS_KEY", "a".into())]).output();
    succeeded(&output.unwrap());
    volume.is_built();
    assert_eq!(volume.ims.statuses(), ["building_image"]);
    for name in ["environment", "environment-of-init", "environment-of-all"] {
        let found = std::fs::read(volume.root().join(name)).unwrap();
        let found = text(&found);
        assert!(!found.contains("hidden-7") && !found.contains(JOB), "{name}: {found}");
    }
    let processes = volume.file("processes");
    assert!(processes.lines().filter(|line| line.parse::<u32>().is_ok()).count() < 20, "{processes}");
}

#[test]
fn failed_build_of_a_job_is_told_by_the_sidecar_with_the_reason_of_kiwi() {
    let volume = Volume::new("zypper").with("tiny-kernel", "tiny-kernl");
    let output = volume.build_of_job(&[]).output().unwrap();
    succeeded(&output);
    let said = text(&output.stderr);
    let reason = "No provider of 'tiny-kernl' found";
    assert_eq!(said.matches(reason).count(), 1, "{said}");
    assert!(said.contains("cannot build 'rpm-local': KiwiBootStrapPhaseFailed: "), "{said}");
    let places = format!("; see {} and {}", volume.at("image/kiwi.log").display(), volume.root().display());
    assert!(said.contains(&places), "{said}");
    volume.nothing_is_left();
    assert!(std::fs::read_to_string(volume.at("image/build_failed")).unwrap().contains(reason));
    assert_eq!(volume.ims.statuses(), ["building_image"]);
    let mut variables = volume.ims.variables();
    variables.extend([
        ("IMS_ACTION", "create".into()),
        ("IMAGE_ROOT_PARENT", volume.at("image").display().to_string()),
        ("ENABLE_DEBUG", "False".into()),
        ("IMAGE_STORE", volume.at("store").display().to_string()),
    ]);
    std::fs::write(volume.at("keys"), "").unwrap();
    let mut sidecar = ims_sshd(&["sidecar"], &variables);
    sidecar.arg("--authorized-keys").arg(volume.at("keys")).arg("--sshd-directory").arg(volume.at("ims"));
    let output = sidecar.arg("--authorities").arg(volume.at("ca")).output().unwrap();
    // kiwi-ng's last line is its error.
    let since = volume.at("image/kiwi.log").metadata().unwrap().modified().unwrap().elapsed().unwrap();
    assert!(since < Duration::from_secs(5), "IMS hears of it {since:?} after kiwi-ng's end");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(report(&output)["error"].as_str().unwrap().contains(reason), "{}", text(&output.stdout));
    assert_eq!(volume.ims.statuses().last().unwrap(), "error");
    // By hand, the same ends with another code.
    std::fs::remove_dir_all(volume.at("image/build")).unwrap();
    let output = volume.build(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(!volume.at("image/build_failed").exists());
}

/// A build whose script waits in the new root, and has started another program that does not end by itself.
fn waiting(volume: &Volume, mut build: Command) -> Ended {
    let child: Child = build.spawn().unwrap();
    let child = Ended::killed(child);
    wait_within(LIMIT, "the script in the new root", || volume.root().join("waits").exists());
    child
}

const WAITS: &str = "sleep 1000 & touch /waits; sleep 2000";

#[test]
fn killed_build_leaves_no_mount_and_no_process() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
        let volume = Volume::new("zypper").with_script(WAITS);
        let build = if signal == Signal::SIGTERM { volume.build_of_job(&[]) } else { volume.build(&[]) };
        let mut child = waiting(&volume, build);
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let status = child.wait().unwrap();
        // After SIGKILL, the kernel does it alone, and nobody waits for it.
        let root = volume.root();
        let left = || {
            let in_root = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/root")).is_ok_and(|found| found == root);
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(in_root).count()
        };
        if signal == Signal::SIGKILL {
            wait_until("the end of all processes", || {
                left() == 0 && processes_with(&volume.dir.path().display().to_string()).is_empty()
            });
            // The job's container that is started again removes what is left, and builds.
            let script = volume.at("image/recipe/config.sh");
            let text = std::fs::read_to_string(&script).unwrap();
            std::fs::write(script, text.replace(WAITS, "")).unwrap();
            succeeded(&volume.build_of_job(&[]).output().unwrap());
            volume.is_built();
            continue;
        }
        assert_eq!(status.code(), Some(128 + signal as i32));
        assert_eq!(left(), 0);
        volume.nothing_is_left();
        assert_eq!(volume.at("image/build_failed").exists(), signal == Signal::SIGTERM);
        // Nothing is mounted in it: it can be removed.
        std::fs::remove_dir_all(volume.at("image/build")).unwrap();
    }
}

#[test]
fn kiwi_that_the_kernel_kills_is_told_with_its_signal() {
    let volume = Volume::new("zypper").with_script(WAITS);
    let mut build = waiting(&volume, volume.build_of_job(&[]));
    // Kill it as the kernel does when memory runs out.
    let log = format!("--logfile={}", volume.at("image/kiwi.log").display());
    let [kiwi] = processes_with(&log)[..] else { panic!("{:?}", processes_with(&log)) };
    kill(Pid::from_raw(kiwi.cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(build.wait().unwrap().code(), Some(0));
    let reason = std::fs::read_to_string(volume.at("image/build_failed")).unwrap();
    assert!(reason.contains("kiwi-ng was killed by signal 9; it may lack memory"), "{reason}");
    volume.nothing_is_left();
}

#[test]
fn two_builds_at_once_do_not_meet() {
    let volumes = [Volume::new("zypper"), Volume::new("zypper")];
    // kiwi-ng's other name for a description.
    let named = |name: &str| volumes[1].at("image/recipe").join(name);
    std::fs::rename(named("config.xml"), named("appliance.kiwi")).unwrap();
    let builds: Vec<_> = volumes.iter().map(|volume| volume.build(&[]).spawn().unwrap()).collect();
    for build in builds {
        succeeded(&build.wait_with_output().unwrap());
    }
    volumes.iter().for_each(Volume::is_built);
}

#[test]
fn recipes_and_machines_that_cannot_build_are_refused_before_kiwi_starts() {
    let refused = |volume: &Volume, command: &mut Command, reason: &str| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{reason}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(reason), "{reason}: {}", text(&output.stderr));
        assert!(!volume.at("image/kiwi.log").exists() && !volume.root().exists(), "{reason}");
    };
    let volume = Volume::new("zypper").with("image=\"tbz\"", "image=\"oem\"");
    refused(&volume, &mut volume.build(&[]), "ims-sshd builds the type tbz only; the recipe has: oem");
    let volume = Volume::new("emerge");
    refused(&volume, &mut volume.build(&[]), "its package manager is 'emerge': expected one of zypper, dnf");
    let volume = Volume::new("zypper").with("dir://", "iso://");
    refused(&volume, &mut volume.build(&[]), "is a disk image, which kiwi-ng cannot read; mount it before");
    // In a user namespace that has no others, as on a node that forbids them.
    let volume = Volume::new("zypper");
    let build = volume.build(&[]);
    let mut without = Command::new("unshare");
    without.args([
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\"",
    ]);
    without.arg(build.get_program()).args(build.get_args()).env("PATH", path());
    let reason = "the limit of user namespaces is reached, or is 0 (ENOSPC); allow user namespaces on the node";
    refused(&volume, &mut without, reason);
    let volume = Volume::new("dnf5");
    refused(&volume, &mut volume.build(&[]), "cannot run dnf5: it is not installed; install the package dnf5");
    let volume = Volume::new("zypper");
    refused(
        &volume,
        volume.build(&[]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "cannot run kiwi-ng: it is not installed",
    );
    refused(
        &volume,
        volume.build(&[]).arg("--ca-rpm").arg(volume.at("no.rpm")),
        "cannot read the package of the site's authority",
    );
    let small = volume.at("small");
    std::fs::create_dir(&small).unwrap();
    mount(&["-t", "tmpfs", "-o", "size=100m,mode=0755", "none"], &small);
    let _mounted = Mounted(small.clone());
    let mut build = ims_sshd(&["build"], &[]);
    refused(&volume, build.arg(volume.at("image/recipe")).arg(&small), "small has 100 MiB of free space; give");
    // In a job the authority has to be there, and IMS hears of it.
    let mut build = volume.build(&volume.ims.variables());
    refused(&volume, &mut build, "cannot read the package of the site's authority");
    assert_eq!(volume.ims.statuses(), ["building_image", "error"]);
}

#[test]
fn device_node_of_a_package_is_left_out_in_dev_and_elsewhere_named_as_the_cause() {
    let dir = directory();
    succeed(Command::new("cp").arg("-aT").arg(&*REPOSITORY).arg(dir.path().join("rpms")));
    let spec = "Name: tiny-device\nVersion: 1\nRelease: 1\nSummary: s\nLicense: MIT\nBuildArch: noarch\n\
        %description\nd\n%files\n%dev(c, 1, 3) %attr(666, root, root) /dev/tiny\n\
        %package -n tiny-node\nSummary: s\n%description -n tiny-node\nd\n\
        %files -n tiny-node\n%dev(c, 1, 3) %attr(666, root, root) /usr/lib/tiny\n";
    std::fs::write(dir.path().join("tiny-device.spec"), spec).unwrap();
    let define = |name: &str, place: &str| format!("{name} {}", dir.path().join(place).display());
    let mut build = Command::new("rpmbuild");
    build.args(["-bb", "--quiet", "--define", &define("_topdir", "top"), "--define", &define("_rpmdir", "rpms")]);
    build.args(["--define", &define("_dbpath", "db")]).arg(dir.path().join("tiny-device.spec"));
    succeed(&mut build);
    succeed(Command::new("createrepo_c").arg("--quiet").arg(dir.path().join("rpms")));
    for manager in ["zypper", "dnf4"] {
        let volume = |package: &str| {
            let volume = Volume::from(&dir.path().join("rpms"), manager);
            volume.with("<package name=\"tiny-kernel\"/>", &format!("<package name=\"{package}\"/>"))
        };
        // The /dev of a build is its own, and one that boots makes the kernel's.
        let ignored = volume("tiny-device");
        succeeded(&ignored.build(&[]).output().unwrap());
        assert!(!ignored.root().join("dev/tiny").exists() && !Path::new("/dev/tiny").exists());
        let output = volume("tiny-node").build(&[]).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("tiny-node-1-1.noarch"), "{said}");
        assert!(said.contains("; a package with a device node cannot be installed; see "), "{said}");
    }
}

#[test]
fn repository_of_a_server_that_the_sites_authority_has_signed_is_trusted() {
    let server = RepositoryServer::start(&REPOSITORY);
    for manager in ["zypper", "dnf4"] {
        let volume = Volume::new(manager);
        let tls = Tls::start(volume.dir.path(), port_of(&server.url));
        let address = format!("https://127.0.0.1:{}", tls.port);
        let volume = volume.with(&format!("dir://{}", REPOSITORY.display()), &address);
        succeeded(&volume.build(&[]).output().unwrap());
        drop(tls);
        volume.is_built();
    }
}

#[test]
fn last_of_many_signing_keys_is_used() {
    let dir = directory();
    let at = |name: &str| dir.path().join(name);
    succeed(Command::new("cp").arg("-aT").arg(&*REPOSITORY).arg(at("packages")));
    std::fs::create_dir(at("gnupg")).unwrap();
    std::fs::set_permissions(at("gnupg"), PermissionsExt::from_mode(0o700)).unwrap();
    let gpg = |arguments: &[&str]| {
        let mut gpg = Command::new("gpg");
        gpg.args(["--batch", "--quiet", "--armor", "--passphrase", ""]).args(arguments).env("GNUPGHOME", at("gnupg"));
        succeed(&mut gpg)
    };
    for name in ["other", "signer"] {
        gpg(&["--quick-generate-key", name, "rsa2048", "sign"]);
        std::fs::write(at(name), gpg(&["--export", name])).unwrap();
    }
    gpg(&["--local-user", "signer", "--detach-sign", at("packages/repodata/repomd.xml").to_str().unwrap()]);
    succeed(Command::new("gpgconf").args(["--kill", "gpg-agent"]).env("GNUPGHOME", at("gnupg")));
    let signed = "repository_gpgcheck=\"true\" type=\"rpm-md\"";
    let volume = Volume::from(&at("packages"), "zypper").with("type=\"rpm-md\"", signed);
    let others: Vec<_> = (0..40).map(|number| at(&format!("{number}-{}", "x".repeat(100)))).collect();
    for key in &others {
        std::fs::copy(at("other"), key).unwrap();
    }
    let build = |further: Option<PathBuf>| {
        let mut build = volume.build(&[]);
        for key in others.iter().cloned().chain(further) {
            build.arg("--signing-key").arg(key);
        }
        build.output().unwrap()
    };
    let output = build(None);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    std::fs::remove_dir_all(volume.at("image/build")).unwrap();
    // IMS passed on as many as 4096 characters hold.
    assert!(others.iter().map(|key| key.as_os_str().len()).sum::<usize>() > 4096);
    succeeded(&build(Some(at("signer"))));
    assert_eq!(volume.file("etc/hostname"), "rpm-local\n");
}

#[test]
fn image_without_the_authority_is_no_success() {
    // zypper passes over a package that it cannot read.
    let volume = Volume::new("zypper");
    std::fs::write(volume.at("other.rpm"), "no package").unwrap();
    let output = volume.build(&[]).arg("--ca-rpm").arg(volume.at("other.rpm")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    volume.nothing_is_left();
}

#[test]
fn script_of_the_recipe_sees_no_credentials_of_the_pod() {
    let volume = Volume::new("zypper");
    // Kubernetes shows a secret like this; the build sees the directory above.
    let secrets = volume.at("image/secrets");
    std::fs::create_dir(&secrets).unwrap();
    mount(&["-t", "tmpfs", "none"], &secrets);
    let mounted = Mounted(secrets.clone());
    std::fs::write(secrets.join("client-secret"), "hidden-7").unwrap();
    // Out of the new root, by that of the build's first process; 'true', since kiwi-ng ends with the last exit code.
    let script = format!("cat /proc/1/root{}/client-secret > /found 2>&1; true", secrets.display());
    let volume = volume.with_script(&script);
    succeeded(&volume.build(&[]).output().unwrap());
    assert_eq!(volume.file("found"), "hidden-7", "the script gets out of the new root");
    std::fs::remove_dir_all(volume.at("image/build")).unwrap();
    succeeded(&volume.build(&[("OAUTH_CONFIG_DIR", secrets.display().to_string())]).output().unwrap());
    assert!(volume.file("found").contains("No such file"), "{}", volume.file("found"));
    assert!(secrets.join("client-secret").exists(), "outside of the build it is there");
    drop(mounted);
    volume.nothing_is_left();
}

#[test]
fn two_images_of_debian_packages_are_built_at_once_and_the_machine_stays_as_it_is() {
    let server = RepositoryServer::start(&cache().join("debian-archive"));
    let before = state_of_machine();
    let values = [format!("MIRROR={}", server.url), "SUITE=bookworm".to_owned()];
    let [one, two] = [1, 2].map(|_| Volume::of("debian", &values));
    // The second one's server has a certificate of the site's authority.
    let tls = Tls::start(two.dir.path(), port_of(&server.url));
    let volumes = [one, two.with(&server.url, &format!("https://127.0.0.1:{}", tls.port))];
    let builds: Vec<_> = volumes.iter().map(|volume| volume.build(&[]).spawn().unwrap()).collect();
    for build in builds {
        succeeded(&build.wait_with_output().unwrap());
    }
    drop(tls);
    assert_eq!(state_of_machine(), before);
    for volume in &volumes {
        assert_eq!(volume.file("etc/hostname"), "debian\n");
        let status = volume.file("var/lib/dpkg/status");
        for package in ["apt", "ca-certificates", "kmod"] {
            assert!(status.contains(&format!("Package: {package}\n")), "{package}");
        }
        let authority = std::fs::read_to_string(volume.at("ca.crt")).unwrap();
        assert!(volume.file("etc/ssl/certs/ca-certificates.crt").contains(authority.lines().nth(2).unwrap()));
        volume.nothing_is_left();
    }
}

/// Names in the machine's table of interpreters.
fn interpreters() -> String {
    let list = "mount -t binfmt_misc none /mnt && ls /mnt";
    succeed(Command::new("unshare").args(["--mount", "sh", "-ec", list]))
}

#[test]
fn image_for_another_architecture_is_built_and_qemu_is_registered_for_that_build_alone() {
    for manager in ["zypper", "dnf4"] {
        let script = "uname -m > /machine; echo arm > /etc/hostname";
        let volume = Volume::from(&REPOSITORY_FOR_ARM, manager).with_script(script);
        let arch = [("BUILD_ARCH", "aarch64".to_owned())];
        succeeded(&volume.build(&arch).output().unwrap());
        assert_eq!((volume.file("machine").as_str(), volume.file("etc/hostname").as_str()), ("aarch64\n", "arm\n"));
        let authority = std::fs::read_to_string(volume.at("ca.crt")).unwrap();
        assert_eq!(volume.file("var/lib/ca-certificates/ca-bundle.pem"), authority, "by the package's script");
        volume.nothing_is_left();
    }
    let volume = Volume::from(&REPOSITORY_FOR_ARM, "zypper").with_script(WAITS);
    let mut child = waiting(&volume, volume.build(&[("BUILD_ARCH", "aarch64".to_owned())]));
    assert!(!interpreters().contains("-build"), "{}", interpreters());
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    volume.nothing_is_left();
    // A script that fails there is told with its reason, and a job's ENABLE_DEBUG holds.
    let volume = Volume::from(&REPOSITORY_FOR_ARM, "zypper").with_script("echo no licence for $(uname -m) >&2; false");
    let of_job = [("BUILD_ARCH", "aarch64".to_owned()), ("ENABLE_DEBUG", "True".to_owned())];
    let output = volume.build_of_job(&of_job).output().unwrap();
    succeeded(&output);
    let reason = std::fs::read_to_string(volume.at("image/build_failed")).unwrap();
    assert!(reason.contains("no licence for aarch64"), "{reason}");
    assert!(text(&output.stdout).contains("[ DEBUG"), "{}", text(&output.stdout));
    let volume = Volume::of("debian", &["MIRROR=http://localhost".to_owned(), "SUITE=bookworm".to_owned()]);
    let output = volume.build(&[("BUILD_ARCH", "aarch64".to_owned())]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("with apt, kiwi-ng builds for aarch64 only on a machine of that architecture"),
        "{output:?}"
    );
}

#[test]
fn build_that_is_killed_at_any_stage_leaves_no_mount_and_no_process() {
    let before = state_of_machine();
    let stages = [
        "building 'rpm-local'",
        "preparing the image root",
        "installing the first packages",
        "running config.sh",
        "running images.sh",
        "making the archive",
    ];
    std::thread::scope(|scope| {
        for stage in stages {
            scope.spawn(move || {
                let volume = Volume::new("zypper");
                write(&volume.at("image/recipe"), "images.sh", "#!/bin/bash\ntrue\n");
                let mut child = Ended::killed(volume.build(&[]).spawn().unwrap());
                let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
                assert!(lines.any(|line| line.contains(stage)), "{stage}");
                kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
                child.wait().unwrap();
                let here = volume.dir.path().display().to_string();
                wait_until(&format!("the end of all processes after '{stage}'"), || processes_with(&here).is_empty());
                assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&here), "{stage}");
                // Nothing is mounted in it.
                std::fs::remove_dir_all(volume.at("image")).unwrap();
            });
        }
    });
    assert_eq!(state_of_machine(), before);
}

/// Further versions of kiwi-ng: `make test KIWIS="9.24.61 10.2.45"` installs them.
#[test]
fn further_versions_of_kiwi_build_by_each_package_manager() {
    let versions = std::env::var("IMS_SSHD_TEST_KIWIS").unwrap_or_default();
    let server = RepositoryServer::start(&cache().join("debian-archive"));
    for version in versions.split_whitespace() {
        let programs = cache().join("kiwis").join(version).join("kiwi/bin");
        assert!(programs.join("kiwi-ng").exists(), "{}: make test-recipes KIWIS={version}", programs.display());
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
        // 9.24 has another name for dnf.
        let dnf = if version.starts_with("9.") { "dnf" } else { "dnf4" };
        for manager in ["zypper", dnf] {
            let volume = Volume::new(manager);
            succeeded(&volume.build(&[]).env("PATH", &path).output().unwrap());
            volume.is_built();
        }
        let volume = Volume::of("debian", &[format!("MIRROR={}", server.url), "SUITE=bookworm".to_owned()]);
        succeeded(&volume.build(&[]).env("PATH", &path).output().unwrap());
        assert!(volume.file("var/lib/dpkg/status").contains("Package: kmod\n"), "{version}");
        let authority = std::fs::read_to_string(volume.at("ca.crt")).unwrap();
        assert!(volume.file("etc/ssl/certs/ca-certificates.crt").contains(authority.lines().nth(2).unwrap()));
    }
}

#[test]
fn what_another_user_can_change_is_not_built_and_the_output_directory_is_closed() {
    let dir = directory();
    let at = |name: &str| dir.path().join(name);
    write(dir.path(), "recipe/config.xml", "<image name='x'/>");
    write(dir.path(), "recipe/config.sh", "");
    let run = |out: &str| {
        let output = ims_sshd(&["build"], &[]).args([at("recipe"), at(out)]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr)
    };
    let mode = |name: &str, mode| std::fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
    let owner = |name: &str, user| std::os::unix::fs::chown(at(name), Some(user), None).unwrap();
    let unchangeable = "ims-sshd builds the type tbz only";
    assert!(run("out").contains(unchangeable));
    assert_eq!(at("out").metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    for (name, reason) in
        [("recipe", "/recipe belongs to user 1234"), ("recipe/config.sh", " config.sh belongs to user")]
    {
        owner(name, 1234);
        assert!(run("out").contains(reason), "{name}: {}", run("out"));
        owner(name, 0);
    }
    for name in ["recipe", "recipe/config.sh"] {
        let before = at(name).metadata().unwrap().permissions().mode();
        mode(name, 0o777);
        let said = run("out");
        assert!(said.contains("users other than its owner can write to ") && said.contains("fetch-recipe"), "{said}");
        mode(name, before);
    }
    // Nobody gets into a closed directory.
    mode("recipe/config.sh", 0o777);
    mode("recipe", 0o700);
    assert!(run("out").contains(unchangeable));
    owner("out", 1234);
    assert!(run("out").contains("/out belongs to user 1234, who can replace what is there"));
    assert!(run("no/out").contains("/no does not exist; create it first"));
}
