//! Compiles the .proto files with protox, so that no `protoc` has to be on the machine.

use anyhow::Context as _;

const FILES: [&str; 4] = ["common", "gateway", "migrator", "controller"];

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let files = FILES.map(|f| format!("handover/v1/{f}.proto"));
    let descriptors = protox::compile(&files, ["proto"]).context("proto/handover/v1")?;
    tonic_prost_build::configure()
        // images are handed on without being copied
        .bytes(".handover.v1.ImageChunk.data")
        .field_attribute(".handover.v1.ImageChunk.data", "#[serde(skip)]")
        .bytes(".handover.v1.PageBytes.data")
        .field_attribute(".handover.v1.PageBytes.data", "#[serde(skip)]")
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .compile_fds(descriptors)
        .context("generating Rust from proto/handover/v1")
}
