//! The gateway's two XDP programs: `access` for frames from the users, `wan` for frames from the provider.
//!
//! Each is a thin entry that counts an [`Outcome`] and turns it into the kernel's verdict; the rules are the functions
//! that return it, `Ok` for frames that go on, `Err` for those that are dropped. The order of the rules is the order of
//! the code; README and ARCHITECTURE.md state them for people.
//!
//! Translation: the users know the router by one virtual MAC. Towards the WAN it becomes the MAC of the router in the
//! user's network, towards the user that becomes the virtual one: in the Ethernet header, and in ARP payloads as the
//! hardware address of sender or target.
//!
//! Invariants:
//! - A frame of a user leaves with the tag of one network, chosen by one load of the user's word and one of the switch.
//! - All edits of a frame precede the change of its tag, after which packet pointers are void.
//! - While the user is in a switch the CPU's run epoch is odd from before the selector is read until the verdict.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the xdp macro makes an undocumented twin of each entry")]
#![cfg_attr(target_arch = "bpf", allow(unstable_features), feature(asm_experimental_arch))]

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, xdp_action},
    helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_xdp_adjust_head},
    macros::{map, xdp},
    maps::{Array, DevMap, HashMap, PerCpuArray},
    programs::XdpContext,
};
use gateway_ebpf::{
    Link, NETWORKS, Network, Outcome, PORTS, Router, Run, SWITCHES, Selection, SwitchWord, User, UserKey,
    UserWord, VIDS,
    frame::{
        ARP_REPLY, ARP_REQUEST, Arp, ETH_LEN, ETHERTYPE_ARP, Eth, TAG_LEN, TPID_8021AD, TPID_8021Q, Tag,
        VID_MAX, WireMac, is_group, is_ipv4_over_ethernet, is_link_local, vid, wire_ip_word, wire_mac_word,
        with_vid, word_wire_mac,
    },
    outcome::Action,
};

mod keep;

use keep::Keep;

/// How often a user's word is read when it and its switch are of different generations.
const READS: u32 = 4;

// Sizes marked "set at load" are placeholders for what the daemon's configuration and the machine ask for.
#[map]
static USER: Array<User> = Array::with_max_entries(1024, BPF_F_MMAPABLE); // set at load
#[map]
static USER_INDEX: HashMap<UserKey, u32> = HashMap::with_max_entries(1024, 0); // set at load
#[map]
static USER_BY_MAC: HashMap<u64, u32> = HashMap::with_max_entries(1024, 0); // set at load
#[map]
static USER_BY_IP: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0); // set at load
#[map]
static SWITCH: Array<u64> = Array::with_max_entries(SWITCHES, BPF_F_MMAPABLE);
#[map]
static NETWORK: Array<Network> = Array::with_max_entries(NETWORKS, BPF_F_MMAPABLE);
#[map]
static NETWORK_BY_VID: Array<u64> = Array::with_max_entries(VIDS, BPF_F_MMAPABLE);
#[map]
static PORT: Array<u64> = Array::with_max_entries(PORTS, BPF_F_MMAPABLE);
#[map]
static DEVICE: DevMap = DevMap::with_max_entries(PORTS, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);
#[map]
static RUN: Array<Run> = Array::with_max_entries(1, BPF_F_MMAPABLE); // set at load
#[map]
static LAST_OLD: Array<u64> = Array::with_max_entries(SWITCHES, BPF_F_MMAPABLE); // set at load

#[unsafe(no_mangle)]
static VIRTUAL_ROUTER_MAC: u64 = 0; // set at load

fn virtual_router_mac() -> u64 {
    // SAFETY: a constant of this program; volatile because its value is put there at load.
    unsafe { read_volatile(&raw const VIRTUAL_ROUTER_MAC) }
}

/// Frames from the users.
#[xdp]
pub fn access(ctx: XdpContext) -> u32 {
    verdict(from_user(&ctx))
}

/// Frames from the provider.
#[xdp]
pub fn wan(ctx: XdpContext) -> u32 {
    verdict(to_user(&ctx))
}

#[inline(always)]
fn verdict(result: Result<Outcome, Outcome>) -> u32 {
    let (Ok(outcome) | Err(outcome)) = result;
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's own element; a program run is not interrupted by another on its CPU.
        unsafe { *counter += 1 };
    }
    match outcome.action() {
        Action::Drop | Action::Keep => xdp_action::XDP_DROP,
        Action::Host => xdp_action::XDP_PASS,
        Action::Forward => xdp_action::XDP_REDIRECT,
    }
}

