//! Who can write the store but has not the master key: every column of every row of every table is
//! changed, taken from another row and emptied, and rows are copied to other keys. What the store
//! then reports is what it reported before, or nothing. The columns are those of the database itself, so
//! that one about which nothing was decided fails the test.

use std::collections::BTreeMap;

use super::*;
use crate::password::Nonce;
use crate::store::authentic::{FREE_META, TABLES, Table};
use crate::store::open::identity;
use crate::store::sql::{Cell, NONE};
use mayfly_protocol::names::PathGlob;

/// Tables without codes; why that is harmless stands in `authentic.rs`.
const FREE: [&str; 4] = [
    "lease_counts",
    "leaders",
    "refinery_schema_history",
    "mayfly_turn",
];

/// What the store says, by what is asked. An answer that is refused is not in it.
type Said = BTreeMap<String, String>;

struct Victim {
    store: Store,
    shared: bool,
    root: Secret,
    readers: Vec<Secret>,
    leases: Vec<Lease>,
    _lock: Option<std::fs::File>,
    _directory: tempfile::TempDir,
}

fn keyed(name: &str) -> Conditions {
    Conditions {
        key: Some(name.to_owned()),
        nonce: Some((1, Nonce::random())),
        ..Conditions::default()
    }
}

impl Victim {
    /// A store with two rows and more in each table.
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = tested(directory.path()).await;
        let (store, _, lock) = Store::open(&place).unwrap();
        furnish(&store).await;
        let another = |name: &str| Pool {
            name: name.parse().unwrap(),
            public_key: KeyPair::generate().public().clone(),
            ..a_pool(name)
        };
        for name in ["pool2", "pool3"] {
            store.create_pool(another(name)).await.unwrap();
        }
        for pool in ["pool1", "pool2"] {
            let name = || pool.parse().unwrap();
            let key = || KeyPair::generate().public().clone();
            store.begin_key_rotation(name(), key(), 1).await.unwrap();
            store.end_key_rotation(name(), true).await.unwrap();
            store.begin_key_rotation(name(), key(), 1).await.unwrap();
        }
        let mut other = base_data();
        other["username"] = json!("admin2");
        let attributes = json!({"type": "postgresql"});
        add(&store, "db2:root", attributes, other).await.unwrap();
        for (path, root, pool) in [
            ("db2:dyn", "db2:root", "pool2"),
            ("db:gone", "db:root", "pool1"),
            ("db2:gone", "db2:root", "pool2"),
        ] {
            let attributes = dynamic(root, pool);
            add(&store, path, attributes, json!({})).await.unwrap();
        }
        for path in ["db:gone", "db2:gone"] {
            store.delete_secret(path.parse().unwrap()).await.unwrap();
        }
        for (path, word) in [("plain", "one"), ("plain2", "two")] {
            let data = json!({"word": word});
            add(&store, path, json!({"label": word}), data)
                .await
                .unwrap();
        }
        let mut readers = Vec::new();
        for (id, glob, most) in [("t1", "db:*", 3), ("t2", "plain", 4)] {
            let secret = Secret::new(format!("{id}-0123456789012345678901234567"));
            let read: PathGlob = glob.parse().unwrap();
            let token = Token {
                id: id.to_owned(),
                read: vec![read],
                created: at(0),
                expiration: at(most * 1000),
                max_leases: Some(most.unsigned_abs()),
            };
            store.create_token(token, &secret).await.unwrap();
            readers.push(secret);
        }
        let mut leases = Vec::new();
        for (n, path, base, pool) in [
            (1, "db:dyn", "db:root", "pool1"),
            (2, "db2:dyn", "db2:root", "pool2"),
        ] {
            let lease = Lease {
                path: path.parse().unwrap(),
                pool: pool.parse().unwrap(),
                role: format!("mayfly_{n}").parse().unwrap(),
                base: BaseRef {
                    id: base.to_owned(),
                    version: 1,
                },
                database: format!("d{n}"),
                traceparent: format!("00-{n}"),
                created: at(n),
                created_by: format!("t{n}"),
                ..lease()
            };
            store.admit(lease.clone(), keyed("k"), at(0)).await.unwrap();
            let created = Event::Created(
                Created {
                    expiration: at(60 + n),
                    server: format!("s{n}"),
                    warnings: vec![],
                },
                format!("e{n}").parse().unwrap(),
            );
            store.apply(lease.id, created, at(1)).await.unwrap();
            leases.push(lease);
        }
        for (path, password) in [("db:root", "new"), ("db2:root", "new2")] {
            let opening = Opening {
                path: path.parse().unwrap(),
                version: 1,
                password: Secret::new(password),
                pool: "pool1".parse().unwrap(),
                who: password.to_owned(),
                started: at(0),
                settles_at: at(30),
                over_there: at(40),
            };
            store.open_rotation(opening).await.unwrap();
        }
        store.keep_two_passwords().await;
        store.touch(at(0)).await.unwrap();
        let root = std::fs::read_to_string(&place.root_token_file).unwrap();
        Self {
            store,
            shared: matches!(place.backend, Backend::Postgres(_)),
            root: Secret::new(root.trim()),
            readers,
            leases,
            _lock: lock,
            _directory: directory,
        }
    }

    /// Everything that is read in a dispatcher's life, each answer apart.
    async fn said(&self) -> Said {
        let store = &self.store;
        let mut said = Said::new();
        let mut say = |what: String, answer: Result<String, StoreError>| {
            if let Ok(answer) = answer {
                said.insert(what, answer);
            }
        };
        let tokens = self.readers.iter().chain([&self.root]).enumerate();
        for (n, token) in tokens {
            if let Some(bearer) = store.bearer(token.clone()).await.unwrap() {
                say(format!("bearer {n}"), Ok(format!("{bearer:?}")));
            }
        }
        for token in store.tokens(String::new(), 9).await.unwrap() {
            say(format!("token {}", token.id), Ok(format!("{token:?}")));
        }
        let pool_said = |pool: &Pool| {
            let keys: Vec<String> = pool.keys().iter().map(|key| key.to_base64()).collect();
            format!("{pool:?} {keys:?}")
        };
        for pool in store.all_pools().await.unwrap() {
            let one = store.pool(pool.name.clone()).await;
            say(
                format!("pool {}", pool.name),
                one.map(|one| pool_said(&one)),
            );
            say(format!("pools {}", pool.name), Ok(pool_said(&pool)));
        }
        for record in store.secrets(String::new(), 99, |_| true).await.unwrap() {
            let path = record.path.clone();
            let read = store.read_secret(path.clone()).await;
            say(
                format!("read {path}"),
                read.map(|read| {
                    let base = read.base.map(|base| {
                        let target = &base.target;
                        let (password, pool) = (target.password.expose(), pool_said(&base.pool));
                        format!(
                            "{:?} {target:?} {password} {:?} {pool}",
                            base.base, base.server
                        )
                    });
                    format!("{:?} {:?} {base:?}", read.record, read.data)
                }),
            );
            if record.kind == secrets::Kind::Base
                && let Ok(base) = store.base(path.clone()).await
            {
                // Separately: a deleted row cannot be recognized.
                for pool in &base.linked {
                    say(format!("linked {path} {}", pool.name), Ok(pool_said(pool)));
                }
                if let Some(last) = &base.last {
                    say(format!("last {path}"), Ok(pool_said(last)));
                }
                let known = format!("{:?} {:?}", base.record, base.target);
                say(format!("base {path}"), Ok(known));
            }
            say(format!("secret {path}"), Ok(format!("{record:?}")));
        }
        if let Ok(bases) = store.bases_in_use().await {
            for (path, facts) in bases {
                let pool = &facts.pool.name;
                say(format!("in use {path} {pool}"), Ok(format!("{facts:?}")));
            }
        }
        if let Ok(rotations) = store.rotations().await {
            for one in rotations {
                let password = one.password.expose();
                say(
                    format!("rotation {}", one.path),
                    Ok(format!("{one:?} {password}")),
                );
            }
        }
        if let Ok(doubts) = store.doubts().await {
            for one in doubts {
                let password = one.password.expose();
                say(
                    format!("doubt {}", one.path),
                    Ok(format!("{one:?} {password}")),
                );
            }
        }
        // When a lease is looked at next is not reported.
        let lease_said = |mut lease: Lease| {
            lease.status.next_reconcile = None;
            lease.status.reconcile_attempts = 0;
            format!("{lease:?}")
        };
        for lease in store
            .leases(Filter::default(), String::new(), 99)
            .await
            .unwrap()
        {
            say(format!("leases {}", lease.id), Ok(lease_said(lease)));
        }
        for lease in &self.leases {
            let id = lease.id;
            say(format!("lease {id}"), store.lease(id).await.map(lease_said));
            if let Ok(Some(found)) = store.lease_access(id, 0).await {
                let (target, key) = (found.target, found.recipient.key.to_base64());
                let (lease, server) = (lease_said(found.lease), found.server);
                let known = format!("{lease} {target:?} {server:?} {key}");
                say(format!("revocation {id}"), Ok(known));
            }
            let seed = store.seed(id).await;
            say(
                format!("password {id}"),
                seed.map(|seed| seed.password().expose().to_owned()),
            );
            let mut again = lease.clone();
            again.id = LeaseId::random();
            // A new one is not placed, so that nothing changes.
            let conditions = Conditions {
                most_of_caller: Some(0),
                ..keyed("k")
            };
            if let Ok(Admission::Known(found)) = store.admit(again, conditions, at(2)).await {
                say(format!("read k of {id}"), Ok(found.to_string()));
            }
        }
        let ours = store.run(|connection| {
            let sealer = connection.ring()?.sealer.clone();
            identity(connection, &sealer)
        });
        say(
            "identity".to_owned(),
            ours.await.map(|ours| {
                let (generation, keys) = ours.keys.public();
                let keys: Vec<String> = keys.iter().map(|key| key.to_base64()).collect();
                format!(
                    "{} {generation} {keys:?} {:?}",
                    ours.installation,
                    ours.keys.derivation()
                )
            }),
        );
        said
    }

    /// Runs a statement as the attacker does. False where a constraint is in the way.
    async fn attack(&self, statements: Vec<(String, Vec<Cell>)>) -> bool {
        let done = self.store.run(move |connection| {
            for (sql, cells) in statements {
                connection.execute(&sql, cells)?;
            }
            Ok(())
        });
        done.await.is_ok()
    }

    async fn rows(&self, sql: String) -> Vec<Vec<Cell>> {
        let found = self.store.run(move |connection| {
            let rows = connection.prepare(&sql)?.query(NONE)?;
            Ok(rows.into_iter().map(|row| row.0).collect())
        });
        found.await.unwrap()
    }

    /// The database's own list of tables, with their columns and whether they hold text.
    async fn catalogue(&self) -> BTreeMap<String, Vec<(String, String)>> {
        let sql = if self.shared {
            "SELECT CAST(table_name AS TEXT), CAST(column_name AS TEXT), CAST(data_type AS TEXT)
             FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, ordinal_position"
        } else {
            "SELECT t.name, c.name, c.type FROM sqlite_master t, pragma_table_info(t.name) c
             WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' ORDER BY 1, c.cid"
        };
        let mut found = BTreeMap::<String, Vec<(String, String)>>::new();
        for row in self.rows(sql.to_owned()).await {
            let [Cell::Text(table), Cell::Text(column), Cell::Text(kind)] = &row[..] else {
                panic!("{row:?}")
            };
            let columns = found.entry(table.clone()).or_default();
            columns.push((column.clone(), kind.to_lowercase()));
        }
        found
    }
}

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
            // A slot has no columns, as the turn.
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

