//! Images on the wire: streamed file by file over the migration network, each with its CRC-32.
//!
//! The receiver trusts nothing: a file's name is a plain name, no file comes twice, the bytes are counted against the
//! room that was promised, every CRC is compared, and what was received is compared with what the sender says it sent
//! before anything is restored from it. CRIU's logs and statistics stay where they are.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
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

/// Reads the images in `dir` and offers them as messages. The second value comes when all was read.
///
/// The receiver going away ends the reading.
pub fn send(
    migration: String,
    dir: PathBuf,
) -> (mpsc::Receiver<ImageChunk>, tokio::task::JoinHandle<Result<Volume>>) {
    let (tx, rx) = mpsc::channel(DEPTH);
    let reading = tokio::task::spawn_blocking(move || {
        let mut names: Vec<String> = fs::read_dir(&dir)
            .map_err(Error::io("listing", dir.display()))?
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| is_image(n))
            .collect();
        names.sort();
        let mut volume = Volume::default();
        let mut migration = Some(migration);
        for name in names {
            let path = dir.join(&name);
            let failed = |e| Error::io("reading", path.display())(e);
            let mut file = fs::File::open(&path).map_err(failed)?;
            let mut crc = crc32fast::Hasher::new();
            let mut name = Some(name);
            loop {
                let mut data = Vec::with_capacity(CHUNK);
                std::io::Read::by_ref(&mut file).take(CHUNK as u64).read_to_end(&mut data).map_err(failed)?;
                let ended = data.len() < CHUNK;
                crc.update(&data);
                volume.bytes += data.len() as u64;
                let chunk = ImageChunk {
                    migration: migration.take().unwrap_or_default(),
                    file: name.take().unwrap_or_default(),
                    data,
                    last: ended.then(|| crc.clone().finalize()),
                };
                if tx.blocking_send(chunk).is_err() {
                    return Err(Error::other("the destination stopped receiving"));
                }
                if ended {
                    break;
                }
            }
            volume.files += 1;
        }
        Ok(volume)
    });
    (rx, reading)
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
            data: data.into(),
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
        damaged.data[0] ^= 1;
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

    #[tokio::test]
    async fn what_is_sent_is_what_is_received() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sizes = [("pages-1.img", 3 * CHUNK), ("core-1.img", CHUNK - 1), ("empty.img", 0)];
        for (name, size) in sizes {
            let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            fs::write(from.path().join(name), bytes).unwrap();
        }
        for other in [crate::criu::DUMP_LOG, "stats-dump.img", "stats-dump"] {
            fs::write(from.path().join(other), "not sent").unwrap();
        }
        let (mut rx, reading) = send("m1".into(), from.path().into());
        let mut receiver = Receiver::new(to.path(), u64::MAX);
        let mut first = true;
        while let Some(chunk) = rx.recv().await {
            assert_eq!(chunk.migration == "m1", std::mem::take(&mut first));
            receiver.take(&chunk).unwrap();
        }
        let sent = reading.await.unwrap().unwrap();
        assert_eq!(receiver.finish().unwrap(), sent);
        assert_eq!(sent.files, 3);
        for (name, size) in sizes {
            let received = fs::read(to.path().join(name)).unwrap();
            assert_eq!(received.len(), size);
            assert_eq!(received, fs::read(from.path().join(name)).unwrap());
        }
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 3);
    }
}
