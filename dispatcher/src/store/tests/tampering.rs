//! An attacker who can write the store but has not the master key: every column of every row of every table is
//! changed, taken from another row and emptied, and rows are copied to other keys. The store then reports what it
//! reported before, or nothing. The columns are those of the database itself, so a column about which nothing was
//! decided fails the test.

mod forged;
mod victim;

use super::*;
use crate::store::authentic::{FREE_META, TABLES, Table};
use crate::store::sql::{Cell, NONE};
use victim::{Said, Victim};

/// Tables without codes; why that is harmless stands in `authentic.rs`.
const FREE: [&str; 4] = [
    "lease_counts",
    "leaders",
    "refinery_schema_history",
    "mayfly_turn",
];

/// Every value that is put in the place of one.
fn others(cell: &Cell, kind: &str, column: &str) -> Vec<Cell> {
    let mut others = match cell {
        Cell::Int(number) => vec![Cell::Int(number + 1), Cell::Int(1 - number)],
        Cell::Text(text) => vec![Cell::Text(format!("{text}x")), Cell::Text(String::new())],
        Cell::Blob(bytes) => [0, bytes.len() - 1]
            .map(|at| {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1;
                Cell::Blob(bytes)
            })
            .to_vec(),
        Cell::Null if kind.contains("int") => vec![Cell::Int(1)],
        Cell::Null if kind == "blob" || kind == "bytea" => vec![Cell::Blob(vec![1])],
        Cell::Null => vec![Cell::Text("x".to_owned())],
    };
    if column == "state" {
        others.push(Cell::from("revoked"));
    }
    if column == "secret_id" {
        others.push(Cell::from("plain"));
    }
    if column == "kind" {
        others.push(Cell::from("static"));
    }
    others.push(Cell::Null);
    others
}

fn refused_of(table: &str) -> u64 {
    refused_rows()
        .find_map(|(name, count)| (name == table).then_some(count))
        .unwrap_or(0)
}

/// Whether it says nothing that it did not say before.
fn is_within(said: &Said, before: &Said) -> bool {
    said.iter()
        .all(|(what, answer)| before.get(what) == Some(answer))
}

#[tokio::test]
async fn nothing_that_others_write_is_believed() {
    let victim = Victim::new().await;
    let before = victim.said().await;
    assert_eq!(victim.said().await, before, "it is asked again and again");
    for what in [
        "bearer 2",
        "pools pool2",
        "read db2:dyn",
        "rotation db:root",
        "doubt db2:root",
        "identity",
    ] {
        assert!(before.contains_key(what), "{what} in {before:?}");
    }
    let catalogue = victim.catalogue().await;
    for (name, columns) in &catalogue {
        let known = TABLES.iter().find(|table| table.name == name);
        let Some(table) = known else {
            // A slot has no columns, like the turn.
            let is_free = FREE.contains(&name.as_str()) || name.starts_with("mayfly_slot_");
            assert!(is_free, "is `{name}` authenticated?");
            continue;
        };
        let decided: Vec<&str> = table.all().chain(["mac"]).collect();
        for (column, _) in columns {
            assert!(
                decided.contains(&column.as_str()),
                "is `{name}.{column}` authenticated?"
            );
        }
        assert_eq!(columns.len(), decided.len(), "{name}");
        changed(&victim, table, columns, &before).await;
        copied(&victim, table, &before).await;
        assert_eq!(victim.said().await, before, "all is as it was");
    }
    for (name, columns) in catalogue
        .iter()
        .filter(|(name, _)| FREE[..2].contains(&name.as_str()))
    {
        for row in victim.rows(format!("SELECT * FROM {name}")).await {
            for ((column, _), cell) in columns.iter().zip(&row) {
                for other in [Cell::Int(7), Cell::from("x")] {
                    let sql = format!("UPDATE {name} SET {column} = ?1 WHERE {column} = ?2");
                    victim.attack(vec![(sql, vec![other, cell.clone()])]).await;
                }
            }
        }
        assert_eq!(victim.said().await, before, "{name} is harmless");
    }
}

