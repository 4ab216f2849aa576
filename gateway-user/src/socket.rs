//! The local socket: guarded by its file mode, 0660, and removed when the daemon ends. A socket file that nobody listens on any
//! more (left by a crash) is replaced; one that somebody does is not.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// Errors of the socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// It cannot be made.
    #[error("socket {}", path.display())]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("socket {}: a handover-gateway listens there already; give this one another `socket`", .0.display())]
    InUse(PathBuf),
}

/// A socket that is listened on.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    remove: RemoveOnDrop,
}

/// Removes the socket's file when dropped.
#[derive(Debug)]
pub struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // if it is gone already, all the better
        let _ = fs::remove_file(&self.0);
    }
}

impl Socket {
    /// Listens on `path`, making its directory if need be. Inside a tokio runtime.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Make { path: path.into(), source };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        if let Ok(meta) = fs::symlink_metadata(path) {
            if !meta.file_type().is_socket() {
                let what = "exists and is no socket; name another one";
                return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, what)));
            }
            if StdUnixStream::connect(path).is_ok() {
                return Err(SocketError::InUse(path.into()));
            }
            fs::remove_file(path).map_err(failed)?;
        }
        // nobody else may ever connect, not even between bind and chmod
        let before = umask(Mode::from_bits_truncate(0o117));
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener.map_err(failed)?;
        let remove = RemoveOnDrop(path.into());
        fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(failed)?;
        Ok(Self { listener, remove })
    }

    /// The connections, and what removes the file in the end.
    pub fn incoming(self) -> (UnixListenerStream, RemoveOnDrop) {
        (UnixListenerStream::new(self.listener), self.remove)
    }
}
