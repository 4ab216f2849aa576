//! Post-copy: memory follows the copy over one stream between the two servers, on demand and in the background.
//!
//! ```text
//! source                                                        destination
//! tasks, frozen; their pages in pipes
//!   criu (page server) <-> socket pair <-> Pages stream (mTLS) <-> socket pair <-> criu lazy-pages <-> userfaultfd <-> copy
//!                                                                                  held by the keeper
//! ```
//!
//! CRIU's page server works only after `post-dump` has been answered, and ends the tasks, or lets them run, when its socket
//! closes, whatever was fetched (seen: a stray connection made it end them with no page sent). So it is answered *under the
//! freezer*, told to leave the tasks stopped, given a socket instead of a port to listen on, and what becomes of it decides
//! nothing.
//!
//! The stream is opened at *prepare* and ends with `complete` when the destination has every page. That it ended without is
//! what both sides call lost: before the decision the source goes back; after it the copy has been killed by its keeper,
//! which cannot go on with holes in its memory; nor can the original in its place, being older than what users have seen.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use handover_api::v1::{PageBytes, migrator_peer_client::MigratorPeerClient};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    error::{Error, Result, chain},
    freezer,
    node::Node,
};

/// Most bytes per message.
const CHUNK: usize = 256 * 1024;
/// Messages under way between socket and wire.
const DEPTH: usize = 8;
/// Longest wait for `criu lazy-pages` to listen, and for the keeper to hold.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether all pages have come; absent: not yet.
pub type Fetched = watch::Receiver<Option<bool>>;

/// Waits until the pages are over. Says whether all have come.
pub async fn over(mut fetched: Fetched) -> bool {
    fetched.wait_for(Option::is_some).await.is_ok_and(|f| *f == Some(true))
}

fn pair() -> Result<(UnixStream, OwnedFd)> {
    let failed = |e| Error::io("making", "a pair of sockets")(e);
    let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    Ok((UnixStream::from_std(ours).map_err(failed)?, theirs.into()))
}

