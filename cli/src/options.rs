//! Options that several commands have: a secret's path, and the pages of a list.

use clap::Args;

use crate::failure::Failure;
use crate::route::same_path;

/// A secret's path, as an argument or as an option.
#[derive(Args)]
pub(crate) struct PathArg {
    /// Path of the secret, such as db:postgresql:dyn1 (`/` and `:` are the same)
    #[arg(value_name = "PATH")]
    positional: Option<String>,
    /// The path again, as an option
    #[arg(short = 'r', long = "path", value_name = "PATH")]
    option: Option<String>,
}

impl PathArg {
    /// The path, if it was given. If it was given twice, both must be the same.
    pub(crate) fn given(&self) -> Result<Option<&str>, Failure> {
        match (&self.positional, &self.option) {
            (Some(a), Some(b)) if !same_path(a, b) => Err(Failure::Usage(format!(
                "two paths are given: {a} and --path {b}"
            ))),
            (Some(path), _) | (None, Some(path)) => Ok(Some(path)),
            (None, None) => Ok(None),
        }
    }

    /// The path, which must be given.
    pub(crate) fn required(&self) -> Result<&str, Failure> {
        self.given()?
            .ok_or_else(|| Failure::Usage("a PATH is needed, such as db:postgresql:dyn1".into()))
    }
}

/// Which page of a list.
#[derive(Args)]
pub(crate) struct PageArgs {
    /// Maximum number of rows on one page
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: Option<u32>,
    /// Continue after the page that gave this `cursor`
    #[arg(long)]
    pub(crate) cursor: Option<String>,
    /// Every page, one after the other
    #[arg(long)]
    pub(crate) all: bool,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn paths_given_twice_must_agree() {
        let path = |positional: Option<&str>, option: Option<&str>| PathArg {
            positional: positional.map(str::to_owned),
            option: option.map(str::to_owned),
        };
        assert_eq!(path(Some("a:b"), Some("a/b")).required().unwrap(), "a:b");
        assert_eq!(path(None, Some("a/b")).required().unwrap(), "a/b");
        assert_eq!(
            path(Some("a"), Some("b"))
                .required()
                .unwrap_err()
                .exit_code(),
            2
        );
        assert_eq!(path(None, None).required().unwrap_err().exit_code(), 2);
    }
}
