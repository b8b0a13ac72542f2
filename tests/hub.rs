//! Models, adapters and data sets by their names on a hub, which is one on the loopback that the tests start.

mod common;

#[path = "hub/network.rs"]
mod network;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use common::cli::{Place, fails, metrics, succeeds, train_with};
use common::golden;
use common::hub::{Answer, Hub, Repository, git_hash, sha256};
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MOVED: &str = "76543210fedcba9876543210fedcba9876543210";
const WEIGHTS: &str = "model.safetensors";

type Files = BTreeMap<String, Vec<u8>>;

/// The tiny model with its tokenizer, and files that no command needs.
fn tiny() -> Files {
    let read = |name: &str| std::fs::read(golden(name)).unwrap();
    Files::from([
        (".gitattributes".into(), b"*.bin filter=lfs".into()),
        ("README.md".into(), b"# Tiny".into()),
        ("config.json".into(), read("tiny/config.json")),
        (WEIGHTS.into(), read("tiny/model.safetensors")),
        ("original/consolidated.00.pth".into(), vec![1; 9000]),
        ("pytorch_model.bin".into(), vec![2; 9000]),
        ("tokenizer.json".into(), read("tokenizer/tokenizer.json")),
        ("tokenizer_config.json".into(), read("tokenizer/tokenizer_config.json")),
    ])
}

fn model() -> Repository {
    Repository::new(COMMIT, tiny())
}

/// Rows in two splits, the first in two files.
fn rows() -> Repository {
    let text = std::fs::read_to_string(golden("qlora_steps/rows.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let file = |name: &str, lines: &[&str]| (name.to_string(), (lines.join("\n") + "\n").into_bytes());
    let half = lines.len() / 2;
    Repository::new(
        COMMIT,
        [
            file("data/train-00000-of-00002.jsonl", &lines[..half]),
            file("data/train-00001-of-00002.jsonl", &lines[half..]),
            file("data/test-00000-of-00001.jsonl", &lines[..2]),
            file("README.md", &["# Rows"]),
        ],
    )
}

fn hub() -> Hub {
    Hub::start(&[("models/org/tiny", model()), ("datasets/org/rows", rows())])
}

/// One step on the model of the hub, with these further overrides.
fn one_step<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    train_with(&[&["model=org/tiny", "training.max_steps=1"], sets].concat())
}

fn run_record(place: &Place) -> Value {
    serde_json::from_slice(&place.read("out/run.json")).unwrap()
}

fn remove_result(place: &Place) {
    std::fs::remove_dir_all(place.path("out")).unwrap();
}

/// Path of a file in the folder of the model in the cache.
fn cached(path: &str) -> String {
    format!("hf/hub/models--org--tiny/{path}")
}

#[test]
fn a_model_is_downloaded_once_into_the_cache_that_python_reads() {
    let (hub, place) = (hub(), Place::new());
    let text = succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert!(text.contains(&format!("hub: org/tiny@{COMMIT}")) && text.contains("downloading "), "{text}");
    assert_eq!(hub.count("GET", "/storage/"), 2, "weights and tokenizer.json are large");
    for (name, bytes) in tiny() {
        let is_needed = ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"].contains(&&*name);
        assert_eq!(hub.count("HEAD", &format!("/resolve/{COMMIT}/{name}")), usize::from(is_needed), "{name}");
        if is_needed {
            let etag = if bytes.len() < 4096 { git_hash(&bytes) } else { sha256(&bytes) };
            let link = std::fs::read_link(place.path(&cached(&format!("snapshots/{COMMIT}/{name}")))).unwrap();
            assert_eq!(link.to_str().unwrap(), format!("../../blobs/{etag}"));
            assert_eq!(place.read(&cached(&format!("blobs/{etag}"))), bytes);
        }
    }
    assert_eq!(place.read(&cached("refs/main")), COMMIT.as_bytes());
    let blobs = std::fs::read_dir(place.path(&cached("blobs"))).unwrap().count();
    assert_eq!(blobs, 4, "no incomplete file stays");
    assert_eq!(run_record(&place)["recipe"]["model"], format!("org/tiny@{COMMIT}"));
    let adapter: Value = serde_json::from_slice(&place.read("out/adapter_config.json")).unwrap();
    assert_eq!((&adapter["base_model_name_or_path"], &adapter["revision"]), (&json!("org/tiny"), &json!(COMMIT)));

    // Files in the cache need no hub, whether they are named by branch or by commit; the losses equal those of a folder with the files.
    let loss = metrics(&place.read("out/metrics.jsonl"))[0]["loss"].clone();
    hub.forget();
    for model in ["org/tiny", &format!("org/tiny@{COMMIT}"), "hf://org/tiny", "model"] {
        remove_result(&place);
        succeeds(hub.client(&place, place.command(&one_step(&[&format!("model={model}")]))));
        assert_eq!(metrics(&place.read("out/metrics.jsonl"))[0]["loss"], loss);
    }
    assert!(hub.log().is_empty(), "{:?}", hub.log());
}

#[test]
fn weights_in_several_files_are_those_that_the_index_names() {
    let mut files = tiny();
    let weights = files.remove(WEIGHTS).unwrap();
    let len = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&weights[8..8 + len]).unwrap();
    let names = header.keys().filter(|key| *key != "__metadata__");
    let map: Value = names.map(|key| (key.clone(), json!("model-1.safetensors"))).collect();
    files.insert("model-1.safetensors".into(), weights);
    files.insert("model-2.safetensors".into(), vec![0; 5000]);
    files.insert("model.safetensors.index.json".into(), json!({"weight_map": map}).to_string().into_bytes());
    let place = Place::new();
    // The first time, the file of weights is refused: the index is in the cache then, and no snapshot has it.
    let hub = Hub::with_fault(&[("models/org/tiny", Repository::new(COMMIT, files))], |request, nth, answer| {
        let is_refused = request.asks_for("GET", "model-1.safetensors") && nth == 0;
        if is_refused { Answer::new(403, &[], "") } else { answer }
    });
    let text = fails(hub.client(&place, place.command(&one_step(&[]))), 1);
    let told = format!("org/tiny@{COMMIT}: the hub refuses to send model-1.safetensors (");
    assert!(text.contains(&told) && text.contains("answered 403"), "{text}");
    let index = place.path(&cached(&format!("snapshots/{COMMIT}/model.safetensors.index.json")));
    assert!(!index.exists());
    succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert!(index.exists());
    assert_eq!((hub.count("HEAD", "model-2"), hub.count("GET", "index.json")), (0, 1));
}

