//! Compares predictions with measured runs, and fits the shares of a card's rates that explain the runs best.

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;

use crate::checkpoint::synthetic;
use crate::device::cuda::Cuda;
use crate::fsdp::memory::{Limits, Residency};
use crate::fsdp::schedule::{Keep, Mode};
use crate::model::shapes;
use crate::model::spec::ModelSpec;
use crate::model::targets::{LoraKeys, Modules};
use crate::model::trainable::{LoraConfig, Trainables};
use crate::quant::record::Dtype;

use super::hardware::{Hardware, Reached};
use super::memory::Sizes;
use super::throughput::{Links, Workload};

/// A run of `bench step`: the line that it printed, with measurements from outside the program if there were any.
#[derive(Clone, Debug, Deserialize)]
pub struct MeasuredRun {
    shape: String,
    layers: usize,
    micro_batch: usize,
    seq: usize,
    accum: usize,
    world_size: usize,
    ranks_per_gpu: usize,
    num_shards: usize,
    dropout: f32,
    accumulation: String,
    gather: String,
    keep: Keep,
    residency: Residency,
    /// Absent in old lines, when no layer kept its dense weights.
    #[serde(default)]
    dense_layers: usize,
    step_ms: f64,
    pss_bytes_of_all_ranks: f64,
    /// Part of the host bytes that is mapped files; absent in old lines.
    page_cache_bytes_of_all_ranks: Option<f64>,
    /// Peak that NVML showed, in MiB for one rank.
    nvml_mib: Option<f64>,
    #[serde(default)]
    job: MeasuredJob,
}

/// Keys of a run's job; old lines lack the newer ones.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct MeasuredJob {
    #[serde(rename = "lora.r")]
    lora_r: usize,
    #[serde(rename = "lora.target_modules")]
    target_modules: serde_json::Value,
    #[serde(rename = "quantization.load_in_4bit")]
    load_in_4bit: bool,
    #[serde(rename = "quantization.bnb_4bit_use_double_quant")]
    double_quant: Option<bool>,
}

impl Default for MeasuredJob {
    fn default() -> Self {
        Self { lora_r: 16, target_modules: "all-linear".into(), load_in_4bit: true, double_quant: None }
    }
}

impl MeasuredJob {
    fn nf4_double_quant(&self) -> Option<bool> {
        self.load_in_4bit.then_some(self.double_quant.unwrap_or(true))
    }

    fn lora(&self, spec: &ModelSpec, dropout: f32) -> Result<LoraConfig> {
        let targets = Modules::read(&self.target_modules).context("lora.target_modules")?;
        Ok(LoraConfig { dropout, layers: LoraKeys::uniform(self.lora_r, 1.0, targets).modules(spec)? })
    }
}

/// Ratios of predicted to measured values.
#[derive(Clone, Copy, Debug)]
pub struct Ratios {
    pub time: f64,
    pub device: Option<f64>,
    /// Host memory, page cache not counted.
    pub host: Option<f64>,
}

