//! Adapters whose modules have several ranks, or none in some layer, and LoRA+.

use std::time::Duration;

use fsdp_qlora::testing::{
    Adapter, AdapterSettings, Gather, LoraKeys, MicroBatch, ModelSpec, Modules, Packing, Queue, Trainable, Trainables,
    Update, Values, adapter,
};

use super::{Curve, assert_close, take_step, train, train_in_groups};
use crate::common::steps::{NOTHING_RESIDENT, layers, rows, trainer, update};
use crate::common::{golden, on_all_ranks, relative_error};

const STEPS: usize = 4;

#[test]
fn three_steps_of_several_ranks_with_lora_plus_are_those_of_peft() {
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden("lora/steps.json")).unwrap()).unwrap();
    let (recipe, shards, data) = (&expected["recipe"], tempfile::tempdir().unwrap(), rows(Packing::None));
    let number = |key: &str| recipe[key].as_f64().unwrap();
    let mut options = trainer().with_adapter("lora/start");
    let spec = ModelSpec::load(&options.model).unwrap();
    let place = tempfile::tempdir().unwrap();
    std::fs::copy(golden("lora/final/adapter_config.json"), place.path().join("adapter_config.json")).unwrap();
    std::fs::copy(golden("lora/grads.safetensors"), place.path().join("adapter_model.safetensors")).unwrap();
    let (grads, last) =
        (adapter::load(place.path(), &spec).unwrap(), adapter::load(&golden("lora/final"), &spec).unwrap());
    let trainables = Trainables::new(&spec, last.settings.lora_config());
    for world_size in [1, 2, 4] {
        options.max_micro_batches = 4 / world_size;
        on_all_ranks(world_size, |groups| {
            let mut engine = options.engine(groups, shards.path());
            for (i, expected) in expected["steps"].as_array().unwrap().iter().enumerate() {
                let micro = |m: usize| {
                    let document = data.document(4 * i + world_size * m + engine.queue.rank());
                    let mut batch = MicroBatch::new();
                    batch.push(document.sample_idx, &document.input_ids, &document.is_target);
                    batch
                };
                let batches: Vec<_> = (0..4 / world_size).map(micro).collect();
                let update = Update {
                    lr_ratio: number("loraplus_lr_ratio"),
                    weight_decay: number("weight_decay"),
                    max_grad_norm: None,
                    ..update(i as u32 + 1, number("learning_rate"))
                };
                let record = take_step(&mut engine, &batches, 4 / world_size, &update);
                for (what, ours) in [("loss", record.loss), ("grad_norm", record.grad_norm)] {
                    let theirs = expected[what].as_f64().unwrap();
                    assert!((ours - theirs).abs() <= 1e-5 * theirs, "step {}: {what} {ours} for {theirs}", i + 1);
                }
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
                for Trainable { module, kind, range, .. } in trainables.layers[layer].list() {
                    let error = relative_error(&ours[range.clone()], &last.layers[layer][range.clone()]);
                    assert!(error <= 1e-5, "layer {layer} {module} {kind:?} after the last step: off by {error:e}");
                }
            }
        });
    }
}

/// An adapter of one layer, and there without the MLP.
fn sparse() -> Adapter {
    let spec = ModelSpec::load(&trainer().model).unwrap();
    let mut keys = LoraKeys::uniform(4, 8.0, Modules::AllLinear);
    keys.layers.indices = Some(vec![1]);
    keys.excluded = Modules::read_excluded(&r".*\.mlp\.(gate|up|down)_proj".into());
    let mut adapter = adapter::fresh(AdapterSettings::new(keys, 0.0, &spec).unwrap(), &spec, 42);
    adapter.layers[1].iter_mut().filter(|value| **value == 0.0).for_each(|value| *value = 0.01);
    adapter
}

/// Neither a place nor a number of ranks changes what a ragged adapter learns; a layer may have nothing to learn.
#[test]
fn ragged_adapters_stream_as_others_do() {
    let ragged = adapter::load(&golden("lora/start"), &ModelSpec::load(&trainer().model).unwrap()).unwrap();
    for (what, adapter) in [("ragged", ragged), ("sparse", sparse())] {
        let mut options = trainer();
        options.adapter = Some(adapter);
        let alone: Curve = train(&options, 1, 1, STEPS, 0.1);
        for world_size in [2, 3] {
            let resident = train(&options, world_size, 1, STEPS, 0.1);
            assert_close(&resident, &alone, &format!("{what} on {world_size} ranks"));
            let mut streamed = options.clone();
            (streamed.gather, streamed.residency) = (Gather::Host, NOTHING_RESIDENT);
            streamed.delay = Duration::from_millis(1);
            assert!(train_in_groups(&streamed, (world_size, world_size), 1, STEPS, 0.1) == resident, "{what} streamed");
        }
        assert_eq!(alone.values[0].is_empty(), what == "sparse");
        assert_ne!(alone.values[1], options.adapter.unwrap().layers[1]);
    }
}
