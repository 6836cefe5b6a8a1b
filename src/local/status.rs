//! `ims-sshd complete`, `fail` and `status`: marks environments and shows their state.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::environment::stage::{self, Stage};
use crate::error::{Attempt, Error, Result};
use crate::image::unpack::UPPER;
use crate::job::DEFAULT_PARENT;
use crate::local::customize::SOURCE;
use crate::local::{directory, drop, register, work_directory};
use crate::log::output::{say, say_json};
use crate::log::redaction::MASK;
use crate::printable::Printable;
use crate::publish::identity::Record;
use crate::session::report;
use crate::sshd::daemon::Daemon;
use crate::sys::named;
use crate::transfer::without_query;
use crate::verdict::Verdict;
use crate::volume::layout::{
    ARCHIVE, CREATED_IMAGE_ROOT, EXITING, FETCHING, IMAGE_ROOT, OVERLAY, READY, SSHD_LISTENING,
};
use crate::volume::mounts_below::mounts_below;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::{RUN, StateDirectory};

/// Size limit of the file that holds a source, in bytes.
const LIMIT: u64 = 64 << 10;

/// Report field: path of an image root that 'ims-sshd prepare' has made and that is not open.
const PREPARED: &str = "image_root";

/// Report field: PID of a killed environment's sshd, if that sshd is still running.
const LISTENER: &str = "sshd";

/// Advice after a name that belongs to no run.
const LIST: &str = "'ims-sshd status' without a name lists what is open or kept";

/// Subject of a status query or a mark.
enum Target {
    /// An open run of `customize` or `enter` on this machine, by its entry in the register.
    Run(Value),
    /// A run that was killed or that kept changes, by its entry in the register.
    Left(Value),
    /// An image root parent.
    Parent(PathBuf),
}

/// Marks the image, so that its environment closes.
pub fn mark(named: Option<&Path>, verdict: Verdict) -> Result<u8> {
    let target = match named.map(find).or_else(|| variable().map(|parent| Ok(Target::Parent(parent)))) {
        Some(target) => target?,
        None => pods_own()?,
    };
    let marked = match target {
        Target::Run(run) => {
            mark_run(&run, verdict)?;
            format!("{} ({})", text(&run, "name"), text(&run, "source"))
        }
        Target::Left(left) => return mark_left(&left, verdict),
        Target::Parent(parent) => {
            mark_parent(&parent, verdict)?;
            format!("the image in {}", Printable(&parent.display().to_string()))
        }
    };
    say(&format!("marked {marked} {}\n", verdict.signal_file()));
    Ok(0)
}

/// The only open environment, as in a pod. Runs of `customize` and `enter` must be named, because they may be somebody
/// else's.
fn pods_own() -> Result<Target> {
    let mut all = all()?;
    let attempted = || Error::new("choose an image to mark");
    all.retain(|report| report[PREPARED].is_null());
    if all.is_empty() {
        return Err(attempted().because("nothing is open on this machine"));
    }
    if let ([one], Some(parent)) = (all.as_slice(), all[0]["image_root_parent"].as_str())
        && one["name"].is_null()
    {
        return Ok(Target::Parent(parent.into()));
    }
    let names: Vec<_> = all.iter().map(name_of).collect();
    Err(attempted().because("no name is given").advise(format!("name yours; these are open: {}", names.join(", "))))
}

