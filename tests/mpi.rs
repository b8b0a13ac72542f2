//! Real runs under mpirun: the same results on any number of ranks.

mod common;

use common::cli::{Place, TRAIN, fails, metrics, program, succeeds, train_with};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn one_two_three_and_four_ranks() {
    let losses = |ranks: usize| -> Vec<f64> {
        let place = Place::new();
        succeeds(place.mpirun(ranks, &TRAIN));
        metrics(&place.read("out/metrics.jsonl")).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let reference = losses(1);
    assert_eq!(reference.len(), 3);
    for ranks in [2, 3, 4] {
        for (step, (a, b)) in losses(ranks).iter().zip(&reference).enumerate() {
            let tolerance = if step == 0 { 1e-6 } else { 1e-5 };
            assert!((a - b).abs() <= tolerance * b, "{ranks} ranks, step {}: {a} for {b}", step + 1);
        }
    }
}

/// Four ranks as two nodes of two.
const TWO_NODES: [(&str, &str); 1] = [("FSDP_QLORA_RANKS_PER_NODE", "2")];

#[test]
fn two_nodes_and_shared_memory_give_the_same_losses() {
    let losses = |sets: &[&str]| -> Vec<f64> {
        let place = Place::new();
        let mut command = place.mpirun(4, &train_with(sets));
        command.envs(TWO_NODES);
        succeeds(command);
        let parts = if sets.is_empty() { "-of-00004" } else { "-of-00002" };
        assert!(place.results().iter().any(|file| file.contains(parts)), "{parts} in {:?}", place.results());
        metrics(&place.read("out/metrics.jsonl")).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let full = losses(&[]);
    let hybrid = losses(&["fsdp.sharding_strategy=hybrid_shard"]);
    let host =
        losses(&["fsdp.sharding_strategy=hybrid_shard", "fsdp.gather=host", "fsdp.activation_checkpointing=selective"]);
    assert!(host == hybrid, "{host:?} for {hybrid:?}");
    for (a, b) in hybrid.iter().zip(&full) {
        assert!((a - b).abs() <= 1e-5 * b, "{a} for {b}");
    }
}

#[test]
fn a_gather_that_cannot_be_is_refused() {
    let place = Place::new();
    let refused = |sets: &[&str], words: &str| {
        let mut command = place.mpirun(4, &train_with(sets));
        command.envs(TWO_NODES);
        let text = fails(command, 1);
        assert!(text.contains(words), "{words} in {text}");
    };
    refused(&["fsdp.gather=host"], "needs the whole base in the memory of each node");
    refused(&["fsdp.gather=nccl"], "CPU ranks gather over MPI");
    let mut command = place.mpirun(4, &TRAIN);
    command.env(TWO_NODES[0].0, "3");
    assert!(fails(command, 1).contains("allowed: a divisor of the 4 ranks"));
}

#[test]
fn the_same_run_twice_gives_the_same_bytes() {
    let run = || {
        let place = Place::new();
        let mut args = TRAIN.to_vec();
        args.extend(["--set", "lora.lora_dropout=0.1", "--set", "data.eval=0.2"]);
        succeeds(place.mpirun(2, &args));
        let mut lines = metrics(&place.read("out/metrics.jsonl"));
        for line in lines.iter_mut().filter_map(Value::as_object_mut) {
            for key in ["tokens_per_second", "step_ms", "compute_ms", "gather_wait_ms", "peak_host_bytes"] {
                line.remove(key);
            }
        }
        assert!(
            lines.len() == 5 && lines[0]["eval_loss"].is_number() && lines[4]["eval_loss"].is_number(),
            "{lines:?}"
        );
        (place.read("out/adapter_model.safetensors"), lines)
    };
    assert!(run() == run());
}

#[test]
fn a_trace_has_every_queue_and_no_overlap_within_one() {
    let place = Place::new();
    let mut args = TRAIN.to_vec();
    args.extend([
        "--trace",
        "trace.json",
        "--set",
        "fsdp.activation_offload=true",
        "--set",
        "fsdp.offload_params=true",
    ]);
    succeeds(place.mpirun(2, &args));
    let trace: Value = serde_json::from_slice(&place.read("trace.json")).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let name = |e: &Value| e["name"].as_str().unwrap().to_string();
    let lanes: Vec<u64> = (0..4).collect();
    for lane in lanes {
        let mut spans: Vec<(f64, f64, String)> = events
            .iter()
            .filter(|e| e["ph"] == "X" && e["tid"] == lane)
            .map(|e| (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap(), name(e)))
            .collect();
        assert!(!spans.is_empty(), "lane {lane}");
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        for pair in spans.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0 + 1.0, "{pair:?}");
        }
    }
    let has = |part: &str| events.iter().any(|e| name(e).contains(part));
    assert!(
        ["gather of layer 1", "reduce of layer 0", "put of boundary 0", "fetch of boundary 1", "Backward"]
            .iter()
            .all(|p| has(p))
    );
}

