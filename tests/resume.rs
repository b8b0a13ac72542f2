//! Checkpoints: a run that is killed, or stopped by a signal, goes on as if nothing had happened.
#![expect(clippy::print_stdout, reason = "scripts/kills keeps what a campaign says")]

mod common;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::cli::{Place, TRAIN, fails, metrics, succeeds, train_with};
use common::relative_error;
use common::running::{Running, signal};
use fsdp_qlora::testing::{ModelSpec, adapter};
use serde_json::Value;

/// Steps of a run that is to be interrupted, more than two epochs of the 24 rows.
const NUM_STEPS: usize = 60;
const ADAPTER: &str = "out/adapter_model.safetensors";
/// The part of a line of metrics.jsonl that must not depend on interruptions.
const DECIDED: &str =
    "step epoch loss grad_norm learning_rate learning_rate_b num_target_tokens eval_loss adapter_step best_eval_loss";

/// A place with a recipe that has dropout, modules of several ranks and LoRA+, evaluates and saves every third step. An epoch's last step
/// has 3 rows, fewer than some of the numbers of ranks.
fn place() -> Place {
    let place = Place::new();
    place.write(
        "recipe.yaml",
        format!(
            "model: model\noutput_dir: out\n\
             data: {{train: rows.jsonl, eval: rows.jsonl, max_length: 128, packing: false}}\n\
             lora: {{r: 4, lora_dropout: 0.1, rank_pattern: {{q_proj: 8, 'layers\\.1\\.mlp.*': 3}}, exclude_modules: [k_proj]}}\n\
             training: {{global_batch_size: 7, max_steps: {NUM_STEPS}, learning_rate: 1.0e-2, loraplus_lr_ratio: 0.5,\n\
             \x20 eval_steps: 10, save_steps: 3}}\n"
        ),
    );
    place
}

/// A place whose result is the best checkpoint on rows that are not trained on, one of the first.
fn place_for_the_best() -> Place {
    let place = place();
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    let rows: Vec<String> = rows.lines().map(|row| format!("{row}\n")).collect();
    place.write("rows.jsonl", rows[..12].concat());
    place.write("others.jsonl", rows[12..].concat());
    let recipe = String::from_utf8(place.read("recipe.yaml")).unwrap();
    let recipe = recipe.replace("eval: rows.jsonl", "eval: others.jsonl").replace("eval_steps: 10", "eval_steps: 3");
    place.write("recipe.yaml", recipe.replace("save_steps: 3", "save_steps: 3, load_best_model_at_end: true"));
    place
}

/// The decided values of each line, in order.
fn decided(lines: &[u8]) -> Vec<Vec<Value>> {
    metrics(lines).iter().map(|line| DECIDED.split(' ').map(|key| line[key].clone()).collect()).collect()
}

/// The newest step of which the output folder has a complete checkpoint; 0 if it has none.
fn newest(place: &Place) -> usize {
    let entries = std::fs::read_dir(place.path("out")).into_iter().flatten().flatten();
    let complete = entries.map(|entry| entry.path()).filter(|path| path.join("state.json").exists());
    let step = |path: PathBuf| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok();
    complete.filter_map(step).max().unwrap_or(0)
}

fn record(place: &Place) -> Value {
    serde_json::from_slice(&place.read("out/run.json")).unwrap()
}

fn is_finished(place: &Place) -> bool {
    place.path("out/run.json").exists() && record(place)["state"] == "finished"
}

/// SplitMix64.
fn random(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) % below as u64) as usize
}

/// The part of a run that a kill met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    Starting,
    Training,
    Saving,
    Ending,
}

