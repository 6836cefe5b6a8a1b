//! Dispatch of commands, with the rules that only the command line has.

use std::path::{Path, PathBuf};

use clap::{CommandFactory, ValueEnum};

use crate::cli::arguments::{
    Arguments, Command, CreateArguments, CustomizeArguments, EnterArguments, JobOptions, Named, SidecarArguments,
    refuse_late_options,
};
use crate::cli::options::variables;
use crate::cli::recipe;
use crate::environment::settings::Settings;
use crate::environment::supervisor;
use crate::error::{Attempt, Error, Result};
use crate::job::DEFAULT_PARENT;
use crate::local::command_line::CommandLine;
use crate::local::create;
use crate::local::customize::{self, Customization};
use crate::local::enter::{self, Answer, Entry};
use crate::local::remote::{self as offloaded, Offloaded};
use crate::local::run::{End, Reports, Run};
use crate::local::script::Script;
use crate::local::status::{self, Shown};
use crate::local::{self, names, steps, work_directory};
use crate::log::format::{self, Format};
use crate::manual;
use crate::pod::sidecar::{self, Places};
use crate::publish::settings as publishing;
use crate::publish::source::{self, Source};
use crate::recipe::repositories;
use crate::remote::build::Node;
use crate::remote::{self, node};
use crate::sys::named;
use crate::transfer::without_query;
use crate::verdict::Verdict;

/// Carries out the command and returns the exit code.
pub fn run(arguments: Arguments) -> Result<u8> {
    let mut log = format::start(arguments.log_format);
    // These commands report a refusal to IMS.
    let reports = matches!(
        arguments.command,
        Command::Prepare { .. }
            | Command::Sidecar(_)
            | Command::FetchRecipe(_)
            | Command::WaitForRepos(_)
            | Command::CaRpm(_)
            | Command::Build(_)
    );
    if !reports {
        std::mem::replace(&mut log, Ok(()))?;
    }
    match arguments.command {
        Command::Entrypoint { image_root_parent } => entrypoint(image_root_parent, arguments.log_format),
        Command::Customize(arguments) => run_customize(arguments),
        Command::Enter(arguments) => run_enter(arguments),
        Command::Complete(Named { name }) => status::mark(name.as_deref(), Verdict::Complete),
        Command::Fail(Named { name }) => status::mark(name.as_deref(), Verdict::Failed),
        Command::Status { named, json, is } => status::print(named.name.as_deref(), Shown { as_json: json, is: &is }),
        Command::Prepare { first, second, open, fresh, checksum, servers } => {
            let variables = variables(checksum.variables().into_iter().chain(servers.variables()));
            // Either argument may be the image root's parent.
            let parent = parent_or_default(second.is_some().then(|| PathBuf::from(&first)));
            let places: Vec<_> = [parent].into_iter().chain(second.as_ref().map(PathBuf::from)).collect();
            let read = log.and_then(|()| {
                let (parent, source) = parent_and_source(first, second)?;
                let settings = publishing::Settings::read(parent, variables.clone())?;
                let source = steps::source_to_prepare(&settings, &source::rootfs_of(source))?;
                Ok((settings, source))
            });
            let (settings, source) = read.inspect_err(|_| steps::report_refusal(&places, variables))?;
            steps::prepare(&settings, &source, open, fresh)
        }
        Command::Sidecar(arguments) => run_sidecar(arguments, log),
        Command::Create(arguments) => run_create(arguments),
        Command::FetchRecipe(arguments) => recipe::fetch(arguments, log),
        Command::WaitForRepos(arguments) => recipe::wait(arguments, log),
        Command::CaRpm(arguments) => recipe::ca_rpm(&arguments, log),
        Command::Build(arguments) => recipe::build(arguments, log),
        Command::Package { image_root, archive, packing, image } => {
            let options = image.variables_or_auto().into_iter().chain(packing.variables());
            let settings = publishing::Settings::read(None, variables(options))?;
            let (named, archive, changes) = (image_root.as_deref(), archive.as_deref(), packing.changes.as_deref());
            steps::package(&settings, named, archive, &packing.exclude, changes)
        }
        Command::Upload { image_root, archive, debug_kernel, image, parameters, store, servers } => {
            let options =
                image.variables_or_auto().into_iter().chain(parameters.variables()).chain(servers.variables());
            let options = options.chain([("IMAGE_STORE", store.store)]);
            let settings = publishing::Settings::read(None, variables(options))?;
            steps::upload(&settings, image_root.as_deref(), archive.as_deref(), debug_kernel.as_deref())
        }
        Command::Node { inside, shell } => node::run(inside, shell),
        Command::Completions { shell } => {
            let mut to = std::io::stdout();
            let written = manual::write_completions(&mut Arguments::command(), shell, &mut to);
            written.attempt(|| "print the completions").map(|()| 0)
        }
        Command::Man { directory } => {
            let written = manual::write_pages(Arguments::command(), &directory);
            written.attempt(|| format!("write the man pages into {}", directory.display())).map(|()| 0)
        }
    }
}

