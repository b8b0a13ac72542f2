//! Results are not lost: what a run leaves in output_dir, whatever happens on the way.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::cli::{MPI_WITHOUT_FILES, Place, TRAIN, fails, metrics, succeeds, train_with};
use common::running::{Running, signal};
use serde_json::Value;

const ADAPTER: &str = "out/adapter_model.safetensors";
/// Enough steps to interfere while they are made.
const MANY_STEPS: &str = "training.max_steps=60";

/// [`TRAIN`] with these overrides and `--overwrite`.
fn overwrite<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    let mut args = train_with(sets);
    args.push("--overwrite");
    args
}

/// Names and contents of all files below a folder, hidden ones apart.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let visible = entries.filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'));
    let mut files: Vec<_> = visible.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    files.sort();
    files
}

/// Names of the hidden files of output_dir.
fn hidden(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.path("out")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).filter(|name| name.starts_with('.')).collect()
}

fn record(place: &Place) -> Value {
    serde_json::from_slice(&place.read("out/run.json")).unwrap()
}

/// Loss of an adapter, which must be whole for that.
fn eval(place: &Place, adapter: &str) -> f64 {
    let args = ["eval", "--model", "model", "--adapter", adapter, "--dataset", "rows.jsonl", "--json"];
    let output = place.command(&args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["loss"].as_f64().unwrap()
}

/// Stops a single process in the middle of training, does something, and lets it go on. Returns its status and what it
/// said.
fn interrupted_by(mut run: Running<'_>, mischief: impl Fn(&Place)) -> (Option<i32>, String) {
    assert!(run.until(|place| num_steps(place, "out/metrics.jsonl") >= 2), "{}", run.text());
    assert!(signal(run.child.id(), "STOP"));
    assert!(num_steps(run.place, "out/metrics.jsonl") < 60, "the run ended too early to be interrupted");
    mischief(run.place);
    assert!(signal(run.child.id(), "CONT"));
    run.ends()
}

fn num_steps(place: &Place, file: &str) -> usize {
    std::fs::read_to_string(place.path(file)).unwrap_or_default().lines().count()
}

#[test]
fn the_same_run_is_finished_and_another_is_refused() {
    let place = Place::new();
    succeeds(place.mpirun(2, &TRAIN));
    let run = record(&place);
    assert_eq!((&run["state"], &run["world_size"]), (&"finished".into(), &2.into()), "{run}");
    assert!(run["program"].as_str().unwrap().starts_with("fsdp-qlora ") && run["ended"].is_string(), "{run}");
    let (before, text) = (files(&place.path("out")), succeeds(place.mpirun(2, &TRAIN)));
    assert!(text.contains("already finished") && !text.contains("step 1/3"), "{text}");
    // Keys of logging and movement do not make it another run.
    succeeds(place.mpirun(2, &train_with(&["training.logging_steps=3", "fsdp.activation_checkpointing=full"])));
    // Nor do ranks: a run may go on with others. The run keeps the sequences of its steps.
    let text = succeeds(place.command(&TRAIN));
    assert!(text.contains("already finished") && text.contains("number of ranks is 1 here and 2 there"), "{text}");
    assert!(before == files(&place.path("out")), "the result was touched");
    let refused = |command: Command, word: &str| {
        let text = fails(command, 1);
        assert!(text.contains(word) && text.contains("--overwrite"), "{word} in {text}");
        assert!(before == files(&place.path("out")), "{word}: the result was touched");
        assert_eq!(hidden(&place), Vec::<String>::new());
    };
    refused(place.mpirun(2, &train_with(&["training.learning_rate=2e-2"])), "learning_rate");
    let rows = place.read("rows.jsonl");
    place.write("rows.jsonl", [&rows[..], &rows[..]].concat());
    refused(place.mpirun(2, &TRAIN), "training data");
    place.write("rows.jsonl", rows);
    succeeds(place.mpirun(2, &overwrite(&["training.learning_rate=2e-2"])));
    assert!(before != files(&place.path("out")) && hidden(&place).is_empty());
    std::fs::remove_file(place.path("out/run.json")).unwrap();
    let text = fails(place.mpirun(2, &train_with(&["training.learning_rate=2e-2"])), 1);
    assert!(text.contains("has adapter_model.safetensors and no run.json"), "{text}");
    assert!(place.path(ADAPTER).exists());
}

#[test]
fn a_failing_rerun_leaves_what_is_there() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    let (before, loss) = (files(&place.path("out")), eval(&place, "out"));
    let mut command = place.mpirun(2, &overwrite(&["lora.r=2"]));
    command.env("FSDP_QLORA_FAULT", "error:0:3");
    assert!(fails(command, 1).contains("what is there stays until the run is complete"));
    assert!(before == files(&place.path("out")));
    assert_eq!(eval(&place, "out"), loss);
    let text = succeeds(place.command(&TRAIN));
    assert!(text.contains("did not finish were removed") && text.contains("already finished"), "{text}");
    assert!(hidden(&place).is_empty());
}

