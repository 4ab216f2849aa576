//! What has to become of a frame, by the rules as people state them: plain Rust over octets, sharing nothing with the programs
//! but the names of outcomes. Tests and `handover-gateway-bench fuzz` compare the two on generated frames ([`crate::fuzz`]).
//!
//! Pure. Slow and simple on purpose: where it and a program differ, it should be the easier one to believe.

use gateway_ebpf::Outcome;

/// A MAC as in a frame.
pub type Octets = [u8; 6];
/// An IPv4 address.
pub type Ip4 = [u8; 4];
/// An IPv6 address.
pub type Ip6 = [u8; 16];

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
    pub service: Ip4,
    /// As much is held as may be in all.
    pub memory_full: bool,
    /// Longest frame towards the users, outer tag not counted.
    pub access_largest: usize,
    /// Longest frame towards the provider, outer tag not counted.
    pub wan_largest: usize,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// VID; `None`: untagged.
    pub vid: Option<u16>,
    /// Its tag is an 802.1ad service tag.
    pub service: bool,
    /// The priority of frames into it; `None`: their own.
    pub pcp: Option<u8>,
    /// It is on another interface than the one the frames of the WAN come in on.
    pub elsewhere: bool,
    /// The router's MAC, if it is known.
    pub router: Option<Octets>,
    /// The router's address.
    pub address: Option<Ip4>,
    /// The router's IPv6 address.
    pub address6: Option<Ip6>,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// MAC; `None`: any.
    pub mac: Option<Octets>,
    /// VID of the access side's tag.
    pub tag: Option<u16>,
    /// The user is on another interface than the one the frames of the access side come in on.
    pub elsewhere: bool,
    /// May send from the addresses alone.
    pub guard: bool,
    /// Addresses.
    pub addresses: Vec<Ip4>,
    /// IPv6 addresses, declared.
    pub addresses6: Vec<Ip6>,
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