#[test]
fn without_the_hub_the_cache_serves_or_the_command_is_named_that_fills_it() {
    let (hub, place) = (hub(), Place::new());
    let offline = |variable: &str| hub.client_with(&place, place.command(&one_step(&[])), &[(variable, "1")]);
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let text = fails(offline(variable), 1);
        let help = format!(
            "{variable} forbids asking the hub\nhelp: run `hf download org/tiny --revision main` where there is a network"
        );
        assert!(text.contains(&help), "{text}");
    }
    assert!(hub.log().is_empty());
    succeeds(hub.client(&place, place.command(&one_step(&[]))));
    hub.forget();
    remove_result(&place);
    succeeds(offline("HF_HUB_OFFLINE"));

    // A cache of older versions of Python's library has no list of names; its files are used if they are enough.
    std::fs::remove_dir_all(place.path(&cached(".fsdp-qlora"))).unwrap();
    remove_result(&place);
    let text = succeeds(offline("HF_HUB_OFFLINE"));
    assert!(text.contains("the cache has the files that are needed; the hub may have more"), "{text}");
    std::fs::remove_file(place.path(&cached(&format!("snapshots/{COMMIT}/{WEIGHTS}")))).unwrap();
    let text = fails(offline("HF_HUB_OFFLINE"), 1);
    assert!(text.contains(&format!("help: run `hf download org/tiny --revision {COMMIT}`")), "{text}");
    assert!(hub.log().is_empty(), "{:?}", hub.log());

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let place = Place::new();
    let text = fails(hub.client_with(&place, place.command(&one_step(&[])), &[("HF_ENDPOINT", &closed)]), 1);
    assert!(
        text.contains("the hub cannot be reached: ")
            && text.contains("help: run `hf download org/tiny --revision main`"),
        "{text}"
    );

    // No folder is made whose name is a variable or another user's home.
    for home in ["$SCRATCH/hf", "~other/hf"] {
        let text = fails(hub.client_with(&place, place.command(&one_step(&[])), &[("HF_HOME", home)]), 1);
        assert!(text.contains("HF_HOME: ") && text.contains("write the path out"), "{text}");
    }
}

