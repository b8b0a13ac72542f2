//! Checks that rows are tokenized once, by the files in the cache folder: after runs of one and of several ranks, after
//! damage, and after the process that tokenizes was killed.

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::cli::{Place, TRAIN, metrics, succeeds, train_with};
use common::running::{Running, signal};

/// Names in the folder of tokens, sorted.
fn cached(place: &Place) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(place.path("cache/tokens")).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The file of tokens, which must be alone in its folder.
fn only_file(place: &Place) -> PathBuf {
    let cached = cached(place);
    assert!(cached.len() == 1 && cached[0].extension().is_some_and(|e| e == "tokens"), "{cached:?}");
    cached[0].clone()
}

fn train(place: &Place, ranks: usize, args: &[&str]) -> (String, Vec<String>) {
    let _ = std::fs::remove_dir_all(place.path("out"));
    let told = succeeds(place.mpirun(ranks, args));
    let losses = metrics(&place.read("out/metrics.jsonl")).iter().map(|step| step["loss"].to_string()).collect();
    (told, losses)
}

fn data(place: &Place, args: &[&str]) -> (String, String) {
    let output = place.command(&[&["data", "-c", "recipe.yaml"], args].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn ranks_and_later_runs_share_one_file() {
    let place = Place::new();
    let (_, losses) = train(&place, 2, &TRAIN);
    let file = only_file(&place);
    let made = file.metadata().unwrap();
    // How documents are cut and packed is decided later, and so is what is held out.
    for sets in [&[][..], &["data.max_length=32"], &["data.packing=wrapped"], &["data.eval=0.3"]] {
        train(&place, 2, &train_with(sets));
        let now = only_file(&place).metadata().unwrap();
        assert_eq!((now.ino(), now.len()), (made.ino(), made.len()), "{sets:?}");
    }
    let bytes = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(train(&place, 1, &TRAIN).1.len(), losses.len());
    assert!(std::fs::read(only_file(&place)).unwrap() == bytes, "one rank writes what two write");

    // Other rows in the same file are other tokens.
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    let last = rows.trim_end().lines().last().unwrap();
    place.write("rows.jsonl", format!("{rows}{last}\n"));
    train(&place, 2, &TRAIN);
    assert_eq!(cached(&place).len(), 2);
}

#[test]
fn a_damaged_file_is_made_again_and_said() {
    let place = Place::new();
    let (_, losses) = train(&place, 2, &TRAIN);
    let path = only_file(&place);
    let whole = std::fs::read(&path).unwrap();
    for at in [0, 100, whole.len() / 2, whole.len() - 1] {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[whole[at] ^ 4], at as u64).unwrap();
        drop(file);
        let (told, again) = train(&place, 2, &TRAIN);
        assert!(told.contains(".tokens: damaged: ") && told.contains("it is made again"), "byte {at}: {told}");
        assert!(std::fs::read(only_file(&place)).unwrap() == whole && again == losses, "byte {at}");
    }
    let (told, _) = train(&place, 2, &TRAIN);
    assert!(!told.contains("damaged"), "{told}");
}

#[test]
fn whoever_waits_for_a_writer_that_is_killed_takes_its_place() {
    let place = Place::new();
    place.write("rows.jsonl", "{\"input_ids\": [5, 6, 7, 8, 9, 10, 11, 12]}\n".repeat(200_000));
    let args = ["data", "-c", "recipe.yaml"];
    let mut writer = place.command(&args).stdout(std::process::Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    let is_being_written = || {
        let names = cached(&place).into_iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(".fsdp-qlora-tmp-") || name.ends_with(".lock")).count() == 2
    };
    while !is_being_written() {
        assert!(begun.elapsed() < Duration::from_secs(60) && writer.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(2));
    }
    // A process that is stopped keeps its lock.
    signal(writer.id(), "STOP");
    let mut waiting = Running::start(&place, place.command(&args));
    assert!(waiting.says("data.train: another process is tokenizing the same rows"), "{}", waiting.text());
    assert!(is_being_written());
    writer.kill().unwrap();
    writer.wait().unwrap();
    let (status, told) = waiting.ends();
    assert_eq!(status, Some(0), "{told}");
    only_file(&place);
    let shown: serde_json::Value = serde_json::from_str(&data(&place, &["--json"]).0).unwrap();
    assert_eq!(shown["train"]["rows"], 200_000);
}

#[test]
fn without_a_cache_folder_rows_are_tokenized_for_the_run_alone() {
    let place = Place::new();
    let (expected, _) = data(&place, &["--json"]);
    let mut command = place.command(&["data", "-c", "recipe.yaml", "--json"]);
    let output = command.env("FSDP_QLORA_CACHE", place.path("rows.jsonl/none")).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("data.train: tokens are not kept: ") && told.contains("rows.jsonl/none/tokens"), "{told}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn the_tokens_in_the_cache_are_listed_and_pruned() {
    let place = Place::new();
    data(&place, &[]);
    let file = only_file(&place);
    let cache = |args: &[&str]| {
        let output = place.command(&[&["cache"], args].concat()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let listed: serde_json::Value = serde_json::from_str(&cache(&["list", "--json"])).unwrap();
    let [entry] = &listed.as_array().unwrap()[..] else { panic!("{listed}") };
    assert_eq!((&entry["kind"], &entry["complete"], &entry["in_use"]), (&"tokens".into(), &true.into(), &false.into()));
    assert!(entry["num_tokens"].as_u64().unwrap() > 100 && entry["made_from"].to_string().contains("rows.jsonl"));
    let text = cache(&["list"]);
    assert!(text.contains(" tokens  complete  ") && text.contains("1 files of tokens"), "{text}");
    assert!(cache(&["prune"]).contains("0 B freed") && file.exists());
    // A file that somebody has open stays.
    let open = std::fs::File::open(&file).unwrap();
    open.lock_shared().unwrap();
    let text = cache(&["prune", "--older-than", "0s"]);
    assert!(text.contains("left: a run uses it") && text.contains("0 B freed") && file.exists(), "{text}");
    drop(open);
    assert!(cache(&["prune", "--older-than", "0s", "--dry-run"]).contains("would be removed: ") && file.exists());
    assert!(cache(&["prune", "--older-than", "0s"]).contains("removed: ") && !file.exists());
    std::fs::write(&file, "no tokens").unwrap();
    assert!(cache(&["list"]).contains("damaged"));
    // A process that was killed leaves its lock.
    place.write("cache/tokens/0123.lock", "");
    assert!(cache(&["prune"]).contains("removed: ") && cached(&place).is_empty());
}