impl User {
    /// All IPv6 addresses: with the one a host makes of its MAC (RFC 4291, appendix A: the universal bit is turned over, and
    /// ff:fe put in the middle).
    fn all6(&self) -> Vec<Ip6> {
        let mut all = self.addresses6.clone();
        all.extend(
            self.mac.map(|m| {
                [0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 0x02, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]]
            }),
        );
        all
    }

    fn has(&self, address: &[u8]) -> bool {
        self.addresses.iter().any(|a| a == address) || self.all6().iter().any(|a| a == address)
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
const IPV6: [u8; 2] = [0x86, 0xdd];

/// A tag: TPID and TCI.
type Tag = ([u8; 2], u16);

const fn vid(tag: Tag) -> u16 {
    tag.1 % 4096
}

/// A frame taken apart; it is put together again.
struct Parts {
    dst: Octets,
    src: Octets,
    /// From the outside.
    tags: Vec<Tag>,
    /// From the EtherType on.
    rest: Vec<u8>,
}

fn octets<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

impl Parts {
    /// `None`: it ends inside a header. Of the tags beyond the second not all are looked at.
    fn of(frame: &[u8]) -> Option<Self> {
        let (dst, src) = (octets(frame, 0)?, octets(frame, 6)?);
        let mut tags = Vec::new();
        let mut at = 12;
        loop {
            let tpid: [u8; 2] = octets(frame, at)?;
            if (tpid != DOT1Q && tpid != DOT1AD) || tags.len() == 2 {
                break;
            }
            tags.push((tpid, u16::from_be_bytes(octets(frame, at + 2)?)));
            at += 4;
        }
        Some(Self { dst, src, tags, rest: frame[at..].to_vec() })
    }

    fn whole(&self) -> Vec<u8> {
        let mut frame = [self.dst, self.src].concat();
        for (tpid, tci) in &self.tags {
            frame.extend(tpid);
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(&self.rest);
        frame
    }

    fn is(&self, ethertype: [u8; 2]) -> bool {
        self.rest[..2] == ethertype
    }

    fn is_tag_next(&self) -> bool {
        self.is(DOT1Q) || self.is(DOT1AD)
    }

    /// Whether it has an IPv4 header as far as the destination, which is `address`.
    fn is_ipv4_for(&self, address: [u8; 4]) -> bool {
        self.is(IPV4) && self.rest.get(18..22) == Some(&address)
    }

    /// The ARP packet's 28 octets.
    fn arp(&mut self) -> Option<&mut [u8]> {
        self.rest.get_mut(2..30)
    }

    /// The packet, whatever it is.
    fn packet(&mut self) -> &mut [u8] {
        &mut self.rest[2..]
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

/// What is wrong with neighbour discovery.
enum Bad {
    Truncated,
    Malformed,
    NoRouter,
}

/// Neighbour discovery (RFC 4861): its type, and whom a solicitation or advertisement is about.
struct Discovery {
    kind: u8,
    target: Option<Ip6>,
    /// Places of MACs in link-layer options, in the packet.
    links: Result<Vec<usize>, (Vec<usize>, Bad)>,
}

impl Discovery {
    fn of(packet: &[u8]) -> Result<Option<Self>, Bad> {
        if packet.len() < 40 {
            return Err(Bad::Truncated);
        }
        if packet[6] != 58 {
            return Ok(None);
        }
        if packet.len() < 44 {
            return Err(Bad::Truncated);
        }
        let kind = packet[40];
        if !(133..=137).contains(&kind) {
            return Ok(None);
        }
        if packet[7] != 255 || packet[41] != 0 {
            return Err(Bad::Malformed);
        }
        Ok(Some(Self { kind, target: None, links: Ok(Vec::new()) }))
    }

    /// Reads target and options.
    fn whole(mut self, packet: &[u8]) -> Result<Self, Bad> {
        let message = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
        let fixed = match self.kind {
            133 => 8,
            134 => 16,
            135 | 136 => 24,
            _ => 40,
        };
        // none needs more than fits a frame of 1500 octets
        if message < fixed || message > 1460 {
            return Err(Bad::Malformed);
        }
        if self.kind == 135 || self.kind == 136 {
            self.target = Some(octets(packet, 48).ok_or(Bad::Truncated)?);
        }
        let end = 40 + message;
        let mut at = 40 + fixed;
        let mut links = Vec::new();
        for option in 0.. {
            if at >= end {
                break;
            }
            let bad = match packet.get(at..at + 8) {
                _ if option == 16 => Bad::Malformed,
                None => Bad::Truncated,
                Some(head) => {
                    let len = usize::from(head[1]) * 8;
                    if len > 0 && at + len <= end {
                        if len == 8 && (head[0] == 1 || head[0] == 2) {
                            links.push(at + 2);
                        }
                        at += len;
                        continue;
                    }
                    Bad::Malformed
                }
            };
            self.links = Err((links, bad));
            return Ok(self);
        }
        self.links = Ok(links);
        Ok(self)
    }

    /// Replaces the MACs that are `from` (or any) by `to`, option after option until one cannot be read.
    fn translate(
        self,
        packet: &mut [u8],
        from: Option<Octets>,
        any: bool,
        to: Option<Octets>,
    ) -> Result<(), Bad> {
        let (links, bad) = match self.links {
            Ok(links) => (links, None),
            Err((links, bad)) => (links, Some(bad)),
        };
        for at in links {
            let mac: Octets = octets(packet, at).ok_or(Bad::Truncated)?;
            if any || from == Some(mac) {
                let to = to.ok_or(Bad::NoRouter)?;
                let message = 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
                let before = right_checksum(&packet[..message.min(packet.len())]);
                packet[at..at + 6].copy_from_slice(&to);
                let after = right_checksum(&packet[..message.min(packet.len())]);
                // as wrong as it was
                let was = u32::from(u16::from_be_bytes([packet[42], packet[43]]));
                let is = (was + after + 2 * 0xffff - before) % 0xffff;
                packet[42..44].copy_from_slice(&(is as u16).to_be_bytes());
            }
        }
        bad.map_or(Ok(()), Err)
    }
}

/// The checksum that an ICMPv6 message behind an IPv6 header has to have (RFC 4443, 2.3), as a number modulo 0xffff.
fn right_checksum(packet: &[u8]) -> u32 {
    let mut covered = packet[8..40].to_vec();
    covered.extend((packet.len() as u32 - 40).to_be_bytes());
    covered.extend([0, 0, 0, 58]);
    covered.extend(&packet[40..42]);
    covered.extend([0, 0]);
    covered.extend(&packet[44..]);
    if covered.len() % 2 == 1 {
        covered.push(0);
    }
    let sum: u32 = covered.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    (0xffff - sum % 0xffff) % 0xffff
}

/// The answer to a neighbour solicitation.
fn advertisement(asker: Ip6, router: Ip6, mac: Octets) -> Vec<u8> {
    let (to, flags) = if asker == [0; 16] {
        let mut all_nodes = [0; 16];
        (all_nodes[0], all_nodes[1], all_nodes[15]) = (0xff, 0x02, 1);
        // router, override
        (all_nodes, 0b1010_0000)
    } else {
        // router, solicited, override
        (asker, 0b1110_0000)
    };
    let mut packet = vec![0x60, 0, 0, 0, 0, 32, 58, 255];
    packet.extend(router);
    packet.extend(to);
    packet.extend([136, 0, 0, 0, flags, 0, 0, 0]);
    packet.extend(router);
    packet.extend([2, 1]);
    packet.extend(mac);
    let checksum = right_checksum(&packet) as u16;
    packet[42..44].copy_from_slice(&checksum.to_be_bytes());
    packet
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

    /// Who sent it, and whether its outer tag is the access side's.
    fn sender(&self, parts: &Parts) -> Result<(&User, bool), Outcome> {
        let src = parts.src;
        if src == [0; 6] || src[0] % 2 == 1 {
            return Err(Outcome::AccessUnknownUser);
        }
        let tag = parts.tags.first().map(|tag| vid(*tag)).filter(|vid| *vid != 0);
        let here = || self.users.iter().filter(|u| !u.elsewhere);
        let by_tag = |mac| here().find(|u| u.mac == mac && tag.is_some() && u.tag == tag);
        let without = |mac| here().find(|u| u.mac == mac && u.tag.is_none());
        let user = by_tag(Some(src))
            .or_else(|| by_tag(None))
            .or_else(|| without(Some(src)))
            .or_else(|| without(None));
        if src == self.virtual_mac || self.users.iter().any(|u| u.mac == Some(src) && user != Some(u)) {
            return Err(Outcome::AccessSpoofed);
        }
        let user = user.ok_or(Outcome::AccessUnknownUser)?;
        Ok((user, user.tag.is_some()))
    }

    /// Whether the guard lets a frame of `user` through.
    fn guard(user: &User, parts: &Parts) -> Result<(), Outcome> {
        let packet = &parts.rest[2..];
        let (address, without): (&[u8], bool) = if parts.is(IPV4) {
            let header = packet.get(..20).ok_or(Outcome::AccessTruncated)?;
            let ports = packet.get(20..24);
            let dhcp = header[0] == 0x45 && header[9] == 17 && ports == Some(&[0, 68, 0, 67]);
            (&header[12..16], dhcp)
        } else if parts.is(ARP) {
            (&packet.get(..28).ok_or(Outcome::AccessTruncated)?[SPA], true)
        } else if parts.is(IPV6) {
            let header = packet.get(..40).ok_or(Outcome::AccessTruncated)?;
            (&header[8..24], header[6] == 58 || header[6] == 0)
        } else {
            return Ok(());
        };
        let none = address.iter().all(|octet| *octet == 0);
        if !(if none { without } else { user.has(address) }) {
            return Err(Outcome::AccessGuarded);
        }
        // an advertisement is about one of the user's own addresses, too
        let told = packet.get(48..64).filter(|_| parts.is(IPV6) && packet[6] == 58 && packet[40] == 136);
        if told.is_some_and(|address| !none && !user.has(address)) {
            return Err(Outcome::AccessGuarded);
        }
        Ok(())
    }

    fn forward_to_wan(&self, frame: &[u8]) -> Result<Prediction, Outcome> {
        if frame[12..14] == DOT1AD {
            return Err(Outcome::AccessServiceTag);
        }
        // a tag of another kind inside is refused, whether it is whole or not
        if frame[12..14] == DOT1Q && frame.get(16..18) == Some(&DOT1AD) {
            return Err(Outcome::AccessStackedTags);
        }
        let mut parts = Parts::of(frame).ok_or(Outcome::AccessTruncated)?;
        if parts.is_tag_next() {
            return Err(Outcome::AccessStackedTags);
        }
        if parts.tags.iter().any(|tag| vid(*tag) == 4095) {
            return Err(Outcome::AccessReservedVid);
        }
        let (user, access_tag) = self.sender(&parts)?;
        if user.guard {
            Self::guard(user, &parts)?;
        }
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
        if user.mac.is_none() && network.router == Some(parts.src) {
            return Err(Outcome::AccessSpoofed);
        }

        let virtual_mac = self.virtual_mac;
        if parts.is(IPV6) {
            let bad = |bad| match bad {
                Bad::Truncated => Outcome::AccessTruncated,
                Bad::Malformed => Outcome::AccessNdMalformed,
                Bad::NoRouter => Outcome::AccessRouterUnknown,
            };
            if let Some(discovery) = Discovery::of(parts.packet()).map_err(bad)? {
                if discovery.kind == 134 || discovery.kind == 137 {
                    return Err(Outcome::AccessNdRouter);
                }
                let discovery = discovery.whole(parts.packet()).map_err(bad)?;
                if discovery.kind == 135 && discovery.target.is_some() && discovery.target == network.address6
                {
                    let asker = octets(parts.packet(), 8).ok_or(Outcome::AccessTruncated)?;
                    let router = discovery.target.ok_or(Outcome::AccessTruncated)?;
                    parts.rest.truncate(2);
                    parts.rest.extend(advertisement(asker, router, virtual_mac));
                    (parts.dst, parts.src) = (parts.src, virtual_mac);
                    return Ok(Prediction { outcome: Outcome::AccessNdAnswered, frame: Some(parts.whole()) });
                }
                discovery.translate(parts.packet(), Some(virtual_mac), false, network.router).map_err(bad)?;
            }
        }
        if parts.is(ARP) {
            let asker = parts.src;
            let arp = parts.arp().ok_or(Outcome::AccessTruncated)?;
            if arp[..6] != OF_IPV4 {
                return Err(Outcome::AccessArpMalformed);
            }
            if arp[OP] == REQUEST && network.address.is_some_and(|address| arp[TPA] == address) {
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
        if parts.dst == virtual_mac {
            parts.dst = network.router.ok_or(Outcome::AccessRouterUnknown)?;
        }

        // the access side's tag ends here, and a priority tag is none; a service tag goes around a tag of the user's own,
        // any other takes its place
        let first = parts.tags.first().copied();
        if let Some(tag) = first
            && (access_tag || vid(tag) == 0 || !network.service)
        {
            parts.tags.remove(0);
        }
        if parts.tags.len() > usize::from(network.service) {
            return Err(Outcome::AccessStackedTags);
        }
        if parts.whole().len() > self.wan_largest {
            return Err(Outcome::AccessTooLong);
        }
        if let Some(vid) = network.vid {
            // priority and drop eligibility are those of the tag that came, or the network's
            let tci = first.map_or(0, |tag| tag.1);
            let priority = network.pcp.map_or(tci >> 13, u16::from);
            let eligible = tci >> 12 & 1;
            let tpid = if network.service { DOT1AD } else { DOT1Q };
            parts.tags.insert(0, (tpid, priority << 13 | eligible << 12 | vid));
        }
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
        let inside = frame.get(16..18).filter(|_| frame[12..14] == DOT1Q || frame[12..14] == DOT1AD);
        // behind a service tag there may be a customer's, and nothing else behind any
        if inside == Some(&DOT1AD) || inside == Some(&DOT1Q) && frame[12..14] == DOT1Q {
            return Err(Outcome::WanStackedTags);
        }
        let mut parts = Parts::of(frame).ok_or(Outcome::WanTruncated)?;
        if parts.is_tag_next() {
            return Err(Outcome::WanStackedTags);
        }
        let outer = parts.tags.first().copied();
        let from = self.networks.iter().position(|n| {
            !n.elsewhere
                && match (outer, n.vid) {
                    (None, known) => known.is_none(),
                    // a priority tag is no tag, but there is no such service tag
                    (Some(tag), None) => tag.0 == DOT1Q && vid(tag) == 0,
                    (Some(tag), Some(known)) => vid(tag) == known && (tag.0 == DOT1AD) == n.service,
                }
        });
        let from = from.ok_or(Outcome::WanUnknownNetwork)?;
        let network = &self.networks[from];
        let virtual_mac = self.virtual_mac;
        let group = parts.dst[0] % 2 == 1;
        let to_host = |outcome| Ok(Prediction { outcome, frame: Some(frame.to_vec()) });

        let mut outcome = Outcome::WanForwarded;
        let mut about = None;
        if parts.is(ARP) {
            let arp = parts.arp().ok_or(Outcome::WanTruncated)?;
            if arp[..6] != OF_IPV4 {
                return Err(Outcome::WanArpMalformed);
            }
            let by_router = network.address.is_some_and(|address| arp[SPA] == address);
            let question = arp[OP] == REQUEST;
            if by_router && (!question || arp[TPA] == arp[SPA]) {
                return to_host(Outcome::WanRouterArp);
            }
            if question {
                outcome = Outcome::WanArpForwarded;
                about = Some(arp[TPA].to_vec());
            } else if group {
                return to_host(Outcome::WanGroup);
            }
            if by_router || network.router.is_some_and(|router| arp[SHA] == router) {
                arp[SHA].copy_from_slice(&virtual_mac);
            }
        } else if parts.is(IPV6) {
            let by_router = network.router == Some(parts.src);
            let packet = parts.packet();
            let bad = |bad| match bad {
                Bad::Truncated => Outcome::WanTruncated,
                Bad::Malformed | Bad::NoRouter => Outcome::WanNdMalformed,
            };
            if let Some(discovery) = Discovery::of(packet).map_err(bad)? {
                if (discovery.kind == 134 || discovery.kind == 137) && !by_router {
                    return Err(Outcome::WanNdRogue);
                }
                let discovery = discovery.whole(packet).map_err(bad)?;
                if discovery.target.is_some() && discovery.target == network.address6 {
                    return to_host(Outcome::WanRouterNd);
                }
                let target = discovery.target.filter(|_| discovery.kind == 135);
                if let Some(target) = target.filter(|t| self.users.iter().any(|u| u.has(t))) {
                    outcome = Outcome::WanNdForwarded;
                    about = Some(target.to_vec());
                } else if group {
                    return to_host(Outcome::WanGroup);
                }
                let says_r = network.address6.is_some_and(|address| packet[8..24] == address);
                discovery.translate(packet, network.router, says_r, Some(virtual_mac)).map_err(bad)?;
            }
        }
        if about.is_none() && group {
            return to_host(Outcome::WanGroup);
        }
        let user = match about {
            Some(address) => self.users.iter().find(|u| u.has(&address)),
            None => self.users.iter().find(|u| u.mac == Some(parts.dst)).or_else(|| {
                // a user of no MAC is told by address
                let packet = &parts.rest[2..];
                let to: Option<&[u8]> = if parts.is(IPV4) {
                    packet.get(..20).map(|header| &header[16..20])
                } else if parts.is(IPV6) {
                    packet.get(24..40)
                } else {
                    None
                };
                self.users.iter().find(|u| u.mac.is_none() && to.is_some_and(|to| u.has(to)))
            }),
        };
        let user = user.ok_or(Outcome::WanUnknownUser)?;
        if !user.place.hears(from).map_err(|()| Outcome::WanGeneration)? {
            return Err(Outcome::WanStaleNetwork);
        }
        if outer.is_some() {
            parts.tags.remove(0);
        }
        if parts.whole().len() > self.access_largest {
            return Err(Outcome::WanTooLong);
        }
        if network.router == Some(parts.src) {
            parts.src = virtual_mac;
        }
        parts.dst = user.mac.unwrap_or(parts.dst);
        if let Some(tag) = user.tag {
            parts.tags.insert(0, (DOT1Q, outer.map_or(0, |tag| tag.1) / 4096 * 4096 + tag));
        }
        Ok(Prediction { outcome, frame: Some(parts.whole()) })
    }
}
