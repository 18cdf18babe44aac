//! A template of the user, in the language of Jinja (<https://docs.rs/minijinja>). It has the fields of the JSON
//! file, and `jdbcUrl`. The name of its output file decides how values are escaped: as JSON in `.json`, `.yaml` and
//! `.js`, and as text of the document in `.html` and `.xml`. In all other files values are not escaped, unless a
//! filter does it: `shell`, `conninfo`, `urlencode`, `tojson`.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use zeroize::Zeroizing;

use super::{jdbc, json};
use crate::credential::Credential;
use crate::failure::Failure;

/// Largest template, in bytes.
const TEMPLATE_BYTES: u64 = 1 << 20;

/// A template that has been parsed.
pub(crate) struct Template {
    environment: Environment<'static>,
    /// The name of its output file.
    name: String,
}

impl Template {
    /// Reads and parses a template. `file` is its output file.
    ///
    /// # Errors
    /// The source cannot be read or is not a template. The message has the line.
    pub(crate) fn read(source: &Path, file: &Path) -> Result<Self, Failure> {
        let wrong =
            |reason: String| Failure::Usage(format!("the template {}: {reason}", source.display()));
        let size = std::fs::metadata(source).map_err(|error| wrong(error.to_string()))?;
        if size.len() > TEMPLATE_BYTES {
            return Err(wrong(format!("it has more than {TEMPLATE_BYTES} bytes")));
        }
        let text = std::fs::read_to_string(source).map_err(|error| wrong(error.to_string()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        Self::parse(name.into_owned(), text).map_err(wrong)
    }

    fn parse(name: String, text: String) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.add_filter("shell", |text: String| shell(&text));
        environment.add_filter("conninfo", |text: String| conninfo(&text));
        environment
            .add_template_owned(name.clone(), text)
            .map_err(|error| error.to_string())?;
        Ok(Self { environment, name })
    }

    pub(super) fn text(&self, credential: &Credential) -> Result<Zeroizing<String>, String> {
        let mut fields = json::value(credential);
        if let Ok(url) = jdbc::url(credential) {
            fields["jdbcUrl"] = url.as_str().into();
        }
        // The text of an error names the position, and no value.
        let place = |error: minijinja::Error| match error.line() {
            Some(line) => format!("line {line} of its template: {}", error.kind()),
            None => error.kind().to_string(),
        };
        let template = self.environment.get_template(&self.name).map_err(place)?;
        let text = template.render(Serde(fields));
        text.map(Zeroizing::new).map_err(place)
    }
}

/// Quotes a word for a POSIX shell (2.2.2, single quotes).
fn shell(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Quotes a value of a connection string (PostgreSQL documentation, 34.1.1.1).
fn conninfo(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::credential::tests::with;

    fn made(name: &str, template: &str, password: &str) -> String {
        let template = Template::parse(name.to_owned(), template.to_owned()).unwrap();
        let text = template.text(&with("app", "u", password)).unwrap();
        text.to_string()
    }

    #[test]
    fn the_name_of_the_file_decides_how_values_are_escaped() {
        let hostile = "a\"b\\c\nd: e";
        let made_json = made("app.json", "{\"password\": {{ password }}}\n", hostile);
        let read: serde_json::Value = serde_json::from_str(&made_json).unwrap();
        assert_eq!(read["password"], hostile);
        assert!(made("app.yaml", "p: {{ password }}", hostile).starts_with("p: \"a\\\"b"));
        assert_eq!(made("app.conf", "p={{ password }}\n", "a\"b"), "p=a\"b\n");
        assert_eq!(
            made("a.xml", "<p>{{ password }}</p>", "<&"),
            "<p>&lt;&amp;</p>"
        );
    }

    #[test]
    fn filters_escape() {
        for (filter, value, expected) in [
            ("shell", "a'b$(c)", "'a'\\''b$(c)'"),
            ("conninfo", "a'b\\c d", "'a\\'b\\\\c d'"),
            ("urlencode", "a/b c&d", "a%2Fb%20c%26d"),
        ] {
            let template = format!("{{{{ password|{filter} }}}}");
            let made = made("app.conf", &template, value);
            // The engine's own filter keeps a slash, as in Jinja.
            assert_eq!(made.replace('/', "%2F"), expected, "{filter}");
        }
        let made = made("x", "{{ jdbcUrl }} {{ hosts[0].port }}", "&");
        assert_eq!(
            made,
            "jdbc:postgresql://db:5432/app?user=u&password=%26 5432"
        );
    }

    /// A misspelt name is an error and no empty password, and the error has no value.
    #[test]
    fn an_unknown_name_is_refused() {
        let template = Template::parse("x".into(), "\n{{ pasword }}".into()).unwrap();
        let refused = template.text(&with("app", "u", "hunter2")).unwrap_err();
        assert!(
            refused.contains("line 2") && !refused.contains("hunter2"),
            "{refused}"
        );
        assert!(Template::parse("x".into(), "{{ password".into()).is_err());
        let odd = Template::parse("x".into(), "{{ password|int }}".into()).unwrap();
        let refused = odd.text(&with("app", "u", "hunter2")).unwrap_err();
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}
