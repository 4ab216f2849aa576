use super::*;

/// The lab's inventory: also what other tests start from.
pub(crate) const LAB: &str = r#"[[network]]
name = "net1"
vid = 1
router_address = "10.1.0.1"
[[network]]
name = "net2"
vid = 2
router_address = "10.1.0.1"
[[site]]
name = "main"
network = "net1"
[[site]]
name = "backup"
network = "net2"
[[server]]
name = "main-server"
site = "main"
control = "10.255.0.5:7443"
migration = "10.254.0.5:7444"
[[server]]
name = "backup-server"
site = "backup"
control = "10.255.0.6:7443"
migration = "10.254.0.6:7444"
[[gateway]]
name = "gw"
control = "10.255.0.2:7443"
[[user]]
name = "taro"
gateway = "gw"
mac = "02:00:00:00:01:01"
addresses = ["10.1.0.100"]
home = "main"
[[service]]
name = "film"
address = "203.0.113.10"
home = "main"
servers = { main = "main-server", backup = "backup-server" }
users = "all"
target = { command = "film-server" }
"#;

#[test]
fn the_lab_is_valid() {
    let inv = parse(LAB).unwrap();
    assert_eq!(inv.networks["net2"].vid, Some(2));
    assert_eq!(inv.users["taro"].addresses, ["10.1.0.100".parse::<Ipv4Addr>().unwrap()]);
    assert_eq!(inv.services["film"].target, Target::Command("film-server".into()));
    assert_eq!(inv.users_of(&inv.services["film"]), ["taro"]);
    assert_eq!(parse("").unwrap(), Inventory::default());
}

