//! The way of nearly all frames, either direction: data of a user who is known by a MAC and at home ([`gateway_ebpf::home`]), in
//! no switch, with nothing to do beside, untagged at the access side, in a network with a customer's tag. What is not that is
//! left alone for the rules in `access.rs` and `wan.rs`; what is, becomes exactly what they would make of it (the fuzzer
//! compares both with one oracle).
//!
//! It exists for its costs: one cache line of the user's, two loads of the frame's addresses, two stores of the new ones, no
//! branch that depends on where in its line an entry stands.

#[cfg(target_arch = "bpf")]
use core::arch::asm;
use core::ptr::read_volatile;

use aya_ebpf::{helpers::generated::bpf_xdp_adjust_head, programs::XdpContext};
use gateway_ebpf::{
    Access, Outcome, User, UserWord,
    frame::{
        ETH_LEN, ETHERTYPE_ARP, ETHERTYPE_IPV6, ICMPV6, IPV6_LEN, TAG_LEN, TPID_8021AD, TPID_8021Q, VID_MAX,
    },
    home::homes,
    words::vid_index,
};

use super::{
    maps::{FoundNetwork, NETWORK_BY_VID, USER, user_groups, virtual_router_mac},
    tags::{fits, redirect},
};

/// The octets of a MAC in the eight that were loaded from where it begins.
const MAC: u64 = 0xffff_ffff_ffff;
/// What the first three octets of a group's address of link-local control frames are, as loaded.
const LINK_LOCAL: u64 = 0x00c2_8001;

/// The head of a frame.
type Head = [u8; ETH_LEN];
/// With a tag.
type TaggedHead = [u8; ETH_LEN + TAG_LEN];
/// Either with an IPv6 header.
type HeadAndIp6 = [u8; ETH_LEN + IPV6_LEN];
type TaggedHeadAndIp6 = [u8; ETH_LEN + TAG_LEN + IPV6_LEN];

#[inline(always)]
fn bounds<T>(ctx: &XdpContext) -> Option<*mut u8> {
    let (start, end) = (ctx.data(), ctx.data_end());
    (start + size_of::<T>() <= end).then_some(start as *mut u8)
}

/// Eight octets of the frame from `AT` on, wherever that is: a load of the processor's own, which the language has for aligned
/// addresses only.
///
/// # Safety
/// They are in the frame.
#[inline(always)]
unsafe fn load<const AT: usize>(frame: *const u8) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's.
    unsafe {
        let word: u64;
        asm!("{word} = *(u64 *)({frame} + {at})", word = out(reg) word, frame = in(reg) frame, at = const AT,
            options(readonly, nostack));
        word
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        frame.add(AT).cast::<u64>().read_unaligned()
    }
}

/// The inverse.
///
/// # Safety
/// They are in the frame.
#[inline(always)]
unsafe fn store<const AT: usize>(frame: *mut u8, word: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's.
    unsafe {
        asm!("*(u64 *)({frame} + {at}) = {word}", word = in(reg) word, frame = in(reg) frame, at = const AT,
            options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        frame.add(AT).cast::<u64>().write_unaligned(word);
    }
}

/// 0 of 0, 1 of everything else; without a branch, which BPF's own comparison would be.
#[inline(always)]
fn is_not_zero(word: u64) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut sign = word;
        // SAFETY: arithmetic on registers.
        unsafe {
            asm!("{sign} = -{sign}", "{sign} |= {word}", "{sign} >>= 63", sign = inout(reg) sign,
                word = in(reg) word, options(pure, nomem, nostack));
        }
        sign as usize
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        usize::from(word != 0)
    }
}

/// Whether there is an IPv6 packet at `l3` that is not ICMPv6, of which some is translated.
#[inline(always)]
fn is_ip6_data<const L3: usize, T>(ctx: &XdpContext) -> bool {
    // SAFETY: checked by `bounds`, as `T` is the head and an IPv6 header.
    bounds::<T>(ctx).is_some_and(|frame| (unsafe { load::<L3>(frame) } >> 48) as u8 != ICMPV6)
}

/// The user with `mac`, if that is at home and `is_right`.
#[inline(always)]
fn at_home(mac: u64, is_right: impl Fn(Access) -> bool) -> Option<*const User> {
    for home in homes(mac, user_groups()) {
        let group = USER.get_ptr(home.group)?.cast::<User>();
        for line in [home.line, home.line ^ 1] {
            // SAFETY: entries of the group, each word read as the daemon writes it.
            let (identity, access, user) = unsafe {
                let line = group.add(line as usize * 2);
                let first = read_volatile(&raw const (*line).identity);
                let user = line.add(is_not_zero((first ^ mac) << 16));
                (read_volatile(&raw const (*user).identity), read_volatile(&raw const (*user).access), user)
            };
            if (identity ^ mac) << 16 == 0 && is_right(Access(access)) {
                return Some(user);
            }
        }
    }
    None
}

