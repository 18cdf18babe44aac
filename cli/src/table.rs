//! Answers for a person: lists as columns, single objects as names and values. Control characters are shown as
//! escapes.

use comfy_table::{Table, presets};
use jiff::{Timestamp, Zoned};
use serde_json::Value;

use crate::filter::raw;
use crate::ui::{self, printable};

/// Form of an answer.
pub(crate) enum View {
    /// One object: a line for each of its fields.
    Record,
    /// A page of a list: the member that holds it, and the columns to show.
    List(&'static str, &'static [Column]),
    /// `GET /v1/status`: a record with a list in it.
    Status,
    /// The differences that a reconciliation found: a record with two lists in it.
    Differences,
    /// The findings of a check, and the statements that correct them.
    Findings,
    /// The result of tidying, for one server or several.
    Tidied,
}

/// A heading, and the JSON pointers (RFC 6901) under which its value may be.
pub(crate) struct Column(pub(crate) &'static str, pub(crate) &'static [&'static str]);

const POOLS: &[Column] = &[
    Column("POOL", &["/name"]),
    Column("ENGINES", &["/engines"]),
    Column("PENDING", &["/leases/pending"]),
    Column("ACTIVE", &["/leases/active"]),
    Column("REVOKING", &["/leases/revoking"]),
    Column("STUCK", &["/stuck"]),
    Column("OVERDUE", &["/overdue"]),
];

const DIFFERENCES: &[Column] = &[
    Column("DIFFERENCE", &["/kind"]),
    Column("PATH", &["/path"]),
    Column("POOL", &["/pool"]),
    Column("ROLE", &["/role"]),
    Column("LEASE", &["/lease"]),
    Column("INSTALLATION", &["/installation"]),
    Column("STORE SAYS", &["/storeExpiration"]),
    Column("DATABASE SAYS", &["/databaseExpiration"]),
    Column("ACTION", &["/action"]),
];

const UNREACHABLE: &[Column] = &[
    Column("NOT ASKED", &["/path"]),
    Column("POOL", &["/pool"]),
    Column("ERROR", &["/error"]),
    Column("MESSAGE", &["/message"]),
];

/// Members of an object that come first, in this order. The other members follow in the order of the answer.
const FIRST: &[&str] = &[
    "path",
    "name",
    "id",
    "token",
    "version",
    "broker",
    "description",
    "state",
    "pool",
];

impl View {
    /// The answer as text, with colours if requested.
    pub(crate) fn text(&self, answer: &Value, colours: bool) -> String {
        match self {
            View::Record => record(answer),
            View::List(member, columns) => columns_of(items(answer, member), columns, colours),
            View::Status => with_lists(answer, &[("pools", POOLS)], colours),
            View::Differences => with_lists(
                answer,
                &[("differences", DIFFERENCES), ("unreachable", UNREACHABLE)],
                colours,
            ),
            View::Findings => findings(answer),
            View::Tidied => tidied(answer),
        }
    }

    /// Prints notes under a table: that the list is empty or has more pages, or how long a credential is valid.
    pub(crate) fn remark(&self, answer: &Value) {
        if let View::Record = self
            && let Some(text) = validity(answer, &Zoned::now())
        {
            ui::note(&text);
        }
        let View::List(member, _) = self else { return };
        if items(answer, member).is_empty() {
            ui::note(&format!("no {member}"));
        }
        match answer.get("cursor").and_then(Value::as_str) {
            None | Some("") => {}
            Some(cursor) => ui::note(&format!(
                "there are more rows: use --all, or --cursor {cursor}"
            )),
        }
    }
}

/// How long a credential is valid, in the terminal's time zone.
fn validity(answer: &Value, now: &Zoned) -> Option<String> {
    answer.pointer("/data/leaseId")?;
    let end = answer.pointer("/data/expiration")?.as_str()?;
    let end: Timestamp = end.parse().ok()?;
    let seconds = end.duration_since(now.timestamp()).as_secs();
    let end = end.to_zoned(now.time_zone().clone());
    let date = match end.date() == now.date() {
        true => end.strftime("%H:%M:%S %Z"),
        false => end.strftime("%Y-%m-%d %H:%M:%S %Z"),
    };
    let left = match seconds {
        ..=0 => return Some(format!("the credential has ended at {date}")),
        1..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min {} s", seconds / 60, seconds % 60),
        7_200..172_800 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} days", seconds / 86_400),
    };
    Some(format!("valid for {left}, until {date}"))
}

/// A record, and its lists below it.
fn with_lists(answer: &Value, lists: &[(&str, &[Column])], colours: bool) -> String {
    let mut head = answer.clone();
    if let Value::Object(members) = &mut head {
        members.retain(|member, _| lists.iter().all(|(name, _)| member != name));
    }
    let mut text = record(&head);
    for (name, columns) in lists {
        let table = columns_of(items(answer, name), columns, colours);
        text = format!("{}\n\n{table}", text.trim_end());
    }
    text.trim_end().to_owned()
}

fn items<'a>(answer: &'a Value, member: &str) -> &'a [Value] {
    answer
        .get(member)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// The columns in which at least one item has a value.
