//! The pulse: what a user's frames go through in a migration, counted one by one.
//!
//! The client sends numbered UDP datagrams at a steady rate, and pings on one TCP connection at another, whether or not
//! anything comes back: so it keeps sending while the service stands still. The server counts the datagrams by their
//! numbers and answers each ping; asked on the TCP connection, it tells its account, which moves with its memory.
//!
//! ```text
//! UDP  client -> server   number, u64 BE
//! TCP  client -> server   b'p' number, u64 BE, zeros | b'?' datagrams sent, u64 BE, zeros
//!      server -> client   the same               | b'?' distinct, duplicated, reordered, next: 4 x u64 BE
//! ```

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use super::{Account, micros};

const PING: u8 = b'p';
const ASK: u8 = b'?';
/// Octets of a message of the client.
const MESSAGE: usize = 64;
/// What the kernel may keep of datagrams that the server has not read: more than what is held comes at once.
const RECEIVE_BUFFER: usize = 64 << 20;
/// How often the client sends a burst of datagrams.
const TICK: Duration = Duration::from_millis(1);
/// The largest burst, in ticks' worth: a client that was kept from running does not make up for it all at once, which
/// queues on the way would not hold.
const BURST: u32 = 2;
/// For how long the last datagrams are waited for.
const STRAGGLERS: Duration = Duration::from_secs(3);
/// Payload of a datagram.
const NUMBER: usize = size_of::<u64>();

/// An account of numbered things.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Numbers {
    seen: Vec<u64>,
    /// Different numbers that came.
    pub distinct: u64,
    /// Numbers that had come before.
    pub duplicated: u64,
    /// Numbers that came after a greater one, for the first time.
    pub reordered: u64,
    /// The greatest number that came, and one.
    pub next: u64,
}

impl Numbers {
    /// Number `n` came.
    pub fn came(&mut self, n: u64) {
        let Ok(word) = usize::try_from(n / 64) else { return };
        if self.seen.len() <= word {
            self.seen.resize((word + 1).next_power_of_two(), 0);
        }
        let bit = 1 << (n % 64);
        if self.seen[word] & bit != 0 {
            self.duplicated += 1;
            return;
        }
        self.seen[word] |= bit;
        self.distinct += 1;
        if n < self.next {
            self.reordered += 1;
        }
        self.next = self.next.max(n + 1);
    }

    /// Of `sent` numbers, those that did not come.
    #[must_use]
    pub fn lost(&self, sent: u64) -> u64 {
        sent.saturating_sub(self.distinct)
    }
}

/// What the server's threads share.
#[derive(Default)]
struct Counted {
    numbers: Mutex<Numbers>,
    came: Condvar,
}

impl Counted {
    fn came(&self, n: u64) {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).came(n);
        self.came.notify_all();
    }

    /// The account, once `sent` numbers have come, or when it cannot be hoped for any more.
    fn of(&self, sent: u64) -> Numbers {
        let numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let short = |n: &mut Numbers| n.distinct < sent;
        let waited = self.came.wait_timeout_while(numbers, STRAGGLERS, short);
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

/// Serves on UDP and TCP `listen` until it is ended.
///
/// # Errors
/// If the address cannot be listened on.
pub fn serve(listen: SocketAddr) -> anyhow::Result<()> {
    let udp = UdpSocket::bind(listen).with_context(|| format!("listening on UDP {listen}"))?;
    setsockopt(&udp, sockopt::RcvBufForce, &RECEIVE_BUFFER).context("the receive buffer")?;
    let tcp = TcpListener::bind(listen).with_context(|| format!("listening on TCP {listen}"))?;
    let counted = Arc::new(Counted::default());
    let shared = Arc::clone(&counted);
    thread::spawn(move || {
        let mut datagram = [0; NUMBER + 1];
        loop {
            match udp.recv(&mut datagram) {
                Ok(NUMBER) => {
                    if let Some(n) = datagram.first_chunk() {
                        shared.came(u64::from_be_bytes(*n));
                    }
                }
                Ok(length) => eprintln!("a datagram of {length} octets"),
                Err(e) => eprintln!("UDP: {e}"),
            }
        }
    });
    loop {
        let (stream, client) = tcp.accept().context("accepting")?;
        let counted = Arc::clone(&counted);
        thread::spawn(move || {
            if let Err(e) = answer(stream, &counted) {
                eprintln!("{client}: {e}");
            }
        });
    }
}

fn answer(mut stream: TcpStream, counted: &Counted) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    loop {
        stream.read_exact(&mut message)?;
        if message[0] == ASK {
            let mut told = vec![ASK];
            let n = counted.of(number(&message));
            for value in [n.distinct, n.duplicated, n.reordered, n.next] {
                told.extend(value.to_be_bytes());
            }
            stream.write_all(&told)?;
        } else {
            stream.write_all(&message)?;
        }
    }
}