/// All that a shard file holds but who made it, and who made it.
fn apart_from_makers(file: &[u8]) -> ((BTreeMap<String, String>, Vec<u8>), String) {
    let (header_bytes, header) = SafeTensors::read_metadata(file).unwrap();
    let mut metadata: BTreeMap<_, _> = header.metadata().clone().unwrap().into_iter().collect();
    let makers = metadata.remove("makers").unwrap();
    ((metadata, file[8 + header_bytes..].to_vec()), makers)
}

#[test]
fn shard_files_do_not_depend_on_who_computed_them() {
    let place = Place::new();
    let quantize = |output: &'static str| ["quantize", "--model", "model", "--world-size", "3", "--output", output];
    succeeds(place.command(&quantize("alone")));
    succeeds(place.mpirun(2, &quantize("two")));
    succeeds(place.mpirun(3, &quantize("three")));
    for shard in 0..3 {
        let read = |dir: &str| place.read(&format!("{dir}/nf4-{shard:05}-of-00003.safetensors"));
        let [alone, two, three] = ["alone", "two", "three"].map(|dir| apart_from_makers(&read(dir)));
        assert!(alone.0 == two.0 && alone.0 == three.0, "shard {shard}");
        assert!(alone.1.starts_with("[\"rank 0 on ") && !alone.1.contains("rank 1 on "), "{}", alone.1);
        assert!(two.1.contains("\"rank 1 on ") && three.1.contains("\"rank 2 on "), "{} {}", two.1, three.1);
    }
    let mut args = TRAIN.to_vec();
    args.extend(["--set", "shards=alone"]);
    assert!(!succeeds(place.mpirun(3, &args)).contains("quantizing"), "training maps the files that are there");
}

#[test]
fn damage_names_who_made_the_unit_and_files_that_do_not_tell_are_valid() {
    let place = Place::new();
    succeeds(place.mpirun(2, &["quantize", "--model", "model", "--world-size", "1", "--output", "shards"]));
    let name = "shards/nf4-00000-of-00001.safetensors";
    let made = place.read(name);
    let train = || succeeds(place.command(&train_with(&["shards=shards", "training.max_steps=1", "output_dir=out"])));

    let at = made.windows(8).position(|bytes| bytes == b"\"makers\"").unwrap();
    let mut silent = made.clone();
    silent[at + 1] = b'M';
    place.write(name, &silent);
    assert!(!train().contains("quantizing"));
    std::fs::remove_dir_all(place.path("out")).unwrap();

    let (header_bytes, header) = SafeTensors::read_metadata(&made).unwrap();
    let mut damaged = made.clone();
    damaged[8 + header_bytes + header.info("unit.00001").unwrap().data_offsets.0] ^= 1;
    place.write(name, &damaged);
    let text = train();
    let cause = "the checksum of unit.00001 is wrong (made by rank 1 on ";
    assert!(text.contains(cause) && text.contains("; it is made again"), "{text}");
    assert!(apart_from_makers(&place.read(name)).0 == apart_from_makers(&made).0);
}

#[test]
fn evaluation_and_generation_on_two_ranks() {
    let place = Place::new();
    succeeds(place.mpirun(2, &TRAIN));
    let eval = ["eval", "--model", "model", "--adapter", "out", "--dataset", "rows.jsonl", "--json"];
    let generate = ["generate", "--model", "model", "--adapter", "out", "--prompt", "ab", "--max-new-tokens", "12"];
    let stdout = |mut command: std::process::Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let loss = |text: String| serde_json::from_str::<Value>(&text).unwrap()["loss"].as_f64().unwrap();
    let (one, two) = (loss(stdout(place.command(&eval))), loss(stdout(place.mpirun(2, &eval))));
    assert!((one - two).abs() <= 1e-6 * one, "{one} and {two}");
    assert_eq!(stdout(place.command(&generate)), stdout(place.mpirun(2, &generate)));
}

