//! The fence: no packet to or from v, and no ARP about v, except CRIU's own.
//!
//! Two nftables tables of our own, both called `handover-<migration>`:
//!
//! ```text
//! table inet handover-m1 {                         table arp handover-m1 {
//!   chain input {  hook input  -> v }                chain input {  hook input  who-has v }
//!   chain output { hook output <- v }                chain output { hook output v is-at   }
//! }                                                }
//! ```
//!
//! Invariants: a fence is set or lifted in one netlink transaction; it costs the same for one connection and for a
//! million; packets with CRIU's mark pass first, because CRIU feeds the FIN of a half-closed connection to itself;
//! it is found again by its name after a crash.
//!
//! The drop is silent towards peers. A local `sendto` of UDP sees EPERM, which only a process that still runs could
//! notice: between fence and freeze, a few milliseconds.

use std::{
    collections::BTreeSet,
    ffi::{CStr, CString},
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, BorrowedFd},
};

use nftnl::{
    Batch, Chain, ChainType, FinalizedBatch, Hook, MsgType, Policy, ProtoFamily, Rule, Table,
    expr::{NetworkHeaderField, Payload, TransportHeaderField},
    nft_expr,
};

use crate::error::{Error, Result};

/// The mark of packets CRIU sends itself (SOCCR_MARK in CRIU's soccr/soccr.h).
const CRIU_MARK: u32 = 0xC114;

const PREFIX: &str = "handover-";

/// Before every chain of a usual firewall.
const PRIORITY: i32 = -310;

/// How much is kept out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// New connections only: what is established drains.
    NewConnections,
    /// Everything.
    All,
}

/// Sets the fence of `migration` around `address`, instead of one of the same migration that is there.
///
/// # Errors
/// nftables is missing, or not allowed.
pub fn set(migration: &str, address: Ipv4Addr, strength: Strength) -> Result<()> {
    let name = table_name(migration)?;
    let mut batch = Batch::new();
    replace(&mut batch, &name, ProtoFamily::Inet, |batch, table| {
        chain(batch, table, c"input", Hook::In, |batch, chain| match strength {
            Strength::NewConnections => new_connections(batch, chain, address),
            Strength::All => {
                criu_passes(batch, chain);
                ipv4(batch, chain, Payload::Network(header_field(16)), address);
            }
        });
        chain(batch, table, c"output", Hook::Out, |batch, chain| {
            if strength == Strength::All {
                criu_passes(batch, chain);
                ipv4(batch, chain, Payload::Network(header_field(12)), address);
            }
        });
    });
    if strength == Strength::All {
        replace(&mut batch, &name, ProtoFamily::Arp, |batch, table| {
            // NF_ARP_IN is 0 and NF_ARP_OUT is 1 (linux/netfilter_arp.h), the numbers that `Hook` calls so for IP
            chain(batch, table, c"input", Hook::PreRouting, |batch, chain| {
                drop_if(batch, chain, header_field(24), address); // target protocol address
            });
            chain(batch, table, c"output", Hook::In, |batch, chain| {
                drop_if(batch, chain, header_field(14), address); // sender protocol address
            });
        });
    }
    send(&batch.finalize()).map_err(Error::io("setting the fence around", address))
}

/// Lifts the fence of `migration`. Succeeds when there is none.
///
/// # Errors
/// nftables refused.
pub fn lift(migration: &str) -> Result<()> {
    let name = table_name(migration)?;
    let mut batch = Batch::new();
    for family in [ProtoFamily::Inet, ProtoFamily::Arp] {
        // a table is made first so that deleting it never fails: one transaction either way
        let table = Table::new(&name, family);
        batch.add(&table, MsgType::Add);
        batch.add(&table, MsgType::Del);
    }
    send(&batch.finalize()).map_err(Error::io("lifting the fence of", migration))
}

/// The migrations that have a fence here.
///
/// # Errors
/// nftables is missing.
pub fn list() -> Result<BTreeSet<String>> {
    let failed = |e| Error::io("listing", "nftables tables")(e);
    let socket = open().map_err(failed)?;
    let request = nftnl::table::get_tables_nlmsg(0);
    // the message's own length stands in its header; the buffer behind it is only room
    let length = u32::from_ne_bytes([request[0], request[1], request[2], request[3]]) as usize;
    socket.send(&request[..length]).map_err(failed)?;
    let mut names = std::collections::HashSet::<CString>::new();
    let mut buffer = vec![0; nftnl::nft_nlmsg_maxsize() as usize];
    'dump: loop {
        for message in socket.recv(&mut buffer).map_err(failed)? {
            let message = message.map_err(failed)?;
            let run =
                mnl::cb_run2(message, 0, socket.portid(), nftnl::table::get_tables_cb, &mut names).map_err(failed)?;
            if matches!(run, mnl::CbResult::Stop) {
                break 'dump;
            }
        }
    }
    Ok(names.iter().filter_map(|n| Some(n.to_str().ok()?.strip_prefix(PREFIX)?.to_owned())).collect())
}

