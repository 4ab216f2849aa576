//! The lab itself: hosts are apart from each other and from the machine, and nothing of them stays.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    time::Duration,
};

use handover_lab::{Io, Lab, Lines, Program};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_host_has_its_own_processes_network_and_files() {
    let mut lab = Lab::new().unwrap();
    let host = lab.add_host("a").unwrap();
    assert_eq!(host.processes().unwrap(), []);
    let links = host.run(["ip", "-o", "link"]).unwrap();
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(links.contains("lo: <LOOPBACK,UP"), "{links}");
    assert_eq!(host.run(["ls", "/sys/class/net"]).unwrap().trim(), "lo");
    for dir in ["/run", "/tmp", "/var/lib/handover-migrator"] {
        // but for the way to this checkout, which every host sees
        let way = Path::new(env!("CARGO_MANIFEST_DIR")).strip_prefix(dir).ok();
        let way = way.and_then(|p| p.iter().next()).map_or(String::new(), |n| format!("{}\n", n.display()));
        assert_eq!(host.run(["ls", "-A", dir]).unwrap(), way, "{dir}");
    }
    host.write("/run/handover/x.toml", "here").unwrap();
    assert_eq!(host.run(["cat", "/run/handover/x.toml"]).unwrap(), "here");
    assert!(!fs::exists("/run/handover/x.toml").unwrap());
    // the programs of the workspace stay visible wherever the checkout is
    host.run(["test", "-x", env!("CARGO_BIN_EXE_handover-lab")]).unwrap();
}

#[test]
fn a_program_holds_nothing_from_outside_its_host() {
    let mut lab = Lab::new().unwrap();
    let host = lab.add_host("a").unwrap();
    let cgroup = host.cgroup().join("service");
    fs::create_dir(&cgroup).unwrap();
    let process = host.spawn(&Program::argv(["sleep", "1000"]).cgroup(&cgroup).min_pid(5000)).unwrap();
    assert_eq!(process.pid(), 5000);
    let files = host.run(["ls", "-l", "/proc/5000/fd"]).unwrap();
    assert_eq!(files.matches("/dev/null").count(), 3, "{files}");
    assert_eq!(files.lines().count(), 4, "{files}");
    assert_eq!(host.run(["readlink", "/proc/5000/cwd"]).unwrap(), "/\n");
    assert!(host.read("/proc/5000/cgroup").unwrap().contains("/a/service"));
    assert_eq!(host.read("/proc/5000/stat").unwrap().split(' ').nth(5).unwrap(), "5000", "own session");
    process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(process.wait_timeout(SOON).unwrap().signal, Some(15));
}

#[test]
fn ends_are_told_and_orphans_reaped() {
    let mut lab = Lab::new().unwrap();
    let host = lab.add_host("a").unwrap();
    let ended = host.output(Program::argv(["sh", "-c", "echo out; echo err >&2; exit 7"])).unwrap();
    assert_eq!((ended.ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(7), "out\n", "err\n"));
    let missing = host.run(["no-such-program"]).unwrap_err();
    assert!(format!("{missing:#}").contains("no-such-program"), "{missing:#}");
    // the shell ends at once, its child later, with no parent but pid 1
    let mut shell = host
        .spawn(&Program::argv(["sh", "-c", "sleep 1000 & echo $!"]).stdio(Io::Null, Io::Pipe, Io::Null))
        .unwrap();
    let out = Lines::collect(shell.stdout.take().unwrap());
    let orphan: i32 = out.wait_for(0, SOON, |_| true).unwrap().parse().unwrap();
    assert!(shell.wait_timeout(SOON).unwrap().success());
    host.signal(orphan, Signal::SIGKILL).unwrap();
    assert_eq!(host.wait_for_end(orphan, SOON).unwrap().signal, Some(9));
    assert_eq!(host.processes().unwrap(), []);
}

#[test]
fn hosts_reach_each_other_by_links_only() {
    let mut lab = Lab::new().unwrap();
    let (a, b, c) = (lab.add_host("a").unwrap(), lab.add_host("b").unwrap(), lab.add_host("c").unwrap());
    lab.link((&a, "eth0"), (&b, "eth0")).unwrap();
    a.ip("addr add 10.0.0.1/24 dev eth0").unwrap();
    b.ip("addr add 10.0.0.2/24 dev eth0").unwrap();
    let server = b.enter(|| TcpListener::bind("10.0.0.2:80")).unwrap().unwrap();
    a.enter(|| TcpStream::connect("10.0.0.2:80")).unwrap().unwrap();
    server.accept().unwrap();
    assert!(c.enter(|| TcpStream::connect("10.0.0.2:80")).unwrap().is_err());
    let wrong = a.ip("addr add 10.0.0.1/99 dev eth0").unwrap_err();
    assert!(format!("{wrong:#}").contains("in a: ip addr add 10.0.0.1/99"), "{wrong:#}");
}

#[test]
fn nothing_is_left() {
    let (cgroup, work, pid) = {
        let mut lab = Lab::new().unwrap();
        let host = lab.add_host("a").unwrap();
        host.spawn(&Program::argv(["sleep", "1000"])).unwrap();
        (host.cgroup().parent().unwrap().to_owned(), lab.work().to_owned(), host.pid())
    };
    assert!(!cgroup.exists() && !work.exists() && !fs::exists(format!("/proc/{pid}")).unwrap());
    assert!(!fs::exists("/var/lib/handover-migrator").unwrap());
    let mut lab = Lab::new().unwrap(); // the lock is free again
    lab.add_host("a").unwrap();
}
