//! Sends an account's password to its server in clear, if the secret requires it. Some servers refuse verifiers
//! (credcheck and other password checks of managed servers).
//!
//! The password is sent only over TLS to a verified server, or inside this machine. It is never in the text of a
//! statement, so neither `pg_stat_activity` nor a log of statements shows it. It is a parameter, which is stored for
//! the transaction. If the admin may, it switches off the log of parameters. Before the password is sent, the engine
//! checks that parameters are not logged.

use std::collections::BTreeSet;

use mayfly_protocol::secret::Secret;
use mayfly_protocol::target::{SslMode, Target};
use mayfly_protocol::task::{Failure, FailureCode, Finding, Topic};

use super::protection::is_local;
use super::row::first_column;
use super::session::Session;
use super::sql::{ident, literal};

/// The setting of this transaction that holds the password.
const PLACE: &str = "mayfly.password";

/// Settings of the transaction that prevent logging, if the admin may set them.
const QUIET: [(&str, &str); 11] = [
    ("log_parameter_max_length", "0"),
    ("log_parameter_max_length_on_error", "0"),
    ("log_statement", "none"),
    ("log_min_error_statement", "panic"),
    ("log_min_duration_statement", "-1"),
    ("log_min_duration_sample", "-1"),
    ("track_activities", "off"),
    ("pg_stat_statements.track_utility", "off"),
    ("auto_explain.log_min_duration", "-1"),
    ("pgaudit.log", "none"),
    ("password_encryption", "scram-sha-256"),
];

/// Finds the settings by which the server would still store the password. `log_statement`, three settings about
/// durations and two modules log the parameters of statements. `pg_stat_statements` keeps the text of nested
/// statements.
const WOULD_KEEP: &str = "SELECT name FROM (VALUES \
     ('log_statement', logs AND pg_catalog.current_setting('log_statement') = 'all'), \
     ('log_min_duration_statement', logs AND pg_catalog.current_setting('log_min_duration_statement') <> '-1'), \
     ('log_min_duration_sample', logs AND pg_catalog.current_setting('log_min_duration_sample') <> '-1'), \
     ('log_transaction_sample_rate', logs AND pg_catalog.current_setting('log_transaction_sample_rate') <> '0'), \
     ('auto_explain.log_min_duration', coalesce(pg_catalog.current_setting('auto_explain.log_min_duration', true), '-1') NOT IN ('-1', '')), \
     ('pgaudit.log', coalesce(pg_catalog.current_setting('pgaudit.log', true), 'none') NOT IN ('none', '')), \
     ('pg_stat_statements.track', coalesce(pg_catalog.current_setting('pg_stat_statements.track', true), 'top') = 'all' \
       AND coalesce(pg_catalog.current_setting('pg_stat_statements.track_utility', true), 'on') <> 'off') \
     ) found(name, keeps) WHERE keeps ORDER BY 1";

/// Begins a transaction in which [`PASSWORD`] is the password.
///
/// # Errors
/// Others could read the password, or the server would log it. Then it was not sent.
pub(super) async fn begin(
    home: &Session<'_>,
    target: &Target,
    begin: &str,
    password: &Secret,
) -> Result<(), Failure> {
    guarded(target)?;
    let doing = "keeping the account's password out of the server's log";
    let kept = home.query(&format!("{begin}{}", quiet(home))).await;
    let kept = match kept {
        Ok(rows) => first_column(&rows),
        Err(error) => {
            home.rollback().await;
            return Err(error.into_failure(doing));
        }
    };
    if !kept.is_empty() {
        home.rollback().await;
        return Err(Failure::new(
            FailureCode::AdminLacksRights,
            format!(
                "the account's password was not sent: with {} the server would log it, and {} may not change that for a transaction",
                kept.join(", "),
                target.username
            ),
        ));
    }
    if let Err(error) = home.set_local(PLACE, password).await {
        home.rollback().await;
        return Err(error.into_failure("sending the account's password"));
    }
    Ok(())
}

/// The password as an SQL expression, inside a transaction begun here.
pub(super) const PASSWORD: &str = "pg_catalog.current_setting('mayfly.password')";

/// Refuses a server that is not verified.
fn guarded(target: &Target) -> Result<(), Failure> {
    if target.sslmode == SslMode::VerifyFull || is_local(target) {
        return Ok(());
    }
    Err(Failure::new(
        FailureCode::AdminLacksRights,
        "accountPassword is \"clear\", so the base secret needs sslmode verify-full: an account's password is sent only to a verified server",
    ))
}

