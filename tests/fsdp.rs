//! Options that must not change results, and the gates that prove streaming right.

mod common;

#[path = "fsdp/abandoned.rs"]
mod abandoned;
#[path = "fsdp/dropout.rs"]
mod dropout;
#[path = "fsdp/left_out.rs"]
mod left_out;
#[path = "fsdp/ragged.rs"]
mod ragged;

use std::time::Duration;

use common::steps::{LAYERS, NOTHING_RESIDENT, Quadratic, layers, rows, trainer, update};
use common::{CpuEngine, EngineOptions, golden, on_all_ranks, on_groups, relative_error};
use fsdp_qlora::testing::{
    Accumulation, Action, Dataset, Descriptor, Gather, Keep, MicroBatch, Mode, NumUnits, Packing, Queue, Residency,
    RunArgs, Sampler, StepArgs, StepRecord, Trainable, Trainables, Update, Values, adapter, build, check, data, eval,
    step,
};

/// Takes one step with the seed of all tests.
fn take_step(engine: &mut CpuEngine, batches: &[MicroBatch], num_micro_batches: usize, update: &Update) -> StepRecord {
    let args = StepArgs { step: update.step, num_micro_batches, update, seed: 42, next: None };
    step(engine, batches, &args).unwrap()
}

/// Losses, the gradients of step 1 by layer, and the final values by layer.
#[derive(Clone, Debug, PartialEq)]
struct Curve {
    losses: Vec<f64>,
    grads: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

/// Sequences of a step.
const GLOBAL_BATCH: usize = 8;

/// Trains on a global batch of shuffled rows a step, all ranks holding one base.
fn train(options: &EngineOptions, world_size: usize, per_device: usize, num_steps: usize, dropout: f32) -> Curve {
    train_in_groups(options, (world_size, world_size), per_device, num_steps, dropout)
}

/// Trains as [`train`] does, where groups of `num_shards` ranks each hold a base.
fn train_in_groups(
    options: &EngineOptions,
    (world_size, num_shards): (usize, usize),
    per_device: usize,
    num_steps: usize,
    dropout: f32,
) -> Curve {
    let shards = tempfile::tempdir().unwrap();
    let data = rows(Packing::None);
    let mut options = options.clone();
    options.max_micro_batches = GLOBAL_BATCH.div_ceil(world_size * per_device);
    options.adapter.as_mut().unwrap().settings.dropout = dropout;
    let curves = on_groups(world_size, num_shards, |groups| {
        let mut engine = options.engine(groups, shards.path());
        let mut sampler = Sampler::new(data.sequences.len(), 42);
        let mut curve = Curve { losses: Vec::new(), grads: Vec::new(), values: Vec::new() };
        for i in 0..num_steps {
            let rank = engine.queue.rank();
            let batches = step_batches(&data, &mut sampler, i, per_device, world_size, rank);
            let update = update(i as u32 + 1, 1e-2);
            let record = take_step(&mut engine, &batches, options.max_micro_batches, &update);
            curve.losses.push(record.loss);
            if i == 0 {
                curve.grads = layers(&mut engine, Values::Grad);
            }
        }
        engine.check_replicas().unwrap();
        check_snapshot(&mut engine);
        curve.values = layers(&mut engine, Values::Master);
        curve
    });
    assert!(curves.iter().all(|c| c == &curves[0]), "all ranks say the same");
    curves[0].clone()
}

/// Compares a snapshot, which is on rank 0 alone, with the values that every rank can gather.
fn check_snapshot(engine: &mut CpuEngine) {
    let expected = [Values::Master, Values::ExpAvg, Values::ExpAvgSq].map(|kind| layers(engine, kind));
    let mut snapshot = engine.take_snapshot_memory();
    engine.snapshot(snapshot.as_mut()).unwrap();
    let trained = engine.trained_values().unwrap();
    if engine.queue.rank() > 0 {
        assert!(snapshot.is_none() && trained.is_empty());
        return;
    }
    let snapshot = snapshot.unwrap();
    for (kind, expected) in expected.iter().enumerate() {
        assert!(snapshot.values(kind) == *expected, "values {kind} of a snapshot are others");
    }
    assert!(trained == expected[0]);
}

fn step_batches(
    data: &Dataset,
    sampler: &mut Sampler,
    step_idx: usize,
    per_device: usize,
    world_size: usize,
    rank: usize,
) -> Vec<MicroBatch> {
    let cursor = (step_idx * GLOBAL_BATCH) as u64;
    data::step_micro_batches(data, sampler, cursor, GLOBAL_BATCH, per_device, world_size, rank)
}

fn assert_close(a: &Curve, b: &Curve, what: &str) {
    let relative = |i: usize| (a.losses[i] - b.losses[i]).abs() / b.losses[i];
    assert!(relative(0) <= 1e-6, "{what}: step 1 {} for {}", a.losses[0], b.losses[0]);
    for (layer, (x, y)) in a.grads.iter().zip(&b.grads).enumerate() {
        let error = relative_error(x, y);
        assert!(error <= 1e-5, "{what}: gradients of layer {layer} differ by {error:e}");
    }
    for i in 0..a.losses.len() {
        assert!(relative(i) <= 1e-5, "{what}: step {} {} for {}", i + 1, a.losses[i], b.losses[i]);
    }
}

#[test]
fn six_steps_are_those_of_peft() {
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden("qlora_steps/steps.json")).unwrap()).unwrap();
    let shards = tempfile::tempdir().unwrap();
    let data = rows(Packing::None);
    let mut options = trainer();
    options.max_micro_batches = 2;
    let config = fsdp_qlora::testing::ModelSpec::load(&options.model).unwrap();
    let final_adapter = adapter::load(&golden("qlora_steps/final"), &config).unwrap();
    let grads_dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("qlora_steps/final/adapter_config.json"), grads_dir.path().join("adapter_config.json"))
        .unwrap();
    std::fs::copy(golden("qlora_steps/grads.safetensors"), grads_dir.path().join("adapter_model.safetensors")).unwrap();
    let grads = adapter::load(grads_dir.path(), &config).unwrap();
    let trainables = Trainables::new(&config, final_adapter.settings.lora_config());
    on_all_ranks(2, |groups| {
        let mut engine = options.engine(groups, shards.path());
        let rank = engine.queue.rank();
        for (i, expected) in expected["steps"].as_array().unwrap().iter().enumerate() {
            // Rows in the order of the file: 4 a step, one a micro-batch.
            let micro = |m: usize| {
                let document = data.document(4 * i + 2 * m + rank);
                let mut batch = MicroBatch::new();
                batch.push(document.sample_idx, &document.input_ids, &document.is_target);
                batch
            };
            let update = update(i as u32 + 1, expected["learning_rate"].as_f64().unwrap());
            let record = take_step(&mut engine, &[micro(0), micro(1)], 2, &update);
            let close = |what: &str, ours: f64, tolerance: f64| {
                let theirs = expected[what].as_f64().unwrap();
                assert!((ours - theirs).abs() <= tolerance * theirs, "step {}: {what} {ours} for {theirs}", i + 1);
            };
            close("loss", record.loss, 1e-5);
            close("grad_norm", record.grad_norm, 1e-5);
            assert_eq!(record.num_target_tokens, expected["num_target_tokens"].as_u64().unwrap());
            if i > 0 {
                continue;
            }
            for (layer, ours) in layers(&mut engine, Values::Grad).iter().enumerate() {
                for Trainable { module, kind, range, .. } in trainables.layers[layer].list() {
                    let error = relative_error(&ours[range.clone()], &grads.layers[layer][range.clone()]);
                    assert!(error <= 1e-5, "gradient of layer {layer} {module} {kind:?}: off by {error:e}");
                }
            }
        }
        for (layer, ours) in layers(&mut engine, Values::Master).iter().enumerate() {
            let error = relative_error(ours, &final_adapter.layers[layer]);
            assert!(error <= 1e-5, "final adapter of layer {layer} differs by {error:e}");
        }
    });
}

