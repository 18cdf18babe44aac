//! A read does not wait for a look at its grant role while the last look is at most 2 s old. What the new look finds
//! counts nevertheless: new objects, and grants that became impossible.

use std::time::{Duration, Instant};

use mayfly_tests::postgres::{Admin, Credential, Server, Site, scalar, sqlstate};
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};
use tokio_postgres::Client;

/// From this age on a look is used while the next look is taken.
const FRESH_FOR: Duration = Duration::from_millis(1_050);
/// From this age on a read waits for a look.
const USED_FOR: Duration = Duration::from_secs(2);
/// A busy machine may take longer from one read to the next. Then it is tried again.
const TRIES: usize = 12;

struct World {
    system: System,
    site: Site,
    path: String,
    _engine: Engine,
    hand: Client,
}

async fn world(server: Server, grants: Value) -> World {
    let (system, site, path, engine) = Scenario::on(server)
        .admin(Admin::CreateRole)
        .attributes(json!({"grantPermissions": grants}))
        .start()
        .await;
    let hand = site.server.superuser(&site.name).await;
    World {
        system,
        site,
        path,
        _engine: engine,
        hand,
    }
}

impl World {
    async fn read(&self) -> (u16, Value) {
        let path = format!("/v1/secrets/{}", self.path);
        self.system.api.get(&path).await
    }

    /// Makes a read look, does what is given, and waits until the look is more than 1 s old. Gives a time at which
    /// the look had not begun.
    async fn after_a_look(&self, meanwhile: impl AsyncFnOnce()) -> Instant {
        tokio::time::sleep(USED_FOR).await;
        let begun = Instant::now();
        self.system.issue(&self.path, None).await;
        let ended = Instant::now();
        meanwhile().await;
        tokio::time::sleep(FRESH_FOR.saturating_sub(ended.elapsed())).await;
        begun
    }

    /// Looks that wait for a lock.
    async fn hanging(&self) -> bool {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        scalar(&self.hand, waiting).await != "0"
    }

    async fn do_as_owner(&self, statements: &str) {
        self.site
            .admin()
            .await
            .batch_execute(statements)
            .await
            .unwrap();
    }
}

/// A lock on a catalog holds the look up for 3 s, until its time for locks is over. The read does not wait for it.
async fn a_look_that_hangs_delays_no_read(server: Server) {
    // For `INSERT` a look reads pg_depend; a create does not.
    let world = world(server, json!({"what": "SELECT,INSERT", "where": "app.*"})).await;
    let locker = world.site.server.superuser(&world.site.name).await;
    for _ in 0..TRIES {
        let begun = world
            .after_a_look(async || {
                let lock = "BEGIN; LOCK TABLE pg_catalog.pg_depend IN ACCESS EXCLUSIVE MODE";
                locker.batch_execute(lock).await.unwrap();
            })
            .await;
        let (status, answer) = world.read().await;
        let is_in_time = begun.elapsed() < USED_FOR;
        let is_hanging = world.hanging().await;
        locker.batch_execute("ROLLBACK").await.unwrap();
        if status == 200 && is_in_time && is_hanging {
            assert!(Credential::from_answer(&answer).login().await.is_ok());
            return;
        }
    }
    panic!("in {TRIES} tries every read waited for the look");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_hangs_delays_no_read_on_15() {
    a_look_that_hangs_delays_no_read(Server::pg15()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_hangs_delays_no_read_on_18() {
    a_look_that_hangs_delays_no_read(Server::pg18()).await;
}

/// A read that begins 2 s after a table was made gives the table at once, although no other read looked meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_is_granted_to_what_is_read_2_s_later() {
    let world = world(Server::pg15(), json!({"what": "SELECT", "where": "app.*"})).await;
    for n in 0..TRIES {
        world.after_a_look(async || {}).await;
        world
            .do_as_owner(&format!("CREATE TABLE app.later_{n} (id int)"))
            .await;
        tokio::time::sleep(USED_FOR + Duration::from_millis(100)).await;
        let (status, answer) = world.read().await;
        assert_eq!(status, 200, "{answer}");
        // On a busy machine the time for granting may be over; the answer says so.
        if answer.get("warnings").is_none() {
            let client = Credential::from_answer(&answer).login().await.unwrap();
            let select = format!("SELECT * FROM app.later_{n}");
            assert_eq!(sqlstate(&client, &select).await, "00000");
            return;
        }
    }
    panic!("in {TRIES} tries the time for granting was over");
}

/// Accounts get a new table by the looks beside reads that do not wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_is_granted_while_no_read_waits() {
    let world = world(Server::pg18(), json!({"what": "SELECT", "where": "app.*"})).await;
    let account = world.system.issue(&world.path, None).await;
    let client = account.login().await.unwrap();
    world.do_as_owner("CREATE TABLE app.later (id int)").await;
    eventually("the new table is granted", seconds(30), async || {
        let (status, answer) = world.read().await;
        assert_eq!(status, 200, "{answer}");
        (sqlstate(&client, "SELECT * FROM app.later").await == "00000").then_some(())
    })
    .await;
}

/// The look beside a read finds that the grants became impossible. The next read is refused, although the last look
/// that succeeded is less than 2 s old.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_read_notices_a_look_that_failed() {
    let world = world(
        Server::pg18(),
        json!({"what": "SELECT", "where": "app.orders"}),
    )
    .await;
    for _ in 0..TRIES {
        let rename = "ALTER TABLE app.orders RENAME TO away";
        let begun = world
            .after_a_look(async || world.do_as_owner(rename).await)
            .await;
        let (first, answer) = world.read().await;
        let is_in_time = begun.elapsed() < USED_FOR;
        // The read used the last look, or was late and waited.
        assert!(first == 200 || !is_in_time, "{answer}");
        let refused = eventually("a read is refused", seconds(30), async || {
            let (status, answer) = world.read().await;
            (status != 200).then_some(answer)
        })
        .await;
        let is_noticed = is_in_time && begun.elapsed() < USED_FOR;
        assert_eq!(refused["error"], "no_such_object", "{refused}");
        world
            .do_as_owner("ALTER TABLE app.away RENAME TO orders")
            .await;
        eventually("it works again", seconds(30), async || {
            (world.read().await.0 == 200).then_some(())
        })
        .await;
        if is_noticed {
            return;
        }
    }
    panic!("in {TRIES} tries no read noticed the failed look");
}
