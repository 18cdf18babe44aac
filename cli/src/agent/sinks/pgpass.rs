//! A password file of libpq (PostgreSQL documentation, 34.16): `host:port:database:user:password` lines, in which
//! `:` and `\` have a backslash before them.

use zeroize::Zeroizing;

use crate::credential::Credential;

/// Lines for the new credential, then for the previous ones, because a program may have just read their user names.
pub(super) fn text(
    new: &Credential,
    previous: &[&Credential],
) -> Result<Zeroizing<String>, String> {
    let mut text = Zeroizing::new(String::new());
    for credential in std::iter::once(&new).chain(previous) {
        for (host, port) in &credential.places {
            line(&mut text, credential, host, *port)?;
            if host.starts_with('/') {
                // libpq looks for `localhost` if the directory of the socket is its default directory.
                line(&mut text, credential, "localhost", *port)?;
            }
        }
    }
    Ok(text)
}

fn line(text: &mut String, credential: &Credential, host: &str, port: u16) -> Result<(), String> {
    let port = port.to_string();
    for (name, value, end) in [
        ("host", host, ':'),
        ("port", &port, ':'),
        ("database", &credential.database, ':'),
        ("username", &credential.username, ':'),
        ("password", &credential.password, '\n'),
    ] {
        if value.contains(['\n', '\r', '\0']) {
            return Err(format!(
                "a password file cannot hold a line break in {name}"
            ));
        }
        for c in value.chars() {
            if matches!(c, ':' | '\\') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push(end);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::{at, with};

    /// The fields of a line, read as libpq's passwordFromFile and pwdfMatchesString read them.
    fn fields(line: &str) -> Vec<String> {
        let (mut fields, mut is_escaped) = (vec![String::new()], false);
        for c in line.chars() {
            match c {
                '\\' if !is_escaped => is_escaped = true,
                ':' if !is_escaped => fields.push(String::new()),
                c => {
                    fields.last_mut().unwrap().push(c);
                    is_escaped = false;
                }
            }
        }
        fields
    }

    #[test]
    fn fields_are_read_back() {
        for value in [
            ":", "\\", "\\:", ":\\", "a:b\\c", "#", "*", " x ", "'\"", "é",
        ] {
            let text = text(&with(value, value, value), &[]).unwrap();
            assert_eq!(
                fields(text.strip_suffix('\n').unwrap()),
                ["db", "5432", value, value, value]
            );
        }
    }

    /// A `*` alone would match every database, and a line that begins with `#` is a comment.
    #[test]
    fn a_line_break_makes_no_second_line() {
        for value in ["a\n*:*:*:*:x", "\r", "\0"] {
            for (name, credential) in [
                ("database", with(value, "u", "p")),
                ("username", with("d", value, "p")),
                ("password", with("d", "u", value)),
            ] {
                let refused = text(&credential, &[]).unwrap_err();
                assert!(
                    refused.contains(name) && !refused.contains("*:"),
                    "{refused}"
                );
            }
        }
    }

    #[test]
    fn every_place_and_every_valid_credential_has_a_line() {
        let new = at(&[("::1", 5432), ("/run/pg", 1)], "app", "new", "p");
        let old = with("app", "old", "q");
        assert_eq!(
            *text(&new, &[&old]).unwrap(),
            "\\:\\:1:5432:app:new:p\n/run/pg:1:app:new:p\nlocalhost:1:app:new:p\ndb:5432:app:old:q\n"
        );
    }
}
