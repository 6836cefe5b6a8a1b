//! The command line of people: from an image to a changed one, by the real programs.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use testbed::job::{bootable_image, packed_image};
use testbed::*;

/// A service on this machine, with directories and ports of its own.
pub struct Place {
    dir: TempDir,
    job_ports: String,
    service: Option<Child>,
}

impl Place {
    /// A running service without records.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(Path::new(&*IMS_SSHD).exists() && IMS_JAIL_SHELL.starts_with('/'));
        let first = 20_000 + (std::process::id() % 100) * 100 + NEXT.fetch_add(1, Ordering::Relaxed) * 10;
        let job_ports = format!("{first}-{}", first + 9);
        let mut place = Self { dir: directory(), job_ports, service: None };
        place.serve();
        let key = place.path("key");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        place.succeed(&["public-keys", "create", "--name", "me", "--public-key", &format!("{}.pub", key.display())]);
        place
    }

    /// A running service with an image, `compute`.
    fn with_image() -> Self {
        let (place, (_dir, _, squashfs)) = (Self::new(), packed_image());
        let work = place.path("work").display().to_string();
        place.succeed(&["images", "import", squashfs.to_str().unwrap(), "--name", "compute", "--work", &work]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the service, and waits until it answers.
    fn serve(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("service.log")).unwrap();
        let mut serve = self.ims(&["serve"]);
        serve.env_remove("IMS_LISTEN").env("IMS_DATA_DIR", self.path("data"));
        serve.env("IMS_JOBS_DIR", self.path("jobs")).env("IMS_JOB_PORTS", &self.job_ports);
        // Create jobs find kiwi-ng here.
        let path = format!("{}:{}", cache().join("kiwi/bin").display(), std::env::var("PATH").unwrap());
        serve
            .env("PATH", path)
            .env("IMS_RUNNER", "machine")
            .env("IMS_CLOSE_GRACE", "1")
            .env("IMAGE_COMPRESSION", "none");
        self.service = Some(serve.stdout(Stdio::null()).stderr(log).process_group(0).spawn().unwrap());
        wait_until("the service to listen", || UnixStream::connect(self.path("run/ims.sock")).is_ok());
    }

    fn signal(&mut self, signal: Signal) {
        let mut service = self.service.take().unwrap();
        kill(Pid::from_raw(service.id().cast_signed()), signal).unwrap();
        service.wait().unwrap();
    }

    fn ims(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ims"));
        command.args(words).stdin(Stdio::null()).env("XDG_CACHE_HOME", self.path("cache"));
        command
            .env_remove("IMS_URL")
            .env("IMS_SOCKET", self.path("run/ims.sock"))
            .env("S3_ENDPOINT", format!("file://{}", self.path("store").display()));
        command
    }

    pub fn succeed(&self, words: &[&str]) -> String {
        succeed(&mut self.ims(words))
    }

    pub fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.succeed(&[words, &["--format", "json"]].concat())).unwrap()
    }

    /// Starts a job that changes `compute` into the image `name`, and waits until users can log in; returns its record.
    fn start(&self, name: &str) -> Value {
        let job = self.start_only(name);
        self.wait_for(name, "waiting_on_user");
        job
    }

    fn start_only(&self, name: &str) -> Value {
        let artifact = ["--artifact-id", "compute", "--public-key-id", "me", "--image-root-archive-name", name];
        self.json(&[&["jobs", "create", "--job-type", "customize"], artifact.as_slice()].concat())
    }

    /// Waits for a status of the job.
    pub fn wait_for(&self, name: &str, status: &str) {
        wait_until(&format!("{name} to be {status}; {}", self.logs(name)), || {
            let now = self.json(&["jobs", "describe", name])["status"].as_str().unwrap().to_owned();
            assert!(now == status || !["error", "success"].contains(&now.as_str()), "{now}: {}", self.logs(name));
            now == status
        });
    }

    fn logs(&self, name: &str) -> String {
        let output = self.ims(&["jobs", "logs", name]).output().unwrap();
        text(output.stdout) + &text(output.stderr) + &std::fs::read_to_string(self.path("service.log")).unwrap()
    }

    /// Runs a command in the job over SSH.
    fn ssh(&self, name: &str, command: &str) -> Output {
        let key = self.path("key").display().to_string();
        self.ims(&["jobs", "ssh", "-i", &key, name, command]).output().unwrap()
    }

    pub fn says(&self, name: &str, command: &str) -> String {
        let output = self.ssh(name, command);
        assert!(output.status.success(), "{command}: {}{}", text(&output.stderr), self.logs(name));
        text(output.stdout)
    }

    fn directory_of(&self, job: &Value) -> PathBuf {
        self.path("jobs").join(job["id"].as_str().unwrap())
    }

    /// The published image `name`, as its record and the path of its directory in the store.
    pub fn published(&self, name: &str) -> (Value, PathBuf) {
        let image = self.json(&["images", "describe", name]);
        let place = self.path("store/boot-images").join(image["id"].as_str().unwrap());
        let id = image["id"].as_str().unwrap();
        assert_eq!(image["link"]["path"], format!("s3://boot-images/{id}/manifest.json"));
        (image, place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.path("service.log")).unwrap_or_default());
        }
        if self.service.is_none() {
            self.serve();
        }
        let _ = self.ims(&["jobs", "deleteall"]).output();
        let jobs = self.path("jobs");
        let is_empty = || std::fs::read_dir(&jobs).map_or(0, Iterator::count) == 0;
        let began = std::time::Instant::now();
        while !is_empty() && began.elapsed() < LIMIT {
            std::thread::sleep(LIMIT / 1000);
        }
        self.signal(Signal::SIGTERM);
        if !std::thread::panicking() {
            assert!(is_empty(), "jobs are left in {}", jobs.display());
        }
    }
}

