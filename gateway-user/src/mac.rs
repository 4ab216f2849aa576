//! MAC addresses as people and the wire write them.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use gateway_ebpf::frame;

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// A text that is no MAC address of one interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits.
    #[error("`{0}` is no MAC address: write six pairs of hexadecimal digits, such as 02:00:00:00:01:01")]
    Syntax(String),
    /// Group bit set, or all zero.
    #[error("MAC address {0} cannot belong to one interface: it is {1}")]
    NotUnicast(Mac, &'static str),
}

impl Mac {
    /// As the maps hold it.
    pub const fn word(self) -> u64 {
        frame::mac_word(self.0)
    }

    /// From a map's word.
    pub const fn from_word(word: u64) -> Self {
        Self(frame::mac_octets(word))
    }

    /// This address, if an interface can have it.
    ///
    /// # Errors
    /// [`MacError::NotUnicast`] for group addresses and zero.
    pub fn unicast(self) -> Result<Self, MacError> {
        if self.0[0] & 1 != 0 {
            return Err(MacError::NotUnicast(self, "a group address"));
        }
        if self.0 == [0; 6] {
            return Err(MacError::NotUnicast(self, "zero"));
        }
        Ok(self)
    }
}

impl Mac {
    /// The IPv6 link-local address that a host makes of it (RFC 4291, appendix A).
    pub const fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from_octets([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(s: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax(s.chars().take(64).collect());
        let mut octets = [0; 6];
        let mut parts = s.split([':', '-']);
        for octet in &mut octets {
            let part = parts.next().ok_or_else(syntax)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| syntax())?;
        }
        if parts.next().is_some() {
            return Err(syntax());
        }
        Self(octets).unicast()
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(s: String) -> Result<Self, MacError> {
        s.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_read_and_written() {
        let mac: Mac = "02:00:00:00:Ab:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:00:00:ab:01");
        assert_eq!("02-00-00-00-ab-01".parse(), Ok(mac));
        assert_eq!(Mac::from_word(mac.word()), mac);
        assert_eq!(mac.link_local().to_string(), "fe80::ff:fe00:ab01");
    }

    #[test]
    fn what_no_interface_can_have_is_refused() {
        for text in [
            "",
            "02:00:00:00:01",
            "02:00:00:00:01:01:01",
            "02:00:00:00:01:1",
            "0g:00:00:00:01:01",
            "+2:00:00:00:01:01",
        ] {
            assert!(matches!(text.parse::<Mac>(), Err(MacError::Syntax(_))), "{text}");
        }
        assert!(matches!("ff:ff:ff:ff:ff:ff".parse::<Mac>(), Err(MacError::NotUnicast(..))));
        assert!(matches!("00:00:00:00:00:00".parse::<Mac>(), Err(MacError::NotUnicast(..))));
    }
}
