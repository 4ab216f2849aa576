//! What a gateway is told of networks and users: the one place where inventory and state become its configuration. Pure.

use handover_api::v1;

use crate::{
    inventory::{Network, User},
    world::World,
};

impl World {
    /// Everything `gateway` is to know.
    pub fn configuration(&self, gateway: &str) -> v1::ConfigureRequest {
        v1::ConfigureRequest {
            revision: self.revision,
            networks: self.inventory.networks.iter().map(|(name, n)| network(name, n)).collect(),
            users: self
                .inventory
                .users
                .iter()
                .filter(|(_, u)| u.gateway == gateway)
                .map(|(name, u)| user(name, u, self.users.get(name).cloned().unwrap_or_default()))
                .collect(),
        }
    }
}

fn network(name: &str, n: &Network) -> v1::Network {
    v1::Network {
        name: name.into(),
        vid: n.vid.map(u32::from),
        router_address: n.router_address.to_string(),
        router_mac: n.router_mac.clone(),
        ..v1::Network::default()
    }
}

fn user(name: &str, u: &User, network: String) -> v1::User {
    v1::User {
        name: name.into(),
        mac: u.mac.clone(),
        addresses: u.addresses.iter().map(ToString::to_string).collect(),
        network,
        ..v1::User::default()
    }
}