impl MeasuredRun {
    /// Reads runs from lines of JSON.
    pub fn read(text: &str) -> Result<Vec<MeasuredRun>> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(i, line)| {
                let run: MeasuredRun = serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
                let MeasuredRun { layers, micro_batch, seq, accum, num_shards, world_size, ranks_per_gpu, .. } = run;
                let counts = [layers, micro_batch, seq, accum, num_shards, world_size, ranks_per_gpu, run.job.lora_r];
                ensure!(
                    !counts.contains(&0) && world_size.is_multiple_of(num_shards) && run.step_ms > 0.0,
                    "line {}: not a run of `bench step`",
                    i + 1
                );
                Ok(run)
            })
            .collect()
    }

    /// Calls `f` with the workload and limits that this run has on the given hardware.
    fn with_workload<T>(&self, hardware: &Hardware, f: impl FnOnce(&Workload<'_>, &Limits) -> Result<T>) -> Result<T> {
        let hardware = &hardware.shared_by(self.ranks_per_gpu);
        let spec =
            shapes::named(&self.shape, Some(self.layers)).context("only runs of a named shape can be compared")?;
        let layouts = synthetic::layouts(&spec, self.job.nf4_double_quant(), self.num_shards)?;
        let trainables = Trainables::new(&spec, self.job.lora(&spec, self.dropout)?);
        let world_size = self.world_size;
        let sizes = Sizes { spec: &spec, layouts: &layouts, trainables: Some(&trainables), world_size };
        let links = Links::new(hardware, true, true, hardware.peer_bytes_per_s);
        let limits = Limits {
            max_length: self.seq,
            accumulation: self.accumulation.parse().map_err(|()| anyhow!("accumulation: {}", self.accumulation))?,
            gather: self.gather.parse().map_err(|()| anyhow!("gather: {}", self.gather))?,
            keep: self.keep,
            residency: self.residency,
            dense_layers: self.dense_layers,
            ..Limits::new(Mode::Train, self.micro_batch * self.seq, self.accum)
        };
        f(&Workload { sizes, act: Dtype::Bf16, hardware, links }, &limits)
    }

    fn predicted_seconds(&self, hardware: &Hardware) -> Result<f64> {
        self.with_workload(hardware, |workload, limits| Ok(workload.predict(limits).seconds))
    }

    fn time_ratio(&self, hardware: &Hardware) -> Result<f64> {
        Ok(self.predicted_seconds(hardware)? / (self.step_ms * 1e-3))
    }

    pub fn compare(&self, hardware: &Hardware) -> Result<Ratios> {
        let (device_bytes, host_bytes) = self.with_workload(hardware, |workload, limits| {
            let (sizes, cost) = (workload.sizes, workload.sizes.cost::<Cuda<half::bf16>>(limits)?);
            let libraries = hardware.library_bytes(sizes.num_communicators(), self.ranks_per_gpu);
            let embedding = synthetic::embedding_bytes(sizes.spec);
            let process = sizes.process_bytes(self.ranks_per_gpu, embedding);
            Ok((cost.device_bytes() + libraries, cost.host_bytes() + process))
        })?;
        let host_bytes = (host_bytes * self.world_size) as f64;
        Ok(Ratios {
            time: self.time_ratio(hardware)?,
            device: self.nvml_mib.map(|mib| device_bytes as f64 / (mib * f64::from(1 << 20))),
            host: self.page_cache_bytes_of_all_ranks.map(|cached| host_bytes / (self.pss_bytes_of_all_ranks - cached)),
        })
    }

    /// Returns a short description of the run.
    pub fn name(&self) -> String {
        let MeasuredRun { shape, layers, micro_batch, seq, accum, world_size, gather, keep, residency, .. } = self;
        format!(
            "{shape} {layers} layers, {world_size} x {accum} x {micro_batch} x {seq}, {gather}, {} units, {} boundaries, keeps {}/{}/{}/{}, {} dense",
            residency.units,
            residency.boundary_buffers,
            keep.lora,
            keep.attention,
            keep.mlp,
            keep.rest,
            self.dense_layers
        )
    }
}

/// Weight of a run's error relative to a share's change from its earlier value.
const TRUST: f64 = 100.0;

/// Largest share of its rates that a card is assumed to reach.
const MOST: f64 = 1.2;

