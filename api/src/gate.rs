//! What every call passes before its service sees it: how often a peer may ask, and the audit log of what it asked.
//!
//! - Each peer (certificate, or local user) has a number of calls per second of its own, apart for calls that act and calls that
//!   look; above it the answer is RESOURCE_EXHAUSTED and says when to ask again. The service, and with it the journal, never
//!   sees the call.
//! - A peer whose calls are refused for its role again and again is not served for a while, so that it can neither fill the
//!   audit log nor take the time of those who may.
//! - Written to the audit log: calls that act, whatever came of them, before the caller has the answer; and all calls refused for
//!   who asked, or how often. Of calls above the rate only the first in a row is.

use std::{
    collections::HashMap,
    convert::Infallible,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
    state::keyed::HashMapStateStore,
};
use tonic::{Code, Request, Status};

use crate::{
    audit::{Audit, Entry},
    tls::peer_of,
};

type Rates = RateLimiter<String, HashMapStateStore<String>, DefaultClock>;

/// How often one peer may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Calls per second, in the long run.
    pub per_second: NonZeroU32,
    /// Calls at once.
    pub burst: NonZeroU32,
}

impl Rate {
    /// So many per second and at once; at least one.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        const fn at_least_one(n: u32) -> NonZeroU32 {
            match NonZeroU32::new(n) {
                Some(n) => n,
                None => NonZeroU32::MIN,
            }
        }
        Self { per_second: at_least_one(per_second), burst: at_least_one(burst) }
    }

    fn limiter(self) -> Rates {
        RateLimiter::hashmap(Quota::per_second(self.per_second).allow_burst(self.burst))
    }
}

/// What may be asked how often, and what is written down.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Methods that act, e.g. "Migrate": written down whatever comes of them.
    pub acts: &'static [&'static str],
    /// Of each peer, of those.
    pub acting: Rate,
    /// Of each peer, of all others.
    pub looking: Rate,
}

impl Rules {
    /// For a daemon that its controller and other daemons ask: a bound that a daemon at work never meets.
    pub const DAEMON: Self =
        Self { acts: &[], acting: Rate::new(10_000, 20_000), looking: Rate::new(10_000, 20_000) };
    /// For the controller, which people and their programs ask.
    pub const CONTROLLER: Self = Self {
        acts: &["Apply", "Migrate", "CancelSession", "ResolveSession"],
        acting: Rate::new(5, 50),
        looking: Rate::new(100, 500),
    };
}

/// Refusals for the caller's role that are answered one by one.
const REFUSED: Rate = Rate::new(2, 20);
/// How long a peer that asks on is not served.
const NOT_SERVED: Duration = Duration::from_secs(10);
/// With more peers than this in memory those that have been quiet are forgotten.
const PEERS: usize = 10_000;

#[derive(Debug, Clone, Copy)]
struct Muted {
    until: Instant,
}

struct Inner {
    rules: Rules,
    audit: Option<Audit>,
    acting: Rates,
    looking: Rates,
    refused: Rates,
    clock: DefaultClock,
    /// Not served until then.
    muted: Mutex<HashMap<String, Muted>>,
    /// Above their rate since their last call that was not.
    above: Mutex<HashMap<String, u64>>,
}

/// The gate; as a [`tower::Layer`] around all services of a server. Clones share what is known of the peers.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("rules", &self.0.rules).finish_non_exhaustive()
    }
}

/// What a call is about, told by its handler for the audit log.
#[derive(Debug, Clone, Default)]
struct Subject(Arc<Mutex<String>>);

