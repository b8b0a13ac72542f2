//! Faults that come from outside, under real mpirun: a rank that is killed or stopped, in whatever part of a run; a mapped file that is
//! cut short; a wall clock that is set back; a library that takes a signal. All ranks end and say why, on standard error and in run.json,
//! the files are whole or known not to be, and a restart goes on.

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use common::cli::{Place, TRAIN, fails, metrics, program, succeeds, train_with};
use common::running::{Running, signal};
use serde_json::Value;

/// Everything must be gone after this.
const END: Duration = Duration::from_secs(20);
const ADAPTER: &str = "out/adapter_model.safetensors";
const MANY_STEPS: &str = "training.max_steps=100000";

/// A place with a recipe that has dropout and saves after every second of six steps.
fn place() -> Place {
    let place = Place::new();
    place.write(
        "recipe.yaml",
        "model: model\noutput_dir: out\ndata: {train: rows.jsonl, max_length: 128, packing: false}\n\
         lora: {r: 4, lora_dropout: 0.1}\n\
         training: {global_batch_size: 6, max_steps: 6, learning_rate: 1.0e-2, save_steps: 2}\n",
    );
    place
}

/// Returns the text of a run on three ranks that has a fault, which ends all of them.
fn ended_by(place: &Place, fault: &str) -> String {
    let mut command = place.mpirun(3, &TRAIN);
    command.env("FSDP_QLORA_FAULT", fault).env("FSDP_QLORA_TIMEOUT_S", "3");
    if !fault.ends_with("start") {
        command.env("FSDP_QLORA_START_TIMEOUT_S", "60");
    }
    let start = Instant::now();
    let output = command.output().expect("mpirun (scripts/setup installs it)");
    // MPICH's launcher names a signal on standard output.
    let text = String::from_utf8_lossy(&[output.stderr, output.stdout].concat()).into_owned();
    assert!(!output.status.success(), "{fault}: {text}");
    assert!(start.elapsed() < END, "{fault}: {:?}\n{text}", start.elapsed());
    place.has_no_ranks(fault);
    text
}

/// The record of a run.
fn record(place: &Place) -> Value {
    serde_json::from_slice(&place.read("out/run.json")).unwrap()
}

/// Checks that run.json says that the run failed, and why.
fn has_failed(place: &Place, why: &str) {
    let record = record(place);
    assert_eq!(record["state"], "failed", "{record}");
    assert!(record["reason"].as_str().unwrap().contains(why), "{why} in {record}");
}

/// Puts a fault into each phase in turn, on each rank in turn, and starts the run again.
fn in_every_phase(kind: &str, is_told: impl Fn(&str) -> bool) {
    let whole = place();
    succeeds(whole.mpirun(3, &TRAIN));
    let phases = ["start", "agree", "quantize", "load", "device", "4", "checkpoint", "resume", "save", "end"];
    for (i, phase) in phases.into_iter().enumerate() {
        let place = place();
        if phase == "resume" {
            ended_by(&place, "error:0:4");
        }
        let fault = format!("{kind}:{}:{phase}", i % 3);
        let text = ended_by(&place, &fault);
        assert!(is_told(&text), "{fault}: {text}");
        let text = succeeds(place.mpirun(3, &TRAIN));
        let expected = match phase {
            "resume" | "4" => "going on after step 2,",
            "save" => "going on after step 4,",
            "end" => "already finished",
            _ => "",
        };
        assert!(text.contains(expected), "{fault}: {text}");
        assert!(place.read(ADAPTER) == whole.read(ADAPTER), "{fault}: another adapter");
    }
}

#[test]
fn a_rank_that_is_killed_in_any_phase_is_named_and_a_restart_goes_on() {
    // The launcher may end the other ranks before one of them says it. Open MPI 4 does not name the signal if the others
    // had not come to MPI_Init yet.
    let told = ["was killed or has crashed", "signal 9", "1 process returned\na non-zero exit code"];
    in_every_phase("kill", |text| told.iter().any(|told| text.contains(told)));
}

#[test]
fn a_rank_that_is_stopped_in_any_phase_is_named_and_a_restart_goes_on() {
    in_every_phase("stop", |text| {
        text.contains("was stopped by a signal")
            || text.contains("MPI_Init did not end within 3 s: a rank was not started")
    });
}