#[test]
fn one_rank_of_a_machine_downloads_and_the_others_wait_however_long_it_takes() {
    let hub = Hub::with_fault(&[("models/org/tiny", model())], |request, _, answer| {
        if request.is_storage {
            std::thread::sleep(Duration::from_secs(8));
        }
        answer
    });
    let place = Place::new();
    // A wait in which no rank makes progress ends after five seconds.
    let limits = [("FSDP_QLORA_TIMEOUT_S", "5"), ("FSDP_QLORA_START_TIMEOUT_S", "120")];
    succeeds(hub.client_with(&place, place.mpirun(3, &one_step(&[])), &limits));
    assert_eq!((hub.count("GET", "/storage/"), hub.count("GET", "/api/")), (2, 1));

    let hub = Hub::with_fault(&[("models/org/tiny", model())], |request, _, answer| {
        if request.is_storage { Answer::new(403, &[], "") } else { answer }
    });
    let place = Place::new();
    let text = fails(hub.client(&place, place.mpirun(3, &one_step(&[]))), 1);
    assert_eq!(text.matches("error: ").count(), 1, "{text}");
    assert!(text.contains("rank 0: error: org/tiny@") && text.contains("answered 403"), "{text}");
    assert_eq!(place.results(), Vec::<String>::new());

    // Ranks that name other repositories are told so.
    let rank = |model: &str| {
        let args = one_step(&[model]);
        std::iter::once(common::cli::program().display().to_string())
            .chain(args.iter().map(|a| a.to_string()))
            .collect()
    };
    let ranks: Vec<Vec<String>> = vec![rank("model=org/tiny"), rank("model=org/other"), rank("model=model")];
    let text = fails(hub.client(&place, place.mpirun_each(&ranks)), 2);
    let line = "repositories of the hub: org/tiny on rank 0; org/other on rank 1; not set on rank 2";
    assert!(text.contains(line), "{text}");
}

#[test]
fn two_programs_at_a_time_download_a_file_once() {
    let hub = Hub::with_fault(&[("models/org/tiny", model())], |request, _, answer| {
        if request.is_storage {
            std::thread::sleep(Duration::from_secs(2));
        }
        answer
    });
    let place = Place::new();
    let quantize = |output| ["quantize", "--model", "org/tiny", "--output", output, "--world-size", "1"];
    let programs = ["a", "b"].map(|output| {
        let mut command = hub.client(&place, place.command(&quantize(output)));
        command.stderr(std::process::Stdio::piped()).spawn().unwrap()
    });
    let texts = programs.map(|program| {
        let output = program.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}");
        text
    });
    assert_eq!(hub.count("GET", "/storage/"), 2);
    assert!(texts.concat().contains("another process downloads this file"), "{texts:?}");
}

