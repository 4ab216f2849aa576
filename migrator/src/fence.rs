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
//! Tables and chains are made beforehand and removed afterwards; while the service stands still only rules change.
//!
//! Invariants: a fence is set or opened in one netlink transaction; it costs the same for one connection and for a
//! million; packets with CRIU's mark pass first, because CRIU feeds the FIN of a half-closed connection to itself;
//! it is found again by its name after a crash.
//!
//! The drop is silent towards peers. A local `sendto` of UDP sees EPERM, which only a process that still runs could
//! notice: between fence and freeze, a few milliseconds.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ffi::{CStr, CString},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    sync::{Mutex, PoisonError},
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

/// Makes the tables and chains of `migration` without a rule in them: nothing is kept out yet. Registering hooks takes
/// milliseconds, in which the service then does not stand still; rules take microseconds.
///
/// # Errors
/// nftables is missing, or not allowed.
pub fn prepare(migration: &str) -> Result<()> {
    change(migration, |batch, chain, _| flush(batch, chain))
        .map_err(Error::io("preparing the fence of", migration))
}

/// Sets the fence of `migration` around `address`, instead of one of the same migration that is there.
///
/// # Errors
/// nftables is missing, or not allowed.
pub fn set(migration: &str, address: Ipv4Addr, strength: Strength) -> Result<()> {
    let rules = |batch: &mut Batch, chain: &Chain<'_>, place: Place| {
        flush(batch, chain);
        match (place, strength) {
            (Place::Input, Strength::NewConnections) => new_connections(batch, chain, address),
            (_, Strength::NewConnections) => {}
            (Place::Input, Strength::All) => {
                criu_passes(batch, chain);
                ipv4(batch, chain, Payload::Network(header_field(16)), address);
            }
            (Place::Output, Strength::All) => {
                criu_passes(batch, chain);
                ipv4(batch, chain, Payload::Network(header_field(12)), address);
            }
            // target protocol address
            (Place::ArpInput, Strength::All) => drop_if(batch, chain, header_field(24), address),
            // sender protocol address
            (Place::ArpOutput, Strength::All) => drop_if(batch, chain, header_field(14), address),
        }
    };
    change(migration, rules).map_err(Error::io("setting the fence around", address))
}

/// Opens the fence of `migration` at once; [`lift`] then takes its time to remove it. Succeeds when there is none.
///
/// # Errors
/// nftables refused.
pub fn open(migration: &str) -> Result<()> {
    let name = table_name(migration)?;
    let mut batch = Batch::new();
    for (family, places) in TABLES {
        let table = Table::new(&name, family);
        for place in places {
            flush(&mut batch, &Chain::new(place.chain(), &table));
        }
    }
    match send(&batch.finalize()) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(Error::io("opening the fence of", migration)),
    }
}

/// Lifts the fence of `migration`. Succeeds when there is none.
///
/// # Errors
/// nftables refused.
pub fn lift(migration: &str) -> Result<()> {
    let name = table_name(migration)?;
    let mut batch = Batch::new();
    for (family, _) in TABLES {
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
    let request = nftnl::table::get_tables_nlmsg(0);
    // the message's own length stands in its header; the buffer behind it is only room
    let length = u32::from_ne_bytes([request[0], request[1], request[2], request[3]]) as usize;
    let listed = with_socket(|socket| {
        socket.send(&request[..length])?;
        let mut names = std::collections::HashSet::<CString>::new();
        let mut buffer = vec![0; nftnl::nft_nlmsg_maxsize() as usize];
        loop {
            for message in socket.recv(&mut buffer)? {
                let portid = socket.portid();
                let run = mnl::cb_run2(message?, 0, portid, nftnl::table::get_tables_cb, &mut names)?;
                if matches!(run, mnl::CbResult::Stop) {
                    return Ok(names);
                }
            }
        }
    });
    let names = listed.map_err(Error::io("listing", "nftables tables"))?;
    Ok(names.iter().filter_map(|n| Some(n.to_str().ok()?.strip_prefix(PREFIX)?.to_owned())).collect())
}

fn table_name(migration: &str) -> Result<CString> {
    CString::new(format!("{PREFIX}{migration}"))
        .map_err(|_| Error::other("a migration's id holds a zero byte"))
}

/// Four bytes of the network header (nftnl's "bits" are handed to the kernel as they are, and it counts bytes).
const fn header_field(offset: u32) -> NetworkHeaderField {
    NetworkHeaderField::Raw { offset_bits: offset, length_bits: 4 }
}

/// Where a chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Input,
    Output,
    ArpInput,
    ArpOutput,
}