/// Kills ranks of a run at a random instant, most of them while it trains, some while a checkpoint is written, and some while the result
/// is. Returns where the kill met the run; `None` if the run was faster.
fn kill(place: &Place, mut running: Running<'_>, state: &mut u64) -> Option<Met> {
    let (from, whole_job) = (newest(place), random(state, 2) == 0);
    let (writing, result) = (place.path("out/.fsdp-qlora-checkpoint-new"), place.path("out/.fsdp-qlora-new"));
    let last_step = format!("step {NUM_STEPS}/");
    match random(state, 10) {
        // At start-up too, where nothing has been read yet.
        0..2 => std::thread::sleep(Duration::from_millis(random(state, 600) as u64)),
        2..4 if from + 3 < NUM_STEPS => drop(running.until(|_| writing.exists())),
        4 => drop(running.says(&last_step) && running.until(|_| result.exists())),
        _ => {
            let step = from + 1 + random(state, NUM_STEPS - from);
            running.says(&format!("step {step}/"));
            std::thread::sleep(Duration::from_micros(random(state, 20_000) as u64));
        }
    }
    let before = newest(place);
    let ranks = place.ranks();
    let was_running = running.child.try_wait().unwrap().is_none();
    let met = match running.text() {
        _ if writing.exists() => Met::Saving,
        text if text.contains(&last_step) => Met::Ending,
        text if text.contains("tok/s") => Met::Training,
        _ => Met::Starting,
    };
    // A process that has ended meanwhile is none of the test's business.
    let kill = |pid: u32| {
        signal(pid, "KILL");
    };
    match ranks.get(random(state, ranks.len().max(1))) {
        Some(&rank) if !whole_job => kill(rank),
        _ => ranks.iter().copied().chain([running.child.id()]).for_each(kill),
    }
    let (status, text) = running.ends();
    assert!(newest(place) >= before, "a checkpoint was lost:\n{text}");
    (was_running && status != Some(0)).then_some(met)
}

/// Runs until the end, with a kill at each of `num_kills` random instants, each time on a number of ranks of which
/// `ranks` draws one. Returns where kills met the run, and how often it went on after a checkpoint.
fn survive(place: &Place, num_kills: usize, state: &mut u64, ranks: impl Fn(&mut u64) -> usize) -> (Vec<Met>, usize) {
    let (mut met, mut resumed) = (Vec::new(), 0);
    for i in 0..=num_kills {
        if is_finished(place) {
            break;
        }
        let from = newest(place);
        let mut running = Running::start(place, place.mpirun(ranks(state), &TRAIN));
        if from > 0 {
            running.says("going on after step");
            // A checkpoint or a result that was complete and lacked its name when the kill came is found as well.
            let text = running.text();
            let after = text.split("going on after step ").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
            let goes_on = after.is_some_and(|after: usize| after >= from);
            assert!(goes_on || text.contains("already finished"), "not after {from}:\n{text}");
            resumed += usize::from(goes_on);
        }
        if i < num_kills {
            met.extend(kill(place, running, state));
        } else {
            let (status, text) = running.ends();
            assert!(status == Some(0) && is_finished(place), "{status:?}: {text}");
        }
    }
    (met, resumed)
}

/// All values of the adapter of a place.
fn values(place: &Place) -> Vec<f32> {
    let spec = ModelSpec::load(&place.path("model")).unwrap();
    adapter::load(&place.path("out"), &spec).unwrap().layers.concat()
}