#[test]
fn a_base_in_16_bits_is_copied_and_not_quantized() {
    let place = Place::new();
    let eval = ["eval", "--model", "model", "--dataset", "rows.jsonl", "--set", "quantization.load_in_4bit=false"];
    let (plain, nf4) = (succeeds(place.command(&eval)), succeeds(place.command(&eval[..5])));
    assert!(plain.contains("copying ") && !plain.contains("quantiz"), "{plain}");
    assert!(nf4.contains("quantizing ") && !nf4.contains("copying"), "{nf4}");
}

/// A line of the file that `eval --per-token` writes.
#[derive(Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenLoss {
    row: usize,
    position: usize,
    token: u64,
    loss: f32,
}

/// Evaluates with `--per-token FILE` and returns the lines of the file. Their mean is the loss that is printed.
fn token_losses(place: &Place, ranks: usize, file: &str, options: &[&str]) -> Vec<TokenLoss> {
    let eval =
        ["eval", "--model", "model", "--adapter", "out", "--dataset", "rows.jsonl", "--json", "--per-token", file];
    let output = place.mpirun(ranks, &[&eval[..], options].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let score: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = String::from_utf8(place.read(file)).unwrap();
    let lines: Vec<TokenLoss> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(score["num_target_tokens"], lines.len());
    let mean = lines.iter().map(|line| f64::from(line.loss)).sum::<f64>() / lines.len() as f64;
    let loss = score["loss"].as_f64().unwrap();
    assert!((mean - loss).abs() <= 1e-7 * loss, "{mean} for {loss}");
    lines
}

#[test]
fn losses_of_tokens_do_not_depend_on_ranks_and_packing() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    let targets = |longest: usize| -> Vec<(usize, usize, u64)> {
        let rows = metrics(&place.read("rows.jsonl")).into_iter().enumerate();
        let of_row = |(row, values): (usize, Value)| {
            let list = |name: &str| values[name].as_array().unwrap().clone();
            let tokens = list("input_ids").into_iter().zip(list("labels")).zip(list("attention_mask")).enumerate();
            let counts = |position: usize, label: &Value, mask: &Value| {
                !position.is_multiple_of(longest) && *label != -100 && *mask == 1
            };
            let targets = tokens.filter(|(position, ((_, label), mask))| counts(*position, label, mask));
            targets.map(|(position, ((id, _), _))| (row, position, id.as_u64().unwrap())).collect::<Vec<_>>()
        };
        rows.flat_map(of_row).collect()
    };
    let places = |lines: &[TokenLoss]| lines.iter().map(|l| (l.row, l.position, l.token)).collect::<Vec<_>>();
    let one = token_losses(&place, 1, "one.jsonl", &[]);
    assert_eq!(places(&one), targets(usize::MAX));
    for ranks in [2, 3] {
        // A micro-batch is the same on every rank, and so are its bits.
        assert_eq!(token_losses(&place, ranks, "ranks.jsonl", &["--overwrite"]), one, "{ranks} ranks");
    }
    let apart = token_losses(&place, 2, "apart.jsonl", &["--set", "data.packing=false"]);
    assert_eq!(places(&apart), places(&one));
    for (a, b) in apart.iter().zip(&one) {
        // Longer micro-batches are other matrix products, which may round otherwise.
        assert!((a.loss - b.loss).abs() <= 1e-5 * b.loss.max(1.0), "{a:?} for {b:?}");
    }
    let split = ["--max-length", "10", "--set", "data.overlong=split"];
    assert_eq!(places(&token_losses(&place, 2, "split.jsonl", &split)), targets(10));
}

