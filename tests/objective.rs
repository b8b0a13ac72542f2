//! Objectives of their own, and micro-batches that are only scored beside others that train.

mod common;

use common::steps::{LAYERS, NOTHING_RESIDENT, Quadratic, layers, rows, trainer, update};
use common::{CpuEngine, EngineOptions, on_all_ranks};
use fsdp_qlora::testing::{
    Accumulation, Descriptor, MicroBatch, Mode, Objective, Packing, Queue, Residency, RunArgs, Sampler, Update, Values,
    data,
};

/// Arguments of a run that trains some of its micro-batches.
fn trains<'a>(micro_batches: &'a [Descriptor], objective: &'a dyn Objective, update: &'a Update) -> RunArgs<'a> {
    let (mode, dropout, update) = (Mode::Train, None, Some(update));
    RunArgs { mode, micro_batches, objective: Some(objective), dropout, update, next: None }
}

#[test]
fn an_objective_decides_about_each_token() {
    let shards = tempfile::tempdir().unwrap();
    let mut options = trainer();
    options.max_micro_batches = 3;
    let (data, objective) = (rows(Packing::None), Quadratic { linear: 0.02, square: 0.01 });
    on_all_ranks(1, |groups| {
        let mut engine = options.engine(groups, shards.path());
        let batches = data::step_micro_batches(&data, &mut Sampler::new(24, 1), 0, 3, 1, 1, 0);
        let start = layers(&mut engine, Values::Master);
        let update = update(1, 0.0);
        let run = |engine: &mut CpuEngine, values: &[Vec<f32>]| {
            values.iter().enumerate().for_each(|(layer, values)| engine.load_trainable(layer, values).unwrap());
            let args = trains(&[Descriptor::TRAINED; 3], &objective, &update);
            objective.loss(&engine.run(&args, &batches).unwrap().log_probabilities)
        };
        run(&mut engine, &start);
        let grads = layers(&mut engine, Values::Grad);
        let square: f64 = grads.iter().flatten().map(|g| f64::from(*g).powi(2)).sum();
        // Along the gradient the loss changes by its square.
        let step = 1e-3 / square.sqrt();
        let moved = |by: f64| -> Vec<Vec<f32>> {
            let layer = |(x, g): (&Vec<f32>, &Vec<f32>)| {
                x.iter().zip(g).map(|(x, g)| x + (by * f64::from(*g)) as f32).collect()
            };
            start.iter().zip(&grads).map(layer).collect()
        };
        let slope = (run(&mut engine, &moved(step)) - run(&mut engine, &moved(-step))) / (2.0 * step);
        assert!((slope / square - 1.0).abs() < 1e-2, "slope {slope}, square of the gradient {square}");
    });
}

/// The scores of micro-batches, by micro-batch, and the gradients that training some of them gave, by layer.
type Outcome = (Vec<Vec<f64>>, Vec<Vec<f32>>);

/// Runs one step of some of a rank's three micro-batches; an entry is a micro-batch and its descriptor.
fn outcome(engine: &mut CpuEngine, batches: &[MicroBatch], list: &[(usize, Descriptor)]) -> Outcome {
    let (objective, update) = (Quadratic { linear: 0.02, square: 0.01 }, update(1, 0.0));
    let (batches, descriptors): (Vec<_>, Vec<_>) = list.iter().map(|(i, of)| (batches[*i].clone(), *of)).unzip();
    let trained = descriptors.iter().any(|descriptor| descriptor.gradient);
    let args = RunArgs { dropout: Some((42, 1)), ..trains(&descriptors, &objective, &update) };
    let args = if trained { args } else { RunArgs { mode: Mode::Score, ..args } };
    let scores = engine.run(&args, &batches).unwrap().log_probabilities;
    (scores, if trained { layers(engine, Values::Grad) } else { Vec::new() })
}

#[test]
fn micro_batches_that_are_scored_change_nothing_for_those_that_train() {
    let with_dropout = |options: &mut EngineOptions| options.adapter.as_mut().unwrap().settings.dropout = 0.1;
    let (data, train) = (rows(Packing::None), Descriptor::TRAINED);
    let (reference, scored) = (Descriptor::scored(false), Descriptor::scored(true));
    for world_size in [1, 2] {
        for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
            for residency in [Residency::ALL, NOTHING_RESIDENT] {
                let shards = tempfile::tempdir().unwrap();
                let mut options = EngineOptions { accumulation, residency, max_micro_batches: 5, ..trainer() };
                with_dropout(&mut options);
                on_all_ranks(world_size, |groups| {
                    let mut engine = options.engine(groups, shards.path());
                    let rank = engine.queue.rank();
                    let mut sampler = Sampler::new(24, 1);
                    let batches = data::step_micro_batches(&data, &mut sampler, 0, 3 * world_size, 1, world_size, rank);
                    let mut run = |list: &[(usize, Descriptor)]| outcome(&mut engine, &batches, list);
                    let (alone, grads) = run(&[(0, train), (2, train)]);
                    let (base, _) = run(&[(0, reference), (2, reference)]);
                    let (adapted, _) = run(&[(1, scored)]);
                    assert_eq!(grads.len(), LAYERS);
                    assert_ne!(alone, base);
                    let list = [(0, reference), (0, train), (1, scored), (2, reference), (2, train)];
                    let expected = [&base[0], &alone[0], &adapted[0], &base[1], &alone[1]].map(Vec::clone);
                    assert_eq!(run(&list), (expected.to_vec(), grads.clone()));
                    let list = [(2, reference), (0, train), (2, train), (1, scored)];
                    let expected = [&base[1], &alone[0], &alone[1], &adapted[0]].map(Vec::clone);
                    assert_eq!(run(&list), (expected.to_vec(), grads));
                });
            }
        }
    }
}

#[test]
fn a_backward_pass_needs_the_adapter_and_a_run_that_trains() {
    let shards = tempfile::tempdir().unwrap();
    let (objective, update) = (Quadratic { linear: 0.02, square: 0.01 }, update(1, 0.0));
    on_all_ranks(1, |groups| {
        let mut engine = trainer().engine(groups, shards.path());
        let mut refused = |args: &RunArgs<'_>| format!("{:#}", engine.run(args, &[]).unwrap_err());
        let without = [Descriptor { adapter: false, gradient: true }];
        let scored = [Descriptor::scored(true)];
        let args = trains(&without, &objective, &update);
        assert_eq!(refused(&args), "a backward pass without the adapter");
        let args = trains(&scored, &objective, &update);
        assert_eq!(refused(&args), "0 micro-batches have a backward pass in Train");
        let args = RunArgs { mode: Mode::Score, ..trains(&[Descriptor::TRAINED], &objective, &update) };
        assert_eq!(refused(&args), "1 micro-batches have a backward pass in Score");
    });
}
