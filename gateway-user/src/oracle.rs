//! What has to become of a frame, by the rules as people state them: plain Rust over octets, sharing nothing with the programs
//! but the names of outcomes. Tests and `handover-gateway-bench fuzz` compare the two on generated frames ([`crate::fuzz`]).
//!
//! Pure. Slow and simple on purpose: where it and a program differ, it should be the easier one to believe.

use gateway_ebpf::Outcome;

/// A MAC as in a frame.
pub type Octets = [u8; 6];

/// All that decides on a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// The MAC the users know the router by.
    pub virtual_mac: Octets,
    /// Networks, by what they are called here: their place.
    pub networks: Vec<Network>,
    /// Users.
    pub users: Vec<User>,
    /// The service's address: what is held is for it.
    pub service: [u8; 4],
    /// As much is held as may be in all.
    pub memory_full: bool,
    /// Longest frame towards the users, tags not counted.
    pub access_largest: usize,
    /// Longest frame towards the provider, tags not counted.
    pub wan_largest: usize,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// VID; `None`: untagged.
    pub vid: Option<u16>,
    /// The router's MAC, if it is known.
    pub router: Option<Octets>,
    /// The router's address.
    pub address: [u8; 4],
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// MAC.
    pub mac: Octets,
    /// Addresses.
    pub addresses: Vec<[u8; 4]>,
    /// Where the user is.
    pub place: Place,
    /// Whether frames to the service are held; only of who is in a switch.
    pub hold: Hold,
}

/// What the hold of a user's switch is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// There is none.
    No,
    /// Frames are kept.
    Holding,
    /// As much of this user is kept as may be.
    Full,
    /// The deadline has passed.
    Expired,
    /// It is being released, and frames of this user are still kept.
    Draining,
    /// It is being released, and nothing of this user is kept any more.
    Drained,
}

/// Where a user is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On one network.
    On(usize),
    /// In a switch that is staged: on the first.
    Staged(usize, usize),
    /// In a switch that was made: on the second, and still to be reached from the first.
    Switched(usize, usize),
    /// On none.
    Nowhere,
    /// The user's word and the switch are of different generations.
    Torn,
}

impl Place {
    /// Where the user's frames go; the network, `None` for none.
    fn sends_to(self) -> Result<Option<usize>, ()> {
        match self {
            Self::On(network) | Self::Staged(network, _) | Self::Switched(_, network) => Ok(Some(network)),
            Self::Nowhere => Ok(None),
            Self::Torn => Err(()),
        }
    }

    fn hears(self, from: usize) -> Result<bool, ()> {
        match self {
            Self::On(network) | Self::Staged(network, _) => Ok(network == from),
            Self::Switched(old, new) => Ok(from == old || from == new),
            Self::Nowhere => Ok(false),
            Self::Torn => Err(()),
        }
    }
}

/// What has to become of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prediction {
    /// What is counted.
    pub outcome: Outcome,
    /// The frame as it goes on; `None` if it does not.
    pub frame: Option<Vec<u8>>,
}

impl From<Outcome> for Prediction {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, frame: None }
    }
}

const DOT1Q: [u8; 2] = [0x81, 0x00];
const DOT1AD: [u8; 2] = [0x88, 0xa8];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];

/// A frame taken apart; tag and payload are put together again.
struct Parts {
    dst: Octets,
    src: Octets,
    tci: Option<u16>,
    /// From the EtherType on.
    rest: Vec<u8>,
}

/// Why it cannot be.
enum Refused {
    Truncated,
    Service,
    Stacked,
    Reserved,
}

fn octets<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

impl Parts {
    fn of(frame: &[u8]) -> Result<Self, Refused> {
        let dst = octets(frame, 0).ok_or(Refused::Truncated)?;
        let src = octets(frame, 6).ok_or(Refused::Truncated)?;
        let outer: [u8; 2] = octets(frame, 12).ok_or(Refused::Truncated)?;
        if outer == DOT1AD {
            return Err(Refused::Service);
        }
        if outer != DOT1Q {
            return Ok(Self { dst, src, tci: None, rest: frame[12..].to_vec() });
        }
        let tci = u16::from_be_bytes(octets(frame, 14).ok_or(Refused::Truncated)?);
        let inner: [u8; 2] = octets(frame, 16).ok_or(Refused::Truncated)?;
        if inner == DOT1Q || inner == DOT1AD {
            return Err(Refused::Stacked);
        }
        if tci % 4096 == 4095 {
            return Err(Refused::Reserved);
        }
        Ok(Self { dst, src, tci: Some(tci), rest: frame[16..].to_vec() })
    }

