//! On the spot: what a person on this server can see and settle when the controller is gone.
//!
//! `handover-migrator status` and `resolve` ask the running daemon over its local socket (guarded by its file mode, 0660),
//! or, when the daemon is down, work on the records themselves, with the daemon's port taken so that none can start
//! meanwhile. What is told before anything is done ([`account`]) follows from the record alone: **pure**.

use std::{
    io,
    os::unix::{fs::FileTypeExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
};

use handover_api::{
    tls::Tls,
    v1::{
        AbortMigrationRequest, EndRequest, MigrationStatus, MigratorStatusRequest, ResumeRequest,
        migrator_client::MigratorClient,
    },
};
use hyper_util::rt::TokioIo;
use nix::sys::stat::{Mode, umask};
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint};

use crate::{
    config::Config,
    destination,
    error::{Error, Result},
    node::Node,
    record::{Record, Store},
    server, source,
};

/// Which way an operator ends the doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The service is at the destination.
    Commit,
    /// The service is at the source.
    Abort,
}

impl From<&Record> for MigrationStatus {
    fn from(r: &Record) -> Self {
        Self {
            role: r.role_name().into(),
            state: r.state_name().into(),
            pid: r.pid(),
            service: r.service.clone(),
            migration: r.migration.clone(),
        }
    }
}

/// What is known of a migration here, what resolving it that way does, and what is risked.
///
/// # Errors
/// In words: why it cannot be resolved that way here.
pub fn account(m: &MigrationStatus, way: Way) -> std::result::Result<Vec<String>, String> {
    let MigrationStatus { migration: id, service, pid, state, role } = m;
    let over = || Err(format!("migration {id} is {state} here: there is no doubt to end"));
    let lines = |known: String, done: String, risked: String| {
        Ok(vec![format!("known:  {known}"), format!("done:   {done}"), format!("risked: {risked}")])
    };
    match (role.as_str(), state.as_str(), way) {
        ("source", "yielded" | "ending", Way::Commit) => lines(
            format!(
                "service {service} (pid {pid}) stands frozen here; this server has yielded, so only the decision says \
                 where it goes on"
            ),
            "the frozen original is ended, its address and its fence leave this server".into(),
            "if the copy at the other server is discarded, nobody runs the service: see there with `handover-migrator \
             status` that it is restored, resuming or resumed"
                .into(),
        ),
        ("source", "prepared" | "freezing" | "voted", Way::Commit) => Err(format!(
            "migration {id} is {state} here: it has not yielded, so it was not committed; it goes back by itself, or at \
             once with --abort"
        )),
        ("source", "yielded", Way::Abort) => lines(
            format!(
                "service {service} (pid {pid}) stands frozen here; this server has yielded, so the copy at the other \
                 server may run already"
            ),
            "the original goes on here, with its address".into(),
            "two copies with one address, if the copy at the other server runs or is resumed later: first discard it \
             there (`handover-migrator resolve` with --abort), or see that this server is off and stays so"
                .into(),
        ),
        ("source", "prepared" | "freezing" | "voted" | "aborting", Way::Abort) => lines(
            format!("service {service} (pid {pid}) belongs here until this server yields, and it has not"),
            "everything is undone and the service goes on here".into(),
            "nothing; the migration has to be asked for again".into(),
        ),
        ("destination", "restored" | "resuming", Way::Commit) => lines(
            format!("a copy of service {service} (pid {pid}) stands stopped here, under its fence"),
            "the fence is lifted and the copy runs here, with its address".into(),
            "two copies with one address, if the original at the other server runs or is let go later: first end it there \
             (`handover-migrator resolve` with --commit), or see that that server is off and stays so"
                .into(),
        ),
        ("destination", "reserved" | "restoring", Way::Commit) => Err(format!(
            "migration {id} is {state} here: there is no whole copy that could go on; only --abort"
        )),
        ("destination", "reserved" | "restoring" | "restored" | "discarding", Way::Abort) => lines(
            format!("of service {service} there is at most a copy that has never run (pid {pid})"),
            "the copy is ended, its address and its fence leave this server".into(),
            "if the original at the other server was ended, nobody runs the service: see there with `handover-migrator \
             status` that it is not ended"
                .into(),
        ),
        (_, "ending" | "ended" | "resuming" | "resumed", Way::Abort) => {
            Err(format!("migration {id} is {state} here: it was committed, which is never undone"))
        }
        _ => over(),
    }
}

