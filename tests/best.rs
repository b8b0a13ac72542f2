//! `load_best_model_at_end` and early stopping: the result is the best adapter, and a run that was stopped, or goes on
//! elsewhere, ends with the same one.

mod common;

use common::cli::{Place, TRAIN, metrics, succeeds, train_with};
use common::running::{Running, signal};
use serde_json::Value;

const ADAPTER: &str = "adapter_model.safetensors";
/// With these rows the held-out loss falls until step 6 and rises then; checkpoints are those of steps 4, 8, …
const BEST_OF_ALL: usize = 6;
const BEST_CHECKPOINT: usize = 4;
/// Evaluations that are no better and end the run, and the step that they end it at.
const PATIENT: &str = "training.early_stopping_patience=20";
const LAST_STEP: usize = BEST_OF_ALL + 2 * 20;

/// A place that trains on one half of the rows and evaluates on the other.
fn place() -> Place {
    let place = Place::new();
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    let rows: Vec<String> = rows.lines().map(|row| format!("{row}\n")).collect();
    place.write("train.jsonl", rows[..12].concat());
    place.write("eval.jsonl", rows[12..].concat());
    place.write(
        "recipe.yaml",
        "model: model\noutput_dir: out\n\
         data: {train: train.jsonl, eval: eval.jsonl, max_length: 128, packing: false}\n\
         lora: {r: 4, lora_dropout: 0.1}\n\
         training: {global_batch_size: 6, max_steps: 60, learning_rate: 2.0e-3, warmup_steps: 0, lr_scheduler_type: constant,\n\
         \u{20} eval_steps: 2, save_steps: 4, save_total_limit: 1, load_best_model_at_end: true}\n",
    );
    place
}

fn json(place: &Place, file: &str) -> Value {
    serde_json::from_slice(&place.read(file)).unwrap()
}

/// The part of each line that interruptions must not change.
fn decided(place: &Place, dir: &str) -> Vec<[Value; 6]> {
    let keys = ["step", "loss", "grad_norm", "eval_loss", "adapter_step", "best_eval_loss"];
    let lines = metrics(&place.read(&format!("{dir}/metrics.jsonl")));
    lines.iter().map(|line| keys.map(|key| line[key].clone())).collect()
}

fn adapter(place: &Place, dir: &str) -> Vec<u8> {
    place.read(&format!("{dir}/{ADAPTER}"))
}

/// Names of the checkpoints of an output folder.
fn checkpoints(place: &Place, dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir(place.path(dir)).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name.starts_with("checkpoint-"));
    names.sort();
    names
}

#[test]
fn the_result_is_the_best_checkpoint_which_is_never_removed() {
    let place = place();
    let sets = ["training.max_steps=30"];
    let text = succeeds(place.mpirun(2, &train_with(&sets)));
    assert!(text.contains("the adapter is that after step 4, whose eval_loss"), "{text}");
    let best = format!("out/checkpoint-{BEST_CHECKPOINT}");
    assert!(adapter(&place, "out") == adapter(&place, &best), "the result is not that of the checkpoint");
    assert_eq!(checkpoints(&place, "out"), ["checkpoint-28", "checkpoint-4"]);
    assert_eq!(json(&place, "out/run.json")["adapter_step"], BEST_CHECKPOINT);
    let lines = metrics(&place.read("out/metrics.jsonl"));
    let eval_loss =
        |step: usize| lines.iter().find(|line| line["step"] == step && !line["eval_loss"].is_null()).unwrap();
    let last = lines.last().unwrap();
    assert_eq!((&last["step"], &last["adapter_step"]), (&30.into(), &BEST_CHECKPOINT.into()), "{last}");
    assert_eq!(last["best_eval_loss"], eval_loss(BEST_CHECKPOINT)["eval_loss"]);
    let evaluations = &json(&place, "out/checkpoint-28/state.json")["progress"]["evaluations"];
    assert_eq!(evaluations["best"]["step"], BEST_OF_ALL, "{evaluations}");
    assert_eq!(evaluations["best"]["eval_loss"], eval_loss(BEST_OF_ALL)["eval_loss"]);
    assert_eq!(evaluations["best_checkpoint"]["step"], BEST_CHECKPOINT);
    assert_eq!(evaluations["num_no_better"], (28 - BEST_OF_ALL) / 2);

    // Without the key, the result is the adapter of the last step.
    let plain = ["training.max_steps=30", "training.load_best_model_at_end=false", "output_dir=plain"];
    succeeds(place.mpirun(2, &train_with(&plain)));
    assert!(adapter(&place, "plain") != adapter(&place, "out"));
    assert_eq!(json(&place, "plain/run.json")["adapter_step"], 30);
    assert_eq!(checkpoints(&place, "plain"), ["checkpoint-28"]);
    // If the last adapter is the best, it needs no checkpoint.
    succeeds(place.mpirun(2, &train_with(&["training.max_steps=6", "output_dir=short"])));
    assert_eq!(json(&place, "short/run.json")["adapter_step"], BEST_OF_ALL);
}