/// Returns the hardware with the shares of its rates that explain the times of the runs best, by least squares of
/// logarithms. Changes of the shares count as well, because a few runs do not determine them all. The search takes
/// smaller and smaller steps.
pub fn fit(hardware: &Hardware, runs: &[MeasuredRun]) -> Result<Hardware> {
    let before = hardware.reached;
    let error = |hardware: &Hardware| -> Result<f64> {
        let Reached { products, memory, kernel_seconds, .. } = hardware.reached;
        let moved = [products / before.products, memory / before.memory, kernel_seconds / before.kernel_seconds];
        let moved: f64 = moved.iter().map(|ratio| ratio.ln().powi(2)).sum();
        let errors = runs.iter().map(|run| Ok(run.time_ratio(hardware)?.ln().powi(2)));
        Ok(moved + TRUST * errors.sum::<Result<f64>>()?)
    };
    let (mut best, mut least, mut step) = (hardware.clone(), error(hardware)?, 1.2f64);
    while step > 1.0005 {
        let mut better = None;
        let factors = [1.0 / step, 1.0, step];
        for (products, memory) in factors.into_iter().flat_map(|p| factors.map(|m| (p, m))) {
            for kernel in factors {
                let mut tried = best.clone();
                tried.reached.products *= products;
                tried.reached.memory *= memory;
                tried.reached.kernel_seconds *= kernel;
                let found = error(&tried)?;
                if found < better.as_ref().map_or(least, |(error, _)| *error) {
                    better = Some((found, tried));
                }
            }
        }
        match better {
            Some((error, hardware)) => (least, best) = (error, hardware),
            None => step = step.sqrt(),
        }
    }
    let Reached { products, memory, .. } = best.reached;
    ensure!(
        products <= MOST && memory <= MOST,
        "these runs are not of {}: products would reach {products:.2} of its rate, memory {memory:.2}",
        hardware.name
    );
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::ModuleId;

    /// Runs whose times are the predictions of `hardware`.
    fn runs(hardware: &Hardware) -> Vec<MeasuredRun> {
        let run = |shape: &str, layers: usize, seq: usize, keep: Keep| {
            let mut run = MeasuredRun {
                shape: shape.into(),
                layers,
                micro_batch: 1,
                seq,
                accum: 2,
                world_size: 1,
                ranks_per_gpu: 1,
                num_shards: 1,
                dropout: 0.05,
                accumulation: "layer".into(),
                gather: "nccl".into(),
                keep,
                residency: Residency::ALL,
                dense_layers: 0,
                step_ms: 1.0,
                pss_bytes_of_all_ranks: 1.0,
                page_cache_bytes_of_all_ranks: None,
                nvml_mib: None,
                job: MeasuredJob::default(),
            };
            run.step_ms = 1e3 * run.predicted_seconds(hardware).unwrap();
            run
        };
        vec![
            run("llama-3.1-8b", 4, 512, Keep::EVERYTHING),
            run("llama-3.1-8b", 4, 512, Keep::NOTHING),
            run("llama-3.1-8b", 4, 256, Keep::EVERYTHING),
            run("llama-3.1-70b", 4, 1024, Keep::NOTHING),
        ]
    }

    #[test]
    fn a_fit_explains_the_runs() {
        let mut truth = Hardware::named("h100").unwrap();
        truth.reached =
            Reached { products: 0.7, memory: 0.6, kernel_seconds: 1.5 * truth.reached.kernel_seconds, ..truth.reached };
        let (before, runs) = (Hardware::named("h100").unwrap(), runs(&truth));
        let fitted = fit(&before, &runs).unwrap();
        // The shares are drawn to their earlier values, so that the fit is not exact.
        for run in &runs {
            let error = |hardware: &Hardware| (run.compare(hardware).unwrap().time - 1.0).abs();
            assert!(error(&before) > 0.15 && error(&fitted) < 0.02, "{} and {}", error(&before), error(&fitted));
        }
        assert!(fitted.reached.products < before.reached.products && fitted.reached.memory < before.reached.memory);
    }

    /// A run on an H100 with the device memory that it would take now: the gradients of gate and up had buffers of their
    /// own, each `[T, intermediate]` in two bytes, when it was measured.
    fn with_fewer_buffers(mut run: MeasuredRun) -> MeasuredRun {
        let spec = shapes::named(&run.shape, Some(run.layers)).unwrap();
        let buffers = 2 * 2 * run.micro_batch * run.seq * spec.widest(|layer| layer.mlp.intermediate_size);
        run.nvml_mib = run.nvml_mib.map(|mib| mib - buffers as f64 / f64::from(1 << 20));
        run
    }

    /// Constants of `hardware.rs` come from these runs too: this holds what they explain.
    #[test]
    fn predictions_are_what_was_measured() {
        let read = |name: &str| {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results").join(name);
            MeasuredRun::read(&std::fs::read_to_string(path).unwrap()).unwrap()
        };
        let earlier = |name| read(name).into_iter().map(with_fewer_buffers).collect::<Vec<_>>();
        let mut wrong = Vec::new();
        // Each set of runs has a program of its own, and so a calibration of its own.
        for (gpu, calibration, runs, at_least) in [
            ("h200", "h200-calibration.jsonl", read("h200.jsonl"), 11),
            ("h100", "h100-calibration.jsonl", earlier("h100.jsonl"), 8),
            ("h100", "h100-x2-calibration.jsonl", earlier("h100-x2.jsonl"), 5),
        ] {
            assert!(runs.len() >= at_least);
            let hardware = fit(&Hardware::named(gpu).unwrap(), &read(calibration)).unwrap();
            for run in runs {
                let Ratios { time, device, host } = run.compare(&hardware).unwrap();
                let within = |ratio: f64, error: f64| (ratio - 1.0).abs() < error;
                let line = format!("time {time:.3}, device {device:.3?}, host {host:.3?}: {}", run.name());
                println!("{line}");
                let memory = device.is_some_and(|d| within(d, 0.01)) && host.is_some_and(|h| within(h, 0.02));
                if !within(time, 0.1) || !memory {
                    wrong.push(line);
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn lines_are_those_of_bench_step() {
        let error = MeasuredRun::read("\n{\"shape\": 1}").unwrap_err();
        assert!(format!("{error:#}").starts_with("line 2: "), "{error:#}");
    }

    #[test]
    fn a_line_tells_what_the_adapter_was() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results/h100-2026-11-25.jsonl");
        let line = std::fs::read_to_string(path).unwrap().lines().next().unwrap().to_string();
        let job = r#"{"job": {"lora.r": 256, "lora.target_modules": ["q_proj"], "quantization.load_in_4bit": false}, "#;
        let runs = MeasuredRun::read(&format!("{line}\n{}", line.replacen('{', job, 1))).unwrap();
        assert_eq!((runs[0].job.lora_r, runs[0].job.nf4_double_quant()), (16, Some(true)));
        assert_eq!((runs[1].job.lora_r, runs[1].job.nf4_double_quant()), (256, None));
        let spec = shapes::named(&runs[1].shape, Some(1)).unwrap();
        assert_eq!(runs[1].job.lora(&spec, 0.0).unwrap().targets(), vec![ModuleId::Q]);
        let hardware = Hardware::named("h100").unwrap();
        assert_ne!(runs[0].compare(&hardware).unwrap().device, runs[1].compare(&hardware).unwrap().device);
    }
}
