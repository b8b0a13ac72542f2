//! Faults on purpose, for tests of how a job ends: `FSDP_QLORA_FAULT=panic|error|abort|hang:RANK:STEP`.

use anyhow::{Context, Result, bail};

/// Panics, fails, dies without a word, or stands still when the variable asks for it at this rank and step.
pub fn inject(rank: usize, step: usize) -> Result<()> {
    let Ok(fault) = std::env::var("FSDP_QLORA_FAULT") else { return Ok(()) };
    let parts: Vec<&str> = fault.split(':').collect();
    let [kind, at_rank, at_step] = parts[..] else {
        bail!("FSDP_QLORA_FAULT is {fault:?}; allowed: panic|error|abort|hang:RANK:STEP")
    };
    let number = |text: &str| text.parse::<usize>().with_context(|| format!("FSDP_QLORA_FAULT: {text:?} is no number"));
    if (number(at_rank)?, number(at_step)?) != (rank, step) {
        return Ok(());
    }
    match kind {
        "panic" => panic!("a panic was asked for by FSDP_QLORA_FAULT"),
        "error" => bail!("an error was asked for by FSDP_QLORA_FAULT"),
        "abort" => std::process::abort(),
        "hang" => loop {
            std::thread::park();
        },
        other => bail!("FSDP_QLORA_FAULT: {other:?}; allowed: panic, error, abort, hang"),
    }
}
