//! scripts/spot/supervise keeps a run going: its decisions, with a launcher that plays the ends of runs, and a real run that is
//! killed.

mod common;

use std::process::Command;

use common::cli::{Place, TRAIN, fails, program, succeeds, train_with};
use common::running::{Running, has_signal, signal};

/// Plays the next line of `plan` as a run, and writes down how it was started.
const LAUNCHER: &str = r#"#!/bin/bash
echo "$1 $(paste -sd, "$2") ${*:3} T=$OMPI_MCA_odls_base_sigkill_timeout" >>starts
checkpoint() { mkdir -p "out/checkpoint-$1" && touch "out/checkpoint-$1/state.json"; }
is() { mkdir -p out && printf '{"state": "%s", "reason": "%s", "started": "now", "pid": %d}' "$1" "$2" $$ >out/run.json; }
line=$(head -n1 plan)
sed -i 1d plan
eval "$line"
"#;

/// Answers for hosts that have a file in `up`.
const SSH: &str = "#!/bin/bash\n[[ -e up/$1 ]] || { echo \"$1: No route to host\" >&2; exit 255; }\n";

/// A place with three hosts that answer, in which runs end as the lines of this plan say, in shell.
fn planned(plan: &[&str]) -> Place {
    let place = Place::new();
    for (name, text) in [("launcher", LAUNCHER), ("ssh", SSH)] {
        place.write(name, text);
        assert!(Command::new("chmod").arg("+x").arg(place.path(name)).status().unwrap().success());
    }
    std::fs::create_dir(place.path("up")).unwrap();
    (1..=3).for_each(|k| place.write(&format!("up/node{k}"), ""));
    place.write("hosts", "# three\nnode1 slots=2\nnode2 slots=4  # more\nnode3\n");
    place.write("plan", plan.join("\n") + "\n");
    place
}

/// The supervisor in a hurry, with these options.
fn supervise(place: &Place, options: &[&str]) -> Command {
    let fixed = "--hostfile hosts --output-dir out --mpirun ./launcher --ssh ./ssh --wait 0.01";
    let args: Vec<&str> = fixed.split(' ').chain(options.iter().copied()).chain(["--", "program", "train"]).collect();
    let mut command = place.script("scripts/spot/supervise", &args);
    command.env_remove("OMPI_MCA_odls_base_sigkill_timeout");
    command
}

/// One line for each start: the option of the hostfile, its hosts, the other arguments, and the time until a SIGKILL.
fn starts(place: &Place) -> Vec<String> {
    let text = std::fs::read_to_string(place.path("starts")).unwrap_or_default();
    text.lines().map(String::from).collect()
}

#[test]
fn a_finished_run_ends_it_whatever_the_launcher_says() {
    for end in ["is finished; exit 0", "is finished; exit 1"] {
        let place = planned(&[end, "exit 3"]);
        let text = succeeds(supervise(&place, &[]));
        assert!(text.contains("the run is finished"), "{text}");
        let hosts = "node1 slots=2,node2 slots=4,node3 slots=1";
        assert_eq!(starts(&place), [format!("--hostfile {hosts} -n 7 program train --set output_dir=\"out\" T=10")]);
    }
    // A run that was finished before says so with status 0. With another status, run.json is that of another run.
    let place = planned(&["is finished; exit 0", "exit 0", "exit 1"]);
    succeeds(supervise(&place, &[]));
    succeeds(supervise(&place, &[]));
    fails(supervise(&place, &["--starts", "1"]), 1);
    assert_eq!(starts(&place).len(), 3);
}

