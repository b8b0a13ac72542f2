//! `merge` as a user runs it: what it writes, what it refuses, and what is left of it when it is killed or a disk is full.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use common::cli::{MPI_WITHOUT_FILES, Place, TRAIN, fails, succeeds, train_with};
use common::hub::{Hub, Repository};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A place with an adapter that was trained on its model, in `out`.
fn trained(sets: &[&str]) -> Place {
    let place = Place::new();
    place.write("model/generation_config.json", "{\"temperature\": 0.5}");
    place.write("model/chat_template.jinja", "{{ messages }}");
    succeeds(place.command(&train_with(sets)));
    place
}

fn merge<'a>(base: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["merge", "--model", "model", "--adapter", "out", "--output", "merged", "--base", base];
    [&args[..], more].concat()
}

/// Type and bytes of each tensor of the files in a folder.
fn tensors(dir: &Path) -> BTreeMap<String, (Dtype, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let before = tensors.insert(name.to_string(), (view.dtype(), view.data().to_vec()));
                assert!(before.is_none(), "{name} is in two files");
            }
        }
    }
    tensors
}

/// The loss of a model, held as it is, or in NF4 with an adapter.
fn loss(place: &Place, model: &str, adapter: &[&str]) -> f64 {
    let in_4bit = format!("quantization.load_in_4bit={}", !adapter.is_empty());
    let args = ["eval", "--model", model, "--dataset", "rows.jsonl", "--json", "--set", &in_4bit];
    let output = place.command(&[&args[..], adapter].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["loss"].as_f64().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_merged_model_is_a_folder_like_its_base() {
    let place = trained(&[]);
    let text = succeeds(place.command(&merge("dequantized", &["--dtype", "float32"])));
    assert!(text.contains("merged: "), "{text}");
    let copied =
        ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names(&place.path("merged")), [&copied[..], &["tokenizer_config.json"]].concat());
    let (apart, merged) = (loss(&place, "model", &["--adapter", "out"]), loss(&place, "merged", &[]));
    assert!((apart - merged).abs() <= 1e-6 * apart, "{apart} {merged}");
    // The same in files of at most one tensor each, and in the base's own type.
    let mut small = merge("dequantized", &["--dtype", "float32", "--max-shard-size", "1KB"]);
    small[6] = "small";
    succeeds(place.command(&small));
    let (one, many) = (tensors(&place.path("merged")), tensors(&place.path("small")));
    assert!(one == many, "files of another size hold other tensors");
    let index: Value = serde_json::from_slice(&place.read("small/model.safetensors.index.json")).unwrap();
    assert_eq!(index["weight_map"].as_object().unwrap().len(), one.len());
    let bytes: usize = one.values().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    let (base, last) = (tensors(&place.path("model")), format!("model-{0:05}-of-{0:05}.safetensors", one.len()));
    assert!(base.keys().eq(one.keys()) && place.path("small").join(last).exists());
    assert!(names(&place.path("")).iter().all(|name| !name.starts_with('.')), "{:?}", names(&place.path("")));
}

#[test]
fn tensors_without_an_adapter_are_copied() {
    let place = trained(&["lora.target_modules=[q_proj, down_proj]"]);
    succeeds(place.command(&merge("original", &[])));
    let (base, merged) = (tensors(&place.path("model")), tensors(&place.path("merged")));
    assert!(base.keys().eq(merged.keys()));
    for (name, tensor) in &base {
        let is_target = name.contains("q_proj.weight") || name.contains("down_proj.weight");
        assert_eq!(*tensor != merged[name], is_target, "{name}");
    }
    // Rounded once: the bf16 of what float32 has.
    let mut in_f32 = merge("original", &["--dtype", "float32"]);
    in_f32[6] = "in-f32";
    succeeds(place.command(&in_f32));
    let mut in_bf16 = merge("original", &["--dtype", "bfloat16"]);
    in_bf16[6] = "in-bf16";
    succeeds(place.command(&in_bf16));
    let (in_f32, in_bf16) = (tensors(&place.path("in-f32")), tensors(&place.path("in-bf16")));
    for (name, (dtype, bytes)) in &in_bf16 {
        let rounded = in_f32[name].1.as_chunks().0.iter().map(|&x| half::bf16::from_f32(f32::from_le_bytes(x)));
        assert!(*dtype == Dtype::BF16 && bytes.as_chunks().0.iter().map(|&x| half::bf16::from_le_bytes(x)).eq(rounded));
    }
    let config: Value = serde_json::from_slice(&place.read("in-bf16/config.json")).unwrap();
    assert!([&config["dtype"], &config["torch_dtype"]].iter().any(|dtype| **dtype == "bfloat16"), "{config}");
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let place = trained(&["quantization.bnb_4bit_use_double_quant=false"]);
    let refused = |args: &[&str], status, words: &str| {
        let text = fails(place.command(args), status);
        assert!(text.contains(words), "{words} in {text}");
        assert!(!place.path("merged").exists());
    };
    refused(&merge("original", &[])[..7], 2, "--base <BASE>");
    refused(&merge("original", &["--set", "quantization.load_in_4bit=false"]), 2, "there is nothing to set");
    refused(&merge("original", &["--device", "cuda"]), 2, "merge computes on the CPU");
    refused(&merge("original", &["--json"]), 2, "--dataset <DATASET>");
    refused(&merge("original", &["--max-shard-size", "many"]), 2, "allowed: a size, e.g. 5GB");
    refused(&merge("dequantized", &[]), 1, "help: --set quantization.bnb_4bit_use_double_quant=false");
    refused(
        &merge("dequantized", &["--set", "quantization.load_in_4bit=false"]),
        1,
        "help: leave out --set quantization",
    );
    // The scores are those of the base as training held it, and another base changes nothing about that.
    let scored = ["--dataset", "rows.jsonl", "--device", "cpu"];
    refused(&merge("original", &scored), 1, "help: --set quantization.bnb_4bit_use_double_quant=false");
    refused(&merge("dequantized", &["--other-base"]), 1, "help: --set quantization.bnb_4bit_use_double_quant=false");
    // The result never takes the place of what it is made from.
    for input in ["model", "out"] {
        let before = tensors(&place.path(input));
        let mut onto_itself = merge("original", &[]);
        onto_itself[6] = input;
        refused(&onto_itself, 1, "it is there already");
        assert!(before == tensors(&place.path(input)), "{input}");
    }
    let text = fails(place.mpirun(2, &merge("original", &[])), 2);
    assert!(text.contains("merge is the work of one process"), "{text}");
    // Another base of the same shape.
    let mut weights = place.read("model/model.safetensors");
    *weights.last_mut().unwrap() ^= 1;
    place.write("model/model.safetensors", weights);
    refused(&merge("original", &[]), 1, "the adapter was trained on another base than model");
    succeeds(place.command(&merge("original", &["--other-base"])));
    let text = fails(place.command(&merge("original", &["--other-base"])), 1);
    assert!(text.contains("merged: it is there already"), "{text}");
}

#[test]
fn a_checkpoint_in_4_bit_has_one_form() {
    let place = Place::new();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(common::golden("tiny-bnb4-nested").join(file), place.path("model").join(file)).unwrap();
    }
    succeeds(place.command(&TRAIN));
    let text = fails(place.command(&merge("original", &[])), 1);
    assert!(text.contains("a checkpoint in 4 bit") && text.contains("help: --base dequantized"), "{text}");
    succeeds(place.command(&merge("dequantized", &["--dtype", "float32"])));
    let config = String::from_utf8(place.read("merged/config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
    let (apart, merged) = (loss(&place, "model", &["--adapter", "out"]), loss(&place, "merged", &[]));
    assert!((apart - merged).abs() <= 1e-6 * apart, "{apart} {merged}");
    // A checkpoint of the run is an adapter, too, and knows its base.
    succeeds(place.command(&train_with(&["training.save_steps=2", "output_dir=saved"])));
    let mut of_checkpoint = merge("dequantized", &[]);
    (of_checkpoint[4], of_checkpoint[6]) = ("saved/checkpoint-2", "of-checkpoint");
    succeeds(place.command(&of_checkpoint));
    // As each weight was before it was quantized.
    assert!(tensors(&place.path("of-checkpoint")).values().all(|(dtype, _)| *dtype != Dtype::U8));
}

#[test]
fn the_adapter_and_both_forms_are_scored_side_by_side() {
    let place = trained(&[]);
    let args = merge("original", &["--dtype", "float32", "--dataset", "rows.jsonl", "--json", "--device", "cpu"]);
    let output = place.command(&args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = |name: &str| scores[name]["loss"].as_f64().unwrap();
    assert_eq!(found("adapter"), loss(&place, "model", &["--adapter", "out"]));
    assert_eq!(found("merged_original"), loss(&place, "merged", &[]));
    let (adapter, dequantized) = (found("adapter"), found("merged_dequantized"));
    assert!((adapter - dequantized).abs() <= 1e-6 * adapter, "{scores}");
    assert!((adapter - found("merged_original")).abs() > 1e-5 * adapter, "NF4 changes nothing: {scores}");
    assert!(names(&place.path("")).iter().all(|name| !name.starts_with('.')), "{:?}", names(&place.path("")));
}

#[test]
fn a_model_of_the_hub_comes_with_all_files_that_are_copied() {
    let place = trained(&[]);
    place.write("model/preprocessor_config.json", "{}");
    place.write("model/notes.txt", "notes");
    let files = names(&place.path("model")).into_iter().map(|name| {
        let bytes = place.read(&format!("model/{name}"));
        (name, bytes)
    });
    let hub = Hub::start(&[("models/org/tiny", Repository::new(&"0123456789".repeat(4), files))]);
    let mut of_hub = merge("original", &[]);
    of_hub[2] = "org/tiny";
    succeeds(hub.client(&place, place.command(&of_hub)));
    let expected: Vec<_> = names(&place.path("model")).into_iter().filter(|name| name != "notes.txt").collect();
    assert_eq!(names(&place.path("merged")), expected);
    assert_eq!(hub.count("HEAD", "notes.txt"), 0);
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let place = trained(&[]);
    // A limit on the size of files makes write fail as a full disk does; MPI is told to do without files of its own.
    let program = place.command(&[]);
    let path = program.get_program().to_str().unwrap();
    let run = format!("trap '' XFSZ; ulimit -f 200; exec {path} {}", merge("original", &[]).join(" "));
    let mut shell = Command::new("bash");
    shell.args(["-c", &run]).current_dir(place.path(""));
    shell.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.envs(MPI_WITHOUT_FILES);
    let text = fails(shell, 1);
    assert!(text.contains("model.safetensors: ") && text.contains("File too large"), "{text}");
    assert!(names(&place.path("")).iter().all(|name| !name.contains("merged")), "{:?}", names(&place.path("")));
}

/// A fault when all is written and nothing is in its place: the process is killed, or fails.
#[test]
fn half_a_model_is_never_taken_for_a_whole_one() {
    let place = trained(&[]);
    let with_fault = |kind: &str| {
        let mut command = place.command(&merge("original", &[]));
        command.env("FSDP_QLORA_FAULT", format!("{kind}:0:save"));
        let output = command.output().unwrap();
        assert!(!output.status.success() && !place.path("merged").exists());
        String::from_utf8(output.stderr).unwrap()
    };
    let (hidden, written) = (place.path(".merged.fsdp-qlora-new"), ".merged.fsdp-qlora-new/model.safetensors");
    with_fault("kill");
    assert!(place.path(written).exists(), "it was killed before anything was written");
    let text = with_fault("error");
    assert!(!hidden.exists(), "{text}");
    with_fault("kill");
    succeeds(place.command(&merge("original", &[])));
    assert!(!hidden.exists());
    loss(&place, "merged", &[]);
}
