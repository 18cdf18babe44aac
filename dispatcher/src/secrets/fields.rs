//! Reading the members of a JSON object one by one, collecting what is wrong with each.

use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Object;
use crate::error::Problems;

/// Adds a reason to a field.
pub(super) fn add(problems: &mut Problems, field: impl Into<String>, reason: impl Into<String>) {
    problems
        .entry(field.into())
        .or_default()
        .push(reason.into());
}

/// The members of one object.
pub(super) struct Fields<'a> {
    object: &'a Object,
    place: &'a str,
    problems: &'a mut Problems,
}

impl<'a> Fields<'a> {
    pub(super) fn new(object: &'a Object, place: &'a str, problems: &'a mut Problems) -> Self {
        Self {
            object,
            place,
            problems,
        }
    }

    pub(super) fn problem(&mut self, name: &str, reason: impl Into<String>) {
        add(self.problems, format!("{}.{name}", self.place), reason);
    }

    /// Reports every member whose name is not in this list.
    pub(super) fn known(&mut self, names: &[&str]) {
        for name in self
            .object
            .keys()
            .filter(|name| !names.contains(&name.as_str()))
        {
            add(
                self.problems,
                format!("{}.{name}", self.place),
                format!("is not known here; known: {}", names.join(", ")),
            );
        }
    }

    /// A member that may be absent. `null` is absent.
    pub(super) fn value(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// A text that is not empty and has no NUL.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        match self.value(name)? {
            Value::String(text) if text.is_empty() => self.problem(name, "must not be empty"),
            Value::String(text) if text.contains('\0') => {
                self.problem(name, "must not contain a NUL")
            }
            Value::String(text) => return Some(text.clone()),
            _ => self.problem(name, "must be a string"),
        }
        None
    }

    /// A member that is one of a few words. `wanted` lists them for the message.
    pub(super) fn word<T: DeserializeOwned>(&mut self, name: &str, wanted: &str) -> Option<T> {
        let word = serde_json::from_value(Value::String(self.text(name)?));
        if word.is_err() {
            self.problem(name, wanted);
        }
        word.ok()
    }

    pub(super) fn needed_text(&mut self, name: &str) -> Option<String> {
        self.needed(name);
        self.text(name)
    }

    /// A host, or a list of hosts. A list becomes one text with commas.
    pub(super) fn needed_host(&mut self, name: &str) -> Option<String> {
        let Some(Value::Array(list)) = self.value(name) else {
            return self.needed_text(name);
        };
        let hosts: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
        match hosts {
            Some(hosts) if !hosts.is_empty() && !hosts.iter().any(|host| host.contains(',')) => {
                Some(hosts.join(","))
            }
            _ => {
                self.problem(name, "must be a host, or a list of hosts");
                None
            }
        }
    }

    /// Whether the object has this member.
    pub(super) fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// Whether a member is this word.
    pub(super) fn is(&self, name: &str, word: &str) -> bool {
        self.value(name).and_then(Value::as_str) == Some(word)
    }

    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<u64>) -> Option<u64> {
        self.integer_or(name, range, "")
    }

    /// An integer, or a word if the caller accepts one.
    pub(super) fn integer_or(
        &mut self,
        name: &str,
        range: RangeInclusive<u64>,
        word: &str,
    ) -> Option<u64> {
        let number = self
            .value(name)?
            .as_u64()
            .filter(|number| range.contains(number));
        if number.is_none() {
            let (first, last) = (range.start(), range.end());
            let mut reason = format!("must be an integer from {first} to {last}");
            if !word.is_empty() {
                reason.push_str(&format!(", or {word:?}"));
            }
            self.problem(name, reason);
        }
        number
    }

    pub(super) fn boolean(&mut self, name: &str) -> Option<bool> {
        let truth = self.value(name)?.as_bool();
        if truth.is_none() {
            self.problem(name, "must be true or false");
        }
        truth
    }

    pub(super) fn needed_integer(&mut self, name: &str, range: RangeInclusive<u64>) -> Option<u64> {
        self.needed(name);
        self.integer(name, range)
    }

    /// A PostgreSQL database name.
    pub(super) fn database(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        if text.len() > 63 {
            self.problem(
                name,
                format!("a database name has 1 to 63 bytes, this has {}", text.len()),
            );
            return None;
        }
        Some(text)
    }

    /// A text that is parsed as a name of this type.
    pub(super) fn parsed<T: FromStr<Err: std::fmt::Display>>(
        &mut self,
        name: &str,
        text: &str,
    ) -> Option<T> {
        match text.parse() {
            Ok(parsed) => Some(parsed),
            Err(error) => {
                self.problem(name, error.to_string());
                None
            }
        }
    }

    fn needed(&mut self, name: &str) {
        if self.value(name).is_none() {
            self.problem(name, "is needed");
        }
    }
}
