//! Decides what to do about a role that an engine reports on a server. The report or the role's comment may be a lie.
//! For a lease in the store only the store's role, server and end count, and a report causes at most a look by the
//! lease's own pool.

use std::time::Duration;

use jiff::Timestamp;
use mayfly_protocol::names::{InstallationId, PoolName};
use mayfly_protocol::task::LedgerRole;

use mayfly_protocol::lease::{Lease, State};

/// Roles of another installation are ended only after this multiple of the grace, because that installation may only
/// be slow. A role that owns anything is left to that installation, or to a person.
const OTHER_INSTALLATION_GRACES: u32 = 5;

/// The engine that answered, and the time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) installation: InstallationId,
    /// The pool whose engine answered.
    pub(crate) pool: &'a PoolName,
    /// Id of the base secret it used.
    pub(crate) base: &'a str,
    /// The server's clock, by the answer.
    pub(crate) there: Timestamp,
    pub(crate) here: Timestamp,
    /// Ordinary messages end accounts that are overdue by less than this.
    pub(crate) grace: Duration,
    /// An account of another installation, or of an unknown lease, is overdue only after this.
    pub(crate) others_grace: Duration,
}

/// What is done about a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Nothing,
    /// The usual revocation of its lease is sent again: to the lease's own pool, with the values in the store.
    Look,
    /// The pool that found the role ends it, at the role's own `VALID UNTIL`. The store has no such lease, so no
    /// report about it counts.
    End,
}

/// Whether a report of this pool about this lease counts, through this base secret.
pub(crate) fn owns(asked: &Asked<'_>, lease: &Lease) -> bool {
    lease.pool == *asked.pool && lease.base.id == asked.base
}

/// Decides about a role. `known` is the lease that its comment names, if the store has it.
pub(crate) fn judge(role: &LedgerRole, known: Option<&Lease>, asked: &Asked<'_>) -> Act {
    let own = role.installation == asked.installation;
    let Some(lease) = known else {
        let grace = match own {
            true => asked.grace,
            false => asked.others_grace.saturating_mul(OTHER_INSTALLATION_GRACES),
        };
        let is_left_alone = !own && role.owns;
        return match is_over(role.expiration, asked.there, grace) && !is_left_alone {
            true => Act::End,
            false => Act::Nothing,
        };
    };
    // A person who may write comments can name a lease of this store in the comment of another role.
    if !own || role.role != lease.role {
        return Act::Nothing;
    }
    let status = &lease.status;
    let is_known_over = match status.state {
        // The account is due at any time, because it must not exist.
        State::Failed => true,
        // A detached account is left to its end.
        State::Revoked => {
            status.revoked_at.is_some() || is_over(role.expiration, asked.there, asked.grace)
        }
        // The account's end was reported, but the account exists again. Without a report the end is still in
        // progress.
        State::Revoking => status.revoked_at.is_some(),
        State::Pending | State::Active => {
            let end = status.expiration.map(|end| status.to_store_clock(end));
            is_over(end, asked.here, asked.grace)
        }
    };
    let is_said_over = owns(asked, lease) && is_over(role.expiration, asked.there, asked.grace);
    match is_known_over || is_said_over {
        true => Act::Look,
        false => Act::Nothing,
    }
}

fn is_over(end: Option<Timestamp>, now: Timestamp, grace: Duration) -> bool {
    end.is_some_and(|end| {
        let late = now.duration_since(end);
        !late.is_negative() && late.unsigned_abs() >= grace
    })
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