/// `T` at `offset` of the frame, if it ends before the frame does.
#[inline(always)]
fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let (start, end) = (ctx.data(), ctx.data_end());
    (start + offset + size_of::<T>() <= end).then_some((start + offset) as *mut T)
}

/// Octets of the frame.
#[inline(always)]
fn len(ctx: &XdpContext) -> usize {
    ctx.data_end() - ctx.data()
}

/// Why a frame's tags are refused.
enum BadTags {
    Truncated,
    Service,
    Stacked,
    ReservedVid,
}

/// Tag and EtherType of a frame.
struct Headers {
    /// The 802.1Q tag's TCI, in host byte order.
    tci: Option<u16>,
    /// EtherType behind the tag, as in the frame.
    ethertype: u16,
}

impl Headers {
    #[inline(always)]
    fn read(ctx: &XdpContext, eth: *const Eth) -> Result<Self, BadTags> {
        // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
        let outer = unsafe { (*eth).ethertype };
        if outer == TPID_8021AD.to_be() {
            return Err(BadTags::Service);
        }
        if outer != TPID_8021Q.to_be() {
            return Ok(Self { tci: None, ethertype: outer });
        }
        let tag = at::<Tag>(ctx, ETH_LEN).ok_or(BadTags::Truncated)?;
        // SAFETY: checked by `at`.
        let Tag { tci, ethertype } = unsafe { *tag };
        if ethertype == TPID_8021Q.to_be() || ethertype == TPID_8021AD.to_be() {
            return Err(BadTags::Stacked);
        }
        let tci = u16::from_be(tci);
        if vid(tci) > VID_MAX {
            return Err(BadTags::ReservedVid);
        }
        Ok(Self { tci: Some(tci), ethertype })
    }

    #[inline(always)]
    fn arp(&self, ctx: &XdpContext) -> Option<*mut Arp> {
        match self.tci {
            None => at(ctx, ETH_LEN),
            Some(_) => at(ctx, ETH_LEN + TAG_LEN),
        }
    }
}

/// A user, found by a frame.
struct FoundUser {
    user: *const User,
    identity: u64,
}

impl FoundUser {
    /// The user in `slot`, if it still is the one with `mac`.
    #[inline(always)]
    fn by_mac(slot: u32, mac: u64) -> Option<Self> {
        let found = Self::in_slot(slot)?;
        (User::mac_of(found.identity) == mac).then_some(found)
    }

    #[inline(always)]
    fn in_slot(slot: u32) -> Option<Self> {
        let user = USER.get_ptr(slot)?;
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        let identity = unsafe { read_volatile(&raw const (*user).identity) };
        Some(Self { user, identity })
    }

    #[inline(always)]
    fn word(&self) -> UserWord {
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        UserWord(unsafe { read_volatile(&raw const (*self.user).word) })
    }

    /// The user's networks now. `None` if word and switch do not agree.
    #[inline(always)]
    fn select(&self, word: UserWord) -> Option<Selection> {
        let mut word = word;
        for _ in 0..READS {
            let switch = SWITCH.get_ptr(word.switch())?;
            // SAFETY: an element of the map, read as the one word that the daemon writes.
            let switch = SwitchWord(unsafe { read_volatile(switch) });
            if let Some(selection) = word.select(switch) {
                return Some(selection);
            }
            word = self.word();
        }
        None
    }
}

/// The words of a network.
struct FoundNetwork(*const Network);

impl FoundNetwork {
    #[inline(always)]
    fn at(index: u16) -> Option<Self> {
        NETWORK.get_ptr(index.into()).map(Self)
    }

    #[inline(always)]
    fn router(&self) -> Router {
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        Router(unsafe { read_volatile(&raw const (*self.0).router) })
    }

    #[inline(always)]
    fn link(&self) -> Link {
        // SAFETY: as above.
        Link(unsafe { read_volatile(&raw const (*self.0).link) })
    }

    /// The router's address r.
    #[inline(always)]
    fn address(&self) -> u32 {
        // SAFETY: as above.
        unsafe { read_volatile(&raw const (*self.0).address) as u32 }
    }
}

/// A program run that the daemon can wait for; see [`Run`].
struct Watched(*mut u64);

impl Watched {
    #[inline(always)]
    fn begin(cpu: u32) -> Option<Self> {
        let epoch = RUN.get_ptr_mut(cpu)?.cast::<u64>();
        Self::bump(epoch);
        Some(Self(epoch))
    }