#[test]
fn the_same_global_batch_on_any_number_of_ranks() {
    let reference = train(&trainer(), 1, GLOBAL_BATCH, 20, 0.1);
    assert!(reference.losses[19] < reference.losses[0], "it learns: {:?}", reference.losses);
    for (world_size, per_device) in [(1, 1), (1, 4), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)] {
        let curve = train(&trainer(), world_size, per_device, 20, 0.1);
        assert_close(&curve, &reference, &format!("{world_size} ranks, {per_device} a micro-batch"));
    }
}

/// Choices of kept activations: nothing, parts of some layers or of all, everything.
const KEEPS: [Keep; 7] = [
    Keep::NOTHING,
    Keep { lora: 1, ..Keep::NOTHING },
    Keep::LORA,
    Keep { attention: 1, ..Keep::NOTHING },
    Keep { mlp: 2, rest: 1, ..Keep::NOTHING },
    Keep::DEAREST,
    Keep::EVERYTHING,
];

#[test]
fn movement_and_lifetime_do_not_change_a_bit() {
    let partly = Residency { boundary_buffers: 13, ..Residency::ALL };
    for world_size in [1, 2, 3] {
        let reference = train(&trainer(), world_size, 1, 4, 0.1);
        for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
            for keep in KEEPS {
                for (num_shards, gather, residency, dense_layers, delay) in [
                    (world_size, Gather::Collective, Residency::ALL, 0, 0),
                    (1, Gather::Collective, Residency::ALL, 0, 0),
                    (1, Gather::Collective, Residency::ALL, LAYERS, 0),
                    (world_size, Gather::Host, Residency::ALL, 0, 2),
                    (world_size, Gather::Collective, NOTHING_RESIDENT, 0, 0),
                    (1, Gather::Collective, NOTHING_RESIDENT, 0, 0),
                    (world_size, Gather::Host, NOTHING_RESIDENT, 0, 2),
                    (world_size, Gather::Host, NOTHING_RESIDENT, 1, 1),
                    (world_size, Gather::Collective, partly, 0, 1),
                ] {
                    let mut options = trainer();
                    (options.accumulation, options.keep) = (accumulation, keep);
                    (options.gather, options.residency, options.dense_layers) = (gather, residency, dense_layers);
                    options.delay = Duration::from_millis(delay);
                    let curve = train_in_groups(&options, (world_size, num_shards), 1, 4, 0.1);
                    assert!(
                        curve == reference,
                        "{world_size} ranks, {num_shards} shards, {gather:?}, {accumulation:?}, {keep:?}, {residency:?}, {dense_layers} dense, delay {delay} ms: {:?} for {:?}",
                        curve.losses,
                        reference.losses
                    );
                }
            }
        }
    }
}