/// What is replaced in the lab's inventory, by what, and the error.
const BAD: &[(&str, &str, &str)] = &[
    (
        "vid = 2",
        "vid = 0",
        "line 7: network net2: vid = 0 is reserved by 802.1Q; use 1 to 4094, or leave vid out for an untagged network",
    ),
    (
        "vid = 2",
        "vid = 4095",
        "line 7: network net2: vid = 4095 is reserved by 802.1Q; use 1 to 4094, or leave vid out for an untagged network",
    ),
    (
        "vid = 2",
        "vid = -1",
        "line 7: network net2: vid = -1 is no VLAN identifier; use 1 to 4094, or leave vid out for an untagged network",
    ),
    (
        "vid = 2",
        "vid = \"two\"",
        "line 7: network net2: vid = \"two\" is not a number; use 1 to 4094, or leave vid out for an untagged network",
    ),
    (
        "vid = 2",
        "vid = 1",
        "line 6: network net2 has vid = 1, and so has network net1; give each its own VID",
    ),
    (
        "vid = 2",
        "vlan = 2",
        "line 7: unknown field `vlan`, expected one of `name`, `vid`, `tpid`, `pcp`, `router_address`, `router_address6`, `router_mac`, `wan`",
    ),
    ("vid = 2", "vid = ", "line 7: "),
    (
        "[[gateway]]",
        "[[gatweay]]",
        "line 25: unknown field `gatweay`, expected one of `network`, `site`, `server`, `gateway`, `user`, `service`",
    ),
    (
        "router_address = \"10.1.0.1\"\n[[site]]\nname = \"main\"",
        "router_address = \"10.9.0.1\"\n[[site]]\nname = \"main\"",
        "line 38: service film: the router of site main is 10.1.0.1, that of site backup is 10.9.0.1; users need the same router_address at every site of a service",
    ),
    (
        "network = \"net2\"",
        "network = \"net3\"",
        "line 14: site backup: network = \"net3\": there is no network net3; known: net1, net2",
    ),
    (
        "site = \"backup\"",
        "site = \"bakcup\"",
        "line 22: server backup-server: site = \"bakcup\": there is no site bakcup; known: backup, main",
    ),
    (
        "control = \"10.255.0.2:7443\"",
        "control = \"10.255.0.2\"",
        "line 27: gateway gw: control = \"10.255.0.2\" is no host:port; write it like 10.255.0.5:7443, with a port from 1 to 65535",
    ),
    (
        "control = \"10.255.0.2:7443\"",
        "control = \"10.255.0.2:0\"",
        "line 27: gateway gw: control = \"10.255.0.2:0\" is no host:port; write it like 10.255.0.5:7443, with a port from 1 to 65535",
    ),
    (
        "control = \"10.255.0.2:7443\"",
        "control = \"10.255.0.5:7443\"",
        "line 27: gateway gw: control = \"10.255.0.5:7443\" is also that of server main-server (control); give each its own",
    ),
    (
        "name = \"taro\"",
        "name = \"Taro\"",
        "line 29: user `Taro`: not a name; use 1 to 63 of a-z, 0-9 and `-`, not starting or ending with `-`",
    ),
    (
        "gateway = \"gw\"",
        "gateway = \"gw2\"",
        "line 30: user taro: gateway = \"gw2\": there is no gateway gw2; known: gw",
    ),
    (
        "mac = \"02:00:00:00:01:01\"",
        "mac = \"02:00:00:00:01\"",
        "line 31: user taro: mac = \"02:00:00:00:01\" is no MAC; write it like 02:00:00:00:01:01",
    ),
    (
        "mac = \"02:00:00:00:01:01\"",
        "mac = \"01:00:5e:00:01:01\"",
        "line 31: user taro: mac = \"01:00:5e:00:01:01\" is a group address; give the MAC of one interface",
    ),
    (
        "addresses = [\"10.1.0.100\"]",
        "addresses = []",
        "line 32: user taro: addresses = [] is empty; give at least one IPv4 address",
    ),
    (
        "addresses = [\"10.1.0.100\"]",
        "addresses = [\"10.1.0.300\"]",
        "line 32: user taro: addresses = \"10.1.0.300\" is no IPv4 address; write it like 203.0.113.10, without a prefix length",
    ),
    (
        "addresses = [\"10.1.0.100\"]",
        "addresses = [\"10.1.0.1\"]",
        "line 32: user taro: address 10.1.0.1 is the router's of network net1; give the user's own",
    ),
    (
        "addresses = [\"10.1.0.100\"]",
        "addresses = [\"224.0.0.1\"]",
        "line 32: user taro: addresses = \"224.0.0.1\" is no address of a host; give a unicast IPv4 address",
    ),
    (
        "address = \"203.0.113.10\"",
        "address = \"10.1.0.100\"",
        "line 36: service film: address 10.1.0.100 is also that of user taro; give the service its own",
    ),
    (
        "servers = { main = \"main-server\", backup",
        "servers = { backup",
        "line 37: service film: home = \"main\", but servers names none for site main; add main = \"SERVER\" to servers",
    ),
    (
        "backup = \"backup-server\" }",
        "backup = \"main-server\" }",
        "line 38: service film: servers: backup = \"main-server\", but server main-server stands at site main; name one at backup",
    ),
    (
        "backup = \"backup-server\" }",
        "backup = \"nowhere\" }",
        "line 38: service film: servers: backup = \"nowhere\": there is no server nowhere; known: backup-server, main-server",
    ),
    (
        "backup = \"backup-server\" }",
        "moon = \"backup-server\" }",
        "line 38: service film: servers: there is no site moon; known: backup, main",
    ),
    (
        "users = \"all\"",
        "users = \"some\"",
        "line 39: service film: users = \"some\"; write users = \"all\" or a list of names",
    ),
    (
        "users = \"all\"",
        "users = [\"jiro\"]",
        "line 39: service film: users: there is no user jiro; known: taro",
    ),
    (
        "users = \"all\"",
        "users = [\"taro\", \"taro\"]",
        "line 39: service film: users: taro is named twice; remove one",
    ),
    (
        "{ command = \"film-server\" }",
        "{ }",
        "line 40: service film: target is empty; give one of command = \"PATTERN\", pid = NUMBER, pidfile = \"/PATH\"",
    ),
    (
        "{ command = \"film-server\" }",
        "{ command = \"\" }",
        "line 40: service film: target: command = \"\" would match every process; give one of command = \"PATTERN\", pid = NUMBER, pidfile = \"/PATH\"",
    ),
    (
        "{ command = \"film-server\" }",
        "{ pid = 1 }",
        "line 40: service film: target: pid = 1 is no service's; give one of command = \"PATTERN\", pid = NUMBER, pidfile = \"/PATH\"",
    ),
    (
        "{ command = \"film-server\" }",
        "{ pid = 7, pidfile = \"/x\" }",
        "line 40: service film: target names more than one way; give one of command = \"PATTERN\", pid = NUMBER, pidfile = \"/PATH\"",
    ),
    (
        "{ command = \"film-server\" }",
        "{ pidfile = \"x\" }",
        "line 40: service film: target: pidfile = \"x\" is not absolute; give one of command = \"PATTERN\", pid = NUMBER, pidfile = \"/PATH\"",
    ),
    (
        "{ command = \"film-server\" }",
        "{ unit = \"x\" }",
        "line 40: unknown field `unit`, expected one of `pid`, `pidfile`, `command`",
    ),
    ("home = \"main\"\n[[service]]", "[[service]]", "line 28: missing field `home`"),
];