#[test]
fn rows_by_the_name_of_their_data_set() {
    let (hub, place) = (hub(), Place::new());
    let local = {
        succeeds(hub.client(&place, place.command(&train_with(&["training.max_steps=1"]))));
        metrics(&place.read("out/metrics.jsonl"))[0]["loss"].clone()
    };
    remove_result(&place);
    let eval = "data.eval={path: org/rows, split: test}";
    let text = succeeds(hub.client(&place, place.command(&one_step(&["data.train=org/rows", eval]))));
    assert_eq!(
        metrics(&place.read("out/metrics.jsonl")).iter().find_map(|line| line.get("loss")),
        Some(&local),
        "{text}"
    );
    let recipe = &run_record(&place)["recipe"];
    let pinned = format!("org/rows@{COMMIT}");
    assert_eq!(recipe["data.train"], json!([pinned]));
    assert_eq!(recipe["data.eval"], json!([{"path": pinned, "split": "test"}]));
    assert_eq!(hub.count("HEAD", "/datasets/org/rows/resolve/"), 4);
    let snapshot = format!("hf/hub/datasets--org--rows/snapshots/{COMMIT}/data/train-00000-of-00002.jsonl");
    assert!(std::fs::read_link(place.path(&snapshot)).unwrap().starts_with("../../../blobs"));

    let text = fails(hub.client(&place, place.command(&one_step(&["data.train=org/rows", "data.eval=org/rows"]))), 1);
    assert!(text.contains("found the splits train, test; say which one is meant\nhelp: name a file: hf://"), "{text}");
    let text = fails(hub.client(&place, place.command(&one_step(&["data.train=org/none"]))), 1);
    assert!(text.contains("org/none: no file or folder has this name, and the hub has no such data set"), "{text}");
    let text = fails(hub.client(&place, place.command(&one_step(&["data.train=data/none.jsonl"]))), 1);
    assert!(
        text.contains("data.train: data/none.jsonl: No such file"),
        "a name that ends as a file is none of the hub: {text}"
    );
    hub.change("datasets/org/rows", |repository| {
        repository.revisions.insert("refs/convert/parquet".into(), MOVED.into());
        repository
            .commits
            .insert(MOVED.into(), Files::from([("x/train/0.jsonl".into(), b"{\"text\": \"a b\"}\n".into())]));
    });
    let set = "data.train=org/rows@refs/convert/parquet";
    let text = fails(hub.client(&place, place.command(&one_step(&[set, "training.resume=never"]))), 1);
    assert!(text.contains("has the result of another run (data.train is [\"org/rows@7654"), "{text}");
}

#[test]
fn every_command_takes_names_and_fetches_what_it_needs() {
    let lora = Files::from(
        ["adapter_config.json", "adapter_model.safetensors"]
            .map(|name| (name.to_string(), std::fs::read(golden("qlora_steps/start").join(name)).unwrap())),
    );
    let lora = Repository::new(COMMIT, lora);
    let hub = Hub::start(&[("models/org/tiny", model()), ("datasets/org/rows", rows()), ("models/org/lora", lora)]);
    let place = Place::new();
    place.write("recipe.yaml", "model: org/tiny\ndata: {train: org/rows}\n");
    let output = |args: &[&str]| {
        let output = hub.client(&place, place.command(args)).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(output(&["data", "-c", "recipe.yaml"]).contains("training data"));
    assert_eq!((hub.count("HEAD", "tokenizer.json"), hub.count("HEAD", WEIGHTS)), (1, 0), "data reads no weights");
    let file = "hf://datasets/org/rows/data/test-00000-of-00001.jsonl";
    let eval = ["eval", "--model", "org/tiny", "--adapter", "org/lora", "--dataset", file, "--json", "--device", "cpu"];
    let score: Value = serde_json::from_str(&output(&eval)).unwrap();
    let files = hub.count("HEAD", "/org/lora/resolve/");
    assert!(score["loss"].as_f64().unwrap() > 0.0 && files == 2, "{score}");
    assert!(
        !output(&["generate", "--model", "org/tiny", "--prompt", "a", "--max-new-tokens", "2", "--raw"]).is_empty()
    );
    output(&["quantize", "--model", "org/tiny", "--output", "shards", "--world-size", "2"]);

    let place = Place::new();
    place.config("head_dim", json!(64));
    let config =
        Files::from([("config.json".into(), place.read("model/config.json")), (WEIGHTS.into(), vec![0; 5000])]);
    let hub = Hub::start(&[("models/org/tiny", Repository::new(COMMIT, config))]);
    place.write("recipe.yaml", "model: org/tiny\ndata: {train: org/rows}\n");
    let plan = ["plan", "-c", "recipe.yaml", "--sweep"];
    let text = succeeds(hub.client(&place, place.command(&plan)));
    assert_eq!((hub.count("HEAD", "config.json"), hub.count("HEAD", "")), (1, 1), "a plan needs the config alone");
    assert_eq!(text.matches("org/tiny@").count(), 1, "{text}");
}

/// The line of the README that trains by names, here with a tiny model and a few rows under these names.
#[test]
fn the_line_of_the_readme_trains_from_nothing_but_the_hub() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let begin = readme.find("mpirun -np 2 target/release/fsdp-qlora train --set model=").expect("the line");
    let line = readme[begin..].split("```").next().unwrap().replace("\\\n", " ");
    let mut words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[..5], ["mpirun", "-np", "2", "target/release/fsdp-qlora", "train"]);
    let args = words.split_off(4);
    let named = |key: &str| args.iter().find_map(|word| word.strip_prefix(key)).unwrap();
    let (model_id, rows_id) = (format!("models/{}", named("model=")), format!("datasets/{}", named("data.train=")));
    let row = |i: usize| {
        let message = |role: &str, text: String| json!({"role": role, "content": text});
        json!({"messages": [message("user", format!("question {i}")), message("assistant", format!("answer {i}"))]})
            .to_string()
    };
    let file = |rows: std::ops::Range<usize>| rows.map(row).collect::<Vec<_>>().join("\n").into_bytes();
    let data = [("data/train-00000-of-00001.jsonl", file(0..60)), ("data/test-00000-of-00001.jsonl", file(60..70))];
    let data = data.map(|(name, rows)| (name.to_string(), rows));
    let hub = Hub::start(&[(&*model_id, model()), (&*rows_id, Repository::new(COMMIT, data))]);
    let place = Place::new();
    ["recipe.yaml", "rows.jsonl"].iter().for_each(|name| std::fs::remove_file(place.path(name)).unwrap());
    succeeds(hub.client(&place, place.mpirun(2, &args)));
    assert!(place.path("out/adapter_model.safetensors").exists());
    let lines = metrics(&place.read("out/metrics.jsonl"));
    let [first, last] = [lines.first(), lines.last()].map(|line| line.unwrap()["loss"].as_f64().unwrap());
    assert!(last < first, "{first} {last}");
}

