//! `train`: fine-tunes as a recipe says.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::load::OpenedBase;
use crate::checkpoint::mapped::MappedBase;
use crate::checkpoint::output::record::RunIdentity;
use crate::checkpoint::output::{Output, Resume};
use crate::checkpoint::room::Want;
use crate::checkpoint::state::Found;
use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::comm::watch::{self, Phase};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::model::spec::ModelSpec;
use crate::recipe::{self, Command, Job, Steps};
use crate::start::agree::{Agreed, agree_on_inputs};
use crate::start::begin::{Beginning, CLOCK, begin, clock_of_the_run, with_batch_of_the_run};
use crate::start::data::TrainingData;
use crate::start::engine::{Setup, Work};
use crate::start::{Facts, Start};
use crate::train::best::{self, Bests};
use crate::train::check;
use crate::train::log::{Log, bytes};
use crate::train::metrics::{MetricsFile, peak_host_bytes};
use crate::train::result::{Kept, doubt, save};
use crate::train::run::{Outcome, Run};
use crate::train::saving::{self, Fixed, Writer};
use crate::train::skipping::with_last_good;
use crate::train::stop::{CONTROL_FILE, Deadline, Options, Stop};

use super::check_trace;

#[derive(Args, Default)]
pub struct TrainArgs {
    /// The recipe; fsdp-qlora.yaml if it is not given, or --set alone where that file is not there
    #[arg(short, long, value_parser = recipe::read_path)]
    config: Option<PathBuf>,
    /// Write a trace of the second step for <https://ui.perfetto.dev>
    #[arg(long, value_parser = recipe::read_path)]
    trace: Option<PathBuf>,
    /// Replace what output_dir holds, once the new result is complete
    #[arg(long)]
    overwrite: bool,
    /// Print all keys of the recipe, and stop
    #[arg(long)]
    pub help_recipe: bool,
}

/// The recipe where the command line names none.
const RECIPE: &str = "fsdp-qlora.yaml";

/// Trains as a recipe says. Exit status 0: the adapter is in output_dir. If it had to be saved elsewhere, that is an
/// error, and its message, the last line, names the place.
pub fn run(start: &Start, mut comm: MpiComm, args: &TrainArgs, overrides: &[String]) -> Result<Outcome> {
    let started = Instant::now();
    let path = args.config.as_deref().unwrap_or(Path::new(RECIPE));
    let job = match args.config.is_none() && !overrides.is_empty() && !path.exists() {
        true => recipe::from_options(Command::Train, Vec::new(), overrides)?,
        false => recipe::load(path, Command::Train, overrides)?,
    };
    let job = start.job(&mut comm, job)?;
    let trace = args.trace.as_deref();
    check_trace(trace)?;
    let opened = start.open(&mut comm, &job)?;
    let options = TrainOptions { started, overwrite: args.overwrite, trace, read_rows: TrainingData::load };
    train_on(start, comm, job, opened, options)
}

/// Everything that training takes besides a job and a base.
pub(super) struct TrainOptions<'a> {
    /// Time at which the program was started.
    pub started: Instant,
    /// Replace what output_dir holds, once the new result is complete.
    pub overwrite: bool,
    pub trace: Option<&'a Path>,
    pub read_rows: fn(&Start<'_>, &Job, &ModelSpec, &mut Facts) -> Result<TrainingData>,
}

/// Trains on an opened base, from the newest checkpoint where there is one. Collective.
pub(super) fn train_on(
    start: &Start,
    comm: MpiComm,
    job: Agreed<Job>,
    opened: OpenedBase,
    options: TrainOptions,
) -> Result<Outcome> {
    let mut output = None;
    let result = train(start, comm, job, opened, options, &mut output);
    if let (Err(error), Some(output)) = (&result, &output) {
        output.fail(&format!("{error:#}"));
    }
    result
}

