//! CPU time of sealing and opening a message, with an encapsulation of its own and with a shared one, by turns in
//! one run: `cargo bench -p mayfly-protocol --bench seal`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and panics where it fails"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mayfly_protocol::seal::{Form, KeyPair};

const ROUNDS: usize = 9;
const MESSAGES: usize = 500;
/// About the size of a create.
const BODY: [u8; 900] = [b'x'; 900];

fn main() {
    // `cargo test` builds and runs benchmarks too. They measure only with `--bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    let at = Timestamp::now();
    let mut each = [
        (Form::Alone, vec![], vec![]),
        (Form::Shared, vec![], vec![]),
    ];
    for _ in 0..ROUNDS {
        for (form, sealing, opening) in &mut each {
            let seal = || {
                from.seal_as(*form, to.public(), at, b"head", &BODY)
                    .unwrap()
            };
            let envelope = seal();
            sealing.push(measure(|| drop(black_box(seal()))));
            opening.push(measure(|| {
                drop(black_box(
                    to.open(from.public(), b"head", &envelope).unwrap(),
                ));
            }));
        }
    }
    println!(
        "µs a message, {} bytes: minimum, median, maximum",
        BODY.len()
    );
    let [(_, alone, open_alone), (_, shared, open_shared)] = &mut each;
    for (what, times) in [
        ("seal alone", &mut *alone),
        ("seal shared", &mut *shared),
        ("open alone", &mut *open_alone),
        ("open shared", &mut *open_shared),
    ] {
        times.sort_unstable();
        let [least, median, most] = [0, ROUNDS / 2, ROUNDS - 1].map(|n| micros(times[n]));
        println!("{what:12} {least:7.2} {median:7.2} {most:7.2}");
    }
    for (what, alone, shared) in [("seal", alone, shared), ("open", open_alone, open_shared)] {
        let ratio = micros(alone[ROUNDS / 2]) / micros(shared[ROUNDS / 2]);
        println!("{what}: {ratio:.1} times as fast");
    }
}

fn measure(mut act: impl FnMut()) -> Duration {
    let begun = Instant::now();
    for _ in 0..MESSAGES {
        act();
    }
    begun.elapsed() / u32::try_from(MESSAGES).unwrap()
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