    #[inline(always)]
    fn end(self) {
        Self::bump(self.0);
    }

    /// Fetch-and-add is a full barrier in BPF's memory model (plain atomic add is not): either the daemon, which stores
    /// the selector and then reads the epoch, sees this run, or this run sees the selector.
    #[inline(always)]
    fn bump(epoch: *mut u64) {
        #[cfg(target_arch = "bpf")]
        // SAFETY: `epoch` is the first word of an element of RUN, aligned to 64.
        unsafe {
            core::arch::asm!(
                "{one} = atomic_fetch_add((u64 *)({epoch} + 0), {one})",
                one = inout(reg) 1_u64 => _,
                epoch = in(reg) epoch,
            );
        }
        #[cfg(not(target_arch = "bpf"))]
        let _ = epoch;
    }
}

#[inline(always)]
fn from_user(ctx: &XdpContext) -> Result<Outcome, Outcome> {
    let eth = at::<Eth>(ctx, 0).ok_or(Outcome::AccessTruncated)?;
    // SAFETY: checked by `at`.
    let Eth { dst, src, .. } = unsafe { *eth };
    if is_link_local(dst) {
        return Ok(Outcome::AccessLinkLocal);
    }
    let headers = Headers::read(ctx, eth).map_err(|bad| match bad {
        BadTags::Truncated => Outcome::AccessTruncated,
        BadTags::Service => Outcome::AccessServiceTag,
        BadTags::Stacked => Outcome::AccessStackedTags,
        BadTags::ReservedVid => Outcome::AccessReservedVid,
    })?;

    let mac = wire_mac_word(src);
    let key = UserKey { mac, ifindex: ctx.ingress_ifindex() as u32, tag: 0 };
    // SAFETY: the value is copied; `by_mac` finds out if it was replaced meanwhile.
    let slot = *unsafe { USER_INDEX.get(key) }.ok_or(Outcome::AccessUnknownUser)?;
    let user = FoundUser::by_mac(slot, mac).ok_or(Outcome::AccessUnknownUser)?;

    let word = user.word();
    if word.switch() == 0 {
        return send(ctx, eth, &headers, &user, word.a());
    }

    // SAFETY: helpers without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let run = Watched::begin(cpu).ok_or(Outcome::Internal)?;
    let result = match user.select(word) {
        None => Err(Outcome::AccessGeneration),
        Some(selection) => {
            let kept = keep::keep(ctx, &headers, slot, word, selection.phase);
            if let Keep::Kept(result) = kept {
                result
            } else {
                let result = send(ctx, eth, &headers, &user, selection.network);
                match result {
                    Ok(Outcome::AccessForwarded) => {
                        // `a` is what the switch turns away from
                        if selection.network == word.a() {
                            stamp(cpu, word.switch());
                        }
                        Ok(if matches!(kept, Keep::Expired) {
                            Outcome::AccessHoldExpired
                        } else {
                            Outcome::AccessForwarded
                        })
                    }
                    other => other,
                }
            }
        }
    };
    run.end();
    result
}

/// Notes that this CPU has just sent a frame under the old network of `switch`.
#[inline(always)]
fn stamp(cpu: u32, switch: u32) {
    if let Some(last) = LAST_OLD.get_ptr_mut(cpu * SWITCHES + switch) {
        // SAFETY: this CPU's own element; the daemon only reads it.
        unsafe { write_volatile(last, bpf_ktime_get_ns()) };
    }
}

