//! Decides which requests are answered: those of programs of the socket's owner, and those to the address that have the
//! token.
//!
//! A request's source address, host name and cookies do not matter. A browser would send the right ones for any web
//! page, even for a page whose host name resolves to this machine, but such a page does not have the token.

use std::fmt;
use std::net::SocketAddr;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, header};
use ims_sshd::error::{Attempt, Result};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use uuid::Uuid;

use super::problem::Problem;
use super::routes::Target;

/// Client at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub enum Peer {
    /// A program of this machine that connected to the socket, with the ID of its user.
    Local(Option<u32>),
    /// A client that connected to the address.
    Remote(SocketAddr),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(Some(user)) => write!(f, "uid={user}"),
            Self::Local(None) => f.write_str("local"),
            Self::Remote(address) => write!(f, "{}", address.ip()),
        }
    }
}

/// Rule for which requests are answered.
pub enum Access {
    /// All requests: a gateway has authenticated the sender.
    All,
    /// Requests on the socket, to which the kernel lets only its owner connect, and requests with the token.
    Token(Box<Token>),
}

/// Keyed hash of the token, which suffices to compare a sent token.
pub struct Token {
    key: hmac::Key,
    tag: hmac::Tag,
}

impl Token {
    /// Computes the keyed hash of `token`.
    pub fn new(token: &str) -> Result<Self> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).attempt(|| "make a key for the token")?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &seed);
        let tag = hmac::sign(&key, token.as_bytes());
        Ok(Self { key, tag })
    }

    /// Returns a new token with 244 random bits.
    pub fn random() -> String {
        let [first, second] = [Uuid::new_v4(), Uuid::new_v4()];
        format!("{}{}", first.simple(), second.simple())
    }

    /// Compares in constant time, so that the duration reveals nothing about the token, not even its length.
    fn is(&self, sent: &[u8]) -> bool {
        hmac::verify(&self.key, sent, self.tag.as_ref()).is_ok()
    }
}

impl Access {
    /// Returns the answer that refuses a request, or `None` if the request may be answered. Requests for the health
    /// need no token, since it is no secret and probes have no token. Downloads need none, since their URLs are signed.
    pub(super) fn refusal(
        &self,
        peer: Peer,
        target: Option<Target<'_>>,
        headers: &HeaderMap,
    ) -> Option<Response<Body>> {
        let (Self::Token(token), Peer::Remote(_)) = (self, peer) else { return None };
        if matches!(target, Some(Target::Health | Target::Download)) {
            return None;
        }
        let sent = headers.get(header::AUTHORIZATION).and_then(|sent| bearer(sent.as_bytes()));
        let why = match sent {
            Some(sent) if token.is(sent) => return None,
            Some(_) => "the token is not that of this service: see the file 'token' in its data directory",
            None => "the request has no token: expected 'Authorization: Bearer TOKEN'",
        };
        let mut answer = Problem::unauthorized(why).answer();
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        Some(answer)
    }
}

/// Returns the token of the header `Authorization`. The case of the scheme is ignored (RFC 9110, 11.1).
fn bearer(sent: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = sent.split_at_checked(BEARER.len())?;
    scheme.eq_ignore_ascii_case(BEARER).then(|| token.trim_ascii())
}

const BEARER: &[u8] = b"Bearer ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_recognized_whole() {
        let token = Token::new("secret").unwrap();
        assert!(token.is(b"secret"));
        for other in ["", "secre", "secret ", "Secret", "secretsecret"] {
            assert!(!token.is(other.as_bytes()), "{other}");
        }
        assert_eq!(bearer(b"bearer  x "), Some(&b"x"[..]));
        for other in ["", "Bearer", "Basic x", "x"] {
            assert_eq!(bearer(other.as_bytes()), None, "{other}");
        }
    }
}