#[test]
fn a_file_of_losses_replaces_nothing_unasked() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    std::os::unix::fs::symlink("rows.jsonl", place.path("link")).unwrap();
    place.write("losses.jsonl", "mine");
    let eval = |file: &str, more: &[&str]| {
        let eval = ["eval", "--model", "model", "--dataset", "rows.jsonl", "--per-token", file];
        place.mpirun(2, &[&eval[..], more].concat())
    };
    for (file, more, status, words) in [
        (
            "losses.jsonl",
            &[][..],
            1,
            "rank 0: error: --per-token: losses.jsonl: is there already\nhelp: name another file",
        ),
        ("rows.jsonl", &["--overwrite"], 1, "--per-token: rows.jsonl: is a file of --dataset; name another file"),
        ("folder", &["--overwrite"], 1, "--per-token: folder: is there and is not a regular file"),
        ("link", &["--overwrite"], 1, "--per-token: link: is there and is not a regular file"),
        ("losses.jsonl/more", &[], 1, "--per-token: losses.jsonl: cannot be created"),
        ("$HOME/losses.jsonl", &[], 2, "write the path out"),
        ("new.jsonl", &["--set", "data.loss_on=completion"], 1, "data.loss_on"),
    ] {
        let text = fails(eval(file, more), status);
        assert!(text.contains(words), "{words} in {text}");
    }
    assert_eq!(place.read("losses.jsonl"), b"mine");
    assert!(!place.path("new.jsonl").exists(), "a run that fails leaves no file");
    let mut alone = place.command(&["eval", "--model", "model", "--dataset", "rows.jsonl"]);
    alone.arg("--overwrite");
    assert!(fails(alone, 2).contains("--per-token <FILE>"));
    succeeds(eval("losses.jsonl", &["--overwrite"]));
    assert!(place.read("losses.jsonl").starts_with(b"{\"row\":0,\"position\":"));
    let left =
        std::fs::read_dir(place.path("")).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with(".fsdp-qlora-tmp-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Ranks of a machine that hold the same shard map one file where their folders are one, and have a file each where they are not.
#[test]
fn ranks_of_a_machine_may_have_folders_of_their_own_for_shards() {
    let place = Place::new();
    let caches: [&[&str]; 4] = [
        &["FSDP_QLORA_CACHE=cache0"],
        &["-u", "FSDP_QLORA_CACHE", "XDG_CACHE_HOME=xdg"],
        &["-u", "FSDP_QLORA_CACHE", "-u", "XDG_CACHE_HOME", "HOME=home"],
        &["FSDP_QLORA_CACHE=xdg/../cache0"],
    ];
    let run = |strategy: &str, output: &str| {
        let sets = [format!("fsdp.sharding_strategy={strategy}"), format!("output_dir={output}")];
        let ranks = caches.map(|cache| {
            let program = program().display().to_string();
            let train = train_with(&[&sets[0], &sets[1]]);
            let environment = [&["env"], cache, &["FSDP_QLORA_RANKS_PER_NODE=2", &program]].concat();
            environment.into_iter().chain(train).map(String::from).collect()
        });
        let text = succeeds(place.mpirun_each(&ranks));
        (text, place.read(&format!("{output}/adapter_model.safetensors")))
    };
    // Rank 0 finds both halves of hybrid_shard in its folder when the whole is wanted.
    let expected: [(&str, &str, &str, &[&str]); 2] = [
        ("hybrid_shard", "quantizing ", "-of-00002.safetensors", &["cache0", "cache0", "home", "xdg"]),
        ("no_shard", "are there: cutting ", "-of-00001.safetensors", &["cache0", "home", "xdg"]),
    ];
    for (strategy, making, end, expected) in expected {
        let (makes, finds) = (run(strategy, &format!("{strategy}-1")), run(strategy, &format!("{strategy}-2")));
        assert!(makes.0.contains(making), "{strategy}: {}", makes.0);
        assert!(!finds.0.contains(" unit "), "{strategy}: the second run finds the files of the first: {}", finds.0);
        assert!(makes.1 == finds.1, "{strategy}: two adapters");
        let root =
            |path: String| Path::new(&path).strip_prefix(place.path("")).unwrap().iter().next().unwrap().to_owned();
        let files = place.results().into_iter().filter(|path| path.ends_with(end));
        let mut found: Vec<_> = files.map(root).collect();
        found.sort();
        assert_eq!(found, expected, "{strategy}");
    }
}
