//! The windows of the tested programs, taken from their code, so that no test has a number of its own.

use std::time::Duration;

use mayfly_protocol::timing::Timing;

use crate::seconds;

/// The variable by which programs with fault points take other windows.
const WINDOWS: &str = "MAYFLY_TEST_WINDOWS";
/// The setting that replaces the dispatcher's own deadline of a create.
const CREATE_DEADLINE: &str = "MAYFLY__CREATE__DEADLINE_SECONDS";
/// The dispatcher's own deadline of a create (`dispatcher/src/default.toml`).
const DEFAULT_CREATE_DEADLINE: Duration = seconds(30);

/// Has dispatcher and engines of a system use [`Timing::SHORT`]. Not for tests that suspend a process, move a
/// clock, or mix programs of two versions: these prove the windows that are in use.
pub const SHORT_WINDOWS: (&str, &str) = (WINDOWS, "short");

/// Settings for tests that wait until an end is final: at most 20 s after the read, instead of 54 s. The
/// deadline is long enough for a read on a busy machine.
pub const SOON_FINAL: [(&str, &str); 2] = [SHORT_WINDOWS, (CREATE_DEADLINE, "10")];

fn setting<'a>(settings: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let set = settings.iter().rfind(|(key, _)| key == name);
    set.map(|(_, value)| value.as_str())
}

/// The longest time from a read until the absence of its account is final, with these settings of a system:
/// its create can commit no more, and an engine has looked since then.
pub fn final_within(settings: &[(String, String)]) -> Duration {
    let timing = match setting(settings, WINDOWS) {
        Some("short") => Timing::SHORT,
        _ => Timing::STANDARD,
    };
    let deadline = setting(settings, CREATE_DEADLINE).map_or(DEFAULT_CREATE_DEADLINE, |value| {
        seconds(value.parse().unwrap())
    });
    deadline + timing.over_after() + seconds(6)
}

/// The windows of a system, for its engines.
pub(crate) fn of_engines(settings: &[(String, String)]) -> Option<(&str, &str)> {
    setting(settings, WINDOWS).map(|windows| (WINDOWS, windows))
}
