//! An account that may write rows may use the sequences that their defaults take numbers from, in any schema.

use mayfly_tests::postgres::{Server, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use serde_json::json;

const TABLES: &str = "CREATE SCHEMA numbers; CREATE SEQUENCE numbers.shared; CREATE SEQUENCE numbers.other; \
    CREATE TABLE app.uses_shared (id int DEFAULT nextval('numbers.shared'), note text); \
    CREATE TABLE app.parts (id serial, k int) PARTITION BY LIST (k); \
    CREATE TABLE app.part_one PARTITION OF app.parts FOR VALUES IN (1); \
    CREATE TABLE app.parent (id serial, note text); CREATE TABLE app.child () INHERITS (app.parent); \
    CREATE VIEW app.seen AS SELECT id, note FROM items; CREATE VIEW app.seen_twice AS SELECT * FROM app.seen; \
    CREATE TABLE app.counted (id int GENERATED ALWAYS AS IDENTITY, note text)";

async fn numbers_can_be_taken(server: Server) {
    let (system, site, pool, _engine) = Scenario::on(server).start_without_secret().await;
    let hand = site.admin().await;
    hand.batch_execute(TABLES).await.unwrap();
    let inserts = [
        ("app.uses_shared", "note"),
        ("app.part_one", "k"),
        ("app.child", "note"),
        ("app.seen", "note"),
        ("app.seen_twice", "note"),
        ("app.counted", "note"),
    ];
    for (table, column) in inserts {
        let grant = json!({"grantPermissions": {"what": "INSERT", "where": table}});
        let path = system.secret(&site, &pool, grant).await;
        let client = system.issue(&path, None).await.login().await.unwrap();
        let insert = format!("INSERT INTO {table} ({column}) VALUES ('1')");
        assert_eq!(sqlstate(&client, &insert).await, "00000", "{table}");
        // The account gets no other sequences, and no right to the schema of a used sequence.
        let more = "SELECT has_sequence_privilege('numbers.other'::regclass::oid, 'USAGE') OR \
            has_schema_privilege('numbers', 'USAGE')";
        let other = "SELECT oid FROM pg_class WHERE relname = 'other'";
        let other = scalar(&client, other).await;
        let more = more.replace("'numbers.other'::regclass::oid", &other);
        assert_eq!(scalar(&client, &more).await, "f", "{table}");
    }
    // A pattern gives the same privilege: the sequence is in another schema.
    let grant = json!({"grantPermissions": {"what": "INSERT", "where": "app.*"}});
    let path = system.secret(&site, &pool, grant).await;
    let client = system.issue(&path, None).await.login().await.unwrap();
    for (table, column) in inserts {
        let insert = format!("INSERT INTO {table} ({column}) VALUES ('1')");
        assert_eq!(
            sqlstate(&client, &insert).await,
            "00000",
            "{table} by a pattern"
        );
    }
    // An account that only reads may not use the sequence.
    let grant = json!({"grantPermissions": {"what": "SELECT", "where": "app.uses_shared"}});
    let path = system.secret(&site, &pool, grant).await;
    let client = system.issue(&path, None).await.login().await.unwrap();
    let may = "SELECT has_sequence_privilege(oid, 'USAGE') FROM pg_class WHERE relname = 'shared'";
    assert_eq!(scalar(&client, may).await, "f");
}

#[tokio::test]
async fn numbers_can_be_taken_on_14() {
    numbers_can_be_taken(Server::of_version("14")).await;
}

#[tokio::test]
async fn numbers_can_be_taken_on_15() {
    numbers_can_be_taken(Server::pg15()).await;
}

#[tokio::test]
async fn numbers_can_be_taken_on_18() {
    numbers_can_be_taken(Server::pg18()).await;
}
