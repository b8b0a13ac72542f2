//! Input files of a base model that are something else: refused at once, with path and kind, and none hangs or takes
//! all memory.

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::cli::{Place, TRAIN, fails, succeeds, train_with};
use serde_json::{Value, json};

const LFS_POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n";

/// Far more than a refusal takes, and less than a person's patience.
const AT_ONCE: Duration = Duration::from_secs(60);

/// Training fails with status 1 within a bound of memory, tells all of `words`, shows no control character and leaves
/// no result.
fn refused(place: &Place, words: &[&str]) {
    let program = place.command(&TRAIN);
    let mut shell = Command::new("bash");
    let run = format!("ulimit -v 4000000; exec {} train -c recipe.yaml", program.get_program().to_str().unwrap());
    shell.args(["-c", &run]).current_dir(place.path(""));
    shell.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let start = Instant::now();
    let text = fails(shell, 1);
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    for word in words {
        assert!(text.contains(word), "{word:?} is not in:\n{text}");
    }
    assert!(!text.contains(|c: char| c.is_control() && c != '\n') && text.len() < 20_000, "{text:?}");
    assert_eq!(place.results(), Vec::<String>::new(), "left behind");
}

/// Puts something else in the place of a file.
fn instead(place: &Place, name: &str, make: impl Fn(&Path)) {
    std::fs::remove_file(place.path(name)).unwrap();
    make(&place.path(name));
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn what_is_no_regular_file() {
    for name in ["config.json", "model.safetensors", "model.safetensors.index.json"] {
        for (make, word) in [
            (&fifo as &dyn Fn(&Path), "a FIFO"),
            (&|path: &Path| symlink("/dev/zero", path).unwrap(), "a device"),
            (&|path: &Path| std::fs::create_dir(path).unwrap(), "a folder"),
            (&|path: &Path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()), "a socket"),
        ] {
            println!("{name}: {word}");
            let place = Place::new();
            if name.ends_with("index.json") {
                std::fs::rename(place.path("model/model.safetensors"), place.path(&format!("model/{name}"))).unwrap();
            }
            instead(&place, &format!("model/{name}"), make);
            refused(&place, &[&format!("model/{name}: {word}")]);
        }
    }
}

#[test]
fn what_is_only_kept_or_looked_at_is_no_fifo_either() {
    let place = Place::new();
    place.write("rows.jsonl", "{\"input_ids\": [1, 2, 3, 4]}\n".repeat(6));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::remove_file(place.path(&format!("model/{name}"))).unwrap();
    }
    // Rows that are tokenized need no tokenizer, but the files of one go beside the adapter.
    fifo(&place.path("model/added_tokens.json"));
    refused(&place, &["model/added_tokens.json: a FIFO"]);

    // A file that may be missing is not missing where a link leads nowhere.
    let place = Place::new();
    let config = place.path("model/tokenizer_config.json");
    std::fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink(&config, &config).unwrap();
    refused(&place, &["model/tokenizer_config.json: "]);

    let place = Place::new();
    std::fs::create_dir(place.path("out")).unwrap();
    fifo(&place.path("out/run.json"));
    let text = fails(place.command(&TRAIN), 1);
    assert!(text.contains("out/run.json: a FIFO"), "{text}");
}

#[test]
fn what_is_not_the_file_itself() {
    let page = "\n<!doctype html><html><body>404</body></html>";
    let cases: [(&str, &str, &[&str]); 8] = [
        ("model.safetensors", LFS_POINTER, &["model.safetensors: a Git LFS pointer", "git lfs pull", "hf download"]),
        ("model.safetensors", page, &["model.safetensors: an HTML page", "hf download"]),
        ("model.safetensors", "", &["model.safetensors: truncated: 0 bytes"]),
        ("config.json", LFS_POINTER, &["config.json: a Git LFS pointer"]),
        ("config.json", page, &["config.json: an HTML page"]),
        ("config.json", " ", &["config.json: an empty file"]),
        ("config.json", "{\"model_type\": \"lla", &["config.json: not the JSON that is expected: EOF"]),
        ("config.json", "[1]", &["config.json: not the JSON that is expected"]),
    ];
    for (name, content, words) in cases {
        let place = Place::new();
        place.write(&format!("model/{name}"), content);
        refused(&place, words);
    }
}

/// The error of a library that panics ends the run as any other error does.
#[test]
fn what_a_library_panics_on() {
    let place = Place::new();
    let text = String::from_utf8(place.read("model/tokenizer.json")).unwrap();
    assert!(text.contains("\"decoder\": {"));
    place.write("model/tokenizer.json", text.replace("\"decoder\": {", "\"decoder\": {\"x\": \"\\ud800\","));
    refused(&place, &["error: ", "tokenizer.json: the library that reads tokenizer.json fails on it"]);
}

