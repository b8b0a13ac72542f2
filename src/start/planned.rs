//! Decides and predicts a run for a machine that is not there, as it would be decided on that machine.

use anyhow::Result;
use half::{bf16, f16};

use crate::checkpoint::{load, synthetic};
use crate::device::cuda::{Cuda, HalfType};
use crate::fsdp::layout::UnitLayout;
use crate::model::spec::ModelSpec;
use crate::model::trainable::{LayerTrainables, LoraConfig, Trainables};
use crate::plan::decide::Budget;
use crate::plan::hardware::Hardware;
use crate::plan::limits;
use crate::plan::memory::Sizes;
use crate::plan::report::Report;
use crate::plan::throughput::{Links, Workload};
use crate::plan::wishes::Wishes;
use crate::recipe::{ComputeDtype, Job};

use super::adapter::planned_settings;
use super::options::{self, load_options, nf4_double_quant, possible_gather, step_limits, wishes};

/// Nodes with the same number of GPUs of one kind.
pub struct Machine<'a> {
    pub hardware: &'a Hardware,
    pub nodes: usize,
    /// Ranks of all nodes.
    pub world_size: usize,
    pub ranks_per_gpu: usize,
    pub network_bytes_per_s: f64,
    /// Host memory of a node; `None` is any amount.
    pub host_gib: Option<f64>,
}

impl Machine<'_> {
    fn node_size(&self) -> usize {
        self.world_size / self.nodes
    }

    fn num_shards(&self, job: &Job) -> Result<usize> {
        options::num_shards(&job.fsdp, self.world_size, Some(self.node_size()))
    }

    /// Returns the memory that a rank may plan with: on the device without that of driver and libraries, on the host
    /// without that of its process.
    fn budget(&self, job: &Job, library_bytes: usize, process_bytes: usize) -> Budget {
        let vram = job.fsdp.vram_budget.unwrap_or(usize::MAX).min(self.hardware.usable_bytes() / self.ranks_per_gpu);
        let share =
            |gib: f64| ((gib * f64::from(1 << 30) / self.node_size() as f64) as usize).saturating_sub(process_bytes);
        let host = self.host_gib.map_or(usize::MAX, share);
        Budget {
            device: vram.saturating_sub(library_bytes),
            host: job.fsdp.host_budget.unwrap_or(usize::MAX).min(host),
        }
    }
}

/// A model to train, as far as a plan needs it.
pub struct Planned {
    name: String,
    config: ModelSpec,
    layouts: Vec<UnitLayout>,
    lora: LoraConfig,
    /// Bytes of an embedding table that is not in a file.
    embedding_bytes: usize,
}

impl Planned {
    /// Reads a job's model and adapter.
    pub fn of_model(job: &Job, machine: &Machine) -> Result<Planned> {
        job.training.check_batch(machine.world_size)?;
        let (config, layouts) = load::planned(&job.model, &load_options(job, machine.num_shards(job)?))?;
        let lora = planned_settings(&job.lora, &config)?.lora_config();
        Ok(Planned { name: job.model.display().to_string(), config, layouts, lora, embedding_bytes: 0 })
    }

    /// Makes up a model of a shape, with a new adapter.
    pub fn of_shape(name: &str, config: ModelSpec, job: &Job, machine: &Machine) -> Result<Planned> {
        let layouts = synthetic::layouts(&config, nf4_double_quant(job), machine.num_shards(job)?)?;
        let lora = planned_settings(&job.lora, &config)?.lora_config();
        let embedding_bytes = synthetic::embedding_bytes(&config);
        Ok(Planned { name: name.to_string(), config, layouts, lora, embedding_bytes })
    }

    /// Decides what is kept where, and predicts a step whose micro-batches are full.
    ///
    /// # Errors
    /// [`crate::plan::decide::DoesNotFit`] where no choice fits.
    pub fn report(self, job: &Job, machine: &Machine) -> Result<Report> {
        match job.quantization.compute_dtype {
            ComputeDtype::Float16 => self.report_in::<f16>(job, machine),
            _ => self.report_in::<bf16>(job, machine),
        }
    }

