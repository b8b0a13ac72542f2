//! Numbers, paths and options of the command line: a value that cannot be meant is refused with what is allowed, and
//! never a panic.

use serde_json::json;

use crate::common::cli::{Place, TRAIN, fails, succeeds, train_with};

const EVAL: [&str; 5] = ["eval", "--model", "model", "--dataset", "rows.jsonl"];
const GENERATE: [&str; 5] = ["generate", "--model", "model", "--prompt", "a"];

fn refused(place: &Place, args: &[&str], status: i32, words: &[&str]) {
    let text = fails(place.command(args), status);
    assert!(
        words.iter().all(|word| text.contains(word)) && !text.contains("panicked"),
        "{words:?} in {args:?}:\n{text}"
    );
}

#[test]
fn numbers_beyond_all_bounds() {
    let place = Place::new();
    for number in ["18446744073709551615", "4294967295", "99999999999999999999999", "-1", "0", "nan", "1e30"] {
        let quantize = ["quantize", "--model", "model", "--output", "o"];
        let bench = ["bench", "step", "--shape", "model"];
        let commands: [(&[&str], &str); 4] = [
            (&EVAL, "--max-length"),
            (&GENERATE, "--max-new-tokens"),
            (&quantize, "--world-size"),
            (&bench, "--layers"),
        ];
        for (command, option) in commands {
            refused(&place, &[command, &[&format!("{option}={number}")]].concat(), 2, &[option]);
        }
        for option in ["--layers", "--seq", "--micro-batch", "--accum", "--world-size", "--nodes"] {
            let plan = ["plan", "--shape", "llama-3.1-8b", "--gpu", "h100", &format!("{option}={number}")];
            refused(&place, &plan, 2, &[option]);
        }
    }
    refused(&place, &[&GENERATE[..], &["--temperature", "nan"]].concat(), 2, &["--temperature", "0 or more"]);
    let seed = ["--temperature", "1", "--seed", "18446744073709551615"];
    refused(&place, &[&GENERATE[..], &seed].concat(), 2, &["--seed", "9007199254740992"]);
    for set in ["lora.r=1e9", "training.gradient_accumulation_steps=1e12", "training.num_train_epochs=1e300"] {
        let key = set.split('=').next().unwrap();
        refused(&place, &train_with(&["training.global_batch_size=null", set]), 2, &[key, "allowed"]);
    }
    // Each is allowed, both together are not.
    let sets = ["data.max_length=16777216", "training.per_device_train_batch_size=65536"];
    refused(&place, &train_with(&sets), 2, &["data.max_length", "training.per_device_train_batch_size"]);
}

#[test]
fn plan_refuses_what_no_machine_has() {
    let place = Place::new();
    let plan = ["plan", "--shape", "llama-3.1-8b", "--gpu", "h100"];
    for number in ["nan", "inf", "-1", "0"] {
        refused(&place, &[&plan[..], &[&format!("--host-gib={number}")]].concat(), 2, &["--host-gib", "above 0"]);
        refused(
            &place,
            &[&plan[..], &["--nodes=1", &format!("--network={number}")]].concat(),
            2,
            &["--network", "above 0"],
        );
    }
    // Room is a matter of the machine, all else is not.
    let sizes = ["--seq", "16777216", "--micro-batch", "64", "--accum", "4096"];
    refused(&place, &[&plan[..], &sizes].concat(), 1, &["a rank needs more than"]);
    let words = ["16384 micro-batches in 32 layers", "lower --accum"];
    refused(&place, &[&plan[..], &["--accum", "16384"]].concat(), 1, &words);
    let sweep = ["plan", "--shape", "llama-3.1-405b", "--sweep", "--host-gib", "64"];
    let output = place.command(&sweep).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("rtx3060  does not fit on 8: a rank needs at least"), "{text}");
    let sweep = ["plan", "--shape", "llama-3.1-8b", "--sweep", "--layers", "33"];
    refused(&place, &sweep, 2, &["--layers: found 33, allowed: 1 to the 32"]);
    for option in [["--calibrate", "runs.jsonl"], ["--network", "5"]] {
        refused(&place, &[&sweep[..4], &option].concat(), 2, &["cannot be used with", option[0]]);
    }
    for option in [["--device", "cuda"], ["--ranks-per-gpu", "2"]] {
        let quantize = ["quantize", "--shape", "llama-3.1-8b", "--output", "shards", "--world-size", "1"];
        refused(&place, &[&quantize[..], &option].concat(), 2, &["quantize computes on the CPU"]);
    }
}

#[test]
fn what_a_gpu_cannot_run_is_refused_by_plan() {
    let place = Place::new();
    place.config("head_dim", json!(80));
    place.config("intermediate_size", json!(129));
    let plan = ["plan", "--shape", "model", "--gpu", "h100"];
    refused(&place, &plan, 1, &["head_dim: found 80, allowed: [64, 96, 128, 256]", "intermediate_size: found 129"]);
}

