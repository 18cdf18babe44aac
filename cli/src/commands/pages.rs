//! Lists, which come in pages. By default one page is shown; with `--all` all pages are joined.

use serde_json::Value;

use crate::client::Api;
use crate::failure::Failure;
use crate::options::PageArgs;
use crate::route::Route;

/// Requests a list. `route` makes the path without limit and cursor. `member` is the member of the answer that has
/// the items.
pub(crate) async fn list(
    api: &Api,
    route: impl Fn() -> Route,
    member: &str,
    page: &PageArgs,
) -> Result<Value, Failure> {
    let at = |cursor: Option<&str>| route().with("limit", page.limit).with("cursor", cursor);
    let mut answer = api.get(&at(page.cursor.as_deref())).await?;
    if !page.all {
        return Ok(answer);
    }
    let mut items = take(&mut answer, member);
    let mut cursor = cursor_of(&answer);
    while let Some(at_cursor) = cursor {
        answer = api.get(&at(Some(&at_cursor))).await?;
        items.append(&mut take(&mut answer, member));
        cursor = cursor_of(&answer);
        if cursor.as_ref() == Some(&at_cursor) {
            return Err(Failure::Local("the list does not end".into()));
        }
    }
    if let Value::Object(members) = &mut answer {
        members.insert("length".into(), items.len().into());
        members.insert(member.into(), Value::Array(items));
    }
    Ok(answer)
}

fn take(answer: &mut Value, member: &str) -> Vec<Value> {
    match answer.get_mut(member).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => Vec::new(),
    }
}

fn cursor_of(answer: &Value) -> Option<String> {
    let cursor = answer.get("cursor")?.as_str()?;
    (!cursor.is_empty()).then(|| cursor.to_owned())
}
