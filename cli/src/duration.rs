//! Durations: `90`, `90s`, `15m`, `24h` or `7d`, in seconds for the API.

/// Reads a duration in seconds. It must be positive.
pub(crate) fn seconds(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(FORM.into()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(FORM.into());
    }
    match digits
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(factor))
    {
        Some(0) => Err("must be positive".into()),
        Some(seconds) => Ok(seconds),
        None => Err("is too long".into()),
    }
}

const FORM: &str = "a duration is a whole number of seconds, or a number with s, m, h or d, such as 90, 15m or 24h";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_become_seconds() {
        for (text, expected) in [
            ("1", 1),
            ("90", 90),
            ("90s", 90),
            ("15m", 900),
            ("24h", 86_400),
            ("7d", 604_800),
        ] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "s",
            "0",
            "0h",
            "-1",
            "+1",
            "1.5h",
            "1h30m",
            "1 h",
            " 1",
            "1w",
            "1H",
            "h1",
            "18446744073709551616",
            "18446744073709551615d",
            "١",
        ] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }
}
