//! Records the lease of a read, unless an earlier read's lease is the answer.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_protocol::names::{LeaseId, RoleName};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;

use crate::app::App;
use crate::error::{ApiError, Code, Problems};
use crate::leases::order::Order;
use crate::password::{self, Nonce, Seed};
use crate::store::{Admission, Conditions, Generation};
use mayfly_protocol::lease::{self, Lease, State, Status};

/// Pause between two looks at a lease that another request is making.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How many times a read begins again when an earlier read that it waited for has failed. All reads of a shared
/// secret wait for the same one, and would fail one after another.
const BEGIN_AGAIN: u32 = 2;

/// The start of a read.
pub(super) enum Recorded {
    /// A new lease, the password of its account, and the verifier.
    New(Box<(Lease, Secret, String)>),
    /// The lease of an earlier read, which this read gets too, and its server.
    Known(Box<(Lease, Target)>),
}

/// Records a lease, unless an earlier read's lease is the answer. The caller has waited since `begun`.
pub(super) async fn record(app: &App, order: &Order, begun: Instant) -> Result<Recorded, ApiError> {
    let mut waited_for = 0;
    loop {
        // The deadline includes the time of these steps.
        let left = app.limits.create_deadline.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(ApiError::new(
                Code::Deadline,
                "other reads of this server used up the time limit",
            ));
        }
        let lease = new_lease(app, order, left);
        let (generation, key) = app.identity.keys.derivation();
        let rounds = order.dynamic.scram_iterations;
        let is_judged = order.dynamic.account.clear_password;
        let (nonce, password, verifier) = tokio::task::spawn_blocking(move || {
            let (nonce, seed, password) = loop {
                let nonce = Nonce::random();
                let seed = Seed::of_nonce(key.clone(), nonce.expose());
                let password = seed.password();
                // A server with password checks may require a digit; one in 300 passwords has none.
                if !is_judged || password::has_every_kind(&password) {
                    break (nonce, seed, password);
                }
            };
            let verifier = seed.verifier(&password, rounds);
            (nonce, password, verifier)
        })
        .await
        .map_err(|_| ApiError::new(Code::StoreUnavailable, "the dispatcher is stopping"))?;

        // The lease is recorded before the create is sent: from here on the lease ends in every case.
        let placed = app
            .store
            .admit(
                lease.clone(),
                conditions(order, (generation, nonce)),
                app.now(),
            )
            .await?;
        let Admission::Known(known) = placed else {
            return Ok(Recorded::New(Box::new((lease, password, verifier))));
        };
        match tokio::time::timeout(left, answer_again(app, order, known)).await {
            Ok(Ok(Again::Lease(known))) => return Ok(Recorded::Known(known)),
            // No caller got a credential of that lease.
            Ok(Ok(Again::Nothing)) if waited_for < BEGIN_AGAIN => waited_for += 1,
            Ok(Ok(Again::Nothing)) => {
                let reason = "this read waited for earlier reads, but they made no account; their errors say why. Try again";
                return Err(ApiError::new(Code::InUse, reason));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let reason = "an earlier read that this one waits for is still in progress";
                return Err(ApiError::new(Code::Deadline, reason));
            }
        }
    }
}

/// The conditions under which the lease is recorded.
fn conditions(order: &Order, nonce: (Generation, Nonce)) -> Conditions {
    let dynamic = &order.dynamic;
    Conditions {
        key: order.key.clone(),
        nonce: Some(nonce),
        // A shared lease must have at least half of the requested TTL left.
        share_for: dynamic
            .share
            .then(|| Duration::from_secs(order.ttl_seconds) / 2),
        most_of_secret: dynamic.max_leases,
        most_of_secret_and_caller: dynamic.max_leases_per_caller,
        most_of_caller: order.most_of_caller,
    }
}

/// What an earlier read means for this read.
enum Again {
    /// The lease of the earlier read, on this server.
    Lease(Box<(Lease, Target)>),
    /// The earlier read has left no lease: this read begins again.
    Nothing,
}

