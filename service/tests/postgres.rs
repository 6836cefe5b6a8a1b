//! The same records in PostgreSQL, for several replicas.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tempfile::TempDir;
use testbed::{Ended, succeed, wait_until};

use crate::server::Server;

/// A PostgreSQL server on a Unix socket. It refuses to run as root.
pub struct Postgres {
    directory: TempDir,
    program: Option<Ended>,
}

impl Postgres {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display().to_string();
        succeed(Command::new("chown").args(["postgres", &path]));
        let data = directory.path().join("data");
        succeed(Self::as_postgres("initdb").args(["--no-sync", "--auth=trust", "-D"]).arg(data).stderr(Stdio::null()));
        let mut postgres = Self { directory, program: None };
        postgres.run();
        postgres
    }

    fn as_postgres(program: &str) -> Command {
        let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL: run the tests with 'make test'");
        let newest =
            versions.map(|entry| entry.unwrap().path()).max().expect("PostgreSQL: run the tests with 'make test'");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL", "env", "LC_ALL=C"]);
        command.arg(newest.join("bin").join(program)).current_dir("/");
        command
    }

    fn run(&mut self) {
        let mut command = Self::as_postgres("postgres");
        command.arg("-D").arg(self.directory.path().join("data")).arg("-k").arg(self.directory.path());
        command.args(["-h", ""]).stdin(Stdio::null()).stderr(Stdio::null());
        // A second SIGTERM is not needed: it ends with the test.
        self.program = Some(Ended::new(command.spawn().unwrap()));
        let socket: PathBuf = self.directory.path().join(".s.PGSQL.5432");
        wait_until("PostgreSQL to listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }

    /// Ends it at once: connections are cut.
    pub fn stop(&mut self) {
        let mut program = self.program.take().unwrap();
        succeed(Command::new("kill").args(["-INT", &program.id().to_string()]));
        program.wait().unwrap();
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@localhost/postgres?host={}", self.directory.path().display())
    }

    pub fn replica(&self, data: &Path) -> Server {
        let store = format!("file://{}", data.display());
        Server::with(data, &[("S3_ENDPOINT", &store), ("IMS_DATABASE_URL", &self.url())])
    }
}

/// Changes records by one service and another in turn: each list that is asked for after the answer has the change, while
/// other clients ask for lists all the time.
fn lists_follow_changes(services: [&Server; 2]) {
    let is_over = AtomicBool::new(false);
    let paths = ["/images", "/v3/deleted/images"];
    let see = |id: &str, expected: [Option<&str>; 2]| {
        let all = services
            .iter()
            .flat_map(|service| paths.iter().zip(expected).map(move |(path, turn)| (service, path, turn)));
        for (service, path, expected) in all {
            let list = service.get(path).good();
            let record = list.as_array().unwrap().iter().find(|record| record["id"] == id);
            let turn = record.map(|record| record["metadata"]["turn"].as_str().unwrap_or_default());
            assert_eq!(turn, expected, "{path} of {}", service.address);
        }
    };
    std::thread::scope(|scope| {
        for service in services {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    for path in paths {
                        service.get(path).good();
                    }
                }
            });
        }
        // Stops the other clients when an assertion fails, too.
        let _over = Over(&is_over);
        for turn in 0..4 {
            let (by, at) = (services[turn % 2], services[(turn + 1) % 2]);
            let id = by.post("/images", &json!({"name": "n"})).id();
            see(&id, [Some(""), None]);
            let (path, value) = (format!("/v3/images/{id}"), turn.to_string());
            let change = json!({"metadata": {"operation": "set", "key": "turn", "value": value}});
            assert_eq!(at.patch(&path, &change).status, 200);
            see(&id, [Some(&value), None]);
            assert_eq!(by.delete(&path).status, 204);
            see(&id, [None, Some(&value)]);
            assert_eq!(at.undelete(&format!("/v3/deleted/images/{id}")).status, 204);
            see(&id, [Some(&value), None]);
            assert_eq!(by.delete(&format!("/images/{id}")).status, 204);
            see(&id, [None, None]);
        }
    });
}

/// Sets a flag at its end.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn lists_are_never_older_than_an_answered_change() {
    let server = Server::start();
    lists_follow_changes([&server, &server]);
    let postgres = Postgres::start();
    let data = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let replicas = data.each_ref().map(|data| postgres.replica(data.path()));
    lists_follow_changes(replicas.each_ref());
}

#[test]
fn two_replicas_share_one_database_which_may_be_gone_for_a_while() {
    let mut postgres = Postgres::start();
    let data = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let replicas = data.each_ref().map(|data| postgres.replica(data.path()));
    let id = replicas[0].post("/images", &json!({"name": "n"})).id();
    assert_eq!(replicas[1].get(&format!("/images/{id}")).status, 200);
    // Both change one record at a time: no change is lost.
    std::thread::scope(|scope| {
        for (number, replica) in replicas.iter().enumerate() {
            let path = format!("/images/{id}");
            scope.spawn(move || {
                for key in 0..20 {
                    let change =
                        json!({"metadata": {"operation": "set", "key": format!("{number}-{key}"), "value": "v"}});
                    assert_eq!(replica.patch(&path, &change).status, 200);
                }
            });
        }
    });
    for replica in &replicas {
        assert_eq!(replica.get("/images").json()[0]["metadata"].as_object().unwrap().len(), 40);
    }
    let before = replicas[1].get("/images").header("etag").unwrap().to_owned();
    replicas[0].post("/images", &json!({"name": "further"}));
    assert_ne!(replicas[1].get("/images").header("etag").unwrap(), before);
    assert_eq!(replicas[0].delete(&format!("/v3/images/{id}")).status, 204);
    assert_eq!(replicas[1].undelete(&format!("/v3/deleted/images/{id}")).status, 204);

    assert_eq!(replicas[0].get("/images/%00").status, 404);
    assert_eq!(replicas[0].post("/images", &json!({"name": "\0"})).status, 201);
    assert_eq!(replicas[0].post("/v3/remote-build-nodes", &json!({"xname": "\0"})).status, 422);
    let nul = json!({"name": "n", "link": {"path": "s3://b/\0", "type": "s3"}});
    assert_eq!(replicas[0].post("/images", &nul).status, 422);

    postgres.stop();
    assert_eq!(replicas[0].get("/healthz/live").status, 200);
    let refused = replicas[0].post("/images", &json!({"name": "n"}));
    assert_eq!((refused.status, refused.header("content-type")), (503, Some("application/problem+json")));
    postgres.run();
    wait_until("the service to find the database again", || {
        replicas.iter().all(|replica| replica.get("/images").status == 200)
    });
    assert_eq!(replicas[1].get("/images").json().as_array().unwrap().len(), 3);
}
