//! BPF arrays in this process's address space (`BPF_F_MMAPABLE`).
//!
//! A store through the mapping is one machine instruction that a program sees whole or not at all; the `bpf` system call
//! promises neither (it copies with memcpy). So the words that change while frames flow are only ever written here.

use std::{io, num::NonZeroUsize, os::fd::AsFd, ptr::NonNull, sync::atomic::AtomicU64};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An array map, as 64-bit words.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<AtomicU64>,
    bytes: NonZeroUsize,
    entries: usize,
    words_per_entry: usize,
}

// SAFETY: the memory is shared with the kernel until Drop and only reached as AtomicU64.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the array `map` of `entries` values of `words_per_entry` 64-bit words each.
    ///
    /// # Errors
    /// The kernel's: EPERM/EINVAL if the map was not created with `BPF_F_MMAPABLE`, EINVAL if it is smaller than this.
    pub fn new(map: impl AsFd, entries: usize, words_per_entry: usize) -> io::Result<Self> {
        let bytes = entries * words_per_entry * size_of::<u64>();
        let bytes = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, map, 0)
        }?;
        Ok(Self { start: start.cast(), bytes, entries, words_per_entry })
    }

    /// Word `word` of entry `entry`.
    ///
    /// # Panics
    /// If there is no such word: indices come from the daemon's own tables, which know the size.
    pub fn word(&self, entry: usize, word: usize) -> &AtomicU64 {
        assert!(entry < self.entries && word < self.words_per_entry, "no word {word} in entry {entry}");
        // SAFETY: inside the mapping (checked above), which lives as long as self; the kernel's arrays are 8-aligned.
        unsafe { self.start.add(entry * self.words_per_entry + word).as_ref() }
    }

    /// Entries.
    pub const fn len(&self) -> usize {
        self.entries
    }

    /// Never.
    pub const fn is_empty(&self) -> bool {
        false
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; no reference into it outlives self.
        let _ = unsafe { munmap(self.start.cast(), self.bytes.get()) };
    }
}