#[test]
fn bad_values_are_named_with_line_value_and_way_out() {
    let mut wrong = Vec::new();
    for (from, to, want) in BAD {
        assert!(LAB.contains(from), "{from}");
        let err = parse(&LAB.replacen(from, to, 1)).expect_err(to).to_string();
        // one wrong value may have consequences, which are reported too
        if !err.lines().any(|l| l == *want || (want.ends_with(": ") && l.starts_with(want))) {
            wrong.push(format!("{to}\n got: {err}\nwant: {want}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn what_a_channel_can_be_opened_to_is_an_endpoint() {
    for (endpoint, good) in [
        ("10.255.0.2:7443", true),
        ("gw.example:7443", true),
        ("[fd00::2]:7443", true),
        (":7443", false),
        ("gw:70000", false),
        ("gw:7443/x", false),
        ("root@gw:7443", false),
        ("g w:7443", false),
        ("", false),
    ] {
        assert_eq!(parse(&LAB.replace("10.255.0.2:7443", endpoint)).is_ok(), good, "{endpoint}");
    }
}

#[test]
fn two_users_cannot_share_a_mac_an_address_or_a_name() {
    let second = |name: &str, mac: &str, address: &str| {
        format!(
            "{LAB}[[user]]\nname = \"{name}\"\ngateway = \"gw\"\nmac = \"{mac}\"\naddresses = [\"{address}\"]\nhome = \"main\"\n"
        )
    };
    assert!(parse(&second("jiro", "02:00:00:00:01:02", "10.1.0.101")).is_ok());
    for (text, want) in [
        (
            second("jiro", "02:00:00:00:01:01", "10.1.0.101"),
            "line 44: user jiro: mac = \"02:00:00:00:01:01\" is also that of user taro; a MAC stands for one user",
        ),
        (
            second("jiro", "02:00:00:00:01:02", "10.1.0.100"),
            "line 45: user jiro: address 10.1.0.100 is also that of user taro; an address stands for one user",
        ),
        (
            second("taro", "02:00:00:00:01:02", "10.1.0.101"),
            "line 42: user taro is declared twice; rename one or remove it",
        ),
    ] {
        assert_eq!(parse(&text).unwrap_err().to_string(), want);
    }
    let upper =
        second("jiro", "0A:00:00:00:01:01", "10.1.0.101").replace("02:00:00:00:01:01", "0a:00:00:00:01:01");
    assert!(parse(&upper).is_err(), "case does not make another MAC");
}

#[test]
fn all_problems_are_reported_at_once_in_order() {
    let text = LAB.replace("vid = 2", "vid = 0").replace("gateway = \"gw\"", "gateway = \"x\"");
    let lines: Vec<usize> = parse(&text).unwrap_err().problems.iter().map(|p| p.line).collect();
    assert_eq!(lines, [7, 30]);
}

#[test]
fn differences_are_one_line_each() {
    let old = parse(LAB).unwrap();
    assert!(diff(&old, &old).is_empty());
    let text = LAB.replace("vid = 2", "vid = 3").replace("name = \"taro\"", "name = \"jiro\"").replace(
        "router_address = \"10.1.0.1\"\n[[network]]",
        "router_address = \"10.1.0.1\"\nrouter_mac = \"02:00:00:00:09:09\"\n[[network]]",
    );
    let changes: Vec<String> = diff(&old, &parse(&text).unwrap()).iter().map(Change::to_string).collect();
    assert_eq!(
        changes,
        [
            "~ network net1: router_mac none -> 02:00:00:00:09:09",
            "~ network net2: vid 2 -> 3",
            "+ user jiro",
            "- user taro",
        ]
    );
    assert_eq!(diff(&Inventory::default(), &old).len(), 9);
}

/// Everything a network and a user can say beyond the lab's.
const MORE: &str = r#"[[network]]
name = "carrier"
vid = 1
tpid = "802.1ad"
pcp = 5
router_address = "10.1.0.1"
router_address6 = "fe80::1"
[[user]]
name = "hanako"
gateway = "gw"
tag = 7
guard = true
addresses = ["10.1.0.101"]
addresses6 = ["2001:db8::7"]
home = "main"
"#;

#[test]
fn a_network_can_have_a_service_tag_and_a_user_be_known_by_a_tag() {
    // the same VID under another kind of tag is another network
    let inv = parse(&format!("{LAB}{MORE}")).unwrap();
    let carrier = &inv.networks["carrier"];
    assert_eq!((carrier.vid, carrier.tpid, carrier.pcp), (Some(1), Tpid::Service, Some(5)));
    assert_eq!(carrier.router_address6, "fe80::1".parse().ok());
    let hanako = &inv.users["hanako"];
    assert_eq!((hanako.mac.as_str(), hanako.tag, hanako.guard), ("", Some(7), true));
    assert_eq!(hanako.addresses6, ["2001:db8::7".parse::<Ipv6Addr>().unwrap()]);

    for (what, by, want) in [
        (
            "\"802.1ad\"",
            "\"qinq\"",
            "network carrier: tpid = \"qinq\" is no kind of tag; use \"802.1q\" or \"802.1ad\"",
        ),
        (
            "vid = 1\n",
            "",
            "network carrier: tpid = \"802.1ad\", but the network has no tag; give it a vid or leave tpid out",
        ),
        (
            "\"802.1ad\"",
            "\"802.1q\"",
            "network carrier has vid = 1, and so has network net1; give each its own VID",
        ),
        ("pcp = 5", "pcp = 8", "network carrier: pcp = 8 is no priority; use 0 to 7, or leave pcp out"),
        (
            "pcp = 5",
            "wan = \"eth4/\"",
            "network carrier: wan = \"eth4/\" is no name of a network interface; give one of the gateway's",
        ),
        (
            "tag = 7",
            "interface = \"an-interface-too-long\"",
            "user hanako: interface = \"an-interface-too-long\" is no name of a network interface",
        ),
        (
            "\"fe80::1\"",
            "\"2001:db8::1\"",
            "router_address6 = \"2001:db8::1\" is no link-local IPv6 address; write it like fe80::1",
        ),
        (
            "tag = 7",
            "tag = 4095",
            "user hanako: tag = 4095 is reserved by 802.1Q; use 1 to 4094, or leave tag out for an untagged user",
        ),
        (
            "\"2001:db8::7\"",
            "\"ff02::1\"",
            "user hanako: addresses6 = \"ff02::1\" is no unicast IPv6 address",
        ),
    ] {
        let found = parse(&format!("{LAB}{}", MORE.replacen(what, by, 1))).unwrap_err().to_string();
        assert!(found.contains(want), "{what} -> {by}: {found}");
    }

    let third = MORE[MORE.find("[[user]]").unwrap()..]
        .replace("hanako", "jiro")
        .replace("10.1.0.101", "10.1.0.102")
        .replace("db8::7", "db8::8");
    let found = parse(&format!("{LAB}{MORE}{third}")).unwrap_err().to_string();
    assert!(
        found.contains("user jiro is all that comes in at gateway gw under tag 7, and so is user hanako"),
        "{found}"
    );
    assert!(parse(&format!("{LAB}{MORE}{}", third.replace("tag = 7", "tag = 8"))).is_ok());
    // the same tag on another interface is another user's
    let there = third.replace("tag = 7", "tag = 7\ninterface = \"eth3\"");
    let inv = parse(&format!("{LAB}{MORE}{there}")).unwrap();
    assert_eq!(inv.users["jiro"].interface, "eth3");
}

#[test]
fn an_inventory_written_before_these_keys_is_read() {
    let inv = parse(LAB).unwrap();
    let mut old = serde_json::to_value(&inv).unwrap();
    for (kind, keys) in
        [("networks", ["tpid", "pcp", "router_address6"]), ("users", ["tag", "guard", "addresses6"])]
    {
        for thing in old[kind].as_object_mut().unwrap().values_mut() {
            for key in keys {
                assert!(thing.as_object_mut().unwrap().remove(key).is_some(), "{kind}: {key}");
            }
        }
    }
    assert_eq!(serde_json::from_value::<Inventory>(old).unwrap(), inv);
}
