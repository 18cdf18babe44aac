//! The body of a create or an update, and the content after an update.

use serde_json::Value;

use super::{Content, Object, fields};
use crate::error::{ApiError, Code, Problems};
use mayfly_protocol::names::SecretPath;

/// A JSON object from the text of a request. An empty text is an empty object.
///
/// # Errors
/// `malformed`, with line and column; `invalid` if it is not an object.
pub(crate) fn parse_object(text: &[u8]) -> Result<Object, ApiError> {
    if text.is_empty() {
        return Ok(Object::new());
    }
    match serde_json::from_slice(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::new(
            Code::Malformed,
            "the body must be a JSON object",
        )),
        // serde_json's message ends with line and column, and never repeats a value.
        Err(error) => Err(ApiError::new(
            Code::Malformed,
            format!("the body is not JSON: {error}"),
        )),
    }
}

/// The parts of a body. `None`: the part is not given.
#[derive(Debug, Default)]
pub(crate) struct Body {
    attributes: Option<Object>,
    /// The inner `None` is `null`.
    description: Option<Option<String>>,
    data: Option<Object>,
    overwrite: bool,
    same_server: bool,
}

pub(crate) type Patch = Body;

impl Body {
    /// Parses a body for the secret at `path`.
    ///
    /// # Errors
    /// `invalid`: unknown members, wrong types, another path than the URL's.
    pub(crate) fn parse(
        mut object: Object,
        path: &SecretPath,
        is_update: bool,
    ) -> Result<Self, ApiError> {
        let mut problems = Problems::new();
        let mut body = Self::default();
        let mut members = |name: &str, problems: &mut Problems| match object.remove(name) {
            None | Some(Value::Null) => None,
            Some(Value::Object(members)) => Some(members),
            Some(_) => {
                fields::add(problems, name, "must be an object");
                None
            }
        };
        body.attributes = members("attributes", &mut problems);
        body.data = members("data", &mut problems);
        match object.remove("path") {
            None => {}
            Some(Value::String(text))
                if text.parse::<SecretPath>().is_ok_and(|given| given == *path) => {}
            Some(_) => fields::add(
                &mut problems,
                "path",
                format!("must be the path of the URL, {path}"),
            ),
        }
        body.description = match object.remove("description") {
            None => None,
            Some(Value::Null) => Some(None),
            Some(Value::String(text)) if !text.contains('\0') => Some(Some(text)),
            Some(_) => {
                fields::add(&mut problems, "description", "must be a string without NUL");
                None
            }
        };
        if is_update {
            match object.remove("overwrite") {
                None => {}
                Some(Value::Bool(overwrite)) => body.overwrite = overwrite,
                Some(_) => fields::add(&mut problems, "overwrite", "must be true or false"),
            }
            match object.remove("sameServer") {
                None => {}
                Some(Value::Bool(same_server)) => body.same_server = same_server,
                Some(_) => fields::add(&mut problems, "sameServer", "must be true or false"),
            }
        }
        for name in object.keys() {
            let more = if is_update {
                ", overwrite, sameServer"
            } else {
                ""
            };
            fields::add(
                &mut problems,
                name.as_str(),
                format!("is not known; known: path, attributes, description, data{more}"),
            );
        }
        if problems.is_empty() {
            Ok(body)
        } else {
            Err(ApiError::invalid(problems))
        }
    }

    /// Whether it states that a base secret names the same server at another place.
    pub(crate) fn says_same_server(&self) -> bool {
        self.same_server
    }

    /// Whether it changes nothing.
    pub(crate) fn is_empty(&self) -> bool {
        let given = [
            self.attributes.is_some(),
            self.data.is_some(),
            self.overwrite,
        ];
        !given.contains(&true) && self.description.is_none()
    }

    /// Whether the body gives this member of `data`.
    pub(super) fn gives_data(&self, name: &str) -> bool {
        let data = self.data.as_ref();
        data.is_some_and(|data| data.get(name).is_some_and(|value| !value.is_null()))
    }

    /// The content of a new secret.
    pub(crate) fn into_content(self) -> Content {
        Content {
            attributes: self.attributes.unwrap_or_default(),
            description: self.description.flatten(),
            data: self.data.unwrap_or_default(),
        }
    }

    /// The content after this update. By default the members are merged at the top level, and `null` removes a
    /// member. With `overwrite` the content is replaced.
    pub(crate) fn apply(self, old: Content) -> Content {
        if self.overwrite {
            return self.into_content();
        }
        Content {
            attributes: merge(old.attributes, self.attributes),
            description: self.description.unwrap_or(old.description),
            data: merge(old.data, self.data),
        }
    }
}

fn merge(mut old: Object, new: Option<Object>) -> Object {
    for (name, value) in new.unwrap_or_default() {
        if value.is_null() {
            old.remove(&name);
        } else {
            old.insert(name, value);
        }
    }
    old
}
