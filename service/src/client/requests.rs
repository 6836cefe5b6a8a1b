//! Requests that each verb makes to the service.

use reqwest::Method;
use serde_json::{Map, Value, json};

use ims_sshd::error::{Error, Result};

use super::arguments::{
    Arch, BuildFields, Distribution, Filters, ImageFields, Link, NewJob, Operation, RecipeFields, RecipeType,
};
use super::connection::Request;

/// A kind of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    /// Segments of the path of all its records.
    path: &'static [&'static str],
    /// One of them, in a message.
    pub(super) noun: &'static str,
    /// Field by which people name a record.
    pub(super) name: &'static str,
}

pub(super) const PUBLIC_KEYS: Kind = Kind { path: &["public-keys"], noun: "public key", name: "name" };
pub(super) const RECIPES: Kind = Kind { path: &["recipes"], noun: "recipe", name: "name" };
pub(super) const IMAGES: Kind = Kind { path: &["images"], noun: "image", name: "name" };
pub(super) const JOBS: Kind = Kind { path: &["jobs"], noun: "job", name: "image_root_archive_name" };
pub(super) const NODES: Kind = Kind { path: &["remote-build-nodes"], noun: "remote build node", name: "xname" };
pub(super) const DELETED_KEYS: Kind =
    Kind { path: &["deleted", "public-keys"], noun: "deleted public key", name: "name" };
pub(super) const DELETED_RECIPES: Kind = Kind { path: &["deleted", "recipes"], noun: "deleted recipe", name: "name" };
pub(super) const DELETED_IMAGES: Kind = Kind { path: &["deleted", "images"], noun: "deleted image", name: "name" };
pub(super) const STATUSES: Kind =
    Kind { path: &["remote-build-nodes", "status"], noun: "status of the remote build node", name: "xname" };

impl Kind {
    fn request(self, attempted: String, method: Method, further: &[&str], body: Option<Value>) -> Request {
        let path = self.path.iter().chain(further).map(|segment| (*segment).to_owned()).collect();
        Request { attempted, method, path, query: Vec::new(), body }
    }

    pub(super) fn list(self) -> Request {
        self.request(format!("list the {}", self.plural()), Method::GET, &[], None)
    }

    pub(super) fn describe(self, id: &str) -> Request {
        self.request(format!("read the {} {id}", self.noun), Method::GET, &[id], None)
    }

    pub(super) fn create(self, name: &str, body: Value) -> Request {
        self.request(format!("create the {} '{name}'", self.noun), Method::POST, &[], Some(body))
    }

    pub(super) fn update(self, id: &str, body: Value) -> Request {
        self.request(format!("update the {} {id}", self.noun), Method::PATCH, &[id], Some(body))
    }

    pub(super) fn delete(self, id: &str) -> Request {
        self.request(format!("delete the {} {id}", self.noun), Method::DELETE, &[id], None)
    }

    pub(super) fn delete_all(self) -> Request {
        self.request(format!("delete the {}", self.plural()), Method::DELETE, &[], None)
    }

    /// All of them, in a message.
    pub(super) fn plural(self) -> String {
        if self == STATUSES { "statuses of the remote build nodes".into() } else { format!("{}s", self.noun) }
    }
}

/// Log of the job `id`.
pub(super) fn log(id: &str, is_followed: bool) -> Request {
    let mut request = JOBS.request(format!("read the log of the job {id}"), Method::GET, &[id, "logs"], None);
    if is_followed {
        request.query.push(("follow", "true".into()));
    }
    request
}

/// Deletion of jobs that fit all filters.
pub(super) fn delete_jobs(filters: &Filters) -> Request {
    let mut request = JOBS.delete_all();
    request.query.extend(filters.status.iter().map(|status| ("status", status.clone())));
    request.query.extend(filters.job_type.iter().map(|kind| ("job_type", kind.word().to_owned())));
    request.query.extend(filters.age.iter().map(|age| ("age", age.clone())));
    request
}

