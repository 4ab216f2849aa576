//! What the provider's programs and the lab agree on: the outcomes that frames are counted by.
#![no_std]

/// What became of a frame at the provider. The value is the index in the map `OUTCOMES`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Came tagged from the trunk, left untagged at the VLAN's access port.
    ToAccess,
    /// Came untagged from an access port, left with the port's tag at the trunk.
    ToTrunk,
    /// Untagged on the trunk: dropped.
    Untagged,
    /// A tag on the trunk that is no 802.1Q tag (0x88a8): dropped.
    WrongTpid,
    /// More than one tag on the trunk: dropped.
    DoubleTagged,
    /// The tag of a VLAN without an access port (or VID 0): dropped.
    WrongVlan,
    /// Tagged on an access port: dropped.
    TaggedAccess,
    /// The kernel refused to push or pop a tag: dropped.
    Failed,
}

impl Outcome {
    /// All of them, in the order of their values.
    pub const ALL: [Self; 8] = [
        Self::ToAccess,
        Self::ToTrunk,
        Self::Untagged,
        Self::WrongTpid,
        Self::DoubleTagged,
        Self::WrongVlan,
        Self::TaggedAccess,
        Self::Failed,
    ];
}

/// Number of VLAN identifiers.
pub const VLANS: u32 = 4096;