#[test]
fn a_tilde_is_the_home_folder_everywhere() {
    let place = Place::new();
    std::fs::rename(place.path("recipe.yaml"), place.path("r.yaml")).unwrap();
    let home = place.path("");
    let sets = [
        "model=~/model",
        "output_dir=~/out",
        "shards=~/shards",
        "data.train=[~/rows.jsonl]",
        "data.eval=~/rows.jsonl",
        "training.max_steps=1",
    ];
    // In another folder, so that nothing is found by chance.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut args = vec!["train", "--config=~/r.yaml"];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    let mut command = place.command(&args);
    command.env("HOME", &home).current_dir(&elsewhere);
    succeeds(command);
    assert!(place.path("out/adapter_config.json").exists() && place.path("shards").is_dir());
    let mut command = place.command(&["eval", "--model=~/model", "--adapter=~/out", "--dataset=~/rows.jsonl"]);
    command.env("HOME", &home).current_dir(&elsewhere);
    succeeds(command);
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0, "nothing is made beside");
    for set in ["model=${HOME}/model", "output_dir=$HOME/out", "data.train=${X}/r.jsonl", "lora.adapter=~you/out"] {
        let key = set.split('=').next().unwrap();
        let mut args = vec!["train", "-c", "r.yaml", "--set", set];
        args.extend(["--set", "shards=shards"]);
        refused(&place, &args, 2, &[key, "write the path out"]);
    }
    refused(&place, &["train", "-c", "${HOME}/r.yaml"], 2, &["--config", "write the path out"]);
    assert!(!place.path("${HOME}").exists());
}

#[test]
fn a_user_without_a_recipe_is_given_one() {
    let place = Place::new();
    std::fs::remove_file(place.path("recipe.yaml")).unwrap();
    refused(
        &place,
        &[],
        2,
        &["fsdp-qlora.yaml: 1 error(s)\n  is not there; help: write one", "train: train.jsonl", "--help-recipe"],
    );
    refused(&place, &TRAIN, 2, &["recipe.yaml: 1 error(s)\n  is not there"]);
}

#[test]
fn what_will_surprise_is_said_before_the_first_step() {
    let place = Place::new();
    let sets = ["training.max_steps=null", "training.num_train_epochs=1", "training.warmup_steps=null"];
    let with = |more: &[&'static str]| train_with(&[&sets[..], more].concat());
    let text = succeeds(place.command(&with(&["training.global_batch_size=64"])));
    let epoch = text.find("the run has 1 step of 64 sequences (the last of each epoch has 24);");
    assert!(epoch.is_some_and(|at| at < text.find("step 1/1").unwrap()), "{text}");
    assert!(text.contains("; the learning rate rises in 0 steps, a tenth of them"), "{text}");
    let learned = place.read("out/metrics.jsonl");
    assert!(String::from_utf8_lossy(&learned).contains("\"learning_rate\":0.01,"), "the one step learns");
    let args = with(&["training.global_batch_size=64", "training.warmup_steps=10", "output_dir=other"]);
    let words = ["training.warmup_steps: found 10", "1 step of 64 sequences", "training.num_train_epochs: 1"];
    refused(&place, &args, 2, &words);
    assert!(!place.path("other/metrics.jsonl").exists());
    refused(&place, &train_with(&["training.learning_rate=0"]), 2, &["training.learning_rate: found 0"]);
}

#[test]
fn a_run_that_does_not_fit_names_what_its_command_reads() {
    let place = Place::new();
    let eval = [&EVAL[..], &["--set", "fsdp.vram_budget=100KB"]].concat();
    let text = fails(place.command(&eval), 1);
    assert!(text.contains("a rank needs at least") && !text.contains("training.") && !text.contains("data."), "{text}");
}

#[test]
fn a_recipe_is_a_file_of_bounded_size() {
    let place = Place::new();
    let fifo = place.path("fifo.yaml");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&place, &["train", "-c", "fifo.yaml"], 2, &["fifo.yaml", "a FIFO"]);
    refused(&place, &["train", "-c", "/dev/zero"], 2, &["/dev/zero", "a device"]);
    place.write("large.yaml", vec![b' '; 2 << 20]);
    refused(&place, &["train", "-c", "large.yaml"], 2, &["large.yaml", "at most 1048576"]);
    let keys: String = (0..10_000).map(|i| format!("key{i}: 1\n")).collect();
    place.write("keys.yaml", keys);
    let text = fails(place.command(&["train", "-c", "keys.yaml"]), 2);
    assert!(text.contains("10001 error(s)") || text.contains("10002 error(s)"), "{text}");
    assert!(text.len() < 5000, "{} bytes of message", text.len());
}
