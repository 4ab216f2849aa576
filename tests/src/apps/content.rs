//! A large file that anybody can make again: its bytes are a function of their place.

use std::{
    fs,
    io::{BufWriter, Write as _},
    path::Path,
};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

/// xorshift64 (Marsaglia, "Xorshift RNGs", 2003): cheap and never zero for a seed that is not.
#[must_use]
pub const fn next(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// Writes `bytes` bytes to `path`; returns their SHA-256 in hexadecimal.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, bytes: usize) -> anyhow::Result<String> {
    let file = fs::File::create(path).with_context(|| path.display().to_string())?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut digest = Sha256::new();
    let mut x = 0x2545_f491_4f6c_dd1d;
    let mut block = [0_u8; 4096];
    let mut left = bytes;
    while left > 0 {
        for word in block.chunks_mut(8) {
            x = next(x);
            word.copy_from_slice(&x.to_le_bytes()[..word.len()]);
        }
        let n = left.min(block.len());
        digest.update(&block[..n]);
        file.write_all(&block[..n]).with_context(|| path.display().to_string())?;
        left -= n;
    }
    file.flush().with_context(|| path.display().to_string())?;
    Ok(hex(&digest.finalize()))
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
