//! The programs' rules: `access` and `wan` are the way of a frame, `plain` is the short way of most, the others are what they are
//! made of.

pub mod access;
pub mod debug;
pub mod identity;
pub mod keep;
pub mod maps;
pub mod neighbour;
pub mod plain;
pub mod tags;
pub mod wan;
pub mod watch;