    /// [`Planned::report`] with activations of a type.
    fn report_in<A: HalfType>(self, job: &Job, machine: &Machine) -> Result<Report> {
        let Planned { name, config, layouts, lora, embedding_bytes } = self;
        let Machine { hardware, nodes, world_size, ranks_per_gpu, .. } = *machine;
        limits::check_gpu(&config)?;
        limits::check_fp16(&config, A::NEEDS_LOSS_SCALING)?;
        let trainables = Trainables::new(&config, lora);
        let sizes = Sizes { spec: &config, layouts: &layouts, trainables: Some(&trainables), world_size };
        let limits = step_limits(job, world_size);
        let library_bytes = hardware.library_bytes(sizes.num_communicators(), ranks_per_gpu);
        let process_bytes = sizes.process_bytes(ranks_per_gpu, embedding_bytes);
        let budget = machine.budget(job, library_bytes, process_bytes);
        let shared = hardware.shared_by(ranks_per_gpu);
        let in_a_node = sizes.num_shards() <= machine.node_size();
        let links = Links::new(&shared, in_a_node, nodes == 1, machine.network_bytes_per_s);
        let workload = Workload { sizes, act: A::DTYPE, hardware: &shared, links };
        let gather = possible_gather(&job.fsdp, sizes.num_shards(), in_a_node)?;
        let limits = workload.decide::<Cuda<A>>(limits, &Wishes { gather, ..wishes(job, world_size) }, budget)?;
        Ok(Report {
            model: name,
            gpu: hardware.name.clone(),
            world_size,
            nodes,
            num_layers: config.num_layers(),
            num_units: layouts.len(),
            lora: trainables.lora.clone(),
            num_trainable: trainables.layers.iter().map(LayerTrainables::len).sum(),
            limits,
            cost: sizes.cost::<Cuda<A>>(&limits)?,
            library_bytes,
            process_bytes,
            timeline: workload.predict(&limits),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;
    use crate::plan::memory::text as bytes;
    use crate::recipe::{self, Command};

    fn machine(hardware: &Hardware, nodes: usize, world_size: usize) -> Machine<'_> {
        let (network_bytes_per_s, host_gib) = (1e9, Some(256.0));
        Machine { hardware, nodes, world_size, ranks_per_gpu: 1, network_bytes_per_s, host_gib }
    }

    fn job(sets: &[&str]) -> Job {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        recipe::from_options(Command::PlanShape, vec![("data.max_length", 1024.into())], &sets).unwrap()
    }

    fn planned(job: &Job, machine: &Machine) -> Planned {
        Planned::of_shape("a shape", shapes::named("llama-3.1-8b", Some(4)).unwrap(), job, machine).unwrap()
    }

    #[test]
    fn a_report_adds_up_and_its_text_has_the_same_numbers() {
        let hardware = Hardware::named("rtx4090").unwrap();
        let sets = ["fsdp.offload_params=true", "lora.lora_alpha=24", "lora.target_modules=[q_proj, down_proj]"];
        let (job, machine) = (job(&sets), machine(&hardware, 1, 2));
        let report = planned(&job, &machine).report(&job, &machine).unwrap();
        let (json, text) = (report.json(), report.to_string());
        let sum = |key: &str| json[key].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum::<u64>();
        assert_eq!(sum("device") + json["libraries_bytes"].as_u64().unwrap(), json["device_bytes"].as_u64().unwrap());
        assert_eq!(sum("host"), json["pinned_bytes"].as_u64().unwrap());
        // A checkpoint needs the adapter and two moments of each of its values, in f32. A benchmark saves nothing.
        let parameters = json["lora"]["values"].as_u64().unwrap();
        assert_eq!(json["host"]["snapshot"].as_u64(), Some(3 * 4 * parameters));
        let bench = recipe::from_options(Command::BenchStep, vec![("data.max_length", 1024.into())], &[]).unwrap();
        assert!(step_limits(&job, 2).snapshot && !step_limits(&bench, 2).snapshot);
        assert_eq!(json["lora"]["values"], 4 * 16 * (2 * 4096 + 14_336 + 4096));
        assert_eq!((json["resident_units"].as_u64(), json["trainables_on_device"].as_bool()), (Some(0), Some(false)));
        let units = json["units"].as_u64().unwrap();
        let memory = |name: &str| bytes(json[name].as_u64().unwrap() as usize);
        for expected in [
            "a shape on 2 x rtx4090, 1 node(s)".into(),
            // 16 · (4096 + 4096) and 16 · (14336 + 4096) values in each of four layers.
            "adapter: r 16, scale 1.5, dropout 0.05, on q_proj, down_proj; 1.7 million values".into(),
            format!("GPU memory of a rank: {}", memory("device_bytes")),
            format!("of its process: {}", memory("pinned_bytes")),
            format!("0 of {units} units are resident"),
            format!("{:.0} tokens/s", json["tokens_per_second"].as_f64().unwrap()),
        ] {
            assert!(text.contains(&expected), "{expected} is not in {text}");
        }
    }

    #[test]
    fn the_strategy_says_how_many_ranks_hold_a_base_and_ranks_of_a_node_share_its_memory() {
        let hardware = Hardware::named("h100").unwrap();
        for (strategy, num_shards) in [("full_shard", 6), ("hybrid_shard", 3), ("no_shard", 1)] {
            let (job, machine) = (job(&[&format!("fsdp.sharding_strategy={strategy}")]), machine(&hardware, 2, 6));
            assert_eq!(planned(&job, &machine).layouts[0].num_shards(), num_shards, "{strategy}");
            assert_eq!(machine.budget(&job, 0, 1 << 30).host, (256 << 30) / 3 - (1 << 30));
        }
    }
}