#[test]
fn a_run_that_failed_is_kept_and_one_that_made_no_step_leaves_nothing() {
    let place = Place::new();
    fails(place.command(&train_with(&["fsdp.vram_budget=100KB"])), 1);
    assert!(!place.path("out").exists());
    let mut command = place.command(&TRAIN);
    command.env("FSDP_QLORA_FAULT", "error:0:3");
    fails(command, 1);
    let run = record(&place);
    assert!(run["state"] == "failed" && run["reason"].as_str().unwrap().contains("FSDP_QLORA_FAULT"), "{run}");
    let before = files(&place.path("out"));
    let text = fails(place.command(&train_with(&["training.seed=7"])), 1);
    assert!(text.contains("has another run, which failed") && text.contains("--overwrite"), "{text}");
    assert!(before == files(&place.path("out")) && metrics(&place.read("out/metrics.jsonl")).len() == 2);
    let text = succeeds(place.command(&TRAIN));
    assert!(text.contains("the same run failed") && text.contains("it begins with the first step"), "{text}");
    assert_eq!((record(&place)["state"].clone(), num_steps(&place, "out/metrics.jsonl")), ("finished".into(), 3));
}

/// Kills one of two ranks when `is_so`; nothing but a whole adapter may be there, and the next start says what is.
fn killed_when(place: &Place, args: &[&str], rank: usize, is_so: impl Fn(&Place) -> bool) {
    let mut run = Running::start(place, place.mpirun(2, args));
    if run.until(is_so)
        && let Some(pid) = place.ranks().get(rank)
    {
        let _ = Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status();
    }
    run.child.wait().unwrap();
    let start = Instant::now();
    while !place.ranks().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "left running");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_kill_while_quantizing_leaves_no_adapter_and_no_temporary_file_for_long() {
    let temporary = |place: &Place| place.results().iter().filter(|path| path.contains(".fsdp-qlora-tmp-")).count();
    let place = Place::new();
    for rank in [0, 1] {
        killed_when(&place, &TRAIN, rank, |place| temporary(place) > 0);
        assert!(!place.path(ADAPTER).exists() || record(&place)["state"] == "finished");
    }
    let text = succeeds(place.mpirun(2, &TRAIN));
    assert!(text.contains("adapter: out") || text.contains("already finished"), "{text}");
    assert_eq!((temporary(&place), hidden(&place)), (0, Vec::new()));
}

#[test]
fn a_kill_while_training_is_told_and_the_lock_is_free() {
    let place = Place::new();
    killed_when(&place, &train_with(&["training.max_steps=100000"]), 0, |place| {
        num_steps(place, "out/metrics.jsonl") > 1
    });
    assert!(!place.path(ADAPTER).exists());
    let before = files(&place.path("out"));
    let text = fails(place.mpirun(2, &TRAIN), 1);
    assert!(text.contains("has another run, which was killed") && text.contains("--overwrite"), "{text}");
    assert!(before == files(&place.path("out")));
    succeeds(place.mpirun(2, &overwrite(&[])));
    eval(&place, "out");
}

#[test]
fn a_kill_while_saving_leaves_the_old_adapter_or_the_new_one() {
    let place = Place::new();
    succeeds(place.mpirun(2, &TRAIN));
    let (old, alpha) = (eval(&place, "out"), "lora.lora_alpha=64");
    let new = {
        let other = Place::new();
        succeeds(other.mpirun(2, &train_with(&[alpha])));
        eval(&other, "out")
    };
    let in_staging = |name: &'static str| move |place: &Place| place.path("out/.fsdp-qlora-new").join(name).exists();
    for file in ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"] {
        killed_when(&place, &overwrite(&[alpha]), 0, in_staging(file));
        if place.path("out/adapter_config.json").exists() {
            let loss = eval(&place, "out");
            assert!(loss == old || loss == new, "{loss} is neither {old} nor {new}");
        }
        let finished = succeeds_or_tells(&place, &train_with(&[alpha]));
        let loss = eval(&place, "out");
        assert_eq!(loss, if finished { new } else { old });
        succeeds(place.mpirun(2, &overwrite(&[])));
        assert_eq!(eval(&place, "out"), old);
    }
}

