//! Images on the wire: streamed file by file over the migration network while they are written, each with its CRC-32.
//!
//! The receiver trusts nothing: a file's name is a plain name, no file comes twice, the bytes are counted against the
//! room that was promised, every CRC is compared, and what was received is compared with what the sender says it sent
//! before anything is restored from it. CRIU's logs and statistics stay where they are.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::CString,
    fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use handover_api::v1::ImageChunk;
use tokio::sync::mpsc;

use crate::error::{Error, Result};

/// Bytes per message; below the 4 MiB that gRPC allows by default, large enough to make the rest cheap.
const CHUNK: usize = 512 * 1024;

/// Messages under way between disk and wire.
const DEPTH: usize = 8;

/// Most image files of one migration (CRIU writes about 20 and a few per process).
const FILE_LIMIT: u32 = 65_536;

/// How much was sent or received.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    /// Bytes in all files.
    pub bytes: u64,
    /// Files.
    pub files: u32,
}

/// Whether `name` can be an image file's.
fn check_name(name: &str) -> Result<()> {
    let ok = (1..=128).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        && !name.starts_with('.');
    if ok { Ok(()) } else { Err(Error::other(format!("`{}` is no image file's name", name.escape_debug()))) }
}

/// Whether a file in the image directory belongs to the images.
fn is_image(name: &str) -> bool {
    name.ends_with(".img") && !name.starts_with("stats-")
}

/// Streams the images in `dir` while CRIU writes them, until [`dumped`] says that all are there. The second value comes when
/// all was read. The first message names the migration and no file: it opens the stream before there is anything to send.
///
/// CRIU appends to image files and never changes what it has written. A file of pages is followed while it grows, any
/// other is sent when it has been closed; at the end every file's length is compared with what was sent of it.
///
/// The receiver going away, or the directory, ends the reading.
///
/// # Errors
/// The directory cannot be watched.
pub fn follow(
    migration: String,
    dir: &Path,
) -> Result<(mpsc::Receiver<ImageChunk>, tokio::task::JoinHandle<Result<Volume>>)> {
    let (tx, rx) = mpsc::channel(DEPTH);
    // watched from before the first image is made
    let watch = Watch::new(dir)?;
    let mut follower = Follower {
        dir: dir.into(),
        tx,
        migration: Some(migration),
        open: VecDeque::new(),
        sent: BTreeMap::new(),
        volume: Volume::default(),
    };
    let reading = tokio::task::spawn_blocking(move || {
        follower.begin()?;
        loop {
            let happened = watch.next()?;
            let mut done = false;
            for event in happened {
                match event {
                    Happened::Created(name) if name == DUMPED => done = true,
                    Happened::Created(name) if is_image(&name) && name.starts_with(PAGES) => {
                        follower.grow(name)?
                    }
                    Happened::Closed(name) if is_image(&name) => follower.closed(name)?,
                    Happened::Gone => {
                        return Err(Error::other("the image directory was removed while it was read"));
                    }
                    _ => {}
                }
            }
            follower.catch_up()?;
            if done {
                return follower.rest();
            }
        }
    });
    Ok((rx, reading))
}

/// Tells [`follow`] that CRIU has written the last of the images in `dir`.
///
/// # Errors
/// Of the file system.
pub fn dumped(dir: &Path) -> Result<()> {
    let mark = dir.join(DUMPED);
    fs::File::create(&mark).map(drop).map_err(Error::io("creating", mark.display()))
}

/// Begin of the names of files that hold memory.
const PAGES: &str = "pages-";

/// The file that [`dumped`] makes.
const DUMPED: &str = "dumped";

/// An image that is being sent.
struct Following {
    name: String,
    file: fs::File,
    crc: crc32fast::Hasher,
    length: u64,
    begun: bool,
    closed: bool,
}

/// Reads images and offers them as messages, one file after the other.
struct Follower {
    dir: PathBuf,
    tx: mpsc::Sender<ImageChunk>,
    migration: Option<String>,
    /// The first is being sent, the others wait for it.
    open: VecDeque<Following>,
    /// Lengths of those that were sent to their end.
    sent: BTreeMap<String, u64>,
    volume: Volume,
}

impl Follower {
    fn offer(&mut self, file: String, data: Vec<u8>, last: Option<u32>) -> Result<()> {
        self.volume.bytes += data.len() as u64;
        let chunk = ImageChunk {
            migration: self.migration.take().unwrap_or_default(),
            file,
            data: data.into(),
            last,
        };
        self.tx.blocking_send(chunk).map_err(|_| Error::other("the destination stopped receiving"))
    }

    fn begin(&mut self) -> Result<()> {
        self.offer(String::new(), Vec::new(), None)
    }