#[test]
fn evaluations_that_are_no_better_end_the_run() {
    let place = place();
    for (sets, last_step) in [
        (["training.early_stopping_patience=3", "training.early_stopping_threshold=0"], BEST_OF_ALL + 6),
        // The gains of steps 4 and 6 are less than that.
        (["training.early_stopping_patience=3", "training.early_stopping_threshold=0.01"], 8),
    ] {
        let text = succeeds(place.mpirun(2, &[&train_with(&sets)[..], &["--overwrite"]].concat()));
        let words = "training ends early: 3 evaluation(s) in a row did not beat the best before by more than 0";
        assert!(text.contains(words), "{text}");
        let lines = metrics(&place.read("out/metrics.jsonl"));
        assert_eq!(lines.last().unwrap()["step"], last_step);
        assert_eq!(json(&place, "out/run.json")["adapter_step"], BEST_CHECKPOINT);
        assert_eq!(json(&place, "out/run.json")["state"], "finished");
        let text = succeeds(place.mpirun(2, &[&train_with(&sets)[..]].concat()));
        assert!(text.contains("already finished"), "{text}");
    }
}

#[test]
fn a_run_that_was_stopped_ends_with_the_same_best_adapter() {
    let (whole, sets) = (place(), [PATIENT]);
    succeeds(whole.mpirun(2, &train_with(&sets)));
    assert_eq!(decided(&whole, "out").last().unwrap()[0], LAST_STEP);
    let place = place();
    let mut running = Running::start(&place, place.mpirun(2, &train_with(&sets)));
    assert!(running.says("step 9/"), "{}", running.text());
    assert!(signal(place.ranks()[0], "USR1"));
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    let newest = checkpoints(&place, "out").into_iter().find(|name| name != "checkpoint-4").unwrap();
    // The best checkpoint follows to another folder.
    let resume = format!("training.resume=out/{newest}");
    succeeds(place.mpirun(2, &train_with(&[PATIENT, &resume, "output_dir=elsewhere"])));
    let text = succeeds(place.mpirun(2, &train_with(&sets)));
    assert!(text.contains("going on after step"), "{text}");
    for dir in ["out", "elsewhere"] {
        assert!(adapter(&place, dir) == adapter(&whole, "out"), "{dir}: the adapters differ");
        assert_eq!(decided(&place, dir), decided(&whole, "out"), "{dir}");
        assert_eq!(json(&place, &format!("{dir}/run.json"))["adapter_step"], BEST_CHECKPOINT, "{dir}");
        assert!(place.path(dir).join("checkpoint-4/state.json").exists(), "{dir}");
    }
}

#[test]
fn a_killed_run_ends_with_the_same_best_adapter_on_other_ranks_too() {
    // The one checkpoint beside the best is a new one after each step.
    let sets = ["training.max_steps=24", "training.eval_steps=1", "training.save_steps=1"];
    let whole = place();
    succeeds(whole.mpirun(2, &train_with(&sets)));
    let (place, best) = (place(), json(&whole, "out/run.json")["adapter_step"].clone());
    for step in [3, 6, 9, 14] {
        let mut running = Running::start(&place, place.mpirun(2, &train_with(&sets)));
        running.says(&format!("step {step}/"));
        place.ranks().into_iter().for_each(|rank| _ = signal(rank, "KILL"));
        running.ends();
    }
    let text = succeeds(place.mpirun(2, &train_with(&sets)));
    assert!(text.contains("going on after step") && !text.contains("is lost"), "{text}");
    assert!(adapter(&place, "out") == adapter(&whole, "out"), "the adapters differ");
    assert_eq!(decided(&place, "out"), decided(&whole, "out"));

    let place = self::place();
    let mut running = Running::start(&place, place.mpirun(2, &train_with(&sets)));
    assert!(running.says("step 14/"), "{}", running.text());
    place.ranks().into_iter().for_each(|rank| _ = signal(rank, "KILL"));
    running.ends();
    let text = succeeds(place.mpirun(3, &train_with(&sets)));
    assert!(!text.contains("is lost") && json(&place, "out/run.json")["adapter_step"] == best, "{text}");
}

#[test]
fn a_best_checkpoint_that_is_lost_is_told() {
    let place = place();
    let mut running = Running::start(&place, place.mpirun(2, &TRAIN));
    assert!(running.says("step 9/"), "{}", running.text());
    assert!(signal(place.ranks()[0], "USR1"));
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    let file = format!("out/checkpoint-4/{ADAPTER}");
    let mut bytes = place.read(&file);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    place.write(&file, &bytes);
    let text = succeeds(place.mpirun(2, &TRAIN));
    assert!(text.contains("the best checkpoint so far, of step 4, is lost") && text.contains(&file), "{text}");
    let step = json(&place, "out/run.json")["adapter_step"].as_u64().unwrap();
    assert!(step > 4 && adapter(&place, "out") != bytes, "{text}");
}

#[test]
fn a_best_checkpoint_that_cannot_be_written_leaves_the_best_of_the_others() {
    let place = place();
    // The place of the checkpoint of step 6 is taken.
    std::fs::create_dir_all(place.path(&format!("out/checkpoint-{BEST_OF_ALL}/mine"))).unwrap();
    let text = succeeds(place.mpirun(2, &train_with(&["training.max_steps=20", "training.save_steps=2"])));
    assert!(text.contains("a checkpoint could not be written"), "{text}");
    let lines = metrics(&place.read("out/metrics.jsonl"));
    let losses = lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line["eval_loss"].as_f64()?)));
    let of_others = losses.filter(|(step, _)| *step > 0 && *step != BEST_OF_ALL as u64);
    let (best, _) = of_others.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(json(&place, "out/run.json")["adapter_step"], best);
    assert!(adapter(&place, "out") == adapter(&place, &format!("out/checkpoint-{best}")));
}
