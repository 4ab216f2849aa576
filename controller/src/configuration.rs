//! What a gateway is told of networks and users: the one place where inventory and state become its configuration. Pure.

use handover_api::v1;

use crate::{
    inventory::{Network, Tpid, User},
    world::World,
};

/// IEEE 802.1Q, table 9-1.
const TPID_8021AD: u32 = 0x88a8;

impl World {
    /// How many users are behind `gateway`.
    pub fn users_of(&self, gateway: &str) -> usize {
        self.inventory.users.values().filter(|u| u.gateway == gateway).count()
    }

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
        router_address6: n.router_address6.map(|a| a.to_string()).unwrap_or_default(),
        tpid: (n.tpid == Tpid::Service).then_some(TPID_8021AD),
        pcp: n.pcp.map(u32::from),
        wan: n.wan.clone(),
    }
}

fn user(name: &str, u: &User, network: String) -> v1::User {
    v1::User {
        name: name.into(),
        mac: u.mac.clone(),
        addresses: u
            .addresses
            .iter()
            .map(ToString::to_string)
            .chain(u.addresses6.iter().map(ToString::to_string))
            .collect(),
        network,
        tag: u.tag.map(u32::from),
        guard: u.guard,
        interface: u.interface.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::parse;

    #[test]
    fn a_gateway_is_told_all_that_is_declared_of_networks_and_users() {
        let inventory = parse(
            r#"
            [[network]]
            name = "carrier"
            vid = 3
            tpid = "802.1ad"
            pcp = 5
            wan = "eth4"
            router_address = "10.1.0.1"
            router_address6 = "fe80::1"
            [[site]]
            name = "main"
            network = "carrier"
            [[gateway]]
            name = "gw"
            control = "10.255.0.2:7443"
            [[user]]
            name = "hanako"
            gateway = "gw"
            tag = 7
            interface = "eth3"
            guard = true
            addresses = ["10.1.0.101"]
            addresses6 = ["2001:db8::7"]
            home = "main"
            "#,
        )
        .unwrap();
        let told = network("carrier", &inventory.networks["carrier"]);
        assert_eq!((told.vid, told.tpid, told.pcp), (Some(3), Some(0x88a8), Some(5)));
        assert_eq!((told.router_address.as_str(), told.router_address6.as_str()), ("10.1.0.1", "fe80::1"));
        assert_eq!(told.wan, "eth4");
        let told = user("hanako", &inventory.users["hanako"], "carrier".into());
        assert_eq!((told.mac.as_str(), told.tag, told.guard), ("", Some(7), true));
        assert_eq!(told.interface, "eth3");
        assert_eq!(told.addresses, ["10.1.0.101", "2001:db8::7"]);
    }
}
