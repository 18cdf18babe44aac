//! Functions for people at a terminal: `psql` with a credential, tables that are drawn again, completed paths.

use std::process::Command;

use mayfly_tests::cli::Cli;
use mayfly_tests::postgres::Server;
use mayfly_tests::process::binary;
use mayfly_tests::scenario::Scenario;
use mayfly_tests::system::prefix;
use mayfly_tests::{eventually, seconds};
use serde_json::{Value, json};

/// A command that runs at a terminal of its own (`script`), with its output and exit code.
fn at_terminal(cli: &Cli, line: &str) -> (String, Option<i32>) {
    let mut directories = vec![binary("mayfly").parent().unwrap().to_owned()];
    let path = std::env::var_os("PATH").unwrap();
    directories.extend(std::env::split_paths(&path));
    let inner = cli.command(&[]);
    let mut script = Command::new("script");
    script.args(["-qec", line, "/dev/null"]);
    script.envs(
        inner
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    script
        .env("PATH", std::env::join_paths(directories).unwrap())
        .env("TERM", "xterm")
        .stdin(std::process::Stdio::null());
    let output = script.output().unwrap();
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        output.status.code(),
    )
}

/// The password is in a private file, which is deleted when psql ends, and nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn psql_has_a_credential_that_nobody_sees() {
    let (system, site, path, _engine) = Scenario::on(Server::pg15())
        .attributes(json!({"ttl": 300}))
        .start()
        .await;
    let cli = Cli { system: &system };
    let look = r#"\! echo "file $PGPASSFILE"; stat -c 'mode %a' "$PGPASSFILE" "$(dirname "$PGPASSFILE")"; cat "$PGPASSFILE"; for at in environ cmdline; do tr '\0' '\n' </proc/$PPID/$at; done"#;
    let mut psql = cli.command(&[
        "psql",
        &path,
        "--",
        "-XAt",
        "-c",
        "SELECT current_user",
        "-c",
        look,
    ]);
    let directory = site.server.program("psql").parent().unwrap().to_owned();
    let path_variable = std::env::var("PATH").unwrap();
    let with_psql = format!("{}:{path_variable}", directory.display());
    // Variables of the shell do not reach psql.
    let output = psql
        .env("PATH", &with_psql)
        .env("PGPASSWORD", "of another account")
        .env("PGREQUIREAUTH", "password")
        .output()
        .unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{shown}");
    let user = shown.lines().next().unwrap().to_owned();
    assert!(user.starts_with(&prefix(&site)), "{shown}");
    let of = |begin: &str| {
        shown
            .lines()
            .find_map(|line| line.strip_prefix(begin))
            .unwrap()
            .to_owned()
    };
    assert!(shown.contains("mode 600\nmode 700\n"), "{shown}");
    let entry = shown
        .lines()
        .find(|line| line.contains(&format!(":{user}:")))
        .unwrap();
    let password = entry.rsplit(':').next().unwrap();
    assert!(password.len() > 15, "{shown}");
    assert_eq!(
        shown.matches(password).count(),
        1,
        "it is elsewhere too: {shown}"
    );
    assert!(!shown.contains("of another account"), "{shown}");
    // A server in the middle gets no password, as the base secret requires.
    assert_eq!(of("PGREQUIREAUTH="), "scram-sha-256,none");
    assert!(["disable", "prefer"].contains(&of("PGSSLMODE=").as_str()));
    assert!(!std::path::Path::new(&of("file ")).exists());
    eventually("its account is gone", seconds(20), async || {
        site.server.roles(&user).await.is_empty().then_some(())
    })
    .await;
    let mut fails = cli.command(&["psql", &path, "--", "-XAtc", "SELECT 1/0"]);
    let output = fails.env("PATH", &with_psql).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_more_than_a_pipe() {
    let (system, _site, path, engine) = Scenario::on(Server::pg18())
        .attributes(json!({"ttl": 300}))
        .start()
        .await;
    let cli = Cli { system: &system };
    let read = format!("mayfly secret read {path}");
    let (shown, code) = at_terminal(&cli, &read);
    assert!(
        code == Some(0) && shown.contains("valid for ") && shown.contains(", until "),
        "{shown}"
    );
    let piped = cli.run(&["secret", "read", &path]);
    let answer: Value = serde_json::from_slice(&piped.stdout).unwrap();
    assert!(answer["data"]["password"].is_string());
    assert_eq!(String::from_utf8(piped.stderr).unwrap(), "");

    // Ctrl-C ends the command. The terminal is as before, with the last table.
    for (command, part) in [("status", engine.pool.as_str()), ("lease list", "active")] {
        let line = format!(
            "stty cols 200 rows 40; timeout --foreground --preserve-status -s INT 5 mayfly {command} --watch"
        );
        let (shown, code) = at_terminal(&cli, &line);
        assert_eq!(code, Some(130), "{shown}");
        let (before, drawn) = shown.split_once("\x1b[?1049h\x1b[?25l").unwrap();
        let (drawn, after) = drawn.split_once("\x1b[?25h\x1b[?1049l").unwrap();
        assert!(before.is_empty(), "{shown:?}");
        assert!(
            drawn.matches("\x1b[H").count() >= 2 && drawn.contains(part),
            "{shown:?}"
        );
        assert!(
            after.contains(part) && !after.contains("\x1b[?"),
            "{shown:?}"
        );
    }
    for command in [&["status", "--watch"][..], &["lease", "list", "--watch"]] {
        let said = cli.fails(2, command);
        assert!(said.contains("terminal"), "{said}");
    }
}

/// bash completes a path, also after a colon, at which it divides words.
#[tokio::test(flavor = "multi_thread")]
async fn paths_are_completed_from_the_dispatcher() {
    let (system, _site, path, _engine) = Scenario::on(Server::pg18()).start().await;
    let cli = Cli { system: &system };
    let script = cli.ok(&["completions", "bash"]);
    std::fs::write(system.directory.join("completion"), script).unwrap();
    let (begin, rest) = path.split_once(':').unwrap();
    let complete = |line: &str, words: &str| {
        let mut bash = Command::new("bash");
        let text = format!(
            ". ./completion; COMP_WORDBREAKS=$' \\t\\n\"><=;|&(:'; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; \
             COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _mayfly_with_paths mayfly \"${{COMP_WORDS[COMP_CWORD]}}\" read 2>/dev/null; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let inner = cli.command(&[]);
        bash.args(["-c", &text]).current_dir(&system.directory);
        bash.envs(
            inner
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        let directory = binary("mayfly").parent().unwrap().display().to_string();
        bash.env(
            "PATH",
            format!("{directory}:{}", std::env::var("PATH").unwrap()),
        );
        String::from_utf8(bash.output().unwrap().stdout).unwrap()
    };
    let whole = complete(
        &format!("mayfly secret read {begin}"),
        &format!("mayfly secret read {begin}"),
    );
    assert!(whole.lines().any(|line| line == path), "{whole}");
    let after = complete(
        &format!("mayfly exec {begin}:"),
        &format!("mayfly exec {begin} :"),
    );
    assert!(after.lines().any(|line| line == rest), "{after}");
    let options = complete("mayfly status --wa", "mayfly status --wa");
    assert_eq!(options.trim(), "--watch", "{options}");

    let pages = system.directory.join("pages");
    std::fs::create_dir(&pages).unwrap();
    cli.ok(&["man", pages.to_str().unwrap()]);
    let page = std::fs::read_to_string(pages.join("mayfly-agent.1")).unwrap();
    assert!(page.contains("\\-\\-pg\\-service"), "{page}");
    assert!(pages.join("mayfly-secret-read.1").exists());
}
