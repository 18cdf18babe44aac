//! The own tests of drivers, run at a server and through `mayfly proxy`: `make test-peers`. Each test has the same
//! result. The drivers are psycopg2, which is made of libpq, and pg8000, which has the protocol in Python.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use mayfly_tests::local_proxy::LocalProxy;
use mayfly_tests::postgres::{Credential, Server};
use mayfly_tests::process::run;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::{run_dir, word};
use serde_json::json;

/// The program that runs the tests of a driver, and prints the result of each.
const PROGRAM: &str = r#"
import os, pytest, sys
results = {}
class Results:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            results[report.nodeid] = report.outcome
pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]], plugins=[Results()])
with open(sys.argv[1], "w") as file:
    file.writelines(f"{outcome} {name}\n" for name, outcome in sorted(results.items()))
os._exit(0)
"#;

/// The tests make tables and types, and some leave them. The proxy uses another account, which could not drop them.
const EMPTY: &str = "DROP SCHEMA public CASCADE; CREATE SCHEMA public; \
    GRANT USAGE, CREATE ON SCHEMA public TO PUBLIC; CREATE EXTENSION hstore";

/// Where the tests log in.
struct Place<'a> {
    port: u16,
    user: &'a str,
    password: &'a str,
    database: &'a str,
}

/// Runs the tests of a driver. Returns the outcome of each.
fn outcomes(source: &Path, tests: &[&str], place: &Place<'_>) -> BTreeMap<String, String> {
    let file = run_dir().join(format!("peers-{}", word()));
    let mut command = Command::new(source.parent().unwrap().join("venv/bin/python"));
    command
        .args(["-c", PROGRAM])
        .arg(&file)
        .args(tests)
        .current_dir(source)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", place.port.to_string())
        .env("PGUSER", place.user)
        .env("PGPASSWORD", place.password)
        .env("PGDATABASE", place.database)
        .env("PSYCOPG2_TESTDB", place.database)
        .env("PGSSLMODE", "prefer");
    let output = command.output().unwrap();
    let text = std::fs::read_to_string(&file).unwrap_or_else(|_| panic!("{output:?}"));
    std::fs::write(file.with_extension("log"), &output.stdout).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(outcome, name)| (name.to_owned(), outcome.to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tests_of_drivers_have_the_same_results_through_the_proxy() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
    let fetched = PathBuf::from(run(&directory.join("fetch.sh"), &[]));
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 3600, "connectionLimit": 100}))
        .start()
        .await;
    let admin = site.admin().await;
    let answer = system.api.ok(&format!("/v1/secrets/{path}")).await;
    let direct = Credential::from_answer(&answer);
    let proxy = LocalProxy::start(&system, &path, &[]).await;
    let at_server = Place {
        port: site.server.port(),
        user: &direct.username,
        password: &direct.password,
        database: &site.name,
    };
    let through = Place {
        port: proxy.port,
        ..at_server
    };
    for (driver, tests, least) in [
        // The tests in `auth` need lines of pg_hba.conf. One test contains the user's name, and the readme needs a
        // server without a password.
        (
            "pg8000-1.31.6",
            &[
                "test",
                "--ignore-glob=*/auth/*",
                "--benchmark-skip",
                "-k",
                "not plain_socket and not readme",
            ][..],
            500,
        ),
        // One test compares the user's name with that of the account.
        (
            "psycopg2-2.9.13",
            &[
                "tests",
                "--deselect=tests/test_connection.py::TestConnectionInfo::test_user",
            ][..],
            500,
        ),
    ] {
        let source = fetched.join(driver);
        let mut both = Vec::new();
        for place in [&at_server, &through] {
            admin.batch_execute(EMPTY).await.unwrap();
            both.push(outcomes(&source, tests, place));
        }
        let [expected, found] = <[_; 2]>::try_from(both).unwrap();
        let passed = expected.values().filter(|it| *it == "passed").count();
        let differing: Vec<_> = expected
            .iter()
            .filter(|(name, outcome)| found.get(*name) != Some(*outcome))
            .map(|(name, outcome)| format!("{name}: {outcome}, {:?}", found.get(name)))
            .collect();
        eprintln!(
            "{driver}: {passed} of {} tests pass at the server",
            expected.len()
        );
        assert!(
            passed >= least,
            "{driver}: only {passed} tests pass at the server"
        );
        assert_eq!(expected.len(), found.len(), "{driver}");
        assert!(differing.is_empty(), "{driver}: {}", differing.join("\n"));
    }
}
