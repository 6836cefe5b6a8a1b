//! Refusals: each has a message with the reason, and leaves nothing half-open.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use testbed::*;

/// Starts an environment that must be refused with this exit code and these messages.
fn refused(volume: Volume, mode: Mode, further: &[(&str, &str)], code: i32, messages: &[&str]) -> Environment {
    volume.touch("ready");
    let mut environment = volume.start_with(mode, further);
    assert_eq!(environment.end(), code, "{further:?}: {}", environment.log_text());
    let log = environment.log_text();
    for message in messages {
        assert!(log.contains(message), "{further:?}: '{message}' is missing in:\n{log}");
    }
    assert_eq!(log.matches(" ERROR ").count(), 1, "one error is logged:\n{log}");
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists(), "nobody must wait for it");
    assert!(!environment.signal("complete").exists() && !environment.signal("sshd_listening").exists());
    assert!(!environment.state_directory().exists(), "its state directory is left");
    environment
}

#[test]
fn invalid_values_are_reported_before_anything_starts() {
    for (name, value, expected) in [
        ("IMS_ACTION", "destroy", "IMS_ACTION is 'destroy': expected 'customize' or 'create'"),
        ("IMS_ACTION", "", "IMS_ACTION is not set: expected 'customize' or 'create'"),
        ("SSH_JAIL", "true", "SSH_JAIL is 'true': expected 'True' or 'False', in this spelling"),
        ("JOB_ENABLE_DKMS", "1", "JOB_ENABLE_DKMS is '1': expected 'true' or 'false'"),
        ("BUILD_ARCH", "riscv64", "BUILD_ARCH is 'riscv64': expected 'x86_64' or 'aarch64'"),
        ("IMS_JAIL_TIER", "strong", "IMS_JAIL_TIER is 'strong': expected 'auto' or 'namespace' or 'user' or 'chroot'"),
        ("IMS_CLOSE_GRACE", "-1", "IMS_CLOSE_GRACE is '-1': expected whole seconds"),
    ] {
        let volume = Volume::new(Image::Busybox);
        refused(volume, Mode::Plain, &[(name, value)], 2, &[expected]);
    }
}

