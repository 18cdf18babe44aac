//! How each PostgreSQL session and transaction of Mayfly begins, as SQL text.
//!
//! The owner of a database, or of a role, can plant settings for those who connect (`ALTER
//! DATABASE … SET`, `ALTER ROLE … SET`). A planted `search_path` makes an unqualified function,
//! operator or type run as the admin. So the first statement of a connection empties the path, and
//! each transaction states again whatever a planted value could change: through a transaction pooler
//! it may run on another server connection than the transaction before.
//!
//! What a planted value of another setting does was tried on PostgreSQL 14, 15 and 18
//! (`tests/it/matrix/hostile_database.rs`).

use std::time::Duration;

/// The first statement on a connection. It names no operator and no type, so it means the same
/// under any search path. Temporary relations are still searched first under an empty path; only a
/// session itself makes those.
///
/// The other settings are in force between transactions and in a failed transaction. They are PostgreSQL's defaults,
/// because a pooler may hand the session on to another client.
///
/// It is sent as a message of its own. The next message begins a transaction, and a transaction can set its
/// isolation only before its first query.
pub const FIRST: &str = "SELECT pg_catalog.set_config('search_path', '', false), \
     pg_catalog.set_config('role', 'none', false), \
     pg_catalog.set_config('exit_on_error', 'off', false), \
     pg_catalog.set_config('statement_timeout', '0', false), \
     pg_catalog.set_config('lock_timeout', '0', false), \
     pg_catalog.set_config('idle_session_timeout', '0', false), \
     pg_catalog.set_config('idle_in_transaction_session_timeout', '0', false), \
     CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL \
     THEN pg_catalog.set_config('transaction_timeout', '0', false) END";

/// Options of a startup packet for a server on which [`FIRST`] fails, because planted settings end the session
/// before it: a time-out shorter than compiling a statement takes, or a library that does not exist. They are not
/// sent at once, because poolers refuse them.
pub const STARTUP_OPTIONS: &str = "-c jit=off -c statement_timeout=0 -c exit_on_error=off \
     -c default_transaction_read_only=off -c local_preload_libraries= -c search_path=";

/// SQLSTATEs of a session that planted settings have ended before it began: query_canceled, transaction_timeout,
/// undefined_file; and character_not_in_repertoire, if a setting that the server reports is not UTF-8.
pub const ENDED_BY_SETTINGS: [&str; 4] = ["57014", "25P04", "58P01", "22021"];

/// How each of Mayfly's transactions begins: [`begin`].
pub const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ ";

/// Settings that exist in every supported version (14 and later) and that anybody may set, so anybody
/// may plant them. Each value is PostgreSQL's own default, but for those that a reader of the result
/// relies on.
const SETTINGS: [(&str, &str); 22] = [
    // An error must not end the session: some are expected.
    ("exit_on_error", "off"),
    ("synchronous_commit", "on"),
    // Format of timestamps and numbers.
    ("DateStyle", "'ISO'"),
    ("IntervalStyle", "'postgres'"),
    ("TimeZone", "'UTC'"),
    ("bytea_output", "'hex'"),
    ("extra_float_digits", "1"),
    ("quote_all_identifiers", "off"),
    // How SQL text is parsed.
    ("standard_conforming_strings", "on"),
    ("backslash_quote", "safe_encoding"),
    ("escape_string_warning", "off"),
    ("transform_null_equals", "off"),
    // Rows are never left out in silence.
    ("row_security", "off"),
    // Nobody reads the server's notices.
    ("client_min_messages", "error"),
    // Which objects are made, and where.
    ("check_function_bodies", "on"),
    ("default_tablespace", "''"),
    ("temp_tablespaces", "''"),
    // For small queries JIT and parallel workers take longer than the query.
    ("jit", "off"),
    ("max_parallel_workers_per_gather", "0"),
    // For a transaction that does not state them itself.
    ("default_transaction_isolation", "'read committed'"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
];

/// Whether a transaction writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The transaction writes. A standby refuses it (SQLSTATE 0A000).
    ReadWrite,
    /// The transaction only reads, so that a standby runs it too.
    ReadOnly,
}

/// Time-outs on the server, each at least 1 ms.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum time of one statement.
    pub statement: Duration,
    /// Maximum wait of a statement for a lock.
    pub lock: Duration,
    /// Maximum time of a transaction between two statements.
    pub idle_in_transaction: Duration,
}

/// SQL that begins a transaction and sets Mayfly's settings in it, regardless of the session's. It ends with `; `.
///
/// The path is not empty here: `pg_temp` is named, last, so that no temporary relation hides a
/// catalog.
pub fn begin(access: Access, limits: &Limits) -> String {
    let access = match access {
        Access::ReadWrite => "WRITE",
        Access::ReadOnly => "ONLY",
    };
    format!(
        "{BEGIN}{access}; SET LOCAL search_path = pg_catalog, pg_temp; {}",
        stated("SET LOCAL", limits)
    )
}

/// Statements that set Mayfly's settings for the rest of a session. Use them outside a transaction, on a
/// connection that no pooler shares. They end with `; `.
pub fn session(limits: &Limits) -> String {
    format!("{SET_PATH}{}", stated("SET", limits))
}

/// The search path of [`begin`], for a session. Ends with `; `.
pub const SET_PATH: &str = "SET search_path = pg_catalog, pg_temp; ";

