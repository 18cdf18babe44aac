//! A read of a dynamic secret, from the lease row to the credential. In order: the row is
//! committed; the end is parked at the broker and the create published; an engine answers; and
//! only if the end is confirmed and the lease still waits for it is the caller answered.
//! Whatever goes wrong after the row, the lease is on its way to an end before the caller hears.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mayfly_common::broker::BrokerError;
use mayfly_common::fault;
use mayfly_common::names::{EngineName, LeaseId, RoleName};
use mayfly_common::secret::Secret;
use mayfly_common::target::Target;
use mayfly_common::task::{Create, Created, Kind, Special};
use mayfly_common::trace::{Span, TraceContext};
use mayfly_common::window::{BEGUN_AFTER, PUBLISH_LIMIT};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::app::{App, trace_of};
use crate::delays;
use crate::error::{ApiError, Code, Limit, Problems};
use crate::fair::{Place, TooMany};
use crate::keys::Generation;
use crate::lease::{self, BaseRef, Event, Lease, State, Status, ToSend};
use crate::password::{self, Nonce, Seed};
use crate::replies::Expected;
use crate::requests;
use crate::secrets::Dynamic;
use crate::store::{Admission, Applied, BaseFacts, Conditions, Record, Revocation, StoreError};
use crate::trials;

/// How often a lease that another request is making is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A create that found no free connection slot is sent again after this, doubling, at most ...
pub(crate) const FULL_PAUSE: Duration = Duration::from_millis(500);
/// ... this.
pub(crate) const FULL_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A create needs so much time at least.
pub(crate) const CREATE_TAKES: Duration = Duration::from_secs(5);

/// A read holds up others of its caller and server for so long at most.
const TURN: Duration = Duration::from_millis(500);
/// Who is refused because too many of theirs wait may try again after this.
const RETRY_AFTER: SignedDuration = SignedDuration::from_secs(1);
/// How often a read begins anew after others it waited for came to nothing: those of a shared secret
/// all wait for the same one, and would fail one after another.
const BEGIN_ANEW: u32 = 2;

/// What is asked for.
pub(crate) struct Order {
    /// The secret.
    pub(crate) record: Record,
    /// What it says.
    pub(crate) dynamic: Dynamic,
    /// With what.
    pub(crate) base: BaseFacts,
    /// Life of the account, in seconds.
    pub(crate) ttl_seconds: u64,
    /// Longest life with renewals, in seconds.
    pub(crate) max_ttl_seconds: u64,
    /// `root` or a token's id.
    pub(crate) who: String,
    /// Most leases the caller may have at a time.
    pub(crate) most_of_caller: Option<u64>,
    /// The caller's name for this read: a second read of the same name gets the same lease.
    pub(crate) key: Option<String>,
    /// It is made for trial, and ended after it: nobody else may share it.
    pub(crate) for_trial: bool,
    /// Where in the caller's trace.
    pub(crate) trace: TraceContext,
}

/// A credential, and where it is good.
pub(crate) struct Issued {
    /// The secret it was read from.
    pub(crate) record: Record,
    /// Host of the server.
    pub(crate) host: String,
    /// Its port.
    pub(crate) port: u16,
    /// The database.
    pub(crate) database: String,
    /// The account.
    pub(crate) role: RoleName,
    /// Its name as it is handed out.
    pub(crate) username: String,
    /// Its password.
    pub(crate) password: Secret,
    /// Its life, in seconds.
    pub(crate) ttl_seconds: u64,
    /// Its end, by the database's clock.
    pub(crate) expiration: Timestamp,
    /// Its lease.
    pub(crate) lease: LeaseId,
    /// It was made for an earlier read.
    pub(crate) again: bool,
    /// What the account lacks for now. Names no object.
    pub(crate) warnings: Vec<String>,
}

