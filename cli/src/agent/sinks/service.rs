//! A connection service file of libpq (PostgreSQL documentation, 34.17). A value reaches to the end of its line and
//! cannot be quoted; libpq removes white space at the end.

use std::path::Path;

use zeroize::Zeroizing;

use crate::credential::Credential;

/// libpq 14 refuses a line of 1,023 bytes or more (`MAXBUFSIZE` in fe-connect.c).
const LINE_BYTES: usize = 1000;

pub(super) fn text(
    credential: &Credential,
    name: &str,
    passfile: Option<&Path>,
) -> Result<Zeroizing<String>, String> {
    let mut text = Zeroizing::new(format!("[{name}]\n"));
    let (hosts, ports) = (credential.hosts(), credential.ports());
    let mut add = |key: &str, value: &str| {
        let field = match key {
            "dbname" => "database",
            "user" => "username",
            key => key,
        };
        if value.is_empty()
            || value.contains(['\n', '\r', '\0'])
            || value.ends_with(|c: char| c.is_ascii_whitespace() || c == '\u{b}')
            || key.len() + value.len() > LINE_BYTES
        {
            return Err(format!(
                "a service file cannot hold the {field}: it is empty, too long, or has a line break or white space at its end"
            ));
        }
        text.push_str(key);
        text.push('=');
        text.push_str(value);
        text.push('\n');
        Ok(())
    };
    add("host", &hosts)?;
    add("port", &ports)?;
    add("dbname", &credential.database)?;
    add("user", &credential.username)?;
    match passfile {
        Some(file) => {
            let file = file
                .to_str()
                .ok_or("the password file's name is not UTF-8")?;
            add("passfile", file)?;
        }
        None => add("password", &credential.password)?,
    }
    if credential.places.len() > 1 {
        add("target_session_attrs", "read-write")?;
    }
    for (name, value) in &credential.protection {
        // libpq before 16 refuses a file with `require_auth`.
        match *name {
            "PGSSLMODE" => add("sslmode", value)?,
            "PGCHANNELBINDING" => add("channel_binding", value)?,
            "PGSSLROOTCERT" => add("sslrootcert", value)?,
            _ => {}
        }
    }
    Ok(text)
}

/// Whether this can be the name of a service.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() < 64 && name.chars().all(|c| c.is_ascii_graphic() && c != ']')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::{at, with};

    #[test]
    fn a_service_has_the_password_or_the_file_with_it() {
        let credential = at(&[("a", 1), ("b", 2)], "my db#[x]", "u=v", " p'\"\\");
        assert_eq!(
            *text(&credential, "app", None).unwrap(),
            "[app]\nhost=a,b\nport=1,2\ndbname=my db#[x]\nuser=u=v\npassword= p'\"\\\ntarget_session_attrs=read-write\n"
        );
        let mut protected = with("app", "u", "p");
        protected.protection = vec![
            ("PGSSLMODE", "require".to_owned()),
            ("PGREQUIREAUTH", "scram-sha-256,none".to_owned()),
            ("PGCHANNELBINDING", "require".to_owned()),
        ];
        let protected = text(&protected, "app", None).unwrap();
        assert!(protected.ends_with("\nsslmode=require\nchannel_binding=require\n"));
        let named = text(&credential, "app", Some(Path::new("/run/app/pgpass"))).unwrap();
        assert!(named.contains("\npassfile=/run/app/pgpass\n") && !named.contains("password"));
    }

    /// A line break would set another parameter, such as `host`.
    #[test]
    fn what_a_line_cannot_hold_is_refused() {
        for value in [
            "x\nhost=attacker",
            "x\r",
            "x ",
            "x\t",
            "",
            &"x".repeat(1000),
        ] {
            for (name, credential) in [
                ("database", with(value, "u", "p")),
                ("username", with("d", value, "p")),
                ("password", with("d", "u", value)),
            ] {
                let refused = text(&credential, "app", None).unwrap_err();
                assert!(
                    refused.contains(name) && !refused.contains("attacker"),
                    "{refused}"
                );
            }
        }
        assert!(is_name("app") && !is_name("a]\n[b") && !is_name("") && !is_name("a b"));
    }
}
