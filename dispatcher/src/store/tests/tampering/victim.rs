//! The store that is attacked, and what it reports.

use std::collections::BTreeMap;

use super::*;
use crate::password::Nonce;
use crate::store::open::identity;
use mayfly_protocol::names::PathGlob;

/// The store's answers, by question. Refused answers are left out.
pub(super) type Said = BTreeMap<String, String>;

pub(super) struct Victim {
    pub(super) store: Store,
    pub(super) shared: bool,
    root: Secret,
    readers: Vec<Secret>,
    pub(super) leases: Vec<Lease>,
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

/// Notes an answer. One that is refused is not noted.
fn say(said: &mut Said, what: String, answer: Result<String, StoreError>) {
    if let Ok(answer) = answer {
        said.insert(what, answer);
    }
}

fn described(pool: &Pool) -> String {
    let keys: Vec<String> = pool.keys().iter().map(|key| key.to_base64()).collect();
    format!("{pool:?} {keys:?}")
}

async fn add_pools(store: &Store) {
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
}

async fn add_secrets(store: &Store) {
    let mut other = base_data();
    other["username"] = json!("admin2");
    let attributes = json!({"type": "postgresql"});
    add(store, "db2:root", attributes, other).await.unwrap();
    for (path, root, pool) in [
        ("db2:dyn", "db2:root", "pool2"),
        ("db:gone", "db:root", "pool1"),
        ("db2:gone", "db2:root", "pool2"),
    ] {
        let attributes = dynamic(root, pool);
        add(store, path, attributes, json!({})).await.unwrap();
    }
    for path in ["db:gone", "db2:gone"] {
        store.delete_secret(path.parse().unwrap()).await.unwrap();
    }
    for (path, word) in [("plain", "one"), ("plain2", "two")] {
        let data = json!({"word": word});
        add(store, path, json!({"label": word}), data)
            .await
            .unwrap();
    }
}

/// Tokens that read one path each; their secrets.
async fn add_tokens(store: &Store) -> Vec<Secret> {
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
    readers
}

/// A lease of each dynamic secret, with an account.
async fn add_leases(store: &Store) -> Vec<Lease> {
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
    leases
}

async fn open_rotations(store: &Store) {
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
}

impl Victim {
    /// A store with two rows and more in each table.
    pub(super) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = tested(directory.path()).await;
        let (store, _, lock) = Store::open(&place).unwrap();
        furnish(&store).await;
        add_pools(&store).await;
        add_secrets(&store).await;
        let readers = add_tokens(&store).await;
        let leases = add_leases(&store).await;
        open_rotations(&store).await;
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

    /// Everything that is read in a dispatcher's life, each answer by itself.
    pub(super) async fn said(&self) -> Said {
        let mut said = Said::new();
        self.say_tokens(&mut said).await;
        self.say_pools(&mut said).await;
        self.say_secrets(&mut said).await;
        self.say_passwords(&mut said).await;
        self.say_leases(&mut said).await;
        self.say_identity(&mut said).await;
        said
    }

    async fn say_tokens(&self, said: &mut Said) {
        let tokens = self.readers.iter().chain([&self.root]).enumerate();
        for (n, token) in tokens {
            if let Some(bearer) = self.store.bearer(token.clone()).await.unwrap() {
                said.insert(format!("bearer {n}"), format!("{bearer:?}"));
            }
        }
        for token in self.store.tokens(String::new(), 9).await.unwrap() {
            said.insert(format!("token {}", token.id), format!("{token:?}"));
        }
    }

    async fn say_pools(&self, said: &mut Said) {
        for pool in self.store.all_pools().await.unwrap() {
            let one = self.store.pool(pool.name.clone()).await;
            say(
                said,
                format!("pool {}", pool.name),
                one.map(|one| described(&one)),
            );
            said.insert(format!("pools {}", pool.name), described(&pool));
        }
    }

