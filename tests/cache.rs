//! The cache of shard files as a user meets it: another number of ranks cuts its shards from those that are there, and
//! `cache` lists and prunes them.

mod common;

use std::time::{Duration, SystemTime};

use common::cli::{Place, TRAIN, fails, metrics, succeeds};
use serde_json::Value;

/// Trains on some ranks and returns what was told.
fn train(place: &Place, ranks: usize) -> String {
    let _ = std::fs::remove_dir_all(place.path("out"));
    succeeds(place.mpirun(ranks, &TRAIN))
}

fn loss(place: &Place) -> Value {
    metrics(&place.read("out/metrics.jsonl"))[0]["loss"].clone()
}

/// Returns the text that a subcommand of `cache` prints on standard output.
fn cache(place: &Place, args: &[&str]) -> String {
    let output = place.command(&[&["cache"], args].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The sets of shard files in the list.
fn listed(place: &Place) -> Vec<Value> {
    let all: Vec<Value> = serde_json::from_str(&cache(place, &["list", "--json"])).unwrap();
    all.into_iter().filter(|entry| entry["kind"] == "shards").collect()
}

#[test]
fn another_number_of_ranks_does_not_go_back_to_the_model() {
    let (place, fresh) = (Place::new(), Place::new());
    assert!(train(&place, 2).contains("quantizing "));
    assert!(train(&fresh, 3).contains("quantizing "));
    for ranks in [3, 1] {
        let text = train(&place, ranks);
        assert!(text.contains(" ranks are there: cutting "), "{text}");
        assert!(!text.contains("quantizing"), "{text}");
        let text = train(&place, ranks);
        assert!(!text.contains("cutting") && text.contains("were there, and are checked and mapped in"), "{text}");
    }
    train(&place, 3);
    assert_eq!(loss(&place), loss(&fresh));
}

#[test]
fn the_cache_is_listed_and_pruned() {
    let place = Place::new();
    assert!(listed(&place).is_empty());
    train(&place, 2);
    train(&place, 1);
    let sets = listed(&place);
    let told: Vec<_> = sets.iter().map(|set| (set["world_size"].as_u64(), set["complete"].as_bool())).collect();
    assert_eq!(told, [(Some(1), Some(true)), (Some(2), Some(true))], "the one used last comes first");
    for set in &sets {
        assert!(set["model"].as_str().unwrap().ends_with("/model") && set["base"].as_str().unwrap().len() == 32);
        assert!(set["bytes"].as_u64().unwrap() > 0 && set["in_use"] == false && set["encoding"] == "nf4+dq");
    }
    let text = cache(&place, &["list"]);
    assert!(text.contains("1 ranks  1 files  complete") && text.contains("2 sets of shard files"), "{text}");

    // No set is useless or old yet.
    for args in [&["prune"][..], &["prune", "--older-than", "1d"]] {
        assert!(cache(&place, args).contains("0 B freed"));
    }
    let of_two = std::path::PathBuf::from(sets[1]["path"].as_str().unwrap()).join("nf4-00001-of-00002.safetensors");
    let first = of_two.with_file_name("nf4-00000-of-00002.safetensors");
    for path in [&of_two, &first] {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(40 * 24 * 3600)).unwrap();
    }
    let text = cache(&place, &["prune", "--older-than", "30d", "--dry-run"]);
    assert!(text.contains("would be removed: ") && text.contains("2 ranks  2 files"), "{text}");
    std::fs::remove_file(&first).unwrap();
    let text = cache(&place, &["prune"]);
    assert!(text.contains("removed: ") && text.contains("2 ranks  1 files  incomplete"), "{text}");
    assert!(!of_two.exists() && listed(&place).len() == 1);
    assert!(!train(&place, 1).contains("quantizing"), "the other set is whole");

    assert!(fails(place.command(&["cache", "prune", "--older-than", "30"]), 2).contains("e.g. 30d"));
    assert!(fails(place.command(&["cache", "list", "--set", "training.max_steps=1"]), 2).contains("loads no model"));
}

#[test]
fn a_cache_folder_that_cannot_be_made_is_named() {
    let place = Place::new();
    place.write("file", "");
    for ranks in [1, 2] {
        let mut command = place.mpirun(ranks, &TRAIN);
        command.env("FSDP_QLORA_CACHE", place.path("file/cache"));
        let text = fails(command, 1);
        assert!(text.contains("file/cache") && text.contains("Not a directory"), "{text}");
        assert!(text.contains("the shards cannot be written; another folder") && !text.contains("no room"), "{text}");
    }
}