#[test]
fn a_folder_of_the_name_is_used_and_that_is_said() {
    let (hub, place) = (hub(), Place::new());
    std::fs::create_dir(place.path("org")).unwrap();
    symlink("../model", place.path("org/tiny")).unwrap();
    let text = succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert!(
        text.contains("model: the folder org/tiny is here, so the hub is not asked") && hub.log().is_empty(),
        "{text}"
    );
    assert_eq!(run_record(&place)["recipe"]["model"], "org/tiny");
}

#[test]
fn a_branch_that_has_moved_is_another_base_only_if_its_files_are_others() {
    let (hub, place) = (hub(), Place::new());
    let again = || hub.client(&place, place.command(&train_with(&["model=org/tiny", "training.save_steps=1"])));
    succeeds(again());
    // The run becomes one that was killed after its second step.
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::remove_file(place.path("out").join(name)).unwrap();
    }
    drop(std::fs::remove_dir_all(place.path("out/checkpoint-3")));
    let mut record = run_record(&place);
    record["state"] = json!("running");
    record["files"] = json!([]);
    place.write("out/run.json", record.to_string());

    let mut weights = tiny();
    *weights.get_mut(WEIGHTS).unwrap().last_mut().unwrap() ^= 1;
    hub.change("models/org/tiny", |repository| repository.commit("main", MOVED, weights));
    std::fs::remove_dir_all(place.path("hf")).unwrap();
    let text = fails(again(), 1);
    let told = format!("model is \"org/tiny@{MOVED}\" here and \"org/tiny@{COMMIT}\" there, base model is ");
    assert!(text.contains("has another run") && text.contains(&told), "{text}");

    let mut readme = tiny();
    readme.insert("README.md".into(), b"# New".into());
    let third = COMMIT.replace('0', "f");
    hub.change("models/org/tiny", |repository| repository.commit("main", &third, readme));
    std::fs::remove_dir_all(place.path("hf")).unwrap();
    let text = succeeds(again());
    assert!(text.contains(&format!("org/tiny@{third}")) && text.contains("going on after step 2"), "{text}");
}
