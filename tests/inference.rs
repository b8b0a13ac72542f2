//! `generate` and `eval` over several prompts, adapters and data sets.

mod common;

use common::cli::{Place, TRAIN, fails, succeeds, train_with};
use common::{EngineOptions, on_all_ranks};
use fsdp_qlora::testing::generate::{Sampling, generate};
use fsdp_qlora::testing::{MicroBatch, Mode, eval};
use serde_json::Value;

const PROMPTS: &str = r#"{"prompt": "the quick brown fox"}
{"messages": [{"role": "system", "content": "You are short."}, {"role": "user", "content": "ab"}], "id": 3}
{"text": "a"}
{"prompt": [{"role": "user", "content": "a longer question, which has more tokens than the others"}]}
{"prompt": "b"}
"#;

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn stdout(mut command: std::process::Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_text_does_not_depend_on_those_beside_it() {
    let place = Place::new();
    place.write("prompts.jsonl", PROMPTS);
    let generate = ["generate", "--model", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", "6"];
    for sampling in [&[][..], &["--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed", "7"]] {
        let with = |batch_size: &'static str| [&generate[..], &["--batch-size", batch_size], sampling].concat();
        let one = stdout(place.command(&with("1")));
        assert_eq!(lines(&one).len(), 5);
        assert_eq!(stdout(place.command(&with("3"))), one);
        assert_eq!(stdout(place.mpirun(2, &with("2"))), one);
    }
    // The first prompt alone, as it comes and as JSON.
    let all = lines(&stdout(place.command(&generate)));
    let alone = ["generate", "--model", "model", "--prompt", "the quick brown fox", "--max-new-tokens", "6"];
    assert_eq!(stdout(place.command(&alone)), format!("{}\n", all[0]["text"].as_str().unwrap()));
    assert_eq!(lines(&stdout(place.command(&[&alone[..], &["--json"]].concat()))), all[..1]);
    assert!(all.iter().all(|line| line["num_tokens"] == 6 && line["finish_reason"] == "length"), "{all:?}");
    let text = succeeds(place.command(&generate));
    assert!(text.contains("prompts.jsonl: these columns are not read: id"), "{text}");
    assert!(text.contains("30 new tokens after") && text.contains("of 5 prompts"), "{text}");
}

#[test]
fn a_text_ends_before_a_stop_text() {
    let place = Place::new();
    let generate = ["generate", "--model", "model", "--prompt", "the quick", "--max-new-tokens", "12", "--json"];
    let whole = lines(&stdout(place.command(&generate)))[0]["text"].as_str().unwrap().to_string();
    let (at, _) = whole.char_indices().nth(whole.chars().count() / 2).unwrap();
    let stop = &whole[at..at + whole[at..].chars().next().unwrap().len_utf8()];
    let stopped = lines(&stdout(place.command(&[&generate[..], &["--stop", stop, "--stop", "never said"]].concat())));
    assert_eq!(stopped[0]["text"], whole[..whole.find(stop).unwrap()], "{whole:?} until {stop:?}");
    assert_eq!(stopped[0]["finish_reason"], "stop");
}

#[test]
fn adapters_and_data_sets_take_turns() {
    let place = Place::new();
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    place.write("few.jsonl", rows.lines().take(4).map(|row| format!("{row}\n")).collect::<String>());
    succeeds(place.command(&TRAIN));
    succeeds(place.command(&train_with(&["output_dir=other", "training.seed=1"])));
    let eval = ["eval", "--model", "model", "--json"];
    let both = ["--adapter", "out", "--adapter", "other", "--dataset", "rows.jsonl", "--dataset", "few.jsonl"];
    let found = stdout(place.command(&[&eval[..], &both].concat()));
    let mut expected = String::new();
    for adapter in ["out", "other"] {
        for dataset in ["rows.jsonl", "few.jsonl"] {
            expected += &stdout(place.command(&[&eval[..], &["--adapter", adapter, "--dataset", dataset]].concat()));
        }
    }
    assert_eq!(found, expected);
    let losses: Vec<f64> = lines(&found).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert!(losses[0] != losses[2] && losses[1] != losses[3], "{losses:?}");
    let text = stdout(place.command(&[&["eval", "--model", "model"][..], &both].concat()));
    assert!(text.starts_with("out  rows.jsonl  loss ") && text.lines().count() == 4, "{text}");

    let generate = ["generate", "--model", "model", "--prompt", "ab", "--max-new-tokens", "8", "--json"];
    let of = |adapters: &[&str]| {
        let named = adapters.iter().flat_map(|adapter| ["--adapter", adapter]).collect::<Vec<_>>();
        stdout(place.command(&[&generate[..], &named].concat()))
    };
    assert_eq!(of(&["out", "other"]), of(&["out"]) + &of(&["other"]));

    succeeds(place.command(&train_with(&["output_dir=wider", "lora.r=3"])));
    let args = [&eval[..], &["--dataset", "few.jsonl", "--adapter", "out", "--adapter", "wider"]].concat();
    let text = fails(place.command(&args), 1);
    assert!(text.contains("out and wider differ in r, alpha or target modules"), "{text}");
}

#[test]
fn accuracy_is_that_of_the_largest_logits() {
    let shards = tempfile::tempdir().unwrap();
    let mut results = on_all_ranks(1, |groups| {
        let mut engine = EngineOptions::new("tiny", Mode::Generate).engine(groups, shards.path());
        let mut greedy = |before: &[u32], max_new_tokens: usize| {
            let prompts = [before.to_vec()];
            generate(&mut engine, &prompts, &[], &Sampling::greedy(max_new_tokens), false, &mut ()).unwrap().remove(0)
        };
        let mut ids = vec![5, 9, 40];
        ids.extend(greedy(&ids, 9).tokens);
        (ids[6], ids[9]) = (ids[6] ^ 1, ids[9] ^ 1);
        let most_likely = (1..ids.len()).filter(|&i| greedy(&ids[..i], 1).tokens == [ids[i]]).count();
        (ids, most_likely)
    });
    let (ids, most_likely) = results.remove(0);
    assert!(most_likely > 2 && most_likely < ids.len() - 1, "{most_likely} of {}", ids.len());
    on_all_ranks(2, |groups| {
        let mut engine = EngineOptions::new("tiny", Mode::Score).engine(groups, shards.path());
        let mut batch = MicroBatch::new();
        batch.push(0, &ids, &vec![true; ids.len()]);
        let score = eval::score(&mut engine, &[batch], false).unwrap();
        assert_eq!(score.token_accuracy, most_likely as f64 / (ids.len() - 1) as f64);
    });
}

#[test]
fn options_that_cannot_be_meant() {
    let place = Place::new();
    place.write("prompts.jsonl", "{\"question\": \"a\"}\n");
    let generate = ["generate", "--model", "model"];
    let one = ["--prompt", "a"];
    for (args, status, expected) in [
        (&[][..], 2, "--prompt"),
        (&["--prompts", "prompts.jsonl"], 1, "prompts.jsonl:1: found the columns"),
        (&["--prompts", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (&[&one[..], &["--top-k", "5"]].concat(), 2, "--top-k, --top-p and --seed are for a --temperature above 0"),
        (&[&one[..], &["--seed", "5"]].concat(), 2, "--top-k, --top-p and --seed are for a --temperature above 0"),
        (&[&one[..], &["--temperature", "1", "--top-p", "1.5"]].concat(), 2, "--top-p: found 1.5; allowed: above 0"),
        (&[&one[..], &["--temperature", "1", "--top-k", "0"]].concat(), 2, "--top-k"),
        (&[&one[..], &["--stop", ""]].concat(), 2, "--stop: found an empty text"),
        (&[&one[..], &["--batch-size", "0"]].concat(), 2, "--batch-size"),
    ] {
        let text = fails(place.command(&[&generate[..], args].concat()), status);
        assert!(text.contains(expected), "{args:?}:\n{text}");
    }
    let eval = ["eval", "--model", "model", "--dataset", "rows.jsonl", "--dataset", "rows.jsonl"];
    let text = fails(place.command(&[&eval[..], &["--per-token", "losses.jsonl"]].concat()), 2);
    assert!(text.contains("--per-token is for one --dataset"), "{text}");
    place.write("one.jsonl", "{\"input_ids\": [5]}\n");
    let text = fails(place.command(&[&eval[..], &["--dataset", "one.jsonl"]].concat()), 1);
    assert!(text.contains("one.jsonl: no token of the 1 rows counts in the loss"), "{text}");
}
