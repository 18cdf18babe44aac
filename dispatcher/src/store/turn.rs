//! The right to write to a store in PostgreSQL: locks on empty tables.
//!
//! A job that sees the store alone takes its *turn*: the lock of the view `mayfly_turn`, with which PostgreSQL locks
//! all tables of the view too. A job about one lease takes one *slot*, which is one of those tables. It runs beside
//! the jobs in other slots, and never beside a turn. Dispatchers of the previous version take only turns, by the
//! same name, so they run alone.
//!
//! `SHARE UPDATE EXCLUSIVE` conflicts with itself, but not with the weaker modes (`ACCESS SHARE`, `ROW SHARE`, `ROW
//! EXCLUSIVE`), which every session can get: PostgreSQL takes them when a statement is prepared, before it checks
//! the privileges. All conflicting modes need a privilege on the table, so only the store's own role can take or
//! delay a turn or a slot. Two versions ago the turn was an advisory lock, which everybody who may connect to the
//! database can take. <https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES>,
//! <https://www.postgresql.org/docs/current/sql-lock.html> (views)

use std::time::Duration;

/// Asks what `mayfly_turn` is: `r` is a table, `v` a view over the slots. There is no row if it does not exist.
pub(super) const KIND: &str = "SELECT relkind FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass('public.mayfly_turn')";
/// Makes the table `mayfly_turn`. It is not a migration, because migrations take turns too.
pub(super) const MAKE: &str = "CREATE TABLE IF NOT EXISTS public.mayfly_turn ()";
/// Maximum number of concurrent jobs about single leases, of all dispatchers together.
const SLOTS: usize = 32;
/// Key of the advisory lock from two versions ago: the bytes of `mayfly.w`.
const OLDER_KEY: i64 = i64::from_be_bytes(*b"mayfly.w");
/// Namespace of the advisory locks by which sessions choose different slots. Nothing depends on them.
const CHOICE: i32 = i32::from_be_bytes(*b"mayf");
/// Pause between two checks whether a dispatcher of an earlier version has ended its turn.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(5);

fn slot(n: usize) -> String {
    format!("public.mayfly_slot_{n:02}")
}

/// Replaces the table by a view over slots. Run it in a transaction that has the turn. A session that waits for the
/// table then waits for the view, because PostgreSQL looks the name up again when it has the lock.
pub(super) fn split() -> String {
    let slots: Vec<String> = (0..SLOTS).map(slot).collect();
    let tables: Vec<String> = slots
        .iter()
        .map(|slot| format!("CREATE TABLE IF NOT EXISTS {slot} (); "))
        .collect();
    format!(
        "DROP TABLE public.mayfly_turn; {}CREATE VIEW public.mayfly_turn AS SELECT FROM {}; {}",
        tables.concat(),
        slots.join(", "),
        lock("public.mayfly_turn")
    )
}

fn lock(name: &str) -> String {
    format!("LOCK TABLE {name} IN SHARE UPDATE EXCLUSIVE MODE")
}

/// Takes the turn until the end of the transaction. Dispatchers from two versions ago do not notice it, see
/// [`take_from_older`].
pub(super) fn take() -> String {
    lock("public.mayfly_turn")
}

/// Run it in a transaction that has the turn. It returns one row. The first column is 1 if no dispatcher from two
/// versions ago has its turn, and none can take it before the end of this transaction; otherwise it is 0. The second
/// column is the server's clock, in milliseconds since 1970. Locks of other users do not count: only sessions of the
/// store's own role can be dispatchers.
pub(super) fn take_from_older() -> String {
    looked(&unless_older("pg_try_advisory_xact_lock"))
}

/// Like [`take_from_older`], in a transaction that has a slot.
pub(super) fn take_beside_older() -> String {
    looked(&unless_older("pg_try_advisory_xact_lock_shared"))
}

fn looked(condition: &str) -> String {
    format!("SELECT ({condition})::int, (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
}

fn unless_older(try_lock: &str) -> String {
    let (high, low) = ((OLDER_KEY >> 32) as u32, OLDER_KEY as u32);
    format!(
        "{try_lock}({OLDER_KEY}) OR NOT EXISTS (\
           SELECT 1 FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid \
           WHERE l.locktype = 'advisory' AND l.granted AND a.usename = session_user \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND l.classid = {high} AND l.objid = {low} AND l.objsubid = 1)"
    )
}

/// Takes a slot until the end of the transaction.
pub(super) fn take_slot(n: usize) -> String {
    lock(&slot(n % SLOTS))
}

/// Chooses a slot that no other session has chosen, until the end of the session. If all are chosen, for example
/// because another user holds these locks, it chooses any.
pub(super) fn choose() -> String {
    format!(
        "SELECT coalesce((SELECT n FROM pg_catalog.generate_series(0, {}) AS n \
         WHERE pg_catalog.pg_try_advisory_lock({CHOICE}, n) LIMIT 1), pg_catalog.pg_backend_pid() % {SLOTS})",
        SLOTS - 1
    )
}