    fn grow(&mut self, name: String) -> Result<()> {
        if self.sent.contains_key(&name) || self.open.iter().any(|o| o.name == name) {
            return Ok(());
        }
        let path = self.dir.join(&name);
        let file = fs::File::open(&path).map_err(Error::io("reading", path.display()))?;
        let crc = crc32fast::Hasher::new();
        self.open.push_back(Following { name, file, crc, length: 0, begun: false, closed: false });
        Ok(())
    }

    fn closed(&mut self, name: String) -> Result<()> {
        self.grow(name.clone())?;
        if let Some(following) = self.open.iter_mut().find(|o| o.name == name) {
            following.closed = true;
        }
        Ok(())
    }

    /// Sends all there is to send now.
    fn catch_up(&mut self) -> Result<()> {
        while let Some(mut following) = self.open.pop_front() {
            loop {
                let mut data = Vec::with_capacity(CHUNK);
                (&mut following.file)
                    .take(CHUNK as u64)
                    .read_to_end(&mut data)
                    .map_err(Error::io("reading", self.dir.join(&following.name).display()))?;
                let at_end = data.len() < CHUNK;
                following.crc.update(&data);
                following.length += data.len() as u64;
                let last = (at_end && following.closed).then(|| following.crc.clone().finalize());
                if !data.is_empty() || last.is_some() {
                    let name = if following.begun { String::new() } else { following.name.clone() };
                    following.begun = true;
                    self.offer(name, data, last)?;
                }
                if at_end {
                    break;
                }
            }
            if !following.closed {
                self.open.push_front(following);
                break;
            }
            self.volume.files += 1;
            self.sent.insert(following.name, following.length);
        }
        Ok(())
    }

    /// After the last was written: what has not been sent yet, and a look at every length.
    fn rest(mut self) -> Result<Volume> {
        let mut names: Vec<String> = fs::read_dir(&self.dir)
            .map_err(Error::io("listing", self.dir.display()))?
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| is_image(n))
            .collect();
        names.sort();
        for name in &names {
            self.closed(name.clone())?;
        }
        self.catch_up()?;
        for name in names {
            let path = self.dir.join(&name);
            let length = fs::metadata(&path).map_err(Error::io("looking at", path.display()))?.len();
            let sent = self.sent.get(&name).copied().unwrap_or(0);
            if sent != length {
                return Err(Error::other(format!("{name} has {length} bytes, {sent} were sent of it")));
            }
        }
        Ok(self.volume)
    }
}

/// What happens in a directory.
#[derive(Debug, PartialEq, Eq)]
enum Happened {
    Created(String),
    /// By one who wrote to it.
    Closed(String),
    Written,
    /// The directory itself was removed.
    Gone,
}

/// Watches a directory (inotify).
struct Watch(fs::File);

impl Watch {
    fn new(dir: &Path) -> Result<Self> {
        let failed = |e| Error::io("watching", dir.display())(e);
        // SAFETY: no pointers
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and is nobody else's
        let file = unsafe { fs::File::from_raw_fd(fd) };
        let path = CString::new(dir.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
        let mask = libc::IN_CREATE
            | libc::IN_MODIFY
            | libc::IN_CLOSE_WRITE
            | libc::IN_DELETE_SELF
            | libc::IN_ONLYDIR;
        // SAFETY: the path ends with a zero byte and is valid for the call
        if unsafe { libc::inotify_add_watch(file.as_raw_fd(), path.as_ptr(), mask) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(Self(file))
    }

    /// Waits for something to happen.
    fn next(&self) -> Result<Vec<Happened>> {
        let mut buffer = [0; 16 * 1024];
        let length = loop {
            match (&self.0).read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(Error::io("watching", "images"))?,
            }
        };
        Ok(happenings(&buffer[..length]))
    }
}

/// Of a buffer of `struct inotify_event`: wd, mask, cookie, len (four bytes each), then a name padded with zeros.
fn happenings(mut bytes: &[u8]) -> Vec<Happened> {
    const HEADER: usize = 16;
    let mut all = Vec::new();
    while let Some((header, rest)) = bytes.split_at_checked(HEADER) {
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (mask, length) = (word(4), word(12) as usize);
        let Some((name, rest)) = rest.split_at_checked(length) else { break };
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        if mask & (libc::IN_DELETE_SELF | libc::IN_IGNORED) != 0 {
            all.push(Happened::Gone);
        } else if mask & libc::IN_Q_OVERFLOW != 0 || mask & libc::IN_MODIFY != 0 {
            // what an overflow hides is found at the end
            all.push(Happened::Written);
        } else if mask & libc::IN_CREATE != 0 {
            all.push(Happened::Created(name));
        } else if mask & libc::IN_CLOSE_WRITE != 0 {
            all.push(Happened::Closed(name));
        }
        bytes = rest;
    }
    all
}

/// Writes received chunks below one directory.
pub struct Receiver {
    dir: PathBuf,
    room: u64,
    seen: BTreeSet<String>,
    open: Option<(String, fs::File, crc32fast::Hasher)>,
    volume: Volume,
}

impl Receiver {
    /// Into `dir`, at most `room` bytes.
    pub fn new(dir: &Path, room: u64) -> Self {
        Self { dir: dir.into(), room, seen: BTreeSet::new(), open: None, volume: Volume::default() }
    }

