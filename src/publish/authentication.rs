//! Authentication of files on the volume, which other containers write to: only lines that this job's own sidecar wrote
//! are believed.

use std::io;
use std::os::unix::fs::MetadataExt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::OFlags;

use crate::error::{Attempt, Error, Result};
use crate::ims::id::Id;
use crate::publish::settings::Settings;
use crate::store;
use crate::sys::tree::{Tree, inode_and_birth};
use crate::volume::layout::KEY;

const KEY_LENGTH: usize = 32;

/// Signs and verifies lines of one job on one volume.
pub(crate) struct Seal {
    key: hmac::Key,
}

impl Seal {
    /// Seal for the job of `settings` on the volume `parent`. The key is derived from a secret that survives a restart
    /// and that other writers to the volume do not have: a key file on the volume, if nobody else writes there; the
    /// keys of the store; the client secret of IMS; a key file in the store, if that is a directory. Without any of
    /// these nothing is published, and the journal is worth no more than signal files, which others can create as well.
    pub(crate) fn of(settings: &Settings, parent: &Tree, is_private: bool) -> Result<Self> {
        let oauth = settings.ims.as_ref().and_then(|ims| ims.oauth.as_ref());
        let secret = if is_private {
            key_in(parent)?
        } else if let Some((_, secret)) = &settings.store.keys {
            secret.clone().into_bytes()
        } else if let Some(directory) = oauth {
            let file = directory.join("client-secret");
            std::fs::read(&file).attempt(|| format!("read {}", file.display()))?
        } else if let Some(named) = settings.store.url.as_deref().and_then(store::named_directory) {
            let opened = store::directory::open_or_make(&named);
            key_in(&opened.attempt(|| format!("open the store {}", named.display()))?.0)?
        } else {
            Vec::new()
        };
        Self::new(&secret, settings.job.id.as_deref(), parent)
            .attempt(|| format!("look at {}", parent.shown().display()))
    }

    /// Returns whether the job has a secret that survives a restart and that other writers to its volume do not have.
    pub(crate) fn has_secret(settings: &Settings) -> bool {
        settings.store.keys.is_some() || settings.ims.as_ref().is_some_and(|ims| ims.oauth.is_some())
    }

    /// Derives a key for one job on one volume: lines of another job, or copied from another volume, are not authentic.
    fn new(secret: &[u8], job: Option<&str>, parent: &Tree) -> io::Result<Self> {
        let (inode, made) = inode_and_birth(parent)?;
        let context = format!("ims-sshd notes 1\0{job:?}\0{inode}\0{made:?}");
        let derived = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), context.as_bytes());
        Ok(Self { key: hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()) })
    }

    /// Signs `text`, which has no line break, as a line for [`Seal::open`] with the same `kind`.
    pub(crate) fn line(&self, kind: &str, text: &str) -> String {
        let tag = hmac::sign(&self.key, format!("{kind}\0{text}").as_bytes());
        format!("{} {text}\n", URL_SAFE_NO_PAD.encode(tag))
    }

    /// Text of a line that was signed as this `kind`; `None` for any other line, including a truncated one.
    pub(crate) fn open<'a>(&self, kind: &str, line: &'a str) -> Option<&'a str> {
        let (tag, text) = line.strip_suffix('\n')?.split_once(' ')?;
        let tag = URL_SAFE_NO_PAD.decode(tag).ok()?;
        hmac::verify(&self.key, format!("{kind}\0{text}").as_bytes(), &tag).ok()?;
        Some(text)
    }
}

fn random_key() -> Result<Vec<u8>> {
    let mut key = vec![0; KEY_LENGTH];
    SystemRandom::new().fill(&mut key).attempt(|| "generate a key")?;
    Ok(key)
}

/// Key in the key file of a directory; creates the file if it is missing.
fn key_in(tree: &Tree) -> Result<Vec<u8>> {
    let attempted = || format!("read the key {}", tree.shown().join(KEY).display());
    if tree.look(KEY).attempt(attempted)?.is_none() {
        let temporary = format!("{KEY}.{}", Id::random()?);
        let mut file = tree.create_file(&temporary).attempt(attempted)?;
        io::Write::write_all(&mut file, &random_key()?).and_then(|()| file.sync_all()).attempt(attempted)?;
        match tree.rename_to(&temporary, tree, KEY) {
            // Another process has just created the file.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => drop(tree.remove(&temporary)),
            other => other.attempt(attempted)?,
        }
    }
    let mut file = tree.open_regular(KEY, OFlags::RDONLY | OFlags::NOFOLLOW).attempt(attempted)?;
    let found = file.metadata().attempt(attempted)?;
    let is_private = found.uid() == nix::unistd::geteuid().as_raw() && found.mode().trailing_zeros() >= 6;
    if !is_private || found.len() != KEY_LENGTH as u64 {
        return Err(Error::new(attempted())
            .because(format!("it is not a file of {KEY_LENGTH} bytes that only this user can read"))
            .advise("remove it; a new one is made"));
    }
    let mut key = Vec::new();
    io::Read::read_to_end(&mut file, &mut key).attempt(attempted)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn seal(secret: &str, job: Option<&str>, parent: &Path) -> Seal {
        Seal::new(secret.as_bytes(), job, &Tree::open(parent).unwrap()).unwrap()
    }

    #[test]
    fn line_is_authentic_only_for_its_secret_job_volume_and_kind() {
        let [volume, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let ours = seal("s", Some("a"), volume.path());
        let line = ours.line("journal", "text");
        assert_eq!(ours.open("journal", &line), Some("text"));
        assert_eq!(seal("s", Some("a"), volume.path()).open("journal", &line), Some("text"), "after a restart");
        assert_eq!(ours.open("upload", &line), None);
        assert_eq!(ours.open("journal", line.trim_end()), None, "truncated");
        for (secret, job, parent) in
            [("t", Some("a"), &volume), ("s", Some("b"), &volume), ("s", None, &volume), ("s", Some("a"), &other)]
        {
            assert_eq!(seal(secret, job, parent.path()).open("journal", &line), None);
        }
    }

    #[test]
    fn key_file_is_created_once_and_refused_if_others_can_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let store = Tree::open(dir.path()).unwrap();
        let key = key_in(&store).unwrap();
        assert_eq!(key_in(&store).unwrap(), key);
        let file = dir.path().join(KEY);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(key_in(&store).unwrap_err().to_string().contains("only this user"));
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert!(key_in(&store).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
