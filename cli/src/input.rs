//! JSON that a person writes: JSON5 (comments, trailing commas), given as text, as `@file`, or as `-` for standard
//! input. A value that plain JSON cannot hold (a duplicate name, NaN) is refused, because the dispatcher would read
//! something else.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::failure::Failure;

const INPUT_BYTES: u64 = 1 << 20;
const INPUT_DEPTH: u32 = 64;

/// The inputs of one command; standard input can be only one of them.
#[derive(Default)]
pub(crate) struct Inputs {
    stdin_of: Option<&'static str>,
}

impl Inputs {
    /// The JSON given with an option.
    pub(crate) fn json(&mut self, option: &'static str, given: &str) -> Result<Value, Failure> {
        let (text, source) = match given.strip_prefix('@') {
            _ if given == "-" => (self.stdin(option)?, "standard input".to_owned()),
            Some("-") => (self.stdin(option)?, "standard input".to_owned()),
            Some(name) => {
                let text = File::open(name).and_then(text).map_err(|error| {
                    Failure::Usage(format!("{option}: cannot read {name}: {error}"))
                })?;
                (text, name.to_owned())
            }
            None => (given.to_owned(), "the given text".to_owned()),
        };
        parse(&text)
            .map_err(|reason| Failure::Usage(format!("{option}: {source} is not JSON: {reason}")))
    }

    fn stdin(&mut self, option: &'static str) -> Result<String, Failure> {
        if let Some(other) = self.stdin_of.replace(option) {
            return Err(Failure::Usage(format!(
                "{other} and {option} cannot both be read from standard input"
            )));
        }
        text(io::stdin()).map_err(|error| {
            Failure::Usage(format!("{option}: cannot read standard input: {error}"))
        })
    }
}

/// The content of a text file without white space at both ends and without a byte order mark, which editors and
/// shells of Windows write.
pub(crate) fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}')
}

fn text(source: impl Read) -> io::Result<String> {
    let mut text = String::new();
    source.take(INPUT_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > INPUT_BYTES {
        return Err(io::Error::other(format!(
            "it has more than {INPUT_BYTES} bytes"
        )));
    }
    Ok(text)
}

/// Reads JSON5; the reason names line and column.
fn parse(text: &str) -> Result<Value, String> {
    // Without the byte order mark the positions in messages are those of the file.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err("it is empty".into());
    }
    match json5::from_str::<Plain>(text) {
        Ok(Plain(value)) => Ok(value),
        // This error has the position of the bracket that is not closed, or no position.
        Err(error) if error.code().is_some_and(ends_too_early) => {
            let end = json5::Position::from_offset(text.len(), text);
            Err(format!("it ends unexpectedly, at {end}"))
        }
        Err(error) => Err(error.to_string()),
    }
}

fn ends_too_early(code: json5::ErrorCode) -> bool {
    use json5::ErrorCode as Code;
    matches!(
        code,
        Code::EofParsingArray
            | Code::EofParsingBool
            | Code::EofParsingComment
            | Code::EofParsingEscapeSequence
            | Code::EofParsingIdentifier
            | Code::EofParsingNull
            | Code::EofParsingNumber
            | Code::EofParsingObject
            | Code::EofParsingString
            | Code::EofParsingValue
    )
}

/// A value that every reader of JSON understands in the same way.
struct Plain(Value);

impl<'de> Deserialize<'de> for Plain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Inside(INPUT_DEPTH).deserialize(deserializer).map(Self)
    }
}

/// Reads a value, with at most this number of further levels of arrays and objects.
#[derive(Clone, Copy)]
struct Inside(u32);