#[test]
fn weights_that_are_used_in_place_do_not_change_a_bit() {
    let run = |num_shards, accumulation, gather, residency, dense_layers| {
        let mut options = trainer();
        (options.model, options.load_in_4bit) = (common::golden("tiny"), false);
        (options.accumulation, options.gather) = (accumulation, gather);
        (options.residency, options.dense_layers) = (residency, dense_layers);
        options.delay = Duration::from_millis(1);
        train_in_groups(&options, (2, num_shards), 1, 4, 0.1)
    };
    // The parts of two ranks are put together in buffers; a rank that holds all weights uses them where they lie.
    let reference = run(2, Accumulation::Layer, Gather::Collective, Residency::ALL, 0);
    for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
        for (num_shards, gather, residency, dense_layers) in [
            (1, Gather::Collective, Residency::ALL, 0),
            (1, Gather::Collective, NOTHING_RESIDENT, 0),
            (1, Gather::Collective, NOTHING_RESIDENT, LAYERS),
            (2, Gather::Collective, Residency::ALL, LAYERS),
            (2, Gather::Host, NOTHING_RESIDENT, 1),
        ] {
            let curve = run(num_shards, accumulation, gather, residency, dense_layers);
            let what =
                format!("{num_shards} shards, {accumulation:?}, {gather:?}, {residency:?}, {dense_layers} dense");
            assert!(curve == reference, "{what}: {:?} for {:?}", curve.losses, reference.losses);
        }
    }
}

#[test]
fn backward_of_a_single_micro_batch_finds_what_forward_left() {
    let run = |accumulation, keep| {
        let mut options = trainer();
        (options.accumulation, options.keep) = (accumulation, keep);
        train(&options, 2, GLOBAL_BATCH / 2, 4, 0.1)
    };
    let reference = run(Accumulation::Layer, Keep::EVERYTHING);
    for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
        for keep in KEEPS {
            assert!(run(accumulation, keep) == reference, "{accumulation:?}, {keep:?}");
        }
    }
}

