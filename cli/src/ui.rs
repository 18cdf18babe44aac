//! Writes to standard error what a person should know in addition to the answer. It never panics, even if standard
//! error is closed.

use std::io::{self, IsTerminal, Write};

use crate::failure::Failure;

/// Prints why the command failed.
pub(crate) fn error(failure: &Failure) {
    labelled("error:", "31", &failure.to_string());
}

/// Prints a problem that does not change the answer.
pub(crate) fn warning(text: &str) {
    labelled("warning:", "33", text);
}

/// Prints the `warnings` of an answer.
pub(crate) fn warnings(answer: &serde_json::Value) {
    let warnings = answer.get("warnings").and_then(|it| it.as_array());
    for text in warnings.into_iter().flatten().filter_map(|it| it.as_str()) {
        warning(text);
    }
}

/// Prints a remark for a person. It is dropped unless standard error is a terminal.
pub(crate) fn note(text: &str) {
    if io::stderr().is_terminal() {
        line(&text_lines(text));
    }
}

/// Prints what is about to be done, even without a terminal.
pub(crate) fn plan(text: &str) {
    line(&text_lines(text));
}

/// Whether a terminal gets colours (`NO_COLOR`, `TERM`): <https://no-color.org>.
pub(crate) fn colours() -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
}

fn labelled(label: &str, colour: &str, text: &str) {
    let text = text_lines(text);
    if io::stderr().is_terminal() && colours() {
        line(&format!("\x1b[1;{colour}m{label}\x1b[0m {text}"));
    } else {
        line(&format!("{label} {text}"));
    }
}

/// The text with its line breaks, and without anything else that could move a terminal's cursor.
fn text_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

/// The text with its control characters shown as escapes.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c.is_control() {
            true => c.escape_default().collect::<Vec<_>>(),
            false => vec![c],
        })
        .collect()
}

fn line(text: &str) {
    // If writing fails here, it cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "{text}");
}
