//! Which base a run uses: a changed one is never trained on with the shards of before, and an unchanged one is not read
//! again.

mod common;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::cli::{Place, fails, metrics, succeeds, train_with};
use serde_json::Value;

/// Place of a tensor's first byte in the model's file.
fn place_of(place: &Place, tensor: &str) -> u64 {
    let bytes = place.read("model/model.safetensors");
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let header: Value = serde_json::from_slice(&bytes[8..8 + len as usize]).unwrap();
    8 + len + header[tensor]["data_offsets"][0].as_u64().unwrap()
}

/// Overwrites one weight in place.
fn set_weight(place: &Place, tensor: &str, element: u64, value: f32) {
    let at = place_of(place, tensor) + 4 * element;
    let file = std::fs::File::options().write(true).open(place.path("model/model.safetensors")).unwrap();
    file.write_all_at(&value.to_le_bytes(), at).unwrap();
}

const READ: &str = "identity of the base: 1 of 1 files are new or have changed";
const GATE: &str = "model.layers.1.mlp.gate_proj.weight";
const ONE_STEP: [&str; 1] = ["training.max_steps=1"];

fn loss(place: &Place) -> f64 {
    metrics(&place.read("out/metrics.jsonl"))[0]["loss"].as_f64().unwrap()
}

/// Until a second has passed since a file changed, it is read at every start.
fn settle() {
    std::thread::sleep(Duration::from_millis(1100));
}

/// A run on `ranks` ranks from an empty output_dir.
fn train(place: &Place, ranks: usize, sets: &[&str]) -> String {
    let _ = std::fs::remove_dir_all(place.path("out"));
    let args = train_with(sets);
    succeeds(if ranks == 1 { place.command(&args) } else { place.mpirun(ranks, &args) })
}

#[test]
fn a_restart_reads_no_layer_and_a_change_is_seen() {
    for ranks in [1, 3] {
        let place = Place::new();
        settle();
        let text = train(&place, ranks, &ONE_STEP);
        assert!(text.contains(READ) && text.contains("quantizing"), "{text}");
        let first = loss(&place);
        let text = train(&place, ranks, &ONE_STEP);
        assert!(!text.contains("identity of the base") && !text.contains("quantizing"), "{text}");
        assert_eq!(loss(&place), first);

        // One weight of each part, between any samples: the shards of before do not serve.
        for (tensor, element) in [(GATE, 4321), ("lm_head.weight", 9000), ("model.embed_tokens.weight", 6000)] {
            set_weight(&place, tensor, element, 3.5);
            let text = train(&place, ranks, &ONE_STEP);
            assert!(text.contains(READ) && text.contains("quantizing"), "{ranks} ranks, {tensor}: {text}");
        }
        assert_ne!(loss(&place), first);
    }
}

#[test]
fn copies_of_a_model_are_one_base() {
    let place = Place::new();
    train(&place, 1, &ONE_STEP);
    std::fs::create_dir(place.path("copy")).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(place.path(&format!("model/{file}")), place.path(&format!("copy/{file}"))).unwrap();
    }
    let text = train(&place, 1, &["training.max_steps=1", "model=copy"]);
    assert!(text.contains(READ) && !text.contains("quantizing"), "{text}");
}

#[test]
fn a_shard_that_only_some_ranks_find_is_made_again() {
    let place = Place::new();
    let sets = ["training.max_steps=1", "shards=shards"];
    train(&place, 3, &sets);
    let first = (loss(&place), place.read("shards/nf4-00001-of-00003.safetensors"));
    std::fs::remove_file(place.path("shards/nf4-00001-of-00003.safetensors")).unwrap();
    let text = train(&place, 3, &sets);
    assert!(text.contains("quantizing"), "{text}");
    assert_eq!((loss(&place), place.read("shards/nf4-00001-of-00003.safetensors")), first);
}

