//! How the gateway starts: interfaces, programs and maps as the configuration and the table want them, from whatever state they
//! are in.
//!
//! Invariant: what was there and is not taken over is refused as it is; what a start that fails began does not stay behind.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::{info, warn};

use crate::{
    config::Config,
    groups::{Copies, Groups},
    introduce::Introducer,
    link::{Changes, Link, LinkError, Promiscuous},
    mac::Mac,
    pins::{self, PinError, Pins},
    plane::{Options, Plane, PlaneError, Side, grace_period},
    ports::{Mode, Port, Ports},
    release::Releaser,
    service::{Core, chain},
    state::{StateError, Store},
    table::{SnapshotError, Table},
};

/// Why the gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An interface.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The programs.
    #[error(transparent)]
    Plane(#[from] PlaneError),
    /// The packet socket.
    #[error("packet socket on interface `{interface}` (needs CAP_NET_RAW)")]
    Socket {
        /// Which.
        interface: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The files of the data path.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A state that cannot be.
    #[error("state in {}", dir.display())]
    Snapshot {
        /// Where.
        dir: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SnapshotError,
    },
    /// Maps and state of different gateways, or of different times.
    #[error(
        "the data path pinned in {} does not go with the state in {}: give the right `pin_dir` and `state_dir`, or take the \
         data path down with `handover-gateway detach` and start again", pins.display(), state.display()
    )]
    OtherState {
        /// `pin_dir`.
        pins: PathBuf,
        /// `state_dir`.
        state: PathBuf,
    },
    /// No identity for this start.
    #[error("reading /proc/sys/kernel/random/uuid")]
    BootId(#[source] io::Error),
}

/// A data path that forwards.
pub(crate) struct Started {
    pub core: Core,
    pub ports: Ports,
    /// Where it is kept who is where, if the data path outlives the daemon.
    pub store: Option<Store>,
    /// Of a data path that ends with the daemon.
    pub promiscuous: Vec<Promiscuous>,
}

/// The daemon's own ways in and out, by port.
pub(crate) struct Sockets {
    pub introducers: BTreeMap<u16, Introducer>,
    pub groups: BTreeMap<u16, Groups>,
    pub copiers: BTreeMap<u16, Copies>,
    pub releaser: Releaser,
}

/// Loads the programs and attaches them, or takes over those that are there.
///
/// # Errors
/// [`StartError`].
pub(crate) fn start(config: &Config) -> Result<Started, StartError> {
    let ports = Ports::open(&config.access, &config.wan)?;
    for Port { link, .. } in ports.iter() {
        if !link.is_running()? {
            warn!(interface = link.name, "the interface is down or has no carrier");
        }
        if let Some(note) = link.note()? {
            info!(interface = link.name, "{note}");
        }
    }
    match &config.pin_dir {
        None => start_unpinned(config, ports),
        Some(dir) => start_pinned(config, dir, ports),
    }
}

/// Opens the daemon's packet sockets.
///
/// # Errors
/// [`StartError::Socket`].
pub(crate) fn sockets(core: &Core, virtual_mac: Mac, ports: &Ports) -> Result<Sockets, StartError> {
    let failed = |link: &Link, source| StartError::Socket { interface: link.name.clone(), source };
    let (mut introducers, mut groups, mut copiers) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut ways = Vec::new();
    for Port { side, number, link } in ports.iter() {
        match side {
            Side::Access => {
                copiers.insert(*number, Copies::open(link).map_err(|e| failed(link, e))?);
            }
            Side::Wan => {
                let introducer = Introducer::open(link, link.mac()?).map_err(|e| failed(link, e))?;
                introducers.insert(*number, introducer);
                groups.insert(*number, Groups::open(link).map_err(|e| failed(link, e))?);
                ways.push((*number, Releaser::way(link).map_err(|e| failed(link, e))?));
            }
        }
    }
    let releaser = Releaser::open(Arc::clone(core.plane.holds()), virtual_mac, ways);
    Ok(Sockets { introducers, groups, copiers, releaser })
}

/// A data path that ends with the daemon.
fn start_unpinned(config: &Config, mut ports: Ports) -> Result<Started, StartError> {
    let mut plane = Plane::load(&options(config))?;
    for Port { link, .. } in ports.iter_mut() {
        let changed = link.adapt()?;
        if changed != Changes::NONE {
            info!(
                interface = link.name,
                ?changed,
                "offloads changed: they hide from the program what it needs"
            );
        }
    }
    set_ports(&mut plane, &ports)?;
    let promiscuous = ports.iter().map(|port| Promiscuous::on(&port.link)).collect::<Result<_, _>>()?;
    // no user is known yet, so nothing passes
    for port in ports.iter() {
        let link = plane.attach_in(port.side, &port.link.name, port.link.index, config.mode)?;
        plane.remember(port.side, link);
        let (interface, mode) = (&port.link.name, config.mode.name());
        info!(side = port.side.name(), interface, mode, "attached");
    }
    let core = Core { table: Table::new(config.max_users), plane };
    Ok(Started { core, ports, store: None, promiscuous })
}