/// The image root's parent and the source of `prepare`. The source comes last, but is recognized where it comes first.
fn parent_and_source(first: String, second: Option<String>) -> Result<(Option<PathBuf>, String)> {
    let Some(second) = second else { return Ok((None, first)) };
    let is_source = |named: &str| named.contains("://") || Path::new(named).is_file();
    if is_source(&first) && !is_source(&second) {
        return Ok((Some(second.into()), first));
    }
    let is_image_root = |named: &str| ["etc", "usr", "bin"].iter().any(|name| Path::new(named).join(name).is_dir());
    if !is_source(&second) && !Path::new(&second).exists() && is_image_root(&first) {
        let line = shell_words::join(["ims-sshd", "prepare", &second, &first]);
        return Err(Error::bad_input(format!("SOURCE is '{second}': No such file or directory"))
            .advise(format!("SOURCE comes last: {line}")));
    }
    Ok((Some(first.into()), second))
}

/// The image root's parent, if other containers of a pod wait there for this command and must hear of its refusal.
pub fn awaited_parent(arguments: &Arguments) -> Option<PathBuf> {
    match &arguments.command {
        Command::Entrypoint { image_root_parent } => Some(parent_or_default(image_root_parent.clone())),
        _ => None,
    }
}

fn parent_or_default(given: Option<PathBuf>) -> PathBuf {
    let named = || std::env::var_os("IMAGE_ROOT_PARENT").filter(|p| !p.is_empty()).map(PathBuf::from);
    given.or_else(named).unwrap_or_else(|| DEFAULT_PARENT.into())
}

fn entrypoint(image_root_parent: Option<PathBuf>, log_format: Option<Format>) -> Result<u8> {
    let parent = parent_or_default(image_root_parent.clone());
    let settings = Settings::read(image_root_parent, std::env::vars_os()).map_err(|refusal| {
        // A container that was started without any variable lacks the volume as well, so name both problems in one
        // message.
        let missing = || format!("{} does not exist: mount the job's volume there", parent.display());
        if parent.exists() { refusal } else { refusal.advise(missing()) }
    })?;
    if remote::entrypoint::is_remote(&settings) {
        let log_format = log_format.and_then(|format| Some(format.to_possible_value()?.get_name().to_owned()));
        return remote::entrypoint::run(&settings, variables([("LOG_FORMAT", log_format)]));
    }
    supervisor::run(settings, None, || {}).map(|outcome| outcome.exit_code)
}

