//! Changes an admin's own password, in this order:
//!
//! 1. An engine tries a login, so that a change that cannot work is refused early.
//! 2. The new password is recorded next to the old one and committed.
//! 3. An engine changes the password.
//! 4. The result of a login with the new password is recorded.
//!
//! If this ends early, the record stays, and engines are asked which password is in force until one of them knows.
//!
//! "The old one" is final only when no request can change it any more. [`mayfly_protocol::timing`] and the
//! database's own clock, which limits the statement, decide this. "The new one" is final only when a login with it
//! is reported in answer to a question that was asked after the change. In both cases the other password is kept
//! until a lease was made with the one in force. It is tried again if a login is refused before that, see
//! [`crate::store::Doubt`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use mayfly_common::fault;
use mayfly_protocol::names::{SecretPath, random_text};
use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::Target;
use mayfly_protocol::task::{Failure, FailureCode, Kind, Rotate, Rotated};
use mayfly_protocol::timing::timing;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::app::App;
use crate::engines::call;
use crate::error::{ApiError, Code};
use crate::servers::pool::pool_of;
use crate::store::{Base, Doubt, Opening, Pool, Record, Rotation};

/// Pause between two looks at changes in progress.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// One in this number of looks without a result is logged.
const LOG_EVERY: u32 = 20;
/// Length of a password of letters and digits. SASLprep does not change them, and no tool has to quote them.
const PASSWORD_LENGTH: usize = 40;

/// Changes the password of a base secret's admin. The work continues if the caller leaves.
///
/// # Errors
/// The errors of the API. If the message does not state that the password is unchanged, it may have changed.
pub(crate) async fn rotate(
    app: &Arc<App>,
    path: SecretPath,
    who: String,
) -> Result<Record, ApiError> {
    let working = app.clone();
    let rotation = app
        .issues
        .spawn(async move { run(&working, path, who).await });
    let stopping = || ApiError::new(Code::StoreUnavailable, "the dispatcher is stopping");
    rotation.await.map_err(|_| stopping())?
}

async fn run(app: &App, path: SecretPath, who: String) -> Result<Record, ApiError> {
    let base = app.store.base(path.clone()).await?;
    // A pool that no secret names any more must not get the new password.
    let base = Base { last: None, ..base };
    let pool = pool_of(app, &base).await?.clone();
    let password = Secret::new(random_text(PASSWORD_LENGTH));
    may_begin(call(app, &pool, &base.target, &password, None).await?)?;

    let there = call::look_at_server(app, &pool, &base.target).await?;
    let started = app.now();
    let Limits {
        not_after,
        over_there,
        settles_at,
    } = Limits::of(there.now, started);
    // The request reaches the broker by this time or never: `settles_at` relies on it.
    let sent_until = tokio::time::Instant::now() + timing().rotation_answer;
    let opening = Opening {
        path: path.clone(),
        version: base.record.version,
        password: password.clone(),
        pool: pool.name.clone(),
        who,
        started,
        settles_at,
        over_there,
    };
    app.store.open_rotation(opening).await?;
    fault::point("rotate", "journaled").await;
    let changing = call(app, &pool, &base.target, &password, Some(not_after));
    let late = || ApiError::new(Code::Deadline, "no engine answered in time");
    let answer = match tokio::time::timeout_at(sent_until, changing).await {
        Ok(answer) => answer,
        Err(_) => Err(late()),
    };
    fault::point("rotate", "answered").await;
    if let Ok(Rotated::Unchanged(failure)) = answer {
        warn!(%path, code = failure.code.as_str(), reason = failure.message, "the admin's password is unchanged");
        let mut error = ApiError::from(failure);
        error.message = format!("the password is unchanged: {}", error.message);
        return Err(error);
    }
    is_in_force(answer).map_err(open_end)?;
    // This request has a name of its own, so no earlier answer can match it.
    let looked = call(app, &pool, &base.target, &password, None).await;
    is_in_force(looked).map_err(open_end)?;
    commit(app, &path, settles_at).await
}

