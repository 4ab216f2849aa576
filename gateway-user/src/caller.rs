//! The controller's certificate, remembered: the call that users wait for does not read the same certificate anew each time.
//!
//! The connection's handshake has verified that the certificate is of the authority and that the caller has its key; what is
//! left for each call is to read role and name out of it. Of two equal certificates both are the same.

use std::sync::{Arc, Mutex, PoisonError};

use handover_api::tls::{Role, require_role};
use tonic::{Request, Status};

/// The last certificate that was found to be of a role that may.
#[derive(Debug, Default)]
pub(crate) struct Remembered(Mutex<Option<Arc<[u8]>>>);

impl Remembered {
    /// As [`require_role`] with `roles`, which are the same in every call.
    ///
    /// # Errors
    /// As [`require_role`].
    pub(crate) fn require_role<T>(&self, request: &Request<T>, roles: &[Role]) -> Result<(), Status> {
        let certificates = request.peer_certs();
        let Some(certificate) = certificates.as_ref().and_then(|all| all.first()) else {
            return require_role(request, roles).map(|_| ());
        };
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_deref() == Some(certificate.as_ref()) {
            return Ok(());
        }
        require_role(request, roles)?;
        *last = Some(certificate.as_ref().into());
        Ok(())
    }
}
