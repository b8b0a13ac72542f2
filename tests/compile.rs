//! Every kernel for every architecture, without a GPU: what it takes, that it spills no registers, and that
//! the assembler expects no loss of speed. Without NVRTC the test says so and passes, unless REQUIRE_NVRTC=1.

use fsdp_qlora::device::cuda::{HalfType, compile, libraries};
use half::f16;

/// Architectures that are claimed: A100, RTX 30, RTX 40, H100 (with its own instructions: sm_90a), B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// Bytes of spilled registers that a kernel may have (stores and loads, the most of any architecture).
const ALLOWED_SPILL_BYTES: [(&str, u32); 2] =
    [("attention_backward_keys_128", 36), ("attention_hopper_backward_keys_128", 24)];

#[test]
fn every_kernel_compiles_without_spills() {
    let required = std::env::var("REQUIRE_NVRTC").is_ok_and(|v| v == "1");
    if let Err(error) = libraries::load_nvrtc() {
        assert!(!required, "REQUIRE_NVRTC=1: {error:#}");
        eprintln!("skipped: no NVRTC: {error:#}");
        return;
    }
    println!("NVRTC {}", compile::nvrtc_version().unwrap());
    println!(
        "{:37} {:4} {:>7} {:>9} {:>13} {:>11}",
        "kernel", "act", "target", "registers", "shared bytes", "spill bytes"
    );
    let mut spilled = Vec::new();
    for (arch, option) in
        ARCHITECTURES.into_iter().flat_map(|arch| [(arch, None), (arch, <f16 as HalfType>::COMPILE_OPTION)])
    {
        let target = compile::target(arch);
        for source in compile::sources(arch) {
            let log = compile::compile(source, arch, option).unwrap().log;
            // E.g. products of a warpgroup that wait for each other, because registers are short or used too early.
            assert!(!log.contains("Potential Performance Loss"), "kernels/{}.cu for {target}: {log}", source.stem);
            let mut resources = resources(&log);
            if resources.is_empty() && !required {
                // NVRTC 13.0 keeps the assembler's report to itself; later ones hand it out.
                continue;
            }
            resources.sort_by(|a, b| a.name.cmp(&b.name));
            let mut expected: Vec<&str> = source.kernels.to_vec();
            expected.sort_unstable();
            assert_eq!(
                resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(),
                expected,
                "kernels/{}.cu",
                source.stem
            );
            for r in resources {
                let allowed =
                    ALLOWED_SPILL_BYTES.iter().find(|(name, _)| *name == r.name).map_or(0, |(_, bytes)| *bytes);
                let act = if option.is_some() { "fp16" } else { "bf16" };
                println!(
                    "{:37} {act} {target:>7} {:9} {:13} {:11}",
                    r.name, r.registers, r.shared_bytes, r.spill_bytes
                );
                if r.spill_bytes > allowed {
                    spilled.push(format!("{} for {target}: {} bytes, allowed {allowed}", r.name, r.spill_bytes));
                }
            }
        }
    }
    assert!(spilled.is_empty(), "spilled registers: {}", spilled.join("; "));
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

/// What one kernel takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Resources {
    name: String,
    registers: u32,
    shared_bytes: u32,
    /// Stores and loads.
    spill_bytes: u32,
}
