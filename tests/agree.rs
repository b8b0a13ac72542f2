//! Ranks that were started with different things, under mpirun: refused before anything is written, with keys, ranks
//! and values.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::cli::{Place, TRAIN, fails, metrics, program, succeeds};
use serde_json::Value;

/// A rank that waits for another one waits half an hour.
const SECONDS: Duration = Duration::from_secs(60);

/// The words that start a rank.
fn rank(args: &[&str]) -> Vec<String> {
    let program = program().display().to_string();
    std::iter::once(program.as_str()).chain(args.iter().copied()).map(String::from).collect()
}

/// A rank that trains, with overrides of the recipe.
fn trains(sets: &[&str]) -> Vec<String> {
    rank(&common::cli::train_with(sets))
}

/// A rank that trains in another environment.
fn trains_with(variable: &str) -> Vec<String> {
    ["env".into(), variable.into()].into_iter().chain(trains(&[])).collect()
}

/// The lines that name keys, of a run that must be refused by all ranks together.
fn refused(place: &Place, ranks: &[Vec<String>]) -> Vec<String> {
    let before = place.results();
    let begin = Instant::now();
    let text = fails(place.mpirun_each(ranks), 2);
    assert!(begin.elapsed() < SECONDS, "{:?}", begin.elapsed());
    assert_eq!(place.results(), before, "{text}");
    assert_eq!(text.matches("the ranks were not started alike").count(), 1, "{text}");
    assert!(text.contains("rank 0: error: the ranks were not"), "{text}");
    text.lines().filter_map(|line| line.strip_prefix("  ")).map(String::from).collect()
}

/// Checks that the only difference is in a key, and that its values are told apart by rank.
fn differs_in(place: &Place, key: &str, other: Vec<String>) {
    let lines = refused(place, &[trains(&[]), other, trains(&[])]);
    let [line] = &lines[..] else { panic!("{key}: {lines:?}") };
    let is_told = line.starts_with(&format!("{key}: ")) && line.contains(" on ranks 0, 2; ");
    assert!(is_told && line.ends_with(" on rank 1"), "{key}: {line}");
}

