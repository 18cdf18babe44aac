//! No query of an authenticated table goes past `authentic.rs`, but those whose rows decide nothing.

use std::path::{Path, PathBuf};

use crate::store::authentic::TABLES;

/// Queries of authenticated tables that do not go through `authentic.rs`. What they find decides
/// nothing but whether something is there, or is deleted, or is looked at.
const RAW: [&str; 25] = [
    "SELECT 1 FROM ",
    "SELECT count(*) FROM ",
    "DELETE FROM ",
    "UPDATE leases SET next_reconcile",
    "SELECT id FROM leases WHERE next_reconcile IS NULL",
    "SELECT id FROM leases INDEXED BY leases_failed WHERE next_reconcile IS NULL",
    // Counts the rows of a copy. The check of the copy reads each row too.
    "SELECT pool, state, count(*) FROM leases GROUP BY",
    // Counts settled leases that are forgotten, as the trigger would.
    "(SELECT pool, state, count(*) AS n FROM leases WHERE id IN",
    "SELECT min(coalesce(ends_here, created + 1000 * ttl_seconds)) FROM leases",
    "FROM leases WHERE state = 'revoking' AND revoked_at IS NOT NULL",
    "IN (SELECT min(id) FROM secrets WHERE linked IS NOT NULL",
    "IN (SELECT id FROM secrets)",
    // These find the base secrets whose passwords an operator is advised to change.
    "IN (SELECT linked FROM secrets WHERE pool",
    "IN (SELECT secret_id FROM base_pools WHERE pool",
    "IN (SELECT base_secret_id FROM leases WHERE pool",
    "SELECT key FROM meta",
    // Shows numbers of each pool.
    "{} FROM pools ORDER BY name",
    // `base_facts` compares what is found with the row of the secret.
    "(SELECT linked FROM secrets WHERE path",
    "(SELECT pool FROM secrets WHERE path",
    "(SELECT id, version FROM secrets WHERE id = (SELECT linked FROM secrets WHERE path",
    // `claim_due` looks at each pool and lease itself.
    "SELECT name FROM pools WHERE EXISTS (SELECT 1 FROM leases",
    // `due_together` looks at each lease itself.
    "SELECT name FROM pools WHERE (SELECT count(*) FROM (SELECT 1 FROM leases",
    // Finds ids. A page then reads their rows.
    "FROM leases AS l INDEXED BY leases_path WHERE",
    "SELECT max(n.version) FROM base_versions n",
    "INSERT INTO meta (key, value) VALUES",
];

/// The store's files, without its tests and `authentic.rs`.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path
            .file_stem()
            .is_some_and(|stem| stem == "tests" || stem == "authentic")
        {
            continue;
        }
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn every_query_of_an_authenticated_table_is_looked_at() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
    let mut seen = 0;
    for file in files(&directory) {
        let name = file.strip_prefix(&directory).unwrap().display();
        let text = std::fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        // One line for each statement, however it is laid out.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for table in TABLES {
            for word in ["FROM", "JOIN", "INTO", "UPDATE"] {
                let found = format!("{word} {}", table.name);
                for (at, _) in text.match_indices(&found) {
                    let after = text[at + found.len()..].chars().next();
                    if after.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_') {
                        continue;
                    }
                    seen += 1;
                    let from = text.floor_char_boundary(at.saturating_sub(70));
                    let to = text.ceil_char_boundary((at + 70).min(text.len()));
                    let around = &text[from..to];
                    let is_known = RAW.iter().any(|raw| {
                        around.match_indices(raw).any(|(begin, raw)| {
                            let (begin, end) = (from + begin, from + begin + raw.len());
                            begin <= at && at <= end
                        })
                    });
                    assert!(
                        is_known,
                        "{name}: `…{around}…` reads or writes {} past authentic.rs",
                        table.name
                    );
                }
            }
        }
    }
    assert!(seen > 5, "{seen}");
}
