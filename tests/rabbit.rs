//! RabbitMQ for tests: a virtual host of the shared node for each system, or a node or a cluster of its
//! own for a test that crashes it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

mod operator;
mod queues;
mod shell;

use crate::process::{run, run_command};
use crate::users::{Part, User};
use crate::{run_dir, script, word};

/// The files of the shared node.
fn shared_directory() -> PathBuf {
    std::env::var_os("MAYFLY_TEST_BROKER")
        .expect("run the end-to-end tests with `make e2e`")
        .into()
}

/// Pools whose users are made together with the virtual host.
const POOLS: usize = 2;

/// A virtual host of a node, or of a cluster.
pub struct Rabbit {
    /// Of its nodes.
    directories: Vec<PathBuf>,
    vhost: String,
    own: bool,
    is_handle: bool,
    users: Arc<Mutex<Vec<User>>>,
    /// Names of pools whose users exist already.
    pools: Arc<Mutex<Vec<String>>>,
}

impl Rabbit {
    /// A fresh virtual host of the shared node.
    pub fn shared() -> Self {
        let rabbit = Self {
            directories: vec![shared_directory()],
            vhost: format!("test-{}", word()),
            own: false,
            is_handle: false,
            users: Arc::default(),
            pools: Arc::default(),
        };
        rabbit.make_users(&format!(
            r#"rabbit_vhost:add(<<"{0}">>, <<"test">>), rabbit_auth_backend_internal:set_permissions(<<"mayfly">>, <<"{0}">>, <<".*">>, <<".*">>, <<".*">>, <<"test">>), "#,
            rabbit.vhost
        ));
        rabbit
    }

    /// A node of its own.
    pub fn own() -> Self {
        Self::of_release("")
    }

    /// A node of its own of a release: `4`, or Debian's.
    pub fn of_release(release: &str) -> Self {
        Self::started(&[("MAYFLY_RABBITMQ", release)], 1)
    }

    /// A node of its own of a release, with the management API.
    pub fn with_management(release: &str) -> Self {
        let management = ("MAYFLY_RABBITMQ_MANAGEMENT", "1");
        Self::started(&[("MAYFLY_RABBITMQ", release), management], 1)
    }

    /// The management API of one that has it, with the administrator's password.
    pub fn management_url(&self) -> String {
        let file = self.directory().join("management-url");
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }

    /// A node of its own that speaks TLS only, with a certificate of an authority of its own.
    pub fn with_tls() -> Self {
        Self::started(&[("MAYFLY_RABBITMQ_TLS", "1")], 1)
    }

    /// The same, which wants a certificate of that authority of each client, and takes its common name
    /// for a user's where the client asks for that (SASL EXTERNAL).
    pub fn with_client_certificates() -> Self {
        Self::started(&[("MAYFLY_RABBITMQ_TLS", "client")], 1)
    }

    /// The authority of one that speaks TLS, as a file.
    pub fn authority(&self) -> PathBuf {
        self.directory().join("ca.pem")
    }

    /// A cluster of its own of three nodes.
    pub fn cluster(release: &str) -> Self {
        Self::started(&[("MAYFLY_RABBITMQ", release)], 3)
    }

    fn started(variables: &[(&str, &str)], nodes: usize) -> Self {
        let mut rabbit = Self {
            directories: Vec::new(),
            vhost: "/".to_owned(),
            own: true,
            is_handle: false,
            users: Arc::default(),
            pools: Arc::default(),
        };
        for _ in 0..nodes {
            let directory = run_dir().join(format!("broker-{}", word()));
            let mut start = Command::new(script("rabbitmq.sh"));
            start
                .arg("start")
                .arg(&directory)
                // One shell evaluates expressions for all nodes.
                .env("MAYFLY_RABBITMQ_BESIDE", shared_directory())
                .envs(variables.iter().copied());
            if let Some(seed) = rabbit.directories.first() {
                start.env("MAYFLY_RABBITMQ_JOIN", seed);
            }
            rabbit.directories.push(directory);
            run_command(&mut start);
        }
        rabbit.make_users("");
        rabbit
    }

    /// Makes the users of a dispatcher and of the engines of some later pools. The Erlang text `before` runs first.
    fn make_users(&self, before: &str) {
        let pools: Vec<String> = (0..POOLS).map(|_| format!("pool-{}", word())).collect();
        let engines = pools.iter().map(|pool| Part::Engine(pool.clone()));
        let users: Vec<User> = [Part::Dispatcher]
            .into_iter()
            .chain(engines)
            .map(|part| User::new(part, &self.vhost))
            .collect();
        let made: Vec<String> = users.iter().map(User::making).collect();
        self.eval(&format!("{before}{}.", made.join(", ")));
        self.users.lock().unwrap().extend(users);
        self.pools.lock().unwrap().extend(pools);
    }