#[inline(always)]
fn word(user: *const User) -> UserWord {
    // SAFETY: an entry of a group, read as the one word that the daemon writes.
    UserWord(unsafe { read_volatile(&raw const (*user).word) })
}

/// What became of a user's frame; `None`: nothing yet, it is not plain.
#[inline(always)]
pub fn from_user(ctx: &XdpContext) -> Option<Result<Outcome, Outcome>> {
    let frame = bounds::<Head>(ctx)?;
    // SAFETY: checked by `bounds`.
    let (dst, src) = unsafe { (load::<0>(frame) & MAC, load::<6>(frame)) };
    let (src, ethertype) = (src & MAC, (src >> 48) as u16);
    if ethertype == TPID_8021Q.to_be()
        || ethertype == ETHERTYPE_ARP.to_be()
        || ethertype == ETHERTYPE_IPV6.to_be() && !is_ip6_data::<ETH_LEN, HeadAndIp6>(ctx)
        || ethertype == TPID_8021AD.to_be()
        || dst & 0xff_ffff == LINK_LOCAL
    {
        return None;
    }
    let way = Access::new(ctx.ingress_ifindex() as u32, 0, false).by_mac();
    let user = at_home(src, |access| access == way)?;
    let word = word(user);
    if word.switch() != 0 {
        return None;
    }
    let network = FoundNetwork::at(word.a())?;
    let link = network.link();
    if !link.is_customers() {
        return None;
    }
    let dst = if dst == virtual_router_mac() { network.router().mac()? } else { dst };
    if !fits(ctx, link.port(), false) {
        return None;
    }
    // SAFETY: the context of this run.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(TAG_LEN as i32)) } != 0 {
        return Some(Err(Outcome::AccessNoHeadroom));
    }
    let Some(frame) = bounds::<TaggedHead>(ctx) else { return Some(Err(Outcome::Internal)) };
    let tag = (TPID_8021Q.to_be() as u64) << 32 | (link.tci(0).to_be() as u64) << 48;
    // SAFETY: checked by `bounds` after the move.
    unsafe {
        store::<0>(frame, dst | src << 48);
        store::<8>(frame, src >> 16 | tag);
    }
    Some(redirect(link.port(), Outcome::AccessForwarded, Outcome::AccessNoPort))
}

/// What became of a frame from the provider; `None`: nothing yet, it is not plain.
#[inline(always)]
pub fn to_user(ctx: &XdpContext) -> Option<Result<Outcome, Outcome>> {
    let frame = bounds::<TaggedHead>(ctx)?;
    // TPID and TCI are the last four octets of the second word, the EtherType behind them the last two of the third
    // SAFETY: checked by `bounds`.
    let (dst, tag, ethertype) =
        unsafe { (load::<0>(frame), load::<8>(frame), (load::<10>(frame) >> 48) as u16) };
    let src = dst >> 48 | tag << 16 & MAC;
    let dst = dst & MAC;
    let tci = u16::from_be((tag >> 48) as u16);
    let vid = tci & 0xfff;
    if (tag >> 32) as u16 != TPID_8021Q.to_be()
        || ethertype == ETHERTYPE_ARP.to_be()
        || ethertype == ETHERTYPE_IPV6.to_be() && !is_ip6_data::<{ ETH_LEN + TAG_LEN }, TaggedHeadAndIp6>(ctx)
        || ethertype == TPID_8021Q.to_be()
        || ethertype == TPID_8021AD.to_be()
        || vid > VID_MAX
        || dst & 1 != 0
    {
        return None;
    }
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let index = unsafe { read_volatile(NETWORK_BY_VID.get_ptr(vid_index(false, vid))?) } as u16;
    let network = FoundNetwork::at(index)?;
    if !network.link().in_use() || network.ifindex() != ctx.ingress_ifindex() as u32 {
        return None;
    }
    let user = at_home(dst, Access::is_plain)?;
    let word = word(user);
    if word.switch() != 0 || word.a() != index {
        return None;
    }
    let src = if network.router().mac() == Some(src) { virtual_router_mac() } else { src };
    // SAFETY: as above.
    let port = User::port_of(unsafe { read_volatile(&raw const (*user).identity) });
    if !fits(ctx, port, true) {
        return None;
    }
    // SAFETY: the context of this run.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, TAG_LEN as i32) } != 0 {
        return Some(Err(Outcome::WanNoHeadroom));
    }
    let Some(frame) = bounds::<Head>(ctx) else { return Some(Err(Outcome::Internal)) };
    // SAFETY: checked by `bounds` after the move.
    unsafe {
        store::<0>(frame, dst | src << 48);
        // and the EtherType that is there
        store::<6>(frame, src | (ethertype as u64) << 48);
    }
    Some(redirect(port, Outcome::WanForwarded, Outcome::WanNoPort))
}
