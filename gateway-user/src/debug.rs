//! What becomes of one user's frames, told to who asks ([`crate::plane::Plane::begin_debug`]).
//!
//! The debugging programs go when the time is over, when the caller has gone, or with the daemon; the daemon after a crash finds
//! them attached, as programs of another version, and replaces them.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use gateway_ebpf::{
    Outcome,
    debug::{HEAD, Traced},
};
use handover_api::{tls::Role, v1};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedMutexGuard, broadcast, mpsc},
    time::{Instant, sleep_until},
};
use tonic::{Request, Status};

use crate::{
    plane::{Side, monotonic_ns},
    service::{Gateway, internal, long},
    watch::News,
};

/// Longest time, seconds.
const LONGEST: u32 = 3600;
/// Frames on their way to the caller.
const UNDER_WAY: usize = 1024;
/// It changes which programs are attached.
const MAY_DEBUG: &[Role] = &[Role::Controller, Role::Operator, Role::Gateway];

/// What a task of its own tells.
type Told = mpsc::Sender<Result<v1::DebugFrame, Status>>;

/// Begins to tell.
pub(crate) fn begin(
    gateway: &Gateway,
    request: Request<v1::DebugRequest>,
) -> Result<mpsc::Receiver<Result<v1::DebugFrame, Status>>, Status> {
    gateway.may(&request, MAY_DEBUG)?;
    let v1::DebugRequest { user, seconds } = request.into_inner();
    if !(1..=LONGEST).contains(&seconds) {
        return Err(Status::invalid_argument(format!("seconds = {seconds}: use 1 to {LONGEST}")));
    }
    let turn = std::sync::Arc::clone(&gateway.0.debugging).try_lock_owned();
    let turn = turn.map_err(|_| {
        Status::resource_exhausted("a user is being debugged already: wait, or end that one (Ctrl-C there)")
    })?;
    let began_ns = monotonic_ns();
    let ring = {
        let mut core = gateway.core();
        let mac = match core.table.mac_of(&user) {
            None => return Err(Status::not_found(format!("there is no user `{user}` here"))),
            Some(None) => {
                return Err(Status::failed_precondition(format!(
                    "user `{user}` is known by an interface or a tag, not by a MAC: only those with one can be debugged"
                )));
            }
            Some(Some(mac)) => mac,
        };
        long(|| core.plane.begin_debug(mac.word())).map_err(|e| internal(&e))?
    };
    let Some(ring) = ring else {
        return Err(Status::resource_exhausted("a user is being debugged already"));
    };
    tracing::info!(user, seconds, "debugging");
    let (to, frames) = mpsc::channel(UNDER_WAY);
    let until = Instant::now() + Duration::from_secs(seconds.into());
    let news = gateway.0.watchers.0.subscribe();
    tokio::spawn(Telling { gateway: gateway.clone(), began_ns, _turn: turn }.tell(ring, until, news, to));
    Ok(frames)
}

struct Telling {
    gateway: Gateway,
    began_ns: u64,
    _turn: OwnedMutexGuard<()>,
}

impl Telling {
    /// Tells until the end of the time, of the caller or of the daemon; then the programs are as before.
    async fn tell(
        self,
        mut ring: RingBuf<MapData>,
        until: Instant,
        mut news: broadcast::Receiver<News>,
        to: Told,
    ) {
        let mut told = 0;
        match readiness(&ring) {
            Ok(descriptor) => loop {
                tokio::select! {
                    () = to.closed() => break,
                    () = sleep_until(until) => break,
                    news = news.recv() => match news {
                        Ok(Some(_)) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                        Ok(None) | Err(broadcast::error::RecvError::Closed) => break,
                    },
                    ready = descriptor.readable() => {
                        let Ok(mut ready) = ready else { break };
                        ready.clear_ready();
                        match self.empty(&mut ring, &to) {
                            Some(more) => told += more,
                            None => break,
                        }
                    }
                }
            },
            Err(error) => {
                let _ = to.try_send(Err(Status::internal(format!("waiting for frames: {error}"))));
            }
        }
        let lost = long(|| {
            let mut core = self.gateway.core();
            core.plane.end_debug(ring);
            core.plane.debug_lost()
        });
        tracing::info!(told, lost, "debugging ended");
    }

    /// Tells of all that is in the ring; of how many. `None`: the caller has gone.
    fn empty(&self, ring: &mut RingBuf<MapData>, to: &Told) -> Option<u64> {
        let mut told = 0;
        let mut lost = self.gateway.core().plane.debug_lost();
        while let Some(item) = ring.next() {
            if item.len() != size_of::<Traced>() {
                continue;
            }
            // SAFETY: `Traced` is integers only, and the record, which may be aligned to less, has its length.
            let traced = unsafe { item.as_ptr().cast::<Traced>().read_unaligned() };
            match to.try_send(Ok(self.frame(&traced, lost))) {
                Ok(()) => told += 1,
                Err(mpsc::error::TrySendError::Full(_)) => lost += 1,
                Err(mpsc::error::TrySendError::Closed(_)) => return None,
            }
        }
        Some(told)
    }

    fn frame(&self, traced: &Traced, lost: u64) -> v1::DebugFrame {
        let outcome = Outcome::from_index(traced.outcome).unwrap_or(Outcome::Internal);
        let side = if traced.from_user == 1 { Side::Access } else { Side::Wan };
        let port = self.gateway.0.ports.iter().find(|port| port.link.index == traced.ifindex);
        let head = |head: [u16; HEAD / 2]| {
            let octets: Vec<u8> = head.iter().flat_map(|half| half.to_ne_bytes()).collect();
            octets[..HEAD.min(traced.len as usize)].to_vec()
        };
        v1::DebugFrame {
            at_ns: traced.at_ns.saturating_sub(self.began_ns),
            side: side.name().into(),
            interface: port.map(|port| port.link.name.clone()).unwrap_or_default(),
            outcome: outcome.name().into(),
            meaning: outcome.describe().into(),
            length: traced.len,
            before: head(traced.before),
            after: head(traced.after),
            lost,
        }
    }
}

/// A descriptor of `ring` that tells when there is something in it.
fn readiness(ring: &RingBuf<MapData>) -> io::Result<AsyncFd<OwnedFd>> {
    let descriptor = ring.as_fd().try_clone_to_owned()?;
    // SAFETY: the OwnedFd moves into the AsyncFd, which keeps it open, the same, until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}
