//! Connection control: the daemon between the users and the wide-area provider.
//!
//! ```text
//!  controller --gRPC/mTLS--> service --> table (pure: who is where, what is staged)
//!                               |           | Write ...
//!                               |           v
//!                               |        plane (XDP programs, maps, the one store) ---- access / wan interfaces
//!                               +------> introduce (ARP, ND as the users, learns the routers' MACs) --- wan
//! ```
//!
//! - [`config`]: the configuration file. [`desired`]: what the controller pushes, validated.
//! - [`table`]: the state machine of users, networks and switches; no I/O, no clock.
//! - [`plane`]: loads and attaches the programs, carries out the table's writes, makes the store and measures its window.
//!   [`mapping`]: BPF arrays in the daemon's address space. [`link`]: what is asked of a network interface;
//!   [`veth`]: and of a veth's other end.
//! - [`pins`]: the data path as files, where it outlives the daemon. [`state`]: who is where, on disk, so that the next daemon
//!   takes it over.
//! - [`introduce`]: asks "who has r" as users, in ARP and IPv6, and hears the routers. [`neighbour`]: IPv6 neighbour discovery.
//! - [`groups`]: broadcast and multicast, a copy to each user of the network.
//! - [`hold`], [`ring`], [`release`]: frames kept for the service while it moves, and sent on in their order; [`onward`]: what
//!   such a frame looks like then, and the marker.
//! - [`oracle`]: the rules for frames once more, in plain Rust; [`fuzz`]: generated frames, programs and oracle compared.
//! - [`ports`]: the interfaces, as configured. [`start`]: how all of it comes up, or is taken over.
//! - [`watch`]: what happens, told to who looks on; [`debug`]: what becomes of one user's frames; [`windows`]: how long switches took.
//! - [`service`]: the gRPC service that ties them together. [`socket`]: where it is served locally.

mod caller;
pub mod config;
pub mod debug;
pub mod desired;
pub mod fuzz;
pub mod groups;
pub mod hold;
pub mod introduce;
pub mod link;
pub mod mac;
pub mod mapping;
pub mod neighbour;
pub mod onward;
pub mod oracle;
pub mod pins;
pub mod plane;
pub mod ports;
pub mod release;
pub mod ring;
pub mod service;
pub mod socket;
pub mod start;
pub mod state;
pub mod table;
pub mod veth;
pub mod watch;
pub mod windows;