/// Issues a lease. The work goes on to a defined end when the caller goes away; an account
/// nobody is there to take is revoked at once. The span is that of the order's trace.
///
/// # Errors
/// The API's, see DESIGN §5.
pub(crate) async fn issue(
    app: &Arc<App>,
    order: Order,
    mut span: Span,
) -> Result<Issued, ApiError> {
    let (sender, answer) = oneshot::channel();
    let app = app.clone();
    app.clone().issues.spawn(async move {
        let begun = Instant::now();
        let (pool, trace) = (order.dynamic.pool.clone(), order.trace.trace());
        span.tag("mayfly.pool", &pool);
        span.tag("mayfly.path", &order.record.path);
        // Another read will come for it, or has it already.
        let is_kept = order.key.is_some() || order.dynamic.share;
        let mut sender = sender;
        let turn = tokio::select! {
            turn = wait_for_turn(&app, &order) => turn,
            // Nothing is recorded yet.
            () = sender.closed() => return,
        };
        let issued = match turn {
            Ok(place) => {
                let mut work = pin!(run(&app, order, begun));
                tokio::select! {
                    issued = &mut work => issued,
                    // What takes so long waits for something, and is not in the way of others.
                    () = tokio::time::sleep(TURN) => {
                        drop(place);
                        work.await
                    }
                }
            }
            Err(error) => Err(error),
        };
        app.metrics.issued(&pool, issued.as_ref().err().map(|error| error.code), begun.elapsed());
        match &issued {
            Ok(issued) => {
                span.tag("mayfly.lease", issued.lease);
                span.tag("mayfly.role", &issued.role);
            }
            Err(error) => span.fail(error.code.as_str()),
        }
        drop(span);
        if let Err(Ok(unclaimed)) = sender.send(issued)
            && !is_kept
        {
            info!(lease = %unclaimed.lease, trace, "the caller is gone; its account is revoked");
            if let Err(error) = revoke_now(&app, unclaimed.lease).await {
                warn!(lease = %unclaimed.lease, trace, %error, "an account nobody took lives on to its end");
            }
        }
    });
    let lost = || ApiError::new(Code::StoreUnavailable, "the dispatcher is stopping");
    answer.await.map_err(|_| lost())?
}

/// Waits until a read may begin.
async fn wait_for_turn(app: &App, order: &Order) -> Result<Place, ApiError> {
    let target = &order.base.target;
    let turn = app
        .fair
        .turn((target.host.clone(), target.port), order.who.clone());
    match tokio::time::timeout(app.limits.create_deadline, turn).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(TooMany(waiting))) => Err(ApiError {
            retry_at: Some(Timestamp::now() + RETRY_AFTER),
            limit: Some(Limit::WaitingReads),
            ..ApiError::new(
                Code::Quota,
                format!(
                    "{waiting} reads of this caller wait for the database server already (limits.waiting_reads_per_caller); try again in a moment"
                ),
            )
        }),
        Err(_) => Err(ApiError::new(
            Code::Deadline,
            "other reads took all the time",
        )),
    }
}

/// Has a lease revoked: marks it, then tells the engines. Where the broker is away the mark is
/// enough, the reconciler tells them later.
///
/// # Errors
/// `not_found`, `store_unavailable`.
pub(crate) async fn revoke_now(app: &App, id: LeaseId) -> Result<Lease, ApiError> {
    let applied = app.store.apply(id, Event::RevokeAsked, app.now()).await?;
    send_what_follows(app, &applied).await;
    Ok(applied.lease)
}

/// Sends what an event calls for. A failure is the reconciler's to make good.
pub(crate) async fn send_what_follows(app: &App, applied: &Applied) {
    let Some(revocation) = &applied.revocation else {
        return;
    };
    let sent = match applied.send {
        ToSend::Nothing => return,
        ToSend::RevokeNow => app.send_now(revocation).await,
        ToSend::OtherCredentials if revocation.ways < 2 => return,
        ToSend::OtherCredentials | ToSend::Copy => app.send_copy(revocation).await,
        ToSend::Retry => retry_every_way(app, revocation).await,
    };
    if let Err(error) = sent {
        warn!(lease = %applied.lease.id, trace = trace_of(&applied.lease), %error,
            "a revocation was not published; the reconciler does it");
    }
}