/// Survives this many kills in all, in runs of `ranks`, and compares each run's end with an uninterrupted one's. The result of every
/// second run is its best checkpoint.
fn campaign(num_kills: usize, seed: u64, ranks: impl Fn(&mut u64) -> usize, check: impl Fn(&Place, &Place)) {
    let (places, mut state, mut met, mut resumed) = ([place, place_for_the_best], seed, Vec::new(), Vec::new());
    let whole = places.map(|place| place());
    whole.iter().for_each(|whole| drop(succeeds(whole.mpirun(2, &TRAIN))));
    let best = record(&whole[1])["adapter_step"].as_u64().unwrap() as usize;
    assert!((3..NUM_STEPS / 2).contains(&best), "the best of all checkpoints, {best}, must outlive many kills");
    while met.len() < num_kills {
        let (place, whole) = (places[resumed.len() % 2](), &whole[resumed.len() % 2]);
        let most = 8.min(num_kills.div_ceil(2)).min(num_kills - met.len());
        let (of_run, resumed_run) = survive(&place, most, &mut state, &ranks);
        check(&place, whole);
        assert_eq!(record(&place)["adapter_step"], record(whole)["adapter_step"]);
        met.extend(of_run);
        resumed.push(resumed_run);
        assert!(resumed.len() < 3 * num_kills + 3, "hardly any kill meets a run");
    }
    let [starting, training, saving, ending] = [Met::Starting, Met::Training, Met::Saving, Met::Ending]
        .map(|what| met.iter().filter(|at| **at == what).count());
    println!(
        "{} kills in {} runs: {starting} at the start, {training} while training, {saving} while a checkpoint was written, {ending} after \
         the last step; the runs went on after a checkpoint {} times, one of them {} times; each ended as the uninterrupted run did, every \
         second one with its best checkpoint",
        met.len(),
        resumed.len(),
        resumed.iter().sum::<usize>(),
        resumed.iter().max().unwrap()
    );
}

/// Number of kills, in both tests together: twenty are enough for every day, `scripts/kills` asks for two hundred.
fn num_kills() -> usize {
    std::env::var("FSDP_QLORA_KILLS").ok().map_or(20, |text| text.parse().unwrap())
}

#[test]
fn a_killed_run_ends_as_if_it_had_never_been_killed() {
    campaign(
        num_kills() / 2,
        1,
        |_| 2,
        |place, whole| {
            assert!(place.read(ADAPTER) == whole.read(ADAPTER), "the adapters differ");
            assert_eq!(decided(&place.read("out/metrics.jsonl")), decided(&whole.read("out/metrics.jsonl")));
        },
    );
}

#[test]
fn a_killed_run_ends_on_other_ranks() {
    campaign(
        num_kills() / 2,
        2,
        |state| 1 + random(state, 4),
        |place, whole| {
            let error = relative_error(&values(place), &values(whole));
            assert!(error <= 2e-5, "the adapters differ by {error:e}");
            let steps = |place: &Place| -> Vec<(Value, bool)> {
                let lines = metrics(&place.read("out/metrics.jsonl"));
                lines.iter().map(|line| (line["step"].clone(), line["loss"].is_null())).collect()
            };
            assert_eq!(steps(place), steps(whole), "a line is missing or there twice");
        },
    );
}

/// Starts a run whose rank 1 pauses before each action, so many milliseconds and from a step on.
fn dragging<'a>(place: &'a Place, pause: &str, step: &str, more: &[&str]) -> Running<'a> {
    let mut command = place.mpirun(2, &[&TRAIN[..], more].concat());
    command.env("FSDP_QLORA_FAULT", format!("drag={pause}:1:{step}"));
    Running::start(place, command)
}

/// Checks that the run ends with status 75, and returns what it said.
fn is_abandoned(running: Running<'_>) -> String {
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    assert!(text.contains("it is abandoned"), "{text}");
    text
}

#[test]
fn a_long_step_and_a_long_evaluation_are_abandoned_and_begun_again() {
    let whole = place();
    succeeds(whole.mpirun(2, &TRAIN));
    // The evaluation after step 20 is abandoned, and so are step 32, and the first step of a run that goes on.
    let place = place();
    for (pause, step, words, newest_step, what) in [
        ("200", "20", "step 20/", 20, "the evaluation under way"),
        ("2000", "32", "step 31/", 31, "the step under way"),
        ("2000", "32", "going on after step 31,", 31, "the step under way"),
    ] {
        let mut running = dragging(&place, pause, step, &["--set", "training.grace=1s"]);
        assert!(running.says(words));
        std::thread::sleep(Duration::from_millis(1_500));
        assert!(signal(place.ranks()[0], "USR1"));
        let text = is_abandoned(running);
        assert!(text.contains(what), "{text}");
        assert_eq!(newest(&place), newest_step, "{text}");
        assert!(record(&place)["reason"].as_str().unwrap().contains("SIGUSR1 to rank"), "{text}");
    }
    let text = succeeds(place.mpirun(2, &TRAIN));
    assert!(text.contains("going on after step 31,"), "{text}");
    assert!(place.read(ADAPTER) == whole.read(ADAPTER), "the adapters differ");
    assert_eq!(decided(&place.read("out/metrics.jsonl")), decided(&whole.read("out/metrics.jsonl")));
}