/// Fields of a body; those that are not given are left out.
#[derive(Default)]
struct Body(Map<String, Value>);

impl Body {
    fn with(mut self, name: &str, value: Option<impl Into<Value>>) -> Self {
        if let Some(value) = value {
            self.0.insert(name.to_owned(), value.into());
        }
        self
    }

    /// Adds an object, unless it has no member.
    fn with_object(self, name: &str, members: Self) -> Self {
        let is_given = !members.0.is_empty();
        self.with(name, is_given.then_some(members.0))
    }

    /// Adds a list of objects, whose members are given as one list each.
    fn with_rows<A: Clone + Into<Value>, B: Clone + Into<Value>>(
        self,
        name: &str,
        (first, one): (&str, &[A]),
        (second, other): (&str, &[B]),
    ) -> Result<Self> {
        if one.len() != other.len() {
            let option = |member: &str| format!("--{name}-{member}").replace('_', "-");
            let (first, second) = (option(first), option(second));
            return Err(Error::bad_input(format!("{first} and {second} are lists of different lengths")));
        }
        let row = |(one, other): (&A, &B)| json!({ first: one.clone().into(), second: other.clone().into() });
        let rows: Vec<_> = one.iter().zip(other).map(row).collect();
        Ok(self.with(name, (!rows.is_empty()).then_some(rows)))
    }

    fn with_link(self, link: &Link) -> Self {
        let Link { path, etag, kind } = link;
        let members = Self::default().with("path", path.clone()).with("etag", etag.clone());
        self.with_object("link", members.with("type", kind.clone()))
    }

    fn with_arch(self, arch: Option<Arch>) -> Self {
        self.with("arch", arch.map(Arch::word))
    }

    fn with_build(self, build: &BuildFields) -> Result<Self> {
        let (keys, values) = (&build.template_dictionary_key, &build.template_dictionary_value);
        self.with_arch(build.arch).with("require_dkms", build.require_dkms).with_rows(
            "template_dictionary",
            ("key", keys),
            ("value", values),
        )
    }

    fn with_image(self, operation: Option<Operation>, fields: &ImageFields) -> Self {
        let metadata = Self::default()
            .with("operation", operation.map(Operation::word))
            .with("key", fields.metadata_key.clone())
            .with("value", fields.metadata_value.clone());
        self.with_link(&fields.link).with_arch(fields.arch).with_object("metadata", metadata)
    }
}

pub(super) fn new_key(name: &str, public_key: &str) -> Request {
    PUBLIC_KEYS.create(name, json!({ "name": name, "public_key": public_key }))
}

pub(super) fn new_recipe(
    name: &str,
    kind: RecipeType,
    distribution: Distribution,
    link: Option<&Link>,
    build: &BuildFields,
) -> Result<Request> {
    let body = Body::default()
        .with("name", Some(name))
        .with("recipe_type", Some(kind.word()))
        .with("linux_distribution", Some(distribution.word()))
        .with_build(build)?;
    let body = match link {
        Some(link) => body.with_link(link),
        None => body,
    };
    Ok(RECIPES.create(name, body.0.into()))
}

pub(super) fn changed_recipe(id: &str, fields: &RecipeFields) -> Result<Request> {
    Ok(RECIPES.update(id, Body::default().with_link(&fields.link).with_build(&fields.build)?.0.into()))
}

pub(super) fn new_image(name: &str, fields: &ImageFields) -> Request {
    IMAGES.create(name, Body::default().with("name", Some(name)).with_image(None, fields).0.into())
}

pub(super) fn changed_image(id: &str, operation: Option<Operation>, fields: &ImageFields) -> Request {
    IMAGES.update(id, Body::default().with_image(operation, fields).0.into())
}