/// Says what the call is about. Without a gate before it, nobody is told.
pub fn subject<T>(request: &Request<T>, text: impl Into<String>) {
    if let Some(Subject(slot)) = request.extensions().get::<Subject>() {
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// By `rules`, writing to `audit`.
    pub fn new(rules: Rules, audit: Option<Audit>) -> Self {
        Self(Arc::new(Inner {
            rules,
            audit,
            acting: rules.acting.limiter(),
            looking: rules.looking.limiter(),
            refused: REFUSED.limiter(),
            clock: DefaultClock::default(),
            muted: Mutex::default(),
            above: Mutex::default(),
        }))
    }

    /// The audit log.
    pub fn audit(&self) -> Option<&Audit> {
        self.0.audit.as_ref()
    }

    /// Whether a peer may ask now; else the answer, and whether that is worth writing down.
    fn admit(&self, peer: &str, acts: bool) -> Result<(), (Status, bool)> {
        let inner = &*self.0;
        {
            let mut muted = lock(&inner.muted);
            if let Some(m) = muted.get(peer) {
                let left = m.until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    let words = format!(
                        "too many calls of {peer} were refused for its role; ask again in {} s, with a certificate that may",
                        left.as_secs() + 1
                    );
                    return Err((Status::resource_exhausted(words), false));
                }
                muted.remove(peer);
            }
        }
        let (rates, rate) =
            if acts { (&inner.acting, inner.rules.acting) } else { (&inner.looking, inner.rules.looking) };
        if rates.len() > PEERS {
            rates.retain_recent();
        }
        let mut above = lock(&inner.above);
        match rates.check_key(&peer.to_owned()) {
            Ok(()) => {
                if let Some(calls) = above.remove(peer) {
                    tracing::warn!(peer, calls, "calls above the peer's rate were not served");
                }
                Ok(())
            }
            Err(not_yet) => {
                let count = above.entry(peer.to_owned()).or_insert(0);
                *count += 1;
                let wait = not_yet.wait_time_from(inner.clock.now());
                let words = format!(
                    "{peer} asks too often: {} calls of this kind per second are served, {} at once; ask again in {} ms",
                    rate.per_second,
                    rate.burst,
                    wait.as_millis() + 1
                );
                Err((Status::resource_exhausted(words), *count == 1))
            }
        }
    }

    /// A call was refused for who asked.
    fn refused(&self, peer: &str) {
        let inner = &*self.0;
        if inner.refused.len() > PEERS {
            inner.refused.retain_recent();
        }
        if inner.refused.check_key(&peer.to_owned()).is_err() {
            let until = Instant::now() + NOT_SERVED;
            lock(&inner.muted).insert(peer.to_owned(), Muted { until });
            tracing::warn!(peer, "not served for a while: it asks again and again for what it may not");
        }
    }

    async fn write(&self, peer: String, call: String, subject: String, status: Option<&Status>) {
        let (outcome, reason) = match status {
            None => ("done".to_owned(), String::new()),
            Some(s) => (format!("{:?}", s.code()), s.message().to_owned()),
        };
        tracing::info!(target: "audit", peer, call, subject, outcome, reason);
        if let Some(audit) = &self.0.audit {
            audit.write(Entry { peer, call, subject, outcome, reason, ..Entry::default() }).await;
        }
    }
}

impl<S> tower::Layer<S> for Gate {
    type Service = Gated<S>;
    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.clone(), inner }
    }
}

/// A service behind a [`Gate`].
#[derive(Debug, Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

/// Of an audited call whose caller goes away before the answer.
struct Gone(Option<(Gate, String, String, Subject)>);

impl Drop for Gone {
    fn drop(&mut self) {
        let Some((gate, peer, call, subject)) = self.0.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let gone = Status::cancelled(
                    "the caller went away before the answer; what it asked for may be done",
                );
                let subject = lock(&subject.0).clone();
                gate.write(peer, call, subject, Some(&gone)).await;
            });
        }
    }
}

impl<S, B, R> tower::Service<http::Request<B>> for Gated<S>
where
    S: tower::Service<http::Request<B>, Response = http::Response<R>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = http::Response<R>;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let gate = self.gate.clone();
        // the one that was made ready is called, its clone stays
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let peer =
            peer_of(request.extensions()).map_or_else(|_| "nobody known".to_owned(), |p| p.to_string());
        let mut path = request.uri().path().rsplit('/');
        let method = path.next().unwrap_or_default().to_owned();
        let service = path.next().and_then(|s| s.rsplit('.').next()).unwrap_or_default();
        let call = format!("{service}/{method}");
        let acts = gate.0.rules.acts.contains(&method.as_str());
        let subject = Subject::default();
        request.extensions_mut().insert(subject.clone());
        Box::pin(async move {
            if let Err((status, first)) = gate.admit(&peer, acts) {
                if first {
                    gate.write(peer, call, String::new(), Some(&status)).await;
                }
                return Ok(status.into_http());
            }
            let mut gone = Gone(acts.then(|| (gate.clone(), peer.clone(), call.clone(), subject.clone())));
            let response = inner.call(request).await?;
            let status = response.extensions().get::<Status>().cloned();
            let for_its_role = status.as_ref().is_some_and(|s| {
                matches!(s.code(), Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented)
            });
            if for_its_role {
                gate.refused(&peer);
            }
            if acts || for_its_role {
                let subject = lock(&subject.0).clone();
                gate.write(peer, call, subject, status.as_ref()).await;
            }
            gone.0 = None;
            Ok(response)
        })
    }
}
