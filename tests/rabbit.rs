//! RabbitMQ for tests: the shared node, one virtual host a system, or a node of one's own for who
//! wants to crash it.

use std::path::PathBuf;

use crate::process::run;
use crate::{run_dir, script, word};

/// A virtual host of a node.
pub struct Rabbit {
    directory: PathBuf,
    vhost: String,
    own: bool,
    is_handle: bool,
}

impl Rabbit {
    /// A fresh virtual host of the shared node.
    pub fn shared() -> Self {
        let directory = PathBuf::from(
            std::env::var_os("MAYFLY_TEST_BROKER")
                .expect("run the end-to-end tests with `make e2e`"),
        );
        let rabbit = Self {
            directory,
            vhost: format!("test-{}", word()),
            own: false,
            is_handle: false,
        };
        rabbit.eval(&format!(
            r#"V = <<"{0}">>, rabbit_vhost:add(V, <<"test">>), rabbit_auth_backend_internal:set_permissions(<<"mayfly">>, V, <<".*">>, <<".*">>, <<".*">>, <<"test">>)."#,
            rabbit.vhost
        ));
        rabbit
    }

    /// A node of its own.
    pub fn own() -> Self {
        let directory = run_dir().join(format!("broker-{}", word()));
        let rabbit = Self {
            directory,
            vhost: "/".to_owned(),
            own: true,
            is_handle: false,
        };
        rabbit.start();
        rabbit
    }

    fn script(&self, verb: &str) {
        run(
            &script("rabbitmq.sh"),
            &[verb, self.directory.to_str().unwrap()],
        );
    }

    /// The same node, for another thread; ending it stays with this one.
    pub fn handle(&self) -> Self {
        Self {
            directory: self.directory.clone(),
            vhost: self.vhost.clone(),
            own: self.own,
            is_handle: true,
        }
    }

    /// Starts the node (again).
    pub fn start(&self) {
        self.script("start");
    }

    /// Crashes the node.
    pub fn kill(&self) {
        assert!(self.own, "the shared node is not for crashing");
        self.script("kill");
    }

    fn eval(&self, expression: &str) -> String {
        run(
            &script("rabbitmq.sh"),
            &[
                "ctl",
                self.directory.to_str().unwrap(),
                "-q",
                "eval",
                expression,
            ],
        )
    }

    /// The AMQP URL.
    pub fn url(&self) -> String {
        let url = std::fs::read_to_string(self.directory.join("amqp-url")).unwrap();
        let base = url.trim().strip_suffix("%2f").unwrap().to_owned();
        base + &self.vhost.replace('/', "%2f")
    }

    /// The node's files.
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// Deletes every queue and every exchange of ours, with whatever was in them.
    pub fn wipe(&self) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [rabbit_amqqueue:delete(Q, false, false, <<"test">>) || Q <- rabbit_amqqueue:list(V)], [rabbit_exchange:delete(element(2, X), false, <<"test">>) || X <- rabbit_exchange:list(V), binary:match(element(4, element(2, X)), <<"mayfly">>) =/= nomatch], ok."#,
            self.vhost
        ));
    }

    /// Loses what is parked, and nothing else.
    pub fn lose_parked(&self) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [rabbit_amqqueue:purge(Q) || Q <- rabbit_amqqueue:list(V), binary:match(element(4, element(2, Q)), <<".delay.">>) =/= nomatch], ok."#,
            self.vhost
        ));
    }

    /// Messages in each queue whose name contains `part`.
    pub fn messages(&self, part: &str) -> u64 {
        let text = run(
            &script("rabbitmq.sh"),
            &[
                "ctl",
                self.directory.to_str().unwrap(),
                "-q",
                "-p",
                &self.vhost,
                "list_queues",
                "--no-table-headers",
                "name",
                "messages",
            ],
        );
        text.lines()
            .filter_map(|line| line.split_once('\t'))
            .filter(|(name, _)| name.contains(part))
            .map(|(_, count)| count.trim().parse::<u64>().unwrap_or(0))
            .sum()
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        if self.is_handle {
            // Somebody else's to end.
        } else if self.own {
            self.script("stop");
        } else if !std::thread::panicking() {
            self.eval(&format!(
                r#"rabbit_vhost:delete(<<"{}">>, <<"test">>)."#,
                self.vhost
            ));
        }
    }
}
