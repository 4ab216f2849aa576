//! The data path as files: programs, links and maps pinned to a BPF file system, where they outlive the daemon.
//!
//! ```text
//!  pin_dir/  meta              what the directory holds (below); complete once `magic` is set
//!            map-USER ...      the maps, by name
//!            program-access, program-wan
//!            link-access, link-wan     an attached program each: gone with the file, and only then; those of further
//!                                      interfaces are link-access-1, link-wan-1 ...
//! ```
//!
//! `meta` is an array of 64-bit words whose places never change, whatever the layout of the other maps: so every version
//! can tell that a directory is of another version, and take it down ([`remove`]).
//!
//! Invariants:
//! - `magic` is stored last. A directory without it is of a start that did not get through; it is taken down and made anew.
//! - Maps of another layout or for another number of users are never reinterpreted, not even read: new ones are filled from the
//!   state on disk beside them (`next-map-USER` ...), each attached program is replaced by one that uses those, with one update
//!   of its link, and only then do they take the old maps' names. Whoever is interrupted in between begins that anew. Only
//!   between switches: whether a switch was made, its maps alone know for sure. (A router that was learned in the last
//!   milliseconds before a kill, and is not on disk yet, has to be learned again, and until it has answered its users' frames for
//!   it are dropped and counted.)
//! - What was changed at an interface is in `meta` before it is changed, so that it can be undone by whoever takes it down.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::DirBuilderExt as _},
    },
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData, MapError, MapInfo};
use gateway_ebpf::{LAYOUT, PORTS};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{
    link::{Changes, Link},
    plane::Side,
    ports::place,
};

/// Where BPF file systems are by convention.
const BPFFS: &str = "/sys/fs/bpf";
/// "HANDOVER", read as a number.
const MAGIC: u64 = u64::from_be_bytes(*b"HANDOVER");
/// The file of `meta`.
const META: &str = "meta";
/// How names of maps begin.
const MAP: &str = "map-";
/// How names of files begin that are ours to remove.
const PREFIXES: [&str; 4] = [MAP, NEXT, "program-", "link-"];
/// How names of maps begin that are to take the place of others.
const NEXT: &str = "next-map-";
/// Words of `meta`; more than are used.
const WORDS: u32 = 64;

/// Places in `meta`; for ever.
#[derive(Debug, Clone, Copy)]
enum Word {
    Magic = 0,
    Layout = 1,
    MaxUsers = 2,
    VirtualMac = 3,
    State = 4,
    /// Interface index, by port: of the first two.
    Interface = 8,
    /// [`Changes`], by port: of the first two.
    Changes = 16,
    /// Interface index, by port: of the others.
    FurtherInterface = 32,
    /// [`Changes`], by port: of the others.
    FurtherChanges = 48,
}

impl Word {
    /// Where the interface index of a port is: the first two have had theirs since before there were others.
    const fn interface(port: u16) -> Self {
        if port < FIRST_PORTS { Self::Interface } else { Self::FurtherInterface }
    }

    /// Where the changes of a port's interface are.
    const fn changes(port: u16) -> Self {
        if port < FIRST_PORTS { Self::Changes } else { Self::FurtherChanges }
    }
}

/// One on each side.
const FIRST_PORTS: u16 = 2;
const _: () = assert!(Word::FurtherChanges as u32 + PORTS <= WORDS);

/// Errors of pinning.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Mounting failed.
    #[error(
        "{BPFFS} is no BPF file system and none could be mounted there (needs CAP_SYS_ADMIN): `mount -t bpf bpf {BPFFS}`, \
         or leave out `pin_dir`, and the data path ends with the daemon"
    )]
    Mount(#[source] io::Error),
    /// Somewhere else.
    #[error(
        "pin_dir {}: {} is no BPF file system: `mount -t bpf bpf DIR` one there, or use a directory below {BPFFS}",
        dir.display(), is.display()
    )]
    NotBpffs {
        /// As configured.
        dir: PathBuf,
        /// The directory that exists.
        is: PathBuf,
    },
    /// A file.
    #[error("{what} {}", path.display())]
    File {
        /// What was done.
        what: &'static str,
        /// To which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A pinned map.
    #[error("{what} pinned map {}", path.display())]
    Map {
        /// What was done.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<MapError>,
    },
    /// Pins of another version, or for another number of users, in the middle of a switch.
    #[error(
        "the data path pinned in {} has {found}, this daemon {wanted}; it is replaced when a daemon starts, but not in the middle \
         of a switch: start the version (or the configuration) that pinned it and finish or abort migration {}, or take it down \
         with `handover-gateway detach` (forwarding ends until the daemon runs again; who is on which network is kept in \
         `state_dir`)", dir.display(), migrations.join(", ")
    )]
    Busy {
        /// Where.
        dir: PathBuf,
        /// What is there.
        found: Pinned,
        /// What there would be.
        wanted: Pinned,
        /// The switches.
        migrations: Vec<String>,
    },
    /// A map that is not as `meta` says.
    #[error(
        "pinned map {} {why}: something else made it; take the data path down with `handover-gateway detach`",
        path.display()
    )]
    Shape {
        /// Which.
        path: PathBuf,
        /// How it differs.
        why: String,
    },
    /// Several things went wrong while taking it down.
    #[error("taking down {}: {}", dir.display(), failed.join("; "))]
    Remove {
        /// Where.
        dir: PathBuf,
        /// Each with its reason.
        failed: Vec<String>,
    },
}

