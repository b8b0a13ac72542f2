//! Every kernel for every architecture, without a GPU: what it takes, that it spills no registers, and that
//! the assembler expects no loss of speed. The test is ignored unless the caller asks for it, as scripts/test does.

use fsdp_qlora::testing::{AttentionVariant, HalfType, Source, compile, libraries};
use half::f16;
use rayon::prelude::*;

/// Architectures that are claimed: A100, RTX 30, RTX 40, H100 (with its own instructions: sm_90a), B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// Bytes of spilled registers that a kernel may have (stores and loads, the most of any architecture), by name and
/// variant. Wide heads need all registers that a thread may have; what they spill is addresses and such, used once a
/// tile. LoRA's kernels spill on sm_100 and sm_120 alone.
const ALLOWED_SPILL_BYTES: [(&str, &str, u32); 12] = [
    ("lora_output_16_swiglu", "", 16),
    ("lora_input_16_1", "", 8),
    ("lora_input_16_3", "", 80),
    ("attention_backward_keys", "-DHEAD_DIM=128", 52),
    ("attention_backward_keys", "-DHEAD_DIM=128 -DCAPPED", 40),
    ("attention_hopper_backward_keys", "-DHEAD_DIM=128", 32),
    ("attention_forward", "-DHEAD_DIM=256", 76),
    ("attention_forward", "-DHEAD_DIM=256 -DCAPPED", 76),
    ("attention_backward_queries", "-DHEAD_DIM=256", 52),
    ("attention_backward_queries", "-DHEAD_DIM=256 -DCAPPED", 48),
    ("attention_backward_keys", "-DHEAD_DIM=256", 96),
    ("attention_backward_keys", "-DHEAD_DIM=256 -DCAPPED", 104),
];

/// One call of the compiler.
struct Call {
    arch: u32,
    act: Option<&'static str>,
    source: &'static Source,
    /// Options of the variant.
    variant: Vec<String>,
}

fn calls() -> Vec<Call> {
    let mut calls = Vec::new();
    for (arch, act) in ARCHITECTURES.into_iter().flat_map(|arch| [(arch, None), (arch, f16::COMPILE_OPTION)]) {
        let mut add = |sources: &'static [Source], variant: &[String]| {
            calls.extend(sources.iter().map(|source| Call { arch, act, source, variant: variant.to_vec() }));
        };
        add(&compile::SOURCES, &[]);
        if arch == compile::HOPPER {
            add(&compile::HOPPER_SOURCES, &[]);
        }
        AttentionVariant::all().for_each(|variant| add(variant.sources(arch), &variant.options()));
    }
    calls
}

#[test]
#[ignore = "needs NVRTC"]
fn every_kernel_compiles_without_spills() {
    libraries::load_nvrtc().unwrap();
    println!("NVRTC {}", compile::nvrtc_version().unwrap());
    let calls = calls();
    let logs: Vec<String> = calls.par_iter().map(log).collect();
    println!(
        "{:37} {:24} {:4} {:>7} {:>9} {:>13} {:>11}",
        "kernel", "variant", "act", "target", "registers", "shared bytes", "spill bytes"
    );
    let mut spilled = Vec::new();
    for (call, log) in calls.iter().zip(logs) {
        let Call { arch, act, source, variant } = call;
        let (target, variant) = (compile::target(*arch), variant.join(" "));
        // E.g. products of a warpgroup that wait for each other, because registers are short or used too early.
        assert!(!log.contains("Potential Performance Loss"), "kernels/{}.cu for {target}: {log}", source.stem);
        let mut resources = resources(&log);
        // NVRTC 13.0 keeps the assembler's report to itself; scripts/test fetches a later one, which hands it out.
        resources.sort_by(|a, b| a.name.cmp(&b.name));
        let mut expected: Vec<&str> = source.kernels.to_vec();
        expected.sort_unstable();
        let names: Vec<&str> = resources.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, expected, "kernels/{}.cu", source.stem);
        for Resources { name, registers, shared_bytes, spill_bytes } in resources {
            let allowed = ALLOWED_SPILL_BYTES.iter().find(|(n, v, _)| *n == name && *v == variant);
            let allowed = allowed.map_or(0, |(_, _, bytes)| *bytes);
            let act = if act.is_some() { "fp16" } else { "bf16" };
            println!("{name:37} {variant:24} {act} {target:>7} {registers:9} {shared_bytes:13} {spill_bytes:11}");
            if spill_bytes > allowed {
                spilled.push(format!("{name} {variant} for {target}: {spill_bytes} bytes, allowed {allowed}"));
            }
        }
    }
    assert!(spilled.is_empty(), "spilled registers: {}", spilled.join("; "));
}

/// Returns the assembler's log of a call.
fn log(call: &Call) -> String {
    let options: Vec<String> = call.act.map(String::from).into_iter().chain(call.variant.clone()).collect();
    compile::compile(call.source, call.arch, &options).unwrap().log
}

/// Registers, shared memory and spilled bytes of each kernel, from the assembler's report.
fn resources(log: &str) -> Vec<Resources> {
    let number_before = |line: &str, what: &str| -> Option<u32> {
        let end = line.find(what)?;
        line[..end].trim_end().rsplit([' ', ',']).next()?.parse().ok()
    };
    let mut all: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_string();
            all.push(Resources { name, ..Resources::default() });
        } else if let Some(last) = all.last_mut() {
            if let Some(bytes) = number_before(line, "bytes spill stores") {
                last.spill_bytes = bytes + number_before(line, "bytes spill loads").unwrap_or(0);
            }
            if let Some(registers) = number_before(line, "registers") {
                last.registers = registers;
                last.shared_bytes = number_before(line, "bytes smem").unwrap_or(0);
            }
        }
    }
    assert!(all.iter().all(|r| r.registers > 0), "the assembler's report is not understood:\n{log}");
    all
}

/// Registers and memory of one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Resources {
    name: String,
    registers: u32,
    shared_bytes: u32,
    /// Stores and loads.
    spill_bytes: u32,
}
