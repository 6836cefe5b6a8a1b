//! Runs jobs on Kubernetes. Creates a Job, its volume, its address and its ConfigMap from the site's own templates.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use ims_sshd::error::{Error, Result};
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use self::objects::{Cluster, Kind, Refusal};
use self::templates::{Filled, Variables};
use super::nodes::Nodes;
use super::{Death, Failures, Held, Log, NewJob, NodeStatus, Runner, Started};
use crate::records::{Address, Job};
use crate::settings::{KubernetesSettings, Settings};

mod life;
mod logs;
mod objects;
mod templates;
mod watch;

/// Time limit for connecting to the API.
const CONNECT: Duration = Duration::from_secs(5);

/// Namespace and name of the site's Secret with the keys that sign packages.
const SIGNING_KEYS: (&str, &str) = ("services", "hpe-signing-key");

/// Port of a job's sshd.
const PORT: u16 = 22;

/// Runs jobs on Kubernetes.
pub struct Kubernetes {
    cluster: Arc<Cluster>,
    nodes: Nodes,
    settings: KubernetesSettings,
    boot_images_bucket: String,
    s3_endpoint: String,
}

impl Kubernetes {
    /// A runner for the jobs whose records are in the database named `records`.
    pub async fn new(settings: &Settings, records: &str) -> Result<Self> {
        let refused = |why: &dyn std::fmt::Display| {
            Error::new("run jobs on Kubernetes").because(why).advise(
                "start 'ims serve' in a pod with a service account token, name a configuration by KUBECONFIG, or take \
                 --runner none, which only keeps records",
            )
        };
        let mut config = kube::Config::infer().await.map_err(|e| refused(&objects::reason(&e)))?;
        config.connect_timeout = Some(CONNECT);
        let client = Client::try_from(config).map_err(|e| refused(&objects::reason(&e)))?;
        let namespace = settings.kubernetes.namespace.clone();
        let runner = Self {
            cluster: Arc::new(Cluster { client, namespace, records: records.to_owned() }),
            nodes: Nodes::new(&settings.remote_key),
            settings: settings.kubernetes.clone(),
            boot_images_bucket: settings.boot_images_bucket.clone(),
            s3_endpoint: settings.s3_endpoint.clone(),
        };
        runner.check_templates()?;
        Ok(runner)
    }

    /// Fails if the templates of customize jobs or of kiwi-ng jobs are missing, or if any template cannot be filled in.
    fn check_templates(&self) -> Result<()> {
        let new = NewJob {
            job: Job::without_record(&crate::records::new_id()),
            object: crate::records::Location { bucket: "bucket".into(), key: "key".into() },
            download_url: "url".into(),
            download_md5sum: String::new(),
            public_key: "key".into(),
            recipe_type: None,
            template_dictionary: BTreeMap::new(),
        };
        for recipe_type in [None, Some("kiwi-ng"), Some("packer")] {
            let is_optional = recipe_type == Some("packer");
            if is_optional && !self.settings.templates.join(templates::directory(recipe_type)).exists() {
                continue;
            }
            self.render(&NewJob { recipe_type: recipe_type.map(str::to_owned), ..new.clone() }).map_err(|e| {
                e.advise("mount the ConfigMaps with the templates of jobs there; IMS_JOB_TEMPLATE_PATH names another directory")
            })?;
        }
        Ok(())
    }

    /// Returns the objects of a job, filled in from the templates.
    fn render(&self, new: &NewJob) -> Result<BTreeMap<Kind, Value>> {
        let directory = self.settings.templates.join(templates::directory(new.recipe_type.as_deref()));
        let variables = self.variables(new);
        let is_create = new.recipe_type.is_some();
        let mut objects = BTreeMap::new();
        for kind in [Kind::ConfigMap, Kind::Claim, Kind::Service, Kind::Job] {
            let mut object = templates::render(&directory, kind, is_create, &variables)?;
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or(&self.cluster.namespace);
            if namespace != self.cluster.namespace {
                let why = format!("its template names the namespace {namespace}: expected $namespace");
                return Err(Error::new(format!("make the {}", kind.api().1)).because(why));
            }
            object["metadata"]["namespace"] = self.cluster.namespace.clone().into();
            objects.insert(kind, object);
        }
        let service = name(&objects[&Kind::Service]).to_owned();
        objects.insert(
            Kind::Rule,
            json!({
                "apiVersion": Kind::Rule.api().0,
                "kind": Kind::Rule.api().1,
                "metadata": { "name": service, "namespace": self.cluster.namespace },
                "spec": { "host": self.host(&service), "trafficPolicy": { "tls": { "mode": "DISABLE" } } },
            }),
        );
        for object in objects.values_mut() {
            objects::label(object, &new.job.id, &self.cluster.records);
        }
        Ok(objects)
    }

    fn host(&self, service: &str) -> String {
        format!("{service}.{}.svc.cluster.local", self.cluster.namespace)
    }