/// For the mark `failed`, drops what a finished run left behind; refuses the mark `complete`.
fn mark_left(left: &Value, verdict: Verdict) -> Result<u8> {
    let (name, source) = (text(left, "name"), text(left, "source"));
    if verdict == Verdict::Complete {
        let why = if left["state"] == register::KILLED { "its run was killed" } else { "its run has ended" };
        let resuming = if register::has_source(left) {
            format!("; to resume: {}", register::resuming_line(left))
        } else {
            String::new()
        };
        let is_half_applied = left["state"] == register::HALF_APPLIED;
        let dropped = if is_half_applied { "the changes that are not applied" } else { "what it left" };
        let advice = format!("'ims-sshd fail {name}' drops {dropped}{resuming}");
        return Err(Error::new(format!("mark {name} complete")).because(why).advise(advice));
    }
    let again = register::resuming_line(left);
    let source_is = drop::drop_left(left)?;
    say(&if source_is == drop::PART {
        format!("dropped the rest of {name}; {source} {source_is}; to make the others too, run it again: {again}\n")
    } else if left["kept"] == true {
        format!("dropped the kept changes of {name}; {source} {source_is}\n")
    } else {
        format!("cleaned up after {name}, which has ended; {source} {source_is}\n")
    });
    Ok(0)
}

fn mark_run(run: &Value, verdict: Verdict) -> Result<()> {
    let refuse = |why: &str, advice: &str| {
        let attempted = format!("mark {} {}", text(run, "name"), verdict.signal_file());
        Err(Error::new(attempted).because(why).advise(advice))
    };
    let pid = text(run, "pid");
    let stop = format!("to stop that, send SIGINT to process {pid}");
    match (text(run, "command").as_str(), text(run, "state").as_str()) {
        (_, "packing" | "uploading") => refuse("it is marked complete, and is being published", &stop),
        (_, "applying") => refuse("it is marked complete, and its changes are being applied", "nothing stops it"),
        // A single command runs in the image, without an environment that would obey a mark.
        ("enter", _) | (_, "serving") if run["image_root_parent"].is_null() => {
            let name = text(run, "name");
            let there = match (text(run, "command").as_str(), verdict) {
                ("enter", _) => format!("mark it inside: touch /tmp/{}", verdict.signal_file()),
                (_, Verdict::Failed) => return give_up(run),
                (_, Verdict::Complete) => format!("'ims-sshd fail {name}' ends it, and drops the changes"),
            };
            refuse("it ends with the shell or the command that runs in it", &there)
        }
        _ => match run["image_root_parent"].as_str() {
            Some(parent) => mark_parent(Path::new(parent), verdict),
            None => refuse("it is not open yet", "wait until 'ims-sshd status' says serving"),
        },
    }
}

/// Ends a command that runs unattended, and has its run drop the changes.
fn give_up(run: &Value) -> Result<()> {
    let attempted = || format!("mark {} failed", text(run, "name"));
    // Find the process before the mark is written: once it is, the mark counts even if this function fails.
    let pid = register::process(run).ok_or_else(|| {
        Error::new(attempted())
            .because("its process is not in this PID namespace")
            .advise("run 'ims-sshd fail' where it was started, or end its command")
    })?;
    let directory = open(Path::new(run["run"].as_str().unwrap_or_default()))?;
    directory.touch(Verdict::Failed.signal_file())?;
    // The run's entry is locked as long as its process lives, so the PID still is that of the run.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).attempt(attempted)
}

fn mark_parent(parent: &Path, verdict: Verdict) -> Result<()> {
    let files = open(parent)?;
    let attempted = || Error::new(format!("mark the image in {} {}", parent.display(), verdict.signal_file()));
    let is_waiting = is_waiting(&files)?;
    if !is_waiting && files.stands(EXITING)? {
        return Err(attempted().because("its environment has already ended"));
    }
    if !files.is_claimed() {
        // On a shared volume, the environment may open later, or run on another node, where its lock is not visible
        // from here. Below /run, a missing lock means that the run has ended.
        if parent.starts_with(RUN) || !files.stands(READY)? {
            // It may be a directory whose changes were made under another path.
            if let Ok(real) = named::resolve(parent) {
                directory::refuse_kept(&real, Path::new(work_directory::DEFAULT), None, false)?;
            }
            return Err(attempted().because("no environment is open there").advise(LIST));
        }
        tracing::warn!("no environment is open in {} yet; one that opens there will find the mark", parent.display());
    }
    if is_waiting {
        if verdict == Verdict::Complete {
            return Err(attempted()
                .because("its environment is not open yet: it waits for 'ready'")
                .advise("wait until 'ims-sshd status' says serving"));
        }
        // Remove an old mark first: the environment takes a mark that exists already for an earlier job's.
        files.retract(verdict.signal_file())?;
    }
    files.touch(verdict.signal_file())
}