/// From the socket to the wire, until the socket's other end closes.
async fn send(mut from: OwnedReadHalf, to: &mpsc::Sender<PageBytes>) -> io::Result<()> {
    loop {
        let mut data = Vec::with_capacity(CHUNK);
        if from.read_buf(&mut data).await? == 0 {
            return Ok(());
        }
        if to.send(PageBytes { data: data.into(), ..PageBytes::default() }).await.is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

/// From the wire to the socket, until the wire ends; then CRIU is told by the socket's end. Says whether it ended with
/// `complete`.
async fn receive(
    mut from: Streaming<PageBytes>,
    mut to: OwnedWriteHalf,
) -> std::result::Result<bool, Status> {
    let mut complete = false;
    let ended = loop {
        match from.message().await {
            Ok(Some(message)) => {
                complete |= message.complete;
                if let Err(e) = to.write_all(&message.data).await {
                    break Err(Status::aborted(format!("CRIU took no more: {e}")));
                }
            }
            Ok(None) => break Ok(complete),
            Err(status) => break Err(status),
        }
    };
    // ends it even where the other half is still open
    let _ = to.shutdown().await;
    ended
}

/// The source's side: the way from CRIU's page server to the wire. Dropped, the page server's socket closes.
pub struct Source {
    fetched: Fetched,
    pump: JoinHandle<()>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Source {
    /// Opens the stream. The second value is CRIU's end.
    ///
    /// # Errors
    /// The destination does not take it.
    pub async fn open(
        peer: &mut MigratorPeerClient<Channel>,
        migration: &str,
    ) -> std::result::Result<(Self, OwnedFd), Status> {
        let (ours, theirs) = pair().map_err(|e| Status::internal(chain(&e)))?;
        let (tx, rx) = mpsc::channel(DEPTH);
        let opening = PageBytes { migration: migration.to_owned(), ..PageBytes::default() };
        tx.try_send(opening).map_err(|e| Status::internal(e.to_string()))?;
        let answers = peer.pages(ReceiverStream::new(rx)).await?.into_inner();
        let (tell, fetched) = watch::channel(None);
        let id = migration.to_owned();
        let pump = tokio::spawn(async move {
            let (read, write) = ours.into_split();
            let sending = tokio::spawn(async move { send(read, &tx).await });
            let complete = receive(answers, write).await.unwrap_or_else(|status| {
                tracing::warn!(migration = id, error = status.message(), "the way of the pages broke");
                false
            });
            let _ = tell.send(Some(complete));
            // CRIU closes its end when it has seen ours close
            if let Ok(Err(e)) = sending.await {
                tracing::debug!(migration = id, error = %e, "pages");
            }
        });
        Ok((Self { fetched, pump }, theirs))
    }

    /// Whether all pages have come to the destination.
    pub fn fetched(&self) -> Fetched {
        self.fetched.clone()
    }
}

/// The destination's side: the keeper, and the way from the wire to its `criu lazy-pages`.
pub struct Fetch {
    socket: Option<UnixStream>,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    fetched: Fetched,
}

impl Fetch {
    /// Starts the keeper in a cgroup of its own, `dir`; it waits for the images.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(node: &Node, migration: &str, dir: PathBuf, copy: &std::path::Path) -> Result<Self> {
        let failed = |e: io::Error| Error::io("starting", "the keeper of pages")(e);
        let (ours, theirs) = pair()?;
        freezer::make(&dir)?;
        let inherited = std::os::fd::AsRawFd::as_raw_fd(&theirs);
        // the program as it was started, also where a newer one has taken its place
        let mut command = Command::new("/proc/self/exe");
        command.arg("keep-pages").arg("--criu").arg(&node.config.criu);
        command.arg("--images").arg(node.images(migration)).arg("--copy").arg(copy);
        command.arg("--socket").arg(inherited.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).current_dir("/");
        // SAFETY: between fork and exec only async-signal-safe system calls are made, and nothing is allocated: setsid(2), and
        // fcntl(2) on a descriptor that stays open in the parent until the spawn has returned
        unsafe {
            command.pre_exec(move || {
                if libc::setsid() < 0 || libc::fcntl(inherited, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        let gone = || failed(io::Error::other("it ended at once"));
        freezer::enter(&dir, child.id().ok_or_else(gone)?)?;
        let (orders, answers) = (child.stdin.take().ok_or_else(gone)?, child.stdout.take().ok_or_else(gone)?);
        let (tell, fetched) = watch::channel(None);
        tokio::spawn(wait(child, migration.to_owned(), dir, tell));
        Ok(Self { socket: Some(ours), orders, answers: BufReader::new(answers), fetched })
    }

    /// Whether all pages have come.
    pub fn fetched(&self) -> Fetched {
        self.fetched.clone()
    }

    /// Joins the keeper's socket with the stream that the source has opened. Gives what is to be sent back.
    pub fn join(
        &mut self,
        migration: &str,
        stream: Streaming<PageBytes>,
    ) -> Option<mpsc::Receiver<PageBytes>> {
        let (read, write) = self.socket.take()?.into_split();
        let (tx, rx) = mpsc::channel(DEPTH);
        let (fetched, id) = (self.fetched.clone(), migration.to_owned());
        tokio::spawn(async move {
            let receiving = tokio::spawn(receive(stream, write));
            if let Err(e) = send(read, &tx).await {
                tracing::debug!(migration = id, error = %e, "requests for pages");
            }
            // nothing more is asked for: either all has come, or the keeper gives up
            let complete = over(fetched).await;
            let _ = tx.send(PageBytes { complete, ..PageBytes::default() }).await;
            drop(tx);
            if let Ok(Err(status)) = receiving.await {
                tracing::debug!(migration = id, error = status.message(), "the way of the pages ended");
            }
        });
        Some(rx)
    }

    async fn order(&mut self, order: &str, answer: &str) -> Result<String> {
        let asked = async {
            self.orders.write_all(format!("{order}\n").as_bytes()).await?;
            self.orders.flush().await?;
            let mut line = String::new();
            self.answers.read_line(&mut line).await?;
            Ok::<_, io::Error>(line)
        };
        let line = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(line) => line.map_err(Error::io("asking", "the keeper of pages"))?,
            Err(_) => return Err(Error::other(format!("the keeper of pages does not answer `{order}`"))),
        };
        match line.trim().strip_prefix(answer) {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => {
                Err(Error::other(format!("the keeper of pages ended at `{order}`: criu lazy-pages failed")))
            }
        }
    }

    /// The images are here: `criu lazy-pages` is started and listens.
    ///
    /// # Errors
    /// It does not.
    pub async fn begin(&mut self) -> Result<()> {
        self.order("fetch", "ready").await.map(drop)
    }

    /// The copy is restored: the keeper holds its userfault descriptors. How many there are.
    ///
    /// # Errors
    /// They cannot be held.
    pub async fn hold(&mut self) -> Result<u32> {
        let held = self.order("hold", "held").await?;
        held.parse().map_err(|_| Error::other(format!("the keeper of pages holds `{held}`")))
    }
}

/// Waits for the keeper's end and removes its cgroup.
async fn wait(mut child: Child, migration: String, dir: PathBuf, tell: watch::Sender<Option<bool>>) {
    let complete = match child.wait().await {
        Ok(status) => status.success(),
        Err(e) => {
            tracing::error!(migration, error = %e, "waiting for the keeper of pages");
            false
        }
    };
    if let Err(e) = freezer::remove(&dir) {
        tracing::debug!(migration, error = chain(&e), "the keeper's cgroup");
    }
    let _ = tell.send(Some(complete));
}

/// Something in this daemon that memory depends on; while it lives the daemon does not end by itself.
pub struct Depended(Arc<Node>);

impl Depended {
    /// From now on.
    pub fn new(node: &Arc<Node>) -> Self {
        node.depended.send_modify(|n| *n += 1);
        Self(node.clone())
    }
}

impl Drop for Depended {
    fn drop(&mut self) {
        self.0.depended.send_modify(|n| *n -= 1);
    }
}