fn run_customize(mut arguments: CustomizeArguments) -> Result<u8> {
    let given: Vec<_> = std::env::args_os().collect();
    refuse_late_options("customize", &arguments.command, &given)?;
    arguments.source = source::rootfs_of(arguments.source);
    if arguments.job.output.is_none() && !Path::new(&arguments.source).is_dir() {
        return Err(without_output(&arguments.source));
    }
    let line = CommandLine::new("customize", &given, arguments.command.len());
    let is_unattended = arguments.script.is_some() || !arguments.command.is_empty();
    let script = arguments.script.as_deref().map(Script::read).transpose()?;
    let run = local_run(arguments.job, arguments.source, Some(End::Applied), line)?;
    if let Some(node) = arguments.node {
        let wanted = Customization {
            port: arguments.port,
            listen: arguments.listen,
            authorized_key: arguments.authorized_key,
            jailed: !arguments.plain,
            binds: Vec::new(),
            variables: arguments.jail.env,
            host_script: None,
        };
        let offloaded = Offloaded { wanted, command: arguments.command, script };
        return offloaded::run(Run { node: Some(node), ..run }, &offloaded);
    }
    if is_unattended {
        let entry = Entry {
            command: arguments.command,
            script,
            variables: arguments.jail.env,
            binds: arguments.jail.bind,
            answer: Some(Answer::Yes),
            heeds_dkms: true,
        };
        return enter::run(run, &entry);
    }
    let wanted = Customization {
        port: arguments.port,
        listen: arguments.listen,
        authorized_key: arguments.authorized_key,
        jailed: !arguments.plain,
        binds: arguments.jail.bind,
        variables: arguments.jail.env,
        host_script: arguments.host_script,
    };
    customize::run(run, &wanted)
}

fn run_enter(mut arguments: EnterArguments) -> Result<u8> {
    let given: Vec<_> = std::env::args_os().collect();
    refuse_late_options("enter", &arguments.command, &given)?;
    arguments.source = source::rootfs_of(arguments.source);
    let answer = match (arguments.yes, arguments.discard) {
        (true, _) => Some(Answer::Yes),
        (_, true) => Some(Answer::Discard),
        _ => None,
    };
    let line = CommandLine::new("enter", &given, arguments.command.len());
    let entry = Entry {
        command: arguments.command,
        script: arguments.script.as_deref().map(Script::read).transpose()?,
        variables: arguments.jail.env,
        binds: arguments.jail.bind,
        answer,
        heeds_dkms: false,
    };
    // With `--discard` no changes are kept; without it, the directory itself is changed, as by chroot.
    let end = arguments.discard.then_some(End::Discarded);
    let run = local_run(arguments.job, arguments.source, end, line)?;
    enter::run(Run { discards: arguments.discard, ..run }, &entry)
}

fn run_create(arguments: CreateArguments) -> Result<u8> {
    let work = arguments.work.unwrap_or_else(|| "/var/lib".into());
    let work = std::path::absolute(&work).attempt(|| format!("find {}", work.display()))?;
    let name = names::of_source(&arguments.recipe);
    let options = arguments.image.named_by(&arguments.recipe).variables_or_auto().into_iter();
    let options = options.chain(arguments.parameters.variables()).chain(arguments.checksum.variables());
    let options = options.chain([
        ("IMAGE_COMPRESSION", arguments.packing.compression),
        ("IMAGE_STORE", Some(arguments.output)),
        ("BUILD_ARCH", arguments.arch),
        ("TIMEOUT", arguments.timeout),
        ("IMS_ACTION", Some("create".into())),
        // A local build has no IMS job, so ignore IMS_JOB_ID.
        ("IMS_JOB_ID", Some(String::new())),
    ]);
    let variables = variables(options);
    let limit = repositories::limit(variables.clone())?;
    let settings = publishing::Settings::read(Some(work.join(create::DIRECTORY).join(name)), variables.clone())?;
    let node = arguments.node.as_deref().map(|host| Node::named(&settings, host, variables)).transpose()?;
    create::run(create::Creation {
        source: arguments.recipe,
        values: (arguments.values.values, arguments.values.set),
        profiles: arguments.profiles.profile,
        limit,
        authority: arguments.authority,
        signing_keys: arguments.keys.signing_key,
        exclude: arguments.packing.exclude,
        has_debug_shell: arguments.debug_shell,
        node,
        command_line: CommandLine::new("customize", &std::env::args_os().collect::<Vec<_>>(), 0),
        settings,
    })
}