#[test]
fn a_run_that_is_stopped_before_its_first_step_is_whole_begins_again() {
    let place = place();
    let mut running = dragging(&place, "2000", "1", &["--set", "training.grace=0"]);
    assert!(running.says("step 0  eval_loss"));
    assert!(signal(place.ranks()[1], "TERM"));
    let text = is_abandoned(running);
    assert!(text.contains("no step was whole") && newest(&place) == 0, "{text}");
    assert_eq!(record(&place)["state"], "stopped");
    let text = succeeds(place.mpirun(2, &TRAIN));
    assert!(text.contains("begins with the first step") && is_finished(&place), "{text}");
}

#[test]
fn a_signal_before_the_first_step_ends_all_ranks() {
    let place = place();
    let mut command = place.mpirun(2, &TRAIN);
    // Rank 1 never comes to the first step.
    command.env("FSDP_QLORA_FAULT", "hang:1:decide");
    let mut running = Running::start(&place, command);
    assert!(running.says("device: "), "{}", running.text());
    assert!(signal(place.ranks()[0], "TERM"));
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    assert!(text.contains("stopped by SIGTERM to rank 0 before the first step"), "{text}");
    assert_eq!(record(&place)["reason"], "SIGTERM to rank 0 before the first step");
    assert_eq!(record(&place)["state"], "stopped");
    succeeds(place.mpirun(2, &TRAIN));
    assert!(is_finished(&place));
}

#[test]
fn a_deadline_stops_a_run_before_it_has_passed() {
    for (set, seconds, reason) in [
        ("training.max_time=8s", 0, "training.max_time"),
        ("training.max_time=3h50m", 8, "the end of the SLURM job's time"),
    ] {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let place = place();
        let mut command = place.mpirun(2, &[&TRAIN[..], &["--set", set]].concat());
        command.env("SLURM_JOB_END_TIME", (now + seconds).to_string()).env("FSDP_QLORA_FAULT", "drag=2000:0:7");
        let (status, text) = Running::start(&place, command).ends();
        assert_eq!(status, Some(75), "{text}");
        assert!(newest(&place) <= 6, "{text}");
        assert!(record(&place)["reason"].as_str().unwrap().starts_with(reason), "{text}");
        assert!(text.contains("the run stops with a checkpoint within the next"), "{text}");
    }
}

#[test]
fn a_word_in_the_control_file_saves_or_stops() {
    let place = place();
    std::fs::create_dir(place.path("out")).unwrap();
    place.write("out/control", "stop");
    let sets = ["training.save_steps=null", "training.max_steps=100000", "training.resume=never"];
    let mut running = Running::start(&place, place.mpirun(2, &train_with(&sets)));
    assert!(running.says("out/control was there before the run began, and is removed"));
    assert!(running.says("step 3/"));
    for (word, answer) in
        [("nonsense", "allowed in it: checkpoint, stop"), ("checkpoint", "checkpoint: "), ("stop\n", "stopped by")]
    {
        place.write("out/control", word);
        assert!(running.says(answer), "{}", running.text());
        assert!(!place.path("out/control").exists(), "{word}");
    }
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    assert_eq!(text.matches("checkpoint: ").count(), 2, "{text}");
    assert!(record(&place)["reason"].as_str().unwrap().starts_with("\"stop\" in output_dir/control"), "{text}");
    assert!(text.contains("help: `train --set training.resume=auto` goes on"), "the same command would not: {text}");
}