/// Options for printing a status.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    /// True for JSON.
    pub as_json: bool,
    /// Stages for which the exit code is 0; it is 1 for all others. If empty, the stage does not matter.
    pub is: &'a [Stage],
}

/// Prints the state of an environment, and who is logged in; for an environment in another container, only the state
/// that its signal files show. If neither an argument nor the variable names an environment, prints all environments
/// and runs on this machine.
pub fn print(named: Option<&Path>, shown: Shown<'_>) -> Result<u8> {
    let target =
        match named.map(find).or_else(|| variable().map(|parent| Ok(Target::Parent(parent)))) {
            Some(target) => target?,
            None if !shown.is.is_empty() => only_one()?,
            None => {
                let mut all = all()?;
                let left: Vec<_> = register::left().into_iter().map(with_listener).collect();
                all.extend(killed().into_iter().filter(|killed| {
                    !left.iter().any(|left| left["image_root_parent"] == killed["image_root_parent"])
                }));
                all.extend(left);
                if shown.as_json {
                    say_json(&Value::Array(all));
                } else if all.is_empty() {
                    say("nothing is open on this machine\n");
                } else {
                    say(&all.iter().map(in_words).collect::<String>());
                }
                return Ok(0);
            }
        };
    let report = match target {
        Target::Run(run) => with_report(run),
        Target::Left(left) => with_listener(left),
        Target::Parent(parent) => report_of(&parent)?,
    };
    if shown.as_json {
        say_json(&report);
    } else {
        say(&in_words(&report));
    }
    let is_wanted = |wanted: &Stage| report["state"] == wanted.name();
    Ok(u8::from(!shown.is.is_empty() && !shown.is.iter().any(is_wanted)))
}

/// The value of `IMAGE_ROOT_PARENT`.
fn variable() -> Option<PathBuf> {
    std::env::var_os("IMAGE_ROOT_PARENT").filter(|parent| !parent.is_empty()).map(PathBuf::from)
}

/// Reports of all environments and runs on this machine.
fn all() -> Result<Vec<Value>> {
    let mut all: Vec<Value> = register::entries()?.into_iter().map(with_report).collect();
    // The register lacks environments of `entrypoint`, so ask each supervisor as well.
    let directories = std::fs::read_dir(RUN).into_iter().flatten().flatten();
    for report in directories.filter_map(|directory| ask_at(&directory.path())) {
        if !all.iter().any(|known| known["image_root_parent"] == report["image_root_parent"]) {
            all.push(report);
        }
    }
    let default = Path::new(DEFAULT_PARENT);
    if all.is_empty() && default.is_dir() {
        all.extend(report_of(default).ok());
    }
    Ok(all)
}

/// Customizations that were killed and whose sshd is still running.
fn killed() -> Vec<Value> {
    let directories = std::fs::read_dir(Path::new(RUN).join("customize")).into_iter().flatten().flatten();
    let left = |parent: PathBuf| {
        let files = SignalFiles::open(&parent).ok()??;
        if files.is_claimed() || !StateDirectory::place(&parent).exists() {
            return None;
        }
        let sshd = listener(&parent)?;
        let source = String::from_utf8(files.parent().read(SOURCE, LIMIT).ok()?).ok()?;
        tracing::warn!(
            "the customization of {} was killed, and its sshd is still running; the same command ends it",
            Printable(&source)
        );
        Some(json!({ "image_root_parent": parent, "state": register::KILLED, "source": source, LISTENER: sshd }))
    };
    directories.filter_map(|directory| left(directory.path())).collect()
}

