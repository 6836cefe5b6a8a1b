//! Helpers for commands that have to succeed, for waiting with a limit, and for ports.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Maximum time of a wait; a longer one means that something hangs.
pub const LIMIT: Duration = Duration::from_mins(1);

/// Runs `command` with `input` as its standard input.
pub fn feed(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// Polls for a condition that raises no event in this process.
pub fn wait_until(what: &str, holds: impl FnMut() -> bool) {
    wait_within(LIMIT, what, holds);
}

/// Like [`wait_until`], with another limit.
pub fn wait_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "waited {} s in vain for {what}", limit.as_secs());
        std::thread::sleep(limit / 15_000);
    }
}

pub fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Listens on the loopback address for as long as the tests run, and answers each connection in a thread of its own.
pub fn listen(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let answer = answer.clone();
            std::thread::spawn(move || answer(connection));
        }
    });
    address
}

/// A free port below the range from which the kernel chooses ports for clients, and for servers that ask for any, so
/// that nobody else gets it before the test uses it.
pub fn free_port() -> u16 {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let begin = 10_000 + (std::process::id() as usize * 17) % 9_000;
    (0..1000)
        .map(|_| u16::try_from(begin + NEXT.fetch_add(1, Ordering::Relaxed)).unwrap())
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

/// Runs each case in a thread of its own, to which the case's mounts belong, at most `at_once` of them at a time.
/// Returns the names of the cases that failed.
pub fn run_each<T: Sync>(
    cases: &[T],
    at_once: usize,
    name: impl Fn(&T) -> String + Sync,
    run: impl Fn(&T) + Sync,
) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    std::thread::scope(|scope| {
                        let builder = std::thread::Builder::new().name(name(case));
                        if builder.spawn_scoped(scope, || run(case)).unwrap().join().is_err() {
                            failed.lock().unwrap().push(name(case));
                        }
                    });
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

/// PIDs of processes whose command line contains `text`.
pub fn processes_with(text: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).replace('\0', " ").contains(text) {
            found.push(pid);
        }
    }
    found
}

pub fn text(bytes: impl AsRef<[u8]>) -> String {
    String::from_utf8_lossy(bytes.as_ref()).into_owned()
}

/// The time in seconds for which a request was retried, according to a message.
pub fn seconds_tried(said: &str) -> u64 {
    let found = said.split("tried for ").skip(1).find_map(|rest| rest.split_once(" s (IMS_RETRY_LIMIT)"));
    found.and_then(|(seconds, _)| seconds.parse().ok()).unwrap_or_else(|| panic!("no time is told: {said}"))
}