impl Inside {
    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        match self.0.checked_sub(1) {
            Some(left) => Ok(Self(left)),
            None => Err(E::custom(format!("more than {INPUT_DEPTH} levels"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Inside {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Inside {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        match serde_json::Number::from_f64(value) {
            Some(number) => Ok(Value::Number(number)),
            None => Err(E::custom("a number that JSON cannot hold")),
        }
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inside = self.deeper()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inside)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let inside = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            let value = members.next_value_seed(inside)?;
            if map.contains_key(&key) {
                return Err(de::Error::custom(format!("the object has {key:?} twice")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_documented_base_secret_reads_as_written() {
        let body = r#"{ "path": "db:postgresql:root", "attributes": {"type": "postgresql"}, "description": "postgresql root credentials",
  "data": {"host": "…", "password": "P@ssword!", "port": 3306, "username": "admin"} }"#;
        let value = parse(body).unwrap();
        assert_eq!(
            value,
            json!({"path": "db:postgresql:root", "attributes": {"type": "postgresql"},
                "description": "postgresql root credentials",
                "data": {"host": "…", "password": "P@ssword!", "port": 3306, "username": "admin"}})
        );
        assert!(
            value.to_string().contains(r#""port":3306,"#),
            "an integer stays one: {value}"
        );
    }

    #[test]
    fn the_documented_dynamic_secret_reads_with_its_trailing_commas() {
        let body = r#"{ "path": "db:postgresql:dyn1",
  "attributes": { "grantPermissions": {"what": "SELECT", "where": "*.*"},
    "linkConfig": {"linkType": "dynamic", "linkedSecret": "db:postgresql:root"}, "pool": "pool1", "ttl": 1000, },
  "data": {}, }"#;
        let value = parse(body).unwrap();
        assert_eq!(value["attributes"]["grantPermissions"]["where"], "*.*");
        assert_eq!(value["data"], json!({}));
        assert!(
            value
                .to_string()
                .ends_with(r#""ttl":1000},"data":{},"path":"db:postgresql:dyn1"}"#),
            "{value}"
        );
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_file() {
        assert_eq!(parse("\u{feff}{a: 1}").unwrap(), json!({"a": 1}));
        assert_eq!(parse("\u{feff}\r\n").unwrap_err(), "it is empty");
        assert_eq!(trimmed("\u{feff} token\r\n"), "token");
    }

    #[test]
    fn json5_becomes_json() {
        let value = parse(
            "// one\n{a: 'x', /* two */ b: [1, -2, 0x10, 1.5, +3, 18446744073709551615,], c: null}",
        )
        .unwrap();
        assert_eq!(
            value.to_string(),
            r#"{"a":"x","b":[1,-2,16,1.5,3,18446744073709551615],"c":null}"#
        );
        assert_eq!(parse("3306.0").unwrap().to_string(), "3306.0");
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (text, place) in [
            ("{\"a\": 1\n \"b\": 2}", "line 2 column 2"),
            ("{\"a\":\n  [1, 2", "line 2 column 8"),
            ("{\n", "line 2 column 1"),
            ("{} x", "line 1 column 4"),
            ("\"unfinished", "line 1 column 12"),
            (
                "{\n \"a\": {\"x\": 1, \"x\": 2}}",
                "the object has \"x\" twice at line 2",
            ),
            ("[NaN]", "line 1 column 2"),
            ("[1e999]", "line 1 column 2"),
        ] {
            let reason = parse(text).unwrap_err();
            assert!(reason.contains(place), "{text:?}: {reason}");
        }
        assert!(parse(&"[".repeat(100_000)).unwrap_err().contains("levels"));
        assert_eq!(parse(" \n").unwrap_err(), "it is empty");
    }

    #[test]
    fn files_are_read_and_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{a: }").unwrap();
        let name = file.path().display().to_string();
        let failure = Inputs::default()
            .json("--body", &format!("@{name}"))
            .unwrap_err();
        assert!(
            failure
                .to_string()
                .starts_with(&format!("--body: {name} is not JSON:")),
            "{failure}"
        );
        assert!(failure.to_string().contains("line 1 column 5"), "{failure}");
        assert_eq!(failure.exit_code(), 2);
        assert_eq!(
            Inputs::default()
                .json("--body", "@/no/such/file")
                .unwrap_err()
                .exit_code(),
            2
        );
    }

    #[test]
    fn standard_input_is_read_once() {
        let mut inputs = Inputs {
            stdin_of: Some("--data"),
        };
        let failure = inputs.json("--attributes", "-").unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        assert!(
            failure.to_string().starts_with("--data and --attributes"),
            "{failure}"
        );
    }
}