#[test]
fn other_formats_and_the_root_of_a_hub_cache() {
    let place = Place::new();
    std::fs::rename(place.path("model/model.safetensors"), place.path("model/pytorch_model.bin")).unwrap();
    refused(&place, &["pytorch_model.bin is in PyTorch's format", "help: python"]);
    std::fs::rename(place.path("model/pytorch_model.bin"), place.path("model/x.gguf")).unwrap();
    refused(&place, &["x.gguf is in GGUF", "help: `python scripts/gguf_to_hf.py model/x.gguf FOLDER`"]);

    let place = Place::new();
    std::fs::create_dir_all(place.path("models--org--name/snapshots")).unwrap();
    std::fs::rename(place.path("model"), place.path("models--org--name/snapshots/abc")).unwrap();
    symlink("models--org--name", place.path("model")).unwrap();
    refused(&place, &["a repository in the hub's cache", "help: model: model/snapshots/abc"]);
    succeeds(place.command(&train_with(&["model=model/snapshots/abc", "training.max_steps=1"])));
}

#[test]
fn files_that_an_index_may_name() {
    let with_index = |name: &str| {
        let place = Place::new();
        let bytes = place.read("model/model.safetensors");
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let map: Value =
            header.keys().filter(|key| *key != "__metadata__").map(|key| (key.clone(), json!(name))).collect();
        place.write("model/model.safetensors.index.json", json!({"weight_map": map}).to_string());
        std::fs::rename(place.path("model/model.safetensors"), place.path("model/a.safetensors")).unwrap();
        place
    };
    succeeds(with_index("a.safetensors").command(&train_with(&["training.max_steps=1"])));
    for name in ["../model/a.safetensors", "/etc/hostname", "sub/a.safetensors", "..", "", "a\u{1b}[2J/b", "a\0b"] {
        refused(&with_index(name), &["model.safetensors.index.json: names", "names of files in its own folder"]);
    }
    let place = with_index("link.safetensors");
    std::fs::rename(place.path("model/a.safetensors"), place.path("elsewhere.safetensors")).unwrap();
    symlink("../elsewhere.safetensors", place.path("model/link.safetensors")).unwrap();
    refused(&place, &["names link.safetensors, a link to", "elsewhere.safetensors"]);
}

