//! The gateway's interfaces: how they are configured, and their places in the programs' arrays.
//!
//! ```text
//!   access = "eth1"                 one interface to the users
//!   wan = ["eth2", "eth4"]          several to the provider; a network says which is its (`wan`), a user which is its
//!                                   access interface (`interface`)
//!   mode = "generic"                all of them by the kernel's generic XDP; without it the drivers' own is demanded
//! ```
//!
//! The mode is the gateway's, not an interface's: a program in native mode hands frames to the driver of the interface they
//! leave by, and a driver without XDP takes none, silently.
//!
//! A port is a number: WAN interfaces have the even ones, access interfaces the odd ones, each by its place in the
//! configuration, so that another interface at the end renumbers none.

use std::fmt;

use aya::programs::XdpMode;
use gateway_ebpf::PORTS;
use serde::{
    Deserialize,
    de::{self, Deserializer, SeqAccess, Visitor},
};

use crate::{
    desired::{ACCESS_PORT, PORT_STEP, WAN_PORT},
    link::{Link, LinkError},
    plane::Side,
};

/// Most interfaces of one side.
pub const INTERFACES_MAX: usize = PORTS as usize / PORT_STEP as usize;

/// Interfaces of one side, by name: one, or a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interfaces(pub Vec<String>);

impl<'de> Deserialize<'de> for Interfaces {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrSeveral;
        impl<'de> Visitor<'de> for OneOrSeveral {
            type Value = Interfaces;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an interface, or a list of names")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Interfaces, E> {
                Ok(Interfaces(vec![name.into()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<Interfaces, A::Error> {
                let mut all = Vec::new();
                while let Some(name) = names.next_element()? {
                    all.push(name);
                }
                Ok(Interfaces(all))
            }
        }
        deserializer.deserialize_any(OneOrSeveral)
    }
}

/// How programs are attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In the driver: the only one without a copy of each frame.
    #[default]
    Native,
    /// In the kernel's receive path, for drivers without XDP.
    Generic,
}

impl Mode {
    /// As it is configured and shown.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    /// As the kernel is asked for it.
    pub const fn xdp(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// One of the gateway's interfaces.
#[derive(Debug)]
pub struct Port {
    /// Towards whom.
    pub side: Side,
    /// Index into `PORT` and `DEVICE`.
    pub number: u16,
    /// The interface.
    pub link: Link,
}

/// Which side a port is on, and its place there.
pub const fn place(number: u16) -> (Side, u16) {
    let side = if number % PORT_STEP == WAN_PORT { Side::Wan } else { Side::Access };
    (side, number / PORT_STEP)
}

/// The interfaces of a gateway; first those to the provider, so that they are attached before a user's frame can come.
#[derive(Debug)]
pub struct Ports(Vec<Port>);

impl Ports {
    /// Finds the interfaces.
    ///
    /// # Errors
    /// [`LinkError`] of the first that is not there, or not Ethernet.
    pub fn open(access: &Interfaces, wan: &Interfaces) -> Result<Self, LinkError> {
        let side = |side: Side, first: u16, names: &Interfaces| {
            let numbered: Vec<_> = (first..).step_by(PORT_STEP.into()).zip(names.0.clone()).collect();
            numbered
                .into_iter()
                .map(move |(number, name)| Ok(Port { side, number, link: Link::open(&name)? }))
        };
        let wan = side(Side::Wan, WAN_PORT, wan);
        wan.chain(side(Side::Access, ACCESS_PORT, access)).collect::<Result<_, _>>().map(Self)
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Port> {
        self.0.iter()
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, Port> {
        self.0.iter_mut()
    }

    /// Those of one side, in the order of their ports.
    pub fn of(&self, side: Side) -> impl Iterator<Item = &Port> {
        self.0.iter().filter(move |port| port.side == side)
    }

    /// The one with this number.
    pub fn get(&self, number: u16) -> Option<&Port> {
        self.0.iter().find(|port| port.number == number)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    #[test]
    fn one_interface_or_several_are_read() {
        #[derive(Debug, Deserialize)]
        struct File {
            wan: Interfaces,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.wan.0);
        assert_eq!(read("wan = \"a\"").unwrap(), ["a"]);
        assert_eq!(read("wan = [\"a\", \"b\"]").unwrap(), ["a", "b"]);
        for bad in ["wan = 1", "wan = [1]", "wan = { name = \"a\" }"] {
            assert!(read(bad).unwrap_err().to_string().contains("expected"), "{bad}");
        }
    }

    #[test]
    fn a_port_tells_its_side_and_place() {
        for (number, told) in [(0, (Side::Wan, 0)), (1, (Side::Access, 0)), (4, (Side::Wan, 2))] {
            assert_eq!(place(number), told);
        }
        assert_eq!(usize::from(PORT_STEP) * INTERFACES_MAX, PORTS as usize);
    }
}
