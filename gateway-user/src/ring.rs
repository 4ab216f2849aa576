//! The reading end of a BPF ring buffer. (aya's gives a record back to the program as soon as it has been looked at; here
//! that is a step of its own, and whether there is more can be asked without taking it.)
//!
//! Memory: one page with the reader's position, which is ours to write; one with the writer's, then the data twice in a row,
//! so that a record that goes over the end can be read in one piece (linux/kernel/bpf/ringbuf.c). The reader's position is
//! the map's: who opens a pinned ring goes on where the last reader was.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use nix::{
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
    unistd::{SysconfVar, sysconf},
};

/// linux/bpf.h: the writer is not through with it.
const BUSY: u32 = 1 << 31;
/// linux/bpf.h: the writer gave it up.
const DISCARDED: u32 = 1 << 30;
/// Octets of a record's head in the ring.
const HEAD: u64 = 8;

/// What is at a position of the ring.
#[derive(Debug, PartialEq, Eq)]
pub enum At<'a> {
    /// Nothing yet, or a record that is not whole yet.
    Nothing,
    /// A record, and the position after it.
    Record(&'a [u8], u64),
    /// A record that is none, and the position after it.
    Gap(u64),
}

/// The reading end.
#[derive(Debug)]
pub struct Ring {
    /// The page that is ours to write.
    ours: Pages,
    theirs: Pages,
    page: usize,
    mask: u64,
}

#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    bytes: NonZeroUsize,
}

// SAFETY: memory shared with the kernel until Drop; positions and heads are reached as atomics, and data only between the
// two positions, where the kernel does not write.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn map(fd: impl AsFd, bytes: usize, offset: usize, write: bool) -> io::Result<Self> {
        let bytes = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection =
            if write { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        let offset = offset.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, fd, offset) }?;
        Ok(Self { start: start.cast(), bytes })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; no reference into it outlives self.
        let _ = unsafe { munmap(self.start.cast(), self.bytes.get()) };
    }
}

impl Ring {
    /// Maps the ring `map`, whose data has `size` octets.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(map: impl AsFd, size: u32) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096) as usize;
        Ok(Self {
            ours: Pages::map(&map, page, 0, true)?,
            theirs: Pages::map(&map, page + 2 * size as usize, page, false)?,
            page,
            mask: u64::from(size) - 1,
        })
    }

    fn reader(&self) -> &AtomicU64 {
        // SAFETY: the first word of the page, which lives as long as self.
        unsafe { self.ours.start.cast().as_ref() }
    }

    fn writer(&self) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { self.theirs.start.cast().as_ref() }
    }

    /// Where reading goes on.
    pub fn position(&self) -> u64 {
        // ours alone to write
        self.reader().load(Ordering::Relaxed)
    }

    /// Whether everything has been taken.
    pub fn is_empty(&self) -> bool {
        self.writer().load(Ordering::SeqCst) == self.position()
    }

    /// What is at `position`, which is the reader's or one after it that this function gave.
    pub fn at(&self, position: u64) -> At<'_> {
        if position >= self.writer().load(Ordering::Acquire) {
            return At::Nothing;
        }
        let offset = self.page + (position & self.mask) as usize;
        // SAFETY: inside the data; records are 8-aligned.
        let head = unsafe { self.theirs.start.add(offset).cast::<AtomicU32>().as_ref() };
        let head = head.load(Ordering::Acquire);
        if head & BUSY != 0 {
            return At::Nothing;
        }
        let len = head & !(BUSY | DISCARDED);
        let next = position + (HEAD + u64::from(len)).next_multiple_of(8);
        if head & DISCARDED != 0 {
            return At::Gap(next);
        }
        // SAFETY: a whole record, which the kernel leaves alone until the reader's position is beyond it, and that is set
        // through `&mut self`; the second mapping of the data follows the first.
        At::Record(
            unsafe {
                slice::from_raw_parts(self.theirs.start.add(offset + HEAD as usize).as_ptr(), len as usize)
            },
            next,
        )
    }

    /// Gives everything before `position` back to the writer.
    pub fn take_until(&mut self, position: u64) {
        self.reader().store(position, Ordering::SeqCst);
    }
}