/// Processes whose command line names the job's directory.
fn programs(directory: &Path, command: &str) -> Vec<u32> {
    let words = format!("{command} {}", directory.display());
    processes_with(&words)
}

#[test]
fn image_is_imported_changed_over_ssh_and_published() {
    let place = Place::with_image();
    let job = place.start("compute-2");
    let container = &job["ssh_containers"][0];
    assert_eq!((&job["status"], &container["jail"]), (&"creating".into(), &true.into()), "{job}");
    // The service never changes this status from `pending`.
    assert!(container["status"].is_null() && container["name"] == "customize", "{job}");
    assert_eq!(container["connection_info"]["customer_access"]["host"], "127.0.0.1");
    assert_eq!(container["connection_info"]["customer_access"], container["connection_info"]["cluster.local"]);
    assert_eq!(
        place.says("compute-2", "echo changed > /etc/motd; cat /etc/motd; echo $IMS_JOB_ID"),
        format!("changed\n{}\n", job["id"].as_str().unwrap())
    );
    let address = &place.json(&["jobs", "describe", "compute-2"])["ssh_containers"][0]["connection_info"];
    let (port, host_key) = (&address["customer_access"]["port"], &address["customer_access"]["host_key"]);
    let shown = succeed(Command::new("ssh-keyscan").args(["-t", "ed25519", "-p", &port.to_string(), "127.0.0.1"]));
    assert!(shown.trim_end().ends_with(host_key.as_str().unwrap()), "{host_key}: {shown}");
    place.says("compute-2", "touch /tmp/complete");
    place.wait_for("compute-2", "success");
    let (image, published) = place.published("compute-2");
    assert_eq!(place.json(&["jobs", "describe", "compute-2"])["resultant_image_id"], image["id"]);
    let mut unsquashfs = Command::new("unsquashfs");
    assert_eq!(succeed(unsquashfs.arg("-cat").arg(published.join("rootfs")).arg("etc/motd")), "changed\n");
    assert!(place.succeed(&["images", "list", "--format", "table"]).contains("compute-2"));
    // Its volume is gone, and its log stays until the job is deleted.
    let directory = place.directory_of(&job);
    wait_until("the volume to be removed", || !directory.join("volume").exists());
    let log = place.succeed(&["jobs", "logs", "--follow", "compute-2"]);
    assert!(log.contains("sshd is listening") && log.contains("uploaded"), "{log}");
    let host_key = place.path("cache/ims/known_hosts.d").join(job["id"].as_str().unwrap());
    assert!(host_key.exists());
    place.succeed(&["jobs", "delete", "compute-2"]);
    wait_until("the job to be removed", || !directory.exists());
    assert!(!host_key.exists(), "{}", host_key.display());
}

