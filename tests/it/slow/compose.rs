//! `deploy/compose/up.sh` as shipped, without Docker: `tests/compose/docker` gives each service of compose.yaml its
//! files, environment and user, on real RabbitMQ, PostgreSQL and Prometheus.

use std::path::{Path, PathBuf};
use std::process::Command;

use mayfly_tests::process::{binary, run_command};
use mayfly_tests::{run_dir, word};
use serde_json::Value;

fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap().to_owned()
}

/// A container cannot write the files it gets from this machine, and others cannot reach its ports.
fn is_closed(compose: &Value) {
    let mut programs = 0;
    for (name, service) in compose["services"].as_object().unwrap() {
        for mount in service["volumes"].as_array().unwrap() {
            let parts: Vec<_> = mount.as_str().unwrap().split(':').collect();
            match parts[0].starts_with('.') {
                true => assert_eq!(parts.get(2), Some(&"ro"), "{name}: {mount}"),
                false => assert!(!compose["volumes"][parts[0]].is_null(), "{name}: {mount}"),
            }
        }
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(port.as_str().unwrap().starts_with("127.0.0.1:"), "{name}");
        }
        if service["image"].as_str().unwrap().starts_with("mayfly") {
            programs += 1;
            assert_eq!(service["read_only"], true, "{name}");
        }
    }
    assert_eq!(programs, 3);
}

#[test]
fn the_compose_file_comes_up_and_gives_an_account() {
    let directory = run_dir().join(format!("compose-{}", word()));
    for part in ["programs", "helm/mayfly"] {
        std::fs::create_dir_all(directory.join(part)).unwrap();
    }
    // A copy, since up.sh makes secrets beside itself.
    for (from, to) in [("deploy", ""), ("helm/mayfly/files", "helm/mayfly")] {
        run_command(
            Command::new("cp")
                .arg("-r")
                .arg(repository().join(from))
                .arg(directory.join(to)),
        );
    }
    // Files of this checkout are not used.
    let _ = std::fs::remove_dir_all(directory.join("deploy/compose/secrets"));
    let text = std::fs::read_to_string(directory.join("deploy/compose.yaml")).unwrap();
    let mut compose: serde_yaml_ng::Value = serde_yaml_ng::from_str(&text).unwrap();
    compose.apply_merge().unwrap();
    let compose = serde_json::to_value(&compose).unwrap();
    is_closed(&compose);
    std::fs::write(directory.join("compose.json"), compose.to_string()).unwrap();
    let programs = binary("mayfly").parent().unwrap().to_owned();
    let done = run_command(
        Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private"])
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .args([
                "bash",
                "-euc",
                r#"mount --bind "$1" "$2/programs" && exec python3 "$3" "$2""#,
            ])
            .arg("compose")
            .args([&programs, &directory])
            .arg(repository().join("tests/compose/run.py")),
    );
    assert!(done.ends_with("compose: ok"), "{done}");
}