/// Each column of each row, one after another.
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
        // Without the row that names the key nothing is reported at all; it has a test of its own.
        let sealing = Cell::from("sealing");
        // Of each kind of secret one is enough.
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
                // One is enough where each takes many round trips.
                if other == row[n] || attacks > 0 && victim.shared {
                    continue;
                }
                // By every column that stays, for the key may be the one that changes.
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
                    // Under another key it may be a row that nobody looks for.
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

/// The row that names the master key, and says whether an upgrade is under way.
#[tokio::test]
async fn a_store_cannot_be_passed_off_as_an_older_one() {
    for (what, attack) in [
        ("deleted", "DELETE FROM meta WHERE key = 'sealing'"),
        (
            "no code",
            "UPDATE meta SET mac = NULL WHERE key = 'sealing'",
        ),
        (
            "an upgrade",
            "UPDATE meta SET value = CAST(value || ' upgrade 9000000000000' AS BLOB) WHERE key = 'sealing'",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let place = place(directory.path());
        let (store, _, lock) = Store::open(&place).unwrap();
        furnish(&store).await;
        let forge = "UPDATE pools SET public_key = 'forged', mac = NULL";
        let attack = attack.to_owned();
        store
            .run(move |connection| {
                connection.execute(&attack, NONE)?;
                connection.execute(forge, NONE)?;
                Ok(())
            })
            .await
            .unwrap();
        let refused = store.all_pools().await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{what}");
        store.close().await;
        drop(lock);
        match Store::open(&place) {
            Err(OpenError::Key { reason, .. }) => {
                assert!(
                    reason.contains("row `sealing` of `meta`"),
                    "{what}: {reason}"
                );
            }
            other => panic!("{what}: {:?}", other.map(|_| ())),
        }
    }
}

/// The attacks of the issue, by what they are after.
#[tokio::test]
async fn a_written_hash_is_no_token_and_a_written_key_no_pools() {
    let victim = Victim::new().await;
    let thiefs = Secret::new("a-token-of-the-thief-0123456789ab");
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, thiefs.expose().as_bytes());
    let hash = Cell::Blob(hash.as_ref().to_vec());
    let insert = "INSERT INTO tokens (id, hash, created) VALUES ('root2', ?1, 0)".to_owned();
    assert!(victim.attack(vec![(insert, vec![hash.clone()])]).await);
    assert!(victim.store.bearer(thiefs.clone()).await.unwrap().is_none());
    let delete = "DELETE FROM tokens WHERE id = 'root2'".to_owned();
    let update = "UPDATE tokens SET hash = ?1 WHERE id = 'root'".to_owned();
    assert!(
        victim
            .attack(vec![(delete, vec![]), (update, vec![hash])])
            .await
    );
    assert!(victim.store.bearer(thiefs).await.unwrap().is_none());

    let key = KeyPair::generate().public().to_base64();
    let update = "UPDATE pools SET public_key = ?1 WHERE name = 'pool1'".to_owned();
    assert!(victim.attack(vec![(update, vec![Cell::Text(key)])]).await);
    let refused = victim
        .store
        .pool("pool1".parse().unwrap())
        .await
        .unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("pools row pool1 is not authentic"),
        "{refused}"
    );
    let left = victim.store.all_pools().await.unwrap();
    assert_eq!(left.len(), 2, "the others stand");
    let issue = victim.store.read_secret("db:dyn".parse().unwrap()).await;
    assert!(
        matches!(issue, Err(StoreError::Unavailable(_))),
        "{issue:?}"
    );
    let other = victim.store.read_secret("db2:dyn".parse().unwrap()).await;
    assert!(other.is_ok(), "{other:?}");
}

