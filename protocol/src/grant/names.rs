//! Names in a `where`: dotted, with stars for all and double quotes around a part with dots, colons
//! or stars.

use super::{GrantError, Scope, refuse};

/// Splits `schema:app` into `schema` and `app`, unless the colon is inside quotes.
pub(super) fn split_kind(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(kind, _)| !kind.contains('"'))
}

/// One part of a dotted name. Plain parts are used as written (no case folding). A part with dots, colons or
/// stars is in double quotes; a quote inside is doubled.
enum Part {
    Name(String),
    Star,
}

fn parse_parts(text: &str) -> Result<Vec<Part>, GrantError> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        if let Some(mut inside) = rest.strip_prefix('"') {
            let mut name = String::new();
            loop {
                let Some(end) = inside.find('"') else {
                    return refuse("where", "a double quote is not closed");
                };
                name.push_str(&inside[..end]);
                inside = &inside[end + 1..];
                match inside.strip_prefix('"') {
                    Some(after) => {
                        name.push('"');
                        inside = after;
                    }
                    None => break,
                }
            }
            parts.push(Part::Name(name));
            match inside.strip_prefix('.') {
                Some(after) => rest = after,
                None if inside.is_empty() => break,
                None => {
                    return refuse(
                        "where",
                        "after a quoted name there must be a dot or the end",
                    );
                }
            }
        } else {
            let (part, after) = match rest.split_once('.') {
                Some((part, after)) => (part, Some(after)),
                None => (rest, None),
            };
            parts.push(if part == "*" {
                Part::Star
            } else {
                Part::Name(part.to_owned())
            });
            match after {
                Some(after) => rest = after,
                None => break,
            }
        }
    }
    for part in &parts {
        if let Part::Name(name) = part {
            if name.is_empty() {
                return refuse(
                    "where",
                    "a name is missing; write *.*, schema.*, schema.table or table",
                );
            }
            if name.len() > 63 || name.contains('\0') {
                return refuse("where", "a PostgreSQL name has 1 to 63 bytes and no NUL");
            }
        }
    }
    Ok(parts)
}

pub(super) fn parse_scope(text: &str) -> Result<Scope, GrantError> {
    let mut parts = parse_parts(text)?.into_iter();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(Part::Star), Some(Part::Star), None) => Ok(Scope::Everywhere),
        (Some(Part::Name(schema)), Some(Part::Star), None) => Ok(Scope::InSchema(schema)),
        (Some(Part::Name(schema)), Some(Part::Name(name)), None) => {
            Ok(Scope::Qualified(schema, name))
        }
        (Some(Part::Name(name)), None, None) => Ok(Scope::Unqualified(name)),
        _ => refuse(
            "where",
            format!(
                "`{text}` is not understood; write *.*, schema.*, schema.table or table, names with dots in double quotes"
            ),
        ),
    }
}

pub(super) fn parse_single(text: &str) -> Result<String, GrantError> {
    let mut parts = parse_parts(text)?.into_iter();
    match (parts.next(), parts.next()) {
        (Some(Part::Name(name)), None) => Ok(name),
        _ => refuse(
            "where",
            format!("`{text}` is not one name; put a name with dots in double quotes"),
        ),
    }
}
