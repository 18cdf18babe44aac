//! The life of a lease as one function. From a state and an event it decides the next state and what has to be sent.
//! Each event has a method, which handles every state.

use std::time::Duration;

use jiff::Timestamp;

use super::{Change, Event, Lease, State, Status, ToSend, earlier, later, moved};
use crate::names::EngineName;
use crate::task::{Created, Failure, FailureCode};
use crate::timing::timing;

/// A revocation is tried at once with this many credential candidates, one after another. The reconciler makes the
/// later tries.
const TURNS_AT_ONCE: u32 = 3;
/// A revocation that has failed this many times is shown as stuck.
const STUCK_ATTEMPTS: u32 = 3;

/// The status of `lease` after `event` at `now` (the dispatcher's clock), and the messages to send.
pub fn next(lease: &Lease, event: Event, now: Timestamp) -> Change {
    let mut turn = Turn {
        lease,
        now,
        status: lease.status.clone(),
        send: ToSend::Nothing,
    };
    match event {
        Event::Created(created, engine) => turn.created(&created, engine),
        Event::NothingMade => turn.nothing_made(),
        Event::GivenUp => turn.given_up(),
        Event::MaybeHeld => turn.maybe_held(),
        Event::Renewed(until) => turn.renewed(until),
        Event::RevokeAsked => turn.revoke_asked(),
        Event::RetryAsked => turn.retry_asked(),
        Event::Detached { by } => turn.detached(&by),
        Event::Gone {
            at,
            server,
            by,
            conclusive,
            seen,
        } => {
            let is_final = conclusive && now >= lease.settles_at() && seen >= lease.settles_at();
            turn.gone(at, &server, by, is_final);
        }
        // The outcome of that revocation is reported.
        Event::Found => {}
        Event::NotDue { until, left } => turn.not_due(until, left),
        Event::Failing {
            failure,
            attempts,
            again,
        } => turn.failing(failure, attempts, again),
    }
    Change {
        status: turn.status,
        send: turn.send,
    }
}

/// A lease while an event is applied to it.
struct Turn<'a> {
    lease: &'a Lease,
    now: Timestamp,
    status: Status,
    send: ToSend,
}