/// The run on `source`. The changes to a directory without an output end as `end` says; without an `end` the directory
/// is changed in place.
fn local_run(options: JobOptions, source: String, end: Option<End>, command_line: CommandLine) -> Result<Run> {
    let JobOptions { output, in_place, fresh, work, checksum, json, packing, image, parameters } = options;
    let is_directory = Path::new(&source).is_dir();
    if is_directory && checksum.sha256.is_some() {
        let complaint = format!("--sha256 is given, and SOURCE is '{source}': expected a file or a URL");
        return Err(Error::bad_input(complaint));
    }
    if in_place && !is_directory {
        let shown = without_query(&source);
        return Err(Error::bad_input(format!("--in-place is given, and SOURCE is '{shown}': expected a directory")));
    }
    if let Some((given, missing)) = work.as_deref().and_then(|given| Some((given, named::missing_parent(given)?))) {
        let complaint = format!("--work is '{}': {} does not exist", given.display(), missing.display());
        return Err(Error::bad_input(complaint).advise("create it first"));
    }
    let work = work.map_or_else(|| work_directory::DEFAULT.into(), |directory| directory.join("ims-sshd"));
    let work = std::path::absolute(&work).attempt(|| format!("find {}", work.display()))?;
    let in_place = is_directory && (in_place || output.is_none() && end.is_none());
    let end = if output.is_some() { End::Published } else { end.unwrap_or(End::Discarded) };
    if fresh && (in_place || end == End::Discarded) {
        return Err(Error::bad_input("--fresh is given, and this run neither uses nor keeps changes")
            .advise("'ims-sshd fail SOURCE' drops kept changes"));
    }
    let name = image.given_name();
    // A directory that is changed in place and not published needs no settings.
    let settings = if output.is_none() && in_place {
        None
    } else {
        let options = image.named_by(&source).variables_or_auto().into_iter().chain(checksum.variables());
        let options = options.chain(parameters.variables());
        let variables = variables(options.chain(packing.variables()));
        let mut settings = publishing::Settings::read(Some(work.clone()), variables)?;
        settings.store.url = output;
        Some(settings)
    };
    let (source, named) = (local::source::resolve(&source)?, source);
    let (exclude, reports) = (packing.exclude, Reports { changes: packing.changes, result: json });
    Ok(Run {
        source,
        named,
        command_line,
        name,
        node: None,
        in_place,
        fresh,
        discards: false,
        unattended: None,
        end,
        settings,
        work,
        exclude,
        reports,
    })
}

/// Refuses a source that cannot be changed in place.
fn without_output(source: &str) -> Error {
    if let Ok(Source::Here(path)) = Source::parse(source)
        && let Err(e) = std::fs::metadata(&path)
    {
        return Error::bad_input(format!("SOURCE is '{source}': {e}"));
    }
    let shown = without_query(source);
    let command = shell_words::join(["ims-sshd", "customize", &shown, "--output", "./out"]);
    Error::bad_input("--output is missing: SOURCE is a file or URL and stays as it is, so the new image needs a place")
        .advise(format!("for example: {command}"))
}

/// Runs a sidecar, which reports a refusal of its `log` or settings.
fn run_sidecar(arguments: SidecarArguments, log: Result<()>) -> Result<u8> {
    let options = arguments.image.variables().into_iter().chain(arguments.parameters.variables());
    let options = options.chain(arguments.servers.variables()).chain(arguments.packing.variables());
    let options = options.chain([("IMAGE_STORE", arguments.store.store)]);
    let variables = variables(options);
    let parent = arguments.image_root_parent;
    let settings = log.and_then(|()| publishing::Settings::read(parent.clone(), variables.clone()));
    let places = Places {
        authorized_keys: arguments.authorized_keys,
        sshd_config: arguments.sshd_config,
        sshd_directory: arguments.sshd_directory,
        authorities: arguments.authorities,
        exclude: arguments.packing.exclude,
        changes: arguments.packing.changes,
    };
    sidecar::run(settings, (parent, variables), &places)
}
