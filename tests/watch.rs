//! One way to die, under real mpirun: whatever happens to a rank, in whatever part of a run, all ranks end within
//! seconds, and a message on top says which rank it was and what it was doing.

mod common;

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::cli::{Place, TRAIN, fails, fails_with, is_mpich, succeeds, train_with};

/// Everything must be gone after this.
const END: Duration = Duration::from_secs(15);

/// The lines that the program has written: what the launcher says begins with its own.
fn before_the_launcher(text: &str) -> Vec<&str> {
    let is_launchers = |line: &&str| line.contains("MPI_ABORT was invoked") || line.starts_with("Primary job");
    text.lines().take_while(|line| !is_launchers(line)).collect()
}

/// Standard error of a run with a fault, which must fail in time and leave no rank.
fn fails_soon(place: &Place, ranks: usize, fault: &str) -> String {
    let mut command = place.mpirun(ranks, &TRAIN);
    command.env("FSDP_QLORA_FAULT", fault).env("FSDP_QLORA_TIMEOUT_S", "2");
    // MPICH's launcher takes no notice of a rank that ends before MPI_Init, and may kill the others when the next one ends.
    let is_noticed = !(is_mpich() && fault.ends_with("start"));
    if !fault.starts_with("hang") {
        command.env("FSDP_QLORA_START_TIMEOUT_S", if is_noticed { "60" } else { "5" });
    }
    let start = Instant::now();
    let text = fails_with(command, if is_noticed { &[1] } else { &[1, 9] });
    assert!(start.elapsed() < END, "{fault}: {:?}\n{text}", start.elapsed());
    place.has_no_ranks(fault);
    text
}

#[test]
fn a_panic_or_an_error_of_one_rank_ends_all_with_its_cause_on_top() {
    for (fault, cause) in [
        ("panic:1:2", "a panic was asked for"),
        ("error:1:2", "an error was asked for"),
        ("error:1:start", "an error was asked for"),
        ("error:2:quantize", "an error was asked for"),
        ("error:0:end", "an error was asked for"),
    ] {
        let place = Place::new();
        let text = fails_soon(&place, 3, fault);
        let rank = fault.split(':').nth(1).unwrap();
        let lines = before_the_launcher(&text);
        let told: Vec<&&str> =
            lines.iter().filter(|l| l.contains(cause) || l.starts_with(&format!("rank {rank}: "))).collect();
        assert!(!told.is_empty() && told[0].starts_with(&format!("rank {rank}: ")), "{fault}: {text}");
        assert_eq!(text.matches(cause).count(), 1, "{fault}: {text}");
        assert_eq!(place.path("out/adapter_model.safetensors").exists(), fault.ends_with("end"), "{fault}");
    }
}

#[test]
fn an_error_of_all_ranks_is_told_once() {
    let place = Place::new();
    for (args, status, words) in [
        (train_with(&["model=absent"]), 2, "absent"),
        (train_with(&["training.seeed=1"]), 2, "seeed"),
        (vec!["train", "--no-such-option"], 2, "--no-such-option"),
        (vec!["eval", "--model", "model", "--dataset", "recipe.yaml"], 1, "recipe.yaml"),
    ] {
        let text = fails(place.mpirun(4, &args), status);
        let lines = before_the_launcher(&text);
        assert_eq!(lines.iter().filter(|line| line.contains("error:")).count(), 1, "{words}: {text}");
        assert!(lines.iter().any(|line| line.contains(words)), "{text}");
    }
}