/// What pinned maps are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    layout: u64,
    max_users: u64,
}

impl std::fmt::Display for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { layout, max_users } = self;
        write!(f, "map layout {} ({:08x}) for {max_users} users", layout >> 32, *layout as u32)
    }
}

/// What is done with what is in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// There was nothing, or nothing whole.
    Begin,
    /// The maps are taken over.
    Adopt,
    /// The maps are not what this daemon uses: others take their place.
    Replace(Pinned),
}

/// A directory of pins.
pub struct Pins {
    dir: PathBuf,
    meta: Meta,
    plan: Plan,
    wanted: Pinned,
}

struct Meta {
    path: PathBuf,
    words: Array<MapData, u64>,
}

impl Meta {
    fn open(path: PathBuf) -> Result<Self, PinError> {
        let failed = |what, source| PinError::Map { what, path: path.clone(), source: Box::new(source) };
        let data = MapData::from_pin(&path).map_err(|e| failed("opening", e))?;
        let map = Map::from_map_data(data).map_err(|e| failed("opening", e))?;
        let words = Array::try_from(map).map_err(|e| failed("opening", e))?;
        Ok(Self { path, words })
    }

    fn create(path: PathBuf) -> Result<Self, PinError> {
        let failed = |what, source| PinError::Map { what, path: path.clone(), source: Box::new(source) };
        let words = Array::<_, u64>::create(WORDS, 0).map_err(|e| failed("creating", e))?;
        pin(&path, |path| words.pin(path))?;
        // pinning consumes the map
        Self::open(path)
    }

    fn get(&self, word: Word, port: u16) -> Result<u64, PinError> {
        self.words.get(&(word as u32 + u32::from(port)), 0).map_err(|source| self.failed("reading", source))
    }

    fn set(&mut self, word: Word, port: u16, value: u64) -> Result<(), PinError> {
        match self.words.set(word as u32 + u32::from(port), value, 0) {
            Ok(()) => Ok(()),
            Err(source) => Err(self.failed("writing", source)),
        }
    }

    fn noted(&self, port: u16) -> Result<(u32, Changes), PinError> {
        let ifindex = self.get(Word::interface(port), port)? as u32;
        Ok((ifindex, Changes::from_bits(self.get(Word::changes(port), port)?)))
    }

    fn failed(&self, what: &'static str, source: MapError) -> PinError {
        PinError::Map { what, path: self.path.clone(), source: Box::new(source) }
    }
}

fn pin(path: &Path, pin: impl FnOnce(&Path) -> Result<(), aya::pin::PinError>) -> Result<(), PinError> {
    pin(path).map_err(|source| PinError::File {
        what: "pinning to",
        path: path.into(),
        source: io::Error::other(source),
    })
}

