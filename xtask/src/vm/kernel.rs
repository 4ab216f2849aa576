//! The kernels of the matrix: which there are, and which of Debian's packages is one.

use std::{cmp::Ordering, fmt, str::FromStr};

/// A series of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Series {
    major: u32,
    minor: u32,
}

/// What operators run: Debian 12, Debian 13, the long-term kernel after it, and the newest.
pub const ALL: [Series; 4] = [
    Series { major: 6, minor: 1 },
    Series { major: 6, minor: 12 },
    Series { major: 6, minor: 18 },
    Series { major: 7, minor: 3 },
];

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        ALL.into_iter().find(|s| s.to_string() == text).ok_or_else(|| {
            format!(
                "no kernel `{text}` in the matrix; there are {} and all",
                ALL.map(|s| s.to_string()).join(", ")
            )
        })
    }
}

/// A version in numbers: every run of digits counts.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn newer(a: &str, b: &str) -> Ordering {
    numbers(a).cmp(&numbers(b))
}

impl Series {
    /// The newest of Debian's cloud kernels of this series among `packages`.
    pub fn newest<'a>(&self, packages: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
        let prefix = format!("linux-image-{self}.");
        let ours = packages.into_iter().filter(|p| p.starts_with(&prefix) && p.ends_with("-cloud-amd64"));
        ours.max_by(|a, b| newer(a, b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_found_by_number() {
        let packages = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.1.0-51-cloud-amd64-unsigned",
            "linux-image-6.1.0-52-amd64",
            "linux-image-6.12.9+deb13-cloud-amd64",
            "linux-image-6.12.107+deb12-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-7.3-cloud-amd64",
        ];
        let newest = |s: &str| Series::from_str(s).unwrap().newest(packages);
        assert_eq!(newest("6.1"), Some("linux-image-6.1.0-50-cloud-amd64"));
        assert_eq!(newest("6.12"), Some("linux-image-6.12.107+deb13-cloud-amd64"));
        assert_eq!(newest("7.3"), None);
        assert!(Series::from_str("5.4").unwrap_err().contains("6.1, 6.12, 6.18, 7.3 and all"));
    }
}