    fn whole(&self) -> Vec<u8> {
        let mut frame = [self.dst, self.src].concat();
        if let Some(tci) = self.tci {
            frame.extend(DOT1Q);
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(&self.rest);
        frame
    }

    /// Octets, the tag not counted.
    fn untagged_len(&self) -> usize {
        12 + self.rest.len()
    }

    fn is_arp(&self) -> bool {
        self.rest[..2] == ARP
    }

    /// Whether it has an IPv4 header as far as the destination, which is `address`.
    fn is_ipv4_for(&self, address: [u8; 4]) -> bool {
        self.rest[..2] == IPV4 && self.rest.get(18..22) == Some(&address)
    }

    /// The ARP packet's 28 octets.
    fn arp(&mut self) -> Option<&mut [u8]> {
        self.rest.get_mut(2..30)
    }
}

/// Fields of an ARP packet (RFC 826), by their offset.
const OP: std::ops::Range<usize> = 6..8;
const SHA: std::ops::Range<usize> = 8..14;
const SPA: std::ops::Range<usize> = 14..18;
const THA: std::ops::Range<usize> = 18..24;
const TPA: std::ops::Range<usize> = 24..28;
/// Ethernet, IPv4, lengths 6 and 4.
const OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// 01:80:c2:00:00:00 to 0f.
fn is_link_local(dst: &[u8]) -> bool {
    dst.len() == 6 && dst[..5] == [0x01, 0x80, 0xc2, 0, 0] && dst[5] < 16
}

impl World {
    /// A frame from a user.
    pub fn access(&self, frame: &[u8]) -> Prediction {
        if frame.len() < 14 {
            return Outcome::AccessTruncated.into();
        }
        if is_link_local(&frame[..6]) {
            return Prediction { outcome: Outcome::AccessLinkLocal, frame: Some(frame.to_vec()) };
        }
        self.forward_to_wan(frame).unwrap_or_else(Into::into)
    }

    fn forward_to_wan(&self, frame: &[u8]) -> Result<Prediction, Outcome> {
        let mut parts = Parts::of(frame).map_err(|refused| match refused {
            Refused::Truncated => Outcome::AccessTruncated,
            Refused::Service => Outcome::AccessServiceTag,
            Refused::Stacked => Outcome::AccessStackedTags,
            Refused::Reserved => Outcome::AccessReservedVid,
        })?;
        let user = self.users.iter().find(|u| u.mac == parts.src).ok_or(Outcome::AccessUnknownUser)?;
        let mut sent = Outcome::AccessForwarded;
        if matches!(user.place, Place::Staged(..) | Place::Switched(..)) && parts.is_ipv4_for(self.service) {
            match user.hold {
                Hold::No | Hold::Drained => {}
                Hold::Expired => sent = Outcome::AccessHoldExpired,
                Hold::Full => return Err(Outcome::AccessHoldUserBound),
                Hold::Holding | Hold::Draining if self.memory_full => return Err(Outcome::AccessHoldMemory),
                Hold::Holding | Hold::Draining => return Err(Outcome::AccessHeld),
            }
        }
        let network = user.place.sends_to().map_err(|()| Outcome::AccessGeneration)?;
        let network = &self.networks[network.ok_or(Outcome::AccessNoNetwork)?];

        if parts.is_arp() {
            let asker = parts.src;
            let virtual_mac = self.virtual_mac;
            let arp = parts.arp().ok_or(Outcome::AccessTruncated)?;
            if arp[..6] != OF_IPV4 {
                return Err(Outcome::AccessArpMalformed);
            }
            if arp[OP] == REQUEST && arp[TPA] == network.address {
                let question = arp.to_vec();
                arp[OP].copy_from_slice(&REPLY);
                arp[SHA].copy_from_slice(&virtual_mac);
                arp[SPA].copy_from_slice(&question[TPA]);
                arp[THA].copy_from_slice(&question[SHA]);
                arp[TPA].copy_from_slice(&question[SPA]);
                (parts.dst, parts.src) = (asker, virtual_mac);
                return Ok(Prediction { outcome: Outcome::AccessArpAnswered, frame: Some(parts.whole()) });
            }
            if arp[THA] == virtual_mac {
                arp[THA].copy_from_slice(&network.router.ok_or(Outcome::AccessRouterUnknown)?);
            }
        }
        if parts.dst == self.virtual_mac {
            parts.dst = network.router.ok_or(Outcome::AccessRouterUnknown)?;
        }
        if parts.untagged_len() > self.wan_largest {
            return Err(Outcome::AccessTooLong);
        }
        // priority and drop eligibility are kept
        parts.tci = network.vid.map(|vid| parts.tci.unwrap_or(0) / 4096 * 4096 + vid);
        Ok(Prediction { outcome: sent, frame: Some(parts.whole()) })
    }

