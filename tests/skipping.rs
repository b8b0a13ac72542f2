//! Steps whose loss or gradient is not finite: they update nothing on any rank and are counted, and too many in a row
//! end the run with the last good adapter saved.

mod common;

use std::process::Command;

use common::cli::{Place, fails, metrics, succeeds, train_with};
use common::relative_error;
use common::running::{Running, signal};
use fsdp_qlora::testing::{ModelSpec, adapter};
use serde_json::Value;

/// A token that no row has at first.
const POISON: usize = 300;
/// Width of the tiny model.
const HIDDEN_SIZE: usize = 64;
const ADAPTER: &str = "out/adapter_model.safetensors";

/// A place where this many of the 24 rows compute NaN. With one of them, one of the four steps of an epoch does, and
/// one rank alone: the first input of a token is 0, that of [`POISON`] is not, and the norm multiplies it by 3e38.
fn place(poisoned: usize) -> Place {
    let place = Place::new();
    let mut bytes = place.read("model/model.safetensors");
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let begin = |tensor: &str| 8 + len + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    let mut set = |at: usize, value: f32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    for token in 0..320 {
        let value = if token == POISON { 100.0 } else { 0.0 };
        set(begin("model.embed_tokens.weight") + token * HIDDEN_SIZE * 4, value);
    }
    set(begin("model.layers.0.input_layernorm.weight"), 3e38);
    place.write("model/model.safetensors", bytes);
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    let mut rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &mut rows[..poisoned] {
        (row["input_ids"][5], row["labels"][5]) = (POISON.into(), (-100).into());
    }
    place.write("rows.jsonl", rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    place
}

/// The program on some ranks, or alone.
fn on(place: &Place, ranks: usize, sets: &[&str]) -> Command {
    let args = train_with(sets);
    if ranks == 1 { place.command(&args) } else { place.mpirun(ranks, &args) }
}

/// Values of an adapter, which must be whole and finite.
fn values(place: &Place, dir: &str) -> Vec<f32> {
    let spec = ModelSpec::load(&place.path("model")).unwrap();
    adapter::load(&place.path(dir), &spec).unwrap().layers.concat()
}

/// The part of each line that interruptions must not change.
fn decided(place: &Place) -> Vec<[Value; 4]> {
    let lines = metrics(&place.read("out/metrics.jsonl"));
    lines.iter().map(|line| ["step", "loss", "grad_norm", "skipped_steps"].map(|key| line[key].clone())).collect()
}

#[test]
fn a_step_with_nan_on_one_rank_updates_nothing_on_any_rank_and_is_counted() {
    let sets = ["training.max_steps=16", "training.save_steps=3", "training.save_total_limit=null"];
    let mut adapters = Vec::new();
    for ranks in [1, 2] {
        let place = place(1);
        let text = succeeds(on(&place, ranks, &sets));
        assert!(text.contains("so the step updated nothing; 1 in a row (training.max_skipped_steps: 5)"), "{text}");
        let lines = metrics(&place.read("out/metrics.jsonl"));
        let skipped: Vec<usize> = (0..16).filter(|&i| lines[i]["loss"].is_null()).collect();
        // The row comes once in an epoch.
        assert_eq!(skipped.iter().map(|i| i / 4).collect::<Vec<_>>(), [0, 1, 2, 3]);
        for (i, line) in lines.iter().enumerate() {
            let before = skipped.iter().filter(|&&step| step <= i).count();
            assert_eq!(line["skipped_steps"].as_u64().unwrap_or(0), before as u64, "{line}");
        }
        let state: Value = serde_json::from_slice(&place.read("out/checkpoint-15/state.json")).unwrap();
        let before = skipped.iter().filter(|&&step| step < 15).count();
        assert_eq!(state["progress"]["num_skipped"], before, "{state}");
        assert_eq!(state["progress"]["num_updates"], 15 - before, "{state}");
        adapters.push(values(&place, "out"));
    }
    let error = relative_error(&adapters[1], &adapters[0]);
    assert!(error < 2e-5, "two ranks learned something else than one: {error:e}");
}

#[test]
fn too_many_skipped_steps_in_a_row_end_the_run_and_keep_the_last_good_adapter() {
    for ranks in [1, 2] {
        let (place, steps) = (place(1), ["training.max_steps=16", "training.save_steps=null"]);
        let text = fails(on(&place, ranks, &[&steps[..], &["training.max_skipped_steps=0"]].concat()), 1);
        let lines = metrics(&place.read("out/metrics.jsonl"));
        assert!(lines.last().unwrap()["loss"].is_null() && lines.len() > 1, "{text}");
        let kept = format!("out/checkpoint-{}", lines.len() - 1);
        for words in ["1 in a row (training.max_skipped_steps: 0)", "lower training.learning_rate", &kept] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let run: Value = serde_json::from_slice(&place.read("out/run.json")).unwrap();
        assert!(run["state"] == "failed" && run["reason"].as_str().unwrap().contains(&kept), "{run}");
        let saved = values(&place, &kept);
        // The same run goes on from there, and then that step may be skipped.
        let text = succeeds(on(&place, ranks, &steps));
        assert!(text.contains(&format!("going on after step {},", lines.len() - 1)), "{text}");
        assert_ne!(values(&place, "out"), saved);
        let whole = self::place(1);
        succeeds(on(&whole, ranks, &steps));
        assert!(place.read(ADAPTER) == whole.read(ADAPTER), "the adapters differ");
        assert_eq!(decided(&place), decided(&whole));
    }
}

#[test]
fn an_adapter_that_an_update_has_spoilt_is_not_the_last_good_one() {
    let place = Place::new();
    // The learning rate is 0 at the first step, and then it is too high for any adapter.
    let sets = [
        "training.learning_rate=1e30",
        "training.max_grad_norm=null",
        "training.lr_scheduler_type=constant_with_warmup",
        "training.warmup_steps=1",
        "training.max_steps=9",
        "training.save_steps=1",
        "training.save_total_limit=1",
    ];
    let text = fails(place.mpirun(2, &train_with(&sets)), 1);
    assert!(text.contains("step 3: loss NaN") && text.contains("step 7: loss NaN"), "{text}");
    assert!(text.contains("5 in a row (training.max_skipped_steps: 5); training diverged"), "{text}");
    assert!(text.contains("the last good adapter, after step 1, is in out/checkpoint-1"), "{text}");
    let args = ["eval", "--model", "model", "--adapter", "out/checkpoint-1", "--dataset", "rows.jsonl"];
    succeeds(place.command(&args));
    // A run that ends before so many steps are skipped is no better.
    let text = fails(
        place.mpirun(2, &[&train_with(&sets)[..], &["--set", "training.max_steps=4", "--overwrite"]].concat()),
        1,
    );
    assert!(text.contains("with the adapter after step 2 the loss is not finite"), "{text}");
    assert!(text.contains("checkpoint-1,") && !place.path(ADAPTER).exists(), "{text}");
}

#[test]
fn the_count_of_skipped_steps_goes_on_after_a_stop() {
    // No step can be computed.
    let (place, sets) = (place(24), ["training.max_steps=60", "training.max_skipped_steps=40"]);
    let mut running = Running::start(&place, place.mpirun(2, &train_with(&sets)));
    assert!(running.says("step 7/"), "{}", running.text());
    assert!(signal(place.ranks()[0], "USR1"));
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    let text = fails(place.mpirun(2, &train_with(&sets)), 1);
    assert!(text.contains("going on after step") && text.contains("step 40: loss NaN"), "{text}");
    assert!(text.contains("40 in a row") && text.contains("nothing was learned before"), "{text}");
    assert!(!text.contains("step 41"), "{text}");
}
