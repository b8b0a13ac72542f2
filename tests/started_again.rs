//! Runs that are started again: on another day, on other ranks, after damage, and beside another run.

mod common;

use std::process::Command;

use common::cli::{Place, fails, metrics, succeeds, train_with};
use common::running::{Running, has_signal, signal};

/// A command that fails in its fourth step.
fn failing(mut command: Command) -> Command {
    command.env("FSDP_QLORA_FAULT", "error:0:4");
    command
}

/// The arguments of training with five steps, a checkpoint after each, and these overrides.
fn saving<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    train_with(&[&["training.max_steps=5", "training.save_steps=1"], sets].concat())
}

/// The arguments of [`saving`] and `--overwrite`.
fn overwriting<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    [saving(sets), vec!["--overwrite"]].concat()
}

/// A place whose rows are conversations, under a template that begins with the date.
fn dated() -> Place {
    let place = Place::new();
    let each = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}";
    let end = "{% if add_generation_prompt %}assistant: {% endif %}";
    place.write("model/chat_template.jinja", format!("{{{{ strftime_now('%d %b %Y') }}}}\n{each}{end}"));
    let row = |i: usize| {
        let words = "again ".repeat(1 + i % 5);
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{words}"}}, {{"role": "assistant", "content": "{i}"}}]}}"#
        )
    };
    place.write("rows.jsonl", (0..24).map(|i| row(i) + "\n").collect::<String>());
    place
}

#[test]
fn a_chat_template_that_writes_the_date() {
    let place = dated();
    // It is never the same day in both zones.
    let on = |zone: &str, mut command: Command| {
        command.env("TZ", zone);
        command
    };
    fails(on("AAA13", failing(place.command(&saving(&[])))), 1);
    let text = succeeds(on("BBB-13", place.command(&saving(&[]))));
    assert!(text.contains("going on after step 3"), "{text}");
    for zone in ["AAA13", "BBB-13"] {
        let text = succeeds(on(zone, place.command(&saving(&[]))));
        assert!(text.contains("already finished"), "{text}");
    }
    // Another run has the date of its own start.
    let other = dated();
    succeeds(on("BBB-13", other.command(&saving(&[]))));
    assert!(other.read("out/adapter_model.safetensors") != place.read("out/adapter_model.safetensors"));
}

#[test]
fn a_finished_run_on_other_ranks() {
    let place = Place::new();
    let args = saving(&["training.global_batch_size=null", "training.gradient_accumulation_steps=3"]);
    succeeds(place.mpirun(2, &args));
    let text = succeeds(place.command(&args));
    assert!(text.contains("already finished") && text.contains("number of ranks is 1 here and 2 there"), "{text}");
}

#[test]
fn checkpoints_of_which_none_can_be_used() {
    let place = Place::new();
    let args = saving(&["training.save_total_limit=1"]);
    fails(failing(place.command(&args)), 1);
    let (file, lines) = ("out/checkpoint-3/optimizer.safetensors", place.read("out/metrics.jsonl"));
    let mut bytes = place.read(file);
    *bytes.last_mut().unwrap() ^= 1;
    place.write(file, bytes);
    for entry in std::fs::read_dir(place.path("out")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with("checkpoint-") && name != "checkpoint-3" {
            std::fs::remove_dir_all(place.path("out").join(name)).unwrap();
        }
    }
    let text = fails(place.command(&args), 1);
    assert!(
        text.contains("is passed over") && text.contains("the run has left 1 checkpoint(s), of which none can be used"),
        "{text}"
    );
    assert!(place.read("out/metrics.jsonl") == lines, "the lines of the run are gone");
    let never = saving(&["training.save_total_limit=1", "training.resume=never"]);
    let text = succeeds(place.command(&never));
    assert!(text.contains("step 1/5") && metrics(&place.read("out/metrics.jsonl")).len() >= 5, "{text}");
}

#[test]
fn checkpoints_of_a_run_that_was_to_replace_another() {
    let place = Place::new();
    let checkpoints = || place.path("out/.fsdp-qlora-new/checkpoint-3").exists();
    // The run of lora.r 4 does not finish in output_dir, and neither does that of lora.r 2 inside it.
    fails(failing(place.command(&saving(&[]))), 1);
    fails(failing(place.command(&overwriting(&["lora.r=2"]))), 1);
    assert!(checkpoints());
    let text = fails(place.command(&saving(&[])), 1);
    assert!(text.contains("has checkpoints of another run") && checkpoints(), "{text}");
    // Whoever wants them goes on with them.
    fails(failing(place.command(&overwriting(&["lora.r=2"]))), 1);
    assert!(checkpoints());
    let text = succeeds(place.command(&overwriting(&[])));
    assert!(text.contains("the checkpoints of another run, which failed") && !checkpoints(), "{text}");
    assert!(text.contains("going on after step 3"), "{text}");
}

#[test]
fn a_signal_that_comes_while_mpi_starts_ends_all_ranks() {
    let place = Place::new();
    let mut command = place.mpirun(2, &saving(&[]));
    // Rank 1 compares nothing with rank 0, which waits for it.
    command.env("FSDP_QLORA_FAULT", "hang:1:agree");
    let mut running = Running::start(&place, command);
    let notes_sigterm = |rank: &u32| has_signal(*rank, "SigCgt", libc::SIGTERM);
    let both_note = |place: &Place| place.ranks().len() == 2 && place.ranks().iter().all(notes_sigterm);
    assert!(running.until(both_note), "{}", running.text());
    assert!(signal(place.ranks()[0], "TERM"));
    let (status, text) = running.ends();
    assert!(status == Some(75) && text.contains("stopped by SIGTERM to rank 0 before the first step"), "{text}");
    succeeds(place.mpirun(2, &saving(&[])));
}