/// Whether a login shows, before the change, that the present password and no other is accepted.
///
/// # Errors
/// Nothing is changed.
fn may_begin(looked: Rotated) -> Result<(), Failure> {
    match looked {
        Rotated::Unchanged(_) => Ok(()),
        Rotated::Trusted(failure) | Rotated::Unknown(failure) => Err(failure),
        Rotated::Changed { .. } => Err(call::unexpected_answer(Kind::Rotate)),
    }
}

/// Whether an engine reports that the new password is in force.
///
/// # Errors
/// The engine says something else, or nothing.
fn is_in_force(answer: Result<Rotated, ApiError>) -> Result<(), ApiError> {
    match answer? {
        Rotated::Changed { .. } => Ok(()),
        Rotated::Unchanged(failure) | Rotated::Trusted(failure) | Rotated::Unknown(failure) => {
            Err(failure.into())
        }
    }
}

/// The limits of a change.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    /// From this time on the database itself refuses to begin the change, by its own clock. The engines' clocks do
    /// not matter.
    not_after: Timestamp,
    /// The change is committed by then or never, by the database's clock.
    over_there: Timestamp,
    /// No request of the change can have an effect any more, by this dispatcher's clock.
    settles_at: Timestamp,
}

impl Limits {
    /// The limits of a change that begins at these times of the database and of this dispatcher.
    fn of(there: Timestamp, here: Timestamp) -> Self {
        let timing = timing();
        let not_after = there + timing.rotation_answer + timing.create_budget;
        // The request may be sent until the end of the first wait, with a deadline at the end of another.
        let deadline = here + timing.rotation_answer + timing.rotation_answer;
        Self {
            not_after,
            over_there: not_after + timing.rotation_change,
            settles_at: deadline + timing.over_after(),
        }
    }
}

fn open_end(error: ApiError) -> ApiError {
    warn!(
        code = error.code.as_str(),
        reason = error.message,
        "an engine tests which password is in force"
    );
    let message = format!(
        "it is not known yet whether the password was changed; the dispatcher finds out, and uses the password that is in force: {}",
        error.message
    );
    ApiError { message, ..error }
}

/// Records that the new password is in force.
async fn commit(app: &App, path: &SecretPath, settles_at: Timestamp) -> Result<Record, ApiError> {
    let committed = app
        .store
        .commit_rotation(path.clone(), settles_at, app.now())
        .await?;
    fault::point("rotate", "recorded").await;
    app.reconcile.notify_one();
    match committed {
        Some(record) => {
            info!(%path, version = record.version, by = record.last_modified_by, "password rotated");
            Ok(record)
        }
        // The change was already recorded, by the loop below or by another dispatcher.
        None => Ok(app.store.describe_secret(path.clone()).await?),
    }
}

async fn call(
    app: &App,
    pool: &Pool,
    target: &Target,
    password: &Secret,
    change_until: Option<Timestamp>,
) -> Result<Rotated, ApiError> {
    let rotate = Rotate {
        target: target.clone(),
        password: password.clone(),
        change: change_until.is_some(),
        not_after: change_until,
    };
    call::call(app, pool, &rotate, "", timing().rotation_answer).await
}

