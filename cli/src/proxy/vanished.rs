//! Peers that vanished while data was on its way to them: their machine lost its power or its network. Keepalive
//! finds them only on a quiet connection, and the kernel sends unacknowledged data again for a quarter of an hour
//! (tcp(7), `tcp_retries2`). `TCP_USER_TIMEOUT` would be shorter, but it also ends the connection of a peer that is
//! alive and does not read for that time, such as a client that writes a large result to a slow disk, or a server
//! whose COPY waits for a lock. So the proxy asks the kernel how many times it has sent data without an answer.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

/// The connections of this process's network (proc(5)).
const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
/// Time between two reads of these tables.
const EVERY: Duration = Duration::from_secs(10);
/// Transmissions without an acknowledgement. The pauses between them double from 0.2 s or more on, so the peer has been
/// silent for at least 25 s. A peer that does not read acknowledges each probe of its window.
const UNANSWERED: u32 = 7;

/// Both ends of a TCP connection: this process's, and its peer's.
pub(super) type Ends = (SocketAddr, SocketAddr);

/// The connections whose peers have vanished.
pub(super) type Vanished = Arc<HashSet<Ends>>;

/// Looks for connections whose peers have vanished, until it is dropped.
pub(super) async fn watch(found: watch::Sender<Vanished>) {
    loop {
        sleep(EVERY).await;
        if found.receiver_count() == 0 {
            continue;
        }
        // The tables have the connections of all programs here. Sessions do not wait until they are read.
        let vanished = spawn_blocking(look).await.unwrap_or_default();
        if !vanished.is_empty() {
            found.send_replace(Arc::new(vanished));
        }
    }
}

/// Reads the tables line by line: they may be long.
fn look() -> HashSet<Ends> {
    // Without IPv6 there is one table. Without any table, only the kernel ends the connections of vanished peers.
    let tables = TABLES.iter().filter_map(|table| File::open(table).ok());
    let lines = tables.flat_map(|table| BufReader::new(table).lines().map_while(Result::ok));
    lines.filter_map(|line| silent(&line)).collect()
}

/// The connection of a line of a table, if its peer is silent.
fn silent(line: &str) -> Option<Ends> {
    // Number, local address, remote address, state, queues, timer, retransmissions, user, unanswered probes.
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote) = (fields.next()?, fields.next()?);
    let mut fields = fields.skip(3);
    let retransmissions = u32::from_str_radix(fields.next()?, 16).ok()?;
    let probes: u32 = fields.nth(1)?.parse().ok()?;
    match retransmissions.max(probes) >= UNANSWERED {
        true => Some((address(local)?, address(remote)?)),
        false => None,
    }
}

/// An address as the kernel prints it: words of 32 bits that are in the order of the network in its memory, and a port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let address: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        _ => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Ipv6Addr::from(bytes).to_canonical()
        }
    };
    Some(SocketAddr::new(
        address,
        u16::from_str_radix(port, 16).ok()?,
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn a_peer_that_acknowledges_nothing_is_silent() {
        let four = "1: 0100007F:1920 0201007F:A22A 01 00000064:00000000 01:00000081 RETRANS     0        PROBES 7234587 3 0";
        let six = "0: 0000000000000000FFFF00000100007F:1920 B80D0120000000000000000001000000:0001 01 0:0 04:00000081 RETRANS 0 PROBES 7 3 0";
        let line = |line: &str, retransmissions: &str, probes: &str| {
            let line = line.replace("RETRANS", retransmissions);
            silent(&line.replace("PROBES", probes))
        };
        let ends = |local: &str, remote: &str| (local.parse().unwrap(), remote.parse().unwrap());
        let expected = ends("127.0.0.1:6432", "127.0.1.2:41514");
        assert_eq!(line(four, "00000007", "0"), Some(expected));
        assert_eq!(line(four, "00000006", "0"), None);
        let expected = ends("127.0.0.1:6432", "[2001:db8::1]:1");
        assert_eq!(line(six, "00000000", "7"), Some(expected));
        // A keepalive timer, and a peer that does not read but answers each probe.
        assert_eq!(line(six, "00000000", "3"), None);
        for malformed in [
            "",
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
            "1: x:1 y:2 01 0:0 01:0 00000007 0 0 1",
        ] {
            assert_eq!(silent(malformed), None, "{malformed}");
        }
    }
}