/// A refused lease is not looked for in every turn of the reconciler.
#[tokio::test]
async fn a_refused_lease_is_put_off_and_harms_no_other() {
    let victim = Victim::new().await;
    let [ours, _] = &victim.leases[..] else {
        panic!("two leases")
    };
    let second = Lease {
        id: LeaseId::random(),
        role: "mayfly_9".parse().unwrap(),
        ..ours.clone()
    };
    let conditions = Conditions::default();
    victim
        .store
        .admit(second.clone(), conditions, at(0))
        .await
        .unwrap();
    let update = "UPDATE leases SET role = 'postgres' WHERE id = ?1".to_owned();
    let id = Cell::Text(ours.id.to_string());
    assert!(victim.attack(vec![(update, vec![id])]).await);
    let due = async |now| {
        let claimed = victim.store.claim_due(
            "pool1".parse().unwrap(),
            vec!["pool1".parse().unwrap()],
            1,
            now,
            0.0,
        );
        claimed.await.unwrap()
    };
    let mut claimed = Vec::new();
    for turn in 0..3 {
        claimed.extend(due(at(100_000 + turn)).await);
    }
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    assert_eq!(claimed[0].lease.id, second.id);
    let next = format!("SELECT next_reconcile FROM leases WHERE id = '{}'", ours.id);
    let next = victim.rows(next).await;
    let minutes = at(100_000 + 300).as_millisecond();
    assert!(
        matches!(next[0][0], Cell::Int(next) if next >= minutes),
        "it is put off: {next:?}"
    );
}

