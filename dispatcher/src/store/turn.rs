//! The right to write to a store in PostgreSQL: the lock on an empty table.
//!
//! `SHARE UPDATE EXCLUSIVE` conflicts with itself, but not with the weaker modes (`ACCESS SHARE`,
//! `ROW SHARE`, `ROW EXCLUSIVE`), which PostgreSQL gives to each session that prepares a statement on a table,
//! before it looks whether they may run it. Every mode that conflicts needs a privilege on the table,
//! so nobody but the store's own role can take or delay the turn. An advisory lock, as the version
//! before has it, can be taken by everybody who may connect to the database.
//! <https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES>

use std::time::Duration;

/// Whether the table is there.
pub(super) const STANDS: &str = "SELECT to_regclass('public.mayfly_turn') IS NOT NULL";
/// Makes it. Not a migration: migrations take turns too.
pub(super) const MAKE: &str = "CREATE TABLE IF NOT EXISTS public.mayfly_turn ()";
/// Key of the version before: the bytes of `mayfly.w`.
const OLDER_KEY: i64 = i64::from_be_bytes(*b"mayfly.w");
/// Between two looks whether a dispatcher of the version before has ended its turn.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Takes the turn until the transaction's end. The first cell is `t` where a dispatcher of the
/// version before cannot have its turn at the same time.
pub(super) fn take() -> String {
    format!(
        "LOCK TABLE public.mayfly_turn IN SHARE UPDATE EXCLUSIVE MODE; SELECT pg_try_advisory_xact_lock({OLDER_KEY})"
    )
}

/// `t` once no dispatcher of the version before has its turn. Who else holds its lock is passed
/// over: only sessions of the store's own role can be dispatchers.
pub(super) fn take_from_older() -> String {
    let (high, low) = ((OLDER_KEY >> 32) as u32, OLDER_KEY as u32);
    format!(
        "SELECT pg_try_advisory_xact_lock({OLDER_KEY}) OR NOT EXISTS (\
           SELECT 1 FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid \
           WHERE l.locktype = 'advisory' AND l.granted AND a.usename = session_user \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND l.classid = {high} AND l.objid = {low} AND l.objsubid = 1)"
    )
}
