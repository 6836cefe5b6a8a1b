//! What a client gets: commands, status, bytes, streams.

use crate::support::*;

#[test]
fn a_command_runs_in_the_image_when_jailed_and_beside_it_when_plain() {
    let jailed = Environment::open(Image::Debian, Mode::Jailed);
    assert_eq!(jailed.says("test -e /work || cat /etc/motd"), "image of the tests");
    let plain = Environment::open(Image::Debian, Mode::Plain);
    assert_eq!(plain.says(&format!("cat {}/etc/motd", plain.image_root.display())), "image of the tests");
}

#[test]
fn exit_status_0_to_255_is_the_commands_own() {
    for mode in MODES {
        let environment = Environment::open(Image::Busybox, mode);
        let script = "for i in 0 1 2 126 127 128 130 143 200 254 255; do echo $i; done";
        let codes = environment.says(script);
        for code in codes.lines() {
            let output = environment.run(&format!("exit {code}"));
            assert_eq!(output.status.code().unwrap().to_string(), code, "{mode:?}");
            assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
        }
    }
}
