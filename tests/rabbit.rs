//! RabbitMQ for tests: the shared node, one virtual host a system, or a node or a cluster of one's
//! own for who wants to crash it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::process::{run, run_command};
use crate::users::{Part, User};
use crate::{run_dir, script, word};

/// Pools whose users are made together with the virtual host, since each look at the node costs a second.
const POOLS: usize = 2;

/// A virtual host of a node, or of a cluster.
pub struct Rabbit {
    /// Of its nodes.
    directories: Vec<PathBuf>,
    vhost: String,
    own: bool,
    is_handle: bool,
    users: Arc<Mutex<Vec<User>>>,
    /// Names for pools whose users are there already.
    pools: Arc<Mutex<Vec<String>>>,
}

impl Rabbit {
    /// A fresh virtual host of the shared node.
    pub fn shared() -> Self {
        let directory = PathBuf::from(
            std::env::var_os("MAYFLY_TEST_BROKER")
                .expect("run the end-to-end tests with `make e2e`"),
        );
        let rabbit = Self {
            directories: vec![directory],
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

    /// The users of a dispatcher and of engines of some pools to come, after something else.
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

    /// The AMQP URL of each node for a part, as a user with the rights that are shipped for it.
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

    /// Gives each user another password and ends all connections, as who rotates credentials does.
    pub fn change_passwords(&self) {
        let mut users = self.users.lock().unwrap();
        users.iter_mut().for_each(User::forget_password);
        let changed: Vec<String> = users.iter().map(User::changing).collect();
        self.eval(&format!("{}.", changed.join(", ")));
        self.close_connections();
    }

    /// Ends all connections of this virtual host.
    pub fn close_connections(&self) {
        self.ctl(&["close_all_connections", "-p", &self.vhost, "a test"]);
    }

    /// The name of the user of a part.
    pub fn user_name(&self, part: &Part) -> String {
        self.url_for(part);
        let users = self.users.lock().unwrap();
        let user = users.iter().find(|user| user.part == *part);
        user.unwrap().name.clone()
    }

    /// Sets the rights to write of the user of a part, as they were before a new version.
    pub fn set_write(&self, part: &Part, configure: &str, write: &str, read: &str) {
        let name = self.user_name(part);
        let rights = [&*name, configure, write, read];
        let verb = ["set_permissions", "-p", &self.vhost];
        self.ctl(&[&verb[..], &rights].concat());
    }

    /// Puts an operator policy on what has a name of this pattern.
    pub fn operator_policy(&self, name: &str, pattern: &str, definition: &str) {
        let what = [name, pattern, definition];
        self.ctl(&[&["set_operator_policy", "-p", &self.vhost][..], &what].concat());
    }

    /// The policies of `deploy/rabbitmq/definitions.json`.
    pub fn shipped_policies(&self) {
        for policy in crate::users::definitions()["policies"].as_array().unwrap() {
            let text = |key: &str| policy[key].as_str().unwrap();
            let priority = policy["priority"].as_i64().unwrap();
            let definition = policy["definition"].to_string();
            let priority = i32::try_from(priority).unwrap();
            self.policy(text("name"), text("pattern"), &definition, priority);
        }
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

    /// The same, for another thread; ending it stays with this one.
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

    /// Has the node show every message of this virtual host to `amq.rabbitmq.trace`, or no more.
    pub fn trace(&self, on: bool) {
        let verb = if on { "start" } else { "stop" };
        self.eval(&format!(r#"rabbit_trace:{verb}(<<"{}">>)."#, self.vhost));
    }

    fn eval(&self, expression: &str) -> String {
        self.ctl(&["eval", expression])
    }

    /// Has the node believe that it has no memory left, or enough again. Until then it takes
    /// nothing from who publishes.
    pub fn memory_alarm(&self, on: bool) {
        assert!(self.own, "the shared node is not for blocking");
        let most: &[&str] = if on {
            &["0.0001"]
        } else {
            &["absolute", "1GB"]
        };
        self.ctl(&[&["set_vm_memory_high_watermark"], most].concat());
    }

    /// Puts a policy on what has a name of this pattern (`rabbitmqctl set_policy`), as the broker's
    /// operator may: queues and exchanges.
    pub fn policy(&self, name: &str, pattern: &str, definition: &str, priority: i32) {
        let (vhost, priority) = (&*self.vhost, priority.to_string());
        let arguments = ["-p", vhost, "--priority", &priority, "--apply-to", "all"];
        let what = [name, pattern, definition];
        self.ctl(&[&["set_policy"], &arguments[..], &what].concat());
    }

    /// Takes a policy away.
    pub fn clear_policy(&self, name: &str) {
        self.ctl(&["clear_policy", "-p", &self.vhost, name]);
    }

    /// How many channels there are in this virtual host.
    pub fn channels(&self) -> usize {
        let list = self.ctl(&[
            "list_channels",
            "-p",
            &self.vhost,
            "pid",
            "--no-table-headers",
        ]);
        list.lines().filter(|line| line.contains('<')).count()
    }

    /// How many connections the node has.
    pub fn connections(&self) -> usize {
        let list = self.ctl(&["list_connections", "pid", "--no-table-headers"]);
        list.lines().count()
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

    /// Deletes every queue and every exchange of ours, with whatever was in them.
    pub fn wipe(&self) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [rabbit_amqqueue:delete(Q, false, false, <<"test">>) || Q <- rabbit_amqqueue:list(V)], [rabbit_exchange:delete(element(2, X), false, <<"test">>) || X <- rabbit_exchange:list(V), binary:match(element(4, element(2, X)), <<"mayfly">>) =/= nomatch], ok."#,
            self.vhost
        ));
    }

    /// Deletes the queues whose name contains `part`. Their consumers' channels stand still at that,
    /// as in a busy node, and hear of it only half a second later.
    pub fn delete(&self, part: &str) {
        self.delete_and(part, "timer:sleep(450)");
    }

    /// The same, and declares them again before those can hear of it.
    pub fn replace(&self, part: &str) {
        self.delete_and(part, r#"{new, _} = rabbit_amqqueue:declare(element(2, Q), true, false, amqqueue:get_arguments(Q), none, <<"test">>)"#);
    }

    fn delete_and(&self, part: &str, then: &str) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [begin C = [element(1, X) || X <- rabbit_amqqueue:consumers(Q)], [erlang:suspend_process(P) || P <- C], {{ok, _}} = rabbit_amqqueue:delete(Q, false, false, <<"test">>), {then}, [erlang:resume_process(P) || P <- C] end || Q <- rabbit_amqqueue:list(V), binary:match(element(4, element(2, Q)), <<"{part}">>) =/= nomatch], ok."#,
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

    fn queues(&self, columns: &[&str]) -> String {
        let arguments = ["-p", &self.vhost, "list_queues", "--no-table-headers"];
        self.ctl(&[&arguments, columns].concat())
    }

    /// Whether there is a queue whose name contains `part`.
    pub fn has(&self, part: &str) -> bool {
        self.queues(&["name"]).contains(part)
    }

    /// How many queues have a name that contains `part`.
    pub fn number(&self, part: &str) -> usize {
        let names = self.queues(&["name"]);
        names.lines().filter(|name| name.contains(part)).count()
    }

    /// Messages in each queue whose name contains `part`.
    pub fn messages(&self, part: &str) -> u64 {
        self.count("messages", part)
    }

    /// Of these, those that somebody was given and has not settled.
    pub fn in_hand(&self, part: &str) -> u64 {
        self.count("messages_unacknowledged", part)
    }

    fn count(&self, column: &str, part: &str) -> u64 {
        self.queues(&["name", column])
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .filter(|(name, _)| name.contains(part))
            .map(|(_, count)| count.trim().parse::<u64>().unwrap_or(0))
            .sum()
    }

    /// Whether each quorum queue has all its members.
    pub fn is_whole(&self) -> bool {
        self.queues(&["type", "online"])
            .lines()
            .filter(|line| line.contains("quorum"))
            .all(|line| line.matches('@').count() == self.nodes())
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        if self.is_handle {
            // Somebody else's to end.
        } else if self.own {
            // The first one last: what its cluster shares is its.
            for node in (0..self.nodes()).rev() {
                self.script(node, "stop");
            }
        } else if !std::thread::panicking() {
            let users = self.users.lock().unwrap();
            let ended: Vec<String> = users.iter().map(User::ending).collect();
            self.eval(&format!(
                r#"{}, rabbit_vhost:delete(<<"{}">>, <<"test">>)."#,
                ended.join(", "),
                self.vhost
            ));
        }
    }
}