/// The only environment or run, for a command that names none.
fn only_one() -> Result<Target> {
    let mut all = all()?;
    let attempted = || Error::new("choose an environment");
    match all.len() {
        0 => Err(attempted().because("nothing is open on this machine")),
        1 => {
            let one = all.remove(0);
            let parent = one["image_root_parent"].as_str().map(PathBuf::from);
            Ok(parent.filter(|_| one["name"].is_null()).map_or(Target::Run(one), Target::Parent))
        }
        _ => {
            let names: Vec<_> = all.iter().map(name_of).collect();
            Err(attempted().because(format!("several are open: {}", names.join(", "))).advise("name one of them"))
        }
    }
}

/// Finds a run by its name, or by one of the paths that messages print; otherwise takes `named` for an image root
/// parent.
fn find(named: &Path) -> Result<Target> {
    let path = std::path::absolute(named).attempt(|| format!("find {}", named.display()))?;
    let real = named::resolve_beginning(&path).unwrap_or_else(|_| path.clone());
    let (runs, left) = (register::entries(), register::left());
    let (runs, unreadable) = runs.map_or_else(|e| (Vec::new(), Some(e)), |runs| (runs, None));
    let all = [(runs, Target::Run as fn(Value) -> Target), (left, Target::Left), (register::gone(), Target::Left)];
    for (runs, as_target) in all {
        if let Some(found) = find_in(runs, named, &path, &real)? {
            return Ok(as_target(found));
        }
    }
    // The signature of a URL is a secret, so do not show it.
    let shown = without_query(&named.to_string_lossy());
    let attempted = || Error::new(format!("find '{shown}'"));
    if path.is_file() || shown.contains("://") {
        return Err(attempted().because("no run has it open, and no changes to it are kept").advise(LIST));
    }
    if path.is_dir() || is_path(named) {
        named::resolve_beginning(&path).attempt(|| format!("find {}", named.display()))?;
        return Ok(Target::Parent(path));
    }
    unreadable.map_or(Ok(()), Err)?;
    Err(Error::new(format!("find '{}'", named.display()))
        .because("no run on this machine has this name, and it is not a directory")
        .advise(LIST))
}

/// Returns whether `named` is a path. A path is never taken for the name of a run, which may be somebody else's.
fn is_path(named: &Path) -> bool {
    let text = named.as_os_str().as_bytes();
    text.contains(&b'/') || [&b"."[..], b".."].contains(&text)
}

/// Finds, among `runs`, the run that `named` means as its name or as one of its paths.
fn find_in(mut runs: Vec<Value>, named: &Path, path: &Path, real: &Path) -> Result<Option<Value>> {
    let is_path = is_path(named);
    // Compare the name exactly as typed. Turning it into a label first would drop characters (down to `image` if none
    // remain), and the result could be another run's name.
    let typed = named.to_string_lossy();
    let is_called =
        |run: &Value| !is_path && run["name"].as_str().is_some_and(|name| name.eq_ignore_ascii_case(&typed));
    if let Some(at) = runs.iter().position(is_called) {
        return Ok(Some(runs.remove(at)));
    }
    let is_meant = |run: &Value| {
        let paths = ["image_root_parent", "work", "source"].map(|field| run[field].as_str().map(Path::new));
        let is_named = |path: &Path| !is_path && path.file_name() == Some(named.as_os_str());
        // The source may be a URL, which `path` and `real` cannot equal.
        run["source"] == without_query(&named.to_string_lossy())
            || paths.into_iter().flatten().any(|known| known == path || known == real)
            || paths[..2].iter().flatten().any(|known| is_named(known))
    };
    runs.retain(is_meant);
    match runs.len() {
        0 | 1 => Ok(runs.pop()),
        _ => {
            let called: Vec<_> = runs.iter().map(name_of).collect();
            let why = format!("it is open as {}", called.join(" and as "));
            Err(Error::new(format!("choose a run of '{}'", named.display())).because(why).advise("name one of them"))
        }
    }
}

