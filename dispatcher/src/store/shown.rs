//! How a lease is shown. Callers see a lease as gone when its account is absent. They do not see that its
//! create could still commit and that the account is looked for once more.

use mayfly_protocol::lease::{State, Status};

/// The state in the API and the metrics. It differs from the lease's own state in one case: the lease is `revoking`,
/// its account was found gone, and its create may still commit. Such a lease is shown in the state that it will
/// have. If the account does appear, `revoked_at` is cleared, and the lease is shown as `revoking` again until that
/// account is gone.
pub(crate) fn state(status: &Status) -> State {
    match status.state {
        State::Revoking if status.revoked_at.is_some() => match status.expiration {
            Some(_) => State::Revoked,
            // No caller ever got the credential.
            None => State::Failed,
        },
        own => own,
    }
}

/// Whether its revocation keeps failing. After the account was found gone, the last look may fail too and is tried
/// again, but nobody has to act because of it.
pub(crate) fn is_stuck(status: &Status) -> bool {
    status.stuck && !state(status).is_settled()
}

/// The number of leases that are shown in each state, in the order of [`State::ALL`]. `own` has the numbers by the
/// leases' own states. `gone` is the number of `revoking` leases whose account is gone. `with_expiration` is the
/// number of those that had an expiration.
pub(crate) fn counts(own: [u64; 5], gone: u64, with_expiration: u64) -> [u64; 5] {
    let mut shown = own;
    for (n, state) in shown.iter_mut().zip(State::ALL) {
        match state {
            State::Pending | State::Active => {}
            State::Revoking => *n = n.saturating_sub(gone),
            State::Revoked => *n += with_expiration,
            State::Failed => *n += gone.saturating_sub(with_expiration),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    #[test]
    fn gone_is_the_accounts_absence() {
        let at = Some(Timestamp::UNIX_EPOCH);
        for (own, expiration, revoked_at, shown) in [
            (State::Pending, None, None, State::Pending),
            (State::Active, at, None, State::Active),
            (State::Revoking, None, None, State::Revoking),
            (State::Revoking, at, None, State::Revoking),
            (State::Revoking, None, at, State::Failed),
            (State::Revoking, at, at, State::Revoked),
            (State::Revoked, at, at, State::Revoked),
            (State::Revoked, at, None, State::Revoked),
            (State::Failed, None, at, State::Failed),
            (State::Failed, None, None, State::Failed),
        ] {
            for stuck in [false, true] {
                let status = Status {
                    state: own,
                    expiration,
                    revoked_at,
                    stuck,
                    ..Status::begin(Timestamp::UNIX_EPOCH)
                };
                assert_eq!(state(&status), shown, "{status:?}");
                let still = !shown.is_settled();
                assert_eq!(is_stuck(&status), stuck && still, "{status:?}");
            }
        }
    }

    #[test]
    fn those_that_are_gone_are_counted_as_ended() {
        assert_eq!(counts([1, 2, 7, 10, 5], 4, 3), [1, 2, 3, 13, 6]);
        assert_eq!(counts([0; 5], 0, 0), [0; 5]);
    }
}
