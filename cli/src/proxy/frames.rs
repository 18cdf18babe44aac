//! The framing of PostgreSQL's protocol: one byte for the type of a message, four for its length, then the body
//! (PostgreSQL documentation, "Message Formats"). It follows the messages of a stream in chunks of any size. It
//! keeps only the beginning of a body that is in two chunks.

use std::cmp::min;

/// Larger lengths than PostgreSQL accepts (`MaxAllocSize`, 1 GB) are no lengths of messages.
const LENGTH_MAX: u32 = 0x4000_0000;
/// What is kept of a body: a status, or the first words of a command tag.
pub(super) const KEPT: usize = 32;

/// The position of a stream in its current message.
#[derive(Debug, Default)]
pub(super) struct Frames {
    header: [u8; 5],
    /// Number of bytes of the header that have arrived.
    header_len: usize,
    /// Number of bytes of the body that have not arrived.
    left: usize,
    /// The beginning of a body whose end is in a later chunk.
    kept: Vec<u8>,
}

/// The stream does not consist of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Garbled;

impl Frames {
    /// Follows a chunk. `seen` gets the type and the beginning of the body of each message that ends in it: up to
    /// the number of bytes that `kept` gives for the type. Returns the length of the chunk's part that belongs to
    /// messages that have ended.
    pub(super) fn follow(
        &mut self,
        chunk: &[u8],
        kept: impl Fn(u8) -> usize,
        mut seen: impl FnMut(u8, &[u8]),
    ) -> Result<usize, Garbled> {
        let mut at = 0;
        let mut whole = 0;
        while at < chunk.len() {
            if self.header_len < 5 {
                let take = (5 - self.header_len).min(chunk.len() - at);
                self.header[self.header_len..][..take].copy_from_slice(&chunk[at..][..take]);
                self.header_len += take;
                at += take;
                if self.header_len < 5 {
                    break;
                }
                let [_, a, b, c, d] = self.header;
                let length = u32::from_be_bytes([a, b, c, d]);
                if !(4..=LENGTH_MAX).contains(&length) {
                    return Err(Garbled);
                }
                self.left = usize::try_from(length - 4).map_err(|_| Garbled)?;
                self.kept.clear();
            }
            let most = kept(self.header[0]);
            let body = &chunk[at..][..self.left.min(chunk.len() - at)];
            at += body.len();
            self.left -= body.len();
            if self.left == 0 && self.kept.is_empty() {
                seen(self.header[0], &body[..min(body.len(), most)]);
            } else {
                let take = min(body.len(), most.saturating_sub(self.kept.len()));
                self.kept.extend_from_slice(&body[..take]);
                if self.left == 0 {
                    seen(self.header[0], &self.kept);
                }
            }
            if self.left == 0 {
                self.header_len = 0;
                whole = at;
            }
        }
        Ok(whole)
    }

    /// Whether the last message has ended, so that another one may follow.
    pub(super) fn is_between(&self) -> bool {
        self.header_len == 0
    }
}

/// A message of this type.
pub(super) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(body.len() + 5);
    message.push(kind);
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(body);
    message
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Number of bytes that are kept of a message's body. Some types need more than [`KEPT`].
    fn most(kind: u8) -> usize {
        match kind {
            0..100 => 70,
            _ => KEPT,
        }
    }

    proptest! {
        /// The messages and their boundaries do not depend on the chunks in which a stream arrives.
        #[test]
        fn chunks_do_not_matter(
            messages in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..90)), 0..20),
            cuts in prop::collection::vec(1_usize..40, 1..60),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|(kind, body)| message(*kind, body)).collect();
            let ends: Vec<usize> = messages
                .iter()
                .scan(0, |at, (_, body)| { *at += body.len() + 5; Some(*at) })
                .collect();
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            let mut at = 0;
            for cut in cuts.iter().cycle() {
                if at == stream.len() {
                    break;
                }
                let chunk = &stream[at..(at + cut).min(stream.len())];
                let whole = frames
                    .follow(chunk, most, |kind, body| seen.push((kind, body.to_vec())))
                    .unwrap();
                let last = ends.iter().rev().find(|end| (at + 1..=at + chunk.len()).contains(*end));
                prop_assert_eq!(whole, last.map_or(0, |end| end - at));
                at += chunk.len();
                prop_assert_eq!(frames.is_between(), at == 0 || ends.contains(&at));
            }
            let expected: Vec<(u8, Vec<u8>)> = messages
                .iter()
                .map(|(kind, body)| (*kind, body[..body.len().min(most(*kind))].to_vec()))
                .collect();
            prop_assert_eq!(seen, expected);
        }

        /// Any bytes are followed or refused; nothing panics, and the place stays inside of the chunk.
        #[test]
        fn any_bytes_are_followed_or_refused(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20),
        ) {
            let mut frames = Frames::default();
            for chunk in &chunks {
                match frames.follow(chunk, most, |kind, body| assert!(body.len() <= most(kind))) {
                    Ok(whole) => prop_assert!(whole <= chunk.len()),
                    Err(Garbled) => break,
                }
            }
        }
    }

    #[test]
    fn lengths_that_no_message_has_are_refused() {
        for length in [0_u32, 3, LENGTH_MAX + 1, u32::MAX] {
            let mut header = vec![b'Q'];
            header.extend_from_slice(&length.to_be_bytes());
            let mut frames = Frames::default();
            assert_eq!(
                frames.follow(&header, most, |_, _| ()),
                Err(Garbled),
                "{length}"
            );
        }
    }
}