#[test]
fn a_rank_that_is_stopped_while_it_writes_a_checkpoint_is_named() {
    let place = place();
    let args = train_with(&["training.save_steps=1", MANY_STEPS]);
    let mut command = place.mpirun(2, &args);
    command.env("FSDP_QLORA_TIMEOUT_S", "3");
    let mut run = Running::start(&place, command);
    assert!(run.until(|place| place.path("out/checkpoint-1").exists()));
    let writing = |place: &Place| place.path("out/.fsdp-qlora-checkpoint-new").exists();
    assert!(run.until(writing) && signal(place.ranks()[0], "STOP"));
    let (status, text) = run.ends();
    assert!(status == Some(1) && text.contains("was stopped by a signal"), "{status:?}: {text}");
    let mut run = Running::start(&place, place.mpirun(2, &args));
    assert!(run.says("tok/s") && run.text().contains("going on after step"), "{}", run.text());
    place.ranks().iter().for_each(|rank| assert!(signal(*rank, "USR1")));
    assert_eq!(run.ends().0, Some(75));
}

#[test]
fn the_record_of_a_run_says_why_a_rank_has_ended_it() {
    for (fault, why) in [
        ("error:1:4", "rank 1: an error was asked for"),
        ("panic:1:4", "a panic was asked for"),
        ("hang:1:4", "did not end within 3 s: rank 1 has not come to it"),
    ] {
        let place = place();
        ended_by(&place, fault);
        has_failed(&place, why);
    }
}

#[test]
fn a_run_that_could_not_say_why_it_ended_is_not_taken_for_one_at_work() {
    let place = place();
    let mut run = Running::start(&place, place.mpirun(2, &train_with(&[MANY_STEPS])));
    assert!(run.says("step 3/"), "{}", run.text());
    place.ranks().into_iter().chain([run.child.id()]).for_each(|pid| assert!(signal(pid, "KILL")));
    run.ends();
    assert_eq!(record(&place)["state"], "running", "nobody was left to write it");
    let text = fails(place.mpirun(2, &train_with(&[MANY_STEPS, "training.learning_rate=1e-3"])), 1);
    assert!(text.contains("out has another run, which was killed or has crashed; it was started at"), "{text}");
}

/// The shard file of a rank.
fn shard(place: &Place, rank: usize) -> PathBuf {
    let name = format!("nf4-{rank:05}-of-");
    place.results().iter().find(|path| path.contains(&name)).expect("a shard file").into()
}

/// Cuts a file short.
fn cut(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn a_shard_that_is_cut_short_while_it_is_mapped_is_named_and_made_again() {
    for (ranks, len) in [(1, 0), (2, 0), (2, 5000)] {
        let place = place();
        let mut run = Running::start(&place, place.mpirun(ranks, &train_with(&[MANY_STEPS])));
        assert!(run.says("step 3/"), "{}", run.text());
        let shard = shard(&place, ranks - 1);
        let before = std::fs::metadata(&shard).unwrap().len();
        cut(&shard, len);
        let start = Instant::now();
        let (status, text) = run.ends();
        assert!(status == Some(1) && start.elapsed() < END, "{status:?} after {:?}: {text}", start.elapsed());
        let told: Vec<&str> = text.lines().filter(|line| line.contains("cannot be read")).collect();
        let why = format!("it was cut short to {len} bytes while this run had it mapped");
        assert!(told.len() == 1 && told[0].contains(shard.to_str().unwrap()) && told[0].contains(&why), "{text}");
        place.has_no_ranks("a shard cut short");
        has_failed(&place, &why);
        succeeds(place.mpirun(ranks, &[&TRAIN[..], &["--overwrite"]].concat()));
        assert_eq!(std::fs::metadata(&shard).unwrap().len(), before, "it was made again");
    }
}

#[test]
fn a_base_that_is_cut_short_while_it_is_mapped_is_named_and_the_run_goes_on_when_it_is_back() {
    let (place, whole) = (place(), place());
    let args = train_with(&["training.max_steps=200"]);
    let mut run = Running::start(&place, place.mpirun(2, &args));
    assert!(run.says("step 5/"), "{}", run.text());
    let model = place.read("model/model.safetensors");
    cut(&place.path("model/model.safetensors"), 5000);
    let (status, text) = run.ends();
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("model.safetensors: byte ") && text.contains("cut short to 5000 bytes"), "{text}");
    has_failed(&place, "cut short to 5000 bytes");
    place.write("model/model.safetensors", model);
    let text = succeeds(place.mpirun(2, &args));
    assert!(text.contains("going on after step"), "{text}");
    succeeds(whole.mpirun(2, &args));
    assert!(place.read(ADAPTER) == whole.read(ADAPTER));
}

/// Starts a run, cuts the shard of rank 1 or the base by one byte, of which the kernel says nothing, and returns how the run ended, what
/// it said, and the words that name the file.
fn cut_by_a_byte(place: &Place, args: &[&str], is_shard: bool) -> (Option<i32>, String, String) {
    let mut run = Running::start(place, place.mpirun(2, args));
    assert!(run.says("step 5/"), "{}", run.text());
    let path = if is_shard { shard(place, 1) } else { place.path("model/model.safetensors") };
    let len = std::fs::metadata(&path).unwrap().len();
    cut(&path, len - 1);
    let (status, text) = run.ends();
    let name = path.file_name().unwrap().to_str().unwrap();
    (status, text, format!("{name}: {} bytes, but {len} when this run mapped it", len - 1))
}