    /// Returns the host name of a job outside of the cluster, which external-dns publishes.
    fn customer_host(&self, job: &str) -> String {
        format!("{job}.ims.{}.{}", self.settings.subnet_name, self.settings.network_domain)
    }

    fn variables(&self, new: &NewJob) -> Variables {
        let (job, settings) = (&new.job, &self.settings);
        let is_arm = job.arch == "aarch64";
        let is_remote = !job.remote_build_node.is_empty();
        let text = |text: &str| Filled::Text(text.to_owned());
        let python = |truth: bool| text(if truth { "True" } else { "False" });
        let gibibytes = |number: u32, times: u64| Filled::Text(format!("{}Gi", u64::from(number) * times));
        let if_dkms = |text: &str| Filled::Optional(if job.require_dkms { text } else { "" }.to_owned());
        let class = match (is_remote, is_arm, job.require_dkms) {
            (true, ..) | (_, false, false) => "",
            (_, true, _) => settings.aarch64_runtime.trim(),
            (_, false, true) if settings.kata_runtime.contains("kata") => settings.kata_runtime.trim(),
            (_, false, true) => "kata-qemu",
        };
        let is_jailed = job.ssh_containers.iter().flatten().any(|container| container.jail);
        let mut variables = Variables::from([
            ("id", text(&job.id)),
            ("namespace", text(&self.cluster.namespace)),
            ("hostname", text(&self.customer_host(&job.id))),
            ("address_pool", text(&settings.address_pool)),
            ("s3_bucket", text(&self.boot_images_bucket)),
            ("s3_host", text(&self.s3_endpoint)),
            ("size_gb", gibibytes(job.build_env_size, 1)),
            ("limit_gb", gibibytes(job.build_env_size, 3)),
            ("pvc_gb", gibibytes(job.build_env_size, 5)),
            ("job_mem_size", gibibytes(job.job_mem_size, 1)),
            ("job_mem_limit", gibibytes(job.job_mem_size, 5)),
            ("download_url", text(&new.download_url)),
            ("download_md5sum", text(&new.download_md5sum)),
            ("public_key", text(&new.public_key)),
            ("enable_debug", python(job.enable_debug)),
            ("ssh_jail", python(is_jailed)),
            ("job_enable_dkms", python(job.require_dkms)),
            ("image_root_archive_name", text(&job.image_root_archive_name)),
            ("kernel_filename", text(&job.kernel_file_name)),
            ("initrd_filename", text(&job.initrd_file_name)),
            ("kernel_parameters_filename", text(&job.kernel_parameters_file_name)),
            ("job_arch", text(&job.arch)),
            ("remote_build_node", text(&job.remote_build_node)),
            ("remote_heartbeat_timeout_count", text(&settings.remote_timeout_count.to_string())),
            ("runtime_class", Filled::Optional(class.to_owned())),
            ("service_account", if_dkms("ims-service-job-mount")),
            ("security_privilege", Filled::Truth(job.require_dkms)),
            ("security_capabilities", if_dkms("SYS_ADMIN")),
        ]);
        if let Some(recipe_type) = &new.recipe_type {
            variables.insert("recipe_type", text(recipe_type));
            variables.insert("template_dictionary", Filled::Text(json!(new.template_dictionary).to_string()));
        }
        variables
    }

    /// Returns a job's copy of the Secret with the keys that sign packages; `None` if the site has no such Secret, or
    /// does not let this service read it.
    async fn signing_keys(&self, job: &str) -> std::result::Result<Option<Value>, Refusal> {
        let (namespace, name) = SIGNING_KEYS;
        let found = match self.cluster.read(Kind::Secret, namespace, name).await {
            Err(refusal) if refusal.status.is_some_and(|status| matches!(status, 401 | 403 | 404)) => {
                tracing::info!("job {job} gets no keys to sign packages with: {}", refusal.reason);
                return Ok(None);
            }
            found => found?,
        };
        let mut copy = json!({
            "apiVersion": "v1", "kind": "Secret", "type": found["type"], "data": found["data"],
            "metadata": { "name": format!("cray-ims-{job}-signing-keys"), "namespace": self.cluster.namespace },
        });
        objects::label(&mut copy, job, &self.cluster.records);
        Ok(Some(copy))
    }

    /// Creates the objects of a job, in the order of [`Kind::ALL`]; returns the names of those that were created.
    async fn make(&self, new: &NewJob) -> std::result::Result<BTreeMap<Kind, String>, String> {
        let id = &new.job.id;
        let mut objects = self.render(new).map_err(|e| e.to_string())?;
        let keys = self.signing_keys(id).await;
        let keys = keys.map_err(|e| format!("cannot read the Secret {}: {}", SIGNING_KEYS.1, e.reason))?;
        objects.extend(keys.map(|keys| (Kind::Secret, keys)));
        let mut made = BTreeMap::new();
        for kind in Kind::ALL {
            let Some(object) = objects.get(&kind) else { continue };
            let name = name(object);
            match self.cluster.create(kind, id, object).await {
                Ok(()) => {}
                Err(refusal) if kind == Kind::Rule && refusal.is_absence() => {
                    tracing::debug!("the cluster has no Istio, so job {id} needs no DestinationRule");
                    continue;
                }
                Err(refusal) if kind == Kind::Secret && refusal.status == Some(403) => {
                    tracing::warn!(
                        "cannot create the Secret {name}: {}; job {id} gets no keys to sign packages with",
                        refusal.reason
                    );
                    continue;
                }
                Err(refusal) => return Err(format!("cannot create the {} {name}: {}", kind.api().1, refusal.reason)),
            }
            made.insert(kind, name.to_owned());
        }
        Ok(made)
    }

