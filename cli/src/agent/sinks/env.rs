//! `NAME="value"` lines. They mean the same to POSIX shells (2.2.3, double quotes), to `EnvironmentFile=`
//! (systemd.exec(5)) and to most readers of `.env` files.

use zeroize::Zeroizing;

use crate::credential::Credential;

pub(super) fn text(credential: &Credential) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::new());
    for (name, value) in credential.environment() {
        text.push_str(name);
        text.push('=');
        text.push_str(&quoted(&value));
        text.push('\n');
    }
    text
}

/// The value in double quotes, if it has special characters. Readers without quoting, such as `docker --env-file`,
/// can then read plain values.
fn quoted(value: &str) -> Zeroizing<String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@%,+=?&[]".contains(c);
    if !value.is_empty() && value.chars().all(is_plain) && !value.contains(['?', '&', '[', ']']) {
        return Zeroizing::new(value.to_owned());
    }
    let mut quoted = Zeroizing::new(String::from("\""));
    for c in value.chars() {
        if matches!(c, '"' | '\\' | '$' | '`') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::with;
    use std::process::Command;

    /// A shell takes each value as data, whatever it contains.
    #[test]
    fn a_shell_reads_back_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let hostile = directory.path().join("hostile");
        for value in [
            "plain",
            "with space",
            "'",
            "\"",
            "\\",
            "\\\\\"",
            "a'b\"c`d$e\\f!g#h;i&j|k<l>m*n?o~p(q)r{s}t[u]",
            &format!("$(touch {})", hostile.display()),
            &format!("`touch {}`", hostile.display()),
            "${HOME}",
            "line\nbreak\n\n",
            "é\u{1f600}",
            "=",
            "~",
            " leading and trailing ",
        ] {
            let file = directory.path().join("env");
            std::fs::write(&file, text(&with("app", "u", value)).as_bytes()).unwrap();
            // printf keeps line breaks at the end, which $(…) would remove.
            let read = Command::new("sh")
                .args(["-c", ". \"$1\"; printf %s \"$PGPASSWORD\"", "sh"])
                .arg(&file)
                .output()
                .unwrap();
            assert!(read.status.success(), "{value:?}");
            assert_eq!(String::from_utf8(read.stdout).unwrap(), value, "{value:?}");
            assert!(!hostile.exists(), "{value:?} was run");
        }
    }

    #[test]
    fn what_mayfly_makes_needs_no_quotes() {
        let text = text(&with("app", "mayfly_x4k2qz_b302099a8057", "aZ09-_"));
        assert!(text.starts_with("PGHOST=db\nPGPORT=5432\nPGDATABASE=app\n"));
        assert!(text.contains("\nPGPASSWORD=aZ09-_\n"), "{}", *text);
    }
}
