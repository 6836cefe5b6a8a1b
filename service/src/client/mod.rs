//! Commands that ask a running service, with the syntax of `cray ims`.

mod arguments;
mod connection;
mod import;
mod requests;
mod session;
mod shown;
mod value;

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::sshd::public_keys::check_text;
use uuid::Uuid;

pub use arguments::Command;
use arguments::{
    Common, Deleted, DeletedVerb, Group, Images, JobType, Jobs, NodeStatus, Nodes, PublicKeys, Recipes, Sure,
};
use connection::Service;
use requests::Kind;
use serde_json::json;
use value::Value;

/// Carries out `command`; returns the program's exit code.
pub fn run(command: Command) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().attempt(|| "start")?;
    runtime.block_on(carry_out(command))
}

async fn carry_out(command: Command) -> Result<ExitCode> {
    let (answer, format) = match command {
        Command::PublicKeys(Group { place, verb }) => (public_keys(&Service::at(&place)?, verb).await?, place.format),
        Command::Recipes(group) => (recipes(&Service::at(&group.place)?, group.verb).await?, group.place.format),
        Command::Images(group) => (images(&Service::at(&group.place)?, group.verb).await?, group.place.format),
        Command::Jobs(group) => {
            let answer = jobs(&Service::at(&group.place)?, group.verb).await?;
            (without_pending(answer), group.place.format)
        }
        Command::Deleted(Group { place, verb }) => (deleted(&Service::at(&place)?, verb).await?, place.format),
        Command::RemoteBuildNodes(Group { place, verb }) => (nodes(&Service::at(&place)?, verb).await?, place.format),
    };
    let text = shown::text(&answer, format);
    std::io::stdout().write_all(text.as_bytes()).attempt(|| "write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Removes the status `pending` of a job's containers. No service ever changes it, not even upstream's, so a finished
/// job would look as if it had not started.
fn without_pending(mut answer: Value) -> Value {
    let jobs = match &mut answer {
        Value::List(jobs) => jobs.as_mut_slice(),
        job => std::slice::from_mut(job),
    };
    for container in jobs.iter_mut().filter_map(|job| job.get_mut("ssh_containers")).flat_map(Value::rows_mut) {
        if let Value::Table(fields) = container {
            fields.retain(|(name, value)| name != "status" || *value != Value::Text("pending".into()));
        }
    }
    answer
}

async fn public_keys(service: &Service, verb: PublicKeys) -> Result<Value> {
    match verb {
        PublicKeys::Create { name, public_key } => {
            let text = read(&public_key)?;
            check_text("--public-key", &public_key, &text)?;
            service.ask(&requests::new_key(&name, &text)).await
        }
        PublicKeys::Common(verb) => common(service, requests::PUBLIC_KEYS, verb).await,
    }
}

async fn recipes(service: &Service, verb: Recipes) -> Result<Value> {
    match verb {
        Recipes::Create { name, recipe_type, linux_distribution, fields } => {
            let (link, build) = (Some(&fields.link), &fields.build);
            service.ask(&requests::new_recipe(&name, recipe_type, linux_distribution, link, build)?).await
        }
        Recipes::Update { one, fields } => {
            let id = find(service, requests::RECIPES, &one.id).await?;
            service.ask(&requests::changed_recipe(&id, &fields)?).await
        }
        Recipes::Import(wanted) => import::recipe(service, &wanted).await,
        Recipes::Common(verb) => common(service, requests::RECIPES, verb).await,
    }
}

async fn images(service: &Service, verb: Images) -> Result<Value> {
    match verb {
        Images::Create { name, fields } => service.ask(&requests::new_image(&name, &fields)).await,
        Images::Update { one, metadata_operation, fields } => {
            let id = find(service, requests::IMAGES, &one.id).await?;
            service.ask(&requests::changed_image(&id, metadata_operation, &fields)).await
        }
        Images::Import(wanted) => import::image(service, &wanted).await,
        Images::Common(verb) => common(service, requests::IMAGES, verb).await,
    }
}

async fn jobs(service: &Service, verb: Jobs) -> Result<Value> {
    let kind = requests::JOBS;
    match verb {
        Jobs::Create(job) => {
            let artifacts = match job.job_type {
                JobType::Create => requests::RECIPES,
                JobType::Customize => requests::IMAGES,
            };
            let artifact = find(service, artifacts, &job.artifact_id).await?;
            let key = find(service, requests::PUBLIC_KEYS, &job.public_key_id).await?;
            service.ask(&requests::new_job(&job, &artifact, &key)?).await
        }
        Jobs::List => common(service, kind, Common::List).await,
        Jobs::Describe(one) => common(service, kind, Common::Describe(one)).await,
        Jobs::Delete(one) => {
            let id = find(service, kind, &one.id).await?;
            let answer = service.ask(&kind.delete(&id)).await?;
            session::forget(&id);
            Ok(answer)
        }
        Jobs::Deleteall { filters, sure } => {
            let request = requests::delete_jobs(&filters);
            confirm(&sure, if request.query.is_empty() { "all jobs" } else { "all jobs that fit the filters" })?;
            let before = service.ask(&kind.list()).await?;
            let answer = service.ask(&request).await;
            if let Ok(after) = service.ask(&kind.list()).await {
                let is_there = |id: &str| after.rows().iter().any(|job| job.text("id") == Some(id));
                let ids = before.rows().iter().filter_map(|job| job.text("id"));
                ids.filter(|id| !is_there(id)).for_each(session::forget);
            }
            answer
        }
        Jobs::Logs { follow, one } => {
            let id = find(service, kind, &one.id).await?;
            let (request, mut terminal) = (requests::log(&id, follow), shown::Parts::default());
            if std::io::stdout().is_terminal() {
                service.copy(&request, |part| terminal.shown(part)).await?;
            } else {
                service.copy(&request, <[u8]>::to_vec).await?;
            }
            Ok(Value::Null)
        }
        Jobs::Ssh { identity, one, command } => {
            let id = find(service, kind, &one.id).await?;
            match session::log_in(service, &id, identity.as_deref(), &command).await? {}
        }
    }
}

async fn deleted(service: &Service, verb: Deleted) -> Result<Value> {
    let (kind, verb) = match verb {
        Deleted::PublicKeys { verb } => (requests::DELETED_KEYS, verb),
        Deleted::Recipes { verb } => (requests::DELETED_RECIPES, verb),
        Deleted::Images { verb } => (requests::DELETED_IMAGES, verb),
    };
    match verb {
        DeletedVerb::Update { one, operation } => {
            let id = find(service, kind, &one.id).await?;
            service.ask(&kind.update(&id, json!({ "operation": operation }))).await
        }
        DeletedVerb::Common(verb) => common(service, kind, verb).await,
    }
}

/// Carries out a command about nodes. The name of a node is also its ID.
async fn nodes(service: &Service, verb: Nodes) -> Result<Value> {
    let request = match verb {
        Nodes::Create { xname } => requests::NODES.create(&xname, json!({ "xname": xname })),
        Nodes::Status { verb: NodeStatus::List } => requests::STATUSES.list(),
        Nodes::Status { verb: NodeStatus::Describe(one) } => requests::STATUSES.describe(&one.id),
        Nodes::Common(Common::List) => requests::NODES.list(),
        Nodes::Common(Common::Describe(one)) => requests::NODES.describe(&one.id),
        Nodes::Common(Common::Delete(one)) => requests::NODES.delete(&one.id),
        Nodes::Common(Common::Deleteall(sure)) => {
            confirm(&sure, "all remote build nodes")?;
            requests::NODES.delete_all()
        }
    };
    service.ask(&request).await
}

async fn common(service: &Service, kind: Kind, verb: Common) -> Result<Value> {
    let request = match verb {
        Common::List => kind.list(),
        Common::Describe(one) => kind.describe(&find(service, kind, &one.id).await?),
        Common::Delete(one) => kind.delete(&find(service, kind, &one.id).await?),
        Common::Deleteall(sure) => {
            confirm(&sure, &format!("all {}", kind.plural()))?;
            kind.delete_all()
        }
    };
    service.ask(&request).await
}

/// Asks before `what` is deleted, on a terminal only: `cray` does not ask, and scripts rely on that.
fn confirm(sure: &Sure, what: &str) -> Result<()> {
    let stdin = std::io::stdin();
    if sure.yes || !stdin.is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(());
    }
    eprint!("Delete {what}? (y)es, (n)o [n]: ");
    let mut answer = String::new();
    stdin.read_line(&mut answer).attempt(|| "read the answer")?;
    if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    Err(Error::new(format!("delete {what}")).because("the answer was not 'yes'").advise("--yes deletes without asking"))
}

/// Returns the ID of the record that the user names by its ID or by its name.
async fn find(service: &Service, kind: Kind, named: &str) -> Result<String> {
    if Uuid::try_parse(named).is_ok() {
        return Ok(named.to_owned());
    }
    let records = service.ask(&kind.list()).await?;
    let found: Vec<_> = records.rows().iter().filter(|record| record.text(kind.name) == Some(named)).collect();
    let attempted = || Error::new(format!("find the {} '{named}'", kind.noun));
    match found.as_slice() {
        [record] => {
            let id = record.text("id").ok_or_else(|| attempted().because("the service answers a record without ID"))?;
            Ok(id.to_owned())
        }
        [] => Err(attempted().because("no record has this ID or name")),
        several => Err(attempted()
            .because(format!("{} records have this name", several.len()))
            .advise("name one by its ID, which 'list' shows")),
    }
}

/// Reads a file; `-` is standard input.
fn read(file: &Path) -> Result<String> {
    let attempted = || format!("read {}", file.display());
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).attempt(attempted)?;
        return Ok(text);
    }
    std::fs::read_to_string(file).attempt(attempted)
}