    /// Takes the next chunk.
    ///
    /// # Errors
    /// It breaks a rule of the file's header, or cannot be written.
    pub fn take(&mut self, chunk: &ImageChunk) -> Result<()> {
        if !chunk.file.is_empty() {
            self.begin(&chunk.file)?;
        }
        let Some((name, file, crc)) = &mut self.open else {
            return Err(Error::other("image data came without a file's name"));
        };
        self.volume.bytes += chunk.data.len() as u64;
        if self.volume.bytes > self.room {
            return Err(Error::other(format!(
                "the images are larger than the {} bytes of room there are",
                self.room
            )));
        }
        crc.update(&chunk.data);
        file.write_all(&chunk.data).map_err(Error::io("writing", self.dir.join(&name).display()))?;
        if let Some(sent) = chunk.last {
            let received = crc.clone().finalize();
            if received != sent {
                return Err(Error::other(format!("{name} was damaged: CRC {received:08x}, sent {sent:08x}")));
            }
            self.open = None;
            self.volume.files += 1;
        }
        Ok(())
    }

    fn begin(&mut self, name: &str) -> Result<()> {
        check_name(name)?;
        if !is_image(name) {
            return Err(Error::other(format!("{name} is no image")));
        }
        if let Some((before, ..)) = &self.open {
            return Err(Error::other(format!("{name} begins before {before} has ended")));
        }
        if self.volume.files >= FILE_LIMIT {
            return Err(Error::other(format!("more than {FILE_LIMIT} image files")));
        }
        if !self.seen.insert(name.into()) {
            return Err(Error::other(format!("{name} comes twice")));
        }
        let path = self.dir.join(name);
        let file = fs::File::create(&path).map_err(Error::io("creating", path.display()))?;
        self.open = Some((name.into(), file, crc32fast::Hasher::new()));
        Ok(())
    }