#[test]
fn program_without_its_helper_says_so_once_and_opens_nothing() {
    let apart = tempfile::tempdir_in(Path::new(&*IMS_SSHD).parent().unwrap()).unwrap();
    let (alone, image) = (apart.path().join("ims-sshd"), apart.path().join("image"));
    std::fs::hard_link(&*IMS_SSHD, &alone).unwrap();
    std::fs::create_dir_all(image.join("bin")).unwrap();
    std::fs::write(image.join("bin/sh"), "").unwrap();
    for command in ["customize", "enter"] {
        let output = Command::new(&alone).arg(command).arg(&image).arg("true").output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.matches("cannot find ims-jail-shell").count(), 1, "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn options_that_cannot_work_are_refused() {
    for (options, reason) in [
        ("-D -f CONFIG", "-D keeps sshd in the foreground"),
        ("-i -f CONFIG", "-i serves one connection on standard input"),
        ("-f sshd_config", "-f sshd_config is a relative path"),
        ("-E sshd.log -f CONFIG", "-E sshd.log is a relative path"),
        ("-f /other/config", "SSHD_CONFIG_FILE is '"),
        ("", "but sshd reads '/etc/ssh/sshd_config' (no -f in SSHD_OPTIONS)"),
        ("-f CONFIG -Z", "-Z is not an option for starting sshd"),
        ("-f 'CONFIG", "it cannot be split into words"),
    ] {
        let volume = Volume::new(Image::Busybox);
        let options = options.replace("CONFIG", &volume.config.display().to_string());
        refused(volume, Mode::Jailed, &[("SSHD_OPTIONS", &options)], 2, &[reason]);
    }
}

#[test]
fn configuration_error_is_reported_in_sshds_words() {
    let volume = Volume::new(Image::Busybox);
    let config = std::fs::read_to_string(&volume.config).unwrap();
    std::fs::write(&volume.config, format!("{config}NoSuchKeyword yes\n")).unwrap();
    refused(
        volume,
        Mode::Jailed,
        &[],
        1,
        &["cannot have sshd check its configuration", "Bad configuration option: NoSuchKeyword"],
    );

    let volume = Volume::new(Image::Busybox);
    std::fs::remove_file(&volume.config).unwrap();
    refused(volume, Mode::Plain, &[], 1, &["No such file or directory"]);
}

#[test]
fn configuration_that_blocks_sshd_is_refused_in_time() {
    let volume = Volume::new(Image::Busybox);
    let fifo = volume.dir.path().join("fifo.conf");
    succeed(Command::new("mkfifo").arg(&fifo));
    let config = std::fs::read_to_string(&volume.config).unwrap();
    std::fs::write(&volume.config, format!("{config}Include {}\n", fifo.display())).unwrap();
    let reason = "cannot have sshd check its configuration";
    refused(volume, Mode::Jailed, &[], 1, &[reason, "it had not finished after 20 s"]);
}

#[test]
fn configuration_that_bypasses_the_helper_is_refused() {
    for (options, reason) in [
        ("-o PermitUserEnvironment=yes", "sshd's effective permituserenvironment for root is 'yes'"),
        ("-o AcceptEnv=*", "AcceptEnv * lets a client set"),
        ("-o AcceptEnv=LD_PRELOAD", "AcceptEnv LD_PRELOAD lets a client set LD_*"),
        ("-o AcceptEnv='LANG BASH_E*'", "AcceptEnv BASH_E* lets a client set BASH_ENV"),
    ] {
        let volume = Volume::new(Image::Busybox);
        let all = format!("-E {} -f {} {options}", volume.sshd_log().display(), volume.config.display());
        let environment =
            refused(volume, Mode::Jailed, &[("SSHD_OPTIONS", &all)], 1, &["cannot open a jailed environment", reason]);
        assert!(!environment.log_text().contains("sshd is listening"));
    }
}

/// `sshd -T` answers for one address, but clients have others.
#[test]
fn dangerous_accept_env_is_refused_in_any_match_block_and_file() {
    let blocks = |inside: &str| {
        [
            "Address 10.0.0.0/8",
            "Host *.example",
            "LocalPort 4711",
            "LocalAddress 10.1.2.3",
            "User root Address !127.0.0.1",
            "all",
        ]
        .map(|criteria| format!("Match {criteria}\n  {inside}\n"))
    };
    let mut cases: Vec<(String, &str)> = Vec::new();
    cases.extend(
        blocks("AcceptEnv LANG LD_PRELOAD")
            .map(|block| (block, "sshd_config line 15: AcceptEnv LD_PRELOAD lets a client set LD_*")),
    );
    cases.extend(
        blocks("acceptenv=\"BASH_FUNC_exec%%\"")
            .map(|block| (block, "sshd_config line 15: AcceptEnv BASH_FUNC_exec%%")),
    );
    cases.extend(blocks("Include DIRECTORY/*.conf").map(|block| (block, "further.conf line 3: AcceptEnv XDG_*")));
    for (block, reason) in cases {
        let volume = Volume::new(Image::Busybox);
        let directory = volume.dir.path().join("config.d");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(
            directory.join("first.conf"),
            "Include DIRECTORY/deeper/f?rther.conf\n".replace("DIRECTORY", directory.to_str().unwrap()),
        )
        .unwrap();
        std::fs::create_dir(directory.join("deeper")).unwrap();
        std::fs::write(directory.join("deeper/further.conf"), "\nMatch Address 10.9.0.0/16\nAcceptEnv XDG_*\n")
            .unwrap();
        let config = std::fs::read_to_string(&volume.config).unwrap();
        std::fs::write(&volume.config, config + &block.replace("DIRECTORY", directory.to_str().unwrap())).unwrap();
        let environment = refused(
            volume,
            Mode::Jailed,
            &[("IMS_JAIL_TIER", "user")],
            1,
            &["cannot open a jailed environment", reason],
        );
        assert!(!environment.log_text().contains("sshd is listening"));
    }

    // Legitimate settings: the same blocks with harmless variables, and includes of missing files.
    let volume = Volume::new(Image::Busybox);
    let config = std::fs::read_to_string(&volume.config).unwrap();
    let harmless =
        blocks("AcceptEnv LANG LC_* XMODIFIERS").concat() + "Include /nowhere/*.conf nowhere.conf\n# AcceptEnv *\n";
    std::fs::write(&volume.config, config + &harmless).unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    let output = environment.ssh(&["-o", "SetEnv=XMODIFIERS=@im LC_X=y"]).arg("echo $LC_X").output().unwrap();
    assert_eq!(text(&output.stdout), "y\n", "{output:?}");
}

/// The fragment's settings for root come first, so no later block can change them for another address.
#[test]
fn jail_settings_override_match_blocks_for_other_addresses() {
    let volume = Volume::new(Image::Busybox);
    let config = std::fs::read_to_string(&volume.config).unwrap();
    let all = "ForceCommand none\nPermitTTY no\nAllowStreamLocalForwarding yes\nPermitTunnel yes\nX11Forwarding yes\nPermitUserRC yes\n\
               ChrootDirectory /var\n";
    let blocks = ["Address 10.0.0.0/8", "Host *", "LocalPort 4711", "User root LocalAddress 10.1.2.3", "User root"];
    std::fs::write(&volume.config, config + &blocks.map(|block| format!("Match {block}\n{all}")).concat()).unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    for client in ["addr=10.1.2.3,laddr=10.1.2.3,lport=4711,host=x", "addr=::1,laddr=::1,lport=22,host=localhost"] {
        let mut sshd = Command::new(ims_sshd::sshd::program().unwrap());
        let said =
            succeed(sshd.arg("-T").arg("-f").arg(&environment.config).args(["-C", &format!("user=root,{client}")]));
        for line in [
            "forcecommand exec ",
            "permittty yes",
            "allowstreamlocalforwarding no",
            "permittunnel no",
            "x11forwarding no",
            "permituserrc no",
            "chrootdirectory none",
        ] {
            assert!(said.contains(&format!("\n{line}")), "{client}: no '{line}' in {said}");
        }
    }
    assert_eq!(environment.says("cat /proc/1/comm"), "init");
}

#[test]
fn jail_settings_override_other_settings_for_root() {
    let volume = Volume::new(Image::Busybox);
    let config = std::fs::read_to_string(&volume.config).unwrap();
    let tricks = "ForceCommand /bin/echo outside\nMatch User root\n  ForceCommand /bin/echo outside\n  ChrootDirectory /var\n  PermitTTY no\n";
    std::fs::write(&volume.config, format!("{config}AllowStreamLocalForwarding yes\nPermitTunnel yes\n{tricks}"))
        .unwrap();
    let all =
        format!("-f {} -o ForceCommand=none -o PermitUserRC=yes -o 'ChrootDirectory /var'", volume.config.display());
    let environment = volume.start_with(Mode::Jailed, &[("SSHD_OPTIONS", &all)]).ready();
    assert_eq!(environment.says("ls /"), environment.says("ls -1 /proc/1/cwd/ 2>/dev/null || ls /"));
    assert_eq!(environment.says("cat /proc/1/comm"), "init");
}

#[test]
fn port_in_use_is_reported_in_sshds_words() {
    let volume = Volume::new(Image::Busybox);
    let _taken = std::net::TcpListener::bind(("127.0.0.1", volume.port)).unwrap();
    refused(volume, Mode::Jailed, &[], 1, &["cannot start sshd", "Address already in use"]);
}

#[test]
fn directory_without_an_image_is_refused() {
    let volume = Volume::new(Image::Busybox);
    std::fs::remove_dir_all(&volume.image_root).unwrap();
    refused(volume, Mode::Jailed, &[], 1, &["cannot open the image root", "it does not exist"]);

    let volume = Volume::new(Image::Busybox);
    std::fs::rename(&volume.image_root, volume.dir.path().join("real")).unwrap();
    symlink(volume.dir.path().join("real"), &volume.image_root).unwrap();
    refused(volume, Mode::Jailed, &[], 1, &["cannot open the image root", "it is a symbolic link"]);

    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        let below = volume.dir.path().join("below");
        std::fs::rename(&volume.image_root, &below).unwrap();
        std::fs::create_dir(&volume.image_root).unwrap();
        std::fs::rename(below, volume.image_root.join("rootfs")).unwrap();
        let advice = format!("; {} is an image root", volume.image_root.join("rootfs").display());
        refused(volume, mode, &[], 1, &["cannot open the image root", "it is not an image root, which has", &advice]);
    }
}

