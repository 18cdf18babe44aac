//! Recording the lease of a read, unless the lease of an earlier read is the answer.

use std::time::{Duration, Instant};

use mayfly_protocol::names::{LeaseId, RoleName};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;

use super::super::password::{self, Nonce, Seed};
use super::Order;
use crate::app::App;
use crate::error::{ApiError, Code, Problems};
use crate::store::{Admission, Conditions, Generation};
use mayfly_protocol::lease::{self, Lease, State, Status};

/// How often a lease that another request is making is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a read begins anew after others it waited for came to nothing: those of a shared secret
/// all wait for the same one, and would fail one after another.
const BEGIN_ANEW: u32 = 2;

/// What a read begins with.
pub(super) enum Recorded {
    /// A lease of its own, the password of its account, and the verifier.
    New(Box<(Lease, Secret, String)>),
    /// An earlier read's, which is the answer, and where it is good.
    Known(Box<(Lease, Target)>),
}

/// Records a lease, unless another read's is the answer. The caller has waited since `begun`.
pub(super) async fn record(app: &App, order: &Order, begun: Instant) -> Result<Recorded, ApiError> {
    let mut waited_for = 0;
    loop {
        // A caller waits for all of it no longer than that.
        let left = app.limits.create_deadline.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(ApiError::new(
                Code::Deadline,
                "other reads took all the time",
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
                // A server that wants to see a password may want a digit in it; one in 300 has none.
                if !is_judged || password::has_every_kind(&password) {
                    break (nonce, seed, password);
                }
            };
            let verifier = seed.verifier(&password, rounds);
            (nonce, password, verifier)
        })
        .await
        .map_err(|_| ApiError::new(Code::StoreUnavailable, "the dispatcher is stopping"))?;

        // Undo before do: from here on the lease ends, whatever happens.
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
            // Nobody got a credential from that one.
            Ok(Ok(Again::Nothing)) if waited_for < BEGIN_ANEW => waited_for += 1,
            Ok(Ok(Again::Nothing)) => {
                let reason = "no account was made for the reads that this one waited for; they were told why. Try again";
                return Err(ApiError::new(Code::InUse, reason));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let reason = "an earlier read that this one waits for is still under way";
                return Err(ApiError::new(Code::Deadline, reason));
            }
        }
    }
}

/// On which conditions the lease is recorded.
fn conditions(order: &Order, nonce: (Generation, Nonce)) -> Conditions {
    let dynamic = &order.dynamic;
    Conditions {
        key: order.key.clone(),
        nonce: Some(nonce),
        // Half of what was asked for is enough.
        share_for: dynamic
            .share
            .then(|| Duration::from_secs(order.ttl_seconds) / 2),
        most_of_secret: dynamic.max_leases,
        most_of_secret_and_caller: dynamic.max_leases_per_caller,
        most_of_caller: order.most_of_caller,
    }
}

/// What an earlier read came to.
enum Again {
    /// This lease, good on this server.
    Lease(Box<(Lease, Target)>),
    /// Nothing: the read begins anew.
    Nothing,
}

/// The answer of an earlier read, waited for where that one is still under way.
async fn answer_again(app: &App, order: &Order, known: LeaseId) -> Result<Again, ApiError> {
    let lease = loop {
        let lease = app.store.lease(known).await?;
        if lease.status.state != State::Pending {
            break lease;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    let over = |what: &str| {
        let reason = format!("{what}; read again with another Idempotency-Key, or without");
        Err(ApiError::new(Code::Exists, reason))
    };
    // A shared lease has the life its first reader asked for.
    if order.key.is_some() && !order.dynamic.share && lease.ttl_seconds != order.ttl_seconds {
        return Err(ApiError::invalid(Problems::from([(
            "Idempotency-Key".to_owned(),
            vec![format!(
                "was used for this secret with a ttl of {}",
                lease.ttl_seconds
            )],
        )])));
    }
    let Some(end) = lease.status.expiration else {
        return Ok(Again::Nothing);
    };
    let lives = lease.status.state == State::Active && lease.status.to_store_clock(end) > app.now();
    match (lives, order.key.is_some()) {
        (true, _) if lease.status.engine.is_some() => {
            let access = app.store.lease_access(lease.id, 0).await?;
            let target = access.map(|found| found.own_target);
            let target = target.unwrap_or_else(|| order.base.target.clone());
            Ok(Again::Lease(Box::new((lease, target))))
        }
        // Of a restored store: nobody was heard to have made its account.
        (true, true) => over("it is not known whether the account of this Idempotency-Key exists"),
        (false, true) => over("the lease of this Idempotency-Key has ended"),
        (_, false) => Ok(Again::Nothing),
    }
}

/// A lease whose caller waits for so long.
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