#[test]
fn interrupted_import_ends_its_programs_and_leaves_nothing() {
    let place = Place::new();
    let work = place.path("work");
    // A server that takes the request for the image and never answers.
    let server = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let source = format!("http://{}/image.sqsh", server.local_addr().unwrap());
    let import = |source: &str| place.ims(&["images", "import", source, "--work", work.to_str().unwrap()]);
    let left = || std::fs::read_dir(&work).unwrap().count();
    for (signal, kept) in [(Signal::SIGINT, 0), (Signal::SIGTERM, 0), (Signal::SIGHUP, 0), (Signal::SIGKILL, 1)] {
        let mut client = import(&source).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let (_request, _) = server.accept().unwrap();
        kill(Pid::from_raw(client.id().cast_signed()), signal).unwrap();
        let status = client.wait().unwrap();
        let expected = (signal != Signal::SIGKILL).then_some(128 + signal as i32);
        assert_eq!((status.code(), left()), (expected, kept), "{signal}");
        wait_until("the program to end", || processes_with(&format!("prepare . {source}")).is_empty());
    }
    let next = import("nothing.sqsh").output().unwrap();
    assert!(text(&next.stderr).contains("which a killed import left behind") && left() == 0, "{next:?}");
}

#[test]
fn restarted_service_finds_its_jobs_running() {
    let mut place = Place::with_image();
    let job = place.start("compute-2");
    place.signal(Signal::SIGKILL);
    assert_eq!(programs(&place.directory_of(&job), "pod").len(), 1);
    place.serve();
    place.says("compute-2", "touch /tmp/complete");
    place.wait_for("compute-2", "success");
    place.published("compute-2");
}

#[test]
fn jobs_run_beside_each_other_and_a_deleted_one_leaves_nothing() {
    let place = Place::with_image();
    let (first, second) = (place.start("compute-2"), place.start("compute-3"));
    let port = |job: &Value| {
        u16::try_from(job["ssh_containers"][0]["connection_info"]["customer_access"]["port"].as_u64().unwrap()).unwrap()
    };
    assert_ne!(port(&first), port(&second));
    place.succeed(&["jobs", "delete", "compute-2"]);
    wait_until("the job to be removed", || !place.directory_of(&first).exists());
    assert!(TcpStream::connect(("127.0.0.1", port(&first))).is_err());
    assert!(programs(&place.directory_of(&first), "").is_empty());
    assert_eq!(place.says("compute-3", "echo here"), "here\n");
    // A deletion of all jobs removes the host keys of those that it deletes.
    let host_keys = || std::fs::read_dir(place.path("cache/ims/known_hosts.d")).unwrap().count();
    place.succeed(&["jobs", "deleteall", "--status", "success"]);
    assert_eq!(host_keys(), 1);
    place.succeed(&["jobs", "deleteall"]);
    assert_eq!(host_keys(), 0);
}

#[test]
fn deleteall_asks_on_a_terminal_only() {
    let place = Place::new();
    let keys = || place.json(&["public-keys", "list"]).as_array().unwrap().len();
    let deleteall = |options: &[&str]| Terminal::with(&place.ims(&[&["public-keys", "deleteall"], options].concat()));
    for (answer, left) in [("", 1), ("n", 1), ("yes", 0)] {
        let mut terminal = deleteall(&[]);
        terminal.see("Delete all public keys? (y)es, (n)o [n]: ");
        terminal.line(answer);
        let (code, said) = terminal.end();
        assert_eq!((code, keys()), (left, usize::try_from(left).unwrap()), "{answer}: {said}");
        assert_eq!(said.contains("the answer was not 'yes'; --yes deletes without asking"), left == 1, "{said}");
    }
    let key = place.path("key.pub").display().to_string();
    for options in [&["-y"][..], &["--yes"]] {
        place.succeed(&["public-keys", "create", "--name", "me", "--public-key", &key]);
        assert_eq!(deleteall(options).end().0, 0);
        assert_eq!(keys(), 0);
    }
    place.succeed(&["public-keys", "create", "--name", "me", "--public-key", &key]);
    place.succeed(&["public-keys", "deleteall"]);
    assert_eq!(keys(), 0);
}

