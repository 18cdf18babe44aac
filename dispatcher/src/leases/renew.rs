//! Renews a lease: moves its end in the database, which decides, and then in the store. No other message is sent: the
//! parked revocation finds the new end.

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use mayfly_common::fault;
use mayfly_protocol::task::{GrantsOf, Renew, Renewed};
use tracing::info;

use crate::app::App;
use crate::engines::call;
use crate::error::{ApiError, Code, Problems};
use crate::leases::trace_of;
use crate::store::shown;
use mayfly_protocol::lease::{Event, Lease, State};

/// How many times a renewal begins again because another renewal has moved the end meanwhile.
const MOVED_MOST: u32 = 5;

/// Moves a lease's end to `increment_seconds` from now. A second run of the same request also succeeds:
/// nothing moves back.
///
/// # Errors
/// `in_use` for a lease that is not active or is past its end, `invalid` beyond its maximum, and
/// those of [`call::call`]. After `deadline` it may have been done.
pub(crate) async fn renew(
    app: &App,
    lease: Lease,
    increment_seconds: u64,
) -> Result<Lease, ApiError> {
    let pool = lease.pool.clone();
    let renewed = move_end(app, lease, increment_seconds).await;
    let error = renewed.as_ref().err().map(|error| error.code);
    app.metrics.renewed(&pool, error);
    renewed
}

async fn move_end(app: &App, lease: Lease, increment_seconds: u64) -> Result<Lease, ApiError> {
    may_begin(&lease, increment_seconds, app.now())?;
    let of = grants_of(app, &lease).await;
    let mut tries = Tries::default();
    let mut from = lease.status.expiration;
    let begun = Instant::now();
    loop {
        let pool = app.store.pool(lease.pool.clone()).await?;
        pool.recipient()?;
        let kept = app.store.lease_access(lease.id, tries.turn).await?;
        let access =
            kept.ok_or_else(|| ApiError::not_found("base secret of this lease any more"))?;
        let place = Some(access.place());
        let renew = Renew {
            lease: lease.id,
            installation: app.identity.installation,
            target: access.target,
            server: access.server,
            place,
            role: lease.role.clone(),
            increment_seconds,
            not_after: lease.renewable_until(),
            from,
            of: of.clone(),
        };
        // All credential candidates share this limit.
        let patience = app.limits.create_deadline.saturating_sub(begun.elapsed());
        let answer = call::call(app, &pool, &renew, &lease.traceparent, patience).await;
        match tries.step(answer, access.candidates) {
            Step::Done(until) => {
                fault::point("renew", "answered").await;
                let applied = apply(app, &lease, until).await?;
                info!(lease = %lease.id, trace = trace_of(&lease), expiration = %until, "renewed");
                return Ok(applied);
            }
            Step::AgainFrom(until) => {
                from = Some(until);
                apply(app, &lease, until).await?;
            }
            Step::NextCandidate => {}
            Step::Beyond => return Err(beyond(&lease, app.now())),
            Step::Refused(error) => return Err(error),
        }
    }
}

/// Records the end that an engine reported.
async fn apply(app: &App, lease: &Lease, until: Timestamp) -> Result<Lease, ApiError> {
    let event = Event::Renewed(until);
    let applied = app.store.apply(lease.id, event, app.now()).await?.lease;
    ensure_active(&applied)?;
    Ok(applied)
}

/// The grants that the lease's secret has now, if it still exists. Accounts from before a change of the grants are
/// members of another grant role, which the engine leaves alone.
async fn grants_of(app: &App, lease: &Lease) -> Option<GrantsOf> {
    let reading = app.store.read_secret(lease.path.clone()).await.ok()?;
    let dynamic = reading.record.dynamic().ok()?;
    Some(dynamic.grants_at(&reading.base?.target.database))
}

/// Whether an engine is asked. It decides by the database's clock; this saves a request that must fail.
fn may_begin(lease: &Lease, increment_seconds: u64, now: Timestamp) -> Result<(), ApiError> {
    ensure_active(lease)?;
    match increment_seconds > lease.max_ttl_seconds {
        true => Err(beyond(lease, now)),
        false => Ok(()),
    }
}

/// What a renewal does after an engine's answer.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The end was moved to this timestamp.
    Done(Timestamp),
    /// The end had been moved to this timestamp before: by a renewal whose answer was lost, or by another at the
    /// same time. The request is sent again from there.
    AgainFrom(Timestamp),
    /// The base secret has changed since: the next credential candidate is tried.
    NextCandidate,
    /// The engine refuses an end beyond the lease's maximum.
    Beyond,
    Refused(ApiError),
}

/// The tries of one renewal.
#[derive(Debug, Default)]
struct Tries {
    /// The credential candidate of the present try.
    turn: u32,
    /// How many times another renewal has moved the end.
    moved: u32,
}

impl Tries {
    /// The step after an answer, if there are this many credential candidates.
    fn step(&mut self, answer: Result<Renewed, ApiError>, candidates: u32) -> Step {
        match answer {
            Ok(Renewed::Until(until)) => Step::Done(until),
            Ok(Renewed::Moved(until)) if self.moved < MOVED_MOST => {
                self.moved += 1;
                Step::AgainFrom(until)
            }
            Ok(Renewed::Moved(_)) => Step::Refused(ApiError::new(
                Code::InUse,
                "other renewals moved the end of this lease 5 times meanwhile; try again",
            )),
            Err(error) if error.code == Code::Invalid => Step::Beyond,
            Err(error) if self.turn + 1 < candidates && is_of_the_candidate(&error) => {
                self.turn += 1;
                Step::NextCandidate
            }
            Err(error) => Step::Refused(error),
        }
    }
}