#[test]
fn link_at_a_mount_point_is_refused_and_not_followed() {
    for name in ["proc", "sys", "dev", "run"] {
        let volume = Volume::new(Image::Busybox);
        let decoy = volume.dir.path().join("decoy");
        std::fs::create_dir(&decoy).unwrap();
        symlink(&decoy, volume.image_root.join(name)).unwrap();
        let message = format!("cannot mount on /{name} of the image: it is a symbolic link");
        let environment = refused(volume, Mode::Jailed, &[], 1, &[&message]);
        assert_eq!(std::fs::read_dir(&decoy).unwrap().count(), 0);
        assert_eq!(std::fs::read_link(environment.image_root.join(name)).unwrap(), decoy);
        for made in ["proc", "sys", "dev", "run"].into_iter().filter(|n| *n != name) {
            assert!(!environment.image_root.join(made).exists(), "{made} was made and is left");
        }
    }
}

#[test]
fn a_parent_has_one_environment_at_a_time() {
    let first = Environment::open(Image::Busybox, Mode::Jailed);
    let output = first.volume.entrypoint(Mode::Jailed, &[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("another build environment is open on it"), "{output:?}");
    assert!(!first.signal("exiting").exists(), "the first one is left alone");
    assert_eq!(first.says("echo open"), "open");
}

#[test]
fn an_environment_that_has_ended_is_not_opened_again() {
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    assert_eq!(environment.complete(), 0);
    let again = environment.volume.entrypoint(Mode::Jailed, &[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("its environment has ended, and packing may have begun"));
}

/// Message in the log, variables, preparation, exit code.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a dyn Fn(&Volume), i32);

#[test]
fn every_refusal_creates_failed_and_exiting() {
    let locked = |volume: &Volume| {
        // A file where the environment wants its state directory.
        std::fs::create_dir_all("/run/ims-sshd").unwrap();
        succeed(Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs", "/run/ims-sshd"]));
        volume.touch("ready");
    };
    let odd_mark = |volume: &Volume| std::fs::create_dir(volume.signal("build_failed")).unwrap();
    let cases: [Case; 4] = [
        ("IMS_ACTION is 'destroy'", &[("IMS_ACTION", "destroy")], &|_| (), 2),
        ("LOG_LEVEL is 'loud'", &[("LOG_LEVEL", "loud")], &|_| (), 2),
        ("build_failed as a signal file", &[("IMS_ACTION", "create")], &odd_mark, 1),
        ("cannot create the directory /run/ims-sshd/", &[], &locked, 1),
    ];
    for (reason, variables, before, code) in cases {
        let volume = Volume::new(Image::Busybox);
        before(&volume);
        let mut environment = volume.start_with(Mode::Jailed, variables);
        assert_eq!(environment.end(), code, "{reason}: {}", environment.log_text());
        assert!(environment.log_text().contains(reason), "{reason}: {}", environment.log_text());
        for name in ["failed", "exiting"] {
            assert!(environment.signal(name).exists(), "{reason}: no '{name}'; {}", environment.log_text());
        }
    }
}

#[test]
fn restart_does_not_change_the_verdict_of_an_ended_environment() {
    let volume = Volume::new(Image::Busybox);
    for name in ["ready", "complete", "exiting"] {
        volume.touch(name);
    }
    let mut environment = volume.start(Mode::Jailed);
    assert_eq!(environment.end(), 1);
    assert!(environment.log_text().contains("its environment has ended"), "{}", environment.log_text());
    assert!(environment.signal("complete").exists(), "'complete' was removed although the image may be being packed");
    assert!(!environment.signal("failed").exists());
}

#[test]
fn forced_tier_is_never_replaced_by_another() {
    let volume = Volume::new(Image::Busybox);
    let enter = |tier: &str, taken: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", taken, &*IMS_SSHD, "enter"]).arg(&volume.image_root).args(["--", "echo", "in"]);
        command.env("IMS_JAIL_TIER", tier).output().unwrap()
    };
    for (tier, taken, reason) in [
        (
            "namespace",
            "-sys_admin",
            "cannot make a jail of tier 'namespace', which IMS_JAIL_TIER asks for: the tier 'namespace' needs CAP_SYS_ADMIN, which this container lacks",
        ),
        (
            "user",
            "-setuid",
            "cannot make a jail of tier 'user', which IMS_JAIL_TIER asks for: the tier 'user' needs CAP_SETUID, which this container lacks",
        ),
        (
            "chroot",
            "-sys_chroot",
            "cannot make a jail of tier 'chroot', which IMS_JAIL_TIER asks for: the tier 'chroot' needs CAP_SYS_CHROOT, which this container lacks",
        ),
        (
            "auto",
            "-sys_admin,-setfcap,-sys_chroot",
            "cannot make a jail of any tier: the tier 'namespace' needs CAP_SYS_ADMIN",
        ),
    ] {
        let output = enter(tier, taken);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{output:?}");
        let name = ims_sshd::volume::state_directory::name_for(&volume.image_root);
        assert!(!Path::new("/run/ims-sshd/enter").join(name).exists(), "its state directory is left");
    }
    // The namespace tier needs only CAP_SYS_ADMIN, and the user tier does not need it.
    for (taken, tier) in
        [("-sys_ptrace", None), ("-sys_admin,-sys_ptrace", Some("user")), ("-sys_admin,-setfcap", Some("chroot"))]
    {
        let output = enter("auto", taken);
        assert_eq!(text(&output.stdout), "in\n", "{output:?}");
        let log = text(&output.stderr);
        let said = log.split_once("the jail's tier is ").map(|(_, rest)| rest.split(';').next().unwrap());
        assert_eq!(said, tier, "{log}");
    }
}
