//! The number of a pool's leases in each state, in SQLite. A trigger would count each row, and make SQLite copy
//! every page that a statement changes, in case the trigger fails. So the connection of the writer has no triggers.
//! It sums up the changes and writes them at the end of its transaction. All other connections use triggers, and so
//! does PostgreSQL.

use std::cell::RefCell;
use std::collections::HashMap;

use mayfly_protocol::lease::State;
use mayfly_protocol::names::PoolName;

type Changes = HashMap<(PoolName, State), i64>;

/// Changes of a transaction that are not written yet.
#[derive(Debug, Default)]
pub(super) struct Counts {
    of_job: RefCell<Changes>,
    of_transaction: RefCell<Changes>,
}

impl Counts {
    /// The number of leases of a pool in this state changes by `n`.
    pub(super) fn add(&self, pool: &PoolName, state: State, n: i64) {
        *self
            .of_job
            .borrow_mut()
            .entry((pool.clone(), state))
            .or_default() += n;
    }

    /// Ends a job. If its changes are undone, they do not count.
    pub(super) fn end_job(&self, is_undone: bool) {
        let changes = self.of_job.take();
        if is_undone {
            return;
        }
        let mut all = self.of_transaction.borrow_mut();
        for (which, n) in changes {
            *all.entry(which).or_default() += n;
        }
    }

    /// Drops all changes: the transaction was rolled back.
    pub(super) fn forget(&self) {
        self.of_job.take();
        self.of_transaction.take();
    }

    /// Takes the changes that are to be written now.
    pub(super) fn take(&self) -> impl Iterator<Item = ((PoolName, State), i64)> + use<> {
        self.end_job(false);
        self.of_transaction
            .take()
            .into_iter()
            .filter(|(_, n)| *n != 0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_undone_job_and_a_lost_transaction_do_not_count() {
        let (counts, pool) = (Counts::default(), "pool1".parse::<PoolName>().unwrap());
        counts.add(&pool, State::Pending, 3);
        counts.end_job(false);
        counts.add(&pool, State::Pending, 5);
        counts.end_job(true);
        counts.add(&pool, State::Pending, -1);
        counts.add(&pool, State::Active, 1);
        counts.add(&pool, State::Active, -1);
        let taken: Vec<_> = counts.take().collect();
        assert_eq!(taken, [((pool.clone(), State::Pending), 2)]);
        assert_eq!(counts.take().count(), 0);
        counts.add(&pool, State::Active, 1);
        counts.forget();
        assert_eq!(counts.take().count(), 0);
    }
}
