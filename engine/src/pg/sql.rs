//! SQL text: quoting, the comments that mark Mayfly's roles, and timestamps as text. Identifiers and literals get
//! into a statement only through this module.

use aws_lc_rs::digest;
use jiff::Timestamp;
use mayfly_protocol::names::{InstallationId, LeaseId, RoleName};
use postgres_protocol::escape;

/// A quoted identifier, for a statement.
pub(crate) fn ident(name: &str) -> String {
    escape::escape_identifier(name)
}

/// A quoted literal, for a statement.
pub(crate) fn literal(text: &str) -> String {
    // escape_literal puts a space before E'…'. Not every place in Mayfly's SQL allows this space.
    escape::escape_literal(text).trim_start().to_owned()
}

/// SQL that shows a name to people. A database in SQL_ASCII may have a name that is not UTF-8, which would otherwise
/// fail the whole answer (SQLSTATE 22021).
pub(super) fn readable(name: &str) -> String {
    format!(
        "CASE WHEN pg_catalog.getdatabaseencoding() <> 'SQL_ASCII' OR ({name})::text COLLATE \"C\" ~ '^[ -~]*$' THEN {name} \
         ELSE pg_catalog.encode(pg_catalog.convert_to({name}, 'SQL_ASCII'), 'escape') END"
    )
}

/// Quoted literals, as `'a', 'b', 'c'`.
pub(crate) fn literals<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    texts
        .into_iter()
        .map(literal)
        .collect::<Vec<_>>()
        .join(", ")
}

/// The text that stands for a cell that is not UTF-8, such as a name that was made in a database with another
/// encoding. PostgreSQL's text never holds a NUL, so it is no valid name, and no statement with it is ever sent.
pub(crate) const NOT_UTF8: &str = "\0";

/// A cell as text for a message.
pub(crate) fn shown(cell: &str) -> &str {
    match cell {
        NOT_UTF8 => "(a name that is not UTF-8)",
        cell => cell,
    }
}

/// Prefix of the comments of all of Mayfly's roles.
pub(crate) const COMMENT_PREFIX: &str = "mayfly:";

/// The comment of a lease's role. It makes the database a ledger from which leases can be found without the store.
pub(crate) fn lease_comment(installation: &InstallationId, lease: &LeaseId) -> String {
    format!("{COMMENT_PREFIX}lease:{installation}:{lease}")
}

/// Reads a comment that [`lease_comment`] wrote.
pub(crate) fn parse_lease_comment(comment: &str) -> Option<(InstallationId, LeaseId)> {
    let (installation, lease) = comment
        .strip_prefix(COMMENT_PREFIX)?
        .strip_prefix("lease:")?
        .split_once(':')?;
    Some((installation.parse().ok()?, lease.parse().ok()?))
}

/// The comment of a grant role.
pub(crate) fn grant_comment(installation: &InstallationId, name: &RoleName) -> String {
    format!("{}{name}", grant_prefix(installation))
}

/// Prefix of the comments of an installation's grant roles. The role's name follows.
pub(crate) fn grant_prefix(installation: &InstallationId) -> String {
    format!("{COMMENT_PREFIX}grant:{installation}:")
}

/// The comment of a quarantine role.
pub(crate) fn quarantine_comment(installation: &InstallationId) -> String {
    format!("{COMMENT_PREFIX}quarantine:{installation}")
}

/// The first 16 hexadecimal digits of the parts' SHA-256.
pub(crate) fn short_hash(parts: &[&str]) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part.as_bytes());
    }
    context.finish().as_ref()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// An expression that gives a `timestamptz` as RFC 3339 text in UTC, regardless of the session's
/// settings.
pub(crate) fn timestamp_text(expression: &str) -> String {
    format!(
        r#"pg_catalog.to_char(pg_catalog.timezone('UTC', {expression}), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"#
    )
}

/// Parses the result of [`timestamp_text`]. PostgreSQL's timestamps continue for hundreds of thousands of years. A
/// timestamp beyond the last one of this program becomes that last timestamp.
pub(crate) fn parse_timestamp(text: &str) -> Option<Timestamp> {
    let year: u32 = text.split('-').next()?.parse().ok()?;
    let parsed = text.parse().ok();
    parsed.or((year >= 9999).then_some(Timestamp::MAX))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn identifiers_stay_inside_their_quotes(name in "[^\\x00]{0,40}") {
            let quoted = ident(&name);
            let inside = quoted.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
            prop_assert_eq!(inside.replace("\"\"", ""), name.replace('"', ""));
            prop_assert_eq!(inside.replace("\"\"", "\""), name);
        }

        #[test]
        fn literals_stay_inside_their_quotes(text in "[^\\x00]{0,40}") {
            let quoted = literal(&text);
            let (escaped, inside) = match quoted.strip_prefix('E') {
                Some(rest) => (true, rest),
                None => (false, quoted.as_str()),
            };
            let inside = inside.strip_prefix('\'').unwrap().strip_suffix('\'').unwrap();
            let mut back = inside.replace("''", "'");
            if escaped {
                back = back.replace("\\\\", "\\");
            }
            prop_assert_eq!(back, text);
        }
    }

    #[test]
    fn a_lease_is_read_from_its_comment() {
        let (installation, lease) = (InstallationId::random(), LeaseId::random());
        let comment = lease_comment(&installation, &lease);
        assert_eq!(parse_lease_comment(&comment), Some((installation, lease)));
        assert_eq!(parse_lease_comment("mayfly:lease:x:y"), None);
        assert_eq!(parse_lease_comment(&format!("not {comment}")), None);
    }

    #[test]
    fn a_date_at_the_end_of_time_is_the_last_one() {
        for text in [
            "9999-12-31T00:00:00.000000Z",
            "294276-12-31T23:59:59.999999Z",
        ] {
            assert_eq!(parse_timestamp(text), Some(Timestamp::MAX), "{text}");
        }
        let parsed = parse_timestamp("2026-01-02T03:04:05.000006Z").unwrap();
        assert_eq!(parsed.to_string(), "2026-01-02T03:04:05.000006Z");
        for text in ["", "soon", "2026-13-01T00:00:00.000000Z"] {
            assert_eq!(parse_timestamp(text), None, "{text}");
        }
    }

    #[test]
    fn hashes_do_not_run_parts_together() {
        assert_ne!(short_hash(&["ab", "c"]), short_hash(&["a", "bc"]));
    }
}