fn columns_of(items: &[Value], columns: &[Column], colours: bool) -> String {
    let cell = |item: &Value, Column(_, places): &Column| {
        places
            .iter()
            .find_map(|place| item.pointer(place))
            .map(brief)
            .unwrap_or_default()
    };
    let shown: Vec<&Column> = columns
        .iter()
        .filter(|column| items.iter().any(|item| !cell(item, column).is_empty()))
        .collect();
    if shown.is_empty() {
        return String::new();
    }
    let mut table = table();
    table.set_header(shown.iter().map(|Column(heading, _)| *heading));
    for item in items {
        table.add_row(shown.iter().map(|column| cell(item, column)));
    }
    let text = finish(table);
    match text.split_once('\n') {
        Some((heading, rows)) if colours => format!("\x1b[1m{heading}\x1b[0m\n{rows}"),
        _ => text,
    }
}

fn text_at<'a>(value: &'a Value, member: &str) -> &'a str {
    value
        .get(member)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn findings(answer: &Value) -> String {
    let found = items(answer, "findings");
    let mut table = table();
    for one in found {
        let ok = one.get("ok") == Some(&Value::Bool(true));
        table.add_row([
            if ok { "ok" } else { "NOT OK" }.to_owned(),
            printable(text_at(one, "check")),
            printable(text_at(one, "message")),
        ]);
    }
    let mut text = finish(table);
    let fix: Vec<String> = found
        .iter()
        .flat_map(|one| items(one, "fix"))
        .filter_map(Value::as_str)
        .map(printable)
        .collect();
    if !fix.is_empty() {
        text.push_str(
            "\n\n-- The admin lacks these rights. Run this as a role that may grant them:\n",
        );
        text.push_str(&fix.join("\n"));
    }
    text
}

fn tidied(answer: &Value) -> String {
    let one = [answer.clone()];
    let servers = match answer.get("servers").and_then(Value::as_array) {
        Some(servers) => servers.as_slice(),
        None => &one,
    };
    let mut table = table();
    for server in servers {
        let path = printable(text_at(server, "path"));
        let mut row = |what: &str, role: &str, reason: &str| {
            table.add_row([
                path.clone(),
                what.to_owned(),
                printable(role),
                printable(reason),
            ]);
        };
        for role in items(server, "removed").iter().filter_map(Value::as_str) {
            row("removed", role, "");
        }
        for kept in items(server, "kept") {
            row("stays", text_at(kept, "role"), text_at(kept, "reason"));
        }
        if let Some(error) = server.get("error").and_then(Value::as_str) {
            row("FAILED", "", error);
        } else if items(server, "removed").is_empty() && items(server, "kept").is_empty() {
            row("nothing", "", "");
        }
    }
    finish(table)
}

fn record(answer: &Value) -> String {
    let mut rows = Vec::new();
    flatten("", answer, &mut rows);
    let mut table = table();
    table.add_rows(rows);
    finish(table)
}

/// Adds the members of a value. Names of nested members are joined by dots, as in `--filter`.
fn flatten(name: &str, value: &Value, rows: &mut Vec<[String; 2]>) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(key, value)| {
                let place = FIRST
                    .iter()
                    .position(|first| first == key)
                    .unwrap_or(FIRST.len());
                (if name.is_empty() { place } else { 0 }, value.is_object())
            });
            for (key, value) in members {
                let name = if name.is_empty() {
                    key.clone()
                } else {
                    format!("{name}.{key}")
                };
                flatten(&name, value, rows);
            }
        }
        Value::Object(_) => {}
        value => rows.push([printable(name), brief(value)]),
    }
}

/// A value on one line.
fn brief(value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(false) => String::new(),
        Value::Bool(true) => "yes".into(),
        Value::Array(items) if !items.iter().any(Value::is_object) => {
            items.iter().map(brief).collect::<Vec<_>>().join(", ")
        }
        Value::Array(_) | Value::Object(_) => printable(&value.to_string()),
        value => printable(&raw(value)),
    }
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

