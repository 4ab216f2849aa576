//! How long frames went on under the old network, switch by switch: a histogram with buckets that double. Pure.
//!
//! Bucket 0 is for windows of 0 (no frame went out after the store), bucket k for 2^(k-1)..2^k ns.

use handover_api::v1;

/// One for each bit a window can have, and one for 0.
const BUCKETS: usize = u64::BITS as usize + 1;

/// Switches by their window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    switches: [u64; BUCKETS],
    max_ns: u64,
}

impl Default for Windows {
    fn default() -> Self {
        Self { switches: [0; BUCKETS], max_ns: 0 }
    }
}

impl Windows {
    /// A switch was made.
    pub fn add(&mut self, window_ns: u64) {
        self.switches[(u64::BITS - window_ns.leading_zeros()) as usize] += 1;
        self.max_ns = self.max_ns.max(window_ns);
    }

    /// As it is shown.
    pub fn status(&self) -> v1::WindowHistogram {
        let up_to_ns = |bucket: usize| match bucket {
            0 => 0,
            bucket => u64::MAX >> (BUCKETS - 1 - bucket),
        };
        let buckets = self.switches.iter().enumerate().filter(|(_, switches)| **switches > 0);
        v1::WindowHistogram {
            buckets: buckets
                .map(|(bucket, &switches)| v1::WindowBucket { up_to_ns: up_to_ns(bucket), switches })
                .collect(),
            max_ns: self.max_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_is_in_the_bucket_that_says_so() {
        let mut windows = Windows::default();
        assert_eq!(windows.status(), v1::WindowHistogram::default());
        for window in [0, 0, 1, 2, 3, 4, 1000, 1023, 1024, u64::MAX] {
            windows.add(window);
        }
        let shown = windows.status();
        let buckets: Vec<_> = shown.buckets.iter().map(|b| (b.up_to_ns, b.switches)).collect();
        assert_eq!(buckets, [(0, 2), (1, 1), (3, 2), (7, 1), (1023, 2), (2047, 1), (u64::MAX, 1)]);
        assert_eq!(shown.max_ns, u64::MAX);
    }
}
