//! What the benchmarks' programs and their user half agree on: the frames, and the journal that every frame is entered in.
//!
//! A frame is 64 octets: Ethernet, IPv4, UDP, and at [`SEQUENCE_AT`] the frame's number. The source is that of user 1 to
//! [`State::users`], drawn at random; MAC and address of user `n` have `n` in their last three octets.
//!
//! The journal (see the user half's `journal` for how it is read):
//! - [`Clock::begun`] and [`Clock::done`] count the selector's stores, before and after each;
//! - `BEFORE[number]` is `done` when the frame's program run began, `AFTER[number]` is `begun` after it had ended;
//! - `RECEIVED[number]` is what came out at the far end.
#![no_std]

/// Octets of a frame, without a tag.
pub const FRAME_LEN: usize = 64;
/// Where the number of a frame is.
pub const SEQUENCE_AT: usize = 48;
/// Where the IPv4 header is.
pub const IP_AT: usize = 14;
/// Where the source address is.
pub const SOURCE_AT: usize = IP_AT + 12;
/// Entries of the journal; a power of two. No more frames than this may be under way.
pub const JOURNAL: u32 = 1 << 16;
/// The first three octets of every user's MAC.
pub const USER_OUI: [u8; 3] = [0x02, 0x00, 0x01];
/// The first octet of every user's address.
pub const USER_NET: u8 = 10;
/// In `RECEIVED`: one for each time the frame came out; the VID is below.
pub const ONCE: u64 = 1 << 16;

/// What the frame source goes by.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct State {
    /// Number of the next frame.
    pub next: u64,
    /// How many users there are.
    pub users: u64,
    /// Of the random numbers.
    pub seed: u64,
    /// Destination MAC, as it is in memory.
    pub destination: u64,
}

/// Counts stores of the selector.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// Stores that may have been made.
    pub begun: u64,
    /// Stores that have been made.
    pub done: u64,
}

/// What a frame may be handed on to: index into `NEXT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Next {
    /// XDP_PASS.
    Pass = 0,
    /// Redirect, and nothing else.
    Redirect = 1,
    /// Push one and the same tag, then redirect.
    RedirectTagged = 2,
    /// The gateway's program.
    Handover = 3,
    /// Look the network up in one hash map, push its tag, redirect.
    HashMap = 4,
    /// The same in the hash map that is in a map.
    MapInMap = 5,
    /// XDP_DROP.
    Drop = 6,
    /// Load one cache line of the user's own, anywhere in a table of all users, push its tag, redirect.
    OneLine = 7,
}

/// Entries of `NEXT`.
pub const NEXTS: u32 = 8;

/// Octets of an element of `LINES`: two cache lines that lie next to each other.
pub const LINES_LEN: usize = 128;

/// Where in `LINES` (so many elements) the user with this MAC has its line: element, and octet of it.
#[inline(always)]
pub const fn line_of(mac: u64, elements: u32) -> (u32, usize) {
    let mixed = mac.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((((mixed >> 32) * elements as u64) >> 32) as u32, (mixed as usize & 1) * (LINES_LEN / 2))
}

/// Where redirects go: index into `DEVICE`.
pub const OUT: u32 = 0;

/// The IPv4 header of every frame, without its checksum and its source.
pub const IP: [u8; 20] =
    [0x45, 0, 0, (FRAME_LEN - IP_AT) as u8, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1];

/// The checksum of that header with source `source` (RFC 1071).
#[inline(always)]
pub const fn checksum(source: [u8; 4]) -> u16 {
    const OTHERS: u32 = {
        let (mut sum, mut i) = (0, 0);
        while i < IP.len() {
            sum += (IP[i] as u32) << 8 | IP[i + 1] as u32;
            i += 2;
        }
        sum
    };
    let [a, b, c, d] = source;
    let sum = OTHERS + ((a as u32) << 8 | b as u32) + ((c as u32) << 8 | d as u32);
    let once = (sum & 0xffff) + (sum >> 16);
    !((once & 0xffff) + (once >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_with_its_checksum_sums_up_to_nothing() {
        for source in [[10, 0, 0, 1], [10, 255, 255, 255], [10, 15, 66, 64]] {
            let mut header = IP;
            header[10..12].copy_from_slice(&checksum(source).to_be_bytes());
            header[12..16].copy_from_slice(&source);
            let sum: u32 = header.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{source:?}");
        }
    }
}

#[cfg(feature = "user")]
mod pod {
    use super::{Clock, State};

    // SAFETY: repr(C), 64-bit integers only, so there is no padding and every bit pattern is a value.
    unsafe impl aya::Pod for State {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Clock {}
}