    /// After the last chunk.
    ///
    /// # Errors
    /// A file is not whole.
    pub fn finish(self) -> Result<Volume> {
        match self.open {
            Some((name, ..)) => Err(Error::other(format!("the stream ended in the middle of {name}"))),
            None => Ok(self.volume),
        }
    }
}

/// Bytes free in the file system of `dir`, and whether that is a tmpfs.
///
/// # Errors
/// Of the file system.
pub fn room(dir: &Path) -> Result<(u64, bool)> {
    let stat =
        nix::sys::statfs::statfs(dir).map_err(Error::errno("looking at the room in", dir.display()))?;
    let block = u64::try_from(stat.block_size()).unwrap_or(0);
    Ok((stat.blocks_available() * block, stat.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(file: &str, data: &[u8], last: bool) -> ImageChunk {
        let crc = crc32fast::hash(data);
        ImageChunk {
            migration: String::new(),
            file: file.into(),
            data: data.to_vec().into(),
            last: last.then_some(crc),
        }
    }

    fn receive(room: u64, chunks: &[ImageChunk]) -> Result<Volume> {
        let dir = tempfile::tempdir().unwrap();
        let mut receiver = Receiver::new(dir.path(), room);
        for c in chunks {
            receiver.take(c)?;
        }
        receiver.finish()
    }

    #[test]
    fn whole_files_are_counted() {
        let volume = receive(10, &[chunk("a.img", b"12345", true), chunk("b.img", b"", true)]).unwrap();
        assert_eq!(volume, Volume { bytes: 5, files: 2 });
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let mut damaged = chunk("a.img", b"12345", true);
        damaged.data = b"12344".to_vec().into();
        for (chunks, told) in [
            (vec![chunk("../a.img", b"", true)], "no image file's name"),
            (vec![chunk(".a.img", b"", true)], "no image file's name"),
            (vec![chunk("a/b.img", b"", true)], "no image file's name"),
            (vec![chunk("dump.log", b"", true)], "is no image"),
            (vec![chunk("", b"1", true)], "without a file's name"),
            (vec![chunk("a.img", b"1", false), chunk("b.img", b"1", true)], "before a.img has ended"),
            (vec![chunk("a.img", b"1", true), chunk("a.img", b"1", true)], "comes twice"),
            (vec![chunk("a.img", b"12345678901", true)], "larger than the 10 bytes"),
            (vec![chunk("a.img", b"1", false)], "in the middle of a.img"),
            (vec![damaged], "was damaged"),
        ] {
            let err = receive(10, &chunks).unwrap_err().to_string();
            assert!(err.contains(told), "{told:?} not in {err:?}");
        }
    }

    /// Takes what comes until nothing does.
    async fn take_all(
        mut rx: mpsc::Receiver<ImageChunk>,
        reading: tokio::task::JoinHandle<Result<Volume>>,
        to: &Path,
    ) -> Volume {
        let mut receiver = Receiver::new(to, u64::MAX);
        let opening = rx.recv().await.unwrap();
        assert_eq!((opening.migration.as_str(), opening.file.as_str(), opening.data.len()), ("m1", "", 0));
        while let Some(chunk) = rx.recv().await {
            assert_eq!(chunk.migration, "");
            receiver.take(&chunk).unwrap();
        }
        let sent = reading.await.unwrap().unwrap();
        assert_eq!(receiver.finish().unwrap(), sent);
        sent
    }

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|i| (i % 251) as u8).collect()
    }

    #[tokio::test]
    async fn what_is_sent_is_what_is_received() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sizes =
            [("pages-1.img", 3 * CHUNK), ("pages-2.img", 1), ("core-1.img", CHUNK - 1), ("empty.img", 0)];
        let (rx, reading) = follow("m1".into(), from.path()).unwrap();
        for (name, size) in sizes {
            fs::write(from.path().join(name), content(size)).unwrap();
        }
        for other in [crate::criu::DUMP_LOG, "stats-dump.img", "stats-dump"] {
            fs::write(from.path().join(other), "not sent").unwrap();
        }
        dumped(from.path()).unwrap();
        assert_eq!(take_all(rx, reading, to.path()).await.files, 4);
        for (name, size) in sizes {
            assert!(fs::read(to.path().join(name)).unwrap() == content(size), "{name}");
        }
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 4);
    }

    #[tokio::test]
    async fn pages_are_sent_while_they_are_written() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut rx, reading) = follow("m1".into(), from.path()).unwrap();
        let mut receiver = Receiver::new(to.path(), u64::MAX);
        rx.recv().await.unwrap();
        let (mut pages, mut small) = (
            fs::File::create(from.path().join("pages-1.img")).unwrap(),
            fs::File::create(from.path().join("files.img")).unwrap(),
        );
        small.write_all(b"small").unwrap();
        for part in [b"first".as_slice(), b"second"] {
            pages.write_all(part).unwrap();
            // comes before the file is closed, so before the dump is over
            let chunk = rx.recv().await.unwrap();
            assert_eq!((chunk.data.as_ref(), chunk.last), (part, None));
            receiver.take(&chunk).unwrap();
        }
        drop(pages);
        // still open when the dump is over
        dumped(from.path()).unwrap();
        while let Some(chunk) = rx.recv().await {
            receiver.take(&chunk).unwrap();
        }
        assert_eq!(reading.await.unwrap().unwrap(), Volume { bytes: 16, files: 2 });
        assert_eq!(receiver.finish().unwrap(), Volume { bytes: 16, files: 2 });
        assert_eq!(fs::read(to.path().join("pages-1.img")).unwrap(), b"firstsecond");
        assert_eq!(fs::read(to.path().join("files.img")).unwrap(), b"small");
    }

    #[tokio::test]
    async fn a_directory_that_goes_away_ends_the_sending() {
        let from = tempfile::tempdir().unwrap();
        let (_rx, reading) = follow("m1".into(), from.path()).unwrap();
        from.close().unwrap();
        let err = reading.await.unwrap().unwrap_err().to_string();
        assert!(err.contains("was removed"), "{err}");
    }

    #[tokio::test]
    async fn a_file_written_to_after_it_was_closed_is_an_error() {
        let from = tempfile::tempdir().unwrap();
        let (mut rx, reading) = follow("m1".into(), from.path()).unwrap();
        let path = from.path().join("core-1.img");
        fs::write(&path, "a").unwrap();
        while rx.recv().await.unwrap().last.is_none() {}
        fs::File::options().append(true).open(&path).unwrap().write_all(b"b").unwrap();
        dumped(from.path()).unwrap();
        assert!(rx.recv().await.is_none());
        assert_eq!(
            reading.await.unwrap().unwrap_err().to_string(),
            "core-1.img has 2 bytes, 1 were sent of it"
        );
    }
}
