//! The kernels: compiled by NVRTC to machine code of one architecture, and kept in a folder for the next start.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use cudarc::nvrtc;
use xxhash_rust::xxh3::xxh3_64;

/// Compute capability of Hopper. Its own instructions (wgmma, setmaxnreg) are in machine code for `sm_90a` alone.
pub const HOPPER: u32 = 90;

/// One file of `kernels/`.
pub struct Source {
    pub stem: &'static str,
    pub text: &'static str,
    /// The kernels that it defines.
    pub kernels: &'static [&'static str],
}

/// The file of a stem with the kernels that it defines.
macro_rules! source {
    ($stem:literal, $kernels:expr) => {
        Source { stem: $stem, text: include_str!(concat!("../../../kernels/", $stem, ".cu")), kernels: &$kernels }
    };
}

/// The files that every GPU runs, compiled once.
pub static SOURCES: [Source; 11] = [
    source!("adamw", ["adamw"]),
    source!("cross_entropy", ["cross_entropy_piece", "gather_target_rows", "cross_entropy_finish"]),
    source!("elementwise", ["add", "add_bias", "add_scalar", "cast", "sum_parts", "sum_of_squares", "spin"]),
    source!("gated", ["swiglu_forward", "swiglu_backward", "geglu_forward", "geglu_backward"]),
    source!(
        "lora",
        [
            "lora_dropout",
            "lora_down_8_1",
            "lora_down_8_2",
            "lora_down_8_3",
            "lora_down_16_1",
            "lora_down_16_2",
            "lora_down_16_3",
            "lora_down_32_1",
            "lora_down_64_1",
        ]
    ),
    source!(
        "lora_backward",
        [
            "lora_input_8_1",
            "lora_input_8_2",
            "lora_input_8_3",
            "lora_input_16_1",
            "lora_input_16_2",
            "lora_input_16_3",
            "lora_input_32_1",
            "lora_input_64_1",
            "lora_input_8_gated",
            "lora_input_16_gated",
            "lora_input_32_gated",
            "lora_input_64_gated",
            "lora_add_input",
            "lora_output_8",
            "lora_output_16",
            "lora_output_32",
            "lora_output_8_swiglu",
            "lora_output_16_swiglu",
            "lora_output_32_swiglu",
            "lora_output_8_geglu",
            "lora_output_16_geglu",
            "lora_output_32_geglu",
            "lora_add_output",
        ]
    ),
    source!(
        "nf4",
        ["dequantize_nf4", "dequantize_nf4_f32", "convert", "convert_f32", "quantize_nf4", "quantize_absmax"]
    ),
    source!("rms_norm", ["rms_norm_forward", "rms_norm_backward"]),
    source!("rows", ["gather_rows", "scatter_rows"]),
    source!("rope", ["rope"]),
    source!("uniform", ["uniform"]),
];

/// The files that a Hopper runs besides.
pub static HOPPER_SOURCES: [Source; 1] = [source!(
    "lora_hopper",
    ["lora_linear_hopper_16", "lora_linear_hopper", "lora_gated_hopper_16", "lora_gated_hopper"]
)];

/// Attention's file for all GPUs, and those for Hopper.
static ATTENTION: [Source; 1] = [source!(
    "attention",
    [
        "attention_delta",
        "attention_forward",
        "attention_backward_queries",
        "attention_backward_keys",
        "attention_sum_heads",
    ]
)];
static HOPPER_ATTENTION: [Source; 2] = [
    source!("attention_hopper_forward", ["attention_hopper_forward"]),
    source!(
        "attention_hopper_backward",
        ["attention_hopper_backward_queries", "attention_hopper_backward_keys", "attention_sum_heads"]
    ),
];

/// Widths of a head that attention's kernels are written for.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// Attention's files are compiled for one width of heads, with or without a cap on scores, when a model needs them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionVariant {
    /// One of [`HEAD_DIMS`].
    pub head_dim: usize,
    pub capped: bool,
}

