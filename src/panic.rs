//! Reports a panic, which is a bug of this program, like any other error: in one line, without a backtrace.

use std::panic::PanicHookInfo;

/// Calls `tell` with one sentence on a panic, instead of the standard library's report.
pub fn tell_by(tell: impl Fn(&str) + Send + Sync + 'static) {
    std::panic::set_hook(Box::new(move |panic| tell(&sentence(panic))));
}

fn sentence(panic: &PanicHookInfo<'_>) -> String {
    let place = panic.location().map_or("an unknown place".into(), ToString::to_string);
    let message = panic.payload_as_str().unwrap_or("no message");
    let message = message.lines().map(str::trim).collect::<Vec<_>>().join(", ");
    format!("internal error at {place}: {message}; this is a bug of ims-sshd: report it with this line")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_panic_is_reported_in_one_line_with_location_and_message() {
        const IN_CHILD: &str = "IMS_SSHD_TEST_PANIC";
        if std::env::var_os(IN_CHILD).is_some() {
            tell_by(|sentence| eprintln!("told: {sentence}"));
            assert_eq!(1, 2, "an odd number");
        }
        let name = "panic::tests::a_panic_is_reported_in_one_line_with_location_and_message";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", name, "--nocapture"]).env(IN_CHILD, "").output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        let line = told.lines().find(|line| line.starts_with("told: ")).unwrap_or_else(|| panic!("{told}"));
        for words in ["internal error at src/panic.rs:", "an odd number, left: 1, right: 2; this is a bug"] {
            assert!(line.contains(words), "{words}: {told}");
        }
        assert!(!told.contains("backtrace"), "{told}");
    }
}
