//! Accepts connections, and keeps them from using up the process's descriptors.
//!
//! A connection waits for a request or has one. If there are as many connections as may be, a new one takes the place
//! of the one that has waited longest: clients that stay silent shut nobody out. Some places are only for connections
//! that wait, so that there is always one to take.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::ConnectInfo;
use axum::serve::Listener;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::http::Overloaded;
use crate::http::access::Peer;

/// Time limit for a TLS handshake, for the head of a request, for the wait before it, and for a client that does not
/// read its answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Descriptors that connections leave to the database, the store, Kubernetes and jobs.
const RESERVED: u64 = 256;

/// Descriptors that a connection takes: its own, and a file or a connection to the store.
const EACH: u64 = 2;

/// Bounds of the number of connections.
const FEWEST: u64 = 16;
const MOST: u64 = 512;

/// Maximum size of a request's head, in bytes.
const LONGEST_HEAD: usize = 64 << 10;

/// The connections to the service, and what answers their requests.
pub struct Connections {
    router: TowerToHyperService<Router>,
    stopping: watch::Receiver<bool>,
    most: usize,
    /// A permit for each connection.
    places: Arc<Semaphore>,
    /// A permit for each connection that may have a request.
    requests: Arc<Semaphore>,
    /// The connections that wait for a request, in the order in which they began to wait, and how to close each.
    waiting: Mutex<BTreeMap<u64, Arc<Notify>>>,
    turns: AtomicU64,
    is_full: AtomicBool,
}

impl Connections {
    /// Answers requests by `router`, until `stopping` is true.
    pub fn new(router: Router, stopping: watch::Receiver<bool>) -> Arc<Self> {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = (limit.saturating_sub(RESERVED) / EACH).clamp(FEWEST, MOST);
        let most = usize::try_from(most).expect("at most 512");
        Arc::new(Self {
            router: TowerToHyperService::new(router),
            stopping,
            most,
            places: Arc::new(Semaphore::new(most)),
            requests: Arc::new(Semaphore::new(most - most / 8)),
            waiting: Mutex::default(),
            turns: AtomicU64::default(),
            is_full: AtomicBool::default(),
        })
    }

    /// Accepts connections until the service stops. `peer` prepares a connection and tells the client.
    pub async fn accept<L: Listener>(
        self: &Arc<Self>,
        mut listener: L,
        tls: Option<TlsAcceptor>,
        peer: fn(&L::Io, L::Addr) -> Peer,
    ) {
        loop {
            let (stream, address) = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.stop() => return,
            };
            let seat = Seat::new(self, self.place().await);
            let peer = peer(&stream, address);
            let (connections, tls) = (self.clone(), tls.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = connections.serve(stream, tls, peer, seat.clone()) => {}
                    () = seat.closed.notified() => {}
                }
            });
        }
    }

    async fn stop(&self) {
        let _ = self.stopping.clone().wait_for(|stop| *stop).await;
    }

    /// Waits until all connections have ended.
    pub async fn ended(&self) {
        let all = u32::try_from(self.most).expect("at most 512");
        let _ = self.places.acquire_many(all).await;
    }

    /// Returns a place for a new connection, if need be that of the one that has waited longest for a request.
    async fn place(&self) -> OwnedSemaphorePermit {
        if self.places.available_permits() > self.most / 2 && self.is_full.swap(false, Ordering::Relaxed) {
            tracing::info!(
                "fewer than half of the {} possible connections are open; new ones no longer close others",
                self.most
            );
        }
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            return place;
        }
        if !self.is_full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "there are {} connections, the most that this process takes: each new one closes the one that has \
                 waited longest for a request",
                self.most
            );
        }
        let longest = self.waiting().pop_first();
        if let Some((_, closed)) = longest {
            closed.notify_one();
        }
        self.places.clone().acquire_owned().await.expect("never closed")
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Notify>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers the requests of a connection.
    async fn serve<S>(&self, stream: S, tls: Option<TlsAcceptor>, peer: Peer, seat: Arc<Seat>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match tls {
            None => self.answer(stream, peer, seat).await,
            Some(tls) => match tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.answer(stream, peer, seat).await,
                Ok(Err(error)) => tracing::info!("{peer}: TLS handshake failed: {error}"),
                Err(_) => tracing::info!("{peer}: TLS handshake failed: it took {} s", PATIENCE.as_secs()),
            },
        }
    }

    async fn answer<S>(&self, stream: S, peer: Peer, seat: Arc<Seat>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(|request: hyper::Request<Incoming>| {
            let begun = Begun::new(&seat);
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(peer));
            if begun.permit.is_none() {
                request.extensions_mut().insert(Overloaded);
            }
            let answer = self.router.call(request);
            async move { Ok::<_, Infallible>(answer.await?.map(|body| Answer { body, _begun: begun })) }
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(LONGEST_HEAD);
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            _ = connection.as_mut() => {}
            () = self.stop() => {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
            }
        }
    }
}

/// Prepares a connection to the address.
pub fn remote(stream: &TcpStream, address: std::net::SocketAddr) -> Peer {
    // Without it, the end of an answer waits until the client has acknowledged the rest.
    let _ = stream.set_nodelay(true);
    // The kernel ends a connection whose client does not read what was sent; hyper would wait for ever.
    let limit = u32::try_from(PATIENCE.as_millis()).expect("some seconds");
    let _ = rustix::net::sockopt::set_tcp_user_timeout(stream, limit);
    Peer::Remote(address)
}

/// Prepares a connection to the socket.
pub fn local(stream: &UnixStream, _address: tokio::net::unix::SocketAddr) -> Peer {
    Peer::Local(stream.peer_cred().ok().map(|peer| peer.uid()))
}

/// A connection, from its beginning to its end.
struct Seat {
    connections: Arc<Connections>,
    turn: AtomicU64,
    closed: Arc<Notify>,
    _place: OwnedSemaphorePermit,
}

impl Seat {
    fn new(connections: &Arc<Connections>, place: OwnedSemaphorePermit) -> Arc<Self> {
        let (turn, closed) = Default::default();
        let seat = Self { connections: connections.clone(), turn, closed, _place: place };
        seat.wait();
        Arc::new(seat)
    }

    /// The connection waits for a request from now on.
    fn wait(&self) {
        let turn = self.connections.turns.fetch_add(1, Ordering::Relaxed);
        self.turn.store(turn, Ordering::Relaxed);
        self.connections.waiting().insert(turn, self.closed.clone());
    }

    fn wait_no_more(&self) {
        self.connections.waiting().remove(&self.turn.load(Ordering::Relaxed));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.wait_no_more();
    }
}

/// A request, until its answer is written.
struct Begun {
    seat: Arc<Seat>,
    /// `None` if there are too many requests.
    permit: Option<OwnedSemaphorePermit>,
}

impl Begun {
    fn new(seat: &Arc<Seat>) -> Self {
        seat.wait_no_more();
        Self { seat: seat.clone(), permit: seat.connections.requests.clone().try_acquire_owned().ok() }
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.seat.wait();
    }
}

/// The body of an answer; its request ends with it.
struct Answer {
    body: Body,
    _begun: Begun,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