impl Pins {
    /// Opens the data path pinned in `dir`, or begins a new one.
    ///
    /// # Errors
    /// [`PinError`]: no BPF file system, or pins that cannot be read, which are left as they are.
    pub fn open(dir: &Path, max_users: u32) -> Result<Self, PinError> {
        let wanted = Pinned { layout: LAYOUT, max_users: max_users.into() };
        bpffs_for(dir)?;
        let path = dir.join(META);
        if path.exists() {
            let meta = Meta::open(path)?;
            if meta.get(Word::Magic, 0)? == MAGIC {
                let (layout, max_users) = (meta.get(Word::Layout, 0)?, meta.get(Word::MaxUsers, 0)?);
                let found = Pinned { layout, max_users };
                let plan = if found == wanted { Plan::Adopt } else { Plan::Replace(found) };
                let pins = Self { dir: dir.into(), meta, plan, wanted };
                pins.remove_next()?;
                return Ok(pins);
            }
        }
        // what a start left that did not get through
        remove(dir)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PinError::File {
            what: "making directory (a BPF file system takes no name with a dot)",
            path: dir.into(),
            source,
        })?;
        let meta = Meta::create(dir.join(META))?;
        Ok(Self { dir: dir.into(), meta, plan: Plan::Begin, wanted })
    }

    /// Whether the maps are those that were there.
    pub const fn adopted(&self) -> bool {
        matches!(self.plan, Plan::Adopt)
    }

    /// Whether there was nothing before.
    pub const fn is_new(&self) -> bool {
        matches!(self.plan, Plan::Begin)
    }

    /// What the maps are that are being replaced, if they are.
    pub const fn replaces(&self) -> Option<Pinned> {
        match self.plan {
            Plan::Replace(found) => Some(found),
            _ => None,
        }
    }

    /// Sees that nothing is lost by replacing the maps, where that is to be done.
    ///
    /// # Errors
    /// [`PinError::Busy`].
    pub fn check_replaceable(&self, migrations: Vec<String>) -> Result<(), PinError> {
        match self.plan {
            Plan::Replace(found) if !migrations.is_empty() => {
                let (dir, wanted) = (self.dir.clone(), self.wanted);
                Err(PinError::Busy { dir, found, wanted, migrations })
            }
            _ => Ok(()),
        }
    }

    /// The new maps take the place of those they replace, which go.
    fn take_place(&self) -> Result<(), PinError> {
        let (next, old): (Vec<_>, Vec<_>) = self.maps()?.into_iter().partition(|name| name.starts_with(NEXT));
        let renamed: Vec<String> = next.iter().map(|name| name.replacen(NEXT, MAP, 1)).collect();
        for (from, to) in next.iter().zip(&renamed) {
            let to = self.dir.join(to);
            fs::rename(self.dir.join(from), &to).map_err(|source| PinError::File {
                what: "renaming to",
                path: to,
                source,
            })?;
        }
        for gone in old.iter().filter(|name| !renamed.contains(name)) {
            self.unlink(&self.dir.join(gone))?;
        }
        Ok(())
    }

    /// Takes away what was begun in the place of the maps.
    ///
    /// # Errors
    /// [`PinError::File`].
    pub fn remove_next(&self) -> Result<(), PinError> {
        for name in self.maps()?.into_iter().filter(|name| name.starts_with(NEXT)) {
            self.unlink(&self.dir.join(name))?;
        }
        Ok(())
    }

    /// The files of maps.
    fn maps(&self) -> Result<Vec<String>, PinError> {
        let failed = |source| PinError::File { what: "listing", path: self.dir.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name.starts_with(MAP) || name.starts_with(NEXT) {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        let prefix = if self.replaces().is_some() { NEXT } else { MAP };
        self.dir.join(format!("{prefix}{name}"))
    }

    /// The file of a program.
    pub fn program(&self, side: Side) -> PathBuf {
        self.dir.join(format!("program-{}", side.name()))
    }

    /// The file of the program that is attached to a port's interface.
    pub fn link(&self, port: u16) -> PathBuf {
        let (side, place) = place(port);
        self.dir.join(match place {
            0 => format!("link-{}", side.name()),
            place => format!("link-{}-{place}", side.name()),
        })
    }

    /// What is attached to a port's interface.
    ///
    /// # Errors
    /// [`PinError::File`].
    pub fn attached(&self, port: u16) -> Result<Option<Attached>, PinError> {
        let path = self.link(port);
        if !path.exists() {
            return Ok(None);
        }
        Attached::read(&path).map(Some).map_err(|source| PinError::File {
            what: "reading about link",
            path,
            source,
        })
    }

    /// Detaches what a link had attached, and takes its file away.
    ///
    /// # Errors
    /// [`PinError::File`].
    pub fn remove_link(&self, port: u16) -> Result<(), PinError> {
        let path = self.link(port);
        detach_link(&path).map_err(|source| PinError::File {
            what: "detaching link",
            path: path.clone(),
            source,
        })?;
        self.unlink(&path)
    }

    /// Takes a file away.
    ///
    /// # Errors
    /// [`PinError::File`].
    pub fn unlink(&self, path: &Path) -> Result<(), PinError> {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(PinError::File { what: "removing", path: path.into(), source })
            }
            _ => Ok(()),
        }
    }

    /// The virtual router's MAC that the attached programs have.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn virtual_mac(&self) -> Result<u64, PinError> {
        self.meta.get(Word::VirtualMac, 0)
    }

    /// Notes what is attached.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn set_virtual_mac(&mut self, mac: u64) -> Result<(), PinError> {
        self.meta.set(Word::VirtualMac, 0, mac)
    }

    /// Which state file goes with these maps.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn state_id(&self) -> Result<u64, PinError> {
        self.meta.get(Word::State, 0)
    }

    /// Notes which interface a port is, and, before they are made, changes of it that are to be undone one day.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn note_interface(&mut self, port: u16, ifindex: u32, changes: Changes) -> Result<(), PinError> {
        let (noted, before) = self.noted(port)?;
        let before = if noted == ifindex { before } else { Changes::NONE };
        if noted != ifindex {
            // for a moment it undoes nothing at all: not what was done elsewhere
            self.meta.set(Word::interface(port), port, 0)?;
        }
        self.meta.set(Word::changes(port), port, before.union(changes).bits())?;
        self.meta.set(Word::interface(port), port, ifindex.into())
    }

    /// The interface of a port that was noted (0: none), and what is to be undone there.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn noted(&self, port: u16) -> Result<(u32, Changes), PinError> {
        self.meta.noted(port)
    }

    /// Detaches from every interface that is no longer what `wanted` says of its port (its index, and how the program is
    /// attached), and undoes what was changed there. Answers with the ports, and why.
    ///
    /// # Errors
    /// [`PinError`]; what could not be undone at an interface is a warning.
    pub fn clear_others(
        &mut self,
        wanted: impl Fn(u16) -> Option<(u32, Changes)>,
    ) -> Result<Vec<(u16, &'static str)>, PinError> {
        let mut cleared = Vec::new();
        for port in 0..PORTS as u16 {
            let (noted, changes) = self.noted(port)?;
            if noted == 0 {
                continue;
            }
            let why = match wanted(port) {
                None => "no such port",
                Some((ifindex, _)) if ifindex != noted => "another interface",
                Some((_, mode)) if mode.contains(Changes::GENERIC) != changes.contains(Changes::GENERIC) => {
                    "another mode"
                }
                Some(_) => continue,
            };
            if self.link(port).exists() {
                self.remove_link(port)?;
            }
            if let Err(error) = Link::undo(noted, changes) {
                tracing::warn!(%error, "restoring the interface that was used before");
            }
            self.meta.set(Word::interface(port), port, 0)?;
            cleared.push((port, why));
        }
        Ok(cleared)
    }

    /// The data path is whole: from now on it is taken over, not made anew.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn complete(&mut self, state_id: u64) -> Result<(), PinError> {
        if self.replaces().is_some() {
            self.take_place()?;
        }
        self.meta.set(Word::Layout, 0, self.wanted.layout)?;
        self.meta.set(Word::MaxUsers, 0, self.wanted.max_users)?;
        self.meta.set(Word::State, 0, state_id)?;
        self.meta.set(Word::Magic, 0, MAGIC)
    }

    /// Size of a map that is to be taken over.
    ///
    /// # Errors
    /// [`PinError::Map`].
    pub fn max_entries(&self, name: &str) -> Result<Option<u32>, PinError> {
        if !self.adopted() {
            return Ok(None);
        }
        let path = self.map(name);
        match MapInfo::from_pin(&path) {
            Ok(info) => Ok(Some(info.max_entries())),
            Err(source) => Err(PinError::Map { what: "asking about", path, source: Box::new(source) }),
        }
    }

    /// Whether a map to be taken over is the one the programs expect: pinned maps are reused by name alone.
    ///
    /// # Errors
    /// [`PinError::Shape`].
    pub fn check_shape(&self, name: &str, shape: Shape) -> Result<(), PinError> {
        if !self.adopted() {
            return Ok(());
        }
        let path = self.map(name);
        let info = MapInfo::from_pin(&path).map_err(|source| PinError::Map {
            what: "asking about",
            path: path.clone(),
            source: Box::new(source),
        })?;
        let found = Shape {
            key_size: info.key_size(),
            value_size: info.value_size(),
            max_entries: info.max_entries(),
        };
        if found == shape {
            return Ok(());
        }
        Err(PinError::Shape { path, why: format!("has {found}, not {shape}") })
    }
}

