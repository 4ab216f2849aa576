//! The neighbours' protocols: what the gateway answers itself.

use gateway_ebpf::frame::{ARP_REPLY, Arp, Eth, WireMac};

/// Makes a request for the router's address the answer to it.
#[inline(always)]
pub fn answer_for_router(eth: *mut Eth, arp: *mut Arp, virtual_mac: WireMac) {
    // SAFETY: both were checked by `at`, and the frame has not been moved since.
    unsafe {
        (*eth).dst = (*eth).src;
        (*eth).src = virtual_mac;
        (*arp).op = ARP_REPLY.to_be();
        let (asker, asker_ip) = ((*arp).sha, (*arp).spa);
        (*arp).sha = virtual_mac;
        (*arp).spa = (*arp).tpa;
        (*arp).tha = asker;
        (*arp).tpa = asker_ip;
    }
}