#[test]
fn nodes_that_each_hold_a_base() {
    for (world_size, num_shards) in [(4, 2), (6, 2), (6, 3)] {
        let reference = train(&trainer(), world_size, 1, 4, 0.1);
        let hybrid = train_in_groups(&trainer(), (world_size, num_shards), 1, 4, 0.1);
        // Sums inside a node come first, which is another order than that of all ranks.
        assert_close(&hybrid, &reference, &format!("{world_size} ranks in nodes of {num_shards}"));
        let mut streamed = trainer();
        (streamed.gather, streamed.residency) = (Gather::Host, NOTHING_RESIDENT);
        streamed.delay = Duration::from_millis(1);
        assert!(
            train_in_groups(&streamed, (world_size, num_shards), 1, 4, 0.1) == hybrid,
            "{world_size}, {num_shards}"
        );
    }
}

#[test]
fn replicas_that_differ_are_found() {
    let shards = tempfile::tempdir().unwrap();
    let errors = on_groups(4, 2, |groups| {
        let mut engine = trainer().engine(groups, shards.path());
        if engine.queue.rank() == 3 {
            let mut values = trainer().adapter.unwrap().layers[1].clone();
            *values.last_mut().unwrap() += 1e-6;
            engine.load_trainable(1, &values).unwrap();
        }
        engine.check_replicas().map_err(|e| e.to_string())
    });
    assert_eq!([&errors[0], &errors[2]], [&Ok(()); 2], "they hold the first half");
    assert!(errors[1].as_ref().unwrap_err().starts_with("ranks 3 and 1 should hold the same"), "{errors:?}");
    assert!(errors[3].as_ref().unwrap_err().starts_with("ranks 1 and 3 should hold the same"), "{errors:?}");
}

#[test]
fn gradients_with_delays_are_those_of_the_unsharded_reference() {
    let reference = train(&trainer(), 1, GLOBAL_BATCH, 1, 0.0);
    for world_size in [2, 3, 4] {
        let mut options = trainer();
        options.delay = Duration::from_millis(3);
        assert_close(&train(&options, world_size, 1, 1, 0.0), &reference, &format!("{world_size} ranks"));
    }
}

#[test]
fn packed_documents_are_scored_as_if_they_were_alone() {
    let shards = tempfile::tempdir().unwrap();
    let mut options = trainer();
    (options.mode, options.max_micro_batches) = (Mode::Score, 3);
    on_all_ranks(2, |groups| {
        let mut engine = options.engine(groups, shards.path());
        let (world_size, rank) = (2, engine.queue.rank());
        let mut score = |packing, max_tokens| {
            let data = rows(packing);
            let batches: Vec<_> = data::eval_micro_batches(&data, max_tokens, world_size, rank).collect();
            eval::score(&mut engine, &batches, true).unwrap()
        };
        let (alone, packed, wide) =
            (score(Packing::None, 1), score(Packing::BestFit, 128), score(Packing::BestFit, 256));
        assert_eq!(alone.num_target_tokens, packed.num_target_tokens);
        for other in [packed, wide] {
            assert!((other.loss - alone.loss).abs() <= 1e-6 * alone.loss, "{} for {}", other.loss, alone.loss);
        }
    });
}

#[test]
fn quantized_on_the_fly_or_by_bitsandbytes() {
    let score = |model: &str, double_quant: bool| {
        let shards = tempfile::tempdir().unwrap();
        let mut options = EngineOptions::new(model, Mode::Score);
        options.double_quant = Some(double_quant);
        let data = rows(Packing::None);
        on_all_ranks(1, |groups| {
            let mut engine = options.engine(groups, shards.path());
            let batches: Vec<_> = data::eval_micro_batches(&data, 200, 1, 0).collect();
            eval::score(&mut engine, &batches, false).unwrap().loss
        })[0]
    };
    assert_eq!(score("tiny", false).to_string(), score("tiny-bnb4", false).to_string());
    let (ours, theirs) = (score("tiny", true), score("tiny-bnb4-nested", true));
    assert!((ours - theirs).abs() <= 1e-5 * theirs, "{ours} for {theirs}");
}

