//! What the operator of a broker may do to it: policies, rights, alarms, deleted queues.

use super::Rabbit;
use crate::users::{Part, User, definitions};

impl Rabbit {
    /// Gives each user another password and ends all connections, as an operator does who rotates credentials.
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

    /// Sets the rights to write of the user of a part, as an earlier version had them.
    pub fn set_write(&self, part: &Part, configure: &str, write: &str, read: &str) {
        let name = self.user_name(part);
        let rights = [&*name, configure, write, read];
        let verb = ["set_permissions", "-p", &self.vhost];
        self.ctl(&[&verb[..], &rights].concat());
    }

    /// Sets an operator policy on names with this pattern.
    pub fn operator_policy(&self, name: &str, pattern: &str, definition: &str) {
        let what = [name, pattern, definition];
        self.ctl(&[&["set_operator_policy", "-p", &self.vhost][..], &what].concat());
    }

    /// The policies of `deploy/rabbitmq/definitions.json`.
    pub fn shipped_policies(&self) {
        for policy in definitions()["policies"].as_array().unwrap() {
            let text = |key: &str| policy[key].as_str().unwrap();
            let priority = policy["priority"].as_i64().unwrap();
            let definition = policy["definition"].to_string();
            let priority = i32::try_from(priority).unwrap();
            self.policy(text("name"), text("pattern"), &definition, priority);
        }
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

    /// Has the node show every message of this virtual host to `amq.rabbitmq.trace`, or ends that.
    pub fn trace(&self, on: bool) {
        let verb = if on { "start" } else { "stop" };
        self.eval(&format!(r#"rabbit_trace:{verb}(<<"{}">>)."#, self.vhost));
    }

    /// Makes the node believe that it has no memory left, or enough again. Without memory it accepts no message from
    /// a publisher.
    pub fn memory_alarm(&self, on: bool) {
        assert!(self.own, "the shared node is not for blocking");
        let most: &[&str] = if on {
            &["0.0001"]
        } else {
            &["absolute", "1GB"]
        };
        self.ctl(&[&["set_vm_memory_high_watermark"], most].concat());
    }

    /// Deletes every queue and every exchange of Mayfly, with their content. The queues of a connection that has just
    /// ended may be gone meanwhile.
    pub fn wipe(&self) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [(catch rabbit_amqqueue:delete(Q, false, false, <<"test">>)) || Q <- rabbit_amqqueue:list(V)], [rabbit_exchange:delete(element(2, X), false, <<"test">>) || X <- rabbit_exchange:list(V), binary:match(element(4, element(2, X)), <<"mayfly">>) =/= nomatch], ok."#,
            self.vhost
        ));
    }

    /// Deletes the queues whose name contains `part`. Their consumers' channels are suspended meanwhile, as in a busy
    /// node, and are notified only 450 ms later.
    pub fn delete(&self, part: &str) {
        self.delete_and(part, "timer:sleep(450)");
    }

    /// The same, and declares the queues again before the channels are notified.
    pub fn replace(&self, part: &str) {
        self.delete_and(part, r#"{new, _} = rabbit_amqqueue:declare(element(2, Q), true, false, amqqueue:get_arguments(Q), none, <<"test">>)"#);
    }

    fn delete_and(&self, part: &str, then: &str) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [begin C = [element(1, X) || X <- rabbit_amqqueue:consumers(Q)], [erlang:suspend_process(P) || P <- C], {{ok, _}} = rabbit_amqqueue:delete(Q, false, false, <<"test">>), {then}, [erlang:resume_process(P) || P <- C] end || Q <- rabbit_amqqueue:list(V), binary:match(element(4, element(2, Q)), <<"{part}">>) =/= nomatch], ok."#,
            self.vhost
        ));
    }

    /// Has each node write down the owners of its files. RabbitMQ 3.10 does that half a second after a quorum queue
    /// was made, or later on a busy machine. A crash before that leaves the queue without a member.
    pub fn write_down(&self) {
        self.eval("[[rpc:call(N, dets, sync, [T]) || T <- rpc:call(N, dets, all, [])] || N <- rabbit_nodes:all_running()].");
    }

    /// Loses what is parked, and nothing else.
    pub fn lose_parked(&self) {
        self.eval(&format!(
            r#"V = <<"{0}">>, [rabbit_amqqueue:purge(Q) || Q <- rabbit_amqqueue:list(V), binary:match(element(4, element(2, Q)), <<".delay.">>) =/= nomatch], ok."#,
            self.vhost
        ));
    }
}
