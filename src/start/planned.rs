//! A run on a machine that is not there: decided and predicted as it would be decided on it.

use anyhow::Result;
use half::bf16;

use crate::checkpoint::{load, synthetic};
use crate::device::cuda::Cuda;
use crate::fsdp::layout::UnitLayout;
use crate::model::config::ModelConfig;
use crate::model::layer::LayerLora;
use crate::model::lora::LoraConfig;
use crate::plan::decide::{Budget, Wishes};
use crate::plan::hardware::Hardware;
use crate::plan::limits;
use crate::plan::memory::Sizes;
use crate::plan::report::Report;
use crate::plan::throughput::{Links, Workload};
use crate::recipe::Job;

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

    /// Returns the memory that a rank may plan with: on the device without that of driver and libraries, on the host without that of its
    /// process.
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
    config: ModelConfig,
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
    pub fn of_shape(name: &str, config: ModelConfig, job: &Job, machine: &Machine) -> Result<Planned> {
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
        let Planned { name, config, layouts, lora, embedding_bytes } = self;
        let Machine { hardware, nodes, world_size, ranks_per_gpu, .. } = *machine;
        limits::check_gpu(&config)?;
        let lora = LayerLora::new(&config, lora);
        let sizes = Sizes { config: &config, layouts: &layouts, lora: Some(&lora), world_size };
        let limits = step_limits(job, world_size);
        let library_bytes = hardware.library_bytes(sizes.num_communicators(), ranks_per_gpu);
        let process_bytes = sizes.process_bytes(limits.max_tokens, ranks_per_gpu, embedding_bytes);
        let budget = machine.budget(job, library_bytes, process_bytes);
        let shared = hardware.shared_by(ranks_per_gpu);
        let in_a_node = sizes.num_shards() <= machine.node_size();
        let links = Links::new(&shared, in_a_node, nodes == 1, machine.network_bytes_per_s);
        let workload = Workload { sizes, hardware: &shared, links };
        let gather = possible_gather(&job.fsdp, sizes.num_shards(), in_a_node)?;
        let limits = workload.decide::<Cuda<bf16>>(limits, &Wishes { gather, ..wishes(job, world_size) }, budget)?;
        Ok(Report {
            model: name,
            gpu: hardware.name.clone(),
            world_size,
            nodes,
            num_layers: config.num_hidden_layers,
            num_units: layouts.len(),
            limits,
            cost: sizes.cost::<Cuda<bf16>>(&limits)?,
            library_bytes,
            process_bytes,
            timeline: workload.predict(&limits),
        })
    }
}
