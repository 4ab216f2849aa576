//! The benchmarks' own programs.
//!
//! - `source`: makes a numbered frame of a random user and hands it on ([`Next`]). Run by BPF_PROG_TEST_RUN; `source_noted`
//!   enters it in the journal as well.
//! - `pass`, `drop`, `redirect`, `redirect_tagged`: limits. `by_hash_map`, `by_map_in_map`: the gateway's job, done otherwise.
//! - `sink`: enters what came out; `count` only counts it.
//! - `router`: answers every ARP request, tagged or not.
//! - `tc_source`, `tc_forward`, `tc_count`: the same for tc.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the program macros make an undocumented twin of each entry")]

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MMAPABLE, TC_ACT_SHOT, xdp_action},
    btf_maps::{ArrayOfMaps, HashMap as InnerHashMap},
    helpers::{bpf_redirect, bpf_skb_vlan_pop, bpf_skb_vlan_push, generated::bpf_xdp_adjust_head},
    macros::{btf_map, classifier, map, xdp},
    maps::{Array, DevMap, HashMap, PerCpuArray, ProgramArray},
    programs::{TcContext, XdpContext},
};
use gateway_bench_ebpf::{
    Clock, FRAME_LEN, JOURNAL, LINES_LEN, NEXTS, ONCE, OUT, SEQUENCE_AT, SOURCE_AT, State, USER_NET,
    USER_OUI, checksum, line_of,
};

const TPID: u16 = 0x8100;
const ARP: u16 = 0x0806;
const TAG_LEN: usize = 4;

#[map]
static STATE: Array<State> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static CLOCK: Array<Clock> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static BEFORE: Array<u64> = Array::with_max_entries(JOURNAL, BPF_F_MMAPABLE);
#[map]
static AFTER: Array<u64> = Array::with_max_entries(JOURNAL, BPF_F_MMAPABLE);
#[map]
static RECEIVED: Array<u64> = Array::with_max_entries(JOURNAL, BPF_F_MMAPABLE);
#[map]
static NEXT: ProgramArray = ProgramArray::with_max_entries(NEXTS, 0);
#[map]
static TC_NEXT: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static DEVICE: DevMap = DevMap::with_max_entries(1, 0);
/// Frames at the far end.
#[map]
static COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// Source MAC -> VID.
#[map]
static BY_MAC: HashMap<u64, u32> = HashMap::with_max_entries(1, 0); // set at load
/// The same, in a map of maps.
#[btf_map]
static OUTER: ArrayOfMaps<InnerHashMap<u64, u32, 1>, 1> = ArrayOfMaps::new();

/// A cache line for each user and one to spare, as the gateway's table.
#[map]
static LINES: Array<[u64; LINES_LEN / 8]> = Array::with_max_entries(1, BPF_F_MMAPABLE); // set at load

/// Elements of `LINES`.
#[unsafe(no_mangle)]
static LINES_COUNT: u32 = 0; // set at load
/// Which of [`Next`] the source hands on to.
#[unsafe(no_mangle)]
static HAND_ON_TO: u32 = 0; // set at load
/// Interface that `tc_forward` sends to.
#[unsafe(no_mangle)]
static TC_OUT: u32 = 0; // set at load
/// The router's MAC, as it is in memory.
#[unsafe(no_mangle)]
static ROUTER_MAC: u64 = 0; // set at load

fn word(global: *const u64) -> u64 {
    // SAFETY: a constant of this program; volatile because its value is put there at load.
    unsafe { read_volatile(global) }
}

fn half(global: *const u32) -> u32 {
    // SAFETY: as above.
    unsafe { read_volatile(global) }
}

/// `T` at `offset` of the frame, if it ends before the frame does.
#[inline(always)]
fn at<T>(start: usize, end: usize, offset: usize) -> Option<*mut T> {
    (start + offset + size_of::<T>() <= end).then_some((start + offset) as *mut T)
}

#[inline(always)]
fn xdp_at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    at(ctx.data(), ctx.data_end(), offset)
}