/// A user's frame into `network`.
#[inline(always)]
fn send(
    ctx: &XdpContext,
    eth: *mut Eth,
    headers: &Headers,
    user: &FoundUser,
    network: u16,
) -> Result<Outcome, Outcome> {
    let network = FoundNetwork::at(network).ok_or(Outcome::Internal)?;
    let link = network.link();
    if !link.in_use() {
        return Err(Outcome::AccessNoNetwork);
    }
    let virtual_mac = virtual_router_mac();
    let router = network.router().mac();

    if headers.ethertype == ETHERTYPE_ARP.to_be() {
        let arp = headers.arp(ctx).ok_or(Outcome::AccessTruncated)?;
        // SAFETY: checked by `at`, here and below; the frame is not moved before the last use.
        let (is_arp, op, target) =
            unsafe { (is_ipv4_over_ethernet(&*arp), (*arp).op, wire_ip_word((*arp).tpa)) };
        if !is_arp {
            return Err(Outcome::AccessArpMalformed);
        }
        if op == ARP_REQUEST.to_be() && target == network.address() {
            answer_for_router(eth, arp, word_wire_mac(virtual_mac));
            // not XDP_TX: a veth never wakes a peer without an XDP program for that (its
            // veth_xdp_flush; seen on Linux 6.18)
            return redirect(User::port_of(user.identity), Outcome::AccessArpAnswered, Outcome::AccessNoPort);
        }
        // SAFETY: as above.
        unsafe {
            if wire_mac_word((*arp).tha) == virtual_mac {
                (*arp).tha = word_wire_mac(router.ok_or(Outcome::AccessRouterUnknown)?);
            }
        }
    }

    // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
    unsafe {
        if wire_mac_word((*eth).dst) == virtual_mac {
            (*eth).dst = word_wire_mac(router.ok_or(Outcome::AccessRouterUnknown)?);
        }
    }

    if !fits(ctx, link.port(), headers.tci.is_some()) {
        return Err(Outcome::AccessTooLong);
    }
    match (headers.tci, link.vid()) {
        (None, 0) => {}
        (None, vid) => push_tag(ctx, vid).ok_or(Outcome::AccessNoHeadroom)?,
        (Some(_), 0) => pop_tag(ctx).ok_or(Outcome::AccessNoHeadroom)?,
        (Some(tci), vid) => {
            let tag = at::<Tag>(ctx, ETH_LEN).ok_or(Outcome::AccessTruncated)?;
            // SAFETY: checked by `at`.
            unsafe { (*tag).tci = with_vid(tci, vid).to_be() };
        }
    }
    redirect(link.port(), Outcome::AccessForwarded, Outcome::AccessNoPort)
}

/// Makes a request for the router's address the answer to it.
#[inline(always)]
fn answer_for_router(eth: *mut Eth, arp: *mut Arp, virtual_mac: WireMac) {
    // SAFETY: both were checked by `at`, and the frame has not been moved since.
    unsafe {
        (*eth).dst = (*eth).src;
        (*eth).src = virtual_mac;
        (*arp).op = ARP_REPLY.to_be();
        let (asker, asker_ip) = ((*arp).sha, (*arp).spa);
        (*arp).sha = virtual_mac;
        (*arp).spa = (*arp).tpa;
        (*arp).tha = asker;
        (*arp).tpa = asker_ip;
    }
}

#[inline(always)]
fn to_user(ctx: &XdpContext) -> Result<Outcome, Outcome> {
    let eth = at::<Eth>(ctx, 0).ok_or(Outcome::WanTruncated)?;
    // SAFETY: checked by `at`.
    let Eth { dst, src, .. } = unsafe { *eth };
    if is_link_local(dst) {
        return Ok(Outcome::WanLinkLocal);
    }
    let headers = Headers::read(ctx, eth).map_err(|bad| match bad {
        BadTags::Truncated => Outcome::WanTruncated,
        BadTags::Service => Outcome::WanServiceTag,
        BadTags::Stacked => Outcome::WanStackedTags,
        BadTags::ReservedVid => Outcome::WanUnknownNetwork,
    })?;

    // a priority tag (VID 0) is no tag as far as the network is concerned
    let by_vid = NETWORK_BY_VID.get_ptr(vid(headers.tci.unwrap_or(0)).into()).ok_or(Outcome::Internal)?;
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let index = unsafe { read_volatile(by_vid) } as u16;
    let network = FoundNetwork::at(index).ok_or(Outcome::Internal)?;
    if !network.link().in_use() {
        return Err(Outcome::WanUnknownNetwork);
    }
    let virtual_mac = virtual_router_mac();
    let router = network.router().mac();

    let mut outcome = Outcome::WanForwarded;
    let user = if headers.ethertype == ETHERTYPE_ARP.to_be() {
        let arp = headers.arp(ctx).ok_or(Outcome::WanTruncated)?;
        // SAFETY: checked by `at`, here and below; the frame is not moved before the last use.
        let Arp { op, sha, spa, tpa, .. } = unsafe { *arp };
        // SAFETY: as above.
        if !is_ipv4_over_ethernet(unsafe { &*arp }) {
            return Err(Outcome::WanArpMalformed);
        }
        let (sender, target) = (wire_ip_word(spa), wire_ip_word(tpa));
        let by_router = sender == network.address();
        let is_request = op == ARP_REQUEST.to_be();
        // The users' own requests for r never get here, so an answer from r is to the daemon's introduction; and what the
        // router announces of itself the users need not know: for them it has the one virtual MAC.
        if by_router && (!is_request || target == sender) {
            return Ok(Outcome::WanRouterArp);
        }
        if !is_request && is_group(dst) {
            return Ok(Outcome::WanGroup);
        }
        if by_router || router == Some(wire_mac_word(sha)) {
            // SAFETY: as above.
            unsafe { (*arp).sha = word_wire_mac(virtual_mac) };
        }
        if is_request {
            outcome = Outcome::WanArpForwarded;
            // SAFETY: the value is copied; a slot that was given to another since is settled by its network.
            let slot = *unsafe { USER_BY_IP.get(target) }.ok_or(Outcome::WanUnknownUser)?;
            FoundUser::in_slot(slot).ok_or(Outcome::Internal)?
        } else {
            by_destination(dst)?
        }
    } else if is_group(dst) {
        return Ok(Outcome::WanGroup);
    } else {
        by_destination(dst)?
    };

    let selection = user.select(user.word()).ok_or(Outcome::WanGeneration)?;
    if !selection.accepts(index) {
        return Err(Outcome::WanStaleNetwork);
    }

    // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
    unsafe {
        if router == Some(wire_mac_word(src)) {
            (*eth).src = word_wire_mac(virtual_mac);
        }
        (*eth).dst = word_wire_mac(User::mac_of(user.identity));
    }
    let port = User::port_of(user.identity);
    if headers.tci.is_some() {
        pop_tag(ctx).ok_or(Outcome::WanNoHeadroom)?;
    }
    if !fits(ctx, port, false) {
        return Err(Outcome::WanTooLong);
    }
    redirect(port, outcome, Outcome::WanNoPort)
}