/// Returns whether this run has finished; if not, it must have said that another run has.
fn succeeds_or_tells(place: &Place, args: &[&str]) -> bool {
    let output = place.mpirun(2, args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() {
        true => assert!(text.contains("already finished"), "{text}"),
        false => assert!(text.contains("the result of another run"), "{text}"),
    }
    output.status.success()
}

#[test]
fn two_runs_in_one_folder() {
    let place = Place::new();
    let mut run = Running::start(&place, place.command(&train_with(&["training.max_steps=100000"])));
    assert!(run.until(|place| num_steps(place, "out/metrics.jsonl") > 1));
    for args in [TRAIN.to_vec(), overwrite(&[])] {
        let text = fails(place.command(&args), 1);
        assert!(text.contains("in use by another run (host ") && text.contains(&run.child.id().to_string()), "{text}");
    }
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    succeeds(place.command(&overwrite(&[])));
}

#[test]
fn an_output_dir_that_is_removed_is_made_again_and_the_model_may_go() {
    let place = Place::new();
    let run = Running::start(&place, place.command(&train_with(&[MANY_STEPS])));
    let (status, text) = interrupted_by(run, |place| {
        std::fs::remove_dir_all(place.path("out")).unwrap();
        std::fs::rename(place.path("model"), place.path("moved")).unwrap();
    });
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("was removed during the run") && text.contains("adapter: out"), "{text}");
    std::fs::rename(place.path("moved"), place.path("model")).unwrap();
    assert_eq!((num_steps(&place, "out/metrics.jsonl"), &record(&place)["state"]), (60, &"finished".into()));
    assert!(place.path("out/tokenizer.json").exists());
    eval(&place, "out");
}

/// Damages an output folder.
type Mischief = fn(&Path);

#[test]
fn a_result_that_cannot_be_where_it_should_is_beside() {
    let cases: [(&str, Mischief); 3] = [
        ("a file", |out| {
            std::fs::remove_dir_all(out).unwrap();
            std::fs::write(out, "").unwrap();
        }),
        ("a folder in the place of the adapter", |out| {
            std::fs::create_dir_all(out.join("adapter_model.safetensors/x")).unwrap()
        }),
        ("another adapter", |out| {
            std::fs::remove_dir_all(out).unwrap();
            std::fs::create_dir(out).unwrap();
            std::fs::write(out.join("adapter_model.safetensors"), "another").unwrap();
        }),
    ];
    for (name, mischief) in cases {
        let place = Place::new();
        let run = Running::start(&place, place.command(&train_with(&[MANY_STEPS])));
        let (status, text) = interrupted_by(run, |place| mischief(&place.path("out")));
        assert_eq!(status, Some(1), "{name}: {text}");
        let last = text.lines().last().unwrap();
        let saved = last.split("was saved in ").nth(1).unwrap_or_else(|| panic!("{name}: {text}"));
        assert!(saved.contains("out-saved-"), "{saved}");
        assert_eq!(num_steps(&place, &format!("{saved}/metrics.jsonl")), 60);
        eval(&place, saved);
    }
}

#[test]
fn files_that_no_run_has_written_are_kept() {
    let place = Place::new();
    let before = files(&place.path("model"));
    let text = fails(place.command(&train_with(&["output_dir=model"])), 1);
    assert!(text.contains("model has tokenizer.json and no run.json"), "{text}");
    assert!(before == files(&place.path("model")));
    std::fs::create_dir(place.path("out")).unwrap();
    place.write("out/notes.txt", "mine");
    succeeds(place.command(&TRAIN));
    place.write("out/chat_template.jinja", "mine");
    succeeds(place.command(&overwrite(&["lora.r=2"])));
    assert_eq!(
        (place.read("out/notes.txt"), place.read("out/chat_template.jinja")),
        (b"mine".to_vec(), b"mine".to_vec())
    );
}

#[test]
fn an_adapter_that_is_between_two_results_is_told_as_such() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    std::fs::create_dir(place.path("out/.fsdp-qlora-new")).unwrap();
    std::fs::remove_file(place.path("out/adapter_config.json")).unwrap();
    let text = fails(place.command(&["eval", "--model", "model", "--adapter", "out", "--dataset", "rows.jsonl"]), 1);
    assert!(text.contains("a new adapter is being put in place"), "{text}");
}