/// Takes the answer of an earlier read. Waits while that read is in progress.
async fn answer_again(app: &App, order: &Order, known: LeaseId) -> Result<Again, ApiError> {
    let lease = loop {
        let lease = app.store.lease(known).await?;
        if lease.status.state != State::Pending {
            break lease;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    if !answers(
        &lease,
        order.key.is_some(),
        order.dynamic.share,
        order.ttl_seconds,
        app.now(),
    )? {
        return Ok(Again::Nothing);
    }
    let access = app.store.lease_access(lease.id, 0).await?;
    let target = access.map(|found| found.own_target);
    let target = target.unwrap_or_else(|| order.base.target.clone());
    Ok(Again::Lease(Box::new((lease, target))))
}

/// Whether the lease of an earlier read, which is no longer pending, answers this read too. `false`: the
/// read begins again. `has_key`: the caller named the read; `is_shared`: the secret's leases are shared.
///
/// # Errors
/// `invalid` and `exists`: the caller's key was used for another read.
fn answers(
    lease: &Lease,
    has_key: bool,
    is_shared: bool,
    ttl_seconds: u64,
    now: Timestamp,
) -> Result<bool, ApiError> {
    let used_up = |what: &str| {
        let reason = format!("{what}; read again with a new Idempotency-Key, or without one");
        Err(ApiError::new(Code::Exists, reason))
    };
    // A shared lease has the TTL that its first reader requested.
    if has_key && !is_shared && lease.ttl_seconds != ttl_seconds {
        return Err(ApiError::invalid(Problems::from([(
            "Idempotency-Key".to_owned(),
            vec![format!(
                "was used for this secret with a ttl of {}",
                lease.ttl_seconds
            )],
        )])));
    }
    let status = &lease.status;
    // Nobody ever got a credential.
    let Some(end) = status.expiration else {
        return Ok(false);
    };
    let lives = status.state == State::Active && status.to_store_clock(end) > now;
    match (lives, has_key) {
        (true, _) if status.engine.is_some() => Ok(true),
        // This happens only in a restored store: no engine has reported that it made the account.
        (true, true) => {
            used_up("it is not known whether the account of this Idempotency-Key exists")
        }
        (false, true) => used_up("the lease of this Idempotency-Key has ended"),
        (_, false) => Ok(false),
    }
}

/// The lease of a new read whose caller waits for `patience`.
fn new_lease(app: &App, order: &Order, patience: Duration) -> Lease {
    let id = LeaseId::random();
    let now = app.now();
    let create_deadline = now + patience;
    let database = order
        .dynamic
        .database
        .clone()
        .unwrap_or_else(|| order.base.target.database.clone());
    Lease {
        id,
        path: order.record.path.clone(),
        pool: order.dynamic.pool.clone(),
        role: RoleName::for_lease(&order.dynamic.user_prefix, &id),
        base: order.base.base.clone(),
        database,
        owned_objects: order.dynamic.owned_objects.clone(),
        traceparent: order.trace.to_string(),
        created: now,
        created_by: order.who.clone(),
        secret_version: match order.for_trial {
            true => lease::NOBODYS_VERSION,
            false => order.record.version + lease::WITH_NONCE,
        },
        ttl_seconds: order.ttl_seconds,
        max_ttl_seconds: order.max_ttl_seconds,
        create_deadline,
        status: Status::begin(create_deadline),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::{at, engine, lease};

    /// The result of [`answers`] for a read that requests a TTL of 60 s.
    fn is_answer(lease: &Lease, has_key: bool, now: i64) -> Result<bool, Code> {
        answers(lease, has_key, false, 60, at(now)).map_err(|error| error.code)
    }

    #[test]
    fn an_earlier_read_answers_while_its_account_lives() {
        // The held lease ends at 60 s.
        let mut held = lease(State::Active);
        held.status.engine = Some(engine());
        // This lease is of a restored store: no engine has reported it.
        let unheard = lease(State::Active);
        let table = [
            (&held, 59, Ok(true), Ok(true)),
            (&held, 60, Ok(false), Err(Code::Exists)),
            (&unheard, 59, Ok(false), Err(Code::Exists)),
            (&lease(State::Revoking), 59, Ok(false), Err(Code::Exists)),
            (&lease(State::Revoked), 59, Ok(false), Err(Code::Exists)),
            // Nobody got a credential, so the key is free again.
            (&lease(State::Failed), 59, Ok(false), Ok(false)),
        ];
        for (lease, now, without_key, with_key) in table {
            let state = lease.status.state;
            assert_eq!(is_answer(lease, false, now), without_key, "{state:?}");
            assert_eq!(is_answer(lease, true, now), with_key, "{state:?}");
        }
    }

    #[test]
    fn a_name_stands_for_one_ttl_unless_leases_are_shared() {
        let mut held = lease(State::Active);
        held.status.engine = Some(engine());
        let with = |has_key, is_shared, ttl| {
            answers(&held, has_key, is_shared, ttl, at(1)).map_err(|error| error.code)
        };
        assert_eq!(with(true, false, 61), Err(Code::Invalid));
        assert_eq!(with(true, true, 61), Ok(true));
        assert_eq!(with(false, false, 61), Ok(true));
    }
}
