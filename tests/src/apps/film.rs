//! The film's stream: numbered, checksummed records of one size.
//!
//! ```text
//! 0        4                12       16                     1020     1024
//! | "FILM" | number, u64 BE | viewer | frame, 1004 bytes ... | CRC-32 |
//! ```
//! The frame is a function of the number, so that the viewer knows every byte beforehand.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use super::Account;

/// Bytes of a record.
pub const RECORD: usize = 1024;
const MAGIC: &[u8; 4] = b"FILM";
const CRC_AT: usize = RECORD - 4;

/// The record `number` of the stream of `viewer`.
#[must_use]
pub fn record(number: u64, viewer: u32) -> [u8; RECORD] {
    let mut r = [0; RECORD];
    r[..4].copy_from_slice(MAGIC);
    r[4..12].copy_from_slice(&number.to_be_bytes());
    r[12..16].copy_from_slice(&viewer.to_be_bytes());
    let mut x = number ^ 0x9e37_79b9_7f4a_7c15;
    for chunk in r[16..CRC_AT].chunks_mut(8) {
        x = super::content::next(x);
        chunk.copy_from_slice(&x.to_le_bytes()[..chunk.len()]);
    }
    let crc = crc32fast::hash(&r[..CRC_AT]);
    r[CRC_AT..].copy_from_slice(&crc.to_be_bytes());
    r
}

/// Number and viewer of a record that is whole.
#[must_use]
pub fn parse(r: &[u8; RECORD]) -> Option<(u64, u32)> {
    let number = u64::from_be_bytes(r[4..12].try_into().ok()?);
    let viewer = u32::from_be_bytes(r[12..16].try_into().ok()?);
    (*r == record(number, viewer)).then_some((number, viewer))
}

struct Viewer {
    stream: TcpStream,
    id: u32,
    next: u64,
    /// The record under way and how much of it is written.
    current: [u8; RECORD],
    written: usize,
}

impl Viewer {
    /// Writes what is left of the record under way.
    fn flush(&mut self) -> io::Result<()> {
        while self.written < RECORD {
            match self.stream.write(&self.current[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The next record, unless the viewer has not taken the one before.
    fn tick(&mut self) -> io::Result<()> {
        self.flush()?;
        if self.written == RECORD {
            self.current = record(self.next, self.id);
            self.next += 1;
            self.written = 0;
            self.flush()?;
        }
        Ok(())
    }
}

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
/// From here on the timers kept besides.
const TIMERS: u64 = 1 << 32;
/// How often each of them runs out.
const BESIDES: Duration = Duration::from_millis(200);

/// Serves the film: one connection a viewer, a record to each every `interval`. `ballast` bytes of memory are held and
/// written, to be as large as a real server; `timers` more timers run and are read, at all phases of [`BESIDES`].
///
/// # Errors
/// If the address cannot be listened on. A viewer's errors end that viewer's stream only.
pub fn serve(listen: SocketAddr, interval: Duration, ballast: usize, timers: u32) -> anyhow::Result<()> {
    let mut memory = vec![0_u8; ballast];
    for (i, page) in memory.chunks_mut(4096).enumerate() {
        page.fill(u8::try_from(i % 251).unwrap_or(0)); // touched, so that it is resident
    }
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    listener.set_nonblocking(true).context("listener")?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).context("timer")?;
    let every = Expiration::Interval(TimeSpec::from_duration(interval));
    timer.set(every, TimerSetTimeFlags::empty()).context("timer")?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll")?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).context("epoll")?;
    epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TIMER)).context("epoll")?;

    let besides = (0..timers).map(|i| besides(i, timers)).collect::<anyhow::Result<Vec<_>>>()?;
    for (timer, token) in besides.iter().zip(TIMERS..) {
        epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token)).context("epoll")?;
    }

    let mut viewers: HashMap<u64, Viewer> = HashMap::new();
    let mut ids = 0;
    loop {
        let mut events = [EpollEvent::empty(); 64];
        let n = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("epoll"),
        };
        for event in &events[..n] {
            match event.data() {
                LISTENER => match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(true).context("viewer")?;
                        stream.set_nodelay(true).context("viewer")?;
                        let token = u64::try_from(stream.as_raw_fd()).unwrap_or(u64::MAX) + 2;
                        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
                        epoll.add(&stream, EpollEvent::new(interest, token)).context("epoll")?;
                        ids += 1;
                        let viewer =
                            Viewer { stream, id: ids, next: 0, current: [0; RECORD], written: RECORD };
                        viewers.insert(token, viewer);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => eprintln!("accept: {e}"),
                },
                TIMER => {
                    // late ticks are not made up for: the film goes on at its rate
                    timer.wait().context("timer")?;
                    viewers.retain(|_, v| v.tick().is_ok());
                }
                token if token >= TIMERS => {
                    let timer = usize::try_from(token - TIMERS).ok().and_then(|i| besides.get(i));
                    timer.context("an event of no timer")?.wait().context("timer")?;
                }
                // viewers send nothing: readable means gone
                token => {
                    viewers.remove(&token);
                }
            }
        }
        std::hint::black_box(&memory);
    }
}