#[test]
fn shards_of_another_model_are_not_overwritten() {
    for ranks in [1, 2] {
        let place = Place::new();
        let file = format!("shards/nf4-00000-of-{ranks:05}.safetensors");
        train(&place, ranks, &["training.max_steps=1", "shards=shards"]);
        let before = place.read(&file);
        set_weight(&place, GATE, 4321, 0.5);
        std::fs::remove_dir_all(place.path("out")).unwrap();
        let args = train_with(&["shards=shards"]);
        let text = fails(if ranks == 1 { place.command(&args) } else { place.mpirun(ranks, &args) }, 1);
        assert!(
            text.contains(&format!("{file}: holds other shards: base is")) && text.contains("help: name"),
            "{text}"
        );
        let ranks = ranks.to_string();
        let quantize = ["quantize", "--model", "model", "--world-size", &ranks, "--output", "shards"];
        assert!(fails(place.command(&quantize), 1).contains("it is not overwritten"));
        assert!(place.read(&file) == before, "{file} was touched");
    }
    let place = Place::new();
    std::fs::create_dir(place.path("shards")).unwrap();
    let other = place.read("model/model.safetensors");
    place.write("shards/nf4-00000-of-00001.safetensors", &other);
    let text = fails(place.command(&train_with(&["shards=shards"])), 1);
    assert!(text.contains("is there and is not a shard file of this program"), "{text}");
    assert!(place.read("shards/nf4-00000-of-00001.safetensors") == other);
}

#[test]
fn a_damaged_or_unwritable_record_costs_time_only() {
    let place = Place::new();
    settle();
    train(&place, 1, &["training.max_steps=1", "shards=shards"]);
    let first = loss(&place);
    let records = || -> Vec<_> {
        let entries = std::fs::read_dir(place.path("shards")).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
    };
    let [record] = &records()[..] else { panic!("{:?}", records()) };
    let whole = std::fs::read_to_string(record).unwrap();
    let digest = whole.find(GATE).unwrap() + GATE.len() + 3;
    let flipped = if &whole[digest..digest + 1] == "0" { "1" } else { "0" };
    for damaged in
        [format!("{}{flipped}{}", &whole[..digest], &whole[digest + 1..]), whole[..100].to_string(), String::new()]
    {
        std::fs::write(record, damaged).unwrap();
        let text = train(&place, 1, &["training.max_steps=1", "shards=shards"]);
        assert!(text.contains(READ) && !text.contains("quantizing"), "{text}");
        assert_eq!((loss(&place), std::fs::read_to_string(record).unwrap()), (first, whole.clone()));
    }
    // A folder that cannot be replaced stands in the place of the record, so the record goes to the cache.
    std::fs::remove_file(record).unwrap();
    std::fs::create_dir(record).unwrap();
    std::fs::write(record.join("file"), "").unwrap();
    assert!(train(&place, 1, &["training.max_steps=1", "shards=shards"]).contains(READ));
    assert!(!train(&place, 1, &["training.max_steps=1", "shards=shards"]).contains(READ));
}

#[test]
fn a_base_that_is_overwritten_during_a_run_puts_its_result_in_doubt() {
    let place = Place::new();
    let mut run = place.mpirun(2, &train_with(&["training.max_steps=300"]));
    run.stderr(std::process::Stdio::piped());
    let run = run.spawn().unwrap();
    while std::fs::read_to_string(place.path("out/metrics.jsonl")).unwrap_or_default().lines().count() < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    set_weight(&place, GATE, 4321, 0.5);
    let output = run.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for word in
        ["model.safetensors: was overwritten during the run", GATE, "saved in output_dir, but cannot be trusted"]
    {
        assert!(text.contains(word), "{word} in {text}");
    }
    let record: Value = serde_json::from_slice(&place.read("out/run.json")).unwrap();
    assert_eq!(record["state"], "failed", "{record}");
    assert!(place.path("out/adapter_model.safetensors").exists());
}
