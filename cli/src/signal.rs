//! Signals by their names, as in kill(1), with or without `SIG`.

use rustix::process::Signal;

const NAMES: &[(&str, Signal)] = &[
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("TERM", Signal::TERM),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
    ("KILL", Signal::KILL),
];

/// Finds a signal by its name.
///
/// # Errors
/// The name is not one of the signals that end or reload programs.
pub(crate) fn named(text: &str) -> Result<Signal, String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let found = NAMES.iter().find(|(known, _)| *known == name);
    found.map(|(_, signal)| *signal).ok_or_else(|| {
        let known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
        format!("a signal is one of {}", known.join(", "))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_kill() {
        for name in ["HUP", "SIGHUP", "hup"] {
            assert_eq!(named(name).unwrap(), Signal::HUP);
        }
        for name in ["", "SIG", "STOP", "1"] {
            assert!(named(name).is_err(), "{name}");
        }
    }
}