/// Queries of authenticated tables that do not go through `authentic.rs`. What they find decides
/// nothing but whether something is there, or is deleted, or is looked at.
const RAW: [&str; 22] = [
    "SELECT 1 FROM ",
    "SELECT count(*) FROM ",
    "DELETE FROM ",
    "UPDATE leases SET next_reconcile",
    "SELECT id FROM leases WHERE next_reconcile IS NULL",
    "SELECT id FROM leases INDEXED BY leases_failed WHERE next_reconcile IS NULL",
    // Of a copy, whose rows are all looked at beside it.
    "SELECT pool, state, count(*) FROM leases GROUP BY",
    "SELECT min(coalesce(ends_here, created + 1000 * ttl_seconds)) FROM leases",
    "FROM leases WHERE state = 'revoking' AND revoked_at IS NOT NULL",
    "IN (SELECT min(id) FROM secrets WHERE linked IS NOT NULL",
    "IN (SELECT id FROM secrets)",
    // For the advice which passwords to change.
    "IN (SELECT linked FROM secrets WHERE pool",
    "IN (SELECT secret_id FROM base_pools WHERE pool",
    "IN (SELECT base_secret_id FROM leases WHERE pool",
    "SELECT key FROM meta",
    "SELECT name FROM pools ORDER BY name",
    // `base_facts` compares what is found with the row of the secret.
    "(SELECT linked FROM secrets WHERE path",
    "(SELECT pool FROM secrets WHERE path",
    "(SELECT id, version FROM secrets WHERE id = (SELECT linked FROM secrets WHERE path",
    // `claim_due` looks at each pool and lease itself.
    "SELECT name FROM pools WHERE EXISTS (SELECT 1 FROM leases",
    "SELECT max(n.version) FROM base_versions n",
    "INSERT INTO meta (key, value) VALUES",
];

#[test]
fn every_query_of_an_authenticated_table_is_looked_at() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
    let mut seen = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        let file = file.unwrap().path();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if !name.ends_with(".rs") || ["tests.rs", "authentic.rs"].contains(&name.as_str()) {
            continue;
        }
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