const TABLES: [(ProtoFamily, [Place; 2]); 2] = [
    (ProtoFamily::Inet, [Place::Input, Place::Output]),
    (ProtoFamily::Arp, [Place::ArpInput, Place::ArpOutput]),
];

impl Place {
    fn chain(self) -> &'static CStr {
        match self {
            Self::Input | Self::ArpInput => c"input",
            Self::Output | Self::ArpOutput => c"output",
        }
    }

    /// NF_ARP_IN is 0 and NF_ARP_OUT is 1 (linux/netfilter_arp.h): the numbers that `Hook` names for IP.
    fn hook(self) -> Hook {
        match self {
            Self::Input => Hook::In,
            Self::Output => Hook::Out,
            Self::ArpInput => Hook::PreRouting,
            Self::ArpOutput => Hook::In,
        }
    }
}

/// One transaction over all chains, which are made where they are missing.
fn change(migration: &str, rules: impl Fn(&mut Batch, &Chain<'_>, Place)) -> io::Result<()> {
    let name = table_name(migration).map_err(io::Error::other)?;
    let mut batch = Batch::new();
    for (family, places) in TABLES {
        let table = Table::new(&name, family);
        batch.add(&table, MsgType::Add);
        for place in places {
            let mut chain = Chain::new(place.chain(), &table);
            chain.set_type(ChainType::Filter);
            chain.set_hook(place.hook(), PRIORITY);
            chain.set_policy(Policy::Accept);
            batch.add(&chain, MsgType::Add);
            rules(&mut batch, &chain, place);
        }
    }
    send(&batch.finalize())
}

/// Deletes every rule of `chain`: that is what a deletion without a handle means.
fn flush(batch: &mut Batch, chain: &Chain<'_>) {
    batch.add(&Rule::new(chain), MsgType::Del);
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

fn descriptor(socket: &mnl::Socket) -> BorrowedFd<'_> {
    // SAFETY: the socket owns the descriptor and outlives the borrow
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// libmnl opens its sockets without FD_CLOEXEC; a CRIU started meanwhile must not inherit them.
///
/// # Errors
/// Of fcntl.
pub fn close_on_exec(socket: &mnl::Socket) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(descriptor(socket), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Closes on a thread of its own. The kernel makes the last close of an nftables or packet socket wait until no
/// processor uses what was changed by it any more: 10 ms in which a service need not stand still, the change itself
/// being in force already.
pub fn close_aside(socket: OwnedFd) {
    // without a thread it is closed here
    let _ = std::thread::Builder::new().name("close".into()).spawn(move || drop(socket));
}

/// A netlink socket to nftables that stays open: closing one keeps every other transaction of the network namespace
/// waiting until no processor uses what was changed before (`nft_rcv_nl_event` in net/netfilter/nf_tables_api.c holds the
/// commit mutex meanwhile), 5 to 20 ms between the two rules that a service waits for.
struct Lasting(mnl::Socket);

// SAFETY: libmnl's socket is a descriptor and an address in memory of its own, used by one thread at a time
unsafe impl Send for Lasting {}

/// By network namespace (device and inode).
static SOCKETS: Mutex<BTreeMap<(u64, u64), Lasting>> = Mutex::new(BTreeMap::new());

/// Lets `with` use the socket of this thread's network namespace. After an error it is not used again: answers may be
/// left in it.
fn with_socket<T>(with: impl FnOnce(&mnl::Socket) -> io::Result<T>) -> io::Result<T> {
    let here = std::fs::metadata("/proc/thread-self/ns/net")?;
    let mut sockets = SOCKETS.lock().unwrap_or_else(PoisonError::into_inner);
    let socket = match sockets.entry((here.dev(), here.ino())) {
        Entry::Occupied(open) => open.into_mut(),
        Entry::Vacant(place) => {
            let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
            close_on_exec(&socket)?;
            place.insert(Lasting(socket))
        }
    };
    let done = with(&socket.0);
    if done.is_err()
        && let Some(Lasting(socket)) = sockets.remove(&(here.dev(), here.ino()))
        && let Ok(last) = descriptor(&socket).try_clone_to_owned()
    {
        drop(socket);
        close_aside(last);
    }
    done
}

fn send(batch: &FinalizedBatch) -> io::Result<()> {
    with_socket(|socket| {
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
    })
}

#[cfg(test)]
mod tests {
    use std::{
        net::UdpSocket,
        time::{Duration, Instant},
    };

    use super::*;

    /// On a thread with a network of its own, `lo` up. Needs root.
    fn in_own_network(test: impl FnOnce() + Send + 'static) {
        let run = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            test();
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn a_fence_keeps_out_until_it_is_opened() {
        in_own_network(|| {
            let v = Ipv4Addr::new(127, 0, 0, 9);
            let receiver = UdpSocket::bind((v, 0)).unwrap();
            receiver.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            let passes = || {
                sender.send_to(b"x", receiver.local_addr().unwrap()).unwrap();
                receiver.recv(&mut [0; 8]).is_ok()
            };
            let timed = |name: &str, work: &dyn Fn()| {
                let started = Instant::now();
                work();
                println!("{name}: {:?}", started.elapsed());
            };
            timed("prepare", &|| prepare("m1").unwrap());
            assert_eq!(list().unwrap(), BTreeSet::from(["m1".to_owned()]));
            assert!(passes());
            timed("set for new connections", &|| set("m1", v, Strength::NewConnections).unwrap());
            assert!(passes());
            timed("set", &|| set("m1", v, Strength::All).unwrap());
            assert!(!passes());
            timed("set again", &|| set("m1", v, Strength::All).unwrap());
            assert!(!passes());
            nix::sys::socket::setsockopt(&sender, nix::sys::socket::sockopt::Mark, &CRIU_MARK).unwrap();
            assert!(passes());
            nix::sys::socket::setsockopt(&sender, nix::sys::socket::sockopt::Mark, &0).unwrap();
            timed("open", &|| open("m1").unwrap());
            assert!(passes());
            timed("lift", &|| lift("m1").unwrap());
            assert!(list().unwrap().is_empty());
            open("m1").unwrap();
            lift("m1").unwrap();
            set("m1", v, Strength::All).unwrap();
            assert!(!passes());
            lift("m1").unwrap();
            assert!(passes());
        });
    }

    #[test]
    fn a_fence_for_new_connections_lets_established_ones_live() {
        use std::io::{Read as _, Write as _};
        in_own_network(|| {
            let v = Ipv4Addr::new(127, 0, 0, 9);
            let listener = std::net::TcpListener::bind((v, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let mut client = std::net::TcpStream::connect(address).unwrap();
            let (mut served, _) = listener.accept().unwrap();
            set("m1", v, Strength::NewConnections).unwrap();
            client.write_all(b"x").unwrap();
            served.read_exact(&mut [0]).unwrap();
            assert!(std::net::TcpStream::connect_timeout(&address, Duration::from_millis(50)).is_err());
            set("m1", v, Strength::All).unwrap();
            client.write_all(b"y").unwrap();
            served.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            assert!(served.read_exact(&mut [0]).is_err());
            assert_eq!(crate::sockets::destroy(v).unwrap(), 2);
            lift("m1").unwrap();
        });
    }
}
