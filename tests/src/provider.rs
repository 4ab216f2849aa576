//! The wide-area Ethernet provider: strict 802.1Q between a trunk and one access port per VLAN (see `lab-provider-ebpf`).

use std::{collections::BTreeMap, fs};

use anyhow::Context as _;
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{SchedClassifier, TcAttachType, tc},
};
use lab_provider_ebpf::{Outcome, VLANS};
use nix::net::if_::if_nametoindex;

use crate::{Host, ethtool};

/// The provider's programs at work. They are detached when it is dropped.
#[derive(Debug)]
pub struct Provider {
    ebpf: Ebpf,
}

impl Provider {
    /// Makes `host` a provider: `trunk` carries the tags of the VLANs whose access ports are named. Nothing else in the
    /// host forwards.
    ///
    /// # Errors
    /// If an interface is missing or the kernel refuses the programs.
    pub fn start(host: &Host, trunk: &str, access: &[(u16, &str)]) -> anyhow::Result<Self> {
        for port in std::iter::once(trunk).chain(access.iter().map(|(_, port)| *port)) {
            ethtool::as_on_the_wire(host, port)?;
        }
        host.enter(|| Self::load(trunk, access))?.with_context(|| format!("provider on {}", host.name()))
    }

    fn load(trunk: &str, access: &[(u16, &str)]) -> anyhow::Result<Self> {
        let mut ebpf = Ebpf::load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/provider")))
            .context("loading")?;
        let index = |name: &str| if_nametoindex(name).with_context(|| format!("interface {name}"));
        let missing = |name: &str| format!("the provider's object has no map {name}");

        let mut of_trunk: Array<_, u32> =
            ebpf.map_mut("TRUNK").with_context(|| missing("TRUNK"))?.try_into()?;
        of_trunk.set(0, index(trunk)?, 0)?;
        let mut vids: HashMap<_, u32, u32> =
            ebpf.map_mut("PORT_VID").with_context(|| missing("PORT_VID"))?.try_into()?;
        for (vid, port) in access {
            vids.insert(index(port)?, u32::from(*vid), 0)?;
        }
        let mut ports: Array<_, u32> =
            ebpf.map_mut("ACCESS_PORT").with_context(|| missing("ACCESS_PORT"))?.try_into()?;
        for (vid, port) in access {
            let vid = u32::from(*vid);
            anyhow::ensure!((1..VLANS - 1).contains(&vid), "VID {vid} of port {port} is none of 1 to 4094");
            ports.set(vid, index(port)?, 0)?;
        }

        let attach = |ebpf: &mut Ebpf, program: &str, ports: &[&str]| -> anyhow::Result<()> {
            let program: &mut SchedClassifier =
                ebpf.program_mut(program).with_context(|| format!("no program {program}"))?.try_into()?;
            program.load()?;
            for port in ports {
                // kernels before 6.6 attach to a qdisc; on later ones it does no harm
                match tc::qdisc_add_clsact(port) {
                    Ok(()) | Err(tc::TcError::AlreadyAttached) => {}
                    Err(e) => return Err(e).with_context(|| format!("clsact on {port}")),
                }
                program
                    .attach(port, TcAttachType::Ingress)
                    .with_context(|| format!("attaching to {port}"))?;
            }
            Ok(())
        };
        attach(&mut ebpf, "from_trunk", &[trunk])?;
        attach(&mut ebpf, "from_access", &access.iter().map(|(_, port)| *port).collect::<Vec<_>>())?;
        Ok(Self { ebpf })
    }

    /// Frames so far by what became of them.
    ///
    /// # Errors
    /// If the kernel does not give the counters.
    pub fn outcomes(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let map = self.ebpf.map("OUTCOMES").context("the provider's object has no map OUTCOMES")?;
        let counts: PerCpuArray<&MapData, u64> = map.try_into()?;
        Outcome::ALL
            .iter()
            .map(|o| Ok((format!("{o:?}"), counts.get(&(*o as u32), 0)?.iter().sum())))
            .collect()
    }
}

/// Lets `host` forward IPv4.
///
/// # Errors
/// If the kernel does not let it.
pub fn make_router(host: &Host) -> anyhow::Result<()> {
    host.enter(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?
        .with_context(|| format!("IPv4 forwarding on {}", host.name()))
}
