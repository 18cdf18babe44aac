//! Makes the account of a recorded lease: parks its end and sends its create at the same time, and takes the
//! result from an engine's answer.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mayfly_common::broker::BrokerError;
use mayfly_common::fault;
use mayfly_protocol::names::EngineName;
use mayfly_protocol::secret::Secret;
use mayfly_protocol::task::{Create, Created, Special};
use mayfly_protocol::timing::timing;

use crate::app::App;
use crate::engines::call::{self, Answered, Sent};
use crate::engines::{declare, outbox};
use crate::error::{ApiError, Code};
use crate::leases::order::Order;
use crate::leases::slot_pause::SlotPause;
use crate::leases::trials::doubt_password;
use crate::store::{LeaseAccess, Recipient};
use mayfly_protocol::lease::{Event, Lease};

/// The result of the two publishes and the answer.
#[derive(Debug)]
pub(super) enum End {
    /// The account exists, and its end is parked.
    Made(Created, EngineName),
    /// Certainly no account exists: the create was not sent, or failed before anything was made.
    Nothing(ApiError),
    /// The engine had no free connection slot. The flag shows whether it certainly made nothing. The create can be
    /// sent again, because an account is made only once for its lease.
    Full(ApiError, bool),
    /// An account may exist.
    Unknown(ApiError),
}

impl End {
    /// The event of the lease, what the account lacks, and the caller's error if there is no credential.
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

    /// The result after several tries. It is [`End::Nothing`] only if none of the tries can have made an account.
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

/// The result according to an engine's answer.
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

/// The sent create, if both publishes are confirmed. Otherwise the result of the read.
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

/// Parks the end, and sends the create to the engines.
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
        // A possible cause: somebody has deleted the exchange through which ends are parked.
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
    let mut pauses = SlotPause::default();
    let mut all_made_nothing = true;
    // Another engine may have a free connection slot, or this engine may have one later. If an account was made in
    // spite of the error, it is found by its lease.
    while let End::Full(_, made_nothing) = &end
        && let Some(pause) = pauses.next(left(app, lease))
    {
        all_made_nothing &= made_nothing;
        tokio::time::sleep(pause).await;
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

/// Sends a create. It reaches the broker within the publish limit or not at all. [`Lease::settles_at`] relies on
/// that.
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
        Err(_) => Err(BrokerError::Unconfirmed(
            "no publisher confirm in time".to_owned(),
        )),
    }
}

async fn answer(app: &App, lease: &Lease, sent: Sent<Create>) -> End {
    end_of(sent.answer(app, left(app, lease)).await)
}

/// The time for which the caller still waits.
fn left(app: &App, lease: &Lease) -> Duration {
    let left = lease.create_deadline.duration_since(app.now());
    left.max(SignedDuration::ZERO).unsigned_abs()
}

/// Records what the result of a create shows about its server: its clock, and the admin's password.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::{at, engine};
    use mayfly_protocol::task::{Failure, FailureCode};

    fn error() -> ApiError {
        ApiError::new(Code::StatementFailed, "x")
    }

    /// One word for an end; for `full` also whether the engine certainly made nothing.
    fn word(end: &End) -> &'static str {
        match end {
            End::Made(..) => "made",
            End::Nothing(_) => "nothing",
            End::Full(_, true) => "full, nothing made",
            End::Full(_, false) => "full",
            End::Unknown(_) => "unknown",
        }
    }

    fn answered(result: Result<Created, Failure>) -> Result<Answered<Created>, ApiError> {
        Ok(Answered {
            engine: engine(),
            result,
        })
    }

    #[test]
    fn an_answer_says_whether_there_may_be_an_account() {
        let failed = |full, nothing_made| {
            let failure = Failure::new(FailureCode::StatementFailed, "x");
            answered(Err(Failure {
                full,
                nothing_made,
                ..failure
            }))
        };
        let created = Created {
            expiration: at(60),
            server: "here".to_owned(),
            warnings: vec![],
        };
        for (answer, expected) in [
            (answered(Ok(created)), "made"),
            (failed(false, false), "unknown"),
            (failed(false, true), "nothing"),
            (failed(true, false), "full"),
            (failed(true, true), "full, nothing made"),
            // There is no answer: an engine may still work on the create.
            (Err(error()), "unknown"),
        ] {
            assert_eq!(word(&end_of(answer)), expected);
        }
    }

    #[test]
    fn only_a_create_that_was_not_sent_certainly_made_nothing() {
        let unconfirmed = || BrokerError::Unconfirmed("x".to_owned());
        for (parked, sent, expected) in [
            (Ok(()), Ok(()), "sent"),
            (Ok(()), Err(BrokerError::Down), "nothing"),
            (Ok(()), Err(BrokerError::Unroutable), "nothing"),
            (Err(BrokerError::Down), Err(BrokerError::Down), "nothing"),
            (Ok(()), Err(unconfirmed()), "unknown"),
            // An account whose end is not parked must not be handed out.
            (Err(BrokerError::Down), Ok(()), "unknown"),
            (Err(unconfirmed()), Ok(()), "unknown"),
        ] {
            let found = both(parked.clone(), sent.clone());
            let found = found.as_ref().map_or_else(word, |()| "sent");
            assert_eq!(found, expected, "{parked:?} {sent:?}");
        }
    }

    #[test]
    fn after_several_tries_nothing_is_certain_only_if_no_try_can_have_made_one() {
        for (end, all_made_nothing, expected) in [
            (End::Nothing(error()), true, "nothing"),
            (End::Nothing(error()), false, "unknown"),
            (End::Full(error(), true), true, "nothing"),
            (End::Full(error(), true), false, "unknown"),
            (End::Full(error(), false), true, "unknown"),
            (End::Unknown(error()), true, "unknown"),
        ] {
            assert_eq!(word(&end.after_tries(all_made_nothing)), expected);
        }
    }

    #[test]
    fn a_lease_settles_at_once_only_where_nothing_was_made() {
        let (event, _, error_of) = End::Nothing(error()).event();
        assert!(matches!(event, Event::NothingMade) && error_of.is_some());
        for end in [End::Unknown(error()), End::Full(error(), true)] {
            let (event, _, error_of) = end.event();
            assert!(matches!(event, Event::GivenUp) && error_of.is_some());
        }
        let created = Created {
            expiration: at(60),
            server: "here".to_owned(),
            warnings: vec!["w".to_owned()],
        };
        let (event, warnings, error_of) = End::Made(created, engine()).event();
        assert!(matches!(event, Event::Created(..)) && error_of.is_none());
        assert_eq!(warnings, ["w"]);
    }
}
