//! Bad input: the exit status, a message that names the file or key, and nothing half-written.

mod common;

#[path = "bad_input/adapters.rs"]
mod adapters;
#[path = "bad_input/arguments.rs"]
mod arguments;
#[path = "bad_input/keys.rs"]
mod keys;

use common::cli::{MPI_WITHOUT_FILES, Place, TRAIN, fails, metrics, succeeds, train_with};
use serde_json::{Value, json};

/// Training fails with this status, tells all of `words`, and leaves no result.
fn train_fails(place: &Place, overrides: &[&str], status: i32, words: &[&str]) {
    let text = fails(place.command(&train_with(overrides)), status);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
    assert_eq!(place.results(), Vec::<String>::new(), "left behind");
}

/// The model's file with another header; the data stays.
fn with_header(place: &Place, change: impl Fn(&mut Value)) {
    let bytes = place.read("model/model.safetensors");
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    change(&mut header);
    let text = header.to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[8 + len..]);
    place.write("model/model.safetensors", out);
}

/// Overwrites the first weight of a tensor.
fn with_weight(place: &Place, tensor: &str, value: f32) {
    let mut bytes = place.read("model/model.safetensors");
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let at = 8 + len + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    place.write("model/model.safetensors", bytes);
}

const GATE: &str = "model.layers.1.mlp.gate_proj.weight";

/// Changes the model's folder.
type Damage<'a> = Box<dyn Fn(&Place) + 'a>;

#[test]
fn damaged_safetensors() {
    let whole = Place::new().read("model/model.safetensors");
    let cases: [(&str, Damage, &[&str]); 9] = [
        (
            "missing",
            Box::new(|p| std::fs::remove_file(p.path("model/model.safetensors")).unwrap()),
            &["model.safetensors"],
        ),
        (
            "truncated",
            Box::new(|p| p.write("model/model.safetensors", &whole[..whole.len() - 9])),
            &["model.safetensors"],
        ),
        ("header longer", Box::new(|p| p.write("model/model.safetensors", &whole[..100])), &["model.safetensors"]),
        (
            "out of range",
            Box::new(|p| with_header(p, |h| h[GATE]["data_offsets"][1] = json!(99_999_999))),
            &["model.safetensors"],
        ),
        (
            "overlapping",
            Box::new(|p| {
                with_header(p, |h| {
                    h[GATE]["data_offsets"] = h["model.layers.0.mlp.gate_proj.weight"]["data_offsets"].clone()
                })
            }),
            &["model.safetensors"],
        ),
        (
            "shape",
            Box::new(|p| with_header(p, |h| h[GATE]["shape"] = json!([64, 128]))),
            &["model.safetensors", GATE, "128"],
        ),
        (
            "missing tensor",
            Box::new(|p| {
                with_header(p, |h| {
                    let tensor = h.as_object_mut().unwrap().remove(GATE).unwrap();
                    h["model.rotary_emb.inv_freq"] = tensor;
                })
            }),
            &[GATE, "missing"],
        ),
        ("NaN", Box::new(|p| with_weight(p, GATE, f32::NAN)), &["model.safetensors", GATE, "NaN"]),
        (
            "Inf",
            Box::new(|p| with_weight(p, "lm_head.weight", f32::INFINITY)),
            &["model.safetensors", "lm_head.weight", "inf"],
        ),
    ];
    for (name, damage, words) in cases {
        println!("{name}");
        let place = Place::new();
        damage(&place);
        train_fails(&place, &[], 1, words);
    }
}

#[test]
fn an_index_that_names_a_missing_file() {
    let place = Place::new();
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    place.write("model/model.safetensors.index.json", json!({"weight_map": {"a": "model-7.safetensors"}}).to_string());
    train_fails(&place, &[], 1, &["model.safetensors.index.json", "model-7.safetensors"]);
}

