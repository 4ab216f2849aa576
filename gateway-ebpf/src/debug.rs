//! What the debugging programs tell of a frame. Of a layout of its own: these maps are never pinned.

/// Octets of a frame that are told: its Ethernet header, two tags and a little more.
pub const HEAD: usize = 24;

/// A record of the ring `DEBUG_FRAMES`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traced {
    /// When its run began; nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// [`crate::Outcome`].
    pub outcome: u32,
    /// Interface it came in on.
    pub ifindex: u32,
    /// Its octets then.
    pub len: u32,
    /// Whether a user sent it (1) or the provider (0).
    pub from_user: u32,
    /// Its first octets then, as two each.
    pub before: [u16; HEAD / 2],
    /// Its first octets now.
    pub after: [u16; HEAD / 2],
}

/// Words of `DEBUGGED`: the MAC of the user who is debugged, and how many frames could not be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugWord {
    /// As [`crate::frame::mac_word`] makes it.
    Mac = 0,
    /// The ring was full.
    Lost = 1,
}