#[test]
fn what_the_end_needs_is_tried_at_the_start() {
    let cases: [(&str, Mischief); 2] = [
        ("adapter_config.json: a folder is in the place", |out| {
            std::fs::create_dir_all(out.join("adapter_config.json")).unwrap()
        }),
        ("run.json: a folder is in the place", |out| std::fs::create_dir_all(out.join("run.json")).unwrap()),
    ];
    for (words, damage) in cases {
        let place = Place::new();
        damage(&place.path("out"));
        let text = fails(place.command(&overwrite(&[])), 1);
        assert!(text.contains(words) && !text.contains("quantizing"), "{text}");
    }
}

#[test]
fn a_full_disk_while_saving_leaves_what_is_there() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    let before = files(&place.path("out"));
    // A limit on the size of files makes write fail as a full disk does: the shards are there, and this adapter is larger.
    let program = place.command(&TRAIN);
    let run = format!(
        "trap '' XFSZ; ulimit -f 200; exec {} train -c recipe.yaml --set lora.r=64 --overwrite",
        program.get_program().to_str().unwrap()
    );
    let mut shell = Command::new("bash");
    shell.args(["-c", &run]).current_dir(place.path("")).env("TMPDIR", place.path("cache"));
    shell.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.envs(MPI_WITHOUT_FILES);
    let text = fails(shell, 1);
    assert!(text.contains("step 3/3") && text.contains("the adapter could be saved nowhere"), "{text}");
    assert!(before == files(&place.path("out")));
    let left: Vec<_> = place.results().into_iter().filter(|path| path.contains("saved")).collect();
    assert_eq!(left, Vec::<String>::new());
    eval(&place, "out");
}

#[test]
fn divergence_is_told_and_keeps_the_adapter_that_is_there() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    let before = files(&place.path("out"));
    let text = fails(place.mpirun(2, &overwrite(&["training.learning_rate=1e30", "training.max_grad_norm=null"])), 1);
    assert!(text.contains("step 2: loss NaN") && text.contains("lower training.learning_rate"), "{text}");
    assert!(before == files(&place.path("out")));
}

/// Fills the tensor of the model's file with one value.
fn fill(place: &Place, file: &str, tensor: &str, value: f32) {
    let mut bytes = place.read(file);
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let at = |i: usize| 8 + len + header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
    for weight in bytes[at(0)..at(1)].as_chunks_mut().0 {
        *weight = value.to_le_bytes();
    }
    place.write(file, bytes);
}

#[test]
fn a_start_that_computes_nan_is_not_blamed_on_the_learning_rate() {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    fill(&place, ADAPTER, "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", 3e38);
    let args = ["eval", "--model", "model", "--adapter", "out", "--dataset", "rows.jsonl"];
    let text = fails(place.command(&args), 1);
    assert!(text.contains("the loss over") && text.contains("NaN"), "{text}");
    let mut lines = String::from_utf8(place.read("recipe.yaml")).unwrap();
    lines = lines.replace("r: 4,", "").replace("output_dir: out", "output_dir: next");
    place.write("recipe.yaml", lines);
    let text = fails(place.command(&train_with(&["lora.adapter=out"])), 1);
    assert!(text.contains("step 1: loss NaN") && text.contains("the adapter that training starts from"), "{text}");
    assert!(!text.contains("lower training.learning_rate"), "{text}");
}

#[test]
fn a_run_that_learns_nothing_fails() {
    let place = Place::new();
    // Every update is less than the smallest f32.
    let sets = ["training.learning_rate=1e-10", "training.adam_epsilon=1e38", "training.max_steps=1"];
    let text = fails(place.command(&train_with(&sets)), 1);
    assert!(text.contains("no step changed the adapter"), "{text}");
    assert!(!place.path(ADAPTER).exists());
}

#[test]
fn layers_that_were_added_with_zeros_are_trained() {
    let place = Place::new();
    for module in ["self_attn.o_proj", "mlp.down_proj"] {
        fill(&place, "model/model.safetensors", &format!("model.layers.1.{module}.weight"), 0.0);
    }
    let text = succeeds(place.command(&TRAIN));
    assert!(
        text.contains("5 of 14 lora_B have no gradient yet") && text.contains("layers.1.mlp.up_proj.lora_B"),
        "{text}"
    );
    let text = succeeds(place.command(&overwrite(&["lora.target_modules=[q_proj,v_proj]"])));
    assert!(text.contains("2 of 4 lora_B have no gradient yet"), "{text}");
}
