//! The debugging programs in the place of the others, for a while: each attached program gives way by one update of its link,
//! so that every frame meets the one or the other, and no frame is lost. While nobody debugs, they are not even loaded.

use std::path::PathBuf;

use aya::{
    maps::{Array, MapData, RingBuf},
    programs::{
        links::{FdLink, PinnedLink},
        xdp::{XdpLink, XdpLinkId},
    },
};
use gateway_ebpf::debug::DebugWord;

use super::{Plane, PlaneError, Side, map_error, typed, xdp_named};

/// A program that is attached somewhere.
pub(super) enum Attached {
    /// Its link ends with this process.
    Own(Side, Option<XdpLinkId>),
    /// Its link is a file.
    Pinned(Side, PathBuf),
}

/// The maps of debugging.
pub(super) struct Trace {
    debugged: Array<MapData, u64>,
    ring: Option<RingBuf<MapData>>,
}

/// Name of the program that does what that of `side` does.
const fn debugging(side: Side) -> &'static str {
    match side {
        Side::Access => "access_debug",
        Side::Wan => "wan_debug",
    }
}

impl Plane {
    /// Remembers a program that is attached, so that another can take its place.
    pub fn remember(&mut self, side: Side, link: XdpLinkId) {
        self.attached.push(Attached::Own(side, Some(link)));
    }

    /// Has the debugging programs tell of the frames of the user with this MAC: into the ring that is given, until it is given
    /// back. `None`: they do already.
    ///
    /// # Errors
    /// [`PlaneError`]; the programs are as they were.
    pub fn begin_debug(&mut self, mac: u64) -> Result<Option<RingBuf<MapData>>, PlaneError> {
        if self.trace.is_none() {
            let debugged = typed(&mut self.ebpf, "DEBUGGED")?;
            let ring = Some(typed(&mut self.ebpf, "DEBUG_FRAMES")?);
            self.trace = Some(Trace { debugged, ring });
        }
        let Some(trace) = &mut self.trace else { return Ok(None) };
        let Some(mut ring) = trace.ring.take() else { return Ok(None) };
        while ring.next().is_some() {}
        for (word, value) in [(DebugWord::Lost, 0), (DebugWord::Mac, mac)] {
            trace
                .debugged
                .set(word as u32, value, 0)
                .map_err(|source| map_error("DEBUGGED", "naming the user", source))?;
        }
        for side in [Side::Access, Side::Wan] {
            let program = xdp_named(&mut self.ebpf, debugging(side))?;
            if program.fd().is_err() {
                program.load().map_err(|source| PlaneError::Program {
                    what: "loading",
                    program: debugging(side),
                    interface: String::new(),
                    hint: "",
                    source: source.into(),
                })?;
            }
        }
        match self.exchange(Side::name, debugging) {
            Ok(()) => Ok(Some(ring)),
            Err(error) => {
                self.end_debug(ring);
                Err(error)
            }
        }
    }

    /// The programs as before.
    pub fn end_debug(&mut self, ring: RingBuf<MapData>) {
        if let Err(error) = self.exchange(debugging, Side::name) {
            tracing::error!(%error, "the debugging programs stay attached; they forward as the others do, a little slower");
        }
        if let Some(trace) = &mut self.trace {
            trace.ring = Some(ring);
        }
    }

    /// How many frames could not be told of.
    pub fn debug_lost(&self) -> u64 {
        let trace = self.trace.as_ref();
        trace.and_then(|trace| trace.debugged.get(&(DebugWord::Lost as u32), 0).ok()).unwrap_or(0)
    }

    /// Wherever the one program is attached, the other is from now on.
    fn exchange(
        &mut self,
        from: fn(Side) -> &'static str,
        to: fn(Side) -> &'static str,
    ) -> Result<(), PlaneError> {
        let mut attached = std::mem::take(&mut self.attached);
        let mut failed = None;
        for one in &mut attached {
            if let Err(error) = self.exchange_one(one, from, to) {
                failed.get_or_insert(error);
            }
        }
        self.attached = attached;
        failed.map_or(Ok(()), Err)
    }

    fn exchange_one(
        &mut self,
        one: &mut Attached,
        from: fn(Side) -> &'static str,
        to: fn(Side) -> &'static str,
    ) -> Result<(), PlaneError> {
        let (Attached::Own(side, _) | Attached::Pinned(side, _)) = *one;
        let of_program = |source| PlaneError::Program {
            what: "replacing the attached one by",
            program: to(side),
            interface: String::new(),
            hint: "",
            source: Box::new(source),
        };
        match one {
            Attached::Pinned(_, path) => {
                let of_link = |source: Box<dyn std::error::Error + Send + Sync>| PlaneError::PinnedLink {
                    what: "opening",
                    side: side.name(),
                    path: path.clone(),
                    source,
                };
                let link = PinnedLink::from_pin(&*path).map_err(|e| of_link(e.into()))?;
                let link = XdpLink::try_from(FdLink::from(link)).map_err(|e| of_link(e.into()))?;
                let program = xdp_named(&mut self.ebpf, to(side))?;
                let link = program.attach_to_link(link).map_err(of_program)?;
                // the file holds it
                drop(program.take_link(link).map_err(of_program)?);
            }
            Attached::Own(_, id) => {
                let Some(known) = id.take() else { return Ok(()) };
                let link = xdp_named(&mut self.ebpf, from(side))?.take_link(known).map_err(of_program)?;
                let link = xdp_named(&mut self.ebpf, to(side))?.attach_to_link(link).map_err(of_program)?;
                *id = Some(link);
            }
        }
        Ok(())
    }
}
