//! Each command reads the keys that it says it reads: changing one changes the result, or is refused for its value. All
//! other keys are refused by name. `train --help-recipe`, and so the one declaration of each key, says which keys a
//! command reads.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use fancy_regex::Regex;

use crate::common::cli::{Place, fails, metrics};

/// A key and what proves that it is read: `--set` of it, more `--set` on both sides, and on how many ranks.
struct Proof {
    set: &'static str,
    with: &'static [&'static str],
    ranks: usize,
}

const fn by(set: &'static str) -> Proof {
    Proof { set, with: &[], ranks: 1 }
}

const fn by_with(set: &'static str, with: &'static [&'static str]) -> Proof {
    Proof { set, with, ranks: 1 }
}

const fn by_two(set: &'static str, with: &'static [&'static str]) -> Proof {
    Proof { set, with, ranks: 2 }
}

/// Keys of the rows of a recipe, which are read to be trained or to be shown.
const TRAINING_ROWS: [Proof; 8] = [
    by("data.train=nowhere.jsonl"),
    by("data.eval=0.3"),
    by("data.format=messages"),
    by("data.columns={input_ids: labels}"),
    by("data.max_length=16"),
    by("data.packing=true"),
    by_with("data.overlong=drop", &["data.max_length=24"]),
    by("data.loss_on=completion"),
];

/// Keys of all commands that hold a base.
const BASE: [Proof; 4] = [
    by("quantization.load_in_4bit=false"),
    by("quantization.bnb_4bit_quant_type=fp4"),
    by("quantization.bnb_4bit_use_double_quant=false"),
    by("quantization.bnb_4bit_quant_storage=int8"),
];

/// Keys of all commands that have an engine on this machine.
const ENGINE: [Proof; 6] = [
    by("quantization.bnb_4bit_compute_dtype=float16"),
    by_two("fsdp.gather=host", &[]),
    by_two("fsdp.sharding_strategy=no_shard", &[]),
    by("fsdp.vram_budget=100KB"),
    by_two("fsdp.resident_units=1", &["fsdp.gather=host"]),
    by("fsdp.dense_layers=1"),
];

/// Keys of all commands that have an adapter to train. The ranks are far apart: some have kernels of their own.
const ADAPTER: [Proof; 10] = [
    by("lora.r=512"),
    by("lora.lora_alpha=64"),
    by("lora.lora_dropout=0"),
    by("lora.target_modules=q_proj"),
    by(r"lora.exclude_modules=.*\.0\.self_attn\..*"),
    by("lora.layers_to_transform=1"),
    by_with("lora.layers_pattern=blocks", &["lora.layers_to_transform=1"]),
    by("lora.rank_pattern={q_proj: 512}"),
    by("lora.alpha_pattern={q_proj: 64}"),
    by("lora.use_rslora=true"),
];

/// Keys of commands that make steps, or plan them.
const STEPS: [Proof; 2] = [
    by_with("fsdp.accumulation=micro_batch", &["fsdp.activation_checkpointing=full"]),
    by("fsdp.activation_checkpointing=full"),
];

/// Keys of commands that make steps on this machine.
const STEPS_HERE: [Proof; 3] = [
    by("fsdp.offload_params=true"),
    by("fsdp.activation_offload=true"),
    by_with("fsdp.host_budget=1KB", &["fsdp.offload_params=true"]),
];

/// Commands as `--help-recipe` names them, with the keys that they read.
fn readers() -> BTreeMap<String, BTreeSet<String>> {
    let output = Place::new().command(&["train", "--help-recipe"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut readers = BTreeMap::<String, BTreeSet<String>>::new();
    let mut key = String::new();
    for line in text.lines() {
        match line.trim().strip_prefix("read by ") {
            Some(commands) => commands.split(", ").for_each(|command| {
                readers.entry(command.into()).or_default().insert(key.clone());
            }),
            None if !line.starts_with(' ') => key = line.split(' ').next().unwrap().into(),
            None => {}
        }
    }
    readers
}

/// A place in which every command finds what it needs.
fn place() -> Place {
    let place = Place::new();
    std::fs::create_dir(place.path("adapter")).unwrap();
    let adapter = crate::common::golden("qlora_steps/final");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(adapter.join(file), place.path("adapter").join(file)).unwrap();
    }
    // No weights: heads as wide as a GPU wants them.
    std::fs::create_dir(place.path("shape")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&place.read("model/config.json")).unwrap();
    config["head_dim"] = 64.into();
    place.write("shape/config.json", config.to_string());
    place
}

/// All that a run leaves behind but times. When a checkpoint is told depends on the disk.
fn observe(args: &[&str], sets: &[&str], ranks: usize) -> String {
    let place = place();
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = args.iter().copied().chain(sets).collect();
    let mut command: Command = if ranks == 1 { place.command(&args) } else { place.mpirun(ranks, &args) };
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).replace(place.path("").to_str().unwrap(), "");
    let times = Regex::new(concat!(
        r#"(?m)"[a-z_]*(_ms|_bytes|per_second|_rank|tflops|rate|peak|idle)[a-z_]*":[^,}]*|[\d.]+ (tok/s|tokens/s|ms\b)|\S+ left|"#,
        r#""(ms|rate|share_of_peak)":[^,}]*|in [\d.]+ s\b|^peak.*|^checkpoint: .*\n|^rank 1:.*|\[[^\]]*\d+[^\]]*\] .*"#
    ));
    let mut seen = times.unwrap().replace_all(&text, "").into_owned();
    let mut files = place.results();
    // The name of a record of digests depends on where the model lies.
    files.retain(|file| !file.contains("/base-"));
    files.sort();
    seen += &files.join("\n").replace(place.path("").to_str().unwrap(), "");
    if let Ok(merged) = std::fs::read(place.path("out/model.safetensors")) {
        seen += &format!("\nmerged {:016x}", xxhash_rust::xxh3::xxh3_64(&merged));
    }
    for out in ["out", "elsewhere"] {
        if let Ok(bytes) = std::fs::read(place.path(out).join("metrics.jsonl")) {
            for line in metrics(&bytes) {
                seen += &format!("\n{} {} {}", line["loss"], line["learning_rate"], line["eval_loss"]);
            }
        }
    }
    format!("{:?}\n{seen}", output.status.code())
}

/// Proves each key of a command, and that it refuses the others.
fn check(name: &str, args: &[&str], proofs: &[&[Proof]]) {
    let mut unproved = readers().remove(name).unwrap_or_default();
    let mut refused: BTreeSet<String> = readers().into_values().flatten().collect();
    refused.retain(|key| !unproved.contains(key));
    let mut baselines = BTreeMap::new();
    for Proof { set, with, ranks } in proofs.iter().copied().flatten() {
        let before = baselines.entry((*with, *ranks)).or_insert_with(|| {
            let (once, twice) = (observe(args, with, *ranks), observe(args, with, *ranks));
            assert_eq!(once, twice, "{name} {with:?}: two runs must be alike, or no proof is one");
            once
        });
        let after = observe(args, &[with, &[*set][..]].concat(), *ranks);
        assert_ne!(*before, after, "{name} --set {set} changes nothing");
        let key = set.split('=').next().unwrap();
        assert!(!after.contains(&format!("{key}: {name} ")), "{after}");
        assert!(unproved.remove(key), "{name} does not say that it reads {key}, or a proof stands here twice");
    }
    assert!(unproved.is_empty(), "{name} says that it reads {unproved:?}; nothing here proves it");
    let (place, refused) = (place(), Vec::from_iter(refused));
    // A message lists 20 errors.
    for keys in refused.chunks(16) {
        let sets: Vec<String> = keys.iter().map(|key| format!("{key}=1")).collect();
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let text = fails(place.command(&args.iter().copied().chain(sets).collect::<Vec<_>>()), 2);
        for key in keys {
            assert!(
                text.contains(&format!("  {key}: {name} ")),
                "{name} --set {key}=1 is not refused by name:\n{text}"
            );
        }
    }
}

#[test]
fn train() {
    let own = [
        by("model=nowhere"),
        by("output_dir=elsewhere"),
        by("shards=shards"),
        by("data.shuffle=false"),
        by("lora.bias=all"),
        by("lora.adapter=nowhere"),
        by("training.per_device_train_batch_size=2"),
        by_with("training.gradient_accumulation_steps=2", &["training.global_batch_size=null"]),
        by("training.global_batch_size=4"),
        by("training.learning_rate=0.001"),
        by("training.lr_scheduler_type=linear"),
        by("training.lr_scheduler_kwargs={num_cycles: 2}"),
        by("training.adam_beta1=0.5"),
        by("training.adam_beta2=0.5"),
        by("training.adam_epsilon=0.1"),
        by("training.warmup_steps=1"),
        by_with("training.warmup_ratio=0.3", &["training.warmup_steps=null"]),
        by_with("training.num_train_epochs=0.5", &["training.max_steps=null"]),
        by_with("training.drop_last=true", &["training.max_steps=null", "training.global_batch_size=5"]),
        by("training.max_steps=2"),
        by("training.max_grad_norm=0.001"),
        by("training.weight_decay=0.5"),
        by("training.loraplus_lr_ratio=4"),
        by("training.seed=7"),
        by("training.logging_steps=2"),
        by("training.save_steps=1"),
        by_with("training.save_strategy=epoch", &["training.max_steps=5"]),
        by_with("training.save_total_limit=1", &["training.save_steps=1", "training.max_steps=4"]),
        by("training.resume=nowhere"),
        // Nothing is long or not finite in a run of two steps, so these keys are proved by what they refuse or say.
        by("training.grace=-1"),
        by("training.max_time=1h"),
        by("training.max_skipped_steps=-1"),
        by("training.load_best_model_at_end=true"),
        by("training.metric_for_best_model=accuracy"),
        by("training.early_stopping_patience=1"),
        by("training.early_stopping_threshold=0.5"),
        by_with("training.eval_steps=1", &["data.eval=0.3"]),
        by_with("training.eval_strategy=epoch", &["data.eval=rows.jsonl", "training.max_steps=5"]),
    ];
    let args = ["--device", "cpu", "train", "-c", "recipe.yaml", "--set", "lora.lora_dropout=0.1"];
    check("train", &args, &[&own, &TRAINING_ROWS, &BASE, &ENGINE, &ADAPTER, &STEPS, &STEPS_HERE]);
}

#[test]
fn eval() {
    let own = [
        by("shards=shards"),
        by("data.format=messages"),
        by("data.columns={input_ids: labels}"),
        by("data.packing=false"),
        by_with("data.overlong=drop", &[]),
        by("data.loss_on=completion"),
        by("fsdp.offload_params=true"),
        by_with("fsdp.host_budget=1KB", &["fsdp.offload_params=true"]),
    ];
    let args = ["--device", "cpu", "eval", "--model", "model", "--adapter", "adapter", "--dataset", "rows.jsonl"];
    check("eval", &[&args[..], &["--max-length", "24"]].concat(), &[&own, &BASE, &ENGINE]);
}

#[test]
fn generate() {
    let own = [
        by("shards=shards"),
        by("fsdp.offload_params=true"),
        by_with("fsdp.host_budget=1KB", &["fsdp.offload_params=true"]),
    ];
    let args =
        ["--device", "cpu", "generate", "--model", "model", "--adapter", "adapter", "--prompt", "hello", "--raw"];
    check("generate", &[&args[..], &["--max-new-tokens", "4"]].concat(), &[&own, &BASE, &ENGINE]);
}

#[test]
fn quantize() {
    check("quantize", &["quantize", "--model", "model", "--output", "shards", "--world-size", "2"], &[&BASE]);
}

#[test]
fn merge() {
    let args = ["merge", "--model", "model", "--adapter", "adapter", "--output", "out", "--base", "dequantized"];
    check("merge", &args, &[&BASE]);
    let own = [
        by("shards=shards"),
        by("data.format=messages"),
        by("data.columns={input_ids: labels}"),
        by("data.packing=false"),
        by("data.overlong=drop"),
        by("data.loss_on=completion"),
        by("quantization.bnb_4bit_compute_dtype=float16"),
        by("fsdp.vram_budget=100KB"),
    ];
    let scored = ["--dataset", "rows.jsonl", "--max-length", "24", "--device", "cpu"];
    check("merge --dataset", &[&args[..], &scored].concat(), &[&own, &BASE]);
}

#[test]
fn export() {
    check("export", &["export", "--model", "model", "--adapter", "adapter", "--gguf", "adapter.gguf"], &[]);
}

#[test]
fn benchmarks() {
    let args = ["--device", "cpu", "bench", "step", "--shape", "model", "--seq", "16", "--accum", "2", "--steps", "1"];
    check("bench step", &args, &[&BASE, &ENGINE, &ADAPTER, &STEPS, &STEPS_HERE]);
    let of_ops = [by("quantization.bnb_4bit_compute_dtype=float16")];
    let args = ["--device", "cpu", "bench", "kernels", "--shape", "model", "--seq", "16"];
    check("bench kernels", &args, &[&BASE, &ADAPTER, &of_ops]);
    check("bench collectives", &["--device", "cpu", "bench", "collectives"], &[]);
}

#[test]
fn plan() {
    let engine = [
        by("quantization.bnb_4bit_compute_dtype=float32"),
        by("fsdp.sharding_strategy=no_shard"),
        by("fsdp.vram_budget=100MB"),
        by("fsdp.resident_units=1"),
        by("fsdp.dense_layers=1"),
        by("fsdp.offload_params=true"),
        by("fsdp.activation_offload=true"),
        by_with("fsdp.host_budget=1KB", &["fsdp.offload_params=true"]),
    ];
    let cards = ["--gpu", "h100", "--world-size", "2"];
    let own = [
        by("model=nowhere"),
        by("data.max_length=64"),
        by("lora.adapter=nowhere"),
        by("training.per_device_train_batch_size=2"),
        by_with("training.gradient_accumulation_steps=2", &["training.global_batch_size=null"]),
        by("training.global_batch_size=4"),
        by("fsdp.gather=nccl"),
    ];
    let recipe = ["plan", "-c", "recipe.yaml", "--set", "model=shape", "--set", "lora.lora_dropout=0.1"];
    check("plan", &[&recipe[..], &cards].concat(), &[&own, &engine, &BASE, &ADAPTER, &STEPS]);
    let shape = ["plan", "--shape", "llama-3.1-8b", "--layers", "2", "--seq", "4096"];
    let own = [by("fsdp.gather=host")];
    check("plan --shape", &[&shape[..], &cards].concat(), &[&own, &engine, &BASE, &ADAPTER, &STEPS]);
}

#[test]
fn data() {
    let own = [by("model=nowhere")];
    check("data", &["data", "-c", "recipe.yaml", "--json"], &[&own, &TRAINING_ROWS]);
}
