//! Builds the benchmarks' programs to embed.

use anyhow::Context as _;
use aya_build::{Package, Toolchain};

fn main() -> anyhow::Result<()> {
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/ebpf");
    // SAFETY: a build script runs one thread here. `core` for the BPF target is built from source, which a stable cargo
    // does only when told so; the variable ends with this script, no other crate sees it.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    aya_build::build_ebpf(
        [Package { name: "gateway-bench-ebpf", root_dir, ..Default::default() }],
        Toolchain::Custom("1.95.0"),
    )
    .context("building gateway-bench-ebpf: `cargo xtask setup` installs what it needs")
}