/// What of a frame depends on its user.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Ethernet {
    destination: [u16; 3],
    source: [u8; 6],
    ethertype: u16,
}

/// The same, of its IPv4 header.
#[repr(C)]
#[derive(Clone, Copy)]
struct Source {
    checksum: u16,
    address: [u8; 4],
}

/// Draws a user; its last three octets.
#[inline(always)]
fn draw(state: *mut State) -> [u8; 3] {
    // SAFETY: an element of the map; one CPU runs the source.
    unsafe {
        let mut x = (*state).seed;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (*state).seed = x;
        let user = (((x >> 32) * (*state).users) >> 32) + 1;
        [(user >> 16) as u8, (user >> 8) as u8, user as u8]
    }
}

/// Writes the head of user `of`'s frame.
#[inline(always)]
fn head(state: *mut State, of: [u8; 3], ethernet: *mut Ethernet, source: *mut Source) {
    let [b, c, d] = of;
    // SAFETY: both were checked to be in the frame; the state is an element of the map.
    unsafe {
        let destination = (*state).destination;
        *ethernet = Ethernet {
            destination: [destination as u16, (destination >> 16) as u16, (destination >> 32) as u16],
            source: [USER_OUI[0], USER_OUI[1], USER_OUI[2], b, c, d],
            ethertype: 0x0800_u16.to_be(),
        };
        let address = [USER_NET, b, c, d];
        *source = Source { checksum: checksum(address).to_be(), address };
    }
}

#[inline(always)]
fn produce(ctx: &XdpContext, noted: bool) -> Option<()> {
    if ctx.data_end() - ctx.data() > FRAME_LEN {
        // the tag of the frame before; frames of a test run that are not sent are one and the same
        // SAFETY: the context of this run.
        unsafe { bpf_xdp_adjust_head(ctx.ctx, TAG_LEN as i32) };
    }
    let state = STATE.get_ptr_mut(0)?;
    let user = draw(state);
    let (ethernet, source) = (xdp_at::<Ethernet>(ctx, 0)?, xdp_at::<Source>(ctx, SOURCE_AT - 2)?);
    head(state, user, ethernet, source);
    if noted {
        let sequence = xdp_at::<u64>(ctx, SEQUENCE_AT)?;
        // SAFETY: elements of maps, and a place in the frame that was checked; the other side writes whole words.
        unsafe {
            let number = (*state).next;
            (*state).next = number + 1;
            *sequence = number;
            let clock = CLOCK.get_ptr(0)?;
            let (entry, last) = (number as u32 % JOURNAL, (number as u32).wrapping_sub(1) % JOURNAL);
            // the run of the frame before has ended
            let begun = read_volatile(&raw const (*clock).begun);
            write_volatile(AFTER.get_ptr_mut(last)?, begun);
            // and that of this one begins
            let done = read_volatile(&raw const (*clock).done);
            write_volatile(BEFORE.get_ptr_mut(entry)?, done);
        }
    }
    Some(())
}

#[inline(always)]
fn hand_on(ctx: &XdpContext) -> u32 {
    // SAFETY: the programs there are of this kind; they do not come back.
    unsafe { NEXT.tail_call(ctx, half(&raw const HAND_ON_TO)) };
    xdp_action::XDP_ABORTED
}

#[xdp(frags)]
pub fn source(ctx: XdpContext) -> u32 {
    match produce(&ctx, false) {
        Some(()) => hand_on(&ctx),
        None => xdp_action::XDP_ABORTED,
    }
}

#[xdp(frags)]
pub fn source_noted(ctx: XdpContext) -> u32 {
    match produce(&ctx, true) {
        Some(()) => hand_on(&ctx),
        None => xdp_action::XDP_ABORTED,
    }
}

