//! The kernels: compiled by NVRTC to machine code of one architecture, and kept in a folder for the next start.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use cudarc::nvrtc;
use xxhash_rust::xxh3::xxh3_64;

/// `kernels/*.cu` by stem, with the names of what they define.
pub const SOURCES: [(&str, &str, &[&str]); 10] = [
    ("adamw", include_str!("../../../kernels/adamw.cu"), &["adamw"]),
    (
        "attention",
        include_str!("../../../kernels/attention.cu"),
        &[
            "attention_delta",
            "attention_forward_64",
            "attention_forward_96",
            "attention_forward_128",
            "attention_backward_queries_64",
            "attention_backward_queries_96",
            "attention_backward_queries_128",
            "attention_backward_keys_64",
            "attention_backward_keys_96",
            "attention_backward_keys_128",
            "attention_sum_heads",
        ],
    ),
    (
        "cross_entropy",
        include_str!("../../../kernels/cross_entropy.cu"),
        &["cross_entropy_piece", "gather_target_rows", "cross_entropy_finish"],
    ),
    (
        "elementwise",
        include_str!("../../../kernels/elementwise.cu"),
        &["add", "add_bias", "cast", "gather_rows", "scatter_rows", "sum_parts", "sum_of_squares", "spin"],
    ),
    ("lora_dropout", include_str!("../../../kernels/lora_dropout.cu"), &["lora_dropout"]),
    (
        "nf4",
        include_str!("../../../kernels/nf4.cu"),
        &["dequantize_nf4", "dequantize_nf4_f32", "convert", "convert_f32", "quantize_nf4", "quantize_absmax"],
    ),
    ("rms_norm", include_str!("../../../kernels/rms_norm.cu"), &["rms_norm_forward", "rms_norm_backward"]),
    ("rope", include_str!("../../../kernels/rope.cu"), &["rope"]),
    ("swiglu", include_str!("../../../kernels/swiglu.cu"), &["swiglu_forward", "swiglu_backward"]),
    ("uniform", include_str!("../../../kernels/uniform.cu"), &["uniform"]),
];

const COMMON: &str = include_str!("../../../kernels/common.cuh");

/// Machine code, and what the assembler says about registers and memory.
pub struct Cubin {
    pub code: Vec<u8>,
    pub log: String,
}

/// Compiles one source for `sm_<arch>`, with one more option when there is one. NVRTC must be loaded.
pub fn compile(stem: &str, source: &str, arch: u32, option: Option<&str>) -> Result<Cubin> {
    let text = std::ffi::CString::new(source.replace("#include \"common.cuh\"", COMMON))?;
    let name = std::ffi::CString::new(format!("{stem}.cu"))?;
    let mut options = vec![
        format!("--gpu-architecture=sm_{arch}"),
        "-std=c++17".into(),
        "-default-device".into(),
        "--ptxas-options=-v".into(),
    ];
    options.extend(option.map(String::from));
    let program = nvrtc::result::create_program(&text, Some(&name)).map_err(|e| anyhow!("NVRTC: {e:?}"))?;
    // SAFETY: the program is valid until it is destroyed below.
    let (compiled, log) = unsafe {
        let compiled = nvrtc::result::compile_program(program, &options);
        let log = nvrtc::result::get_program_log(program).unwrap_or_default();
        (compiled, log.iter().map(|&c| c as u8 as char).collect::<String>())
    };
    compiled.map_err(|e| anyhow!("kernels/{stem}.cu for sm_{arch}: {e:?}\n{log}"))?;
    let mut len = 0;
    // SAFETY: as above; the buffer is as long as NVRTC says that the code is.
    let code = unsafe {
        nvrtc::sys::nvrtcGetCUBINSize(program, &mut len).result().map_err(|e| anyhow!("NVRTC: {e:?}"))?;
        let mut code = vec![0u8; len];
        nvrtc::sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result().map_err(|e| anyhow!("NVRTC: {e:?}"))?;
        nvrtc::result::destroy_program(program).map_err(|e| anyhow!("NVRTC: {e:?}"))?;
        code
    };
    Ok(Cubin { code, log })
}

/// Version of NVRTC, e.g. 13.0.
pub fn nvrtc_version() -> Result<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| anyhow!("NVRTC: {e:?}"))?;
    Ok(format!("{major}.{minor}"))
}

/// The code of one source, from the folder or compiled. One process compiles while the others wait for its lock; a file that
/// is damaged is made anew.
pub fn cached(folder: &Path, stem: &str, source: &str, arch: u32, option: Option<&str>) -> Result<Vec<u8>> {
    let key = xxh3_64(format!("{COMMON}\0{source}\0{arch}\0{option:?}\0{}", nvrtc_version()?).as_bytes());
    let path = folder.join(format!("{stem}-sm_{arch}-{key:016x}.cubin"));
    if let Some(code) = read(&path) {
        return Ok(code);
    }
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let lock = File::create(folder.join("lock")).with_context(|| folder.display().to_string())?;
    lock.lock().with_context(|| folder.display().to_string())?;
    if let Some(code) = read(&path) {
        return Ok(code);
    }
    let code = compile(stem, source, arch, option)?.code;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&xxh3_64(&code).to_le_bytes())?;
    file.write_all(&code)?;
    file.persist(&path).with_context(|| path.display().to_string())?;
    Ok(code)
}

/// A file's code when its checksum is right.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let code = bytes.split_off(8.min(bytes.len()));
    (bytes == xxh3_64(&code).to_le_bytes()).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_entry_of_the_cache_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.cubin");
        let mut bytes = xxh3_64(b"code").to_le_bytes().to_vec();
        bytes.extend(b"code");
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), Some(b"code".to_vec()));
        for damaged in [&bytes[..11], &bytes[..3], b"", b"12345678code"] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path), None, "{damaged:?}");
        }
        assert_eq!(read(&dir.path().join("absent")), None);
    }
}