/// A safetensors file that is mostly header.
fn header_of(bytes: usize, text: impl Fn(usize) -> String) -> Vec<u8> {
    let mut header = String::from("{");
    for i in 0.. {
        let entry = text(i);
        if header.len() + entry.len() + 2 > bytes {
            break;
        }
        header += if i > 0 { "," } else { "" };
        header += &entry;
    }
    header += "}";
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

#[test]
fn headers_and_configs_that_ask_for_much() {
    let entry = |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let place = Place::new();
    place.write("model/model.safetensors", header_of(98_000_000, entry));
    refused(&place, &["model.safetensors: header of 97999", "at most 16777216 are allowed"]);
    place.write("model/model.safetensors", header_of(16_000_000, entry));
    refused(&place, &["model.embed_tokens.weight is missing", "more"]);
    place.write(
        "model/model.safetensors",
        header_of(16_000_000, |i| format!(r#""\u001b[2J{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)),
    );
    refused(&place, &["and ", " more"]);

    for (key, value, word) in [
        ("num_hidden_layers", json!(1_000_000_000), "num_hidden_layers: found 1000000000, allowed: at most"),
        ("num_hidden_layers", json!(1000), "num_hidden_layers is 1000, but there are only"),
        ("vocab_size", json!(4_000_000_000_u32), "vocab_size: found 4000000000"),
        ("hidden_size", json!(4_000_000_000_u32), "config.json makes it [320, 4000000000]"),
        ("intermediate_size", json!(2_000_000_000), "config.json makes it [2000000000"),
        ("hidden_size", json!(1e308), "hidden_size: found 1e+308"),
        ("rms_norm_eps", json!(1e308), "rms_norm_eps: found 1e+308"),
        ("vocab_size", json!(-1), "vocab_size: found -1"),
        ("\u{1b}[2J", json!("x\u{7}"), "\\u{1b}[2J: found"),
    ] {
        let place = Place::new();
        place.config(key, value);
        refused(&place, &["config.json", word]);
    }
    let place = Place::new();
    place.write("model/config.json", format!("{{\"model_type\": {}", "[".repeat(1 << 20)));
    refused(&place, &["config.json: not the JSON that is expected: recursion limit"]);
    place.write("model/config.json", " ".repeat(5 << 20));
    refused(&place, &["config.json: 5242880 bytes, at most 4194304"]);
    let keys: Value = (0..100_000).map(|i| (format!("key{i}"), json!(1))).collect();
    place.write("model/config.json", keys.to_string());
    refused(&place, &["model_type: missing", "more"]);
}

#[test]
fn a_plan_from_a_config_alone_takes_no_size_for_granted() {
    let place = Place::new();
    // GPUs take heads of this width.
    place.config("head_dim", json!(64));
    let config = place.read("model/config.json");
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    let plan = ["plan", "-c", "recipe.yaml", "--gpu", "rtx3090"];
    succeeds(place.command(&plan));
    for (key, value) in [
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_hidden_layers", json!(1000)),
        ("hidden_size", json!(4_000_000_000_u32)),
        ("intermediate_size", json!(4_000_000_000_u32)),
        ("vocab_size", json!(100_000_000)),
        ("num_attention_heads", json!(4_000_000_000_u32)),
        ("head_dim", json!(65_536)),
        ("max_position_embeddings", json!(4_000_000_000_u32)),
    ] {
        place.write("model/config.json", &config);
        place.config(key, value.clone());
        let start = Instant::now();
        let output = place.command(&plan).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let told = output.status.success() || text.starts_with("error: ");
        assert!(told && !text.contains("panicked") && start.elapsed() < AT_ONCE, "{key} {value}: {text}");
    }
}

#[test]
fn a_checkpoint_in_4_bit_keeps_what_is_plain_in_it() {
    let place = Place::new();
    let nested = |name: &str| common::golden("tiny-bnb4-nested").join(name);
    std::fs::copy(nested("config.json"), place.path("model/config.json")).unwrap();
    let (four, plain) =
        (read_tensors(&nested("model.safetensors")), read_tensors(&place.path("model/model.safetensors")));
    let kept = ["model.layers.1.mlp.", "model.layers.0.self_attn.o_proj."];
    let is_kept = |name: &str| kept.iter().any(|kept| name.starts_with(kept));
    let mixed =
        |from: &[Tensor], keep: bool| from.iter().filter(|t| is_kept(&t.0) == keep).cloned().collect::<Vec<_>>();
    write_tensors(&place.path("model/model.safetensors"), &[mixed(&four, false), mixed(&plain, true)].concat());
    let mut config: Value = serde_json::from_slice(&place.read("model/config.json")).unwrap();
    config["quantization_config"]["llm_int8_skip_modules"] = json!(["lm_head", "model.layers.1.mlp", "o_proj"]);
    place.write("model/config.json", config.to_string());
    // o_proj of layer 1 is in 4 bit.
    refused(&place, &["model.layers.1.self_attn.o_proj.weight is in 4 bit", "llm_int8_skip_modules names o_proj"]);

    config["quantization_config"]["llm_int8_skip_modules"][2] = json!("model.layers.0.self_attn.o_proj");
    place.write("model/config.json", config.to_string());
    let rows = ROWS.map(|ids| json!({"input_ids": ids}).to_string());
    place.write("rows.jsonl", rows.join("\n"));
    let eval = ["eval", "--model", "model", "--dataset", "rows.jsonl", "--json", "--device", "cpu"];
    let loss = |ranks: usize| {
        let mut command = if ranks == 1 { place.command(&eval) } else { place.mpirun(ranks, &eval) };
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("4 of 14 projections are not in 4 bit in the checkpoint"), "{text}");
        let score: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{text}"));
        score["loss"].as_f64().unwrap()
    };
    let one = loss(1);
    assert!((loss(3) - one).abs() < 1e-6 * one);
    assert!((one - REFERENCE_LOSS).abs() < 1e-5 * REFERENCE_LOSS, "{one}");

    let text = fails(place.command(&train_with(&["quantization.load_in_4bit=false"])), 1);
    assert!(text.contains("quantization.load_in_4bit: found false, but this checkpoint is in 4 bit"), "{text}");
}

/// Loss of [`ROWS`] by transformers 5.23 with bitsandbytes 0.50.2, in f32.
const REFERENCE_LOSS: f64 = 7.828679;

#[rustfmt::skip]
const ROWS: [&[u32]; 3] = [
    &[197, 215, 20, 132, 261, 248, 207, 155, 244, 183, 298, 111, 258, 71, 144, 71, 48, 128, 272, 308, 75, 158,
      50, 37, 169, 241, 286, 51, 181, 222],
    &[161, 312, 104, 282, 244, 226, 266, 133, 31, 280, 7, 47, 204, 0, 313, 252, 170, 124, 166, 32, 97, 290, 113,
      122, 72, 278, 229, 46, 41, 163, 260, 250, 55, 154, 282, 149, 63, 280, 170, 276, 104, 308, 280, 300, 147,
      227, 46, 305, 197, 162, 294, 123, 148, 94, 96, 95, 16, 313, 133, 243, 35, 45, 66, 76, 19, 41, 276, 200,
      268, 141, 267, 120, 110, 301, 214, 296, 140, 230, 252, 182, 42, 166, 313, 59, 249, 300, 171, 97, 124, 8,
      138, 59, 112, 190, 87, 170, 218, 31, 51, 74],
    &[112, 23, 293, 273, 308, 37, 13],
];

/// Name, entry of the header, bytes.
type Tensor = (String, Value, Vec<u8>);

fn read_tensors(path: &Path) -> Vec<Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let tensor = |(name, entry): (String, Value)| {
        let at = |i: usize| 8 + len + entry["data_offsets"][i].as_u64().unwrap() as usize;
        let data = bytes[at(0)..at(1)].to_vec();
        (name, entry, data)
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}

fn write_tensors(path: &Path, tensors: &[Tensor]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, entry, bytes) in tensors {
        let mut entry = entry.clone();
        entry["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
        header.insert(name.clone(), entry);
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}