#[test]
fn a_file_that_is_cut_short_within_its_last_page_is_named_before_the_next_checkpoint() {
    let (whole, args) = (place(), train_with(&["training.max_steps=200"]));
    succeeds(whole.mpirun(2, &args));
    for is_shard in [true, false] {
        let place = place();
        let model = place.read("model/model.safetensors");
        let (status, text, words) = cut_by_a_byte(&place, &args, is_shard);
        assert!(status == Some(1) && text.contains(&words), "{words} in {text}");
        has_failed(&place, &words);
        place.write("model/model.safetensors", model);
        let text = succeeds(place.mpirun(2, &args));
        assert!(text.contains("going on after step"), "{text}");
        assert!(place.read(ADAPTER) == whole.read(ADAPTER));
    }
}

#[test]
fn a_file_that_is_cut_short_within_its_last_page_puts_the_result_in_doubt() {
    for is_shard in [true, false] {
        let place = place();
        let args = train_with(&["training.max_steps=100", "training.save_steps=null"]);
        let (status, text, words) = cut_by_a_byte(&place, &args, is_shard);
        assert!(status == Some(1) && text.contains(&words), "{words} in {text}");
        assert!(text.contains("the adapter was saved in output_dir, but cannot be trusted"), "{text}");
        has_failed(&place, if is_shard { "rank 1 reads, or its shard, has changed" } else { &words });
    }
}

#[test]
fn a_signal_that_comes_from_somebody_ends_the_run_as_it_did() {
    let place = place();
    let mut run = Running::start(&place, place.mpirun(2, &train_with(&[MANY_STEPS])));
    assert!(run.says("step 3/"), "{}", run.text());
    assert!(signal(place.ranks()[1], "BUS"));
    let (status, text) = run.ends();
    assert!(status != Some(0) && !text.contains("cannot be read"), "{status:?}: {text}");
}

/// Trains on two ranks that have loaded a library, `tests/faults/NAME.c`.
fn with_library(place: &Place, name: &str) -> Command {
    let library = place.path(name);
    let source = format!("{}/tests/faults/{name}.c", env!("CARGO_MANIFEST_DIR"));
    // Rust links with cc, so that it is there.
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).args(["-ldl", "-lpthread"]);
    assert!(cc.status().unwrap().success());
    let words = ["env".into(), format!("LD_PRELOAD={}", library.display()), program().display().to_string()];
    let rank: Vec<String> = words.into_iter().chain(TRAIN.map(String::from)).collect();
    place.mpirun_each(&[rank.clone(), rank])
}

#[test]
fn a_signal_that_a_library_has_taken_ends_all_ranks_before_the_first_step() {
    let place = place();
    let mut command = with_library(&place, "handler");
    // Rank 1 never comes to the first step.
    command.env("FSDP_QLORA_FAULT", "hang:1:decide").env("FSDP_QLORA_TIMEOUT_S", "20");
    let mut run = Running::start(&place, command);
    assert!(run.says("SIGTERM is taken") && run.says("device: "), "{}", run.text());
    std::thread::sleep(Duration::from_millis(500));
    assert!(signal(place.ranks()[0], "TERM"));
    let (status, text) = run.ends();
    assert!(status == Some(75) && text.contains("stopped by SIGTERM to rank"), "{status:?}: {text}");
}

#[test]
fn a_clock_that_is_set_back_changes_nothing() {
    let (place, whole) = (place(), place());
    let mut command = with_library(&place, "clock");
    command.env("FSDP_QLORA_FAULT", "error:1:5");
    fails(command, 1);
    let text = succeeds(with_library(&place, "clock"));
    assert!(text.contains("going on after step") && text.contains("left"), "{text}");
    succeeds(whole.mpirun(2, &TRAIN));
    assert!(place.read(ADAPTER) == whole.read(ADAPTER));
    for line in metrics(&place.read("out/metrics.jsonl")) {
        let value = |key: &str| line[key].as_f64().unwrap();
        assert!(value("step_ms") > 0.0 && value("step_ms") < 60e3 && value("tokens_per_second") > 0.0, "{line}");
        assert!(value("compute_ms") >= 0.0 && value("gather_wait_ms") >= 0.0, "{line}");
    }
    // Shards that were used in the future are not old.
    let future = SystemTime::now() + Duration::from_hours(24 * 365);
    File::options().write(true).open(shard(&place, 0)).unwrap().set_modified(future).unwrap();
    succeeds(place.command(&["cache", "prune", "--older-than", "1h"]));
    assert!(shard(&place, 0).exists());
}
