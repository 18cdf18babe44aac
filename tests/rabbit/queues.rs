//! Figures of a broker: messages in queues, connections, channels, members of a queue.

use super::Rabbit;

impl Rabbit {
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

    /// A line for each queue, with these columns between tabs (`rabbitmqctl list_queues`).
    fn queues(&self, columns: &[&str]) -> String {
        self.eval(&format!(
            r#"{{text, [[lists:join("\t", [case I of {{name, {{resource, _, _, N}}}} -> N; {{_, C}} -> io_lib:format("~tp", [C]) end || I <- Q]), "\n"] || Q <- rabbit_amqqueue:info_all(<<"{}">>, [{}])]}}."#,
            self.vhost,
            columns.join(", ")
        ))
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

    /// Queues with messages whose name contains `part`: the name, how many are ready, how many a consumer has and has
    /// not settled, and the number of consumers.
    pub fn not_empty(&self, part: &str) -> Vec<String> {
        let columns = [
            "name",
            "messages_ready",
            "messages_unacknowledged",
            "consumers",
            "messages",
        ];
        self.queues(&columns)
            .lines()
            .filter(|line| line.contains(part) && !line.ends_with("\t0"))
            .map(|line| line.replace('\t', " "))
            .collect()
    }

    /// Of [`Self::messages`], those that a consumer has and has not settled.
    pub fn in_hand(&self, part: &str) -> u64 {
        self.count("messages_unacknowledged", part)
    }

    /// A counter of the node since its start, of all virtual hosts (`rabbit_global_counters`), such as
    /// `messages_received_total`.
    pub fn counter(&self, name: &str) -> u64 {
        let all = "maps:values(rabbit_global_counters:overview())";
        let sum = format!("lists:sum([maps:get({name}, C, 0) || C <- {all}])");
        let text = self.eval(&format!(r#"{{text, io_lib:format("~b", [{sum}])}}."#));
        text.trim().parse().unwrap()
    }

    /// Bytes that the clients of this virtual host have sent and received, on the connections that they have now.
    pub fn bytes_on_the_wire(&self) -> u64 {
        let items = "[vhost, recv_oct, send_oct]";
        let one = format!(
            r#"[{{vhost, <<"{}">>}}, {{recv_oct, R}}, {{send_oct, S}}]"#,
            self.vhost
        );
        let sum = format!(
            "lists:sum([R + S || {one} <- rabbit_networking:connection_info_all({items})])"
        );
        let text = self.eval(&format!(r#"{{text, io_lib:format("~b", [{sum}])}}."#));
        text.trim().parse().unwrap()
    }

    fn count(&self, column: &str, part: &str) -> u64 {
        self.queues(&["name", column])
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .filter(|(name, _)| name.contains(part))
            .map(|(_, count)| count.trim().parse::<u64>().unwrap_or(0))
            .sum()
    }

    /// Quorum queues that lack a member, each with the members that are online.
    pub fn incomplete(&self) -> Vec<String> {
        self.queues(&["type", "name", "online"])
            .lines()
            .filter(|line| line.starts_with("quorum"))
            .filter(|line| line.matches('@').count() != self.nodes())
            .map(str::to_owned)
            .collect()
    }
}