    /// A frame from the provider.
    pub fn wan(&self, frame: &[u8]) -> Prediction {
        if frame.len() < 14 {
            return Outcome::WanTruncated.into();
        }
        if is_link_local(&frame[..6]) {
            return Prediction { outcome: Outcome::WanLinkLocal, frame: Some(frame.to_vec()) };
        }
        self.forward_to_user(frame).unwrap_or_else(Into::into)
    }

    fn forward_to_user(&self, frame: &[u8]) -> Result<Prediction, Outcome> {
        let mut parts = Parts::of(frame).map_err(|refused| match refused {
            Refused::Truncated => Outcome::WanTruncated,
            Refused::Service => Outcome::WanServiceTag,
            Refused::Stacked => Outcome::WanStackedTags,
            Refused::Reserved => Outcome::WanUnknownNetwork,
        })?;
        // a priority tag is no tag
        let vid = parts.tci.map(|tci| tci % 4096).filter(|vid| *vid != 0);
        let from = self.networks.iter().position(|n| n.vid == vid).ok_or(Outcome::WanUnknownNetwork)?;
        let network = &self.networks[from];

        let mut outcome = Outcome::WanForwarded;
        let (mut about, mut by_router) = (None, false);
        if parts.is_arp() {
            let arp = parts.arp().ok_or(Outcome::WanTruncated)?;
            if arp[..6] != OF_IPV4 {
                return Err(Outcome::WanArpMalformed);
            }
            by_router = arp[SPA] == network.address;
            let question = arp[OP] == REQUEST;
            if by_router && (!question || arp[TPA] == arp[SPA]) {
                return Ok(Prediction { outcome: Outcome::WanRouterArp, frame: Some(frame.to_vec()) });
            }
            if question {
                outcome = Outcome::WanArpForwarded;
                about = Some(arp[TPA].to_vec());
            }
        }
        if about.is_none() && parts.dst[0] % 2 == 1 {
            return Ok(Prediction { outcome: Outcome::WanGroup, frame: Some(frame.to_vec()) });
        }
        if parts.is_arp() {
            let virtual_mac = self.virtual_mac;
            let arp = parts.arp().ok_or(Outcome::WanTruncated)?;
            if by_router || network.router.is_some_and(|router| arp[SHA] == router) {
                arp[SHA].copy_from_slice(&virtual_mac);
            }
        }
        let user = match about {
            Some(address) => self.users.iter().find(|u| u.addresses.iter().any(|a| address == a)),
            None => self.users.iter().find(|u| u.mac == parts.dst),
        };
        let user = user.ok_or(Outcome::WanUnknownUser)?;
        if !user.place.hears(from).map_err(|()| Outcome::WanGeneration)? {
            return Err(Outcome::WanStaleNetwork);
        }
        if parts.untagged_len() > self.access_largest {
            return Err(Outcome::WanTooLong);
        }
        if network.router == Some(parts.src) {
            parts.src = self.virtual_mac;
        }
        parts.dst = user.mac;
        parts.tci = None;
        Ok(Prediction { outcome, frame: Some(parts.whole()) })
    }
}
