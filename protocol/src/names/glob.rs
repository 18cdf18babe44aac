//! Globs over paths, for read tokens. The holder of such a token chooses the paths that are matched,
//! so the time of a match grows only with the product of the lengths of glob and path.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, SecretPath, refuse};

/// A set of paths for a read token: a path whose segments may contain `*` (any text within the
/// segment); a last segment that is exactly `*` stands for everything below. At most
/// [`PathGlob::MAX_STARS`] stars.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PathGlob(String);
text_name!(PathGlob, PathGlob::stored);

impl FromStr for PathGlob {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let stars = text.matches('*').count();
        if stars > Self::MAX_STARS {
            return refuse(format!(
                "a glob has at most {} `*`, this has {stars}",
                Self::MAX_STARS
            ));
        }
        Self::stored(text)
    }
}

impl PathGlob {
    /// Maximum number of stars in a new glob. More would be a mistake of the author; the matching does not
    /// need the limit.
    pub const MAX_STARS: usize = 16;

    /// A glob from the store. It may be older than the limit on stars and stays valid.
    fn stored(text: &str) -> Result<Self, NameError> {
        // Apart from its stars, a glob is written like a path.
        text.replace('*', "x").parse::<SecretPath>()?;
        Ok(Self(text.replace('/', ":")))
    }

    /// Whether the glob covers the path. Linear in both lengths.
    pub fn matches(&self, path: &SecretPath) -> bool {
        let mut globs = self.0.split(':').peekable();
        let mut segments = path.as_str().split(':');
        while let Some(glob) = globs.next() {
            let Some(segment) = segments.next() else {
                return false;
            };
            if glob == "*" && globs.peek().is_none() {
                return true;
            }
            if !segment_matches(glob, segment) {
                return false;
            }
        }
        segments.next().is_none()
    }
}

/// Whether `glob` covers all of `text`. The parts between stars are searched from left to right, each at its first
/// match after the previous part. A later match would leave less text for the other parts. So each byte is searched
/// for one part only, and `str::find` is linear (two-way string matching).
fn segment_matches(glob: &str, text: &str) -> bool {
    let Some((head, rest)) = glob.split_once('*') else {
        return glob == text;
    };
    let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(mut left) = text
        .strip_prefix(head)
        .and_then(|text| text.strip_suffix(tail))
    else {
        return false;
    };
    for part in middle.split('*') {
        let Some(at) = left.find(part) else {
            return false;
        };
        left = &left[at + part.len()..];
    }
    true
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn globs_cover_what_they_say() {
        let covers = |glob: &str, path: &str| {
            glob.parse::<PathGlob>()
                .unwrap()
                .matches(&path.parse().unwrap())
        };
        assert!(covers("db:app:*", "db:app:one"));
        assert!(covers("db:app:*", "db:app:one:two"));
        assert!(!covers("db:app:*", "db:app"));
        assert!(!covers("db:app:*", "db:apple:one"));
        assert!(covers("db:*:ro", "db:app:ro"));
        assert!(!covers("db:*:ro", "db:app:rw"));
        assert!(!covers("db:*:ro", "db:app:x:ro"));
        assert!(covers("db:a*z", "db:abcz"));
        assert!(covers("db:exact", "db/exact"));
        assert!(!covers("db:exact", "db:exact:more"));
        assert!(covers("*", "anything:at:all"));
    }

    #[test]
    fn a_new_glob_has_few_stars() {
        let most = format!("db:{}", "*-".repeat(PathGlob::MAX_STARS));
        assert!(most.parse::<PathGlob>().is_ok());
        let error = format!("{most}*").parse::<PathGlob>().unwrap_err();
        assert_eq!(error.to_string(), "a glob has at most 16 `*`, this has 17");
        let stored: PathGlob = serde_json::from_str(&format!("\"{most}*\"")).unwrap();
        assert!(stored.matches(&"db:----------------x".parse().unwrap()));
        assert!(serde_json::from_str::<PathGlob>("\"a::b\"").is_err());
    }

    /// Tries every way in which stars can be filled.
    fn naive(glob: &[char], text: &[char]) -> bool {
        match glob.split_first() {
            None => text.is_empty(),
            Some(('*', rest)) => (0..=text.len()).any(|at| naive(rest, &text[at..])),
            Some((one, rest)) => text.first() == Some(one) && naive(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn as_the_naive_one_says(glob in "[ab*é]{0,9}", text in "[abé]{0,12}") {
            let (g, t): (Vec<char>, Vec<char>) = (glob.chars().collect(), text.chars().collect());
            prop_assert_eq!(segment_matches(&glob, &text), naive(&g, &t));
        }

        #[test]
        fn what_it_was_made_from_is_covered(parts in prop::collection::vec("[ab]{0,3}", 1..6), fill in "[ab-]{0,4}") {
            prop_assert!(segment_matches(&parts.join("*"), &parts.join(&fill)));
        }
    }

    /// Against the naive one this does not end within the life of the machine.
    #[test]
    fn the_worst_glob_and_path_take_no_time() {
        let glob: PathGlob = serde_json::from_str(&format!("\"{}x\"", "*-".repeat(250))).unwrap();
        let path: SecretPath = "-".repeat(512).parse().unwrap();
        let begun = std::time::Instant::now();
        for _ in 0..1000 {
            assert!(!glob.matches(&path));
        }
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    }
}