fn text(value: &Value, field: &str) -> String {
    value[field].as_str().map_or_else(|| value[field].to_string(), |text| Printable(text).to_string())
}

fn name_of(report: &Value) -> String {
    text(report, if report["name"].is_null() { "image_root_parent" } else { "name" })
}

/// Adds the report of the run's supervisor, if the run has one.
fn with_report(mut run: Value) -> Value {
    let report = run["image_root_parent"].as_str().and_then(|parent| ask_at(&StateDirectory::place(Path::new(parent))));
    if let (Some(run), Some(Value::Object(mut report))) = (run.as_object_mut(), report) {
        // A run on a node records its state itself, and how to log in before it is open.
        if run.contains_key("node") {
            report.remove("state");
        }
        run.extend(report);
    }
    run
}

/// Adds the PID of the sshd that a killed run has left running, or null.
fn with_listener(mut left: Value) -> Value {
    let parent = left["image_root_parent"].as_str().filter(|_| left["state"] == register::KILLED);
    if let Some(pid) = parent.map(|parent| listener(Path::new(parent))) {
        left[LISTENER] = json!(pid);
    }
    left
}

/// PID of the sshd that a killed environment has left running.
fn listener(parent: &Path) -> Option<i32> {
    let state = StateDirectory::place(parent).exists().then(|| StateDirectory::of(parent).ok()).flatten()?;
    Some(Daemon::recorded(&state.sshd())?.pid.as_raw())
}

fn report_of(parent: &Path) -> Result<Value> {
    let files = open(parent)?;
    if let Some(report) = ask_at(&StateDirectory::place(parent)) {
        return Ok(report);
    }
    let (stage, since) = match stage::shown(files.parent()) {
        Some((stage, since)) => (Some(stage), Some(humantime::format_rfc3339_seconds(since).to_string())),
        None => (stage(&files)?, None),
    };
    // A waiting environment has no verdict yet: a mark in its volume is an earlier job's.
    let verdict = if stage == Some(Stage::Waiting) { None } else { files.verdict()?.map(Verdict::signal_file) };
    let root = [IMAGE_ROOT, CREATED_IMAGE_ROOT]
        .into_iter()
        .find(|place| files.parent().look(place).is_ok_and(|found| found.is_some()));
    let is_ready = files.stands(READY)?;
    if stage.is_none() && verdict.is_none() && !is_ready && root.is_none() {
        return Err(Error::new(format!("find the status of {}", parent.display()))
            .because("no run has it open, no changes to it are kept, and it holds neither image-root nor a signal file")
            .advise(LIST));
    }
    let mut report = json!({ "image_root_parent": parent, "state": stage.map(Stage::name), "verdict": verdict });
    if let Some(since) = since {
        report["since"] = since.into();
    }
    // A state directory without an environment was left behind by a killed one: an environment removes its state
    // directory when it ends, and an environment of another container has its state directory in that container.
    if stage.is_none() && StateDirectory::place(parent).exists() {
        report["state"] = register::KILLED.into();
        report[LISTENER] = json!(listener(parent));
    }
    if let Ok(node) = std::fs::read_to_string(StateDirectory::place(parent).join("node")) {
        report["node"] = node.into();
    }
    // An image root in this state was made by 'ims-sshd prepare', and no container of a pod waits for it.
    if let Some(root) = root.filter(|_| stage.is_none() && verdict.is_none() && !is_ready) {
        report[PREPARED] = json!(parent.join(root));
        report["source"] = json!(Record::private(files.parent()).read().map(|source| source.source().to_owned()));
    }
    Ok(report)
}

/// Asks the supervisor whose state directory is `state` for its report; `None` if no supervisor answers in time.
fn ask_at(state: &Path) -> Option<Value> {
    serde_json::from_slice(&report::ask(state, Duration::from_secs(2))?).ok()
}