/// A job, whose artifact and key have these IDs. Names the boot files `auto` unless options name them: the service's
/// own default, upstream's `vmlinuz`, is the name in few images, and a job that does not find its kernel fails.
pub(super) fn new_job(job: &NewJob, artifact: &str, key: &str) -> Result<Request> {
    let body = Body::default()
        .with("job_type", Some(job.job_type.word()))
        .with("artifact_id", Some(artifact))
        .with("public_key_id", Some(key))
        .with("image_root_archive_name", Some(job.image_root_archive_name.as_str()))
        .with("kernel_file_name", Some(job.kernel_file_name.as_str()))
        .with("initrd_file_name", Some(job.initrd_file_name.as_str()))
        .with("kernel_parameters_file_name", job.kernel_parameters_file_name.as_deref())
        .with("enable_debug", job.enable_debug)
        .with("build_env_size", job.build_env_size)
        .with("require_dkms", job.require_dkms)
        .with_rows("ssh_containers", ("name", &job.ssh_containers_name), ("jail", &job.ssh_containers_jail))?;
    Ok(JOBS.create(&job.image_root_archive_name, body.0.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::arguments::{Command, Images, Jobs, Recipes};
    use clap::Parser;

    #[derive(Parser)]
    struct Words {
        #[command(subcommand)]
        command: Command,
    }

    fn parsed(line: &str) -> Command {
        let words = std::iter::once("ims").chain(line.split_whitespace());
        Words::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}")).command
    }

    fn is_sent(request: &Request, method: &Method, path: &str, body: &str) {
        assert_eq!((&request.method, request.path.join("/").as_str()), (method, path));
        let body: Option<Value> = (!body.is_empty()).then(|| serde_json::from_str(body).unwrap());
        assert_eq!(request.body, body, "{path}");
    }

    /// Words as the manual and the tests of `cray` have them, and the bodies that `cray` makes of them.
    #[test]
    fn words_of_cray_become_its_requests() {
        let line = "jobs create --build-env-size 15 --enable-debug True --public-key-id k --artifact-id a \
            --initrd-file-name i --kernel-file-name v --image-root-archive-name n --job-type customize \
            --require-dkms False --ssh-containers-name customize --ssh-containers-jail True";
        let Command::Jobs(jobs) = parsed(line) else { panic!() };
        let Jobs::Create(job) = jobs.verb else { panic!() };
        let body = r#"{"build_env_size":15,"enable_debug":true,"public_key_id":"K","artifact_id":"A",
            "initrd_file_name":"i","kernel_file_name":"v","image_root_archive_name":"n","job_type":"customize",
            "require_dkms":false,"ssh_containers":[{"name":"customize","jail":true}]}"#;
        is_sent(&new_job(&job, "A", "K").unwrap(), &Method::POST, "jobs", body);

        let line = "jobs create --public-key-id k --artifact-id a --image-root-archive-name n --job-type create";
        let Command::Jobs(jobs) = parsed(line) else { panic!() };
        let Jobs::Create(job) = jobs.verb else { panic!() };
        let body = r#"{"public_key_id":"K","artifact_id":"A","initrd_file_name":"auto","kernel_file_name":"auto",
            "image_root_archive_name":"n","job_type":"create"}"#;
        is_sent(&new_job(&job, "A", "K").unwrap(), &Method::POST, "jobs", body);

        let line = "recipes create --name foo --linux-distribution sles15 --recipe-type kiwi-ng --link-type s3 \
            --link-path s3://ims/r --link-etag e --template-dictionary-key A,B --template-dictionary-value 1,2 \
            --require-dkms true --arch aarch64";
        let Command::Recipes(recipes) = parsed(line) else { panic!() };
        let Recipes::Create { name, recipe_type, linux_distribution, fields } = recipes.verb else { panic!() };
        let body = r#"{"name":"foo","linux_distribution":"sles15","recipe_type":"kiwi-ng","arch":"aarch64",
            "link":{"type":"s3","path":"s3://ims/r","etag":"e"},"require_dkms":true,
            "template_dictionary":[{"key":"A","value":"1"},{"key":"B","value":"2"}]}"#;
        let RecipeFields { link, build } = fields;
        let request = new_recipe(&name, recipe_type, linux_distribution, Some(&link), &build).unwrap();
        is_sent(&request, &Method::POST, "recipes", body);

        let line = "images update foo --metadata-operation set --metadata-key sbps-project --metadata-value true";
        let Command::Images(images) = parsed(line) else { panic!() };
        let Images::Update { one, metadata_operation, fields } = images.verb else { panic!() };
        let body = r#"{"metadata":{"operation":"set","key":"sbps-project","value":"true"}}"#;
        is_sent(&changed_image(&one.id, metadata_operation, &fields), &Method::PATCH, "images/foo", body);

        let line = "images update foo --link-type s3 --link-path s3://boot-images/foo/manifest.json";
        let Command::Images(images) = parsed(line) else { panic!() };
        let Images::Update { one, metadata_operation, fields } = images.verb else { panic!() };
        let body = r#"{"link":{"type":"s3","path":"s3://boot-images/foo/manifest.json"}}"#;
        is_sent(&changed_image(&one.id, metadata_operation, &fields), &Method::PATCH, "images/foo", body);

        is_sent(
            &new_key("me", "ssh-ed25519 A\n"),
            &Method::POST,
            "public-keys",
            r#"{"name":"me","public_key":"ssh-ed25519 A\n"}"#,
        );
        is_sent(
            &DELETED_IMAGES.update("foo", json!({ "operation": "undelete" })),
            &Method::PATCH,
            "deleted/images/foo",
            r#"{"operation":"undelete"}"#,
        );
        is_sent(&STATUSES.list(), &Method::GET, "remote-build-nodes/status", "");

        let Command::Jobs(jobs) = parsed("jobs deleteall --status error,success --job-type create --age 3d") else {
            panic!()
        };
        let Jobs::Deleteall { filters, sure } = jobs.verb else { panic!() };
        assert!(!sure.yes);
        let request = delete_jobs(&filters);
        let query = [("status", "error"), ("status", "success"), ("job_type", "create"), ("age", "3d")];
        assert_eq!(request.query, query.map(|(name, value)| (name, value.to_owned())));
    }

    #[test]
    fn groups_verbs_and_required_options_are_those_of_cray() {
        for line in [
            "public-keys list",
            "public-keys deleteall",
            "jobs deleteall -y",
            "deleted images deleteall --yes",
            "public-keys create --name foo --public-key FILE",
            "recipes describe foo --format json",
            "images delete foo --token FILE",
            "jobs list",
            "deleted public-keys update foo --operation undelete",
            "deleted recipes update foo",
            "deleted images describe foo",
            "remote-build-nodes create --xname foo",
            "remote-build-nodes status describe foo",
            "remote-build-nodes deleteall",
        ] {
            parsed(line);
        }
        for (line, missing) in [
            ("public-keys create --name foo", "--public-key"),
            ("images create", "--name"),
            ("remote-build-nodes create", "--xname"),
            ("recipes create --name foo --recipe-type kiwi-ng", "--linux-distribution"),
            ("jobs create --public-key-id k --artifact-id a --job-type create", "--image-root-archive-name"),
            ("images create --name foo --arch sparc", "--arch"),
            ("recipes update foo --require-dkms perhaps", "--require-dkms"),
        ] {
            let words = std::iter::once("ims").chain(line.split(' '));
            let Err(refused) = Words::try_parse_from(words) else { panic!("{line}") };
            assert_eq!(refused.exit_code(), 2, "{line}");
            assert!(refused.to_string().contains(missing), "{line}: {refused}");
        }
    }

    #[test]
    fn lists_of_one_object_have_the_same_length() {
        let Command::Recipes(recipes) = parsed("recipes update foo --template-dictionary-key A,B") else { panic!() };
        let Recipes::Update { one, fields } = recipes.verb else { panic!() };
        let refused = changed_recipe(&one.id, &fields).unwrap_err();
        assert!(refused.to_string().contains("--template-dictionary-value"), "{refused}");
        assert_eq!(refused.exit_code(), 2);
    }
}
