//! The windows of the programs under test, taken from their code, so that no test has a number of its own.

use mayfly_protocol::timing::timing;
use std::time::Duration;

use crate::seconds;

/// The setting with which the dispatcher's own deadline of a create is replaced.
const CREATE_DEADLINE: &str = "MAYFLY__CREATE__DEADLINE_SECONDS";
/// The dispatcher's own deadline of a create (`dispatcher/src/default.toml`).
const DEFAULT_CREATE_DEADLINE: Duration = seconds(30);

/// A setting for tests that wait until an end is final. It is long enough for a read on a busy machine.
pub const SOON_FINAL: (&str, &str) = (CREATE_DEADLINE, "10");

/// The longest time from a read until the absence of its account is final, with these settings of the
/// dispatcher: its create can commit no more, and an engine has looked since then.
pub fn final_within(settings: &[(String, String)]) -> Duration {
    let set = settings.iter().rfind(|(key, _)| key == CREATE_DEADLINE);
    let deadline = set.map_or(DEFAULT_CREATE_DEADLINE, |(_, value)| {
        seconds(value.parse().unwrap())
    });
    deadline + timing().over_after() + seconds(6)
}