impl Turn<'_> {
    fn created(&mut self, created: &Created, engine: EngineName) {
        let (status, lease) = (&mut self.status, self.lease);
        match status.state {
            State::Pending => {
                status.state = State::Active;
                status.expiration = Some(moved(created.expiration, 0));
                status.made(created, engine, lease);
                let begun = earlier(created.expiration, Duration::from_secs(lease.ttl_seconds));
                status.skew_ms = begun.as_millisecond() - self.now.as_millisecond();
                status.look_after(created.expiration);
            }
            State::Active => status.made(created, engine, lease),
            // The answer is too late: no caller has got this account or will get it.
            State::Revoking => {
                status.made(created, engine, lease);
                // An engine may have looked for the account before it was made.
                status.revoked_at = None;
                status.revoked_by = None;
                self.send = ToSend::RevokeNow;
            }
            State::Revoked | State::Failed => self.send = ToSend::RevokeNow,
        }
    }

    fn nothing_made(&mut self) {
        match self.status.state {
            State::Pending => self.status.settle(),
            State::Active | State::Revoking | State::Revoked | State::Failed => {}
        }
    }

    fn given_up(&mut self) {
        match self.status.state {
            State::Pending => self.revoke(),
            State::Active | State::Revoking | State::Revoked | State::Failed => {}
        }
    }

    fn maybe_held(&mut self) {
        match self.status.state {
            State::Pending => {
                let life = Duration::from_secs(self.lease.ttl_seconds);
                self.status.state = State::Active;
                self.status.expiration = Some(later(self.lease.create_deadline, life));
                self.status.look_again(self.now);
            }
            State::Active | State::Revoking | State::Revoked | State::Failed => {}
        }
    }

    fn renewed(&mut self, until: Timestamp) {
        match self.status.state {
            State::Active => self.lives_until(moved(until, 0), self.status.expiration),
            // The lease was revoked meanwhile. A `now` was sent, which does not depend on the end.
            State::Pending | State::Revoking | State::Revoked | State::Failed => {}
        }
    }

    fn revoke_asked(&mut self) {
        match self.status.state {
            State::Pending | State::Active => self.revoke(),
            // A revocation is parked already, or the reconciler sends one.
            State::Revoking => self.send = ToSend::Copy,
            State::Revoked | State::Failed => {}
        }
    }

    fn retry_asked(&mut self) {
        let (status, now) = (&mut self.status, self.now);
        match status.state {
            State::Active | State::Revoking => {
                let is_in_progress = status.next_try.is_some_and(|at| {
                    at <= now && now.duration_since(at).unsigned_abs() < timing().retry_pause
                });
                if !is_in_progress {
                    status.look_again(later(now, timing().reconcile_grace));
                    status.next_try = Some(now);
                    self.send = ToSend::Retry;
                }
            }
            State::Pending | State::Revoked | State::Failed => {}
        }
    }

    fn detached(&mut self, by: &str) {
        match self.status.state {
            State::Pending | State::Active | State::Revoking => {
                if self.status.revoked_at.is_none() {
                    self.status.last_error =
                        Some(format!("detached by {by}: the account may still exist"));
                }
                self.status.settle();
            }
            State::Revoked | State::Failed => {}
        }
    }

    /// `is_final`: the create can no longer commit, and could not when the engine looked.
    fn gone(&mut self, at: Timestamp, server: &str, by: EngineName, is_final: bool) {
        let is_elsewhere = self
            .status
            .server
            .as_ref()
            .is_some_and(|known| known != server);
        match self.status.state {
            // With a short TTL the revocation may be done before the create. The absence of the account proves
            // nothing yet.
            State::Pending if !is_final => {}
            // The engine looked before the account was made, and the report arrived later. The account lives.
            State::Active if !is_final && self.status.expiration.is_none_or(|end| at < end) => {
                // The account may still be gone. A look after the window shows it.
                let again = self.after_the_window();
                if self.status.next_reconcile.is_none_or(|next| again < next) {
                    self.status.look_again(again);
                }
            }
            State::Pending | State::Active | State::Revoking if is_elsewhere => {
                self.absent_elsewhere();
            }
            State::Pending | State::Active | State::Revoking => self.ended(at, by, is_final),
            // The account was not made again.
            State::Revoked | State::Failed => {
                if is_final && !is_elsewhere {
                    self.status.next_reconcile = None;
                }
            }
        }
    }

    fn not_due(&mut self, until: Timestamp, left: Option<Duration>) {
        match self.status.state {
            State::Active => {
                if let Some(left) = left {
                    let there = earlier(until, left).as_millisecond();
                    self.status.skew_ms = there - self.now.as_millisecond();
                }
                // An answer from before a renewal must not move the end back.
                let known = self.status.expiration;
                let known = known.filter(|_| self.status.engine.is_some());
                self.lives_until(moved(until, 0), known);
            }
            State::Pending | State::Revoking => {}
            // No caller has a right to this account.
            State::Revoked | State::Failed => self.send = ToSend::RevokeNow,
        }
    }

    fn failing(&mut self, failure: Failure, attempts: u32, again: Option<Duration>) {
        match self.status.state {
            State::Active | State::Revoking => {}
            State::Pending | State::Revoked | State::Failed => return,
        }
        let status = &mut self.status;
        if may_work_otherwise(failure.code) && status.attempts < TURNS_AT_ONCE {
            self.send = ToSend::OtherCredentials;
        }
        status.attempts = status.attempts.saturating_add(1).max(attempts);
        let is_hopeless = matches!(
            failure.code,
            FailureCode::OtherServer | FailureCode::ForeignRole
        );
        status.stuck = is_hopeless || status.attempts >= STUCK_ATTEMPTS;
        status.last_error = Some(explained(self.lease, &failure));
        status.objects = failure.objects;
        let again = again.map(|wait| later(self.now, wait));
        status.next_try = again.or(status.next_try);
    }

    fn revoke(&mut self) {
        self.status.state = State::Revoking;
        let again = later(self.now, timing().reconcile_grace);
        self.status.look_again(again);
        self.send = ToSend::RevokeNow;
    }

    /// The account lives until then, or until its known end if that is later.
    fn lives_until(&mut self, until: Timestamp, known: Option<Timestamp>) {
        let end = known.map_or(until, |known| known.max(until));
        self.status.expiration = Some(end);
        self.status.clear_failure();
        self.status.look_after(end);
    }

    /// The account is absent, but not on the server on which it was made.
    fn absent_elsewhere(&mut self) {
        let status = &mut self.status;
        status.attempts = status.attempts.saturating_add(1);
        status.last_error = Some(other_server(
            self.lease,
            "another server answers now than the one on which the account was made",
        ));
        status.stuck = true;
        if status.attempts <= TURNS_AT_ONCE {
            self.send = ToSend::OtherCredentials;
        }
    }

    fn ended(&mut self, at: Timestamp, by: EngineName, is_final: bool) {
        let again = self.after_the_window();
        let status = &mut self.status;
        status.next_try = None;
        status.revoked_at.get_or_insert(at);
        status.revoked_by.get_or_insert(by);
        if is_final {
            status.settle();
        } else if status.state == State::Revoking {
            status.stuck = false;
            status.look_again(again);
        } else {
            // Nobody holds this credential. A create that is delivered twice may make the account again, so the
            // reconciler looks once more.
            status.settle();
            status.look_again(again);
        }
    }

    /// Shortly after the create can no longer commit.
    fn after_the_window(&self) -> Timestamp {
        let settled = self.now.max(self.lease.settles_at());
        later(settled, timing().reconcile_grace)
    }
}

/// The failure for an operator, with what helps.
fn explained(lease: &Lease, failure: &Failure) -> String {
    let (code, message) = (failure.code.as_str(), &failure.message);
    match failure.code {
        FailureCode::OtherServer => other_server(lease, message),
        FailureCode::AdminLacksRights => format!(
            "{code}: {message}. `mayfly secret check` of its base secret prints the statements that help"
        ),
        _ => format!("{code}: {message}"),
    }
}

/// What an operator can do if another server answers than the server on which the account was made.
fn other_server(lease: &Lease, what: &str) -> String {
    format!(
        "{}: {what}. If it is the same server, moved, upgraded or restored, run `mayfly secret update PATH --same-server` for its base secret. If that server is gone for good, give the account up with `mayfly lease revoke {} --detach`",
        FailureCode::OtherServer.as_str(),
        lease.id
    )
}

/// Whether a revocation with this failure may succeed with another credential candidate.
pub fn may_work_otherwise(code: FailureCode) -> bool {
    matches!(
        code,
        FailureCode::DatabaseRefusedLogin
            | FailureCode::DatabaseUnreachable
            | FailureCode::AdminLacksRights
            | FailureCode::OtherServer
            | FailureCode::ForeignRole
            | FailureCode::NotUnderstood
    )
}