#[test]
fn man_pages_say_command() {
    let dir = directory();
    succeed(Command::new(env!("CARGO_BIN_EXE_ims")).arg("man").arg(dir.path()));
    for (page, has_commands) in [("ims.1", true), ("ims-images.1", true), ("ims-images-list.1", false)] {
        let page = std::fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(!page.to_lowercase().contains("subcommand"), "{page}");
        assert_eq!(page.contains("COMMAND"), has_commands, "{page}");
    }
}

#[test]
fn errors_are_told_once_with_the_services_reason() {
    let place = Place::new();
    let fails = |words: &[&str], code: i32, reason: &str| {
        let output = place.ims(words).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), said.lines().count()), (Some(code), 1), "{words:?}: {said}");
        assert!(said.contains(reason) && output.stdout.is_empty(), "{words:?}: {said}");
    };
    let id = "5f0d3a9c-0000-4000-8000-000000000000";
    fails(&["images", "describe", id], 1, "404 Not Found");
    fails(&["images", "describe", "nothing"], 1, "no record has this ID or name");
    let key = place.path("key.pub").display().to_string();
    fails(&["public-keys", "create", "--name", "", "--public-key", &key], 1, "422 Unprocessable");
    fails(&["jobs", "deleteall", "--age", "foo"], 1, "400 Bad Request");
    fails(&["images", "list", "--url", "ftp://service"], 2, "expected http");
    fails(&["images", "list", "--url", "http://127.0.0.1:1"], 1, "'ims serve' starts one");
    fails(&["jobs", "--url", "http://127.0.0.1:1", "ssh", "x"], 1, "cannot list the jobs");
    let nodes = ["remote-build-nodes", "--url", "http://127.0.0.1:1", "status", "list"];
    fails(&nodes, 1, "cannot list the statuses of the remote build nodes");
    let keys = place.succeed(&["public-keys", "list"]);
    assert!(
        keys.starts_with("[[results]]\ncreated = \"") && keys.contains("\nname = \"me\"\npublic_key = \"ssh-"),
        "{keys}"
    );
}

#[test]
fn only_a_public_key_is_sent() {
    let place = Place::new();
    let create = |file: &str| {
        // Nothing listens there: an error about the key shows that nothing was to be sent.
        let service = ["public-keys", "--url", "http://127.0.0.1:1", "create", "--name", "me"];
        place.ims(&[service.as_slice(), &["--public-key", file]].concat())
    };
    let file = |name: &str, content: &str| {
        std::fs::write(place.path(name), content).unwrap();
        place.path(name).display().to_string()
    };
    let private = "it is a private key; expected the public one, usually beside it as .pub";
    for (file, reason) in [
        (place.path("key").display().to_string(), private),
        (file("site.yml", "- hosts: all\n"), "it holds no public key in OpenSSH's format"),
        (file("empty", "\n"), "it holds no public key in OpenSSH's format"),
    ] {
        let output = create(&file).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("--public-key is '{file}': {reason}")), "{said}");
    }
    let key = std::fs::File::open(place.path("key")).unwrap();
    let said = text(create("-").stdin(key).output().unwrap().stderr);
    assert!(said.contains(private), "{said}");
}

#[test]
fn imports_refuse_wrong_sources_and_names_before_any_work() {
    let place = Place::new();
    let (dir, tree) = bootable_image();
    let playbook = dir.path().join("site.yml");
    std::fs::write(&playbook, "- hosts: all\n").unwrap();
    let (playbook, work) = (playbook.display().to_string(), place.path("work").display().to_string());
    let output = place.ims(&["recipes", "import", &playbook, "--name", "r"]).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("a recipe is a tar archive or a directory"), "{said}");
    assert_eq!(place.json(&["recipes", "list"]), Value::Array(Vec::new()));
    let import = ["images", "import", tree.to_str().unwrap(), "--work", &work, "--name", "sp ace/x"];
    let output = place.ims(&import).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("expected a name of one line without '/'"), "{said}");
    assert!(!place.path("work").exists());
}

/// Kinds of the objects of the published image `name`, sorted.
fn kinds(place: &Place, name: &str) -> Vec<String> {
    let (_, published) = place.published(name);
    let manifest: Value = serde_json::from_slice(&std::fs::read(published.join("manifest.json")).unwrap()).unwrap();
    let kind = |artifact: &Value| artifact["type"].as_str().unwrap().rsplit("image.").next().unwrap().to_owned();
    let mut kinds: Vec<_> = manifest["artifacts"].as_array().unwrap().iter().map(kind).collect();
    kinds.sort();
    kinds
}