/// Timer `i` of `all`.
fn besides(i: u32, all: u32) -> anyhow::Result<TimerFd> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).context("timer")?;
    let first = BESIDES + BESIDES * i / all.max(1);
    let every = Expiration::IntervalDelayed(TimeSpec::from_duration(first), TimeSpec::from_duration(BESIDES));
    timer.set(every, TimerSetTimeFlags::empty()).context("timer")?;
    Ok(timer)
}

/// Watches the film at `server` on one connection and keeps `account`. A connection that ends is opened again, as a viewer
/// would, and counted.
///
/// # Errors
/// If the server cannot be reached at first or again.
pub fn watch(server: SocketAddr, account: &Account) -> anyhow::Result<()> {
    let connect = || TcpStream::connect_timeout(&server, Duration::from_secs(5));
    let mut stream = connect().with_context(|| format!("connecting to {server}"))?;
    loop {
        let Err(why) = watch_one(&mut stream, account);
        account.fail(&anyhow::Error::new(why).context("the stream ended"));
        account.update(|r| r.reconnects += 1);
        stream = connect().with_context(|| format!("connecting to {server} again"))?;
    }
}

fn watch_one(stream: &mut TcpStream, account: &Account) -> io::Result<std::convert::Infallible> {
    let mut expected = 0;
    let mut viewer = None;
    let mut r = [0; RECORD];
    let mut filled = 0;
    loop {
        let n = stream.read(&mut r[filled..])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        account.arrived(Instant::now());
        filled += n;
        if filled < RECORD {
            continue;
        }
        filled = 0;
        let size = RECORD as u64;
        match parse(&r) {
            Some((number, of)) if *viewer.get_or_insert(of) == of => account.update(|a| {
                if number >= expected {
                    a.bytes_lost += (number - expected) * size;
                    a.bytes += size;
                    a.operations += 1;
                } else {
                    a.bytes_duplicated += size;
                }
                expected = expected.max(number + 1);
            }),
            _ => {
                account.fail(&anyhow::anyhow!("record {expected} came damaged"));
                account.update(|a| a.bytes_lost += size);
                expected += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damaged_byte_is_seen() {
        let good = record(7, 1);
        assert_eq!(parse(&good), Some((7, 1)));
        for at in 0..RECORD {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(parse(&bad), None, "byte {at}");
        }
    }

    /// A server that sends these records and closes.
    fn seen(records: &[u64]) -> super::super::Report {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let bytes: Vec<u8> = records.iter().flat_map(|n| record(*n, 1)).collect();
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(&bytes).unwrap());
        let account = Account::default();
        let mut stream = TcpStream::connect(server).unwrap();
        let Err(_) = watch_one(&mut stream, &account);
        account.take(Instant::now())
    }

    #[test]
    fn losses_and_repetitions_are_counted() {
        let size = RECORD as u64;
        assert!(seen(&[0, 1, 2]).unharmed());
        assert_eq!(seen(&[0, 1, 4]).bytes_lost, 2 * size);
        assert_eq!(seen(&[0, 1, 1, 2]).bytes_duplicated, size);
    }
}