/// How fast the client sends.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Datagrams a second.
    pub datagrams: u32,
    /// Between two pings.
    pub ping: Duration,
}

/// Sends to `server` until `stop`, then waits for the rest and compares accounts.
///
/// # Errors
/// If the server cannot be reached, or the connection ends.
pub fn send(
    server: SocketAddr,
    rate: Rate,
    stop: &'static AtomicBool,
    account: &Account,
) -> anyhow::Result<()> {
    let mut tcp = TcpStream::connect_timeout(&server, Duration::from_secs(5))
        .with_context(|| format!("connecting to {server}"))?;
    tcp.set_nodelay(true).context("TCP_NODELAY")?;
    let udp = UdpSocket::bind(("0.0.0.0", 0)).context("UDP socket")?;
    udp.connect(server).context("UDP socket")?;

    let sent = Arc::new(AtomicU64::new(0));
    let reader = {
        let (stream, account) = (tcp.try_clone().context("connection")?, account.clone());
        let pinged = Arc::new(Mutex::new(Vec::<Instant>::new()));
        let times = Arc::clone(&pinged);
        let reading = thread::spawn(move || read(stream, &times, &account));
        let mut pinger = tcp.try_clone().context("connection")?;
        let every = rate.ping;
        let pinging = thread::spawn(move || {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                pinged.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                pinger.write_all(&message(PING, number))?;
                number += 1;
                thread::sleep(every); // a rate
            }
            Ok::<_, std::io::Error>(())
        });
        (reading, pinging)
    };
    let counted = Arc::clone(&sent);
    let sending = thread::spawn(move || datagrams(&udp, rate.datagrams, stop, &counted));

    let (reading, pinging) = reader;
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    pinging.join().map_err(|_| anyhow::anyhow!("the pinger panicked"))?.context("pinging")?;
    let sent = sent.load(Ordering::Relaxed);
    tcp.write_all(&message(ASK, sent)).context("asking for the account")?;
    let theirs = reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;

    let (lost, size) = (theirs.lost(sent), NUMBER as u64);
    account.update(|r| {
        r.bytes += theirs.distinct * size;
        r.bytes_lost = lost * size;
        r.bytes_duplicated = theirs.duplicated * size;
        r.reordered = theirs.reordered;
        r.operations = sent;
        r.finished = true;
    });
    ensure!(lost == 0 && theirs.duplicated == 0 && theirs.reordered == 0, "of {sent} datagrams {theirs:?}");
    Ok(())
}

fn message(kind: u8, number: u64) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    message[0] = kind;
    message[1..=NUMBER].copy_from_slice(&number.to_be_bytes());
    message
}

/// The number in a message.
fn number(message: &[u8; MESSAGE]) -> u64 {
    message[1..].first_chunk().map_or(0, |n| u64::from_be_bytes(*n))
}

/// Sends numbered datagrams at a rate, as far as it is let run.
fn datagrams(udp: &UdpSocket, rate: u32, stop: &AtomicBool, sent: &AtomicU64) -> anyhow::Result<()> {
    let most = TICK * BURST;
    let mut last = Instant::now();
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let due = (last.elapsed().min(most).as_secs_f64() * f64::from(rate)).round();
        last = Instant::now();
        for _ in 0..due as u32 {
            udp.send(&number.to_be_bytes()).with_context(|| format!("datagram {number}"))?;
            number += 1;
        }
        sent.store(number, Ordering::Relaxed);
        thread::sleep(TICK); // a rate
    }
    Ok(())
}

