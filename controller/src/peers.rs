//! Channels to the gateways and migrators of the inventory, and what is known of each.
//!
//! A channel is opened once and kept warm (HTTP/2 keep-alive, see [`handover_api::tls`]), so a call on the hot path
//! never waits for a connection. Whether a peer can be reached is asked about twice a second; whoever needs to know at
//! once asks itself.

use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use handover_api::{
    tls::{Role, Tls, TlsError},
    v1::{gateway_client::GatewayClient, migrator_client::MigratorClient},
};
use tokio::sync::Notify;
use tonic::{Status, transport::Channel};

use crate::inventory::Inventory;

/// What a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `handover-gateway`.
    Gateway,
    /// `handover-migrator`.
    Migrator,
}

impl Kind {
    fn role(self) -> Role {
        match self {
            Self::Gateway => Role::Gateway,
            Self::Migrator => Role::Migrator,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.role(), f)
    }
}

/// What was last seen of a peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// It answered.
    pub reachable: bool,
    /// Why not, or what is to be known.
    pub detail: String,
}

/// A gateway or migrator.
#[derive(Debug)]
pub struct Peer {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// host:port on the control network.
    pub endpoint: String,
    channel: Channel,
    seen: Mutex<Seen>,
    /// Of a gateway: the start of the daemon and the revision it was last configured with. Held while configuring, so
    /// that an older configuration never follows a newer one.
    pub(crate) configured: tokio::sync::Mutex<Option<(String, u64)>>,
    /// Ask now, not in a second.
    pub(crate) ask: Notify,
    /// The peer is in the inventory no more.
    pub(crate) gone: tokio::sync::watch::Sender<bool>,
}

/// Octets of the largest status taken from a gateway: one of the most users a gateway can have (2^20) is some 100 MB.
const LARGEST_STATUS: usize = 256 << 20;

impl Peer {
    /// A client, if it is a gateway.
    pub fn gateway(&self) -> GatewayClient<Channel> {
        GatewayClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_STATUS)
    }

    /// A client, if it is a migrator.
    pub fn migrator(&self) -> MigratorClient<Channel> {
        MigratorClient::new(self.channel.clone())
    }

    /// What was last seen.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what is seen; whether that is new.
    pub(crate) fn see(&self, seen: Seen) -> bool {
        let mut last = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *last != seen;
        *last = seen;
        changed
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {}", self.kind, self.name, self.endpoint)
    }
}

/// All peers.
#[derive(Debug)]
pub struct Peers {
    tls: Tls,
    all: Mutex<BTreeMap<(Kind, String), Arc<Peer>>>,
}

impl Peers {
    /// None yet.
    pub fn new(tls: Tls) -> Self {
        Self { tls, all: Mutex::default() }
    }

    /// Takes those of an inventory; returns those that are new. A peer that has gone, or moved to another endpoint, is
    /// told so through [`Peer::gone`].
    ///
    /// # Errors
    /// [`TlsError`] if the certificates of this controller cannot be used.
    pub(crate) fn take(&self, inventory: &Inventory) -> Result<Vec<Arc<Peer>>, TlsError> {
        let gateways = inventory.gateways.iter().map(|(n, g)| ((Kind::Gateway, n.clone()), &g.control));
        let migrators = inventory.servers.iter().map(|(n, s)| ((Kind::Migrator, n.clone()), &s.control));
        let wanted: BTreeMap<_, _> = gateways.chain(migrators).collect();
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|key, peer| {
            let stays = wanted.get(key).is_some_and(|endpoint| **endpoint == peer.endpoint);
            if !stays {
                peer.gone.send_replace(true);
            }
            stays
        });
        let mut new = Vec::new();
        for ((kind, name), endpoint) in wanted {
            if all.contains_key(&(kind, name.clone())) {
                continue;
            }
            let channel = self.tls.connect_lazy(kind.role(), &name, endpoint)?;
            let peer = Arc::new(Peer {
                kind,
                name: name.clone(),
                endpoint: endpoint.clone(),
                channel,
                seen: Mutex::new(Seen { reachable: false, detail: "not asked yet".into() }),
                configured: tokio::sync::Mutex::default(),
                ask: Notify::new(),
                gone: tokio::sync::watch::Sender::new(false),
            });
            new.push(Arc::clone(&peer));
            all.insert((kind, name), peer);
        }
        Ok(new)
    }

    /// One peer.
    ///
    /// # Errors
    /// A status that says it is not in the inventory.
    pub fn get(&self, kind: Kind, name: &str) -> Result<Arc<Peer>, Status> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&(kind, name.to_owned()))
            .cloned()
            .ok_or_else(|| Status::not_found(format!("{kind} {name} is in the inventory no more")))
    }

    /// All of them, by kind and name.
    pub fn all(&self) -> Vec<Arc<Peer>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// A status in words: the daemon's own message, or what happened on the way to it.
pub fn words(status: &Status) -> String {
    let mut words = if status.message().is_empty() {
        status.code().description().to_owned()
    } else {
        status.message().to_owned()
    };
    let mut next = status.source();
    while let Some(source) = next {
        let text = source.to_string();
        // most layers repeat their source
        if !words.contains(&text) {
            words.push_str(": ");
            words.push_str(&text);
        }
        next = source.source();
    }
    words
}

/// Whether the answer was lost on the way, so that nobody knows whether the call was served.
pub fn lost(status: &Status) -> bool {
    status.source().is_some()
        || matches!(status.code(), tonic::Code::Cancelled | tonic::Code::DeadlineExceeded)
}