    /// Removes the job's objects of these kinds.
    async fn delete(&self, job: &Job, kinds: &[Kind]) -> std::result::Result<(), Failures> {
        let deleted = join_all(kinds.iter().map(|&kind| self.delete_kind(job, kind))).await;
        let failures: Vec<String> = deleted.into_iter().filter_map(std::result::Result::err).collect();
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    async fn delete_kind(&self, job: &Job, kind: Kind) -> std::result::Result<(), String> {
        let names = match recorded(job, kind) {
            Some(name) => vec![name.to_owned()],
            None => self.cluster.find(kind, Some(&job.id)).await?.into_iter().map(|(name, _)| name).collect(),
        };
        for name in names {
            self.cluster.delete(kind, &name).await?;
        }
        Ok(())
    }
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// Returns the name of the job's object of this kind, if the job's record contains it.
fn recorded(job: &Job, kind: Kind) -> Option<&str> {
    let name = match kind {
        Kind::ConfigMap => &job.kubernetes_configmap,
        Kind::Claim => &job.kubernetes_pvc,
        Kind::Service | Kind::Rule => &job.kubernetes_service,
        Kind::Secret => &job.kubernetes_secret,
        Kind::Job => &job.kubernetes_job,
    };
    name.as_deref()
}

#[async_trait]
impl Runner for Kubernetes {
    async fn start(&self, new: &NewJob) -> std::result::Result<Started, Failures> {
        let mut made = self.make(new).await.map_err(|failure| vec![failure])?;
        let mut job = new.job.clone();
        let service = made.remove(&Kind::Service).unwrap_or_default();
        for container in job.ssh_containers.iter_mut().flatten() {
            let address = |host| Address { host, port: PORT, host_key: None };
            container.connection_info = Some(BTreeMap::from([
                ("customer_access".to_owned(), address(self.customer_host(&new.job.id))),
                ("cluster.local".to_owned(), address(self.host(&service))),
            ]));
        }
        job.kubernetes_service = Some(service);
        job.kubernetes_job = made.remove(&Kind::Job);
        job.kubernetes_configmap = made.remove(&Kind::ConfigMap);
        job.kubernetes_pvc = made.remove(&Kind::Claim);
        job.kubernetes_secret = made.remove(&Kind::Secret);
        job.kubernetes_namespace = Some(self.cluster.namespace.clone());
        Ok(job)
    }

    async fn release(&self, job: &Job) -> std::result::Result<(), Failures> {
        self.delete(job, &Kind::WHILE_RUNNING).await
    }

    async fn remove(&self, job: &Job) -> std::result::Result<(), Failures> {
        self.delete(job, &Kind::ALL).await
    }

    async fn held(&self) -> std::result::Result<Vec<Held>, Failures> {
        let found = join_all(Kind::ALL.map(|kind| self.cluster.find(kind, None))).await;
        let mut held = BTreeMap::new();
        let mut failures = Vec::new();
        for (kind, found) in Kind::ALL.into_iter().zip(found) {
            match found {
                Ok(found) => {
                    for (_, job) in found {
                        *held.entry(job).or_insert(false) |= Kind::WHILE_RUNNING.contains(&kind);
                    }
                }
                Err(failure) => failures.push(failure),
            }
        }
        if failures.is_empty() {
            Ok(held.into_iter().map(|(job, is_for_running)| Held { job, is_for_running }).collect())
        } else {
            Err(failures)
        }
    }

    async fn log(&self, job: &Job, is_followed: bool) -> std::result::Result<Option<Log>, Failures> {
        logs::read(self.cluster.clone(), job, is_followed).await.map(Some).map_err(|failure| vec![failure])
    }

    async fn died(&self, job: &Job, reason: &str) {
        if let Err(error) = watch::record_event(&self.cluster, job, reason).await {
            tracing::warn!("cannot record the death of job {} as an event: {error}", job.id);
        }
    }

    fn takes_nodes(&self, _job: &Job) -> bool {
        self.nodes.has_key()
    }

    async fn probe(&self, xname: &str) -> NodeStatus {
        self.nodes.probe(xname).await
    }

    async fn watch(&self, running: Vec<Job>, deaths: mpsc::Sender<Death>) {
        let limit = Duration::from_secs(self.settings.pending_limit);
        watch::run(&self.cluster, limit, &running, deaths).await;
    }
}