#[test]
fn a_signal_to_any_rank_stops_all_with_a_checkpoint() {
    let whole = place();
    succeeds(whole.mpirun(3, &TRAIN));
    for (ranks, name) in [(3, "USR1"), (3, "TERM"), (1, "INT")] {
        let place = place();
        let command = if ranks == 1 { place.command(&TRAIN) } else { place.mpirun(ranks, &TRAIN) };
        let mut running = Running::start(&place, command);
        assert!(running.says("step 5/"));
        let pid = if ranks == 1 { running.child.id() } else { place.ranks()[1] };
        assert!(signal(pid, name));
        let (status, text) = running.ends();
        assert_eq!(status, Some(75), "{name}: {text}");
        let run = record(&place);
        let step = newest(&place);
        assert!((5..NUM_STEPS).contains(&step), "{text}");
        assert_eq!(run["state"], "stopped", "{run}");
        assert!(run["reason"].as_str().unwrap().contains(&format!("SIG{name}")), "{run}");
        assert!(text.contains(&format!("after step {step}")), "{text}");
        let text = succeeds(place.mpirun(3, &[&TRAIN[..], &["--trace", "trace.json"]].concat()));
        assert!(text.contains(&format!("going on after step {step},")), "{text}");
        assert!(text.contains(&format!("trace of step {}: trace.json", (step + 2).min(NUM_STEPS))), "{text}");
        if ranks == 3 {
            assert!(place.read(ADAPTER) == whole.read(ADAPTER), "{name}: the adapters differ");
            assert_eq!(decided(&place.read("out/metrics.jsonl")), decided(&whole.read("out/metrics.jsonl")));
        }
    }
}

/// Stops a run of `ranks` after some steps.
fn stopped(ranks: usize, sets: &[&str]) -> Place {
    let place = place();
    let mut running = Running::start(&place, place.mpirun(ranks, &train_with(sets)));
    assert!(running.says("step 7/"), "{}", running.text());
    assert!(signal(place.ranks()[0], "USR1"));
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    place
}

#[test]
fn another_number_of_ranks_keeps_the_global_batch() {
    let steps = ["training.global_batch_size=null", "training.gradient_accumulation_steps=3"];
    let place = stopped(2, &steps);
    let text = succeeds(place.mpirun(4, &train_with(&steps)));
    assert!(text.contains("each step keeps the 6 sequences that the run began with"), "{text}");
    assert!(text.contains("number of ranks is 4 here and 2 there"), "{text}");
    let lines = metrics(&place.read("out/metrics.jsonl"));
    let last = lines.iter().rfind(|line| line["loss"].is_f64()).unwrap();
    assert_eq!(last["epoch"], (NUM_STEPS * 6) as f64 / 24.0);
}

#[test]
fn ranks_that_cannot_share_a_step_do_not_go_on() {
    let batch = ["training.global_batch_size=null", "training.gradient_accumulation_steps=1"];
    let (place, again) = (stopped(2, &batch), train_with(&batch));
    let text = fails(place.mpirun(3, &again), 2);
    assert!(text.contains("3 ranks cannot share a global batch of 2 sequences"), "{text}");
    succeeds(place.mpirun(3, &[&again[..], &["--overwrite"]].concat()));
}

#[test]
fn a_run_that_differs_does_not_go_on() {
    let place = stopped(2, &[]);
    let step = newest(&place);
    let text = fails(place.mpirun(2, &train_with(&["training.learning_rate=2e-2", "lora.lora_dropout=0"])), 1);
    for words in
        ["was stopped", "training.learning_rate is 0.02 here and 0.01 there", "lora.lora_dropout", "--overwrite"]
    {
        assert!(text.contains(words), "{words} in {text}");
    }
    let rows = place.read("rows.jsonl");
    place.write("rows.jsonl", &rows[..rows.len() / 2]);
    let text = fails(place.mpirun(2, &TRAIN), 1);
    assert!(text.contains("rows.jsonl") || text.contains("training data is"), "{text}");
    place.write("rows.jsonl", rows);
    assert_eq!(newest(&place), step, "a refusal leaves what is there");
    // Keys of logging, movement and saving do not make it another run.
    let harmless = ["training.logging_steps=7", "training.save_steps=20", "fsdp.activation_checkpointing=full"];
    let text = succeeds(place.mpirun(2, &train_with(&harmless)));
    assert!(text.contains(&format!("going on after step {step},")), "{text}");
}

