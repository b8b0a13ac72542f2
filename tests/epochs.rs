//! Epochs: each goes through the rows once, whatever the size of a step and the number of ranks.

mod common;

use common::cli::{Place, fails, metrics, succeeds, train_with};
use serde_json::Value;

/// A place with so many tokenized rows, each of five tokens that no other row has.
fn place(rows: usize) -> Place {
    let place = Place::new();
    let ids = |row: usize| (1..6).map(|i| (10 * row + i).to_string()).collect::<Vec<_>>().join(", ");
    let row = |row: usize| format!("{{\"input_ids\": [{}]}}\n", ids(row + 1));
    place.write("rows.jsonl", (0..rows).map(row).collect::<String>());
    place
}

/// The lines of steps, or of evaluations.
fn lines(place: &Place, key: &str) -> Vec<Value> {
    metrics(&place.read("out/metrics.jsonl")).into_iter().filter(|line| line[key].is_f64()).collect()
}

fn column(lines: &[Value], key: &str) -> Vec<f64> {
    lines.iter().map(|line| line[key].as_f64().unwrap()).collect()
}

/// Values of TRL 1.16 with 5 rows, 16 micro-batches a step, 3 epochs: three updates of 20 targets, and epochs 1, 2, 3.
#[test]
fn fewer_rows_than_a_step_takes_are_an_epoch() {
    let place = place(5);
    let sets = [
        "training.max_steps=null",
        "training.global_batch_size=null",
        "training.gradient_accumulation_steps=16",
        "training.num_train_epochs=3",
    ];
    let text = succeeds(place.command(&train_with(&sets)));
    let said = "the run has 3 steps of 16 sequences (the last of each epoch has 5); an epoch of 5 sequences has 1 step, so \
                these are 3.00 epochs (training.num_train_epochs: 3); the learning rate rises in 0 steps";
    assert!(text.find(said).is_some_and(|at| at < text.find("step 1/3").unwrap()), "{text}");
    let steps = lines(&place, "loss");
    assert_eq!(column(&steps, "epoch"), [1.0, 2.0, 3.0]);
    assert_eq!(column(&steps, "num_target_tokens"), [20.0; 3]);
}

/// 10 rows in steps of 4: the last step of an epoch has 2, so that of 3 and 4 ranks one or two have none.
#[test]
fn any_number_of_ranks_learns_the_same() {
    let run = |ranks: usize, sets: &[&str]| {
        let place = place(10);
        let more = ["training.global_batch_size=4", "training.max_steps=7", "training.save_steps=null"];
        succeeds(place.mpirun(ranks, &train_with(&[&more[..], sets].concat())));
        lines(&place, "loss")
    };
    let alone = run(1, &[]);
    assert_eq!(column(&alone, "epoch"), [0.4, 0.8, 1.0, 1.4, 1.8, 2.0, 2.4]);
    assert_eq!(column(&alone, "num_target_tokens"), [16.0, 16.0, 8.0, 16.0, 16.0, 8.0, 16.0]);
    for (ranks, sets) in [(2, &[][..]), (3, &[]), (4, &[]), (2, &["training.per_device_train_batch_size=2"])] {
        let several = run(ranks, sets);
        assert_eq!(column(&several, "epoch"), column(&alone, "epoch"));
        for key in ["loss", "grad_norm"] {
            for (ours, theirs) in column(&several, key).iter().zip(column(&alone, key)) {
                assert!((ours - theirs).abs() <= 1e-4 * theirs, "{ranks} ranks: {key} {ours} for {theirs}");
            }
        }
    }
}

#[test]
fn rows_that_do_not_fill_a_step_can_be_dropped() {
    let place = place(10);
    let sets = ["training.drop_last=true", "training.global_batch_size=4", "training.max_steps=null"];
    let text = succeeds(place.mpirun(2, &train_with(&[&sets[..], &["training.num_train_epochs=2"]].concat())));
    assert!(text.contains("4 steps of 4 sequences, which leave 2 sequences out of each epoch"), "{text}");
    let steps = lines(&place, "loss");
    assert_eq!(column(&steps, "epoch"), [0.5, 1.0, 1.5, 2.0]);
    assert_eq!(column(&steps, "num_target_tokens"), [16.0; 4]);
    let too_few = train_with(&["training.drop_last=true", "training.global_batch_size=16", "output_dir=other"]);
    let text = fails(place.command(&too_few), 2);
    assert!(text.contains("training.drop_last: found true, but 10 sequences do not fill a step of 16"), "{text}");
}

#[test]
fn epochs_end_with_a_checkpoint_and_an_evaluation() {
    let place = place(10);
    let sets = [
        "training.global_batch_size=4",
        "training.max_steps=7",
        "training.save_strategy=epoch",
        "training.eval_strategy=epoch",
        "data.eval=rows.jsonl",
    ];
    succeeds(place.command(&train_with(&sets)));
    assert_eq!(column(&lines(&place, "eval_loss"), "step"), [0.0, 3.0, 6.0, 7.0]);
    let is_kept = |step: usize| place.path(&format!("out/checkpoint-{step}/state.json")).exists();
    assert_eq!(Vec::from_iter((1..=7).filter(|&step| is_kept(step))), [3, 6]);
}

/// A run that stops within an epoch goes on with the sequences that are left of it.
#[test]
fn a_run_goes_on_within_an_epoch() {
    let sets =
        ["training.global_batch_size=4", "training.max_steps=8", "training.save_steps=1", "lora.lora_dropout=0.1"];
    for ranks in [1, 3] {
        let place = place(10);
        let more = ["training.save_total_limit=null"];
        succeeds(place.mpirun(ranks, &train_with(&[&sets[..], &more].concat())));
        let whole = lines(&place, "loss");
        for step in [2, 3, 5] {
            let from = format!("training.resume=out/checkpoint-{step}");
            succeeds(place.mpirun(ranks, &train_with(&[&sets[..], &[&from, "output_dir=again"]].concat())));
            let again = metrics(&place.read("again/metrics.jsonl"));
            for key in ["step", "epoch", "loss", "num_target_tokens"] {
                let of = |lines: &[Value]| lines.iter().map(|line| line[key].clone()).collect::<Vec<_>>();
                assert_eq!(of(&again), of(&whole), "{key} after step {step}");
            }
            std::fs::remove_dir_all(place.path("again")).unwrap();
        }
    }
}

/// The rows differ in their number of targets, so that this number tells the order.
#[test]
fn the_order_of_the_rows_can_be_kept() {
    let place = Place::new();
    let row = |n: usize| format!("{{\"input_ids\": {:?}}}\n", (1..=n).collect::<Vec<_>>());
    place.write("rows.jsonl", (2..10).map(row).collect::<String>());
    let order = |out: &str, shuffle: &str| {
        let sets = ["training.global_batch_size=1", "training.max_steps=16", "training.save_steps=null", shuffle];
        succeeds(place.command(&train_with(&[&sets[..], &[&format!("output_dir={out}")]].concat())));
        column(&metrics(&place.read(&format!("{out}/metrics.jsonl"))), "num_target_tokens")
    };
    let kept = order("kept", "data.shuffle=false");
    let epoch: Vec<f64> = (1..9).map(f64::from).collect();
    assert_eq!(kept, [&epoch[..], &epoch].concat());
    let mut shuffled = order("shuffled", "data.shuffle=true");
    assert_ne!(shuffled[..8], epoch);
    assert_ne!(shuffled[..8], shuffled[8..]);
    shuffled[..8].sort_by(f64::total_cmp);
    assert_eq!(shuffled[..8], epoch);
}