/// Takes the answers until the account comes.
fn read(mut stream: TcpStream, pinged: &Mutex<Vec<Instant>>, account: &Account) -> anyhow::Result<Numbers> {
    let mut expected = 0_usize;
    loop {
        let mut message = [0; MESSAGE];
        stream.read_exact(&mut message[..1]).context("the connection ended")?;
        if message[0] == ASK {
            let mut told = [0; 4 * NUMBER];
            stream.read_exact(&mut told).context("the account")?;
            let values: Vec<u64> =
                told.chunks_exact(NUMBER).filter_map(|c| c.try_into().ok()).map(u64::from_be_bytes).collect();
            let &[distinct, duplicated, reordered, next] = values.as_slice() else {
                anyhow::bail!("an account of {} values", values.len())
            };
            return Ok(Numbers { seen: Vec::new(), distinct, duplicated, reordered, next });
        }
        stream.read_exact(&mut message[1..]).context("the connection ended")?;
        let now = Instant::now();
        account.arrived(now);
        ensure!(
            message[0] == PING && number(&message) == expected as u64,
            "ping {expected} was answered {message:?}"
        );
        let pinged = pinged.lock().unwrap_or_else(PoisonError::into_inner)[expected];
        expected += 1;
        let round_trip = micros(now.saturating_duration_since(pinged));
        let repeated = retransmissions(&stream)?;
        account.update(|r| {
            r.bytes += MESSAGE as u64;
            r.round_trip_us = if r.round_trip_us == 0 { round_trip } else { r.round_trip_us.min(round_trip) };
            r.retransmissions = repeated;
        });
    }
}

/// Segments of this connection that TCP has sent again (`tcpi_total_retrans`, include/uapi/linux/tcp.h).
fn retransmissions(stream: &TcpStream) -> anyhow::Result<u64> {
    // SAFETY: all-zero is a tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>())?;
    // SAFETY: `info` is writable for `length` octets, and the descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(result).context("TCP_INFO")?;
    Ok(info.tcpi_total_retrans.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(came: &[u64]) -> Numbers {
        let mut numbers = Numbers::default();
        came.iter().for_each(|n| numbers.came(*n));
        numbers
    }

    #[test]
    fn what_is_lost_repeated_or_out_of_order_is_told_apart() {
        let figures = |came: &[u64], sent| {
            let n = account(came);
            (n.lost(sent), n.duplicated, n.reordered)
        };
        assert_eq!(figures(&[0, 1, 2, 3], 4), (0, 0, 0));
        assert_eq!(figures(&[0, 1, 3], 4), (1, 0, 0));
        assert_eq!(figures(&[0, 1, 2], 4), (1, 0, 0), "the last one too");
        assert_eq!(figures(&[0, 2, 1, 3], 4), (0, 0, 1));
        assert_eq!(figures(&[0, 1, 1, 2, 3], 4), (0, 1, 0));
        assert_eq!(figures(&[200, 0, 200], 201), (199, 1, 1));
    }

    #[test]
    fn a_pulse_on_loopback_arrives_whole_and_a_harmed_one_is_seen() {
        static STOP: AtomicBool = AtomicBool::new(false);
        let server = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        thread::spawn(move || serve(server).unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(server).is_err() {
            assert!(Instant::now() < deadline, "no server");
            thread::yield_now();
        }
        // a number that the client will send again
        let intruder = UdpSocket::bind("127.0.0.1:0").unwrap();
        intruder.send_to(&5_u64.to_be_bytes(), server).unwrap();
        let account = Account::default();
        let client = account.clone();
        let rate = Rate { datagrams: 20_000, ping: Duration::from_millis(1) };
        let sending = thread::spawn(move || send(server, rate, &STOP, &client));
        account.more(1000);
        STOP.store(true, Ordering::Relaxed);
        let e = sending.join().unwrap().unwrap_err().to_string();
        let report = account.take(Instant::now());
        assert!(report.finished && report.operations > 0, "{report:?}");
        assert_eq!((report.bytes_lost, report.bytes_duplicated, report.reordered), (0, 8, 5), "{e}");
        assert!(report.round_trip_us > 0 && report.retransmissions == 0, "{report:?}");
    }
}
