//! The scenarios' network without daemons: the services serve through router and server, the clients check.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use handover_lab::{
    Host,
    apps::Report,
    topology::{App, Client, Service, Site, TARO, Topology, V},
};

/// Puts the user's and the main site's networks together where the gateway and the provider would be.
fn bypass(topology: &Topology) {
    let lab = topology.lab();
    let router = lab.host("main-router").unwrap();
    lab.link((&topology.taro, "direct0"), (router, "direct0")).unwrap();
    topology
        .taro
        .ip("link set eth0 down\naddr add 10.9.0.1/24 dev direct0\nroute add default via 10.9.0.2")
        .unwrap();
    router.ip("addr add 10.9.0.2/24 dev direct0").unwrap();
}

fn serve(app: App) -> (Topology, Service, Client) {
    let topology = Topology::new().unwrap();
    bypass(&topology);
    let service = topology.start_service(app).unwrap();
    let client = topology.start_client(&service).unwrap();
    (topology, service, client)
}

fn check(app: App) -> Report {
    let (topology, service, mut client) = serve(app);
    assert!(client.more(10_000).unwrap().unharmed());
    assert_eq!(topology.sites_of(&service).unwrap(), [Site::Main]);
    assert_eq!(topology.sites_of_v().unwrap(), [Site::Main]);
    let last = client.finish().unwrap();
    assert!(last.unharmed(), "{last:?}");
    last
}

#[test]
fn the_film_is_served() {
    assert!(check(App::Film).operations > 5);
}

#[test]
fn redis_is_served() {
    let last = check(App::Redis);
    assert!(last.finished && last.operations > 100, "{last:?}");
}

#[test]
fn nginx_is_served() {
    let last = check(App::Nginx);
    assert!(last.finished && last.bytes == 512 << 20, "{last:?}");
    // the rate limit's own pauses: what a migration's gap is to be compared with
    assert!(last.longest_gap_us < 200_000, "{last:?}");
}

#[test]
fn a_service_that_ends_is_noticed() {
    let (_topology, service, mut client) = serve(App::Film);
    service.process.stop(Duration::from_secs(5)).unwrap();
    let report = client.more(u64::MAX).unwrap();
    assert!(!report.unharmed(), "{report:?}");
    assert!(!client.finish().unwrap().unharmed());
}

#[test]
fn the_sites_are_apart() {
    let topology = Topology::new().unwrap();
    // a port nobody listens on refuses, which takes an answer
    let reach = |host: &Host, to: &str| {
        let to = SocketAddr::new(to.parse().unwrap(), 9);
        let answer = host.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(1))).unwrap();
        answer.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
    };
    let server = topology.server(Site::Main).unwrap();
    assert!(reach(server, "10.254.0.6") && reach(server, "10.255.0.1") && reach(server, "10.2.0.1"));
    assert!(reach(&topology.control, "10.255.0.2") && reach(&topology.control, "10.255.0.6"));
    assert!(!reach(server, "10.3.0.2"), "the sites' service networks do not meet");
    assert!(!reach(&topology.taro, &V.to_string()), "without the gateway's daemon nothing passes");
    assert!(!reach(server, &TARO.to_string()));
}