fn in_words(report: &Value) -> String {
    let word = |value: &Value| value.as_str().map(|text| Printable(text).to_string());
    let mut text = name_of(report);
    text += ": ";
    text += &match word(&report["state"]) {
        Some(state) if state == register::KEPT => "kept changes".into(),
        Some(state) if state == register::HALF_APPLIED => "half applied".into(),
        Some(state) => state,
        None => "not open".into(),
    };
    if let Some(was) = word(&report["was"]) {
        let _ = write!(text, ", was {was}");
    }
    for (before, field) in [(" since ", "since"), (", tier ", "tier"), (", marked ", "verdict")] {
        if let Some(value) = word(&report[field]) {
            text += before;
            text += &value;
        }
    }
    text += "\n";
    for (before, field) in [("  source: ", "source"), ("  node: ", "node"), ("  log in: ", "login")] {
        if let Some(value) = word(&report[field]) {
            let _ = writeln!(text, "{before}{value}");
        }
    }
    if let Some(root) = report[PREPARED].as_str().map(Path::new) {
        let parent = Path::new(report["image_root_parent"].as_str().unwrap_or_default());
        text += &prepared(root, parent, report["source"].as_str());
    }
    if let Some(kept) = report["kept"].as_bool() {
        if kept {
            let _ = writeln!(text, "  changes: {}", word(&report["work"]).unwrap_or_default());
        }
        let line = Printable(register::resuming_line(report)).to_string();
        let masked = if line.contains(MASK) { "   (replace *** with the secret)" } else { "" };
        if register::has_source(report) {
            let _ = writeln!(text, "  {}: {line}{masked}", if kept { "resume" } else { "run again" });
        } else {
            text += "  the source is not there: it was renamed, removed or unmounted, or another one has its path\n";
        }
        let dropping = match kept {
            true if report["state"] == register::HALF_APPLIED => "drop those that are not applied",
            true => "drop",
            false => "clean up",
        };
        let _ = writeln!(text, "  {dropping}: ims-sshd fail {}", name_of(report));
    }
    // For runs of `customize` and `enter`, other lines say how to clean up.
    if report["state"] == register::KILLED && report["kept"].is_null() && report["command"].is_null() {
        if let Some(pid) = report[LISTENER].as_i64() {
            let _ = writeln!(text, "  left: sshd (process {pid}), which still listens; to end it: kill {pid}");
        }
        let line = words_of(&[report["image_root_parent"].as_str().unwrap_or_default().into()]);
        let _ = writeln!(text, "  clean up: ims-sshd entrypoint {line}, as a restarted container does");
    }
    if report["node"].is_string() && report["sessions"].is_null() && report["state"] == Stage::Serving.name() {
        text += "  sessions: on the node, which does not list them\n";
    }
    for session in report["sessions"].as_array().into_iter().flatten() {
        let column = |name| word(&session[name]).unwrap_or_default();
        let _ = writeln!(text, "  {}  since {}  {}", column("client"), column("since"), column("request"));
    }
    text
}

/// Says what can be done with an image root in `parent` that is not open. Without a recorded `source`, it was not made
/// by 'ims-sshd prepare', and nothing is said about removing it.
fn prepared(root: &Path, parent: &Path, source: Option<&str>) -> String {
    let shown = Printable(root.to_string_lossy()).to_string();
    let mut text = format!("  prepared: {shown}\n  open: ims-sshd enter {}\n", words_of(&[root.to_owned()]));
    if let Some(source) = source {
        let mut mounted = mounts_below(parent).unwrap_or_default();
        mounted.reverse();
        let unmount = if mounted.is_empty() { String::new() } else { format!("umount {} && ", words_of(&mounted)) };
        let _ = writeln!(text, "  remove: {unmount}rm -r {}", words_of(&made(parent, root, source)));
    }
    text
}