/// Attacks each column of these rows, one after another. The store then reports what it reported before, or nothing.
async fn changed(
    victim: &Victim,
    table: &'static Table,
    columns: &[(String, String)],
    before: &Said,
) {
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let rows = victim
        .rows(format!("SELECT {} FROM {}", names.join(", "), table.name))
        .await;
    assert!(rows.len() > 1, "{}", table.name);
    for (n, (column, kind)) in columns.iter().enumerate() {
        let mut attacks = 0;
        // Without the row that names the key nothing is reported at all. That row has a test of its own.
        let sealing = Cell::from("sealing");
        // One row of each kind of secret is enough.
        let (few, last) = (2, rows.len() - 1);
        let chosen = rows.iter().enumerate();
        let chosen = chosen.filter(|(at, row)| {
            table.name == "meta" && row[0] != sealing || *at < few || *at == last
        });
        for (_, row) in chosen.filter(|(_, row)| row[0] != sealing) {
            let is_free = table.free.contains(&column.as_str())
                || table.name == "meta"
                    && matches!(&row[0], Cell::Text(key) if FREE_META.contains(&key.as_str()));
            let neighbours = rows.iter().map(|row| row[n].clone());
            let neighbours = neighbours.filter(|cell| *cell != row[n]).take(2);
            for other in others(&row[n], kind, column).into_iter().chain(neighbours) {
                // One attack is enough where each attack takes many round trips.
                if other == row[n] || attacks > 0 && victim.shared {
                    continue;
                }
                // The row is found by the columns that stay, because the attack may change the key.
                let set = |to: &Cell, from: &Cell| {
                    let mut conditions = vec![format!("{column} IS NOT DISTINCT FROM ?2")];
                    let mut cells = vec![to.clone(), from.clone()];
                    for (m, key) in names.iter().enumerate().take(table.keys) {
                        if m != n {
                            cells.push(row[m].clone());
                            conditions.push(format!("{key} = ?{}", cells.len()));
                        }
                    }
                    let conditions = conditions.join(" AND ");
                    (
                        format!("UPDATE {} SET {column} = ?1 WHERE {conditions}", table.name),
                        cells,
                    )
                };
                let refused = refused_of(table.name);
                if !victim.attack(vec![set(&other, &row[n])]).await {
                    continue;
                }
                attacks += 1;
                let said = victim.said().await;
                let what = format!("{}.{column} of {:?} = {other:?}", table.name, row[0]);
                if is_free {
                    assert_eq!(&said, before, "{what} is harmless");
                } else {
                    assert!(is_within(&said, before), "{what} is believed: {said:#?}");
                    // Under another key nobody may look for the row.
                    let is_key = n < table.keys
                        || [("secrets", "path"), ("tokens", "hash")]
                            .contains(&(table.name, column.as_str()));
                    assert!(
                        is_key || refused_of(table.name) > refused,
                        "{what} is not counted"
                    );
                }
                assert!(
                    victim.attack(vec![set(&row[n], &other)]).await,
                    "{what} back"
                );
            }
        }
        assert!(attacks > 0, "{}.{column} was not attacked", table.name);
    }
}

/// Each row under other keys.
async fn copied(victim: &Victim, table: &'static Table, before: &Said) {
    let columns: Vec<&str> = table.all().chain(["mac"]).collect();
    let names = columns.join(", ");
    let rows = victim
        .rows(format!("SELECT {names} FROM {}", table.name))
        .await;
    let mut attacks = 0;
    for row in rows {
        for with_code in [true, false] {
            let mut copy = row.clone();
            let unique = ["hash", "path"];
            let keys = (0..table.keys).filter(|n| table.name != "leases" || *n != 0);
            let places =
                keys.chain((table.keys..columns.len()).filter(|n| unique.contains(&columns[*n])));
            for place in places {
                copy[place] = others(&copy[place], "", "")[0].clone();
            }
            if columns[0] == "secret_id" {
                copy[0] = Cell::from("plain");
            }
            if table.name == "leases" {
                copy[0] = Cell::Text(LeaseId::random().to_string());
            }
            if !with_code {
                copy[columns.len() - 1] = Cell::Null;
            }
            let places: Vec<String> = (1..=columns.len()).map(|n| format!("?{n}")).collect();
            let sql = format!(
                "INSERT INTO {} ({names}) VALUES ({})",
                table.name,
                places.join(", ")
            );
            if !victim.attack(vec![(sql, copy.clone())]).await {
                continue;
            }
            attacks += 1;
            let said = victim.said().await;
            assert!(
                is_within(&said, before),
                "{} {:?} is believed: {said:#?}",
                table.name,
                copy[0]
            );
            let conditions: Vec<String> = (0..table.keys)
                .map(|n| format!("{} = ?{}", columns[n], n + 1))
                .collect();
            let sql = format!(
                "DELETE FROM {} WHERE {}",
                table.name,
                conditions.join(" AND ")
            );
            assert!(
                victim
                    .attack(vec![(sql, copy[..table.keys].to_vec())])
                    .await
            );
        }
    }
    assert!(attacks > 0, "{} was not attacked", table.name);
}
