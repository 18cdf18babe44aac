//! A private PgBouncer of Debian's, on loopback, in front of a server: as people set it up for accounts
//! that come and go. Users are looked up in the server (`auth_query`, by a role that may run one function
//! and nothing else), and their SCRAM verifiers let PgBouncer pass their logins on.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use crate::postgres::Server;
use crate::process::{Process, free_port, run};
use crate::{eventually, run_dir, seconds, word};

/// When a server connection goes back to PgBouncer's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// When its client leaves.
    Session,
    /// The server connection is returned at the end of each transaction.
    Transaction,
}

/// A PgBouncer. Ended, and its files left, when dropped.
pub struct PgBouncer {
    /// The port for clients.
    pub port: u16,
    pub directory: PathBuf,
    pub process: Process,
}

impl PgBouncer {
    /// Starts PgBouncer in front of a server, for these databases and `postgres`, with more lines of `pgbouncer.ini`.
    pub async fn start(server: &Server, databases: &[&str], mode: Mode, more: &str) -> Self {
        let lookup = format!("lookup_{}", word());
        let password = word();
        let root = server.superuser("postgres").await;
        root.batch_execute(&format!("CREATE ROLE {lookup} LOGIN PASSWORD '{password}'"))
            .await
            .unwrap();
        // PgBouncer 1.18 runs its look-up in the database that the client names.
        for database in databases.iter().chain(&["postgres"]) {
            let root = server.superuser(database).await;
            root.batch_execute(&format!(
                "CREATE SCHEMA {lookup}; GRANT USAGE ON SCHEMA {lookup} TO {lookup}; \
                 CREATE FUNCTION {lookup}.user_lookup(name text, OUT username text, OUT password text) RETURNS record \
                 LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog \
                 AS $$ SELECT rolname::text, rolpassword FROM pg_authid \
                       WHERE rolname = $1 AND rolcanlogin AND (rolvaliduntil IS NULL OR rolvaliduntil > now()) $$; \
                 REVOKE ALL ON FUNCTION {lookup}.user_lookup FROM PUBLIC; \
                 GRANT EXECUTE ON FUNCTION {lookup}.user_lookup TO {lookup}"
            ))
            .await
            .unwrap();
        }
        let directory = run_dir().join(format!("pgbouncer-{}", word()));
        std::fs::create_dir_all(&directory).unwrap();
        let port = free_port();
        let place = directory.display();
        let mode = match mode {
            Mode::Session => "session",
            Mode::Transaction => "transaction",
        };
        // A login as a role that is gone waits for a server connection that cannot be opened. PgBouncer refuses it
        // after `query_wait_timeout`, which is 120 s by default.
        let mut text = format!(
            "[databases]\n* = host=127.0.0.1 port={server}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             logfile = {place}/log\npool_mode = {mode}\nauth_type = scram-sha-256\nauth_file = {place}/users\n\
             auth_user = {lookup}\nauth_query = SELECT username, password FROM {lookup}.user_lookup($1)\n\
             server_tls_sslmode = prefer\ndefault_pool_size = 20\nmax_client_conn = 200\n\
             query_wait_timeout = 15\n\
             ignore_startup_parameters = extra_float_digits\n",
            server = server.port(),
        );
        writeln!(text, "{more}").unwrap();
        std::fs::write(directory.join("ini"), text).unwrap();
        std::fs::write(
            directory.join("users"),
            format!("\"{lookup}\" \"{password}\"\n"),
        )
        .unwrap();
        // PgBouncer does not run as root.
        run(
            &PathBuf::from("chown"),
            &["-R", "postgres:postgres", directory.to_str().unwrap()],
        );
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                "--",
                "/usr/sbin/pgbouncer",
            ])
            .arg(directory.join("ini"));
        let process = Process::start(&command, &directory.join("out"));
        eventually("PgBouncer listens", seconds(20), async || {
            let open = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
            open.ok().map(drop)
        })
        .await;
        Self {
            port,
            directory,
            process,
        }
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }
}