/// Who asks for a try may have set right any of the ways.
async fn retry_every_way(app: &App, first: &Revocation) -> Result<(), BrokerError> {
    let mut sent = app.send_retry(first, true).await;
    for turn in 1..first.ways {
        if let Ok(Some(way)) = app.store.revocation(first.lease.id, turn).await {
            sent = sent.and(app.send_retry(&way, true).await);
        }
    }
    sent
}

/// What became of the two publishes and the answer.
enum End {
    /// The account exists and its end is parked.
    Made(Created, EngineName),
    /// There is no account for certain: the create was not sent, or failed before anything was made.
    Nothing(ApiError),
    /// The engine had no connection for it; whether it made nothing for certain. A create can be sent
    /// again, since an account is made once.
    Full(ApiError, bool),
    /// There may be one.
    Unknown(ApiError),
}

async fn run(app: &Arc<App>, order: Order, begun: Instant) -> Result<Issued, ApiError> {
    let pool = &order.dynamic.pool;
    // Refused before anything is recorded.
    order.base.pool.recipient()?;
    match app.broker.engines_of(pool).await {
        Ok(0) => return Err(ApiError::no_engine(pool)),
        Ok(_) => {}
        Err(error) => return Err(ApiError::broker(&error)),
    }
    if let Err(error) = trials::before(app, &order, begun).await {
        // The caller is shown the trace alone where it may only read.
        warn!(trace = order.trace.trace(), path = %order.record.path, %pool,
            code = error.code.as_str(), reason = error.message, "not issued");
        return Err(error);
    }
    let (lease, password, verifier) = match record(app, &order, begun).await? {
        Recorded::New(new) => *new,
        Recorded::Known(known) => return issued_again(app, order, *known).await,
    };

    fault::point("issue", "recorded").await;
    let end = carry_out(app, &order, &lease, (&password, verifier)).await;
    let mut warnings = Vec::new();
    let (event, error) = match end {
        End::Made(mut created, engine) => {
            warnings = std::mem::take(&mut created.warnings);
            (Event::Created(created, engine), None)
        }
        End::Nothing(error) => (Event::NothingMade, Some(error)),
        End::Full(error, _) | End::Unknown(error) => (Event::GivenUp, Some(error)),
    };
    trials::after(app, &order, error.as_ref());
    fault::point("issue", "answered").await;
    let applied = app.store.apply(lease.id, event, app.now()).await?;
    fault::point("issue", "decided").await;
    send_what_follows(app, &applied).await;
    let trace = order.trace.trace();
    if let Some(error) = error {
        warn!(lease = %lease.id, trace, path = %lease.path, pool = %lease.pool,
            code = error.code.as_str(), reason = error.message, "not issued");
        return Err(error);
    }
    let status = &applied.lease.status;
    let (State::Pending, State::Active, Some(expiration)) =
        (applied.before, status.state, status.expiration)
    else {
        return Err(ApiError::new(
            Code::InUse,
            "the lease was revoked before its account was ready",
        ));
    };
    info!(lease = %lease.id, trace, path = %lease.path, pool = %lease.pool, role = %lease.role,
        %expiration, warnings = warnings.join("; "), "issued");
    Ok(Issued {
        record: order.record,
        host: order.base.target.host,
        port: order.base.target.port,
        database: lease.database,
        username: order.dynamic.username_template.name(lease.role.as_str()),
        role: lease.role,
        password,
        ttl_seconds: order.ttl_seconds,
        expiration,
        lease: lease.id,
        again: false,
        warnings,
    })
}

/// What a read begins with.
enum Recorded {
    /// A lease of its own, the password of its account, and the verifier.
    New(Box<(Lease, Secret, String)>),
    /// An earlier read's, which is the answer, and where it is good.
    Known(Box<(Lease, Target)>),
}