#[test]
fn a_run_that_ends_early_goes_on() {
    let place = planned(&[
        "is running; checkpoint 10; exit 0",
        "is failed 'rank 3 has ended'; checkpoint 20; exit 1",
        "is stopped 'SIGTERM to rank 1, after step 30'; checkpoint 30; exit 75",
        "is finished",
    ]);
    let text = succeeds(supervise(&place, &["--starts", "1"]));
    for words in [
        "launcher's status 0, run.json: running, newest checkpoint: 10",
        "run.json: failed (rank 3 has ended), newest checkpoint: 20",
        "run.json: stopped (SIGTERM to rank 1, after step 30), newest checkpoint: 30",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert_eq!(starts(&place).len(), 4);
}

#[test]
fn hosts_that_do_not_answer_are_left_out_until_they_do() {
    let place = planned(&["touch up/node2; checkpoint 1", "rm up/node1; checkpoint 2", "is finished"]);
    std::fs::remove_file(place.path("up/node2")).unwrap();
    let text = succeeds(supervise(&place, &[]));
    assert!(text.contains("without node2: node2: No route to host"), "{text}");
    let starts = starts(&place);
    let expected = [
        "node1 slots=2,node3 slots=1 -n 3 ",
        "node1 slots=2,node2 slots=4,node3 slots=1 -n 7 ",
        "node2 slots=4,node3 slots=1 -n 5 ",
    ];
    assert_eq!(starts.len(), 3);
    starts.iter().zip(expected).for_each(|(start, words)| assert!(start.contains(words), "{words} in {start}"));
}

#[test]
fn it_waits_for_enough_hosts_and_not_for_ever() {
    let place = planned(&["is finished"]);
    std::fs::remove_file(place.path("up/node2")).unwrap();
    let text = fails(supervise(&place, &["--min-slots", "4", "--patience", "0"]), 1);
    assert!(text.contains("3 slots on the hosts that answer, 4 are needed"), "{text}");
    assert!(text.contains("gave up: too few hosts answered") && starts(&place).is_empty(), "{text}");
    // A probe that never returns is no answer.
    let slow = ["--probe", "sleep 60", "--probe-timeout", "0.1", "--patience", "0", "--ssh", "sh -c 'sleep 60'"];
    let text = fails(supervise(&place, &slow), 1);
    assert!(text.contains("without node3: no answer in 0.1 s"), "{text}");
    let mut running = Running::start(&place, supervise(&place, &["--min-slots", "4"]));
    assert!(running.says("4 are needed"));
    place.write("up/node2", "");
    let (status, text) = running.ends();
    assert_eq!(status, Some(0), "{text}");
}

#[test]
fn it_gives_up_when_no_checkpoint_comes() {
    // A folder without state.json, one of another program and an older one are not new checkpoints.
    let place = planned(&[
        "checkpoint 10",
        "mkdir -p out/checkpoint-20 out/checkpoint-best && touch out/checkpoint-best/state.json",
        "checkpoint 5",
        "false",
        "is finished",
    ]);
    let text = fails(supervise(&place, &["--starts", "3", "--longest-wait", "0.03"]), 1);
    assert!(text.contains("gave up: 3 starts in a row brought no new checkpoint; help:"), "{text}");
    let waits: Vec<&str> = text.lines().filter_map(|line| line.split("starting again in ").nth(1)).collect();
    assert_eq!(waits, ["0.01 s", "0.02 s", "0.03 s"], "{text}");
    assert_eq!(starts(&place).len(), 4);
}

#[test]
fn a_refusal_is_not_tried_again() {
    let place = planned(&["exit 2", "exit 0"]);
    let text = fails(supervise(&place, &[]), 2);
    assert!(text.contains("the command line or the recipe was refused"), "{text}");
    assert_eq!(starts(&place).len(), 1);
    // These hosts took the run before, so the refusal is not for their number.
    let place = planned(&["is running; checkpoint 1; exit 1", "exit 2", "exit 0"]);
    fails(supervise(&place, &[]), 2);
    assert_eq!(starts(&place).len(), 2);
}

#[test]
fn a_run_that_takes_no_more_ranks_goes_on_with_as_many_as_before() {
    let place = planned(&["is running; touch up/node2; checkpoint 1; exit 1", "exit 2", "is finished"]);
    std::fs::remove_file(place.path("up/node2")).unwrap();
    let text = succeeds(supervise(&place, &[]));
    assert!(
        text.contains("refused on these hosts; it gets at most 3 ranks from here on, as on node1, node3"),
        "{text}"
    );
    let starts_of = |place| starts(place).into_iter();
    let ranks = |start: String| start.split(" -n ").nth(1).unwrap().chars().next().unwrap();
    assert_eq!(starts_of(&place).map(ranks).collect::<String>(), "373");
    let place = planned(&["is finished"]);
    succeeds(supervise(&place, &["--max-slots", "5", "--min-slots", "5"]));
    assert!(starts_of(&place).all(|start| start.contains("node1 slots=2,node2 slots=3 -n 5 ")), "{:?}", starts(&place));
    let text = fails(supervise(&place, &["--max-slots", "1", "--min-slots", "2"]), 2);
    assert!(text.contains("--min-slots: found 2, allowed: at most the 1 of --max-slots"), "{text}");
}

#[test]
fn a_result_that_was_saved_elsewhere_is_not_made_again() {
    let place = planned(&["is failed 'the result was saved in elsewhere: no space'; exit 1", "exit 0"]);
    let text = fails(supervise(&place, &[]), 1);
    assert!(text.contains("the run is finished, but the result was saved in elsewhere"), "{text}");
    assert_eq!(starts(&place).len(), 1);
}

#[test]
fn a_wish_to_stop_is_obeyed() {
    let place = planned(&["is stopped 'control: stop, after step 8'; exit 75", "exit 0"]);
    let text = fails(supervise(&place, &[]), 75);
    assert!(text.contains("stopped by control: stop, after step 8; the same command goes on"), "{text}");
    assert_eq!(starts(&place).len(), 1);

    // What it is told itself reaches the ranks as SIGUSR1, and the launcher's status says nothing.
    // Where this test ignores SIGHUP, as under nohup, the supervisor does so too.
    let ignores_hangups = has_signal(std::process::id(), "SigIgn", libc::SIGHUP);
    for name in ["TERM", "INT", "HUP", "USR1"].into_iter().filter(|name| *name != "HUP" || !ignores_hangups) {
        let run = "trap 'is stopped \"SIGUSR1 to rank 0, after step 9\"; exit 1' USR1; touch begun; while sleep 0.01; do :; done";
        let place = planned(&[run]);
        let mut running = Running::start(&place, supervise(&place, &[]));
        assert!(running.until(|place| place.path("begun").exists()));
        assert!(signal(running.child.id(), name));
        let (status, text) = running.ends();
        assert_eq!(status, Some(75), "{text}");
        assert!(text.contains(&format!("SIG{name}: the ranks save and stop")), "{text}");
        assert_eq!(starts(&place).len(), 1);
    }
}

#[test]
fn a_second_interrupt_ends_the_ranks_at_once() {
    let place = planned(&["trap '' USR1; touch begun; while sleep 0.01; do :; done"]);
    let mut running = Running::start(&place, supervise(&place, &[]));
    assert!(running.until(|place| place.path("begun").exists()));
    assert!(signal(running.child.id(), "INT"));
    assert!(running.says("SIGINT: the ranks save and stop"));
    assert!(signal(running.child.id(), "INT"));
    let (status, text) = running.ends();
    assert_eq!(status, Some(75), "{text}");
    assert!(text.contains("SIGINT: ending the ranks at once") && text.contains("launcher's status -9"), "{text}");
}

#[test]
fn a_run_that_does_not_move_is_killed() {
    // The first writes a line now and then for longer than the limit, the second does not.
    let moves = "mkdir out; for i in {1..9}; do echo $i >>out/metrics.jsonl; sleep 0.5; done; checkpoint 1";
    let place = planned(&[moves, "while sleep 0.01; do :; done", "is finished"]);
    let text = succeeds(supervise(&place, &["--stall", "0.001"]));
    let killed = "no new step and no new file for 0.001 hours: killing the run";
    assert_eq!(text.matches(killed).count(), 1, "{text}");
    assert_eq!(starts(&place).len(), 3, "{text}");
}

#[test]
fn both_forms_of_hostfiles_are_read_and_others_refused() {
    let place = planned(&["is finished"]);
    place.write("hosts", "node1:2\nnode2:4\n");
    succeeds(supervise(&place, &[]));
    assert!(starts(&place)[0].starts_with("-f node1:2,node2:4 -n 6 program"), "{:?}", starts(&place));
    for (text, words) in [
        ("node1 slots=2\nnode1 slots=2\n", "hosts:2: 'node1 slots=2'; allowed: each host once"),
        ("node1 slots=0\n", "hosts:1: 'node1 slots=0'"),
        ("node1:2\nnode2 slots=2\n", "hosts:2: 'node2 slots=2'"),
        ("# none\n", "hosts: no host"),
    ] {
        place.write("hosts", text);
        let text = fails(supervise(&place, &[]), 1);
        assert!(text.contains(words), "{words} in {text}");
    }
    let text = fails(supervise(&place, &["--mpirun", "no-such-launcher"]), 1);
    assert!(text.contains("no host"), "{text}");
    std::fs::remove_file(place.path("hosts")).unwrap();
    let text = fails(supervise(&place, &[]), 1);
    assert!(text.contains("error:") && text.contains("'hosts'"), "{text}");
    place.write("hosts", "node1\n");
    let text = fails(supervise(&place, &["--mpirun", "no-such-launcher"]), 1);
    assert!(text.contains("no-such-launcher is not a command here; help: --mpirun"), "{text}");
    let overwrite = ["--hostfile", "hosts", "--output-dir", "out", "--", "program", "train", "--overwrite"];
    let text = fails(place.script("scripts/spot/supervise", &overwrite), 2);
    assert!(text.contains("--overwrite: each start would replace"), "{text}");
}

/// The supervisor of real ranks on this machine.
fn supervise_ranks(place: &Place, args: &[&str]) -> Command {
    place.write("hosts", "localhost slots=2\n");
    let program = program().display().to_string();
    let fixed = ["--hostfile", "hosts", "--output-dir", "out", "--wait", "0.1", "--", &program];
    let mut command = place.script("scripts/spot/supervise", &[&fixed, args].concat());
    // Nothing here needs time to save after a SIGTERM.
    command.env("OMPI_MCA_odls_base_sigkill_timeout", "1");
    command
}

#[test]
fn a_real_run_that_is_killed_and_stopped_ends_with_the_bits_of_one_that_was_not() {
    let args = [&TRAIN[..], &["--set", "training.max_steps=60", "--set", "training.save_steps=3"]].concat();
    let (place, whole) = (Place::new(), Place::new());
    succeeds(whole.mpirun(2, &args));
    let mut running = Running::start(&place, supervise_ranks(&place, &args));
    assert!(running.says("step 5/"), "{}", running.text());
    assert!(signal(place.ranks()[1], "KILL"));
    // The last word before the second start; `step 20/` may have been said before the kill.
    assert!(running.says("going on after step "), "{}", running.text());
    assert!(signal(running.child.id(), "TERM"));
    let (status, text) = running.ends();
    // The signal may come before the first step, or after the last one.
    assert!([Some(75), Some(0)].contains(&status), "{text}");
    assert!(text.matches("supervise ").count() >= 4 && text.contains("starting again in 0.1 s"), "{text}");
    let text = succeeds(supervise_ranks(&place, &args));
    assert!(text.contains("the run is finished"), "{text}");
    let adapter = "out/adapter_model.safetensors";
    assert!(place.read(adapter) == whole.read(adapter), "the adapters differ");
}

#[test]
fn a_real_refusal_is_not_tried_again() {
    let place = Place::new();
    for args in [train_with(&["training.learning_rate=fast"]), vec!["train", "--no-such-option"]] {
        let text = fails(supervise_ranks(&place, &args), 2);
        assert!(text.contains("the command line or the recipe was refused"), "{text}");
        assert_eq!(text.matches("starting ").count(), 1, "{text}");
    }
}
