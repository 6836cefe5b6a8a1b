//! Clients of an environment: ssh, sftp and scp, and a connection that many sessions share.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use tempfile::TempDir;

use crate::{Environment, feed, succeed};

/// Options of a client that uses no known hosts and no configuration.
pub fn ssh_options(key: &Path) -> Vec<String> {
    let mut options: Vec<String> = vec!["-F".into(), "none".into(), "-i".into(), key.display().to_string()];
    for option in [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "BatchMode=yes",
        "ConnectTimeout=10",
    ] {
        options.extend(["-o".to_owned(), option.to_owned()]);
    }
    options
}

impl Environment {
    pub fn ssh_options(&self) -> Vec<String> {
        let mut options = ssh_options(&self.key);
        // The default key exchange takes longer than the rest of a session, so choose a faster one.
        options.extend(["-o", "KexAlgorithms=curve25519-sha256"].map(Into::into));
        options
    }

    /// `ssh` with additional options. The caller adds the command after the host, which is the last argument so far.
    pub fn ssh(&self, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.ssh_options()).args(options).args(["-p", &self.port.to_string(), "root@127.0.0.1"]);
        command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Output of a command line over ssh.
    pub fn run(&self, command: &str) -> Output {
        self.ssh(&[]).arg(command).output().unwrap()
    }

    /// Standard output of a command line that has to succeed.
    pub fn says(&self, command: &str) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command}: {output:?}\nlog:\n{}", self.log_text());
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Runs a batch of sftp commands, and returns the output.
    pub fn sftp(&self, batch: &str) -> Output {
        feed(&mut self.sftp_client(&[]), batch.as_bytes())
    }

    /// `sftp` with additional options, reading its commands from standard input.
    pub fn sftp_client(&self, options: &[&str]) -> Command {
        let mut command = Command::new("sftp");
        command.args(self.ssh_options()).args(options);
        command.args(["-b", "-", "-P", &self.port.to_string(), "root@127.0.0.1"]);
        command
    }

    pub fn master(&self) -> Master<'_> {
        self.master_with(None)
    }

    /// Opens a master connection that forwards `agent` to each of its sessions.
    pub fn master_with(&self, agent: Option<&Path>) -> Master<'_> {
        let master =
            Master { environment: self, socket: tempfile::tempdir().unwrap(), agent: agent.map(Path::to_owned) };
        let mut ssh = master.ssh_with(&["-M", "-o", "ControlPersist=60", "-f", "-N"]);
        succeed(ssh.stdout(Stdio::null()));
        master
    }
}

/// A session that runs until its input is closed, and then prints that.
pub struct Held {
    client: Child,
    input: ChildStdin,
}

impl Held {
    pub fn open(environment: &Environment) -> Self {
        let mut command = environment.ssh(&[]);
        command.arg("echo begun; cat; echo finished").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = command.spawn().unwrap();
        client.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        Self { input: client.stdin.take().unwrap(), client }
    }

    pub fn finish(self) -> Output {
        drop(self.input);
        self.client.wait_with_output().unwrap()
    }
}

/// A connection that stays open, so that a session on it is cheap.
pub struct Master<'a> {
    environment: &'a Environment,
    socket: TempDir,
    agent: Option<PathBuf>,
}

impl Master<'_> {
    fn control(&self) -> String {
        self.socket.path().join("s").display().to_string()
    }

    /// `ssh` over the open connection. The caller adds the command.
    pub fn ssh(&self) -> Command {
        self.ssh_with(&[])
    }

    /// `ssh` over the open connection, with additional options.
    pub fn ssh_with(&self, options: &[&str]) -> Command {
        let control = self.control();
        let agent = if self.agent.is_some() { "-A" } else { "-a" };
        let mut ssh = self.environment.ssh(&[&["-S", &control, agent], options].concat());
        ssh.envs(self.agent.iter().map(|socket| ("SSH_AUTH_SOCK", socket)));
        ssh
    }

    /// `sftp` over the open connection, reading its commands from standard input.
    pub fn sftp(&self) -> Command {
        self.sftp_with(&[])
    }

    /// `sftp` over the open connection, with additional options.
    pub fn sftp_with(&self, options: &[&str]) -> Command {
        let control = format!("ControlPath={}", self.control());
        self.environment.sftp_client(&[&["-o", &control], options].concat())
    }

    /// `scp` over the open connection. The caller adds source and destination.
    pub fn scp(&self) -> Command {
        let mut command = Command::new("scp");
        command.args(self.environment.ssh_options()).args(["-o", &format!("ControlPath={}", self.control())]);
        command.args(["-P", &self.environment.port.to_string()]);
        command
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        let _ = self.environment.ssh(&["-S", &self.control(), "-O", "exit"]).output();
    }
}