#[xdp(frags)]
pub fn pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[xdp(frags)]
pub fn drop(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

#[xdp(frags)]
pub fn redirect(_ctx: XdpContext) -> u32 {
    out()
}

#[inline(always)]
fn out() -> u32 {
    match DEVICE.redirect(OUT, 0) {
        Ok(action) | Err(action) => action,
    }
}

#[xdp(frags)]
pub fn redirect_tagged(ctx: XdpContext) -> u32 {
    tagged(&ctx, 1).unwrap_or(xdp_action::XDP_ABORTED)
}

/// Pushes a tag and sends the frame.
#[inline(always)]
fn tagged(ctx: &XdpContext, vid: u16) -> Option<u32> {
    #[repr(C)]
    struct Tagged {
        addresses: [u16; 6],
        tpid: u16,
        tci: u16,
    }
    // SAFETY: checked by `xdp_at`, before and after the move; the context of this run.
    unsafe {
        let addresses = *xdp_at::<[u16; 6]>(ctx, 0)?;
        if bpf_xdp_adjust_head(ctx.ctx, -(TAG_LEN as i32)) != 0 {
            return None;
        }
        *xdp_at::<Tagged>(ctx, 0)? = Tagged { addresses, tpid: TPID.to_be(), tci: vid.to_be() };
    }
    Some(out())
}

/// The source MAC as the maps have it.
#[inline(always)]
fn source_mac(mac: [u16; 3]) -> u64 {
    mac[0] as u64 | (mac[1] as u64) << 16 | (mac[2] as u64) << 32
}

#[xdp(frags)]
pub fn by_hash_map(ctx: XdpContext) -> u32 {
    looked_up(&ctx).unwrap_or(xdp_action::XDP_DROP)
}

#[inline(always)]
fn looked_up(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: checked by `xdp_at`; the value is copied.
    let vid = unsafe { *BY_MAC.get(source_mac(*xdp_at::<[u16; 3]>(ctx, 6)?))? };
    tagged(ctx, vid as u16)
}

/// What memory alone costs: the least that a program can do that has a word of each user's own.
#[xdp(frags)]
pub fn one_line(ctx: XdpContext) -> u32 {
    of_one_line(&ctx).unwrap_or(xdp_action::XDP_DROP)
}

#[inline(always)]
fn of_one_line(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: checked by `xdp_at`; an element of the map, which is of 16 words.
    let vid = unsafe {
        let (element, octet) =
            line_of(source_mac(*xdp_at::<[u16; 3]>(ctx, 6)?), half(&raw const LINES_COUNT));
        read_volatile(LINES.get_ptr(element)?.cast::<u64>().byte_add(octet))
    };
    tagged(ctx, vid as u16)
}

#[xdp(frags)]
pub fn by_map_in_map(ctx: XdpContext) -> u32 {
    looked_up_twice(&ctx).unwrap_or(xdp_action::XDP_DROP)
}

#[inline(always)]
fn looked_up_twice(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: checked by `xdp_at`; the value is copied.
    let vid = unsafe {
        let mac = source_mac(*xdp_at::<[u16; 3]>(ctx, 6)?);
        *OUTER.get(0)?.get(mac)?
    };
    tagged(ctx, vid as u16)
}

/// Enters what came out.
#[xdp(frags)]
pub fn sink(ctx: XdpContext) -> u32 {
    enter(&ctx);
    count_one();
    xdp_action::XDP_DROP
}

#[inline(always)]
fn enter(ctx: &XdpContext) -> Option<()> {
    // SAFETY: checked by `xdp_at`; one CPU runs the sink.
    unsafe {
        let is_tagged = *xdp_at::<u16>(ctx, 12)? == TPID.to_be();
        let (vid, shift) = if is_tagged { (u16::from_be(*xdp_at::<u16>(ctx, 14)?), TAG_LEN) } else { (0, 0) };
        let number = if shift == 0 {
            *xdp_at::<u64>(ctx, SEQUENCE_AT)?
        } else {
            *xdp_at::<u64>(ctx, SEQUENCE_AT + TAG_LEN)?
        };
        let entry = RECEIVED.get_ptr_mut(number as u32 % JOURNAL)?;
        let before = read_volatile(entry);
        write_volatile(entry, (before & !0xffff) + ONCE + vid as u64);
    }
    Some(())
}

#[inline(always)]
fn count_one() {
    if let Some(count) = COUNT.get_ptr_mut(0) {
        // SAFETY: this CPU's own element.
        unsafe { *count += 1 };
    }
}

#[xdp(frags)]
pub fn count(_ctx: XdpContext) -> u32 {
    count_one();
    xdp_action::XDP_DROP
}

/// ARP for IPv4 over Ethernet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arp {
    head: [u16; 3],
    op: u16,
    sha: [u16; 3],
    spa: [u16; 2],
    tha: [u16; 3],
    tpa: [u16; 2],
}