/// Statements that switch logging off if the admin may, and then ask what is still logged.
fn quiet(home: &Session<'_>) -> String {
    let facts = home.facts();
    let may = match (facts.superuser, facts.version) {
        (true, _) => "true",
        (false, 15..) => "pg_catalog.has_parameter_privilege(one.name, 'SET')",
        (false, _) => "false",
    };
    let list = QUIET
        .iter()
        .map(|(name, value)| format!("({}, {})", literal(name), literal(value)))
        .collect::<Vec<_>>()
        .join(", ");
    // Every session may set the last of these settings itself.
    let body = format!(
        "DECLARE one record; BEGIN FOR one IN SELECT * FROM (VALUES {list}) v(name, value) LOOP \
           IF one.name = 'password_encryption' OR {may} THEN \
             PERFORM pg_catalog.set_config(one.name, one.value, true); END IF; END LOOP; END"
    );
    let would_keep = WOULD_KEEP.replace(
        "logs AND",
        "pg_catalog.current_setting('log_parameter_max_length') <> '0' AND",
    );
    format!("DO {}; {would_keep}", literal(&body))
}

/// Checks what `accountPassword: clear` means on this server.
pub(super) async fn look(home: &Session<'_>, target: &Target) -> Result<Finding, Failure> {
    let topic = Topic::ClearPassword;
    if let Err(failure) = guarded(target) {
        return Ok(Finding::bad(topic, failure.message));
    }
    let asked = home
        .query(&format!("{}{}", home.begin(), quiet(home)))
        .await;
    home.rollback().await;
    let kept = asked.map_err(|error| error.into_failure("looking at what the server logs"))?;
    let kept = first_column(&kept);
    if kept.is_empty() {
        return Ok(Finding::good(
            topic,
            "the server gets accounts' passwords in clear, not as verifiers, and does not log them. Its operators and its password checks can see them. Remove accountPassword if the server accepts verifiers",
        ));
    }
    Ok(Finding::bad(
        topic,
        format!(
            "no account is made: with {} the server would log its password",
            kept.join(", ")
        ),
    )
    .with_fix(fixes(&kept, &target.username)))
}

/// The statements after which none of these settings keeps a password of a session of the admin. Each stands once.
fn fixes(kept: &[String], admin: &str) -> Vec<String> {
    let admin = ident(admin);
    let fix = |name: &String| match name.as_str() {
        name if name.starts_with("log_") => {
            format!("ALTER ROLE {admin} SET log_parameter_max_length = 0;")
        }
        "auto_explain.log_min_duration" => format!("ALTER ROLE {admin} SET {name} = -1;"),
        "pgaudit.log" => format!("ALTER ROLE {admin} SET {name} = 'none';"),
        _ => format!("ALTER ROLE {admin} SET pg_stat_statements.track_utility = off;"),
    };
    let fixes: BTreeSet<String> = kept.iter().map(fix).collect();
    fixes.into_iter().collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use mayfly_protocol::fixtures::target;

    /// Another server in the place of this server, or between it and the engine, would read the password.
    #[test]
    fn a_password_in_clear_is_sent_only_to_a_verified_server_or_inside_this_machine() {
        for (host, sslmode, expected) in [
            ("db.example.com", SslMode::VerifyFull, true),
            // The certificate's chain may be verified, but not the name.
            ("db.example.com", SslMode::Require, false),
            ("db.example.com", SslMode::Prefer, false),
            ("db.example.com", SslMode::Disable, false),
            ("127.0.0.1", SslMode::Disable, true),
            ("/run/postgresql", SslMode::Disable, true),
            ("127.0.0.1,db.example.com", SslMode::Require, false),
        ] {
            let target = Target {
                host: host.to_owned(),
                sslmode,
                ..target()
            };
            let found = guarded(&target);
            assert_eq!(found.is_ok(), expected, "{host} {sslmode:?}");
            if let Err(failure) = found {
                assert_eq!(failure.code, FailureCode::AdminLacksRights);
            }
        }
    }

    /// Each setting by which the server would keep the password has a statement that stops it.
    #[test]
    fn each_log_of_passwords_has_its_remedy() {
        let kept = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        let parameters = "ALTER ROLE \"a\" SET log_parameter_max_length = 0;";
        for (names, expected) in [
            (&["log_statement"][..], &[parameters][..]),
            (
                &[
                    "log_min_duration_statement",
                    "log_statement",
                    "log_transaction_sample_rate",
                ],
                &[parameters],
            ),
            (
                &["auto_explain.log_min_duration", "log_statement"],
                &[
                    "ALTER ROLE \"a\" SET auto_explain.log_min_duration = -1;",
                    parameters,
                ],
            ),
            (
                &["pgaudit.log"],
                &["ALTER ROLE \"a\" SET pgaudit.log = 'none';"],
            ),
            (
                &["pg_stat_statements.track"],
                &["ALTER ROLE \"a\" SET pg_stat_statements.track_utility = off;"],
            ),
            (&[], &[]),
        ] {
            assert!(fixes(&kept(names), "a").iter().eq(expected), "{names:?}");
        }
    }
}
