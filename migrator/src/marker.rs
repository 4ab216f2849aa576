//! The marker: how the source learns that nothing its users sent is under way any more.
//!
//! When a gateway holds the users' frames, it sends one UDP datagram from one of these users to v, after the last frame
//! it let pass and on the same way. When the datagram has arrived here, so have they. What they brought has then to be
//! read by the service: TCP data still in a receive queue is dumped with its socket, but CRIU takes no UDP receive queue
//! along, so those are waited for too.
//!
//! Both waits are bounded together. A marker that does not come (a filter on the way, a lost datagram) costs that bound
//! and is reported; nothing depends on it but what was under way.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use tokio::{net::UdpSocket, time::Instant};

use crate::{
    error::{Error, Result},
    sockets,
};

/// How often UDP receive queues are looked at: the kernel offers no event for "read" by another.
const LOOK: Duration = Duration::from_millis(1);

/// Where markers arrive.
#[derive(Debug)]
pub struct Markers {
    socket: UdpSocket,
}

/// How quiet it became.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Quiet {
    /// Markers that had arrived.
    pub seen: u32,
    /// What may be lost, in words.
    pub losses: Vec<String>,
}

impl Markers {
    /// Listens on UDP `port` of `v`.
    ///
    /// # Errors
    /// Somebody else does, or v is not here.
    pub async fn listen(v: Ipv4Addr, port: u16) -> Result<Self> {
        let subject = || format!("{v}:{port} (marker_port of the service)");
        let socket = UdpSocket::bind(SocketAddrV4::new(v, port))
            .await
            .map_err(|e| Error::io("listen for the gateways' markers on UDP", subject())(e))?;
        Ok(Self { socket })
    }

    /// Waits for the markers `nonces` and for the UDP sockets `owned` by the service to be read empty, `patience` at most.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub async fn quiet(&self, nonces: &[u64], owned: &HashSet<u32>, patience: Duration) -> Result<Quiet> {
        let deadline = Instant::now() + patience;
        let mut missing: HashSet<u64> = nonces.iter().copied().collect();
        let wanted = missing.len();
        let mut datagram = [0_u8; 9];
        while !missing.is_empty() {
            let Ok(received) = tokio::time::timeout_at(deadline, self.socket.recv(&mut datagram)).await
            else {
                break;
            };
            let length = received.map_err(Error::io("receive", "a marker"))?;
            // anybody can send here: what is no marker is none
            if let Ok(nonce) = <[u8; 8]>::try_from(&datagram[..length]) {
                missing.remove(&u64::from_be_bytes(nonce));
            }
        }
        let unread = loop {
            let unread: Vec<_> = sockets::udp()?
                .into_iter()
                .filter(|s| owned.contains(&s.inode) && s.recv_queue > 0)
                .collect();
            if unread.is_empty() || Instant::now() >= deadline {
                break unread;
            }
            tokio::time::sleep(LOOK).await;
        };
        let seen = u32::try_from(wanted - missing.len()).unwrap_or(u32::MAX);
        let mut losses = Vec::new();
        if !missing.is_empty() {
            losses.push(format!(
                "{} of {wanted} gateway markers did not arrive within {} ms: what users had just sent may be lost",
                missing.len(),
                patience.as_millis()
            ));
        }
        // what stays unread is reported by the fence, which looks again
        tracing::debug!(seen, wanted, unread = unread.len(), "quiet");
        Ok(Quiet { seen, losses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: Ipv4Addr = Ipv4Addr::LOCALHOST;

    async fn markers() -> (Markers, UdpSocket) {
        let markers = Markers { socket: UdpSocket::bind((V, 0)).await.unwrap() };
        let gateway = UdpSocket::bind((V, 0)).await.unwrap();
        gateway.connect(markers.socket.local_addr().unwrap()).await.unwrap();
        (markers, gateway)
    }

    #[tokio::test]
    async fn quiet_when_every_marker_has_arrived() {
        let (markers, gateway) = markers().await;
        for datagram in
            [&7_u64.to_be_bytes()[..], b"noise", b"longer than a marker", &9_u64.to_be_bytes()[..]]
        {
            gateway.send(datagram).await.unwrap();
        }
        let quiet = markers.quiet(&[9, 7], &HashSet::new(), Duration::from_secs(30)).await.unwrap();
        assert_eq!(quiet, Quiet { seen: 2, losses: Vec::new() });
    }

    #[tokio::test]
    async fn a_marker_that_does_not_come_is_told_of() {
        let (markers, gateway) = markers().await;
        gateway.send(&7_u64.to_be_bytes()).await.unwrap();
        let quiet = markers.quiet(&[7, 8], &HashSet::new(), Duration::from_millis(20)).await.unwrap();
        assert_eq!(quiet.seen, 1);
        assert!(
            quiet.losses[0].starts_with("1 of 2 gateway markers did not arrive within 20 ms"),
            "{quiet:?}"
        );
    }

    #[tokio::test]
    async fn udp_data_that_the_service_has_not_read_is_waited_for() {
        let (markers, gateway) = markers().await;
        let service = UdpSocket::bind((V, 0)).await.unwrap();
        gateway.send_to(b"data", service.local_addr().unwrap()).await.unwrap();
        service.readable().await.unwrap();
        let port = service.local_addr().unwrap().port();
        let inode = sockets::udp().unwrap().into_iter().find(|s| s.local.1 == port).unwrap().inode;
        let owned: HashSet<u32> = [inode].into();
        let reader = async {
            // by the time this is polled again the first look has found the data unread
            tokio::task::yield_now().await;
            let mut data = [0; 8];
            service.recv(&mut data).await.unwrap()
        };
        let (quiet, read) = tokio::join!(markers.quiet(&[], &owned, Duration::from_secs(30)), reader);
        assert_eq!((quiet.unwrap(), read), (Quiet::default(), 4));
        let left = sockets::udp().unwrap().into_iter().find(|s| s.inode == inode).unwrap();
        assert_eq!(left.recv_queue, 0, "it waited until the data was read");
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_named() {
        let taken = UdpSocket::bind((V, 0)).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let e = Markers::listen(V, port).await.unwrap_err().to_string();
        assert!(e.contains(&format!("127.0.0.1:{port} (marker_port of the service)")), "{e}");
    }
}