#[xdp(frags)]
pub fn router(ctx: XdpContext) -> u32 {
    answer(&ctx).unwrap_or(xdp_action::XDP_DROP)
}

#[inline(always)]
fn answer(ctx: &XdpContext) -> Option<u32> {
    let mac = word(&raw const ROUTER_MAC);
    let mac = [mac as u16, (mac >> 16) as u16, (mac >> 32) as u16];
    // SAFETY: checked by `xdp_at`.
    unsafe {
        let is_tagged = *xdp_at::<u16>(ctx, 12)? == TPID.to_be();
        let (ethertype, arp) = if is_tagged {
            (*xdp_at::<u16>(ctx, 16)?, xdp_at::<Arp>(ctx, 18)?)
        } else {
            (*xdp_at::<u16>(ctx, 12)?, xdp_at::<Arp>(ctx, 14)?)
        };
        if ethertype != ARP.to_be() || (*arp).op != 1_u16.to_be() {
            return None;
        }
        let addresses = xdp_at::<[u16; 6]>(ctx, 0)?;
        let asker = (*arp).sha;
        *addresses = [asker[0], asker[1], asker[2], mac[0], mac[1], mac[2]];
        (*arp).op = 2_u16.to_be();
        let asked = (*arp).tpa;
        (*arp).tha = asker;
        (*arp).tpa = (*arp).spa;
        (*arp).sha = mac;
        (*arp).spa = asked;
    }
    Some(xdp_action::XDP_TX)
}

fn skb_at<T>(skb: *mut __sk_buff, offset: usize) -> Option<*mut T> {
    // SAFETY: the kernel passes a valid context.
    let (start, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    at(start, end, offset)
}

#[classifier]
pub fn tc_source(ctx: TcContext) -> i32 {
    if tc_produce(ctx.skb.skb).is_some() {
        // SAFETY: the program there is of this kind; it does not come back.
        unsafe { TC_NEXT.tail_call(&ctx, 0) };
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn tc_produce(skb: *mut __sk_buff) -> Option<()> {
    // SAFETY: the kernel passes a valid context.
    unsafe {
        if (*skb).vlan_present != 0 {
            // of the run before: the frame is one and the same
            bpf_skb_vlan_pop(skb);
        }
    }
    let state = STATE.get_ptr_mut(0)?;
    let user = draw(state);
    let source = skb_at::<Source>(skb, SOURCE_AT - 2)?;
    let ethernet = skb_at::<Ethernet>(skb, 0)?;
    head(state, user, ethernet, source);
    Some(())
}

/// The gateway's job, towards the provider, as a tc program.
#[classifier]
pub fn tc_forward(ctx: TcContext) -> i32 {
    tc_looked_up(ctx.skb.skb).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn tc_looked_up(skb: *mut __sk_buff) -> Option<i32> {
    // SAFETY: checked by `skb_at`; the value is copied; the kernel passes a valid context.
    unsafe {
        let vid = *BY_MAC.get(source_mac(*skb_at::<[u16; 3]>(skb, 6)?))?;
        if bpf_skb_vlan_push(skb, TPID.to_be(), vid as u16) != 0 {
            return None;
        }
        Some(bpf_redirect(half(&raw const TC_OUT), 0) as i32)
    }
}

/// `redirect`, as a tc program.
#[classifier]
pub fn tc_redirect(_ctx: TcContext) -> i32 {
    // SAFETY: touches nothing of ours.
    unsafe { bpf_redirect(half(&raw const TC_OUT), 0) as i32 }
}

#[classifier]
pub fn tc_count(_ctx: TcContext) -> i32 {
    count_one();
    TC_ACT_SHOT
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