/// Trains. `output` is set on rank 0 as soon as its folder is locked.
fn train(
    start: &Start,
    mut comm: MpiComm,
    job: Agreed<Job>,
    mut opened: OpenedBase,
    options: TrainOptions,
    output: &mut Option<Output>,
) -> Result<Outcome> {
    let TrainOptions { started, overwrite, trace, read_rows } = options;
    let config = opened.spec.clone();
    let world_size = start.world.world_size;
    job.training.check_batch(world_size)?;
    let adapter = start.adapter_to_train(&job, &config)?;
    let kept = Kept::read(&job.model)?;
    if start.world.rank == 0 {
        let room = kept.room(&adapter, &job.training);
        let held = Output::open(&job.output_dir, overwrite, room, &mut |line| start.log.line(line));
        *output = Some(held.context("output_dir")?);
        opened.kept_free.push(Want { dir: job.output_dir.clone(), bytes: room });
    }
    let mut inputs = Facts::default();
    inputs.add_adapters("lora.adapter", std::slice::from_ref(&adapter));
    let clock = clock_of_the_run(&mut comm, start, &job, output.as_ref())?;
    let start = &Start { clock, ..*start };
    let data = read_rows(start, &job, &config, &mut inputs)?;
    let identity = |job: &Job, world_size| run_identity(job, world_size, start, &opened, &adapter, &data);
    let job = with_batch_of_the_run(&mut comm, job, output.as_ref(), start.log, identity)?;
    let limits = data.limits(&job, world_size);
    inputs.add_limits(&limits);
    let inputs = agree_on_inputs(&mut comm, inputs)?;
    let steps = job.training.steps(data.train.sequences.len(), world_size)?;
    config.remarks.iter().chain([&steps.plan]).for_each(|line| start.log.line(line.clone()));
    let run = identity(&job, world_size)?;
    let Some(beginning) = begin(&mut comm, &job, output.as_mut(), run.clone(), start.log)? else {
        return Ok(Outcome::Finished);
    };
    let votes = comm.another()?;
    let base = opened.mapped.clone();
    let (placement, loaded) = start.base(&mut comm, opened, &job, &inputs)?;
    let matrix_flops = placement.matrix_flops(start.ranks_per_gpu)?;
    let work = Training {
        start,
        matrix_flops,
        job: &job,
        steps: &steps,
        config: &config,
        adapter: &adapter,
        data: &data,
        trace,
        kept: &kept,
        output: output.as_mut(),
        run,
        beginning,
        started,
        votes,
        base: &base,
    };
    let setup = Setup { comm, base: loaded, adapter: Some(&adapter), limits, job: &job };
    start.with_engine(placement, setup, work)
}

/// Returns everything that decides the result of a job.
fn run_identity(
    job: &Job,
    world_size: usize,
    start: &Start,
    opened: &OpenedBase,
    adapter: &Adapter,
    data: &TrainingData,
) -> Result<RunIdentity> {
    let (hex, mut recipe) = (|digest: u64| format!("{digest:016x}"), job.values());
    let steps = job.training.steps(data.train.sequences.len(), world_size)?;
    recipe.insert("training.warmup_steps".into(), steps.warmup_steps.into());
    // It has decided the warm-up, however that was written.
    recipe.insert("training.warmup_ratio".into(), serde_json::Value::Null);
    Ok(RunIdentity {
        world_size,
        global_batch_size: job.training.global_batch_size(world_size),
        base: opened.identity(),
        tokenizer: data.tokenizer.clone(),
        adapter: hex(adapter.digest()),
        data: hex(data.train.digest()),
        eval_data: data.eval.as_ref().map(|eval| hex(eval.digest())),
        recipe,
        clock: Some(start.clock.strftime(CLOCK).to_string()),
    })
}

/// Rank 0 watches the clock and the control file, all ranks watch for signals.
fn watch_for_reasons_to_stop(start: &Start, job: &Job, started: Instant, votes: MpiComm) -> Stop {
    let is_first = start.world.rank == 0;
    let deadline = if is_first { Deadline::earliest(started, job.training.max_time) } else { None };
    if let Some(deadline) = &deadline {
        start.log.line(deadline.text());
    }
    let control = is_first.then(|| job.output_dir.join(CONTROL_FILE));
    Stop::new(Box::new(votes), Options { grace: job.training.grace, deadline, control, log: start.log })
}

/// A run from the first step to the saved adapter.
struct Training<'a> {
    start: &'a Start<'a>,
    /// Rate of this rank's GPU, see [`crate::start::placement::Placement::matrix_flops`].
    matrix_flops: Option<f64>,
    job: &'a Job,
    steps: &'a Steps,
    config: &'a ModelSpec,
    adapter: &'a Adapter,
    data: &'a TrainingData,
    trace: Option<&'a Path>,
    kept: &'a Kept,
    /// `None` on all ranks but the first.
    output: Option<&'a mut Output>,
    run: RunIdentity,
    beginning: Beginning,
    /// Time at which the program was started.
    started: Instant,
    /// Communicator for votes about stopping.
    votes: MpiComm,
    base: &'a MappedBase,
}

