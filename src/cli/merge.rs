//! `merge`: adds an adapter to its base and writes a model. One process does it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::merge_scores::Scores;
use super::usage;
use crate::checkpoint::merge::{Form, Merge, Options, differing_files};
use crate::checkpoint::source::Dtype;
use crate::checkpoint::stage::Stage;
use crate::checkpoint::trained;
use crate::comm::mpi::MpiComm;
use crate::recipe::{self, Command, Job};
use crate::start::Start;
use crate::train::log::bytes;

/// The weights that the adapter is added to.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BaseArg {
    /// The base's own weights in 16 or 32 bit
    Original,
    /// The weights that QLoRA computed with: quantized to NF4 and dequantized
    Dequantized,
}

/// The type of the result.
#[derive(Clone, Copy, ValueEnum)]
enum DtypeArg {
    /// The type that each tensor has in the base
    Base,
    Float32,
    Float16,
    Bfloat16,
}

#[derive(Args)]
pub struct MergeArgs {
    /// Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION of the hub
    #[arg(long)]
    model: String,
    /// PEFT adapter, a folder or of the hub
    #[arg(long)]
    adapter: String,
    /// Folder of the result; nothing may be there yet
    #[arg(long, value_parser = recipe::read_path)]
    output: PathBuf,
    /// The weights that the adapter is added to
    #[arg(long, value_enum)]
    base: BaseArg,
    /// Type of the weights that are written
    #[arg(long, value_enum, default_value_t = DtypeArg::Base)]
    dtype: DtypeArg,
    /// Largest size of a file of weights; a larger tensor has a file of its own
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = recipe::read_size)]
    max_shard_size: usize,
    /// Take a base other than the one that the adapter was trained on
    #[arg(long)]
    other_base: bool,
    /// File or folder of rows, or a data set of the hub: print the loss of the adapter over its base and of both merged forms
    #[arg(long)]
    dataset: Option<String>,
    /// Longer rows are handled as data.overlong says (--set)
    #[arg(long, default_value_t = 1024, requires = "dataset")]
    max_length: u64,
    /// Print the scores as one JSON object
    #[arg(long, requires = "dataset")]
    json: bool,
}

impl MergeArgs {
    /// Returns whether the result is scored, which needs a device.
    pub fn scores(&self) -> bool {
        self.dataset.is_some()
    }

    fn options(&self) -> Options {
        let form = match self.base {
            BaseArg::Original => Form::Original,
            BaseArg::Dequantized => Form::Dequantized,
        };
        let dtype = match self.dtype {
            DtypeArg::Base => None,
            DtypeArg::Float32 => Some(Dtype::F32),
            DtypeArg::Float16 => Some(Dtype::F16),
            DtypeArg::Bfloat16 => Some(Dtype::BF16),
        };
        Options { form, dtype, max_shard_bytes: self.max_shard_size }
    }
}

/// Merges the adapter into its base. With --dataset, scores the adapter and both merged forms.
pub fn run(start: &Start, mut comm: MpiComm, args: &MergeArgs, overrides: &[String]) -> Result<()> {
    if start.world.world_size > 1 {
        return Err(usage("merge is the work of one process: start it without mpirun"));
    }
    if args.base == BaseArg::Original && !args.scores() && !overrides.is_empty() {
        return Err(usage("--set: with --base original nothing is quantized, so there is nothing to set"));
    }
    let job = start.job(&mut comm, decide(args, overrides)?)?;
    let stage = Stage::make(&args.output).context("--output")?;
    start.threads(&mut comm)?;
    let mut opened = start.open(&mut comm, &job)?;
    let adapter = start.named_adapter(&job, &opened.spec)?.context("--adapter: missing")?;
    let folder = job.lora.adapter.as_deref().context("--adapter: missing")?;
    if let Some(run) = trained::run_of(folder).context("--adapter")? {
        if !args.other_base {
            trained::check_base(&run, &opened.identity(), &job.model).context("--adapter")?;
        }
        // A checkpoint in 4 bit has a form of its own.
        let is_quantized_here = opened.spec.quantization.is_none();
        if is_quantized_here && (args.base == BaseArg::Dequantized || args.scores()) {
            let quantization = &job.quantization;
            trained::check_quantization(&run, quantization.load_in_4bit, quantization.double_quant)
                .context("--adapter")?;
        }
    }
    opened.keep_digests(&mut |line| start.log.line(line));
    let merge = Merge::new(&opened, &adapter, args.options())?;
    let differing = differing_files(folder, &job.model);
    if !differing.is_empty() {
        start.log.line(format!("--adapter: its {} differ from the base's, which are copied", differing.join(", ")));
    }
    stage.check_room(merge.bytes()).context("--output")?;
    let mut scores = args.scores().then(|| Scores::new(start, &job, &args.output, merge.bytes())).transpose()?;
    if let Some(scores) = &mut scores {
        scores.of_adapter(folder)?;
        scores.of_other_form(&opened, &adapter, args.options())?;
    }
    merge.write(stage.dir(), &mut |line| start.log.line(line))?;
    stage.finish().context("--output")?;
    start.log.line(format!("{}: {}", args.output.display(), bytes(merge.bytes())));
    if let Some(mut scores) = scores {
        scores.of_merged(args.options().form, &args.output)?;
        scores.print(args.json);
    }
    Ok(())
}

fn decide(args: &MergeArgs, overrides: &[String]) -> Result<Job> {
    let mut given: Vec<(&str, Value)> =
        vec![("model", args.model.clone().into()), ("lora.adapter", args.adapter.clone().into())];
    let command = match &args.dataset {
        None => Command::Merge,
        Some(dataset) => {
            given.extend([("data.train", dataset.clone().into()), ("data.max_length", args.max_length.into())]);
            Command::MergeScored
        }
    };
    Ok(recipe::from_options(command, given, overrides)?)
}
