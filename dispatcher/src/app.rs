//! What every part of the dispatcher reaches: the doors (store, broker), who it is, what it
//! knows, its limits. Also the messages it sends, sealed to a pool.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use mayfly_common::broker::{Address, Broker, BrokerError, Message};
use mayfly_common::names::{EngineName, PoolName};
use mayfly_common::request::RequestId;
use mayfly_common::task::{Create, Head, Instead, Kind, Revoke, RevokeMode, Verdict};
use mayfly_common::topology;
use mayfly_common::trace;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::authorities;
use crate::clocks::Clocks;
use crate::delays;
use crate::error::ApiError;
use crate::fair::Fair;
use crate::lease::{Lease, State};
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::replies::Replies;
use crate::store::{Identity, Pool, Recipient, Revocation, Store};
use crate::tokens::Tokens;

/// The parked end comes so long after the TTL that the account is due when it comes.
pub(crate) const PARK_MARGIN: Duration = Duration::from_millis(500);

/// No engine parks a revocation that failed for longer.
const INSTEAD_MAX: Duration = Duration::from_secs(3600);
/// An engine waits no longer for a verdict.
const VERDICT_LIFE: Duration = Duration::from_secs(2);

/// Limits from the settings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How long a caller waits for an account.
    pub(crate) create_deadline: Duration,
    /// No `ttl` or `maxTtl` is more, in seconds.
    pub(crate) max_ttl_seconds: u64,
    /// How often each server is swept.
    pub(crate) sweep_every: Duration,
    /// A sweep leaves roles alone that ended so recently.
    pub(crate) sweep_grace: Duration,
    /// How often the grant roles of living accounts are looked at.
    pub(crate) refresh_every: Duration,
}

/// The dispatcher.
pub(crate) struct App {
    /// The lease store.
    pub(crate) store: Store,
    /// RabbitMQ.
    pub(crate) broker: Broker,
    /// Who this is.
    pub(crate) identity: Identity,
    /// The living engines.
    pub(crate) registry: Registry,
    /// Who waits for which answer.
    pub(crate) replies: Replies,
    /// Whose turn it is to read.
    pub(crate) fair: Fair,
    /// What is known of the databases' clocks.
    pub(crate) clocks: Clocks,
    /// What is known of tokens.
    pub(crate) tokens: Tokens,
    /// Its numbers.
    pub(crate) metrics: Metrics,
    /// From the settings.
    pub(crate) limits: Limits,
    /// Issues under way; finished before the process ends.
    pub(crate) issues: TaskTracker,
    /// Tells the reconciler that something is due.
    pub(crate) reconcile: Notify,
    /// Servers that may have roles nothing needs.
    pub(crate) tidying: crate::tidy::Queue,
    /// Name of this dispatcher among those with the same store.
    pub(crate) name: String,
    /// Whether it is the one that reconciles.
    pub(crate) leads: AtomicBool,
    /// Asks for the ends of all leases to be parked again: some are missing at the broker.
    pub(crate) park_again: Notify,
    /// Asks to see whether they are all parked, as far as anybody knows.
    pub(crate) see_parked: Notify,
    /// Secrets whose last read came to nothing.
    pub(crate) trials: crate::trials::Trials,
    /// Bundles of certificate authorities at the broker.
    pub(crate) authorities: crate::authorities::Bundles,
    /// A probe of the delay levels came where none should.
    pub(crate) probe_astray: Notify,
    /// It takes no new work.
    pub(crate) draining: AtomicBool,
}

impl App {
    /// The clock that decides about leases' courses.
    pub(crate) fn now(&self) -> Timestamp {
        self.store.now()
    }