impl Training<'_> {
    /// Makes the file of metrics and the writer of checkpoints, on rank 0.
    fn files<D: Ops, Q: Queue<D>>(&self, engine: &mut Engine<D, Q>) -> Result<Option<(MetricsFile, Writer)>> {
        let (Some(output), log) = (&self.output, self.start.log) else { return Ok(None) };
        let live = output.live();
        if output.keeps_a_result() {
            let place = live.display();
            log.line(format!("output_dir: what is there stays until the run is complete, which writes to {place}"));
        }
        let Beginning { progress, checkpoint } = &self.beginning;
        let lines = checkpoint.as_ref().map_or(Ok(Vec::new()), Found::metrics)?;
        let fixed = Fixed {
            output: live.into(),
            base: self.kept.base.clone(),
            spec: self.config.clone(),
            settings: self.adapter.settings.clone(),
            run: self.run.clone(),
            limit: self.job.training.save_total_limit,
        };
        let snapshot = engine.take_snapshot_memory().context("no snapshot was planned")?;
        Ok(Some((MetricsFile::create(live, lines, log)?, Writer::new(fixed, snapshot, progress, log)?)))
    }
}

/// Notes in run.json that the run was stopped, and says how to go on.
fn note_stop(output: &mut Output, step: usize, reason: &str, resume: &Resume, log: Log) -> Result<()> {
    output.stop(format!("{reason}, after step {step}"))?;
    let help = match (step, resume) {
        (0, _) => "no step was whole; help: the same `train` again begins with the first",
        (_, Resume::Auto) => "help: the same `train` again goes on from there",
        (_, Resume::Never | Resume::From(_)) => {
            "help: `train --set training.resume=auto` goes on from the newest checkpoint of output_dir"
        }
    };
    log.line(format!("stopped by {reason} after step {step}; {help}"));
    Ok(())
}

impl Work for Training<'_> {
    type Output = Outcome;

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Outcome> {
        let mut progress = self.beginning.progress;
        progress.loss_scaler = progress.loss_scaler.fitted(D::NEEDS_LOSS_SCALING);
        if progress.step > 0 {
            let checkpoint = self.beginning.checkpoint.as_ref();
            saving::restore(engine, checkpoint, &self.adapter.settings, self.config)?;
        }
        let (mut metrics, mut writer) = self.files(engine)?.unzip();
        let Training { start, matrix_flops, job, steps, config, adapter, data, trace, kept, output, base, .. } = self;
        let stop = watch_for_reasons_to_stop(start, job, self.started, self.votes);
        let num_bytes = metrics.as_ref().map_or(0, |metrics: &MetricsFile| metrics.lines().len());
        let mut run = Run {
            engine: &mut *engine,
            job: &job.training,
            steps,
            train: &data.train,
            shuffle: job.data.shuffle,
            eval: data.eval.as_ref(),
            progress,
            last_good: (progress, num_bytes),
            metrics: metrics.as_mut(),
            writer: writer.as_mut(),
            log: start.log,
            trace,
            base,
            matrix_flops,
            stop,
            saved: progress,
            bests: Bests::new(progress.evaluations.best_checkpoint),
        };
        start.log.line(format!(
            "{} steps, {} LoRA parameters",
            steps.num_steps,
            adapter.layers.iter().map(Vec::len).sum::<usize>()
        ));
        let outcome = run.run()?;
        let (progress, epoch) = (run.progress, steps.epochs.after(run.progress.step));
        watch::phase(Phase::Save)?;
        if let Outcome::Stopped { step, reason } = &outcome {
            output.map_or(Ok(()), |output| note_stop(output, *step, reason, &job.training.resume, start.log))?;
            engine.queue.all_gather_f64("end", &[0.0])?;
            return Ok(outcome);
        }
        let last = saving::adapter(engine, &adapter.settings)?;
        let live = output.as_ref().map(|output| output.live());
        let chosen = last.zip(live).map(|(last, live)| best::choose(&progress, last, live, config));
        if let (Some(chosen), Some(writer)) = (&chosen, &writer) {
            let is_sound = check::result_is_sound(adapter, &chosen.adapter);
            is_sound.map_err(|error| with_last_good(error, writer, progress.last_update))?;
        }
        let doubt = doubt(&mut engine.queue, start.world.local_rank, base)?;
        if let (Some(output), Some(mut metrics), Some(chosen)) = (output, metrics, chosen) {
            chosen.tell(&progress, epoch, &mut metrics, start.log)?;
            start.log.line(format!("peak host memory of rank 0: {}", bytes(peak_host_bytes())));
            let wait = watch::wait("saving the adapter");
            save(output, (chosen.step, &chosen.adapter), config, kept, metrics.lines(), doubt.or(chosen.doubt))?;
            drop(wait);
            start.log.line(format!("adapter: {}", job.output_dir.display()));
        }
        // The other ranks end when the adapter is there: a launcher that sees them end may end the job.
        engine.queue.all_gather_f64("end", &[0.0])?;
        Ok(outcome)
    }
}