#[test]
fn configs_that_are_not_supported() {
    for (key, value, words) in [
        ("model_type", json!("mamba"), ["config.json", "mamba"]),
        ("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0}), ["config.json", "longrope"]),
        ("num_key_value_heads", json!(3), ["config.json", "num_key_value_heads"]),
        ("hidden_act", json!("gelu"), ["hidden_act", "gelu"]),
        ("some_new_factor", json!(2.5), ["config.json", "some_new_factor"]),
    ] {
        let place = Place::new();
        let mut config: Value = serde_json::from_slice(&place.read("model/config.json")).unwrap();
        if key == "rope_scaling" {
            config.as_object_mut().unwrap().remove("rope_parameters");
            config["rope_theta"] = json!(10_000.0);
            place.write("model/config.json", config.to_string());
        }
        place.config(key, value);
        train_fails(&place, &[], 1, &words);
    }
}

#[test]
fn rows() {
    let good = r#"{"text": "hello there, how are you"}"#;
    let cases: [(&str, &[&str], &[&str]); 5] = [
        ("{\"text\": \"a b\"}\n{\"text\": \n", &[], &["rows.jsonl:2"]),
        ("{\"text\": \"a b\"}\n{\"txt\": \"a\"}\n", &[], &["rows.jsonl:2", "text"]),
        ("", &[], &["rows.jsonl"]),
        ("{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, -100]}\n", &[], &["counts in the loss"]),
        (good, &["data.max_length=4", "data.overlong=error"], &["data.max_length", "rows.jsonl:1"]),
    ];
    for (content, overrides, words) in cases {
        let place = Place::new();
        place.write("rows.jsonl", content);
        train_fails(&place, overrides, 1, words);
    }
    for (overlong, word) in [("truncate", "truncated"), ("split", "split"), ("drop", "dropped")] {
        let place = Place::new();
        place.write("rows.jsonl", format!("{good}\n{}\n", r#"{"text": "ab"}"#));
        let overlong = format!("data.overlong={overlong}");
        let sets = ["data.max_length=4", &overlong, "training.global_batch_size=1"];
        let text = succeeds(place.command(&train_with(&sets)));
        assert!(text.contains(&format!("1 over 4 tokens and {word}")) || text.contains(&format!("1 {word}")), "{text}");
    }
}

#[test]
fn columns_of_rows() {
    for (row, words) in [
        (json!({"text": "a b", "assistant_masks": [1]}), ["rows.jsonl:2: assistant_masks", "text"]),
        (
            json!({"messages": [{"role": "user", "content": "a"}], "images": ["x"]}),
            ["rows.jsonl:2: images", "messages"],
        ),
        (
            json!({"conversations": [{"from": "critic", "value": "a"}]}),
            ["rows.jsonl:2: conversations[0]: found", "allowed as from: human"],
        ),
        (json!({"input_ids": [1, 2], "attention_mask": [1, 2]}), ["rows.jsonl:2: attention_mask[1] is 2", "0 or 1"]),
        (json!({"\u{1b}[2J": "a"}), ["rows.jsonl:2: found the columns", r"u{1b}"]),
    ] {
        let place = Place::new();
        place.write("rows.jsonl", format!("\n{row}\n"));
        let text = fails(place.command(&train_with(&[])), 1);
        assert!(words.iter().all(|word| text.contains(word)) && !text.contains('\u{1b}'), "{text}");
        assert_eq!(place.results(), Vec::<String>::new(), "left behind");
    }
    let place = Place::new();
    place.write(
        "rows.jsonl",
        "{\"text\": \"hello there\", \"topic\": \"x\"}\n{\"text\": \"how are you\", \"topic\": 1, \"id\": null}\n",
    );
    let text = succeeds(place.command(&train_with(&["training.global_batch_size=4", "data.packing=false"])));
    assert!(text.contains("columns that nothing reads: `topic` in 2 rows\n"), "{text}");
    assert!(text.contains("steps of 4 sequences (the last of each epoch has 2);"), "{text}");
}

#[test]
fn a_row_that_is_too_long() {
    let place = Place::new();
    place.write("rows.jsonl", format!("{{\"text\": \"a\"}}\n{{\"text\": \"{}\"}}\n", "a ".repeat(3 << 20)));
    train_fails(&place, &[], 1, &["rows.jsonl:2: the row is longer than 4 MiB"]);
    place.write("rows.jsonl", format!("{{\"text\": [\"{}\"]}}\n", "a ".repeat(1 << 20)));
    let text = fails(place.command(&train_with(&[])), 1);
    assert!(text.contains("rows.jsonl:1: text: found [") && text.len() < 5_000, "{} bytes", text.len());
}

#[test]
fn no_tokenizer() {
    let place = Place::new();
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    place.write("rows.jsonl", r#"{"text": "hello there"}"#);
    train_fails(&place, &[], 1, &["tokenizer.json", "model"]);
}

#[test]
fn recipes() {
    let place = Place::new();
    let text = fails(place.command(&["train", "-c", "no.yaml"]), 2);
    assert!(text.contains("no.yaml"), "{text}");
    train_fails(
        &place,
        &["training.learning_rat=1", "lora.r=-1", "training.max_time=soon", "data.packing=maybe"],
        2,
        &["learning_rate", "lora.r", "training.max_time: found \"soon\"", "data.packing"],
    );
    train_fails(&place, &["training.max_steps"], 2, &["training.max_steps"]);
    train_fails(&place, &["model=./nowhere"], 2, &["model", "nowhere"]);
    let text = fails(place.command(&["train", "--unknown"]), 2);
    assert!(text.contains("--unknown"), "{text}");
}

#[test]
fn budgets_that_are_too_small_are_refused_with_the_numbers() {
    let place = Place::new();
    let refused = |overrides: &[&str], words: &[&str]| {
        let text = fails(place.command(&train_with(overrides)), 1);
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} in\n{text}");
        // Shard files may be there, whole: they serve the next start.
        assert!(!place.path("out/metrics.jsonl").exists(), "no step was to be made");
    };
    refused(
        &["fsdp.vram_budget=100KB"],
        &[
            "a rank needs at least",
            "and may take 97.7 KiB",
            "more of device memory (a larger machine, or fsdp.vram_budget)",
        ],
    );
    // The adapter and its moments on the host, which may not take them.
    refused(
        &["fsdp.offload_params=true", "fsdp.host_budget=1KB"],
        &["of host memory (trainable", "and may take 1000 B", "fsdp.host_budget"],
    );
    refused(
        &["quantization.bnb_4bit_compute_dtype=float16"],
        &["quantization.bnb_4bit_compute_dtype", "the CPU computes in float32"],
    );
}

#[test]
fn what_plan_is_asked_for_must_exist() {
    let place = Place::new();
    let plan = |args: &[&str], status: i32, word: &str| {
        let args = [&["plan"], args].concat();
        let text = fails(place.command(&args), status);
        assert!(text.contains(word), "{text}");
    };
    plan(&["--shape", "llama-3.1-8b", "--gpu", "gtx"], 2, "--gpu: found gtx; allowed: rtx3060, rtx3090");
    plan(&["--shape", "x", "--gpu", "h100"], 2, "--shape: found x; allowed: llama-3.1-8b");
    plan(&["--gpu", "h100"], 2, "--shape");
    plan(&["-c", "recipe.yaml", "--gpu", "h100", "--seq", "64"], 2, "cannot be used with");
    plan(&["--shape", "llama-3.1-405b", "--gpu", "rtx3060", "--host-gib", "64"], 1, "a rank needs at least");
    plan(&["-c", "recipe.yaml", "--gpu", "h100", "--world-size", "3", "--nodes", "2"], 2, "3 ranks do not divide by 2");
}

#[test]
fn an_output_directory_that_cannot_be_written() {
    let place = Place::new();
    place.write("file", "");
    train_fails(&place, &["output_dir=file/out"], 1, &["output_dir", "file/out"]);
}

#[test]
fn a_full_disk_while_shards_are_written() {
    let place = Place::new();
    // A limit on the size of files makes write fail as a full disk does; MPI is told to do without files of its own.
    let program = place.command(&TRAIN);
    let run =
        format!("trap '' XFSZ; ulimit -f 20; exec {} train -c recipe.yaml", program.get_program().to_str().unwrap());
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", &run]).current_dir(place.path(""));
    shell.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.envs(MPI_WITHOUT_FILES);
    let text = fails(shell, 1);
    assert!(text.contains("nf4-00000-of-00001.safetensors") && text.contains("disk full"), "{text}");
    assert_eq!(place.results(), Vec::<String>::new(), "left behind");
}

#[test]
fn damaged_shard_files_are_made_again() {
    let place = Place::new();
    let mut args = TRAIN.to_vec();
    args.extend(["--set", "shards=shards", "--set", "training.max_steps=1", "--overwrite"]);
    let loss = |place: &Place| metrics(&place.read("out/metrics.jsonl"))[0]["loss"].clone();
    assert!(succeeds(place.command(&args)).contains("quantizing"));
    let (first, file) = (loss(&place), place.read("shards/nf4-00000-of-00001.safetensors"));
    assert!(!succeeds(place.command(&args)).contains("quantizing"), "the second run maps the file");

    let mut damaged = file.clone();
    let last = damaged.len() - 100;
    damaged[last] ^= 1;
    place.write("shards/nf4-00000-of-00001.safetensors", damaged);
    let text = succeeds(place.command(&args));
    assert!(text.contains("nf4-00000-of-00001.safetensors: damaged") && text.contains("made again"), "{text}");
    assert_eq!((loss(&place), place.read("shards/nf4-00000-of-00001.safetensors")), (first.clone(), file));
}

#[test]
fn an_adapter_that_lacks_a_tensor() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    let bytes = place.read("out/adapter_model.safetensors");
    let name = b"layers.1.self_attn.k_proj.lora_B";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    let mut changed = bytes.clone();
    changed[at + 7] = b'7';
    place.write("out/adapter_model.safetensors", changed);
    let args = ["eval", "--model", "model", "--adapter", "out", "--dataset", "rows.jsonl"];
    let text = fails(place.command(&args), 1);
    assert!(text.contains("adapter_model.safetensors") && text.contains("layers.1.self_attn.k_proj.lora_B"), "{text}");
}

#[test]
fn ranks_that_cannot_be_served_and_a_foreign_mpirun() {
    let place = Place::new();
    let mut args = TRAIN.to_vec();
    args.extend(["--set", "training.global_batch_size=2"]);
    let text = fails(place.mpirun(4, &args), 2);
    assert!(text.contains("4 ranks cannot share a global batch of 2"), "{text}");
    let mut command = place.command(&TRAIN);
    command.env("PMI_SIZE", "2");
    let text = fails(command, 1);
    assert!(text.contains("PMI_SIZE") && text.contains("world of 1"), "{text}");
    assert!(!text.contains('\\') && !text.contains('\t'), "{text}");
}