    /// A name for the next pool, whose user is there.
    pub fn next_pool(&self) -> Option<String> {
        self.pools.lock().unwrap().first().cloned()
    }

    /// The same, which is not given again.
    pub fn take_pool(&self) -> String {
        let mut pools = self.pools.lock().unwrap();
        match pools.is_empty() {
            true => format!("pool-{}", word()),
            false => pools.remove(0),
        }
    }

    /// The AMQP URL of each node for a part, as a user with the shipped rights.
    pub fn urls_for(&self, part: &Part) -> Vec<String> {
        let known = |users: &[User]| users.iter().find(|user| user.part == *part).cloned();
        let found = known(&self.users.lock().unwrap());
        let user = found.unwrap_or_else(|| {
            let user = User::new(part.clone(), &self.vhost);
            self.eval(&format!("{}.", user.making()));
            self.users.lock().unwrap().push(user.clone());
            user
        });
        let urls = self.urls();
        urls.iter().map(|url| user.in_url(url)).collect()
    }

    /// The same in one line, as Mayfly wants it.
    pub fn url_for(&self, part: &Part) -> String {
        self.urls_for(part).join(",")
    }

    /// The name of the user of a part.
    pub fn user_name(&self, part: &Part) -> String {
        self.url_for(part);
        let users = self.users.lock().unwrap();
        let user = users.iter().find(|user| user.part == *part);
        user.unwrap().name.clone()
    }

    /// How many nodes it has.
    pub fn nodes(&self) -> usize {
        self.directories.len()
    }

    fn script(&self, node: usize, verb: &str) -> String {
        run(
            &script("rabbitmq.sh"),
            &[verb, self.directories[node].to_str().unwrap()],
        )
    }

    /// Another handle, for another thread. The broker ends with the first handle.
    pub fn handle(&self) -> Self {
        Self {
            directories: self.directories.clone(),
            vhost: self.vhost.clone(),
            own: self.own,
            is_handle: true,
            users: self.users.clone(),
            pools: self.pools.clone(),
        }
    }

    /// Starts a node again.
    pub fn start(&self, node: usize) {
        self.script(node, "start");
    }

    /// Crashes a node.
    pub fn kill(&self, node: usize) {
        assert!(self.own, "the shared node is not for crashing");
        self.script(node, "kill");
    }

    /// Sends a node a signal, as STOP and CONT.
    pub fn signal(&self, node: usize, signal: rustix::process::Signal) {
        assert!(self.own, "the shared node is not for stopping");
        let pid = self.script(node, "pid");
        let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn ctl(&self, arguments: &[&str]) -> String {
        let directory = self.directories[0].to_str().unwrap();
        let all = [&["ctl", directory, "-q"], arguments].concat();
        run(&script("rabbitmq.sh"), &all)
    }

    /// Evaluates Erlang on the (first) node.
    fn eval(&self, expression: &str) -> String {
        shell::eval(self.directory(), expression)
    }

    /// The AMQP URL of the administrator, of each node.
    pub fn urls(&self) -> Vec<String> {
        let of = |directory: &PathBuf| {
            let url = std::fs::read_to_string(directory.join("amqp-url")).unwrap();
            let base = url.trim().strip_suffix("%2f").unwrap().to_owned();
            base + &self.vhost.replace('/', "%2f")
        };
        self.directories.iter().map(of).collect()
    }

    /// The same in one line.
    pub fn url(&self) -> String {
        self.urls().join(",")
    }

    /// The first node's files.
    pub fn directory(&self) -> &std::path::Path {
        &self.directories[0]
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        if self.is_handle {
            // The first handle ends it.
        } else if self.own {
            // The first node last: the cluster's port mapper is its.
            for node in (0..self.nodes()).rev() {
                self.script(node, "stop");
            }
        } else if !std::thread::panicking() {
            let users = self.users.lock().unwrap();
            let ended: Vec<String> = users.iter().map(User::ending).collect();
            // Nobody waits for it: 30 quorum queues take a second to end.
            self.eval(&format!(
                r#"spawn(fun() -> {}, rabbit_vhost:delete(<<"{}">>, <<"test">>) end)."#,
                ended.join(", "),
                self.vhost
            ));
        }
    }
}