#[test]
fn a_rank_receives_only_the_others_shards() {
    let shards = tempfile::tempdir().unwrap();
    for (accumulation, passes) in [(Accumulation::Layer, 1), (Accumulation::MicroBatch, 3)] {
        let mut options = trainer();
        (options.accumulation, options.max_micro_batches) = (accumulation, 3);
        let data = rows(Packing::None);
        on_all_ranks(2, |groups| {
            let mut engine = options.engine(groups, shards.path());
            let rank = engine.queue.rank();
            let batches = data::step_micro_batches(&data, &mut Sampler::new(24, 1), 0, 6, 1, 2, rank);
            let record = take_step(&mut engine, &batches, 3, &update(1, 1e-3));
            // Its own file has one shard of each unit; each pass gathers layers twice and the head once.
            let (layers, head) = engine.shard_bytes();
            assert!(layers > 0 && head > 0);
            // Between micro-batches layer 0 stays.
            let kept = (passes - 1) * layers / LAYERS;
            assert_eq!(record.gathered_bytes, passes * (2 * layers + head) - kept);
        });
    }
}

/// Runs one training step with a schedule that lacks an action. `Err` is the message of the executor or the checker.
fn run_without(
    removed: Option<usize>,
    world_size: usize,
    residency: Residency,
) -> (Vec<Action>, Vec<anyhow::Result<()>>, anyhow::Result<()>) {
    let shards = tempfile::tempdir().unwrap();
    let mut options = trainer();
    (options.max_micro_batches, options.delay) = (3, Duration::from_millis(2));
    options.residency = residency;
    let data = rows(Packing::None);
    let config = fsdp_qlora::testing::ModelSpec::load(&options.model).unwrap();
    let mut results = on_all_ranks(world_size, |groups| {
        let mut engine = options.engine(groups, shards.path());
        let inputs = engine.limits().largest(NumUnits::new(&config));
        let mut actions = build(&inputs);
        if let Some(i) = removed {
            actions.remove(i);
        }
        let checked = check(&actions, &inputs);
        let update = update(1, 1e-2);
        let args = RunArgs {
            mode: Mode::Train,
            micro_batches: &[Descriptor::TRAINED; 3],
            objective: Some(&Quadratic { linear: 0.01, square: 0.0 }),
            dropout: None,
            update: Some(&update),
            next: None,
        };
        let rank = engine.queue.rank();
        let batches = data::step_micro_batches(&data, &mut Sampler::new(24, 1), 0, 6, 1, world_size, rank);
        (actions.clone(), engine.perform(&actions, &args, &batches).map(|_| ()), checked)
    });
    let (actions, _, checked) = results.pop().unwrap();
    (actions, results.into_iter().map(|(_, performed, _)| performed).collect(), checked)
}

fn is_movement(action: &Action) -> bool {
    let starts = |action: &Action| {
        matches!(action, Action::Gather { .. } | Action::Reduce { .. } | Action::Put { .. } | Action::Fetch { .. })
    };
    action.is_wait() || starts(action)
}

#[test]
fn without_any_one_movement_or_wait_the_checker_and_the_executor_fail() {
    // There are gathers of two passes and of the head, and reduces; where boundaries of three micro-batches are
    // offloaded, there is a put and a fetch of each. All of them are started and waited for.
    for (residency, copies) in [(Residency::ALL, 0), (NOTHING_RESIDENT, 2 * 3 * LAYERS)] {
        let (actions, performed, checked) = run_without(None, 2, residency);
        assert!(performed.iter().all(Result::is_ok) && checked.is_ok());
        let movements: Vec<usize> = (0..actions.len()).filter(|&i| is_movement(&actions[i])).collect();
        assert_eq!(movements.len(), 2 * (2 * LAYERS + 1 + LAYERS + copies));
        for i in movements {
            let (_, performed, checked) = run_without(Some(i), 2, residency);
            assert!(checked.is_err(), "the checker passes without {:?}", actions[i]);
            assert!(performed.iter().all(Result::is_err), "the executor runs without {:?}", actions[i]);
        }
    }
}
