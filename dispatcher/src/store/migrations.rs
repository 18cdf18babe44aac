//! The migrations of a store in SQLite and of one in PostgreSQL. A new file is added to its list here.
//!
//! A migration is known by its name and its text: neither ever changes after a release.

use refinery_core::{Error, Migration, Runner};

macro_rules! files {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../migrations/", $folder, "/", $name, ".sql")))),+]
    };
}

const SQLITE: &[(&str, &str)] = files!["sqlite":
    "V1__start",
    "V2__leases",
    "V3__rotations",
    "V4__leaders",
    "V5__clocks",
    "V6__authentic_rows",
    "V7__generations",
    "V8__gone",
    "V11__failed",
    "V15__unproven",
    "V18__active_roles",
];

const POSTGRES: &[(&str, &str)] = files!["postgres":
    "V1__start",
    "V6__authentic_rows",
    "V7__generations",
    "V8__gone",
    "V11__failed",
    "V12__schema_of_counts",
    "V15__unproven",
    "V17__side_by_side",
    "V18__active_roles",
];

/// Brings a SQLite store to this version's tables.
///
/// # Errors
/// A file's name has no version.
pub(super) fn sqlite() -> Result<Runner, Error> {
    runner(SQLITE)
}

/// Brings a store in PostgreSQL to this version's tables.
///
/// # Errors
/// A file's name has no version.
pub(super) fn postgres() -> Result<Runner, Error> {
    runner(POSTGRES)
}

fn runner(files: &[(&str, &str)]) -> Result<Runner, Error> {
    let migrations: Result<Vec<_>, _> = files
        .iter()
        .map(|(name, sql)| Migration::unapplied(name, sql))
        .collect();
    Ok(Runner::new(&migrations?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_file_is_listed_and_has_a_number_of_its_own() {
        for (folder, files) in [("sqlite", SQLITE), ("postgres", POSTGRES)] {
            let folder = format!("{}/migrations/{folder}", env!("CARGO_MANIFEST_DIR"));
            let there: BTreeSet<String> = std::fs::read_dir(&folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            let listed: BTreeSet<String> = files
                .iter()
                .map(|(name, _)| format!("{name}.sql"))
                .collect();
            assert_eq!(there, listed, "{folder}");
            let runner = runner(files).unwrap();
            let versions: BTreeSet<_> = runner
                .get_migrations()
                .iter()
                .map(Migration::version)
                .collect();
            assert_eq!(versions.len(), files.len(), "{folder}");
        }
    }
}
