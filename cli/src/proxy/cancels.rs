//! Sessions that can be cancelled, by the process id and key that their clients know.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mayfly_protocol::target::Endpoint;
use rand::RngExt;

use super::frames::message;
use super::site::Upstream;

/// The session of the server to which a cancel request is sent.
#[derive(Clone)]
pub(super) struct AtServer {
    pub(super) upstream: Arc<Upstream>,
    pub(super) endpoint: Endpoint,
    /// The session's process id and key at the server.
    pub(super) key: Vec<u8>,
}

impl AtServer {
    /// Cancels the request of the session.
    pub(super) async fn cancel(&self) -> io::Result<()> {
        self.upstream
            .account
            .cancel(&self.endpoint, &self.key)
            .await
    }
}

/// The sessions of all clients.
#[derive(Default)]
pub(super) struct Cancels(Mutex<HashMap<Vec<u8>, AtServer>>);

impl Cancels {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, AtServer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session of a client that has this process id and key.
    pub(super) fn find(&self, key: &[u8]) -> Option<AtServer> {
        self.lock().get(key).cloned()
    }

    /// Adds a session. It is removed when the result is dropped.
    pub(super) fn enter(&self, key: Vec<u8>, session: AtServer) -> Cancellable<'_> {
        let entered = Cancellable { cancels: self, key };
        entered.point_to(session);
        entered
    }
}

/// A session that can be cancelled until this is dropped.
pub(super) struct Cancellable<'c> {
    cancels: &'c Cancels,
    /// The process id and key that the client knows.
    key: Vec<u8>,
}

impl Cancellable<'_> {
    /// Makes the client's key stand for this session.
    pub(super) fn point_to(&self, session: AtServer) {
        // A pooler may give no key.
        if !self.key.is_empty() {
            self.cancels.lock().insert(self.key.clone(), session);
        }
    }
}

impl Drop for Cancellable<'_> {
    fn drop(&mut self) {
        self.cancels.lock().remove(&self.key);
    }
}

/// A process id and key of the proxy's own, as long as the server's.
pub(super) fn own_key(servers: &[u8]) -> Vec<u8> {
    let mut key = vec![0; servers.len()];
    rand::rng().fill(key.as_mut_slice());
    // A process id is positive.
    if let Some(first) = key.first_mut() {
        *first &= 0x7f;
    }
    key
}

/// Replaces the server's key in a greeting by the proxy's own key.
pub(super) fn put_key(greeting: &mut [u8], servers: &[u8], own: &[u8]) {
    let known = message(b'K', servers);
    let at = greeting.windows(known.len()).position(|it| it == known);
    if let Some(at) = at {
        greeting[at + 5..][..own.len()].copy_from_slice(own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_our_own_takes_the_place_of_the_servers() {
        for length in [8, 36] {
            let servers = vec![0xab; length];
            let own = own_key(&servers);
            assert_eq!(own.len(), length);
            assert!(own != servers && own[0] < 0x80);
            let greeting = |key: &[u8]| {
                [
                    message(b'S', b"a\0b\0"),
                    message(b'K', key),
                    message(b'Z', b"I"),
                ]
                .concat()
            };
            let mut put = greeting(&servers);
            put_key(&mut put, &servers, &own);
            assert_eq!(put, greeting(&own));
        }
    }
}
