//! The load: a service of chosen size with many connections, to measure migrations with.
//!
//! Its memory is stamped page by page; with every tick it reads some pages, and writes some where that is wanted. A page that
//! is not what it was ends it at once. A connection says first what it is: `S` gets a numbered record every millisecond, `E`
//! gets back what it sends.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use super::Account;

/// Between two records of a stream, at least.
const TICK: Duration = Duration::from_millis(1);
/// Words of a page.
const PAGE: usize = 512;
/// Pages that are read with every tick.
const READ: usize = 64;
/// Between two rounds of the crowd.
const ROUND: Duration = Duration::from_millis(500);
/// Bytes of a record: its number, the number inverted, zeros.
const RECORD: usize = 64;

const LISTENER: u64 = 0;

/// Memory that knows what stands in it.
struct Stamped {
    words: Vec<u64>,
    next_read: usize,
    next_write: usize,
}

fn stamp(page: usize, generation: u64) -> u64 {
    (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation
}

impl Stamped {
    fn new(bytes: usize) -> Self {
        let pages = bytes / (PAGE * 8);
        let mut words = vec![0x5a5a_5a5a_5a5a_5a5a; pages * PAGE];
        for (i, page) in words.chunks_exact_mut(PAGE).enumerate() {
            page[1] = 0;
            page[0] = stamp(i, 0);
            page[PAGE - 1] = stamp(i, 0);
        }
        Self { words, next_read: 0, next_write: 0 }
    }

    /// Reads some pages and writes `dirty` others.
    fn tick(&mut self, dirty: usize) -> anyhow::Result<()> {
        let pages = self.words.len() / PAGE;
        if pages == 0 {
            return Ok(());
        }
        for _ in 0..READ {
            let page = &self.words[self.next_read * PAGE..][..PAGE];
            let expected = stamp(self.next_read, page[1]);
            ensure!(
                page[0] == expected && page[PAGE - 1] == expected,
                "page {} holds {:x} and {:x}, expected {expected:x}",
                self.next_read,
                page[0],
                page[PAGE - 1]
            );
            self.next_read = (self.next_read + 1) % pages;
        }
        for _ in 0..dirty {
            let page = &mut self.words[self.next_write * PAGE..][..PAGE];
            page[1] += 1;
            let stamp = stamp(self.next_write, page[1]);
            (page[0], page[PAGE - 1]) = (stamp, stamp);
            self.next_write = (self.next_write + 1) % pages;
        }
        Ok(())
    }
}

struct Peer {
    stream: TcpStream,
    /// Absent until it has said what it is.
    kind: Option<u8>,
    next: u64,
    out: Vec<u8>,
}

impl Peer {
    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Takes what has come.
    fn readable(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    let mut bytes = &buffer[..n];
                    if self.kind.is_none() {
                        self.kind = Some(bytes[0]);
                        bytes = &bytes[1..];
                    }
                    if self.kind == Some(b'E') {
                        self.out.extend_from_slice(bytes);
                        self.flush()?;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn tick(&mut self) -> io::Result<()> {
        self.flush()?;
        if self.kind == Some(b'S') && self.out.is_empty() {
            self.out.extend_from_slice(&self.next.to_be_bytes());
            self.out.extend_from_slice(&(!self.next).to_be_bytes());
            self.out.resize(RECORD, 0);
            self.next += 1;
            self.flush()?;
        }
        Ok(())
    }
}

/// Serves, holding `memory` bytes and writing `dirty` pages with every tick.
///
/// # Errors
/// The address cannot be listened on, or memory is not what it was.
pub fn serve(listen: SocketAddr, memory: usize, dirty: usize) -> anyhow::Result<()> {
    let mut memory = Stamped::new(memory);
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    listener.set_nonblocking(true).context("listener")?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll")?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).context("epoll")?;
    let mut peers: HashMap<u64, Peer> = HashMap::new();
    // those that get something with every tick: looking at all would cost more than the work
    let mut streams: Vec<u64> = Vec::new();
    // no timerfd: moved by hand it may come back disarmed (CRIU issue 3162), and there would be nothing to compare with
    let mut ticked = Instant::now();
    loop {
        let mut events = [EpollEvent::empty(); 256];
        let n = match epoll.wait(&mut events, EpollTimeout::from(1_u8)) {
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("epoll"),
        };
        if ticked.elapsed() >= TICK {
            ticked = Instant::now();
            memory.tick(dirty)?;
            streams.retain(|token| peers.get_mut(token).is_some_and(|p| p.tick().is_ok()));
        }
        for event in &events[..n] {
            match event.data() {
                LISTENER => {
                    while let Ok((stream, _)) = listener.accept() {
                        stream.set_nonblocking(true).context("peer")?;
                        stream.set_nodelay(true).context("peer")?;
                        let token = u64::try_from(stream.as_raw_fd())? + 2;
                        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token)).context("epoll")?;
                        peers.insert(token, Peer { stream, kind: None, next: 0, out: Vec::new() });
                    }
                }
                token => {
                    let Some(peer) = peers.get_mut(&token) else { continue };
                    let new = peer.kind.is_none();
                    if peer.readable().is_err() {
                        peers.remove(&token);
                    } else if new && peer.kind == Some(b'S') {
                        streams.push(token);
                    }
                }
            }
        }
    }
}

fn connect(server: SocketAddr, kind: u8) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))
        .with_context(|| format!("connecting to {server}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

/// Keeps `connections` open, one of them a stream whose gaps are measured, and checks every byte on each. A connection that
/// ends is counted and not opened again.
///
/// # Errors
/// The server cannot be reached.
pub fn watch(server: SocketAddr, connections: usize, account: &Account) -> anyhow::Result<()> {
    ensure!(connections > 0, "there has to be a connection");
    let crowd = (1..connections).map(|_| connect(server, b'E')).collect::<anyhow::Result<Vec<_>>>()?;
    let mut stream = connect(server, b'S')?;
    let others = account.clone();
    std::thread::spawn(move || {
        if let Err(e) = echo(crowd, &others) {
            others.fail(&e);
        }
    });
    let mut record = [0; RECORD];
    for expected in 0_u64.. {
        if let Err(e) = stream.read_exact(&mut record) {
            account.update(|r| r.reconnects += 1);
            return Err(e).context("the stream ended");
        }
        account.arrived(Instant::now());
        let word = |at: usize| u64::from_be_bytes(record[at..at + 8].try_into().unwrap_or_default());
        let (number, check) = (word(0), word(8));
        if number != expected || check != !expected {
            account.update(|r| r.bytes_lost += RECORD as u64);
            anyhow::bail!("record {expected} came as {number:x} {check:x}");
        }
        account.update(|r| {
            r.bytes += RECORD as u64;
            r.operations += 1;
        });
    }
    Ok(())
}

/// Round after round, a number on every connection and back.
fn echo(mut crowd: Vec<TcpStream>, account: &Account) -> anyhow::Result<()> {
    for round in 0_u64.. {
        for stream in &mut crowd {
            if let Err(e) = stream.write_all(&round.to_be_bytes()) {
                account.update(|r| r.reconnects += 1);
                return Err(e).context("a connection of the crowd ended");
            }
        }
        for stream in &mut crowd {
            let mut back = [0; 8];
            if let Err(e) = stream.read_exact(&mut back) {
                account.update(|r| r.reconnects += 1);
                return Err(e).context("a connection of the crowd ended");
            }
            ensure!(back == round.to_be_bytes(), "round {round} came back as {back:?}");
        }
        account.update(|r| r.operations += crowd.len() as u64);
        if crowd.is_empty() {
            return Ok(());
        }
        std::thread::sleep(ROUND); // the crowd's pace
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_what_it_was_is_noticed() {
        let mut memory = Stamped::new(16 * PAGE * 8);
        for _ in 0..3 {
            memory.tick(5).unwrap();
        }
        memory.words[7 * PAGE..8 * PAGE].fill(0);
        assert!(memory.tick(0).unwrap_err().to_string().contains("page 7"));
    }
}
