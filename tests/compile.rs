//! Every kernel for every architecture, without a GPU: what it takes, and that it spills no registers. Without NVRTC the test says so
//! and passes, unless REQUIRE_NVRTC=1.

use fsdp_qlora::device::cuda::{HalfType, compile, libraries};
use half::f16;

/// Architectures that are claimed: A100, RTX 30, RTX 40, H100, B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// Bytes of spilled registers that a kernel may have (stores and loads, the most of any architecture).
const ALLOWED_SPILL_BYTES: [(&str, u32); 1] = [("attention_backward_keys_128", 36)];

#[test]
fn every_kernel_compiles_without_spills() {
    let required = std::env::var("REQUIRE_NVRTC").is_ok_and(|v| v == "1");
    if let Err(error) = libraries::load_nvrtc() {
        assert!(!required, "REQUIRE_NVRTC=1: {error:#}");
        eprintln!("skipped: no NVRTC: {error:#}");
        return;
    }
    println!("NVRTC {}", compile::nvrtc_version().unwrap());
    println!("{:34} {:4} {:>6} {:>9} {:>13} {:>11}", "kernel", "act", "sm", "registers", "shared bytes", "spill bytes");
    let mut spilled = Vec::new();
    for (stem, source, names) in compile::SOURCES {
        for (arch, option) in
            ARCHITECTURES.into_iter().flat_map(|arch| [(arch, None), (arch, <f16 as HalfType>::COMPILE_OPTION)])
        {
            let mut resources = resources(&compile::compile(stem, source, arch, option).unwrap().log);
            if resources.is_empty() && !required {
                // NVRTC 13.0 keeps the assembler's report to itself; later ones hand it out.
                continue;
            }
            resources.sort_by(|a, b| a.name.cmp(&b.name));
            let mut expected: Vec<&str> = names.to_vec();
            expected.sort_unstable();
            assert_eq!(resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), expected, "kernels/{stem}.cu");
            for r in resources {
                let allowed =
                    ALLOWED_SPILL_BYTES.iter().find(|(name, _)| *name == r.name).map_or(0, |(_, bytes)| *bytes);
                let act = if option.is_some() { "fp16" } else { "bf16" };
                println!("{:34} {act} {arch:6} {:9} {:13} {:11}", r.name, r.registers, r.shared_bytes, r.spill_bytes);
                if r.spill_bytes > allowed {
                    spilled.push(format!("{} for sm_{arch}: {} bytes, allowed {allowed}", r.name, r.spill_bytes));
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