/// Formats a table. Columns are two spaces apart and are never broken into lines, so that ids can be copied.
fn finish(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_credential_has_the_time_that_is_left() {
        let now: Zoned = "2026-11-26T12:00:00+00:00[UTC]".parse().unwrap();
        for (end, text) in [
            (
                "2026-11-26T12:01:40Z",
                "valid for 100 s, until 12:01:40 UTC",
            ),
            (
                "2026-11-26T12:16:40Z",
                "valid for 16 min 40 s, until 12:16:40 UTC",
            ),
            (
                "2026-11-27T11:30:00Z",
                "valid for 23 h 30 min, until 2026-11-27 11:30:00 UTC",
            ),
            (
                "2026-12-26T12:00:00Z",
                "valid for 30 days, until 2026-12-26 12:00:00 UTC",
            ),
            (
                "2026-11-26T11:59:59Z",
                "the credential has ended at 11:59:59 UTC",
            ),
        ] {
            let answer = json!({"data": {"leaseId": "l", "expiration": end}});
            assert_eq!(validity(&answer, &now).unwrap(), text);
        }
        assert!(
            validity(
                &json!({"data": {"expiration": "2026-11-26T12:00:00Z"}}),
                &now
            )
            .is_none()
        );
    }

    #[test]
    fn a_list_shows_the_columns_that_have_something() {
        let answer = json!({"leases": [
            {"id": "1", "path": "db:a", "stuck": false, "lastError": null},
            {"id": "22", "path": "db:b\u{1b}[2J", "stuck": false},
        ]});
        let columns: &'static [Column] = &[
            Column("ID", &["/id"]),
            Column("PATH", &["/path"]),
            Column("STUCK", &["/stuck"]),
            Column("ERROR", &["/lastError"]),
        ];
        let text = View::List("leases", columns).text(&answer, false);
        assert_eq!(text, "ID  PATH\n1   db:a\n22  db:b\\u{1b}[2J");
        let empty = json!({"leases": []});
        assert_eq!(View::List("leases", columns).text(&empty, true), "");
    }

    #[test]
    fn a_thing_shows_its_names_as_a_filter_takes_them() {
        let answer = json!({"attributes": {"ttl": 60, "list": ["a", "b"]}, "id": "x", "path": "db:a",
            "data": {"password": "p", "tags": {}}, "version": "1", "created": "then"});
        assert_eq!(
            View::Record.text(&answer, false),
            "path             db:a\nid               x\nversion          1\ncreated          then\n\
             attributes.list  a, b\nattributes.ttl   60\ndata.password    p"
        );
    }

    #[test]
    fn findings_end_with_the_statements_that_help() {
        let answer = json!({"ok": false, "findings": [
            {"check": "tls", "ok": true, "message": "TLSv1.3", "fix": []},
            {"check": "grant", "ok": false, "message": "no\u{1b}", "fix": ["GRANT a;", "GRANT b;"]},
        ]});
        assert_eq!(
            View::Findings.text(&answer, true),
            "ok      tls    TLSv1.3\nNOT OK  grant  no\\u{1b}\n\n\
             -- The admin lacks these rights. Run this as a role that may grant them:\nGRANT a;\nGRANT b;"
        );
    }

    #[test]
    fn tidying_tells_what_went_and_what_stays() {
        let one = json!({"path": "db:a", "removed": ["g1"], "kept": [{"role": "q", "reason": "it owns"}]});
        let text = "db:a  removed  g1\ndb:a  stays    q   it owns";
        assert_eq!(View::Tidied.text(&one, false), text);
        let all = json!({"servers": [one, {"path": "db:b", "error": "no engine"}]});
        assert_eq!(
            View::Tidied.text(&all, false),
            format!("{text}\ndb:b  FAILED       no engine")
        );
    }

    #[test]
    fn status_is_a_record_and_its_pools() {
        let answer = json!({"version": "1", "broker": "up", "pools": [{"name": "p", "engines": 0,
            "leases": {"pending": 0, "active": 2, "revoking": 0}, "stuck": 0, "overdue": 0}]});
        assert_eq!(
            View::Status.text(&answer, false),
            "version  1\nbroker   up\n\n\
             POOL  ENGINES  PENDING  ACTIVE  REVOKING  STUCK  OVERDUE\n\
             p     0        0        2       0         0      0"
        );
    }
}
