//! A step that is abandoned changes nothing, and the step after it is as if it had never begun.

use fsdp_qlora::testing::{
    Accumulation, MicroBatch, Packing, Queue, Residency, Sampler, StepArgs, Values, data, step_unless,
};

use super::common::steps::{NOTHING_RESIDENT, layers, rows, trainer, update};
use super::common::{CpuEngine, on_all_ranks};

/// Returns the trained values and what AdamW knows about them.
fn state(engine: &mut CpuEngine) -> Vec<Vec<f32>> {
    [Values::Master, Values::ExpAvg, Values::ExpAvgSq].into_iter().flat_map(|kind| layers(engine, kind)).collect()
}

/// Takes a step unless it has to be abandoned before an action. Returns whether it was taken.
fn takes_step(engine: &mut CpuEngine, batches: &[MicroBatch], abandoned_before: usize) -> bool {
    let update = update(1, 1e-2);
    let args = StepArgs { step: 1, num_micro_batches: 3, update: &update, seed: 42, next: None };
    let mut num_asked = 0;
    let mut abandons = |_| {
        num_asked += 1;
        Ok(num_asked > abandoned_before)
    };
    step_unless(engine, batches, &args, &mut abandons).unwrap().is_some()
}

#[test]
fn a_step_that_is_abandoned_before_any_action_changes_nothing() {
    let data = rows(Packing::None);
    for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
        for residency in [Residency::ALL, NOTHING_RESIDENT] {
            let shards = tempfile::tempdir().unwrap();
            let mut options = trainer();
            (options.max_micro_batches, options.accumulation, options.residency) = (3, accumulation, residency);
            let run = |is_abandoned: bool| {
                on_all_ranks(2, |groups| {
                    let mut engine = options.engine(groups, shards.path());
                    let rank = engine.queue.rank();
                    let batches = data::step_micro_batches(&data, &mut Sampler::new(24, 1), 0, 6, 1, 2, rank);
                    let before = state(&mut engine);
                    let mut num_actions = if is_abandoned { 0 } else { usize::MAX };
                    while !takes_step(&mut engine, &batches, num_actions) {
                        assert!(state(&mut engine) == before, "abandoned before action {num_actions}");
                        num_actions += 1;
                    }
                    assert!(num_actions > 30, "{num_actions} actions");
                    state(&mut engine)
                })
            };
            assert!(run(true) == run(false), "{accumulation:?}, {residency:?}");
        }
    }
}