/// Finds out the results of interrupted changes, the first time at once, until `stop`.
pub(crate) async fn recover(app: Arc<App>, stop: CancellationToken) {
    let mut looks: HashMap<String, u32> = HashMap::new();
    loop {
        match app.store.rotations().await {
            Ok(open) => {
                looks.retain(|secret, _| open.iter().any(|rotation| rotation.secret == *secret));
                for rotation in &open {
                    if let Err(error) = find_out(&app, rotation).await {
                        let looks = looks.entry(rotation.secret.clone()).or_default();
                        if looks.is_multiple_of(LOG_EVERY) {
                            warn!(path = %rotation.path, reason = error.message,
                                "which password is in force is not known yet");
                        }
                        *looks += 1;
                    }
                }
            }
            Err(error) => debug!(%error, "rotations wait for the store"),
        }
        match app.store.doubts().await {
            Ok(doubts) => {
                for doubt in &doubts {
                    if let Err(error) = look_again(&app, doubt).await {
                        debug!(path = %doubt.path, reason = error.message, "it cannot be tested yet which password is in force after a refused login; trying again");
                    }
                }
            }
            Err(error) => debug!(%error, "the test of refused passwords waits for the store"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// Tries the other password of an admin. A login with the stored one was refused, and no lease was made with it
/// since the last change.
async fn look_again(app: &App, doubt: &Doubt) -> Result<(), ApiError> {
    let base = app.store.base(doubt.path.clone()).await?;
    let pool = pool_of(app, &base).await?;
    let other = is_other_in_force(call(app, pool, &base.target, &doubt.password, None).await?)?;
    let version = base.record.version;
    let settled = app
        .store
        .settle_doubt(doubt.path.clone(), version, other, app.now())
        .await?;
    if let Some(record) = settled {
        app.reconcile.notify_one();
        warn!(path = %doubt.path, version = record.version, kept_since = %doubt.since,
            "the admin's other password is in force; it is used again");
    }
    Ok(())
}

/// Whether a look with the other password of an admin shows that it is in force.
///
/// # Errors
/// The look shows neither.
fn is_other_in_force(looked: Rotated) -> Result<bool, Failure> {
    match looked {
        Rotated::Changed { .. } => Ok(true),
        Rotated::Unchanged(_) | Rotated::Trusted(_) => Ok(false),
        // Neither password is in force. The next refused login causes another look.
        Rotated::Unknown(failure) if failure.code == FailureCode::DatabaseRefusedLogin => Ok(false),
        Rotated::Unknown(failure) => Err(failure),
    }
}

/// What is done about a change whose result is not known.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The new password is in force. It becomes the base secret's password.
    Commit,
    /// The change did not happen and cannot happen any more. Its record is deleted.
    Drop,
    /// The old password is in force, but the change may still happen.
    Wait,
    /// The look did not show which password is in force.
    Unknown(Failure),
}

/// Decides from the result of a look with the new password. `may_be_final`: no request can change the password any
/// more.
fn step(looked: Rotated, may_be_final: bool) -> Step {
    match looked {
        Rotated::Changed { .. } => Step::Commit,
        Rotated::Unchanged(_) if may_be_final => Step::Drop,
        Rotated::Unchanged(_) => Step::Wait,
        Rotated::Trusted(failure) | Rotated::Unknown(failure) => Step::Unknown(failure),
    }
}

/// Whether a change that was recorded with these limits can have no effect any more. `there`: the database's clock, if
/// it was seen.
fn is_over(
    over_there: Option<Timestamp>,
    settles_at: Timestamp,
    there: Option<Timestamp>,
    here: Timestamp,
) -> bool {
    let is_over_there = match (over_there, there) {
        (Some(over), Some(there)) => there > over,
        (Some(_), None) => false,
        // A dispatcher of an earlier version recorded the change.
        (None, _) => true,
    };
    is_over_there && here > settles_at
}

async fn find_out(app: &App, rotation: &Rotation) -> Result<(), ApiError> {
    let mut pool = None;
    for candidate in &rotation.pools {
        if app.broker.engines_of(&candidate.name).await.unwrap_or(0) > 0 {
            pool = Some(candidate);
            break;
        }
    }
    let none = || {
        ApiError::new(
            Code::NoEngine,
            "no engine that reaches the server is running",
        )
    };
    let pool = pool.ok_or_else(none)?;
    // The clock is read before the look. If the old password is not in force any more, the server cannot be asked
    // with it.
    let there = call::look_at_server(app, pool, &rotation.target).await;
    let there = there.ok().map(|there| there.now);
    let may_be_final = is_over(rotation.over_there, rotation.settles_at, there, app.now());
    let looked = call(app, pool, &rotation.target, &rotation.password, None).await?;
    match step(looked, may_be_final) {
        Step::Commit => commit(app, &rotation.path, rotation.settles_at)
            .await
            .map(drop),
        Step::Drop => {
            let (secret, settles_at) = (rotation.secret.clone(), rotation.settles_at);
            if app
                .store
                .drop_rotation(secret, settles_at, app.now())
                .await?
            {
                info!(path = %rotation.path, "the rotation did not happen; the password is unchanged");
            }
            Ok(())
        }
        Step::Wait => Ok(()),
        Step::Unknown(failure) => Err(failure.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::at;

    fn failure(code: FailureCode) -> Failure {
        Failure::new(code, "x")
    }

    fn changed() -> Rotated {
        Rotated::Changed {
            server: "s".to_owned(),
        }
    }

    #[test]
    fn the_old_password_counts_only_when_nothing_can_change_it_any_more() {
        let refused = || failure(FailureCode::DatabaseRefusedLogin);
        for (looked, may_be_final, expected) in [
            (changed(), false, Step::Commit),
            (changed(), true, Step::Commit),
            (Rotated::Unchanged(refused()), false, Step::Wait),
            (Rotated::Unchanged(refused()), true, Step::Drop),
            // A server that accepts any password shows nothing.
            (Rotated::Trusted(refused()), true, Step::Unknown(refused())),
            (Rotated::Unknown(refused()), true, Step::Unknown(refused())),
        ] {
            assert_eq!(step(looked, may_be_final), expected);
        }
    }

    #[test]
    fn a_change_is_over_by_both_clocks() {
        let settles_at = at(44);
        let at = |second| Some(at(second));
        for (over, there, here, expected) in [
            (at(10), at(10), 45, false),
            (at(10), at(11), 45, true),
            (at(10), at(11), 44, false),
            // The database's clock was not seen.
            (at(10), None, 45, false),
            (None, None, 45, true),
            (None, None, 44, false),
        ] {
            let here = mayfly_protocol::fixtures::at(here);
            let is_over = is_over(over, settles_at, there, here);
            assert_eq!(is_over, expected, "{over:?} {there:?} {here}");
        }
    }

    /// The database's clock is 1000 s ahead of the dispatcher's.
    #[test]
    fn the_limits_leave_time_for_the_last_request() {
        let limits = Limits::of(at(1000), at(0));
        // The request is sent within 10 s. The engine begins the change within its budget of 10 s.
        assert_eq!(limits.not_after, at(1020));
        // The statement that begins last is committed 6 s later.
        assert_eq!(limits.over_there, at(1026));
        // A request that is sent at 10 s has its deadline at 20 s. 24 s later an engine with any allowed clock
        // refuses it.
        assert_eq!(limits.settles_at, at(44));
    }

    #[test]
    fn a_change_begins_only_where_a_login_shows_which_password_is_in_force() {
        let refused = || failure(FailureCode::DatabaseRefusedLogin);
        assert_eq!(may_begin(Rotated::Unchanged(refused())), Ok(()));
        assert_eq!(may_begin(Rotated::Trusted(refused())), Err(refused()));
        assert_eq!(may_begin(Rotated::Unknown(refused())), Err(refused()));
        // The new password is random, and nobody has set it.
        assert!(may_begin(changed()).is_err());
    }

    #[test]
    fn only_a_login_shows_that_the_new_password_is_in_force() {
        let refused = || failure(FailureCode::DatabaseRefusedLogin);
        assert_eq!(is_in_force(Ok(changed())), Ok(()));
        for looked in [
            Rotated::Unchanged(refused()),
            Rotated::Trusted(refused()),
            Rotated::Unknown(refused()),
        ] {
            assert_eq!(is_in_force(Ok(looked)), Err(refused().into()));
        }
        let late = ApiError::new(Code::Deadline, "x");
        assert_eq!(is_in_force(Err(late.clone())), Err(late));
    }

    #[test]
    fn the_other_password_is_taken_only_where_a_login_with_it_succeeds() {
        let refused = || failure(FailureCode::DatabaseRefusedLogin);
        assert_eq!(is_other_in_force(changed()), Ok(true));
        assert_eq!(is_other_in_force(Rotated::Unchanged(refused())), Ok(false));
        assert_eq!(is_other_in_force(Rotated::Trusted(refused())), Ok(false));
        assert_eq!(is_other_in_force(Rotated::Unknown(refused())), Ok(false));
        let away = failure(FailureCode::DatabaseUnreachable);
        assert_eq!(is_other_in_force(Rotated::Unknown(away.clone())), Err(away));
    }
}