    async fn say_secrets(&self, said: &mut Said) {
        let store = &self.store;
        for record in store.secrets(String::new(), 99, |_| true).await.unwrap() {
            let path = record.path.clone();
            let read = store.read_secret(path.clone()).await;
            let read = read.map(|read| {
                let base = read.base.map(|base| {
                    let (target, pool) = (&base.target, described(&base.pool));
                    let password = target.password.expose();
                    let (server, base) = (&base.server, &base.base);
                    format!("{base:?} {target:?} {password} {server:?} {pool}")
                });
                format!("{:?} {:?} {base:?}", read.record, read.data)
            });
            say(said, format!("read {path}"), read);
            if record.kind == secrets::Kind::Base
                && let Ok(base) = store.base(path.clone()).await
            {
                // These are reported separately, because a deleted row cannot be recognized.
                for pool in &base.linked {
                    said.insert(format!("linked {path} {}", pool.name), described(pool));
                }
                if let Some(last) = &base.last {
                    said.insert(format!("last {path}"), described(last));
                }
                let known = format!("{:?} {:?}", base.record, base.target);
                said.insert(format!("base {path}"), known);
            }
            said.insert(format!("secret {path}"), format!("{record:?}"));
        }
        if let Ok(bases) = store.bases_in_use().await {
            for (path, facts) in bases {
                let pool = &facts.pool.name;
                said.insert(format!("in use {path} {pool}"), format!("{facts:?}"));
            }
        }
    }

    /// The passwords of rotations, and those that are kept until they are proven.
    async fn say_passwords(&self, said: &mut Said) {
        for one in self.store.rotations().await.into_iter().flatten() {
            let password = one.password.expose();
            said.insert(
                format!("rotation {}", one.path),
                format!("{one:?} {password}"),
            );
        }
        for one in self.store.doubts().await.into_iter().flatten() {
            let password = one.password.expose();
            said.insert(format!("doubt {}", one.path), format!("{one:?} {password}"));
        }
    }

    async fn say_leases(&self, said: &mut Said) {
        let store = &self.store;
        // The time of the reconciler's next look is not reported.
        let described_lease = |mut lease: Lease| {
            lease.status.next_reconcile = None;
            lease.status.reconcile_attempts = 0;
            format!("{lease:?}")
        };
        let all = store.leases(Filter::default(), String::new(), 99).await;
        for lease in all.unwrap() {
            said.insert(format!("leases {}", lease.id), described_lease(lease));
        }
        for lease in &self.leases {
            let id = lease.id;
            let one = store.lease(id).await.map(described_lease);
            say(said, format!("lease {id}"), one);
            if let Ok(Some(found)) = store.lease_access(id, 0).await {
                let (target, key) = (found.target, found.recipient.key.to_base64());
                let (lease, server) = (described_lease(found.lease), found.server);
                let known = format!("{lease} {target:?} {server:?} {key}");
                said.insert(format!("revocation {id}"), known);
            }
            let seed = store.seed(id).await;
            let password = seed.map(|seed| seed.password().expose().to_owned());
            say(said, format!("password {id}"), password);
            let mut again = lease.clone();
            again.id = LeaseId::random();
            // A new lease is not admitted, so that nothing changes.
            let conditions = Conditions {
                most_of_caller: Some(0),
                ..keyed("k")
            };
            if let Ok(Admission::Known(found)) = store.admit(again, conditions, at(2)).await {
                said.insert(format!("read k of {id}"), found.to_string());
            }
        }
    }

    async fn say_identity(&self, said: &mut Said) {
        let ours = self.store.run(|connection| {
            let sealer = connection.ring()?.sealer.clone();
            identity(connection, &sealer)
        });
        let ours = ours.await.map(|ours| {
            let (generation, keys) = ours.keys.public();
            let keys: Vec<String> = keys.iter().map(|key| key.to_base64()).collect();
            let (installation, derivation) = (ours.installation, ours.keys.derivation());
            format!("{installation} {generation} {keys:?} {derivation:?}")
        });
        say(said, "identity".to_owned(), ours);
    }

    /// Runs a statement as the attacker does. False where a constraint is in the way.
    pub(super) async fn attack(&self, statements: Vec<(String, Vec<Cell>)>) -> bool {
        let done = self.store.run(move |connection| {
            for (sql, cells) in statements {
                connection.execute(&sql, cells)?;
            }
            Ok(())
        });
        done.await.is_ok()
    }

    pub(super) async fn rows(&self, sql: String) -> Vec<Vec<Cell>> {
        let found = self.store.run(move |connection| {
            let rows = connection.prepare(&sql)?.query(NONE)?;
            Ok(rows.into_iter().map(|row| row.0).collect())
        });
        found.await.unwrap()
    }

    /// The database's own list of tables, with their columns and whether they hold text.
    pub(super) async fn catalogue(&self) -> BTreeMap<String, Vec<(String, String)>> {
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