#[test]
fn every_key_of_the_recipe_is_compared() {
    let place = Place::new();
    let keys = [
        ("data.max_length", "128", "64"),
        ("data.packing", "\"false\"", "\"true\""),
        ("data.overlong", "\"truncate\"", "\"drop\""),
        ("data.loss_on", "\"auto\"", "\"all\""),
        ("data.eval", "null", "0.25"),
        ("quantization.load_in_4bit", "true", "false"),
        ("lora.r", "4", "8"),
        ("lora.lora_alpha", "16.0", "4.0"),
        ("lora.lora_dropout", "0.0", "0.5"),
        ("lora.use_rslora", "false", "true"),
        ("training.learning_rate", "0.01", "0.001"),
        ("training.lr_scheduler_type", "\"cosine\"", "\"linear\""),
        ("training.adam_beta1", "0.9", "0.5"),
        ("training.weight_decay", "0.0", "0.5"),
        ("training.max_grad_norm", "1.0", "2.0"),
        ("training.max_steps", "3", "4"),
        ("training.global_batch_size", "6", "9"),
        ("training.seed", "42", "43"),
        ("fsdp.sharding_strategy", "\"full_shard\"", "\"no_shard\""),
        ("fsdp.accumulation", "\"layer\"", "\"micro_batch\""),
        ("fsdp.activation_checkpointing", "\"auto\"", "\"full\""),
    ];
    let sets: Vec<String> = keys.iter().map(|(key, _, other)| format!("{key}={}", other.trim_matches('"'))).collect();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let lines = refused(&place, &[trains(&[]), trains(&sets), trains(&sets), trains(&[])]);
    for (key, own, other) in keys {
        let line = format!("{key}: {own} on ranks 0, 3; {other} on ranks 1, 2");
        assert!(lines.contains(&line), "{line}\n{lines:#?}");
    }
    // Three values of a key, in the recipe itself.
    let recipe = String::from_utf8(place.read("recipe.yaml")).unwrap();
    place.write("recipe1.yaml", recipe.replace("1.0e-2", "3.0e-2"));
    let lines =
        refused(&place, &[trains(&[]), rank(&["train", "-c", "recipe1.yaml"]), trains(&["training.learning_rate=1"])]);
    assert_eq!(lines, ["training.learning_rate: 0.01 on rank 0; 0.03 on rank 1; 1.0 on rank 2"]);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A rank whose model is a copy in which a JSON file was changed.
fn with_other_json(place: &Place, file: &str, change: impl Fn(&mut Value)) -> Vec<String> {
    copy_folder(&place.path("model"), &place.path("model1"));
    let path = format!("model1/{file}");
    let mut json = serde_json::from_slice(&place.read(&path)).unwrap();
    change(&mut json);
    place.write(&path, json.to_string());
    trains(&["model=model1"])
}

#[test]
fn another_revision_of_the_model_is_refused() {
    let place = Place::new();
    let weights = place.read("model/model.safetensors");
    let data = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    // One bit of the first tensor, of one in the middle, and of the last.
    for at in [data, (data + weights.len()) / 2, weights.len() - 4] {
        copy_folder(&place.path("model"), &place.path("model1"));
        let mut other = weights.clone();
        other[at] ^= 1;
        place.write("model1/model.safetensors", other);
        differs_in(&place, "model", trains(&["model=model1"]));
    }
    differs_in(&place, "model", with_other_json(&place, "config.json", |c| c["rms_norm_eps"] = 1e-3.into()));
}

#[test]
fn other_tokenizers_rows_and_adapters_are_refused() {
    let place = Place::new();
    let tokenizer = "tokenizer and chat template";
    let template = |c: &mut Value| c["chat_template"] = "{{ messages[0].content }}".into();
    differs_in(&place, tokenizer, with_other_json(&place, "tokenizer_config.json", template));

    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    let mut lines: Vec<&str> = rows.lines().collect();
    let rows1 = trains(&["data.train=rows1.jsonl"]);
    lines.swap(0, 1);
    place.write("rows1.jsonl", lines.join("\n"));
    differs_in(&place, "rows of data.train", rows1.clone());
    lines.swap(0, 1);
    place.write("rows1.jsonl", lines[1..].join("\n"));
    differs_in(&place, "rows of data.train", rows1);

    let eval = |rows: &str| trains(&[&format!("data.eval={rows}")]);
    let lines = refused(&place, &[eval("rows.jsonl"), eval("rows1.jsonl")]);
    assert!(lines.iter().any(|line| line.starts_with("rows of data.eval: ")), "{lines:?}");

    for seed in ["1", "2"] {
        let output = format!("output_dir=adapter{seed}");
        succeeds(place.command(&common::cli::train_with(&[&output, &format!("training.seed={seed}")])));
    }
    place.write("goes-on.yaml", String::from_utf8(place.read("recipe.yaml")).unwrap().replace("r: 4, ", ""));
    let goes_on = |dir: &str| rank(&["train", "-c", "goes-on.yaml", "--set", &format!("lora.adapter={dir}")]);
    let lines = refused(&place, &[goes_on("adapter1"), goes_on("adapter2")]);
    assert!(lines.len() == 1 && lines[0].starts_with("lora.adapter: digest "), "{lines:?}");
}

#[test]
fn other_programs_commands_and_environments_are_refused() {
    let place = Place::new();
    let other = place.path("fsdp-qlora-of-another-build");
    fs::copy(program(), &other).unwrap();
    fs::OpenOptions::new().append(true).open(&other).unwrap().write_all(b"\0").unwrap();
    let mut of_other = trains(&[]);
    of_other[0] = other.display().to_string();
    differs_in(&place, "program", of_other);

    let plan = rank(&["plan", "--shape", "llama-3.1-8b", "--gpu", "h100"]);
    let lines = refused(&place, &[trains(&[]), plan]);
    assert!(lines.contains(&"subcommand: train on rank 0; plan on rank 1".into()), "{lines:?}");
    differs_in(&place, "--device", trains_on("cpu"));
    differs_in(&place, "environment variable FSDP_QLORA_TIMEOUT_S", trains_with("FSDP_QLORA_TIMEOUT_S=77"));
    differs_in(&place, "environment variable FSDP_QLORA_RANKS_PER_NODE", trains_with("FSDP_QLORA_RANKS_PER_NODE=1"));
    differs_in(&place, "environment variable NVIDIA_TF32_OVERRIDE", trains_with("NVIDIA_TF32_OVERRIDE=1"));
}

fn trains_on(device: &str) -> Vec<String> {
    rank(&[&TRAIN[..], &["--device", device]].concat())
}

#[test]
fn every_subcommand_compares_its_options_and_inputs() {
    let place = Place::new();
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    place.write("rows1.jsonl", rows.lines().skip(1).collect::<Vec<_>>().join("\n"));
    with_other_json(&place, "config.json", |c| c["rms_norm_eps"] = 1e-3.into());
    let eval = ["eval", "--model", "model", "--dataset", "rows.jsonl"];
    let generate = ["generate", "--model", "model", "--prompt", "ab"];
    let quantize = ["quantize", "--model", "model", "--world-size", "2", "--output", "shards"];
    let bench = ["bench", "step", "--shape", "model", "--seq", "8", "--steps", "1"];
    let cases: [(&[&str], &[&str], &str); 10] = [
        (&eval, &["--max-length", "20"], "--max-length: 1024 on rank 0; 20 on rank 1"),
        (&eval, &["--dataset", "rows1.jsonl"], "rows of --dataset: "),
        (&eval, &["--per-token", "losses.jsonl"], "--per-token: false on rank 0; true on rank 1"),
        (&eval, &["--model", "model1"], "model: "),
        (&generate, &["--prompt", "ba"], "--prompt: ab on rank 0; ba on rank 1"),
        (&generate, &["--model", "model1"], "model: "),
        (&quantize, &["--world-size", "3"], "--world-size: 2 on rank 0; 3 on rank 1"),
        (&quantize, &["--model", "model1"], "model: "),
        (
            &quantize,
            &["--set", "quantization.load_in_4bit=false"],
            "quantization.load_in_4bit: true on rank 0; false on rank 1",
        ),
        (&bench, &["--seq", "9"], "--seq: 8 on rank 0; 9 on rank 1"),
    ];
    for (args, other, expected) in cases {
        // An option that stands twice is an error, so that the other value takes the place of the first.
        let mut of_rank_1 = args.to_vec();
        match args.iter().position(|arg| *arg == other[0]) {
            Some(at) => of_rank_1[at + 1] = other[1],
            None => of_rank_1.extend(other),
        }
        let lines = refused(&place, &[rank(args), rank(&of_rank_1)]);
        assert!(lines.iter().any(|line| line.starts_with(expected)), "{expected} in {lines:?}");
    }
}

#[test]
fn where_files_lie_may_differ() {
    let place = Place::new();
    succeeds(place.mpirun_each(&[trains(&["output_dir=alike"]), trains(&["output_dir=alike"])]));
    copy_folder(&place.path("model"), &place.path("model1"));
    fs::copy(place.path("rows.jsonl"), place.path("rows1.jsonl")).unwrap();
    fs::copy(place.path("recipe.yaml"), place.path("recipe1.yaml")).unwrap();
    let sets = ["model=model1", "data.train=rows1.jsonl", "output_dir=out1", "shards=shards1"];
    let mut elsewhere = vec!["train", "-c", "recipe1.yaml"];
    elsewhere.extend(sets.iter().flat_map(|set| ["--set", set]));
    let in_other_cache = ["env".into(), "FSDP_QLORA_CACHE=cache1".into()].into_iter().chain(rank(&elsewhere)).collect();
    succeeds(place.mpirun_each(&[trains(&[]), in_other_cache]));
    assert!(place.read("out/adapter_model.safetensors") == place.read("alike/adapter_model.safetensors"));
    assert_eq!(metrics(&place.read("out/metrics.jsonl")).len(), 3);
    assert!(!place.path("out1").exists(), "only rank 0 writes results");
    assert!(place.path("shards1/nf4-00001-of-00002.safetensors").exists());
}

#[test]
fn a_rank_that_lacks_an_input_ends_all_with_its_message() {
    let place = Place::new();
    let cases: [(Vec<String>, &str); 4] = [
        (rank(&["train", "-c", "recipe1.yaml"]), "recipe1.yaml"),
        (trains(&["model=model1"]), "model1"),
        (trains(&["data.train=rows1.jsonl"]), "rows1.jsonl"),
        (trains(&["training.seed=-1"]), "training.seed"),
    ];
    for (other, message) in cases {
        let begin = Instant::now();
        let mut command: Command = place.mpirun_each(&[trains(&[]), other, trains(&[])]);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && begin.elapsed() < SECONDS, "{message}: {text}");
        assert!(text.contains("rank 1: error: ") && text.contains(message), "{message}: {text}");
        // A process that is ended from outside leaves the file that it had locked; nobody holds the lock.
        let left: Vec<String> = place.results().into_iter().filter(|path| !path.ends_with(".lock")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn templates_that_ask_for_the_date_see_the_clock_of_rank_0() {
    let place = Place::new();
    place.write("model/chat_template.jinja", "{{ strftime_now('%Y-%m-%d %H') }}: {{ messages[0].content }}");
    let row = r#"{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]}"#;
    place.write("rows.jsonl", [row; 8].join("\n"));
    // A day and two hours apart: at no time do the two clocks show the same date. The rows are compared, so a run that
    // is not refused has read one clock.
    let ranks = ["TZ=AAA13", "TZ=BBB-13"].map(trains_with);
    succeeds(place.mpirun_each(&ranks));
}
