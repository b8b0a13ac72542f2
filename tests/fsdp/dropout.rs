//! Dropout's masks belong to rows: neither packing nor ranks nor threads change them.

use fsdp_qlora::testing::{Packing, Queue, Sampler, StepArgs, Values, data, step};

use super::{Curve, assert_close};
use crate::common::on_all_ranks;
use crate::common::steps::{layers, rows, trainer, update};

/// Rows of the data set, which are all in the one step.
const ROWS: usize = 24;

/// Takes one step of all rows with half of the inputs dropped.
fn one_step(packing: Packing, world_size: usize, num_threads: usize, seed: u64) -> Curve {
    let shards = tempfile::tempdir().unwrap();
    let data = rows(packing);
    assert_eq!(data.num_documents(), ROWS);
    let num_sequences = data.sequences.len();
    let num_micro_batches = num_sequences.div_ceil(world_size);
    let mut options = trainer();
    (options.max_micro_batches, options.num_threads) = (num_micro_batches, num_threads);
    options.adapter.as_mut().unwrap().settings.dropout = 0.5;
    let curves = on_all_ranks(world_size, |groups| {
        let mut engine = options.engine(groups, shards.path());
        let (rank, mut sampler) = (engine.queue.rank(), Sampler::new(num_sequences, 42));
        let batches = data::step_micro_batches(&data, &mut sampler, 0, num_sequences, 1, world_size, rank);
        let update = update(1, 1e-2);
        let record =
            step(&mut engine, &batches, &StepArgs { step: 1, num_micro_batches, update: &update, seed, next: None });
        let grads = layers(&mut engine, Values::Grad);
        Curve { losses: vec![record.unwrap().loss], grads, values: layers(&mut engine, Values::Master) }
    });
    curves.into_iter().next().unwrap()
}

#[test]
fn the_same_rows_have_the_same_masks_however_they_are_packed_and_on_any_number_of_ranks() {
    let alone = one_step(Packing::None, 1, 1, 42);
    let packed = rows(Packing::BestFit).sequences;
    assert!(packed.iter().any(|sequence| sequence.len() > 2), "several rows share a sequence: {packed:?}");
    for world_size in 1..=4 {
        for packing in [Packing::None, Packing::BestFit] {
            let curve = one_step(packing, world_size, 1, 42);
            assert_close(&curve, &alone, &format!("{packing:?} on {world_size} ranks"));
        }
    }
    // With other masks the same comparison fails.
    let other = one_step(Packing::None, 1, 1, 43);
    let difference = (other.losses[0] - alone.losses[0]).abs() / alone.losses[0];
    assert!(difference > 1e-4, "another seed changes the loss by {difference:e} only");
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for packing in [Packing::None, Packing::BestFit] {
        let reference = one_step(packing, 1, 1, 42);
        for num_threads in [2, 3, 4, 7] {
            assert!(one_step(packing, 1, num_threads, 42) == reference, "{packing:?}, {num_threads} threads");
        }
    }
}