#[test]
fn job_finds_the_kernel_of_an_image_or_publishes_none() {
    let place = Place::new();
    let (_dir, tree) = bootable_image();
    let boot = tree.join("boot");
    std::fs::remove_file(boot.join("kernel-parameters")).unwrap();
    std::fs::rename(boot.join("vmlinuz"), boot.join("vmlinuz-6.1.0-9-amd64")).unwrap();
    std::fs::rename(boot.join("initrd"), boot.join("initrd.img-6.1.0-9-amd64")).unwrap();
    let work = place.path("work").display().to_string();
    for (name, expected) in [("debian", &["initrd", "kernel", "rootfs.squashfs"][..]), ("slim", &["rootfs.squashfs"])] {
        if name == "slim" {
            std::fs::remove_dir_all(&boot).unwrap();
        }
        place.succeed(&["images", "import", tree.to_str().unwrap(), "--name", name, "--work", &work]);
        assert_eq!(kinds(&place, name), expected);
        let changed = format!("{name}-2");
        let artifact = ["--artifact-id", name, "--public-key-id", "me", "--image-root-archive-name", &changed];
        place.succeed(&[&["jobs", "create", "--job-type", "customize"], artifact.as_slice()].concat());
        place.says(&changed, "touch /tmp/complete");
        place.wait_for(&changed, "success");
        assert_eq!(kinds(&place, &changed), expected);
    }
}

const SERVICE: &str = include_str!("../../docs/SERVICE.md");
const README: &str = include_str!("../../README.md");

/// Commands in the first block of the language `bash`.
fn six_commands(page: &str) -> Vec<&str> {
    let block = page.split("```bash\n").nth(1).unwrap();
    block.split("```").next().unwrap().lines().collect()
}

#[test]
fn six_commands_of_the_pages_lead_from_an_image_to_a_changed_one() {
    let commands = six_commands(SERVICE);
    assert_eq!(commands.len(), 6);
    assert_eq!(commands, six_commands(README));
    let (dir, _, squashfs) = packed_image();
    std::fs::rename(squashfs, dir.path().join("image.sqsh")).unwrap();
    std::fs::create_dir(dir.path().join(".ssh")).unwrap();
    let key = dir.path().join(".ssh/id_ed25519");
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    // As typed, with directories and a port of its own, and with an agent, since ssh looks for keys in root's own home.
    let mut script = "ip link set lo up; mount -t tmpfs -o mode=0755 tmpfs /var; mount -t tmpfs -o mode=0755 tmpfs /run; eval \"$(ssh-agent)\" > /dev/null\n\
        trap 'ims jobs deleteall; kill %1; wait; ssh-agent -k > /dev/null' EXIT\n\
        ssh-add -q ~/.ssh/id_ed25519\n"
        .to_owned();
    for command in commands {
        if command.starts_with("ims jobs ssh") {
            script += "echo 'touch /tmp/complete' | ";
        }
        script += command;
        script += match command {
            "ims serve &" => "\nuntil ims images list > /dev/null 2>&1; do sleep 0.1; done\n",
            command if command.starts_with("ims jobs ssh") => {
                "\nims jobs logs --follow compute-2 >&2\nims jobs list --format table | grep -q success\n"
            }
            _ => "\n",
        };
    }
    let built = Path::new(env!("CARGO_BIN_EXE_ims")).parent().unwrap();
    let mut typed = Command::new("unshare");
    typed.args(["--mount", "--net", "--propagation", "private", "bash", "-ec", &script]).current_dir(dir.path());
    typed.env("HOME", dir.path()).env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", built.display()));
    for name in ["IMS_URL", "IMS_SOCKET", "S3_ENDPOINT", "IMS_RUNNER", "XDG_CACHE_HOME", "SSH_AUTH_SOCK"] {
        typed.env_remove(name);
    }
    let output = typed.stdin(Stdio::null()).output().unwrap();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
    let table: Vec<_> = said.lines().skip_while(|line| !line.starts_with("ID ")).collect();
    assert!(
        table.len() == 3 && table[1].contains("  compute  ") && table[2].contains("  compute-2  "),
        "{said}{errors}"
    );
}