/// A data path that outlives the daemon: the one in `dir`, or a new one.
fn start_pinned(config: &Config, dir: &Path, mut ports: Ports) -> Result<Started, StartError> {
    let state_dir = config.state_dir();
    let (mut store, saved) = Store::open(&state_dir)?;
    let known = saved.is_some();
    let saved = store.rewire(&config.wiring(), saved.unwrap_or_default());
    let mut pins = Pins::open(dir, config.max_users)?;
    let fresh = pins.is_new();
    if !fresh && (!known || pins.state_id()? != store.id()) {
        return Err(StartError::OtherState { pins: dir.into(), state: state_dir });
    }
    pins.check_replaceable(saved.under_way())?;
    // in maps that are empty, users are numbered anew
    let table = Table::restore(&saved, config.max_users, !pins.adopted())
        .map_err(|source| StartError::Snapshot { dir: state_dir, source });
    let started = table.and_then(|table| {
        let core = bring_up(config, &mut pins, table, &mut ports)?;
        if !pins.adopted() {
            if fresh {
                store.renew_id()?;
            }
            store.save(&core.table.snapshot())?;
            pins.complete(store.id())?;
        }
        Ok(core)
    });
    match started {
        Ok(core) => {
            if let Some(found) = pins.replaces() {
                info!(%found, "the maps are replaced; what was counted so far went with the old ones");
            }
            let revision = core.table.revision();
            info!(pin_dir = %dir.display(), taken_over = !fresh, revision, "pinned");
            Ok(Started { core, ports, store: Some(store), promiscuous: Vec::new() })
        }
        Err(error) => {
            // what was there goes on as it is; what this start began does not stay behind
            let undone = if fresh { pins::remove(dir).map(drop) } else { pins.remove_next() };
            if let Err(error) = undone {
                warn!(error = chain(&error), "taking down what was begun");
            }
            Err(error)
        }
    }
}

/// Maps, interfaces and programs as `table` wants them, from whatever state they are in.
fn bring_up(
    config: &Config,
    pins: &mut Pins,
    mut table: Table,
    ports: &mut Ports,
) -> Result<Core, StartError> {
    let mut plane = Plane::load_pinned(&options(config), pins)?;
    set_ports(&mut plane, ports)?;
    if pins.adopted() {
        let switched = table.adopt(|index| plane.switch_word(index), |index| plane.network_words(index));
        for migration in switched {
            info!(%migration, "its switch was made just before the last daemon ended");
        }
    }
    let changes = plane.reconcile(&table.contents())?;
    if pins.adopted() && changes > 0 {
        info!(changes, "the maps were behind the table");
    }
    // what a word named before may be used again
    grace_period()?;

    let virtual_mac = config.virtual_router_mac.word();
    // with the same program on other maps, too, it has to be replaced
    let same_program = pins.virtual_mac()? == virtual_mac && pins.replaces().is_none();
    let mode = match config.mode {
        Mode::Native => Changes::NONE,
        Mode::Generic => Changes::GENERIC,
    };
    // an interface that has another place, or another mode, is begun anew
    for (number, what) in pins.clear_others(|number| Some((ports.get(number)?.link.index, mode)))? {
        info!(port = number, what, "detached: it is configured otherwise now");
    }
    for Port { side, number, link } in ports.iter_mut() {
        let needed = link.changes_needed()?;
        pins.note_interface(*number, link.index, needed.union(mode))?;
        link.change_for_good()?;
        let place = (*side, *number);
        let attachment = plane.attach_pinned(place, link, config.mode, same_program, pins)?;
        info!(side = side.name(), interface = link.name, mode = config.mode.name(), ?attachment, changed = ?needed, "attached");
    }
    pins.set_virtual_mac(virtual_mac)?;
    Ok(Core { table, plane })
}

const fn options(config: &Config) -> Options {
    Options {
        max_users: config.max_users,
        virtual_router_mac: config.virtual_router_mac,
        hold: config.hold.bounds(),
    }
}

fn set_ports(plane: &mut Plane, ports: &Ports) -> Result<(), StartError> {
    for Port { number, link, .. } in ports.iter() {
        plane.set_port(*number, link.index, link.largest_frame()?)?;
    }
    Ok(())
}