/// Sizes of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as the kernel calls them")]
pub struct Shape {
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} entries of {} octets by keys of {}", self.max_entries, self.value_size, self.key_size)
    }
}

/// What a pinned link says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Where; 0: the interface is gone.
    pub ifindex: u32,
    /// Digest of the program's instructions.
    pub program_tag: u64,
}

impl Attached {
    fn read(path: &Path) -> io::Result<Self> {
        let link = object(path)?;
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()))?;
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key == name).then(|| value.trim())
            })
        };
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "it is no link of an XDP program");
        Ok(Self {
            ifindex: field("ifindex").and_then(|v| v.parse().ok()).ok_or_else(missing)?,
            program_tag: field("prog_tag")
                .and_then(|v| u64::from_str_radix(v, 16).ok())
                .ok_or_else(missing)?,
        })
    }
}

/// Opens a pinned object. (aya opens them too, but keeps the descriptor to itself.)
fn object(path: &Path) -> io::Result<OwnedFd> {
    /// linux/bpf.h: `union bpf_attr` for BPF_OBJ_GET
    #[repr(C)]
    struct Attr {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    const BPF_OBJ_GET: libc::c_int = 7;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = Attr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: `attr` and the path in it outlive the call, which only reads them.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<Attr>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to this process (with close-on-exec).
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Detaches the program of a pinned link, done when this returns: taking the file away alone lets the kernel do it some time
/// later.
fn detach_link(path: &Path) -> io::Result<()> {
    /// linux/bpf.h: `union bpf_attr` for BPF_LINK_DETACH
    #[repr(C)]
    struct Attr {
        link_fd: u32,
    }
    const BPF_LINK_DETACH: libc::c_int = 34;
    let link = object(path)?;
    let attr = Attr { link_fd: link.as_raw_fd() as u32 };
    // SAFETY: `attr` outlives the call, which only reads it.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const attr, size_of::<Attr>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sees that `dir` is, or can be made, on a BPF file system.
fn bpffs_for(dir: &Path) -> Result<(), PinError> {
    let is = dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let on_bpffs = |path: &Path| statfs(path).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    if on_bpffs(is) {
        return Ok(());
    }
    if !dir.starts_with(BPFFS) {
        return Err(PinError::NotBpffs { dir: dir.into(), is: is.into() });
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
        .map_err(|e| PinError::Mount(e.into()))?;
    tracing::info!("BPF file system mounted at {BPFFS}");
    Ok(())
}

/// Takes down the data path pinned in `dir`, of whatever version: detaches the programs, undoes what was changed at
/// interfaces. Goes on after a failure. Returns whether there was anything.
///
/// # Errors
/// [`PinError::Remove`] with all that failed.
pub fn remove(dir: &Path) -> Result<bool, PinError> {
    let mut failed = Vec::new();
    let mut note = |what: String, error: &dyn std::error::Error| failed.push(format!("{what}: {error}"));
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(PinError::File { what: "listing", path: dir.into(), source }),
    };
    let mut ours: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok())
        .filter(|entry| PREFIXES.iter().any(|p| entry.file_name().as_bytes().starts_with(p.as_bytes())))
        .map(|entry| entry.path())
        .collect();
    // links first: detached before anything else goes
    let is_link = |path: &PathBuf| path.file_name().is_some_and(|n| n.as_bytes().starts_with(b"link-"));
    ours.sort_by_key(|path| !is_link(path));
    for path in &ours {
        if is_link(path)
            && let Err(error) = detach_link(path)
        {
            note(format!("detaching {}", path.display()), &error);
        }
        if let Err(error) = fs::remove_file(path) {
            note(path.display().to_string(), &error);
        }
    }
    let meta = dir.join(META);
    let had_meta = meta.exists();
    if had_meta {
        match Meta::open(meta.clone()) {
            Ok(meta) => {
                for port in 0..PORTS as u16 {
                    match meta.noted(port) {
                        Ok((0, _)) => {}
                        Ok((ifindex, changes)) => {
                            if let Err(error) = Link::undo(ifindex, changes) {
                                note(format!("{} interface {ifindex}", place(port).0.name()), &error);
                            }
                        }
                        Err(error) => note(format!("port {port}"), &error),
                    }
                }
            }
            Err(error) => note(meta.display().to_string(), &error),
        }
        if let Err(error) = fs::remove_file(&meta) {
            note(meta.display().to_string(), &error);
        }
    }
    // somebody else's files may be in it
    let _ = fs::remove_dir(dir);
    if failed.is_empty() {
        Ok(had_meta || !ours.is_empty())
    } else {
        Err(PinError::Remove { dir: dir.into(), failed })
    }
}
