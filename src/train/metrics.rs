//! metrics.jsonl: one object a step.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

/// One line of a training step; the names are part of the file's format.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    pub step: usize,
    pub epoch: f64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub num_target_tokens: u64,
    pub tokens_per_second: f64,
    pub step_ms: f64,
    pub compute_ms: f64,
    pub gather_wait_ms: f64,
    /// Host to device and back; 0 where the device is the host.
    pub copy_wait_ms: f64,
    /// Of fp16 only. A step whose `grad_norm` is null overflowed and updated nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    pub peak_device_bytes: usize,
    pub peak_host_bytes: usize,
}

/// One line of an evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct EvalMetrics {
    pub step: usize,
    pub epoch: f64,
    pub eval_loss: f64,
    pub num_target_tokens: u64,
}

/// The file, of a run that begins.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    pub fn create(dir: &Path) -> Result<MetricsFile> {
        let path = dir.join("metrics.jsonl");
        let file = File::create(&path).with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(MetricsFile { path, file })
    }

    /// Appends one line, whole.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        self.file.write_all(&bytes).with_context(|| format!("{}: cannot be written", self.path.display()))
    }
}

/// Largest resident memory of this process so far (VmHWM), in bytes; 0 where /proc does not tell.
pub fn peak_host_bytes() -> usize {
    kib_of("/proc/self/status", "VmHWM:") * 1024
}

/// Resident memory of this process now, its share of what it shares with others (Pss), and the part of that which is page cache
/// (mapped files, the program's own among them), in bytes; 0 where /proc does not tell.
pub fn pss_bytes() -> (usize, usize) {
    let of = |name| kib_of("/proc/self/smaps_rollup", name) * 1024;
    (of("Pss:"), of("Pss_File:"))
}

fn kib_of(path: &str, name: &str) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(name));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
