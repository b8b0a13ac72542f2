//! Made-up shards, and the run of `train` on them that `bench step` times.

mod common;

use std::process::Command;

use common::cli::{Place, fails, metrics, succeeds};
use common::running::{Running, signal};
use safetensors::SafeTensors;
use serde_json::Value;

const QUANTIZE: [&str; 7] = ["quantize", "--shape", "model", "--output", "shards", "--world-size", "2"];
const RUN: [&str; 11] =
    ["bench", "step", "--shards", "shards", "--save-steps", "3", "--seq", "32", "--steps", "60", "--output"];

/// The command of a run into this folder.
fn run(output: &str) -> Vec<&str> {
    RUN.into_iter().chain([output]).collect()
}

/// The object that a command prints, and what it says.
fn printed(mut command: Command) -> (Value, String) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}\n{text}");
    (serde_json::from_slice(&output.stdout).unwrap(), text)
}

/// The units of a shard file.
fn units(place: &Place, file: &str) -> Vec<(String, Vec<u8>)> {
    let bytes = place.read(file);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut units: Vec<_> = tensors.iter().map(|(name, unit)| (name.to_string(), unit.data().to_vec())).collect();
    units.sort();
    units
}

#[test]
fn shards_are_made_up_alike_by_any_number_of_ranks_and_only_in_a_folder_of_their_own() {
    let place = Place::new();
    let said = succeeds(place.mpirun(2, &QUANTIZE));
    assert!(said.contains("drawing ") && said.contains("2 shard files of"), "{said}");
    assert!(place.read("shards/config.json") == place.read("model/config.json"));
    let alone: Vec<&str> = QUANTIZE.iter().map(|word| if *word == "shards" { "alone" } else { *word }).collect();
    succeeds(place.command(&alone));
    for shard in 0..2 {
        let file = format!("nf4-{shard:05}-of-00002.safetensors");
        let [together, alone] = ["shards", "alone"].map(|dir| units(&place, &format!("{dir}/{file}")));
        assert!(!alone.is_empty() && together == alone, "{file} depends on the ranks");
    }
    // A folder may be filled again with the same shape; it is refused for another shape, beside a model or among other files.
    succeeds(place.command(&QUANTIZE));
    place.config("rms_norm_eps", 1e-4.into());
    let before = place.read("shards/config.json");
    let refused = fails(place.command(&QUANTIZE), 1);
    assert!(refused.contains("config.json: is there and is of another shape"), "{refused}");
    assert!(place.read("shards/config.json") == before);
    let in_model = ["quantize", "--shape", "model", "--output", "model", "--world-size", "2"];
    assert!(fails(place.command(&in_model), 1).contains("has the weights of a model"));
    let auto = ["quantize", "--shape", "model", "--output", "auto", "--world-size", "2"];
    assert!(fails(place.command(&auto), 2).contains("--output: found auto"));
    let both = [&QUANTIZE[..], &["--model", "model"]].concat();
    assert!(fails(place.command(&both), 2).contains("cannot be used with"));
    for option in ["--output=out", "--save-steps=2"] {
        let text = fails(place.command(&["bench", "step", "--shape", "model", option]), 2);
        assert!(text.contains("cannot be used with"), "{option}: {text}");
    }
    let nowhere = ["bench", "step", "--shards", "nowhere", "--output", "out"];
    assert!(fails(place.command(&nowhere), 1).contains("help: `fsdp-qlora quantize --shape NAME --output nowhere"));
}

#[test]
fn a_run_on_made_up_shards_is_stopped_and_goes_on_as_one_of_train_and_tells_its_times() {
    let place = Place::new();
    succeeds(place.command(&QUANTIZE));
    let mut running = Running::start(&place, place.mpirun(2, &run("out")));
    assert!(running.says("step 5/"), "{}", running.text());
    assert!(signal(place.ranks()[1], "USR1"));
    let (status, said) = running.ends();
    assert_eq!(status, Some(75), "{said}");
    assert!(said.contains("were there, and are checked and mapped") && said.contains("stopped by SIGUSR1"), "{said}");

    let (told, said) = printed(place.mpirun(2, &run("out")));
    assert!(said.contains("going on after step") && said.contains("were there, and are checked and mapped"), "{said}");
    let parts = told["start_s"].as_object().unwrap();
    for part in ["start", "agree", "device", "load", "decide", "copy", "adapter", "first_step"] {
        assert!(parts[part].as_f64().unwrap() >= 0.0, "{part} in {told}");
    }
    let sum: f64 = parts.iter().filter(|(part, _)| *part != "total").map(|(_, s)| s.as_f64().unwrap()).sum();
    assert!((sum - parts["total"].as_f64().unwrap()).abs() < 1e-9, "{told}");
    let num = |key: &str| told[key]["steps"].as_u64().unwrap();
    assert_eq!(num("step"), num("step_with_save") + num("step_without_save"), "{told}");
    assert!(told["step"]["mean_ms"].as_f64().unwrap() > 0.0 && told["save_steps"] == 3, "{told}");

    let (whole, _) = printed(place.mpirun(2, &run("whole")));
    assert_eq!(whole["step"]["steps"], 60, "{whole}");
    assert!(place.read("out/adapter_model.safetensors") == place.read("whole/adapter_model.safetensors"));
    // Another number of ranks cuts its shards from those that are there.
    let (_, said) = printed(place.mpirun(3, &run("three")));
    assert!(said.contains("the shards of 2 ranks are there: cutting "), "{said}");
    let lines = metrics(&place.read("three/metrics.jsonl"));
    assert!(lines.iter().all(|line| line["num_target_tokens"] == 93), "a step is short: {lines:?}");
}