#[inline(always)]
fn redirect(port: u32, sent: Outcome, missing: Outcome) -> Result<Outcome, Outcome> {
    DEVICE.redirect(port, 0).map(|_| sent).map_err(|_| missing)
}

/// The user a frame from the WAN is addressed to.
#[inline(always)]
fn by_destination(dst: WireMac) -> Result<FoundUser, Outcome> {
    let mac = wire_mac_word(dst);
    // SAFETY: the value is copied; `by_mac` finds out if it was replaced meanwhile.
    let slot = *unsafe { USER_BY_MAC.get(mac) }.ok_or(Outcome::WanUnknownUser)?;
    FoundUser::by_mac(slot, mac).ok_or(Outcome::WanUnknownUser)
}

/// Whether `port` takes the frame, whose tag, if it has one, does not count.
#[inline(always)]
fn fits(ctx: &XdpContext, port: u32, tagged: bool) -> bool {
    let Some(largest) = PORT.get_ptr(port) else { return false };
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let largest = unsafe { read_volatile(largest) };
    // the tag is added on this side: the verifier lets nothing be added to the end of a packet
    len(ctx) as u64 <= largest + if tagged { TAG_LEN as u64 } else { 0 }
}

/// Both addresses of the Ethernet header, which a push or pop moves by four octets.
type Addresses = [u16; 6];

#[inline(always)]
fn push_tag(ctx: &XdpContext, vid: u16) -> Option<()> {
    #[repr(C)]
    struct Tagged {
        addresses: Addresses,
        tpid: u16,
        tci: u16,
    }
    let addresses = at::<Addresses>(ctx, 0)?;
    // SAFETY: checked by `at`.
    let addresses = unsafe { *addresses };
    // SAFETY: the context of this run.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(TAG_LEN as i32)) } != 0 {
        return None;
    }
    let tagged = at::<Tagged>(ctx, 0)?;
    // SAFETY: checked by `at` after the move.
    unsafe { *tagged = Tagged { addresses, tpid: TPID_8021Q.to_be(), tci: vid.to_be() } };
    Some(())
}

#[inline(always)]
fn pop_tag(ctx: &XdpContext) -> Option<()> {
    let addresses = at::<Addresses>(ctx, 0)?;
    // SAFETY: checked by `at`.
    let addresses = unsafe { *addresses };
    // SAFETY: the context of this run.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, TAG_LEN as i32) } != 0 {
        return None;
    }
    let moved = at::<Addresses>(ctx, 0)?;
    // SAFETY: checked by `at` after the move.
    unsafe { *moved = addresses };
    Some(())
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The kernel lets only GPL-compatible programs call some helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