fn stated(set: &str, limits: &Limits) -> String {
    // `RESET` would set the planted role again.
    let mut text = format!("{set} ROLE NONE; ");
    for (name, limit) in [
        ("statement_timeout", limits.statement),
        ("lock_timeout", limits.lock),
        (
            "idle_in_transaction_session_timeout",
            limits.idle_in_transaction,
        ),
    ] {
        text.push_str(&format!("{set} {name} = {}; ", limit.as_millis().max(1)));
    }
    for (name, value) in SETTINGS {
        text.push_str(&format!("{set} {name} = {value}; "));
    }
    text
}

/// For a transaction that [`begin`] began: what only newer versions know, and what only a superuser
/// may set. Ends with `; ` unless it is empty.
pub fn newer(version: u32, superuser: bool) -> String {
    let mut text = String::new();
    if version >= 16 {
        text.push_str("SET LOCAL createrole_self_grant = ''; ");
    }
    if version >= 17 {
        text.push_str("SET LOCAL transaction_timeout = 0; ");
    }
    if version >= 17 && superuser {
        // Functions of event triggers would run as the superuser. Only superusers make event triggers, but the
        // function may belong to somebody else.
        text.push_str("SET LOCAL event_triggers = off; ");
    }
    text
}

/// [`newer`] for a session whose version is not known yet. It returns no row. Use it under a safe search path only.
/// Ends with `; `.
pub fn of_any_version(local: bool) -> String {
    let set = |name: &str, value: &str, also: &str| {
        format!(
            "CASE WHEN pg_catalog.current_setting('{name}', true) IS NOT NULL{also} \
             THEN pg_catalog.set_config('{name}', '{value}', {local}) END"
        )
    };
    let superuser = " AND pg_catalog.current_setting('is_superuser') OPERATOR(pg_catalog.=) 'on'";
    format!(
        "SELECT WHERE pg_catalog.concat({}, {}, {}) IS NULL; ",
        set("transaction_timeout", "0", ""),
        set("createrole_self_grant", "", ""),
        set("event_triggers", "off", superuser),
    )
}

/// Calls in a text of SQL that are not qualified with `pg_catalog`, or, behind FROM, relations that
/// name no schema. For tests of text that runs outside a transaction of Mayfly.
pub fn unqualified(sql: &str) -> Vec<String> {
    const GRAMMAR: [&str; 9] = [
        "case", "when", "in", "exists", "operator", "and", "or", "coalesce", "values",
    ];
    let mut found = Vec::new();
    let mut words: Vec<(usize, usize)> = Vec::new();
    let (mut quoted, mut start) = (false, None);
    for (at, c) in sql.char_indices().chain([(sql.len(), ' ')]) {
        if c == '\'' {
            quoted = !quoted;
        }
        let is_word = !quoted && (c.is_ascii_alphanumeric() || "_.\"".contains(c));
        match (is_word, start) {
            (true, None) => start = Some(at),
            (false, Some(begun)) => {
                words.push((begun, at));
                start = None;
            }
            _ => {}
        }
    }
    for (n, (begun, end)) in words.iter().enumerate() {
        let word = sql[*begun..*end].to_lowercase();
        let called = sql[*end..].starts_with('(') && !GRAMMAR.contains(&&*word);
        let from = n > 0 && sql[words[n - 1].0..words[n - 1].1].eq_ignore_ascii_case("from");
        // FROM (SELECT … names no relation itself.
        let is_relation = from && word != "select";
        if (called && !word.starts_with("pg_catalog.")) || (is_relation && !word.contains('.')) {
            found.push(word);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        statement: Duration::from_secs(30),
        lock: Duration::from_secs(3),
        idle_in_transaction: Duration::ZERO,
    };

    #[test]
    fn what_is_not_qualified_is_found() {
        assert_eq!(
            unqualified(
                "SELECT count(*), pg_catalog.now(), 'f(x)' FROM pg_roles WHERE a IN (1) AND lower(b) = ''"
            ),
            ["count", "pg_roles", "lower"]
        );
        assert!(unqualified("SELECT 1 FROM pg_catalog.pg_roles").is_empty());
    }

    #[test]
    fn nothing_of_it_is_looked_up_in_a_planted_path() {
        assert!(FIRST.starts_with("SELECT pg_catalog.set_config('search_path', '', false)"));
        let texts = [
            format!("{FIRST}; "),
            of_any_version(true),
            session(&LIMITS),
            begin(Access::ReadWrite, &LIMITS),
            newer(18, true),
        ];
        for text in texts {
            assert!(unqualified(&text).is_empty(), "{text}");
            assert!(text.ends_with("; "), "{text}");
            // The text has no backslash, so a planted standard_conforming_strings or backslash_quote changes nothing.
            assert!(!text.contains('\\'), "{text}");
        }
    }

    #[test]
    fn each_transaction_states_isolation_access_and_path_first() {
        let text = begin(Access::ReadWrite, &LIMITS);
        assert!(text.starts_with(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL ROLE NONE; SET LOCAL statement_timeout = 30000; "
        ));
        assert!(text.contains("SET LOCAL idle_in_transaction_session_timeout = 1; "));
        assert!(text.starts_with(BEGIN));
        assert!(begin(Access::ReadOnly, &LIMITS).starts_with(&format!("{BEGIN}ONLY; ")));
        assert_eq!(newer(15, true), "");
        assert!(!newer(18, false).contains("event_triggers"));
    }
}
