//! Writes metrics.jsonl, one object per step.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::checkpoint::atomic;
use crate::checkpoint::output::{METRICS_FILE, is_at};

use super::log::Log;

/// One line of a training step; the names are part of the file's format.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    pub step: usize,
    pub epoch: f64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// The learning rate of the matrices B; written with LoRA+ only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate_b: Option<f64>,
    pub num_target_tokens: u64,
    pub tokens_per_second: f64,
    /// Share of its GPU's rate of large matrix products that rank 0 reached, see `plan::ceiling`; written on GPUs whose
    /// rate is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ceiling_share: Option<f64>,
    pub step_ms: f64,
    pub compute_ms: f64,
    pub gather_wait_ms: f64,
    /// Waits for copies between host and device; 0 if the device is the host.
    pub copy_wait_ms: f64,
    /// Written for fp16 only. A step whose `grad_norm` alone is null overflowed and made no update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    /// Number of steps so far that were skipped because their loss or gradient was not finite; written from the first
    /// one on.
    #[serde(skip_serializing_if = "is_zero")]
    pub skipped_steps: usize,
    pub peak_device_bytes: usize,
    pub peak_host_bytes: usize,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// One line of an evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct EvalMetrics {
    pub step: usize,
    pub epoch: f64,
    pub eval_loss: f64,
    pub num_target_tokens: u64,
}

/// The last line of a run that looks for its best adapter.
#[derive(Clone, Debug, Serialize)]
pub struct BestMetrics {
    /// The last step of the run.
    pub step: usize,
    pub epoch: f64,
    /// Step whose adapter the result is, and the held-out loss after it.
    pub adapter_step: usize,
    pub best_eval_loss: f64,
}

/// The metrics file of a run. All lines, some hundred bytes per step, stay in memory: if the file is removed or
/// cannot be written, training goes on, and the lines are written with the result.
pub struct MetricsFile {
    path: PathBuf,
    file: Option<File>,
    lines: Vec<u8>,
    /// Number of bytes of `lines` that are in the file.
    written: usize,
    has_failed: bool,
    log: Log,
}

impl MetricsFile {
    /// Makes a file that begins with these lines: those of the run that goes on, or none.
    pub fn create(dir: &Path, lines: Vec<u8>, log: Log) -> Result<MetricsFile> {
        let path = dir.join(METRICS_FILE);
        atomic::write(&path, &lines)?;
        let file = File::options().write(true).open(&path).with_context(|| path.display().to_string())?;
        Ok(MetricsFile { path, file: Some(file), written: lines.len(), lines, has_failed: false, log })
    }

    /// Appends one line. If the file cannot be written, this is reported once and tried again with the next line.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.lines, line)?;
        self.lines.push(b'\n');
        let result = self.flush().with_context(|| format!("{}: cannot be written", self.path.display()));
        if let Err(error) = &result
            && !self.has_failed
        {
            self.log.warn(format!("{error:#}; training goes on, and the lines will come with the adapter"));
        }
        self.has_failed = result.is_err();
        Ok(())
    }

    /// Returns all lines so far.
    pub fn lines(&self) -> &[u8] {
        &self.lines
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let file = match self.file.take().filter(|file| is_at(file, &self.path)) {
            Some(file) => file,
            None => {
                if let Some(dir) = self.path.parent() {
                    std::fs::create_dir_all(dir)?;
                }
                self.written = 0;
                let file = File::create(&self.path)?;
                self.log.warn(format!("{}: was removed during the run, and is made again", self.path.display()));
                file
            }
        };
        let result = file.write_all_at(&self.lines[self.written..], self.written as u64);
        // If the disk is full, half a line is cut off again; the next line tries again from there.
        let end = if result.is_ok() { self.lines.len() } else { self.written };
        let _ = file.set_len(end as u64);
        (self.file, self.written) = (Some(file), end);
        result
    }
}

/// Returns the largest resident memory of this process so far (VmHWM), in bytes; 0 if /proc does not show it.
pub fn peak_host_bytes() -> usize {
    kib_of("/proc/self/status", "VmHWM:") * 1024
}

/// Returns the resident memory of this process now, with its part of shared pages (Pss), and how much of it is page
/// cache (mapped files, the program's own among them), in bytes; 0 if /proc does not show it.
pub fn pss_bytes() -> (usize, usize) {
    let of = |name| kib_of("/proc/self/smaps_rollup", name) * 1024;
    (of("Pss:"), of("Pss_File:"))
}

fn kib_of(path: &str, name: &str) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(name));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_file_that_is_removed_is_made_again_with_all_lines() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("out");
        std::fs::create_dir(&dir).unwrap();
        let mut metrics = MetricsFile::create(&dir, Vec::new(), Log { enabled: false }).unwrap();
        metrics.write(&1).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        metrics.write(&2).unwrap();
        assert_eq!(text(&dir.join(METRICS_FILE)), "1\n2\n");
        // A file stands in the folder's place: no line is lost, and nothing fails.
        std::fs::remove_dir_all(&dir).unwrap();
        std::fs::write(&dir, "").unwrap();
        metrics.write(&3).unwrap();
        assert_eq!(metrics.lines(), b"1\n2\n3\n");
        std::fs::remove_file(&dir).unwrap();
        metrics.write(&4).unwrap();
        assert_eq!(text(&dir.join(METRICS_FILE)), "1\n2\n3\n4\n");
    }
}
