//! A path to a server of this machine that takes time, as to another site.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Maximum amount that waits in one direction of one connection, in pieces of up to 64 KB.
const PIECES: usize = 64;

/// Opens a port of loopback that leads to another, with a round trip of this time. The whole delay is on what
/// clients send. Threads sleep with 0.1 ms accuracy, a timer of tokio with 1 ms. It ends with the process.
pub fn relay(target: u16, round_trip: Duration) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // If the server is full or stopped, the client sees its connection end.
            if let Ok(far) = TcpStream::connect(("127.0.0.1", target)) {
                carry(near, far, round_trip);
            }
        }
    });
    port
}

fn carry(near: TcpStream, far: TcpStream, delay: Duration) {
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    let (late, due) = mpsc::sync_channel::<(Instant, Vec<u8>)>(PIECES);
    let (mut near_in, mut near_out) = (near.try_clone().unwrap(), near);
    let (mut far_in, mut far_out) = (far.try_clone().unwrap(), far);
    thread::spawn(move || {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = near_in.read(&mut bytes) {
            if late
                .send((Instant::now() + delay, bytes[..n].to_vec()))
                .is_err()
            {
                break;
            }
        }
    });
    thread::spawn(move || {
        for (at, bytes) in due {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if far_out.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = far_out.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = std::io::copy(&mut far_in, &mut near_out);
        let _ = near_out.shutdown(Shutdown::Both);
    });
}
