//! Reads of a secret whose last read came to nothing: the server is away, refuses the login, or a grant
//! is impossible. Before the next one anything is recorded or parked, an engine is asked whether an
//! account could be made now. So a thousand reads against a dead server leave no more than the first.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_common::names::SecretPath;
use mayfly_common::task::{Check, CheckWhat, Kind};

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::issue::Order;
use crate::requests::{self, Request};

/// After this a secret is read without a trial again.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Secrets remembered at a time; more are read without a trial.
const MOST: usize = 10_000;

/// Secrets whose last read came to nothing, and when.
#[derive(Default)]
pub(crate) struct Trials(Mutex<HashMap<SecretPath, Instant>>);

impl Trials {
    fn failed(&self) -> MutexGuard<'_, HashMap<SecretPath, Instant>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_wanted(&self, path: &SecretPath) -> bool {
        let failed = self.failed();
        failed.get(path).is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    fn remember(&self, path: &SecretPath, came_to_nothing: bool) {
        let mut failed = self.failed();
        if !came_to_nothing {
            failed.remove(path);
            return;
        }
        if failed.len() >= MOST {
            failed.retain(|_, at| at.elapsed() < REMEMBERED);
        }
        if failed.len() < MOST {
            failed.insert(path.clone(), Instant::now());
        }
    }
}

/// Remembers what a read has come to.
pub(crate) fn after(app: &App, order: &Order, came_to_nothing: bool) {
    app.trials.remember(&order.record.path, came_to_nothing);
}

/// Tries a secret whose last read came to nothing.
///
/// # Errors
/// What a create would fail with, now. An engine that does not understand the question, or does not
/// answer it, does not stop the read.
pub(crate) async fn before(app: &App, order: &Order) -> Result<(), ApiError> {
    if !app.trials.is_wanted(&order.record.path) {
        return Ok(());
    }
    let target = &order.base.target;
    let database = order.dynamic.database.as_ref();
    let body = Check {
        installation: app.identity.installation,
        target: target.clone(),
        what: CheckWhat::Ready {
            database: database.unwrap_or(&target.database).clone(),
            grants: order.dynamic.grants.clone(),
        },
    };
    let request = Request {
        kind: Kind::Check,
        lease: None,
        traceparent: &order.trace.to_string(),
        body: &body,
        patience: app.limits.create_deadline,
    };
    match requests::ask(app, &order.base.pool, request).await {
        Ok(_) => {
            app.trials.remember(&order.record.path, false);
            Ok(())
        }
        Err(error) => match error.code {
            Code::DatabaseUnreachable
            | Code::DatabaseRefusedLogin
            | Code::NoSuchObject
            | Code::AmbiguousObject
            | Code::GrantRefused
            | Code::AdminLacksRights
            | Code::StatementFailed => {
                app.trials.remember(&order.record.path, true);
                Err(error)
            }
            _ => Ok(()),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_tried_while_its_last_read_came_to_nothing() {
        let trials = Trials::default();
        let (one, other) = ("db:one".parse().unwrap(), "db:other".parse().unwrap());
        assert!(!trials.is_wanted(&one));
        trials.remember(&one, true);
        assert!(trials.is_wanted(&one) && !trials.is_wanted(&other));
        trials.remember(&one, false);
        assert!(!trials.is_wanted(&one));
    }
}
