//! Opens a socket for the service's own user, and an address with TLS and a token.

use std::fs::DirBuilder;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use ims_sshd::error::{Attempt, Error, Result};
use rustix::fs::Mode;
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};

use crate::data::TOKEN;
use crate::http::access::{Access, Token};
use crate::settings::{Auth, Listen, Settings};

/// Minimum length of a token, in characters: a shorter one could be guessed.
const SHORTEST_TOKEN: usize = 32;

/// Listens on the socket at `path`, to which only this user can connect.
pub fn on_socket(path: &Path) -> Result<UnixListener> {
    let attempted = || format!("listen on {}", path.display());
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        let create = || format!("create {}", directory.display());
        DirBuilder::new().recursive(true).mode(0o700).create(directory).attempt(create)?;
    }
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        if UnixStream::connect(path).is_ok() {
            let refused = Error::new(attempted()).because("another service listens there");
            return Err(refused.advise("stop it, or name another socket with --socket"));
        }
        // Nothing listens on the socket: a service that was killed has left it behind.
        std::fs::remove_file(path).attempt(attempted)?;
    }
    // Connecting requires write permission. Setting the mode after `bind` would let others connect for a moment.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    bound.attempt(attempted)
}

/// Listens on `address`. Also returns how to accept TLS connections there, and the bound address, which has the port that
/// the kernel chose if `address` has port 0.
pub async fn on_address(
    address: SocketAddr,
    listen: &Listen,
) -> Result<(TcpListener, Option<TlsAcceptor>, SocketAddr)> {
    let attempted = || format!("listen on {address}");
    let tls =
        listen.tls_cert.as_deref().zip(listen.tls_key.as_deref()).map(|(cert, key)| tls(cert, key)).transpose()?;
    let listener = TcpListener::bind(address).await.attempt(attempted)?;
    let bound = listener.local_addr().attempt(attempted)?;
    if tls.is_none() && listen.auth == Auth::Token && !bound.ip().is_loopback() {
        tracing::warn!("tokens are sent to {bound} without encryption; see --tls-cert and --tls-key");
    }
    Ok((listener, tls, bound))
}

fn tls(cert: &Path, key: &Path) -> Result<TlsAcceptor> {
    let attempted = || format!("use the certificate {} with the key {}", cert.display(), key.display());
    // Only a warning: Kubernetes mounts the files of a Secret readable by all unless its `defaultMode` is narrower.
    if key.metadata().is_ok_and(|found| Mode::from_raw_mode(found.mode()).contains(Mode::ROTH)) {
        let key = key.display();
        tracing::warn!("all users can read the private key {key}; close it to them with 'chmod o-r {key}'");
    }
    let read = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    let chain = read.attempt(|| format!("read the certificates in {}", cert.display()))?;
    let key = PrivateKeyDer::from_pem_file(key).attempt(|| format!("read the private key in {}", key.display()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .attempt(attempted)?;
    let mut config = config.with_no_client_auth().with_single_cert(chain, key).attempt(attempted)?;
    config.alpn_protocols = vec![b"http/1.1".into()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Returns the rule for requests to the address. Creates the token if there is none.
pub fn access(settings: &Settings) -> Result<Access> {
    if settings.listen.address.is_none() || settings.listen.auth == Auth::Gateway {
        return Ok(Access::All);
    }
    let path = settings.records.data.join(TOKEN);
    let attempted = || format!("use the token in {}", path.display());
    if std::fs::symlink_metadata(&path).is_err() {
        make_token(&path)?;
        tracing::info!("made a token for clients: {}", path.display());
    }
    let found = std::fs::symlink_metadata(&path).attempt(attempted)?;
    let is_private = Mode::from_raw_mode(found.mode()).intersection(Mode::RWXG | Mode::RWXO).is_empty();
    let is_ours = found.is_file() && found.uid() == rustix::process::geteuid().as_raw() && is_private;
    if !is_ours {
        let refused = Error::new(attempted()).because("other users can read or replace it");
        return Err(refused.advise("remove it: the next start creates a new one that only its owner can read"));
    }
    let text = std::fs::read_to_string(&path).attempt(attempted)?;
    let token = text.trim();
    if token.len() < SHORTEST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let refused = Error::new(attempted()).because(format!("it is no word of {SHORTEST_TOKEN} characters or more"));
        return Err(refused.advise("remove it: the next start creates a new one"));
    }
    Ok(Access::Token(Box::new(Token::new(token)?)))
}

fn make_token(path: &Path) -> Result<()> {
    let attempted = || format!("make the token {}", path.display());
    let directory = path.parent().expect("a file in the data directory");
    std::fs::create_dir_all(directory).attempt(attempted)?;
    // Write a temporary file and rename it, so that the token is complete or absent. Only its owner can ever read the
    // file.
    let mut file = tempfile::NamedTempFile::new_in(directory).attempt(attempted)?;
    writeln!(file, "{}", Token::random()).and_then(|()| file.as_file().sync_all()).attempt(attempted)?;
    match file.persist_noclobber(path) {
        Err(e) if e.error.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::new(attempted()).because(e.error)),
        _ => Ok(()),
    }
}