fn table_name(migration: &str) -> Result<CString> {
    CString::new(format!("{PREFIX}{migration}")).map_err(|_| Error::other("a migration's id holds a zero byte"))
}

/// Four bytes of the network header (nftnl's "bits" are handed to the kernel as they are, and it counts bytes).
const fn header_field(offset: u32) -> NetworkHeaderField {
    NetworkHeaderField::Raw { offset_bits: offset, length_bits: 4 }
}

fn replace(batch: &mut Batch, name: &CStr, family: ProtoFamily, fill: impl FnOnce(&mut Batch, &Table)) {
    let table = Table::new(name, family);
    batch.add(&table, MsgType::Add);
    batch.add(&table, MsgType::Del);
    batch.add(&table, MsgType::Add);
    fill(batch, &table);
}

fn chain(batch: &mut Batch, table: &Table, name: &CStr, hook: Hook, fill: impl FnOnce(&mut Batch, &Chain<'_>)) {
    let mut chain = Chain::new(name, table);
    chain.set_type(ChainType::Filter);
    chain.set_hook(hook, PRIORITY);
    chain.set_policy(Policy::Accept);
    batch.add(&chain, MsgType::Add);
    fill(batch, &chain);
}

fn criu_passes(batch: &mut Batch, chain: &Chain<'_>) {
    let mut rule = Rule::new(chain);
    rule.add_expr(&nft_expr!(meta mark));
    rule.add_expr(&nft_expr!(cmp == CRIU_MARK));
    rule.add_expr(&nft_expr!(verdict accept));
    batch.add(&rule, MsgType::Add);
}

/// In the `inet` family: IPv4 packets with `address` in `field` are dropped.
fn ipv4(batch: &mut Batch, chain: &Chain<'_>, field: Payload, address: Ipv4Addr) {
    let mut rule = Rule::new(chain);
    rule.add_expr(&nft_expr!(meta nfproto));
    rule.add_expr(&nft_expr!(cmp == libc::NFPROTO_IPV4 as u8));
    rule.add_expr(&field);
    rule.add_expr(&nft_expr!(cmp == address));
    rule.add_expr(&nft_expr!(verdict drop));
    batch.add(&rule, MsgType::Add);
}

fn drop_if(batch: &mut Batch, chain: &Chain<'_>, field: NetworkHeaderField, address: Ipv4Addr) {
    let mut rule = Rule::new(chain);
    rule.add_expr(&Payload::Network(field));
    rule.add_expr(&nft_expr!(cmp == address));
    rule.add_expr(&nft_expr!(verdict drop));
    batch.add(&rule, MsgType::Add);
}

/// TCP segments to `address` with SYN and without ACK are dropped.
fn new_connections(batch: &mut Batch, chain: &Chain<'_>, address: Ipv4Addr) {
    const FLAGS: TransportHeaderField = TransportHeaderField::Raw { offset_bits: 13, length_bits: 1 };
    const SYN: u8 = 0x02;
    const SYN_ACK: u8 = 0x12;
    let mut rule = Rule::new(chain);
    rule.add_expr(&nft_expr!(meta nfproto));
    rule.add_expr(&nft_expr!(cmp == libc::NFPROTO_IPV4 as u8));
    rule.add_expr(&Payload::Network(header_field(16)));
    rule.add_expr(&nft_expr!(cmp == address));
    rule.add_expr(&nft_expr!(meta l4proto));
    rule.add_expr(&nft_expr!(cmp == libc::IPPROTO_TCP as u8));
    rule.add_expr(&Payload::Transport(FLAGS));
    rule.add_expr(&nft_expr!(bitwise mask SYN_ACK, xor 0u8));
    rule.add_expr(&nft_expr!(cmp == SYN));
    rule.add_expr(&nft_expr!(verdict drop));
    batch.add(&rule, MsgType::Add);
}

/// libmnl opens its sockets without FD_CLOEXEC; a CRIU started meanwhile must not inherit them.
///
/// # Errors
/// Of fcntl.
pub fn close_on_exec(socket: &impl AsRawFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    // SAFETY: the borrow ends with this function, before `socket` can be closed
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

fn open() -> io::Result<mnl::Socket> {
    let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
    close_on_exec(&socket)?;
    Ok(socket)
}

fn send(batch: &FinalizedBatch) -> io::Result<()> {
    let socket = open()?;
    socket.send_all(batch)?;
    let portid = socket.portid();
    let mut buffer = vec![0; nftnl::nft_nlmsg_maxsize() as usize];
    let mut expected = batch.sequence_numbers();
    while !expected.is_empty() {
        for message in socket.recv(&mut buffer)? {
            let Some(seq) = expected.next() else { return Ok(()) };
            mnl::cb_run(message?, seq, portid)?;
        }
    }
    Ok(())
}
