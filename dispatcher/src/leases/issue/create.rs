//! Making the account of a recorded lease: its end is parked and its create sent at the same time, and an
//! engine's answer says what came of it.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_common::broker::BrokerError;
use mayfly_common::fault;
use mayfly_protocol::names::EngineName;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::task::{Create, Created, Special};
use mayfly_protocol::timing::timing;
use tracing::warn;

use super::{CREATE_TAKES, FULL_PAUSE, FULL_PAUSE_MAX, Order};
use crate::app::App;
use crate::engines::call::{self, Answered, Sent};
use crate::engines::{declare, outbox};
use crate::error::{ApiError, Code};
use crate::store::{LeaseAccess, Recipient};
use mayfly_protocol::lease::{BaseRef, Event, Lease};

/// What became of the two publishes and the answer.
#[derive(Debug)]
pub(super) enum End {
    /// The account exists and its end is parked.
    Made(Created, EngineName),
    /// There is certainly no account: the create was not sent, or failed before anything was made.
    Nothing(ApiError),
    /// The engine had no free connection slot; whether it certainly made nothing. A create can be sent
    /// again, since an account is made once for its lease.
    Full(ApiError, bool),
    /// There may be an account.
    Unknown(ApiError),
}

impl End {
    /// What happened to the lease, what the account lacks, and what the caller gets instead of it.
    pub(super) fn event(self) -> (Event, Vec<String>, Option<ApiError>) {
        match self {
            Self::Made(mut created, engine) => {
                let warnings = std::mem::take(&mut created.warnings);
                (Event::Created(created, engine), warnings, None)
            }
            Self::Nothing(error) => (Event::NothingMade, vec![], Some(error)),
            Self::Full(error, _) | Self::Unknown(error) => (Event::GivenUp, vec![], Some(error)),
        }
    }

    /// The same after several tries: there is certainly no account only where no try can have made one.
    fn after_tries(self, all_made_nothing: bool) -> Self {
        match self {
            Self::Full(error, true) | Self::Nothing(error) if all_made_nothing => {
                Self::Nothing(error)
            }
            Self::Full(error, _) | Self::Nothing(error) => Self::Unknown(error),
            end @ (Self::Made(..) | Self::Unknown(_)) => end,
        }
    }
}

/// What an answer says of the account.
fn end_of(answered: Result<Answered<Created>, ApiError>) -> End {
    match answered {
        Err(error) => End::Unknown(error),
        Ok(Answered { engine, result }) => match result {
            Ok(created) => End::Made(created, engine),
            Err(failure) if failure.full => {
                let made_nothing = failure.nothing_made;
                End::Full(failure.into(), made_nothing)
            }
            Err(failure) if failure.nothing_made => End::Nothing(failure.into()),
            Err(failure) => End::Unknown(failure.into()),
        },
    }
}

/// The sent create where both publishes are confirmed; else what that means.
fn both<S>(parked: Result<(), BrokerError>, sent: Result<S, BrokerError>) -> Result<S, End> {
    match (parked, sent) {
        (
            _,
            Err(error @ (BrokerError::Down | BrokerError::Unroutable | BrokerError::NotAllowed(_))),
        ) => Err(End::Nothing(ApiError::broker(&error))),
        (_, Err(error)) | (Err(error), Ok(_)) => Err(End::Unknown(ApiError::broker(&error))),
        (Ok(()), Ok(sent)) => Ok(sent),
    }
}

/// Parks the end and has the account made.
pub(super) async fn create(
    app: &Arc<App>,
    order: &Order,
    lease: &Lease,
    (password, verifier): (&Secret, String),
) -> End {
    let recipient = match order.base.pool.recipient() {
        Ok(recipient) => recipient,
        Err(error) => return End::Nothing(error.into()),
    };
    let create = request(app, order, lease, (password, verifier));
    let begun = app.now();
    let parked_end = LeaseAccess {
        lease: lease.clone(),
        target: order.base.target.clone(),
        own_target: order.base.target.clone(),
        candidates: 1,
        new_key: false,
        taken_over: false,
        server: order.base.server.clone(),
        recipient: recipient.clone(),
    };
    let (parked, sent) = tokio::join!(
        async {
            fault::point("issue", "before_parking").await;
            let parking = outbox::park_end(app, &parked_end);
            let parked = in_time(parking).await;
            fault::point("issue", "parked").await;
            parked
        },
        async {
            let sent = send(app, order, lease, &create, &recipient).await;
            fault::point("issue", "sent").await;
            sent
        },
    );
    if let Err(BrokerError::Unconfirmed(_)) = parked
        && app.broker.is_up()
    {
        // As where somebody has deleted the exchange by which ends are parked.
        let app = app.clone();
        app.clone()
            .issues
            .spawn(async move { declare::mend(&app).await });
    }
    let sent = match both(parked, sent) {
        Ok(sent) => sent,
        Err(end) => return end,
    };
    let mut end = answer(app, lease, sent).await;
    let mut pause = FULL_PAUSE;
    let mut all_made_nothing = true;
    // The next engine may have a connection slot, or this one in a moment. An account that was made after
    // all is found by its lease.
    while let End::Full(_, made_nothing) = &end
        && left(app, lease) > pause + CREATE_TAKES
    {
        all_made_nothing &= made_nothing;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(FULL_PAUSE_MAX);
        end = match send(app, order, lease, &create, &recipient).await {
            Ok(sent) => answer(app, lease, sent).await,
            Err(error) => End::Unknown(ApiError::broker(&error)),
        };
    }
    let end = end.after_tries(all_made_nothing);
    learn(app, lease, &end, begun).await;
    end
}

/// The request for the account of a lease.
fn request(
    app: &App,
    order: &Order,
    lease: &Lease,
    (password, verifier): (&Secret, String),
) -> Create {
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
    Create {
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
            timing().begun_after(),
        ),
    }
}

/// Sends a create. It reaches the broker within [`timing().publish_limit`] or not at all: `settles_at` counts on it.
async fn send(
    app: &App,
    order: &Order,
    lease: &Lease,
    create: &Create,
    recipient: &Recipient,
) -> Result<Sent<Create>, BrokerError> {
    in_time(call::send(
        app,
        &order.base.pool,
        recipient,
        create,
        &lease.traceparent,
        lease.create_deadline,
    ))
    .await
}

async fn in_time<T>(
    publishing: impl Future<Output = Result<T, BrokerError>>,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(timing().publish_limit, publishing).await {
        Ok(published) => published,
        Err(_) => Err(BrokerError::Unconfirmed("no confirm in time".to_owned())),
    }
}

async fn answer(app: &App, lease: &Lease, sent: Sent<Create>) -> End {
    end_of(sent.answer(app, left(app, lease)).await)
}

/// How long the caller still waits.
fn left(app: &App, lease: &Lease) -> Duration {
    let left = lease.create_deadline.duration_since(app.now());
    left.max(SignedDuration::ZERO).unsigned_abs()
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
            doubt_password(app, base, error).await;
        }
    }
}

/// Has the other password of an admin tried whose login was refused, where two may be right.
pub(crate) async fn doubt_password(app: &App, base: &BaseRef, error: &ApiError) {
    if error.code == Code::DatabaseRefusedLogin
        && let Err(error) = app.store.doubt_password(base.clone(), app.now()).await
    {
        warn!(base = %base.id, %error, "the other password of the admin is not tried");
    }
}