#[test]
fn a_rank_that_hangs_is_named_in_every_phase() {
    for (fault, action) in [
        ("hang:1:agree", "did not end"),
        ("hang:1:load", "loading the model did not end"),
        ("hang:2:quantize", "making the shards did not end"),
        ("hang:1:device", "starting the device did not end"),
        ("hang:1:2", "did not end"),
        ("hang:0:save", "did not end"),
        ("hang:1:end", "MPI_Finalize did not end"),
    ] {
        let place = Place::new();
        let text = fails_soon(&place, 3, fault);
        let rank = fault.split(':').nth(1).unwrap();
        let lines = before_the_launcher(&text);
        let told: Vec<&&str> = lines.iter().filter(|line| line.contains("error:")).collect();
        assert_eq!(told.len(), 1, "{fault}: {text}");
        assert!(told[0].contains(action), "{fault}: {text}");
        assert!(told[0].ends_with(&format!("within 2 s: rank {rank} has not come to it")), "{fault}: {text}");
        assert!(lines.iter().any(|line| line.starts_with(&format!("  rank {rank}: at "))), "{fault}: {text}");
        assert!(
            lines.iter().any(|line| line.starts_with("  ranks ") && line.contains("waiting in")),
            "{fault}: {text}"
        );
    }
}

#[test]
fn a_rank_that_does_not_come_to_mpi_is_noticed() {
    let text = fails_soon(&Place::new(), 3, "hang:1:start");
    assert!(text.contains("MPI_Init did not end within 2 s: a rank was not started, or hangs before it"), "{text}");
    assert_eq!(text.matches("MPI_Init did not end").count(), 1, "{text}");
}

#[test]
fn a_rank_that_moves_is_waited_for() {
    for phase in ["quantize", "2", "save"] {
        let place = Place::new();
        let mut command = place.mpirun(3, &TRAIN);
        command.env("FSDP_QLORA_FAULT", format!("slow:1:{phase}")).env("FSDP_QLORA_TIMEOUT_S", "2");
        succeeds(command);
    }
}

#[test]
fn a_limit_that_is_none_is_refused() {
    for (variable, value) in
        [("FSDP_QLORA_TIMEOUT_S", "0"), ("FSDP_QLORA_START_TIMEOUT_S", "soon"), ("FSDP_QLORA_TIMEOUT_S", "-1")]
    {
        let place = Place::new();
        let mut command = place.command(&TRAIN);
        command.env(variable, value);
        let text = fails(command, 1);
        assert!(text.contains(&format!("{variable} is {value:?}, allowed: seconds, 1 or more")), "{text}");
    }
}

/// Sends a signal to rank 1 of a long run after its first steps; what the run says, and how long it took to end.
fn signalled(place: &Place, signal: &str) -> (Output, Duration) {
    let args = train_with(&["training.max_steps=100000"]);
    let mut command: Command = place.mpirun(3, &args);
    command.env("FSDP_QLORA_TIMEOUT_S", "2").stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("mpirun (scripts/setup installs it)");
    let start = Instant::now();
    while std::fs::read_to_string(place.path("out/metrics.jsonl")).unwrap_or_default().lines().count() < 2 {
        assert!(start.elapsed() < Duration::from_secs(60), "no step was made");
        std::thread::sleep(Duration::from_millis(50));
    }
    let is_rank_1 = |pid: &&u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let text = String::from_utf8_lossy(&environment).into_owned();
        text.split('\0').any(|v| v == "OMPI_COMM_WORLD_RANK=1" || v == "PMI_RANK=1")
    };
    let ranks = place.ranks();
    let rank_1 = ranks.iter().find(is_rank_1).expect("rank 1 runs").to_string();
    // The shell has `kill` within itself; a bare Debian has no program of this name.
    assert!(Command::new("sh").args(["-c", &format!("kill {signal} {rank_1}")]).status().unwrap().success());
    let start = Instant::now();
    (child.wait_with_output().unwrap(), start.elapsed())
}

#[test]
fn a_rank_that_is_killed_or_stopped_is_named() {
    for (signal, words) in [("-KILL", "was killed or has crashed at step"), ("-STOP", "was stopped by a signal")] {
        let place = Place::new();
        let (output, elapsed) = signalled(&place, signal);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && elapsed < END, "{signal}: {:?} after {elapsed:?}", output.status);
        if is_mpich() && signal == "-KILL" {
            assert!(String::from_utf8_lossy(&output.stdout).contains("Killed (signal 9)"), "{output:?}");
        } else {
            let told = text.lines().filter(|line| line.contains("rank 1") && line.contains(words));
            assert_eq!(told.count(), 1, "{signal}: {text}");
        }
        place.has_no_ranks(signal);
    }
}