fn is_of_the_candidate(error: &ApiError) -> bool {
    matches!(
        error.code,
        Code::DatabaseUnreachable
            | Code::DatabaseRefusedLogin
            | Code::AdminLacksRights
            // Another server answers at that address.
            | Code::StatementFailed
    )
}

fn ensure_active(lease: &Lease) -> Result<(), ApiError> {
    if lease.status.state == State::Active {
        return Ok(());
    }
    let what = match shown::state(&lease.status) {
        State::Pending => "its account is still being made",
        State::Revoking => "it is being revoked",
        State::Active | State::Revoked | State::Failed => "it has ended",
    };
    let reason = format!("the lease cannot be renewed: {what}");
    Err(ApiError::new(Code::InUse, reason))
}

/// Refused, never cut: names what can be reached.
fn beyond(lease: &Lease, now: Timestamp) -> ApiError {
    let end = lease.renewable_until();
    let left = lease.status.to_store_clock(end).duration_since(now);
    let left = left.max(SignedDuration::ZERO);
    let reason = format!(
        "exceeds the lease's maximum (maxTtl), {end:.0}: at most about {} s from now",
        left.as_secs()
    );
    ApiError::invalid(Problems::from([("increment".to_owned(), vec![reason])]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::{at, lease};

    fn failed(code: Code) -> Result<Renewed, ApiError> {
        Err(ApiError::new(code, "x"))
    }

    #[test]
    fn only_an_active_lease_is_renewed_within_its_maximum() {
        // The lease's maximum is 600 s.
        let in_use = |what: &str| Err((Code::InUse, what.to_owned()));
        for (state, is_gone, increment, expected) in [
            (State::Active, false, 1, Ok(())),
            (State::Active, false, 600, Ok(())),
            (
                State::Active,
                false,
                601,
                Err((Code::Invalid, "increment".to_owned())),
            ),
            (State::Pending, false, 1, in_use("still being made")),
            (State::Revoking, false, 1, in_use("being revoked")),
            // The account is gone, and is looked for once more.
            (State::Revoking, true, 1, in_use("has ended")),
            (State::Revoked, true, 1, in_use("has ended")),
            (State::Failed, false, 1, in_use("has ended")),
            // The state is checked first.
            (State::Revoked, true, 601, in_use("has ended")),
        ] {
            let mut lease = lease(state);
            lease.status.revoked_at = is_gone.then(|| at(50));
            let found = may_begin(&lease, increment, at(10));
            match (&found, expected) {
                (Ok(()), Ok(())) => {}
                (Err(error), Err((code, words))) if error.code == code => {
                    assert!(error.message.contains(&words), "{error:?}");
                }
                (_, expected) => panic!("{state:?} {increment}: {found:?}, not {expected:?}"),
            }
        }
    }

    /// The message names the time that is left by the caller's clock, not by the database's.
    #[test]
    fn what_can_be_reached_is_named() {
        let mut lease = lease(State::Active);
        lease.status.renewable_until = Some(at(600));
        for (skew_ms, second, expected) in [
            (0, 100, "about 500 s from now"),
            // The database's clock is 60 s ahead.
            (60_000, 100, "about 440 s from now"),
            (-60_000, 100, "about 560 s from now"),
            (0, 600, "about 0 s from now"),
            (0, 700, "about 0 s from now"),
        ] {
            lease.status.skew_ms = skew_ms;
            let error = beyond(&lease, at(second));
            let reason = &error.errors["increment"][0];
            assert!(reason.ends_with(expected), "{skew_ms} {second}: {reason}");
            assert!(reason.contains(&format!("{:.0}", at(600))), "{reason}");
        }
    }

    #[test]
    fn other_renewals_may_move_the_end_five_times() {
        let mut tries = Tries::default();
        for n in 1..=5 {
            let step = tries.step(Ok(Renewed::Moved(at(n))), 1);
            assert_eq!(step, Step::AgainFrom(at(n)));
        }
        let sixth = tries.step(Ok(Renewed::Moved(at(6))), 1);
        assert!(
            matches!(&sixth, Step::Refused(error) if error.code == Code::InUse),
            "{sixth:?}"
        );
        assert_eq!(tries.step(Ok(Renewed::Until(at(7))), 1), Step::Done(at(7)));
    }

    #[test]
    fn each_candidate_is_tried_once() {
        let mut tries = Tries::default();
        let refused = || failed(Code::DatabaseRefusedLogin);
        assert_eq!(tries.step(refused(), 3), Step::NextCandidate);
        // A move by another renewal leaves the candidate as it is.
        assert_eq!(
            tries.step(Ok(Renewed::Moved(at(1))), 3),
            Step::AgainFrom(at(1))
        );
        assert_eq!((tries.turn, tries.moved), (1, 1));
        assert_eq!(tries.step(refused(), 3), Step::NextCandidate);
        assert_eq!(tries.turn, 2);
        assert!(
            matches!(tries.step(refused(), 3), Step::Refused(_)),
            "the third was the last"
        );
    }

    #[test]
    fn another_candidate_helps_only_against_failures_of_its_server_and_login() {
        for code in Code::ALL {
            let step = Tries::default().step(failed(code), 2);
            let expected = match code {
                Code::DatabaseUnreachable
                | Code::DatabaseRefusedLogin
                | Code::AdminLacksRights
                | Code::StatementFailed => Step::NextCandidate,
                Code::Invalid => Step::Beyond,
                // The account has ended, no engine can be asked, or the time is over. The end may have been moved.
                _ => Step::Refused(ApiError::new(code, "x")),
            };
            assert_eq!(step, expected, "{code:?}");
        }
    }
}