impl AttentionVariant {
    /// All that there are.
    pub fn all() -> impl Iterator<Item = AttentionVariant> {
        HEAD_DIMS.into_iter().flat_map(|head_dim| [false, true].map(|capped| AttentionVariant { head_dim, capped }))
    }

    /// Returns true if Hopper's own kernels do it. The others run there too, at the speed of an older GPU.
    pub fn has_hopper_kernels(self) -> bool {
        self.head_dim <= 128 && !self.capped
    }

    /// The files that a GPU of this architecture runs.
    pub fn sources(self, arch: u32) -> &'static [Source] {
        if arch == HOPPER && self.has_hopper_kernels() { &HOPPER_ATTENTION } else { &ATTENTION }
    }

    /// Options of the compiler.
    pub fn options(self) -> Vec<String> {
        let capped = self.capped.then(|| "-DCAPPED".to_string());
        [format!("-DHEAD_DIM={}", self.head_dim)].into_iter().chain(capped).collect()
    }
}

/// The headers that the files include, by name.
const HEADERS: [(&CStr, &str); 8] = [
    (c"common.cuh", include_str!("../../../kernels/common.cuh")),
    (c"attention.cuh", include_str!("../../../kernels/attention.cuh")),
    (c"attention_sum.cuh", include_str!("../../../kernels/attention_sum.cuh")),
    (c"attention_hopper.cuh", include_str!("../../../kernels/attention_hopper.cuh")),
    (c"gated.cuh", include_str!("../../../kernels/gated.cuh")),
    (c"hopper.cuh", include_str!("../../../kernels/hopper.cuh")),
    (c"rope.cuh", include_str!("../../../kernels/rope.cuh")),
    (c"lora.cuh", include_str!("../../../kernels/lora.cuh")),
];

/// Target that machine code of an architecture is made for.
pub fn target(arch: u32) -> String {
    format!("sm_{arch}{}", if arch == HOPPER { "a" } else { "" })
}

/// Machine code, and what the assembler says about registers and memory.
pub struct Cubin {
    pub code: Vec<u8>,
    pub log: String,
}

/// Compiles one source for an architecture, with more options. NVRTC must be loaded.
pub fn compile(source: &Source, arch: u32, more_options: &[String]) -> Result<Cubin> {
    let stem = source.stem;
    let (text, name) = (CString::new(source.text)?, CString::new(format!("{stem}.cu"))?);
    let headers = HEADERS.iter().map(|(_, text)| CString::new(*text)).collect::<Result<Vec<_>, _>>()?;
    let header_texts: Vec<_> = headers.iter().map(|text| text.as_ptr()).collect();
    let header_names: Vec<_> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
    let target = target(arch);
    let mut options = vec![
        format!("--gpu-architecture={target}"),
        "-std=c++17".into(),
        "-default-device".into(),
        "--ptxas-options=-v".into(),
    ];
    options.extend_from_slice(more_options);
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings end with a zero and outlive the call; there are as many headers as names.
    let created = unsafe {
        nvrtc::sys::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        )
    };
    created.result().map_err(|e| anyhow!("NVRTC: {e:?}"))?;
    // SAFETY: the program is valid until it is destroyed below.
    let (compiled, log) = unsafe {
        let compiled = nvrtc::result::compile_program(program, &options);
        let log = nvrtc::result::get_program_log(program).unwrap_or_default();
        (compiled, log.iter().map(|&c| c as u8 as char).collect::<String>())
    };
    compiled.map_err(|e| anyhow!("kernels/{stem}.cu for {target}: {e:?}\n{log}"))?;
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
pub fn cached(folder: &Path, source: &Source, arch: u32, options: &[String]) -> Result<Vec<u8>> {
    let (stem, text) = (source.stem, source.text);
    let key = xxh3_64(format!("{HEADERS:?}\0{text}\0{arch}\0{options:?}\0{}", nvrtc_version()?).as_bytes());
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
    let code = compile(source, arch, options)?.code;
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