/// A running daemon, or its records.
enum Target {
    Daemon(MigratorClient<Channel>),
    Records(Vec<MigrationStatus>),
}

async fn connect(socket: &Path) -> io::Result<MigratorClient<Channel>> {
    let first = TokioIo::new(UnixStream::connect(socket).await?);
    let mut first = Some(first);
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let (first, path) = (first.take(), path.clone());
        async move {
            match first {
                Some(stream) => Ok::<_, io::Error>(stream),
                None => UnixStream::connect(path).await.map(TokioIo::new),
            }
        }
    });
    let channel = Endpoint::from_static("http://local").connect_with_connector(connector).await;
    Ok(MigratorClient::new(channel.map_err(io::Error::other)?))
}

/// Whoever knows: the daemon, if it runs.
async fn target(config: &Config) -> Result<(Target, Option<std::net::TcpListener>)> {
    if let Some(socket) = &config.socket {
        match connect(socket).await {
            Ok(client) => return Ok((Target::Daemon(client), None)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(e) => return Err(Error::io("asking the daemon at", socket.display())(e)),
        }
    }
    let taken = std::net::TcpListener::bind(config.listen).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => Error::other(format!(
            "a daemon listens on {} but not on a local socket: give it `socket` in its configuration and start it again, \
             or stop it first",
            config.listen
        )),
        _ => Error::io("taking the daemon's place on", config.listen)(e),
    })?;
    let (_, records) = Store::open(&config.records_dir())?;
    Ok((Target::Records(records.iter().map(MigrationStatus::from).collect()), Some(taken)))
}

fn words(status: &tonic::Status) -> Error {
    Error::other(status.message().to_owned())
}

/// The migrations this server knows; whether the daemon runs.
///
/// # Errors
/// Neither daemon nor records can be read.
pub async fn status(config: &Config) -> Result<(bool, Vec<MigrationStatus>)> {
    Ok(match target(config).await?.0 {
        Target::Daemon(mut daemon) => {
            let answer = daemon.status(MigratorStatusRequest {}).await.map_err(|s| words(&s))?;
            (true, answer.into_inner().migrations)
        }
        Target::Records(records) => (false, records),
    })
}

/// Ends the doubt about a migration here, if `confirmed`. Returns what was to be known before.
///
/// # Errors
/// It is not known here, cannot be resolved that way, or something could not be done (a repeated call goes on).
pub async fn resolve(
    config: &Config,
    tls: impl FnOnce() -> Result<Tls>,
    id: &str,
    way: Way,
    confirmed: bool,
) -> Result<Vec<String>> {
    let (target, taken) = target(config).await?;
    let known = match &target {
        Target::Daemon(daemon) => {
            let answer = daemon.clone().status(MigratorStatusRequest {}).await;
            answer.map_err(|s| words(&s))?.into_inner().migrations
        }
        Target::Records(records) => records.clone(),
    };
    let Some(migration) = known.iter().find(|m| m.migration == id) else {
        let names: Vec<&str> = known.iter().map(|m| m.migration.as_str()).collect();
        return Err(Error::other(format!("migration {id} is not known here; known: {}", names.join(", "))));
    };
    let told = account(migration, way).map_err(Error::other)?;
    if !confirmed {
        return Ok(told);
    }
    let (source_here, migration) = (migration.role == "source", id.to_owned());
    match target {
        Target::Daemon(mut daemon) => match (way, source_here) {
            (Way::Abort, _) => daemon.abort(AbortMigrationRequest { migration }).await.map(drop),
            (Way::Commit, true) => daemon.end(EndRequest { migration }).await.map(drop),
            (Way::Commit, false) => daemon.resume(ResumeRequest { migration }).await.map(drop),
        }
        .map_err(|s| words(&s))?,
        Target::Records(_) => {
            let node = Node::open(config.clone(), tls()?).await?;
            match (way, source_here) {
                (Way::Abort, _) => server::abort(&node, id).await.map(drop),
                (Way::Commit, true) => source::end(&node, id).await.map(drop),
                (Way::Commit, false) => destination::resume(&node, id).await.map(drop),
            }
            .map_err(|f| Error::other(f.message))?;
        }
    }
    drop(taken);
    Ok(told)
}

