//! What happens, told to who looks on: the service `GatewayEvents`.
//!
//! Changes come from where they are made, so that looking on costs nothing while nobody does, and a little for each change
//! while somebody does, however many users there are. What became of the frames is read from the counters at an interval of the
//! watcher's.
//!
//! A watcher that does not read is told how many changes it missed; it never holds up a change.

use std::{
    collections::HashMap,
    pin::Pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use handover_api::v1::{self, gateway_events_server, watch_event::What};
use tokio::{
    sync::{broadcast, mpsc},
    time::{Instant, MissedTickBehavior, interval_at},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{
    debug,
    service::{Gateway, internal},
};

/// Changes that a watcher may be behind.
const BEHIND: usize = 256;
/// Events on their way to a watcher.
const UNDER_WAY: usize = 16;
/// Between two accounts of the frames, if the watcher does not say.
const INTERVAL_MS: u32 = 1000;
/// What a watcher may say, milliseconds.
const INTERVALS_MS: std::ops::RangeInclusive<u32> = 100..=60_000;

/// A change, or (`None`) the end of the daemon.
pub(crate) type News = Option<Box<(u64, v1::Change)>>;

/// Who looks on.
pub(crate) struct Watchers(pub(crate) broadcast::Sender<News>);

impl Watchers {
    pub(crate) fn new() -> Self {
        Self(broadcast::Sender::new(BEHIND))
    }

    /// Tells of a change, which is only put together if somebody looks on.
    pub(crate) fn tell(&self, change: impl FnOnce() -> v1::Change) {
        if self.0.receiver_count() > 0 {
            // the last may have left just now
            let _ = self.0.send(Some(Box::new((now_ms(), change()))));
        }
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What was counted since `before`, which becomes what is counted now.
fn since(before: &mut HashMap<String, u64>, now: Vec<v1::Counter>) -> Vec<v1::Counter> {
    let mut counted = Vec::new();
    for v1::Counter { name, frames } in now {
        let known = before.entry(name.clone()).or_default();
        if frames > *known {
            counted.push(v1::Counter { name, frames: frames - *known });
        }
        *known = frames;
    }
    counted
}

impl Gateway {
    /// The service, for a server.
    pub fn events(&self) -> gateway_events_server::GatewayEventsServer<Self> {
        gateway_events_server::GatewayEventsServer::new(self.clone())
    }

    /// Ends every watch: the daemon ends.
    pub fn end_watches(&self) {
        let _ = self.0.watchers.0.send(None);
    }

    /// Tells one watcher, until it or the daemon ends.
    async fn tell_watcher(
        self,
        every: Duration,
        mut news: broadcast::Receiver<News>,
        to: mpsc::Sender<Result<v1::WatchEvent, Status>>,
    ) -> Result<(), Status> {
        let mut before = HashMap::new();
        let now = self.counters(&self.core()).map_err(|e| internal(&e))?;
        since(&mut before, now);
        let mut told = Instant::now();
        let mut ticks = interval_at(told + every, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            let (at_ms, what) = tokio::select! {
                () = to.closed() => return Ok(()),
                news = news.recv() => match news {
                    Ok(Some(change)) => (change.0, What::Change(change.1)),
                    Err(broadcast::error::RecvError::Lagged(missed)) => (now_ms(), What::Missed(missed)),
                    Ok(None) | Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
                _ = ticks.tick() => {
                    let core = self.core();
                    let now = self.counters(&core).map_err(|e| internal(&e))?;
                    let traffic = v1::Traffic {
                        elapsed_ms: told.elapsed().as_millis() as u64,
                        frames: since(&mut before, now),
                        held_bytes: core.plane.holds().usage().1,
                        switches: Self::switches(&core),
                    };
                    told = Instant::now();
                    (now_ms(), What::Traffic(traffic))
                }
            };
            if to.send(Ok(v1::WatchEvent { at_ms, what: Some(what) })).await.is_err() {
                return Ok(());
            }
        }
    }
}

#[tonic::async_trait]
impl gateway_events_server::GatewayEvents for Gateway {
    type DebugStream = Pin<Box<dyn Stream<Item = Result<v1::DebugFrame, Status>> + Send>>;

    async fn debug(&self, request: Request<v1::DebugRequest>) -> Result<Response<Self::DebugStream>, Status> {
        let frames = debug::begin(self, request)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchEvent, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.may_look(&request)?;
        let every = match request.into_inner().interval_ms {
            0 => INTERVAL_MS,
            every if INTERVALS_MS.contains(&every) => every,
            every => {
                return Err(Status::invalid_argument(format!(
                    "interval_ms = {every}: use {} to {}, or 0 for {INTERVAL_MS}",
                    INTERVALS_MS.start(),
                    INTERVALS_MS.end()
                )));
            }
        };
        let news = self.0.watchers.0.subscribe();
        let (to, events) = mpsc::channel(UNDER_WAY);
        let gateway = self.clone();
        tokio::spawn(async move {
            let every = Duration::from_millis(every.into());
            if let Err(status) = gateway.tell_watcher(every, news, to.clone()).await {
                // who has gone need not know
                let _ = to.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_counted_since_is_told() {
        let counters = |a, b| {
            [("a", a), ("b", b)].map(|(name, frames)| v1::Counter { name: name.into(), frames }).to_vec()
        };
        let mut before = HashMap::new();
        assert_eq!(since(&mut before, counters(5, 0)), counters(5, 0)[..1]);
        assert_eq!(since(&mut before, counters(5, 0)), []);
        assert_eq!(since(&mut before, counters(7, 3)), counters(2, 3));
    }
}
