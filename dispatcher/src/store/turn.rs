//! The right to write to a store in PostgreSQL: locks on empty tables.
//!
//! A job that sees the store alone takes its *turn*: the lock of the view `mayfly_turn`, with which
//! PostgreSQL locks all tables of the view too. A job about one lease takes one *slot*, one of those tables:
//! it runs beside the jobs in other slots, and never beside a turn. Dispatchers of the version before take
//! only turns, by the same name, and so keep out of everybody's way.
//!
//! `SHARE UPDATE EXCLUSIVE` conflicts with itself, but not with the weaker modes (`ACCESS SHARE`,
//! `ROW SHARE`, `ROW EXCLUSIVE`), which PostgreSQL gives to each session that prepares a statement on a table,
//! before it looks whether they may run it. Every mode that conflicts needs a privilege on the table,
//! so nobody but the store's own role can take or delay a turn or a slot. An advisory lock, as the version
//! two before has it, can be taken by everybody who may connect to the database.
//! <https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES>,
//! <https://www.postgresql.org/docs/current/sql-lock.html> (views)

use std::time::Duration;

/// What `mayfly_turn` is: `r` a table, `v` a view over the slots; no row if it is absent.
pub(super) const KIND: &str = "SELECT relkind FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass('public.mayfly_turn')";
/// Makes it. Not a migration: migrations take turns too.
pub(super) const MAKE: &str = "CREATE TABLE IF NOT EXISTS public.mayfly_turn ()";
/// Jobs about single leases that run at a time, of all dispatchers.
const SLOTS: usize = 32;
/// Key of the version two before: the bytes of `mayfly.w`.
const OLDER_KEY: i64 = i64::from_be_bytes(*b"mayfly.w");
/// Namespace of the advisory locks by which sessions choose different slots. Nothing depends on them.
const CHOICE: i32 = i32::from_be_bytes(*b"mayf");
/// Between two looks whether a dispatcher of the version before has ended its turn.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(5);

fn slot(n: usize) -> String {
    format!("public.mayfly_slot_{n:02}")
}

/// Puts a view over slots in the place of the table. In a transaction that has its turn. Who waits for the
/// table waits for the view after that, since PostgreSQL looks a name up again once it has its lock.
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

/// Takes the turn until the transaction's end, but for dispatchers of the version two before.
pub(super) fn take() -> String {
    lock("public.mayfly_turn")
}

/// In a transaction that has the turn. One row: 1 where no dispatcher of the version two before has its turn, and
/// none can have it before the end of this transaction, else 0; and the server's clock, in milliseconds since 1970.
/// Who else holds its lock is passed over: only sessions of the store's own role can be dispatchers.
pub(super) fn take_from_older() -> String {
    looked(&unless_older("pg_try_advisory_xact_lock"))
}

/// The same in a transaction that has a slot.
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

/// Takes a slot until the transaction's end.
pub(super) fn take_slot(n: usize) -> String {
    lock(&slot(n % SLOTS))
}

/// Chooses a slot that no other session has chosen, until the session's end. Where all are taken, as by a
/// stranger who holds these locks, it is any.
pub(super) fn choose() -> String {
    format!(
        "SELECT coalesce((SELECT n FROM pg_catalog.generate_series(0, {}) AS n \
         WHERE pg_catalog.pg_try_advisory_lock({CHOICE}, n) LIMIT 1), pg_catalog.pg_backend_pid() % {SLOTS})",
        SLOTS - 1
    )
}
