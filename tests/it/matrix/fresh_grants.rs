//! Live accounts may use objects that were made after their read: a renewal looks, and a dispatcher has engines look
//! regularly.

use mayfly_tests::postgres::{Admin, Server, scalar, sqlstate};
use mayfly_tests::rabbit::Rabbit;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::{Engine, System};
use mayfly_tests::{eventually, seconds};
use serde_json::json;

const READ: &str = "SELECT * FROM app.later";

/// Refresh requests that these engines took.
async fn looks(engines: &[&Engine]) -> f64 {
    let mut looks = 0.0;
    for engine in engines {
        let text = engine.admin_text("/metrics").await;
        looks += text
            .lines()
            .filter(|line| {
                line.starts_with("mayfly_engine_tasks_total") && line.contains("kind=\"refresh\"")
            })
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>();
    }
    looks
}

/// A renewal brings tables that were made, or made again, since the read.
#[tokio::test]
async fn a_renewal_looks_at_the_grants() {
    let rarely = [("MAYFLY__LEASE__REFRESH_SECONDS", "86400")];
    let (system, site, path, _engine) =
        Scenario::on(Server::pg15()).settings(&rarely).start().await;
    let credential = system.issue(&path, Some(200)).await;
    let client = credential.login().await.unwrap();
    let hand = site.admin().await;
    let renew = format!("/v1/leases/{}/renew", credential.lease);
    for (n, increment) in [(0, 220), (1, 240)] {
        hand.batch_execute("DROP TABLE IF EXISTS app.later; CREATE TABLE app.later (id int)")
            .await
            .unwrap();
        assert_eq!(sqlstate(&client, READ).await, "42501", "table {n}");
        eventually("the renewal brings the table", seconds(30), async || {
            let (status, answer) = system
                .api
                .post(&renew, json!({"increment": increment}))
                .await;
            assert_eq!(status, 200, "{answer}");
            (sqlstate(&client, READ).await == "00000").then_some(())
        })
        .await;
    }
    // A grant that became impossible takes nothing from a renewal.
    hand.batch_execute("DROP SCHEMA app CASCADE; DROP TABLE items")
        .await
        .unwrap();
    let (status, answer) = system.api.post(&renew, json!({"increment": 260})).await;
    assert_eq!(status, 200, "{answer}");
}

/// Nobody reads the secret again, and nobody renews: the table is granted nevertheless, with one look in a period for
/// any number of engines. A grant role without members is left alone.
#[tokio::test]
async fn living_accounts_get_what_is_made_later() {
    let often = [("MAYFLY__LEASE__REFRESH_SECONDS", "2")];
    let system = System::start_with(Rabbit::shared(), &often).await;
    let site = Server::pg18().site(Admin::CreateRole).await;
    let pool = system.pool().await;
    let (one, two) = (system.engine(&pool).await, system.engine(&pool).await);
    let path = system.secret(&site, &pool, json!({})).await;
    // Both secrets have the same grants, so there is one look.
    let same = system.secret(&site, &pool, json!({})).await;
    let credential = system.issue(&path, Some(250)).await;
    let _other = system.issue(&same, Some(250)).await;
    let client = credential.login().await.unwrap();
    let hand = site.admin().await;
    let begun = std::time::Instant::now();
    let before = looks(&[&one, &two]).await;
    for _ in 0..2 {
        hand.batch_execute("DROP TABLE IF EXISTS app.later; CREATE TABLE app.later (id int)")
            .await
            .unwrap();
        assert_eq!(sqlstate(&client, READ).await, "42501");
        eventually("the table comes by itself", seconds(60), async || {
            (sqlstate(&client, READ).await == "00000").then_some(())
        })
        .await;
    }
    // An engine counts a look when it has answered, shortly after its grants are visible.
    let taken = eventually("both looks are counted", seconds(10), async || {
        let taken = looks(&[&one, &two]).await - before;
        (taken >= 2.0).then_some(taken)
    })
    .await;
    // A period is at least 1.6 s.
    let most = (begun.elapsed().as_secs_f64() / 1.6).ceil() + 1.0;
    assert!(taken <= most, "{taken} looks, {most} at most");

    // Accounts of a secret whose grants were changed keep what they have. Nobody is a member of the new role, so it
    // is not made.
    let (status, answer) = system
        .api
        .put(
            &format!("/v1/secrets/{path}"),
            json!({"attributes": {"grantPermissions": {"what": "SELECT", "where": "app.*"}}}),
        )
        .await;
    assert_eq!(status, 200, "{answer}");
    let before = looks(&[&one, &two]).await;
    eventually("more looks, at both sets", seconds(60), async || {
        (looks(&[&one, &two]).await >= before + 4.0).then_some(())
    })
    .await;
    let roles = "SELECT count(DISTINCT r.oid) FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid \
        WHERE r.rolname LIKE 'mayfly\\_grant\\_%' AND m.member = current_user::regrole";
    assert_eq!(
        scalar(&hand, roles).await,
        "1",
        "a role for nobody was made"
    );
    assert_eq!(sqlstate(&client, READ).await, "00000");
}