/// Paths that 'ims-sshd prepare' made in `parent` from `source`; only `parent` itself, if nothing else is in it.
fn made(parent: &Path, root: &Path, source: &str) -> Vec<PathBuf> {
    let mut all = false;
    let mut made = Vec::new();
    if let Ok(entries) = std::fs::read_dir(parent) {
        all = true;
        for entry in entries {
            let Ok(path) = entry.map(|entry| entry.path()) else {
                all = false;
                continue;
            };
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_ours = path == root
                || name.starts_with(".ims-sshd.")
                || name == OVERLAY && path.join(UPPER).is_dir()
                // Only a fetched source is a copy; otherwise a file of this name is the person's own.
                || [ARCHIVE, FETCHING].contains(&&*name) && source.contains("://");
            if is_ours {
                made.push(path);
            } else {
                all = false;
            }
        }
    }
    if all {
        return vec![parent.to_owned()];
    }
    if !made.iter().any(|path| path == root) {
        made.push(root.to_owned());
    }
    made.sort();
    made
}

fn words_of(paths: &[PathBuf]) -> String {
    shell_words::join(paths.iter().map(|path| path.to_string_lossy()))
}

fn stage(files: &SignalFiles) -> Result<Option<Stage>> {
    Ok(if is_waiting(files)? {
        Some(Stage::Waiting)
    } else if files.stands(EXITING)? {
        Some(Stage::Done)
    } else if !files.is_claimed() {
        None
    } else if files.verdict()?.is_some() {
        Some(Stage::Closing)
    } else if files.stands(SSHD_LISTENING)? {
        Some(Stage::Serving)
    } else {
        Some(Stage::Preparing)
    })
}

/// Returns whether an environment waits for `ready` in this directory. If so, its other signal files are an earlier
/// job's.
fn is_waiting(files: &SignalFiles) -> Result<bool> {
    Ok(files.is_claimed() && !files.stands(READY)?)
}

fn open(parent: &Path) -> Result<SignalFiles> {
    SignalFiles::open(parent)?.ok_or_else(|| {
        Error::new(format!("open the image root parent {}", parent.display()))
            .because("it does not exist")
            .advise("'ims-sshd status' without a name lists what is open on this machine")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_or_other_text_is_never_taken_for_the_name_of_a_run() {
        let runs = || vec![json!({ "name": "image", "source": "/srv/image.sqsh" })];
        let is_found = |named: &str| {
            let path = std::path::absolute(named).unwrap();
            find_in(runs(), Path::new(named), &path, &path).unwrap().is_some()
        };
        for named in
            [".", "./", "..", "../", "/", " ", "%", "ü", "-", "./image", "image/", "i/mage", "image.", "image.sqsh"]
        {
            assert!(!is_found(named), "{named:?}");
        }
        for named in ["image", "Image", "/srv/image.sqsh"] {
            assert!(is_found(named), "{named:?}");
        }
    }

    #[test]
    fn remove_line_names_only_what_was_prepared() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().display().to_string();
        for name in [IMAGE_ROOT, "overlay/upper"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join(".ims-sshd.source"), "").unwrap();
        let line = |source: &str| words_of(&made(dir.path(), &dir.path().join(IMAGE_ROOT), source));
        assert_eq!(line("/srv/a.sqsh"), place);
        std::fs::write(dir.path().join("image.sqsh"), "").unwrap();
        assert_eq!(line("https://store/a.sqsh"), place);
        let own = format!("{place}/.ims-sshd.source {place}/image-root {place}/overlay");
        assert_eq!(line("/srv/image.sqsh"), own);
        std::fs::write(dir.path().join("thesis"), "").unwrap();
        assert_eq!(
            line("https://store/a.sqsh"),
            format!("{place}/.ims-sshd.source {place}/image-root {place}/image.sqsh {place}/overlay")
        );
    }
}