/// Records a lease, unless another read's is the answer. The caller has waited since `begun`.
async fn record(app: &App, order: &Order, begun: Instant) -> Result<Recorded, ApiError> {
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
            let revocation = app.store.revocation(lease.id, 0).await?;
            let target = revocation.map(|found| found.own_target);
            let target = target.unwrap_or_else(|| order.base.target.clone());
            Ok(Again::Lease(Box::new((lease, target))))
        }
        // Of a restored store: nobody was heard to have made its account.
        (true, true) => over("it is not known whether the account of this Idempotency-Key exists"),
        (false, true) => over("the lease of this Idempotency-Key has ended"),
        (_, false) => Ok(Again::Nothing),
    }
}

async fn issued_again(
    app: &App,
    order: Order,
    (lease, target): (Lease, Target),
) -> Result<Issued, ApiError> {
    let seed = app.store.seed(lease.id).await.map_err(|error| match error {
        StoreError::NotFound(_) => ApiError::new(
            Code::InUse,
            "the lease ended just now; read again, with another Idempotency-Key where there was one",
        ),
        other => other.into(),
    })?;
    info!(lease = %lease.id, trace = order.trace.trace(), path = %lease.path, "issued again");
    Ok(Issued {
        record: order.record,
        host: target.host,
        port: target.port,
        database: lease.database,
        username: order.dynamic.username_template.name(lease.role.as_str()),
        role: lease.role,
        password: seed.password(),
        ttl_seconds: lease.ttl_seconds,
        // Only a lease that has one is answered again.
        expiration: lease.status.expiration.unwrap_or(lease.created),
        lease: lease.id,
        again: true,
        warnings: vec![],
    })
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

async fn carry_out(
    app: &Arc<App>,
    order: &Order,
    lease: &Lease,
    (password, verifier): (&Secret, String),
) -> End {
    let recipient = match order.base.pool.recipient() {
        Ok(recipient) => recipient,
        Err(error) => return End::Nothing(error.into()),
    };
    let account = order.dynamic.account.clone();
    let (verifier, special) = match account.is_plain() {
        true => (Some(verifier), None),
        false => {
            let password = account.clear_password.then(|| password.clone());
            let special = Special {
                verifier,
                password,
                account,
            };
            (None, Some(special))
        }
    };
    let create = Create {
        lease: lease.id,
        installation: app.identity.installation,
        target: order.base.target.clone(),
        database: lease.database.clone(),
        role: lease.role.clone(),
        verifier,
        special,
        ttl_seconds: order.ttl_seconds,
        grants: order.dynamic.grants.clone(),
        connection_limit: order.dynamic.connection_limit,
        wait_for_replicas: order.dynamic.wait_for_replicas,
        not_after: app.clocks.there(
            &lease.base.id,
            &lease.pool,
            lease.create_deadline,
            BEGUN_AFTER,
        ),
    };
    let begun = app.now();
    let parked_end = Revocation {
        lease: lease.clone(),
        target: order.base.target.clone(),
        own_target: order.base.target.clone(),
        ways: 1,
        new_key: false,
        taken_over: false,
        server: order.base.server.clone(),
        recipient: recipient.clone(),
    };
    let mut reply = expect(app, order, lease);
    let request = reply.request();
    let (parked, sent) = tokio::join!(
        async {
            fault::point("issue", "before_parking").await;
            let parking = app.park_expire(&parked_end);
            let parked = tokio::time::timeout(PUBLISH_LIMIT, parking).await;
            fault::point("issue", "parked").await;
            parked
        },
        // So much later at most than its start may it reach the broker: `settles_at` counts on it.
        async {
            let sending = app.send_create(lease, &create, &recipient, request);
            let sent = tokio::time::timeout(PUBLISH_LIMIT, sending).await;
            fault::point("issue", "sent").await;
            sent
        },
    );
    let in_time = |published: Result<_, _>| {
        published.unwrap_or_else(|_| Err(BrokerError::Unconfirmed("no confirm in time".to_owned())))
    };
    let (parked, sent) = (in_time(parked), in_time(sent));
    if let Err(BrokerError::Unconfirmed(_)) = parked
        && app.broker.is_up()
    {
        // As where somebody has deleted the exchange by which ends are parked.
        let app = app.clone();
        app.clone()
            .issues
            .spawn(async move { delays::mend(&app).await });
    }
    match (parked, sent) {
        (
            _,
            Err(error @ (BrokerError::Down | BrokerError::Unroutable | BrokerError::NotAllowed(_))),
        ) => End::Nothing(ApiError::broker(&error)),
        (_, Err(error)) | (Err(error), Ok(())) => End::Unknown(ApiError::broker(&error)),
        (Ok(()), Ok(())) => {
            let mut end = wait(app, lease, &mut reply).await;
            let mut pause = FULL_PAUSE;
            // Whether none of the creates sent so far made anything, for certain.
            let mut nothing = true;
            // The next engine may have a connection, or this one in a moment. What was made all the same
            // is found by its lease.
            while let End::Full(_, made_nothing) = &end
                && left(app, lease) > pause + CREATE_TAKES
            {
                nothing &= made_nothing;
                drop(reply);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(FULL_PAUSE_MAX);
                reply = expect(app, order, lease);
                let sending = app.send_create(lease, &create, &recipient, reply.request());
                let sent = tokio::time::timeout(PUBLISH_LIMIT, sending).await;
                end = match in_time(sent) {
                    Ok(()) => wait(app, lease, &mut reply).await,
                    Err(error) => End::Unknown(ApiError::broker(&error)),
                };
            }
            let end = match end {
                End::Full(error, true) | End::Nothing(error) if nothing => End::Nothing(error),
                End::Full(error, _) | End::Nothing(error) => End::Unknown(error),
                end => end,
            };
            learn(app, lease, &end, begun).await;
            end
        }
    }
}

/// What the end of a create says of its server: of its clock, and of the admin's password.
async fn learn(app: &App, lease: &Lease, end: &End, begun: Timestamp) {
    let (base, pool) = (&lease.base, &lease.pool);
    match end {
        End::Made(created, _) => {
            let ttl = SignedDuration::try_from_secs_f64(lease.ttl_seconds as f64);
            if let Ok(there) = ttl.map_or(Err(()), |ttl| {
                created.expiration.checked_sub(ttl).map_err(drop)
            }) {
                app.clocks.learn(&base.id, pool, there, (begun, app.now()));
            }
        }
        End::Nothing(error) | End::Unknown(error) | End::Full(error, _) => {
            if matches!(error.code, Code::DatabaseUnreachable | Code::Deadline) {
                app.clocks.forget(&base.id, pool);
            }
            doubt(app, base, error).await;
        }
    }
}

/// Has the other password of an admin tried whose login was refused, where two may be right.
pub(crate) async fn doubt(app: &App, base: &BaseRef, error: &ApiError) {
    if error.code == Code::DatabaseRefusedLogin
        && let Err(error) = app.store.doubt_password(base.clone(), app.now()).await
    {
        warn!(base = %base.id, %error, "the other password of the admin is not tried");
    }
}

/// Begins to wait for the account.
fn expect(app: &App, order: &Order, lease: &Lease) -> Expected {
    app.replies.expect(
        Kind::Create,
        lease.id.to_string(),
        lease.pool.clone(),
        order.base.pool.keys(),
    )
}

/// How long the caller still waits.
fn left(app: &App, lease: &Lease) -> Duration {
    let left = lease.create_deadline.duration_since(app.now());
    left.max(SignedDuration::ZERO).unsigned_abs()
}

/// Waits for the account.
async fn wait(app: &App, lease: &Lease, reply: &mut Expected) -> End {
    match requests::wait(app, &lease.pool, reply, left(app, lease)).await {
        Err(error) => End::Unknown(error),
        Ok(reply) => {
            requests::heed(app, &lease.pool, &reply.result);
            match requests::answer::<Create>(reply.result) {
                Ok(created) => End::Made(created, reply.engine),
                Err(failure) if failure.full => {
                    let nothing = failure.nothing_made;
                    End::Full(failure.into(), nothing)
                }
                Err(failure) if failure.nothing_made => End::Nothing(failure.into()),
                Err(failure) => End::Unknown(failure.into()),
            }
        }
    }
}