#[test]
fn a_recipe_says_where_to_begin() {
    let place = stopped(2, &["training.save_total_limit=null"]);
    let newest = newest(&place);
    let text =
        succeeds(place.mpirun(2, &train_with(&["training.resume=out/checkpoint-3", "training.save_steps=null"])));
    assert!(text.contains("going on after step 3,") && newest > 3, "{text}");
    let whole = place.read(ADAPTER);
    // A checkpoint is an adapter that evaluation takes, and one that another folder can go on from.
    let args = ["eval", "--model", "model", "--adapter", "out/checkpoint-3", "--dataset", "rows.jsonl", "--json"];
    succeeds(place.command(&args));
    let elsewhere = ["training.resume=out/checkpoint-6", "output_dir=elsewhere"];
    let text = succeeds(place.mpirun(2, &train_with(&elsewhere)));
    assert!(text.contains("going on after step 6,"), "{text}");
    assert!(place.read("elsewhere/adapter_model.safetensors") == whole);
    let text = succeeds(place.mpirun(2, &train_with(&["training.resume=never", "output_dir=third"])));
    assert!(text.contains("step 1/") && place.read("third/adapter_model.safetensors") == whole, "{text}");
    let text = fails(place.mpirun(2, &train_with(&["training.resume=model", "output_dir=fourth"])), 1);
    assert!(text.contains("training.resume") && text.contains("no complete checkpoint"), "{text}");
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let place = stopped(2, &["training.save_total_limit=null"]);
    let newest = newest(&place);
    let file = format!("out/checkpoint-{newest}/optimizer.safetensors");
    let mut bytes = place.read(&file);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    place.write(&file, bytes);
    let text = succeeds(place.mpirun(2, &TRAIN));
    assert!(text.contains("is passed over") && text.contains(&file), "{text}");
    let before = (newest - 1) / 3 * 3;
    assert!(text.contains(&format!("going on after step {before},")), "{text}");
}

#[test]
fn checkpoints_are_counted_and_removed() {
    let place = place();
    succeeds(place.mpirun(2, &TRAIN));
    let mut names: Vec<String> = std::fs::read_dir(place.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("checkpoint"))
        .collect();
    names.sort();
    assert_eq!(names, ["checkpoint-54", "checkpoint-57"]);
    // A run that replaces another has its checkpoints beside the old result, and goes on from them too.
    let other = train_with(&["training.seed=7", "training.save_total_limit=1"]);
    let args = [&other[..], &["--overwrite"]].concat();
    let mut running = Running::start(&place, place.mpirun(2, &args));
    assert!(running.says("step 10/"));
    let old = place.read(ADAPTER);
    place.ranks().iter().for_each(|rank| assert!(signal(*rank, "KILL")));
    running.ends();
    assert!(place.read(ADAPTER) == old, "the old result is whole until the new one is");
    let text = succeeds(place.mpirun(2, &args));
    assert!(text.contains("going on after step"), "{text}");
    assert!(place.read(ADAPTER) != old && !place.path("out/checkpoint-57").exists());
    succeeds(place.mpirun(2, &[&other[..], &["--set", "output_dir=new"]].concat()));
    assert!(place.read(ADAPTER) == place.read("new/adapter_model.safetensors"));
}

#[test]
fn a_checkpoint_that_cannot_be_written_does_not_end_the_run() {
    let place = place();
    std::fs::create_dir(place.path("out")).unwrap();
    place.write("out/checkpoint-6", "a file of somebody");
    let text = succeeds(place.mpirun(2, &TRAIN));
    assert!(text.contains("training goes on without it") && text.contains("checkpoint-6"), "{text}");
    assert_eq!(place.read("out/checkpoint-6"), b"a file of somebody");
    assert!(place.path("out/checkpoint-57/state.json").exists());
}
