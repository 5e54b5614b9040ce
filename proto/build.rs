//! Compiles the schema with protox: no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["stage", "inference", "operator"].map(|name| format!("proto/tercet/v1/{name}.proto"));
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".tercet.v1")
        .codec_path("crate::codec::WalkedCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