    /// Whether requests should come here.
    ///
    /// # Errors
    /// Why not, for a person.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.draining.load(Ordering::Relaxed) {
            Err("draining".to_owned())
        } else if let Some(taken) = self.broker.taken() {
            Err(taken.to_string())
        } else {
            self.store.ready()
        }
    }

    /// How many engines a pool has: consumers of its queue, or living ones while the broker is
    /// away.
    pub(crate) async fn engines_of(&self, pool: &PoolName) -> usize {
        match self.broker.engines_of(pool).await {
            Ok(n) => usize::try_from(n).unwrap_or(usize::MAX),
            Err(_) => self.registry.count(pool),
        }
    }

    /// Publishes a create. Its answer is called by the lease's id.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn send_create(
        &self,
        lease: &Lease,
        create: &Create,
        recipient: &Recipient,
        request: RequestId,
    ) -> Result<(), BrokerError> {
        let mut create = create.clone();
        create.target = authorities::refer(self, &lease.pool, recipient, create.target).await;
        let now = self.now();
        let head = Head {
            deadline: Some(lease.create_deadline),
            ..head(Kind::Create, lease, now)
        };
        let left = lease.create_deadline.duration_since(now);
        if !left.is_positive() {
            // This process slept; in the queue it would be gone at once, but for an engine that waits.
            return Err(BrokerError::Down);
        }
        self.broker
            .publish(Message {
                to: Address::Queue(topology::create_queue(&lease.pool)),
                body: self.seal_request(&head, recipient, &create, request)?,
                head,
                reply_as: Some(lease.id.to_string()),
                answers: None,
                expires: Some(Duration::try_from(left).unwrap_or(Duration::ZERO)),
            })
            .await
    }

    /// Parks the end of an account at the broker.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn park_expire(&self, revocation: &Revocation) -> Result<(), BrokerError> {
        let lease = &revocation.lease;
        let delay = Duration::from_secs(lease.ttl_seconds) + PARK_MARGIN;
        let window_ms = lease.window_ms(self.now() + delay);
        let to = Address::Delayed(delay, lease.pool.clone());
        self.send_revoke(revocation, RevokeMode::Expire, to, window_ms, false)
            .await
    }

    /// Parks the end of an account that somebody holds once more, for what it has left.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn park_rest(&self, revocation: &Revocation) -> Result<(), BrokerError> {
        let lease = &revocation.lease;
        let status = &lease.status;
        let now = self.now();
        let end = status
            .expiration
            .map_or(now, |end| status.to_store_clock(end));
        let left = Duration::try_from(end.duration_since(now)).unwrap_or(Duration::ZERO);
        let delay = left + PARK_MARGIN;
        let to = Address::Delayed(delay, lease.pool.clone());
        let window_ms = lease.window_ms(now).saturating_sub(millis(delay));
        self.send_revoke(revocation, RevokeMode::Expire, to, window_ms, false)
            .await
    }

    /// Publishes a `now` revocation.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn send_now(&self, revocation: &Revocation) -> Result<(), BrokerError> {
        let lease = &revocation.lease;
        let to = Address::Queue(topology::revoke_queue(&lease.pool));
        self.send_revoke(
            revocation,
            RevokeMode::Now,
            to,
            lease.window_ms(self.now()),
            false,
        )
        .await
    }

    /// Publishes the end of an account that another pool was to end: parked until its date, or at
    /// once. The parked one of before can be opened by nobody who may.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn send_taken_over(&self, revocation: &Revocation) -> Result<(), BrokerError> {
        match revocation.lease.status.state {
            State::Active => self.park_rest(revocation).await,
            State::Revoking => self.send_now(revocation).await,
            State::Pending | State::Revoked | State::Failed => self.send_copy(revocation).await,
        }
    }

    /// Publishes a copy of a revocation: engines never park it again.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn send_copy(&self, revocation: &Revocation) -> Result<(), BrokerError> {
        self.send_retry(revocation, false).await
    }

    /// Likewise; `asked` where a person wants it to be tried whatever the engines think of the
    /// server.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn send_retry(
        &self,
        revocation: &Revocation,
        asked: bool,
    ) -> Result<(), BrokerError> {
        let lease = &revocation.lease;
        let body = Revoke {
            asked,
            ..self.revoke(revocation, mode(lease), lease.window_ms(self.now()), true)
        };
        let head = head(Kind::Revoke, lease, Timestamp::now());
        let to = Address::Queue(topology::revoke_queue(&lease.pool));
        self.publish_revoke(head, &revocation.recipient, to, body)
            .await
    }

    /// Seals a revocation to be parked for `after` in the place of one that failed.
    ///
    /// # Errors
    /// `Down` for a key X25519 refuses.
    pub(crate) fn seal_instead(
        &self,
        revocation: &Revocation,
        after: Duration,
    ) -> Result<Instead, BrokerError> {
        let lease = &revocation.lease;
        let now = self.now();
        let window_ms = lease.window_ms(now + after.min(INSTEAD_MAX));
        let body = self.revoke(revocation, mode(lease), window_ms, false);
        let head = head(Kind::Revoke, lease, now);
        let sealed = self.seal(&head, &revocation.recipient, &body)?;
        Ok(Instead {
            issued: head.issued,
            body: BASE64_STANDARD.encode(sealed),
        })
    }

    /// Publishes the end of a role found on a server, due by its own date: the lease may be
    /// unknown, or of another installation.
    ///
    /// # Errors
    /// Of the store, for a pool that is distrusted; else see [`Broker::publish`].
    pub(crate) async fn send_found(&self, pool: &Pool, body: Revoke) -> Result<(), ApiError> {
        let recipient = pool.recipient()?;
        let head = Head {
            kind: Kind::Revoke,
            pool: pool.name.clone(),
            lease: Some(body.lease),
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        };
        let to = Address::Queue(topology::revoke_queue(&pool.name));
        self.publish_revoke(head, &recipient, to, body)
            .await
            .map_err(|error| ApiError::broker(&error))
    }

    /// Tells an engine what becomes of the revocation it reported in `reported`.
    ///
    /// # Errors
    /// See [`Broker::publish`].
    pub(crate) async fn send_verdict(
        &self,
        engine: &EngineName,
        recipient: &Recipient,
        reported: &Head,
        verdict: Verdict,
    ) -> Result<(), BrokerError> {
        let head = Head {
            kind: Kind::Verdict,
            issued: Timestamp::now(),
            deadline: None,
            attempt: 0,
            settling: false,
            ..reported.clone()
        };
        let body = self.seal(&head, recipient, &verdict)?;
        self.send_to_engine(engine, head, body, None, VERDICT_LIFE)
            .await
    }

    async fn send_revoke(
        &self,
        revocation: &Revocation,
        mode: RevokeMode,
        to: Address,
        window_ms: u64,
        copy: bool,
    ) -> Result<(), BrokerError> {
        let body = self.revoke(revocation, mode, window_ms, copy);
        let head = head(Kind::Revoke, &revocation.lease, Timestamp::now());
        self.publish_revoke(head, &revocation.recipient, to, body)
            .await
    }

    fn revoke(
        &self,
        revocation: &Revocation,
        mode: RevokeMode,
        window_ms: u64,
        copy: bool,
    ) -> Revoke {
        let lease = &revocation.lease;
        Revoke {
            lease: lease.id,
            installation: self.identity.installation,
            target: revocation.target.clone(),
            role: lease.role.clone(),
            mode,
            owned_objects: lease.owned_objects.clone(),
            server: revocation.server.clone(),
            place: Some(revocation.place()),
            window_ms,
            copy,
            asked: false,
        }
    }

    async fn publish_revoke(
        &self,
        head: Head,
        recipient: &Recipient,
        to: Address,
        mut body: Revoke,
    ) -> Result<(), BrokerError> {
        body.target = authorities::refer(self, &head.pool, recipient, body.target).await;
        let message = Message {
            to,
            body: self.seal(&head, recipient, &body)?,
            head,
            reply_as: None,
            answers: None,
            expires: None,
        };
        delays::publish(self, message).await
    }

    /// Publishes a ping, to be answered as `name`.
    ///
    /// # Errors
    /// See [`Broker::publish`]; `Unroutable` where there is no such engine.
    pub(crate) async fn send_ping(
        &self,
        engine: &EngineName,
        pool: PoolName,
        recipient: &Recipient,
        (name, request): (String, RequestId),
        patience: Duration,
    ) -> Result<(), BrokerError> {
        let now = self.now();
        let head = Head {
            kind: Kind::Ping,
            pool,
            lease: None,
            issued: now,
            deadline: Some(now + patience),
            attempt: 0,
            settling: false,
            traceparent: String::new(),
        };
        let body = self.seal_request(&head, recipient, &(), request)?;
        self.send_to_engine(engine, head, body, Some(name), patience)
            .await
    }

    /// Publishes to the queue of one engine of the head's pool.
    async fn send_to_engine(
        &self,
        engine: &EngineName,
        head: Head,
        body: Vec<u8>,
        reply_as: Option<String>,
        life: Duration,
    ) -> Result<(), BrokerError> {
        let message = Message {
            to: Address::Queue(topology::engine_queue(&head.pool, engine)),
            head,
            body,
            reply_as,
            answers: None,
            expires: Some(life),
        };
        match self.broker.publish(message.clone()).await {
            // One of an earlier version.
            Err(BrokerError::Unroutable) => {
                let to = Address::Queue(topology::earlier_engine_queue(engine));
                self.broker.publish(Message { to, ..message }).await
            }
            sent => sent,
        }
    }

    /// Seals a body to a pool.
    ///
    /// # Errors
    /// `Down` for a key X25519 refuses, and while this dispatcher does not have its own of that
    /// generation: it takes up what was renewed within a second.
    pub(crate) fn seal<T: serde::Serialize>(
        &self,
        head: &Head,
        to: &Recipient,
        body: &T,
    ) -> Result<Vec<u8>, BrokerError> {
        self.seal_as(head, to, body, None)
    }

    /// Seals a request, whose answer names it.
    ///
    /// # Errors
    /// See [`App::seal`].
    pub(crate) fn seal_request<T: serde::Serialize>(
        &self,
        head: &Head,
        to: &Recipient,
        body: &T,
        request: RequestId,
    ) -> Result<Vec<u8>, BrokerError> {
        self.seal_as(head, to, body, Some(request))
    }

    fn seal_as<T: serde::Serialize>(
        &self,
        head: &Head,
        to: &Recipient,
        body: &T,
        request: Option<RequestId>,
    ) -> Result<Vec<u8>, BrokerError> {
        let sealed = self.identity.keys.sender(to.from);
        let sealed = sealed.and_then(|keys| head.seal_request(&keys, &to.key, body, request));
        sealed.map_err(|error| {
            tracing::error!(%error, pool = %head.pool, "a task cannot be sealed to its pool");
            BrokerError::Down
        })
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What ends a lease in this state: its date while somebody holds it or may come to, else at once.
fn mode(lease: &Lease) -> RevokeMode {
    match lease.status.state {
        // One that is being made may be handed out yet.
        State::Pending | State::Active => RevokeMode::Expire,
        State::Revoking | State::Revoked | State::Failed => RevokeMode::Now,
    }
}

fn head(kind: Kind, lease: &Lease, now: Timestamp) -> Head {
    Head {
        kind,
        pool: lease.pool.clone(),
        lease: Some(lease.id),
        issued: now,
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: lease.traceparent.clone(),
    }
}

/// The trace of a lease, for log lines.
pub(crate) fn trace_of(lease: &Lease) -> String {
    trace::trace_of(&lease.traceparent)
}
