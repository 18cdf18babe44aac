//! An attacker who owns databases: what is planted against the admin, and whether it had an effect.

use std::collections::HashSet;

use mayfly_tests::postgres::{Server, scalar};
use mayfly_tests::word;
use tokio_postgres::Client;

/// Makes the schema `evil`. If it runs as Mayfly, it writes that into the server's log, also in a failed transaction,
/// and takes every right for the attacker.
const EVIL: &str = include_str!("../hostile_database.sql");

/// The settings that an owner plants. A version may not know one of them.
pub(super) const SETTINGS: [(&str, &str); 34] = [
    ("role", "'ATTACKER'"),
    ("session_authorization", "'ATTACKER'"),
    ("exit_on_error", "on"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "'serializable'"),
    ("default_transaction_deferrable", "on"),
    ("statement_timeout", "'60ms'"),
    ("lock_timeout", "'2ms'"),
    ("idle_in_transaction_session_timeout", "'2ms'"),
    ("idle_session_timeout", "'5s'"),
    ("transaction_timeout", "'90ms'"),
    ("client_encoding", "'LATIN1'"),
    ("DateStyle", "'SQL, DMY'"),
    ("IntervalStyle", "'sql_standard'"),
    ("TimeZone", "'Asia/Kathmandu'"),
    ("timezone_abbreviations", "'India'"),
    ("bytea_output", "'escape'"),
    ("extra_float_digits", "'-15'"),
    ("quote_all_identifiers", "on"),
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "on"),
    ("transform_null_equals", "on"),
    ("row_security", "on"),
    ("client_min_messages", "'debug5'"),
    ("check_function_bodies", "off"),
    ("synchronous_commit", "off"),
    ("jit_above_cost", "0"),
    ("debug_parallel_query", "regress"),
    ("force_parallel_mode", "regress"),
    ("createrole_self_grant", "'set, inherit'"),
    ("password_encryption", "'md5'"),
    ("restrict_nonsystem_relation_kind", "'view'"),
    ("plpgsql.extra_errors", "'all'"),
    ("search_path", "evil, pg_catalog"),
];

/// The search path alone: no other setting disturbs code that would run by it.
pub(super) const PATH: &[(&str, &str)] = &[("search_path", "evil, pg_catalog")];

/// An owner of databases.
pub(super) struct Attacker {
    server: Server,
    pub(super) name: String,
    pub(super) password: String,
    mark: String,
}

impl Attacker {
    pub(super) async fn new(server: &Server) -> Self {
        let attacker = Self {
            server: server.clone(),
            name: format!("attacker_{}", word()),
            password: word(),
            mark: format!("evil-{}", word()),
        };
        let root = server.superuser("postgres").await;
        root.batch_execute(&format!(
            "CREATE ROLE {} LOGIN PASSWORD '{}'",
            attacker.name, attacker.password
        ))
        .await
        .unwrap();
        attacker
    }

    /// Plants settings, as an owner of the database or as one who may be it.
    pub(super) async fn plants(&self, by: &Client, database: &str, settings: &[(&str, &str)]) {
        let evil = EVIL
            .replace("ATTACKER", &self.name)
            .replace("MARK", &self.mark);
        by.batch_execute(&evil).await.unwrap();
        let mut unknown = Vec::new();
        for (name, value) in settings {
            let value = value.replace("ATTACKER", &self.name);
            let set = format!("ALTER DATABASE {database} SET {name} = {value}");
            if let Err(error) = by.batch_execute(&set).await {
                assert_eq!(
                    error.code().map(|c| c.code()),
                    Some("42704"),
                    "{set}: {error:?}"
                );
                unknown.push(*name);
            }
        }
        assert!(unknown.len() < 6, "{unknown:?}");
    }

    /// Mayfly ran no planted code, and the attacker has no new right.
    pub(super) async fn gained_nothing(&self) {
        let log = std::fs::read_to_string(self.server.directory().join("log")).unwrap();
        let ran: HashSet<&str> = log
            .lines()
            .filter_map(|line| line.split_once(&self.mark))
            .map(|(_, what)| what)
            .collect();
        assert!(ran.is_empty(), "the attacker's code ran: {ran:?}");
        let root = self.server.superuser("postgres").await;
        let rights = format!(
            "SELECT concat(rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls, \
               (SELECT count(*) FROM pg_auth_members m WHERE m.member = r.oid)) FROM pg_roles r WHERE rolname = '{}'",
            self.name
        );
        assert_eq!(scalar(&root, &rights).await, "fffff0");
    }
}