/// The local socket; removed when dropped.
pub struct Socket {
    listener: UnixListener,
    remove: RemoveOnDrop,
}

/// Removes the socket's file.
pub struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // if it is gone already, all the better
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Socket {
    /// Listens on `path`, for the owner and the group of the daemon. One that a crash left is replaced.
    ///
    /// # Errors
    /// It is in use, or something else is there.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed = |e| Error::io("listening on", path.display())(e);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        if let Ok(meta) = std::fs::symlink_metadata(path) {
            if !meta.file_type().is_socket() {
                let what = "exists and is no socket; name another `socket`";
                return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, what)));
            }
            if StdUnixStream::connect(path).is_ok() {
                return Err(Error::other(format!(
                    "a handover-migrator listens on {} already",
                    path.display()
                )));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        // nobody else may ever connect, not even between bind and chmod
        let before = umask(Mode::from_bits_truncate(0o117));
        let listener = UnixListener::bind(path);
        umask(before);
        Ok(Self { listener: listener.map_err(failed)?, remove: RemoveOnDrop(path.into()) })
    }

    /// The connections, and what removes the file in the end.
    pub fn incoming(self) -> (tokio_stream::wrappers::UnixListenerStream, RemoveOnDrop) {
        (tokio_stream::wrappers::UnixListenerStream::new(self.listener), self.remove)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{DestinationEvent, DestinationState as D, Next, SourceEvent, SourceState as S};

    fn of(role: &str, state: &str) -> MigrationStatus {
        MigrationStatus {
            migration: "film-1".into(),
            role: role.into(),
            state: state.into(),
            pid: 7,
            service: "film".into(),
        }
    }

    /// What the account allows is what the machine does, in every state and both ways.
    #[test]
    fn exactly_what_the_machine_takes_is_offered() {
        let sources =
            [S::Prepared, S::Freezing, S::Voted, S::Yielded, S::Ending, S::Ended, S::Aborting, S::Aborted];
        for state in sources {
            for (way, event) in [(Way::Commit, SourceEvent::End), (Way::Abort, SourceEvent::Abort)] {
                let takes = matches!(state.on(event), Next::Go(_));
                let told = account(&of("source", state.name()), way);
                assert_eq!(told.is_ok(), takes, "{state:?} {way:?}: {told:?}");
            }
        }
        let destinations =
            [D::Reserved, D::Restoring, D::Restored, D::Resuming, D::Resumed, D::Discarding, D::Discarded];
        for state in destinations {
            for (way, event) in
                [(Way::Commit, DestinationEvent::Resume), (Way::Abort, DestinationEvent::Abort)]
            {
                let takes = matches!(state.on(event), Next::Go(_));
                let told = account(&of("destination", state.name()), way);
                assert_eq!(told.is_ok(), takes, "{state:?} {way:?}: {told:?}");
            }
        }
    }

    #[test]
    fn the_risk_of_two_copies_is_told() {
        for (role, state, way) in
            [("source", "yielded", Way::Abort), ("destination", "restored", Way::Commit)]
        {
            let told = account(&of(role, state), way).unwrap();
            assert!(told.iter().any(|l| l.starts_with("risked: two copies")), "{told:?}");
        }
    }
}
