//! Everything that can become of a frame. Each frame is counted under exactly one of these.

/// What the kernel is told to do with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// XDP_DROP.
    Drop,
    /// XDP_PASS: to the gateway's own host.
    Host,
    /// XDP_REDIRECT: out of an interface.
    Forward,
    /// XDP_DROP, with a copy kept for the daemon to send on.
    Keep,
}

macro_rules! outcomes {
    ($($variant:ident $name:literal $action:ident: $doc:literal;)*) => {
        /// What became of a frame; index into `COUNTERS`.
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Outcome {
            $(#[doc = $doc] $variant,)*
        }

        impl Outcome {
            /// All of them, by index.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The counter's name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The inverse of `as u32`.
            #[inline(always)]
            pub const fn from_index(index: u32) -> Option<Self> {
                if index as usize >= Self::ALL.len() {
                    return None;
                }
                // SAFETY: repr(u32), without values of their own: 0 up to the length of ALL.
                Some(unsafe { core::mem::transmute::<u32, Self>(index) })
            }

            /// What is done with such a frame.
            #[inline(always)]
            pub const fn action(self) -> Action {
                match self { $(Self::$variant => Action::$action,)* }
            }

            /// What the counter counts.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => $doc,)* }
            }
        }
    };
}

outcomes! {
    AccessForwarded "access_forwarded" Forward: "From a user, sent into the user's network.";
    AccessArpAnswered "access_arp_answered" Forward: "A user's ARP request for the router, answered with the virtual MAC.";
    AccessNdAnswered "access_nd_answered" Forward: "A user's neighbour solicitation for the router, answered with the virtual MAC.";
    AccessLinkLocal "access_link_local" Host: "Link-local control frame on the access side, given to the host.";
    AccessTruncated "access_truncated" Drop: "Ended inside a header.";
    AccessUnknownUser "access_unknown_user" Drop: "Neither its source MAC nor its interface nor its tag is a user's.";
    AccessSpoofed "access_spoofed" Drop: "The source MAC is another's: a user's who is elsewhere, the router's, or the virtual one.";
    AccessGuarded "access_guarded" Drop: "Of a guarded user, from an address that is not the user's.";
    AccessNoNetwork "access_no_network" Drop: "The user has no network yet.";
    AccessRouterUnknown "access_router_unknown" Drop: "For the router, whose MAC in the user's network is not known.";
    AccessServiceTag "access_service_tag" Drop: "Came with an 802.1ad (0x88a8) tag.";
    AccessStackedTags "access_stacked_tags" Drop: "Came with more tags than the user's network takes.";
    AccessReservedVid "access_reserved_vid" Drop: "Came with the reserved VID 4095.";
    AccessArpMalformed "access_arp_malformed" Drop: "ARP, but not for IPv4 over Ethernet.";
    AccessNdMalformed "access_nd_malformed" Drop: "Neighbour discovery that no host may accept (hop limit, code, options).";
    AccessNdRouter "access_nd_router" Drop: "A user's router advertisement or redirect: only routers send those.";
    AccessTooLong "access_too_long" Drop: "Longer than the WAN interface takes.";
    AccessNoPort "access_no_port" Drop: "The network's interface is not there.";
    AccessNoHeadroom "access_no_headroom" Drop: "The driver left no room for a tag.";
    AccessGeneration "access_generation" Drop: "The user's word and its switch did not agree, even when read again.";
    AccessHeld "access_held" Keep: "From a user to the service, kept until the hold is released.";
    AccessHoldUserBound "access_hold_user_bound" Drop: "To be held, but as much of the user is held as may be of one.";
    AccessHoldMemory "access_hold_memory" Drop: "To be held, but as much is held as may be in all.";
    AccessHoldExpired "access_hold_expired" Forward: "From a user, sent into the user's network although the hold is not released: its deadline has passed.";
    WanForwarded "wan_forwarded" Forward: "From the user's network, sent to the user.";
    WanArpForwarded "wan_arp_forwarded" Forward: "An ARP request for a user's address, sent to that user alone.";
    WanNdForwarded "wan_nd_forwarded" Forward: "A neighbour solicitation for a user's address, sent to that user alone.";
    WanRouterArp "wan_router_arp" Host: "ARP of a network's router about itself: given to the daemon, kept from the users.";
    WanRouterNd "wan_router_nd" Host: "Neighbour discovery about the router's own address: given to the daemon, kept from the users.";
    WanLinkLocal "wan_link_local" Host: "Link-local control frame on the WAN side, given to the host.";
    WanTruncated "wan_truncated" Drop: "Ended inside a header.";
    WanUnknownNetwork "wan_unknown_network" Drop: "Its tag (or having none) belongs to no network on this interface.";
    WanUnknownUser "wan_unknown_user" Drop: "For no user of this gateway.";
    WanStaleNetwork "wan_stale_network" Drop: "For a user, from a network the user is not on.";
    WanGroup "wan_group" Host: "Broadcast or multicast other than questions for a user: given to the daemon, which sends it to each user of that network.";
    WanStackedTags "wan_stacked_tags" Drop: "Came with more than one tag, and not a customer's (0x8100) behind a service tag (0x88a8).";
    WanArpMalformed "wan_arp_malformed" Drop: "ARP, but not for IPv4 over Ethernet.";
    WanNdMalformed "wan_nd_malformed" Drop: "Neighbour discovery that no host may accept (hop limit, code, options).";
    WanNdRogue "wan_nd_rogue" Drop: "A router advertisement or redirect that is not from the network's router.";
    WanTooLong "wan_too_long" Drop: "Longer than the access interface takes.";
    WanNoPort "wan_no_port" Drop: "The user's interface is not there.";
    WanNoHeadroom "wan_no_headroom" Drop: "The kernel refused to take the tag off.";
    WanGeneration "wan_generation" Drop: "The user's word and its switch did not agree, even when read again.";
    Internal "internal" Drop: "A map was smaller than the program expects; never happens with the daemon of the same version.";
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_outcome_has_its_own_index_and_name() {
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
            assert_eq!(Outcome::from_index(index as u32), Some(*outcome));
            assert!(!outcome.describe().is_empty());
        }
        assert_eq!(Outcome::from_index(Outcome::ALL.len() as u32), None);
        let names: BTreeSet<_> = Outcome::ALL.iter().map(|o| o.name()).collect();
        assert_eq!(names.len(), Outcome::ALL.len());
    }
}
