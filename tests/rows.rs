//! Checks rows in every form: what `data` prints of them, and what training from them gives.

mod common;

use std::path::Path;

use common::cli::{Place, fails, metrics, succeeds, train_with};
use common::golden;
use serde_json::{Value, json};

/// Puts a chat template of the golden tokenizer into the model's folder.
fn use_template(place: &Place, name: Option<&str>) {
    if let Some(name) = name {
        let template = golden(&format!("tokenizer/{name}_template.jinja"));
        std::fs::copy(template, place.path("model/chat_template.jinja")).unwrap();
    }
}

fn data(place: &Place, args: &[&str]) -> String {
    let output = place.command(&[&["data", "-c", "recipe.yaml"], args].concat()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn data_json(place: &Place, args: &[&str]) -> Value {
    serde_json::from_str(&data(place, &[args, &["--json"]].concat())).unwrap()
}

/// TRL's SFTTrainer trains from the same files; the order of sums is another one.
#[test]
fn steps_from_raw_rows_are_those_of_trl() {
    let golden_losses: Value = serde_json::from_slice(&std::fs::read(golden("sft/losses.json")).unwrap()).unwrap();
    let mut recipe = golden_losses["recipe"].as_object().unwrap().clone();
    recipe.insert("save_steps".into(), Value::Null);
    let forms = golden_losses["forms"].as_object().unwrap();
    assert!(forms.len() >= 12);
    for (name, form) in forms {
        let place = Place::new();
        use_template(&place, form["template"].as_str());
        let start = golden("qlora_steps/start");
        let rows = golden(&format!("sft/{name}.jsonl"));
        place.write(
            "recipe.yaml",
            json!({
                "model": "model", "output_dir": "out", "lora": {"adapter": start, "lora_dropout": 0.0},
                "quantization": {"load_in_4bit": false},
                "data": {"train": rows, "packing": false, "shuffle": false, "loss_on": form["loss_on"]},
                "training": recipe,
            })
            .to_string(),
        );
        succeeds(place.command(&train_with(&[])));
        let ours = metrics(&place.read("out/metrics.jsonl"));
        let theirs = form["losses"].as_array().unwrap();
        assert_eq!((ours.len(), theirs.len()), (100, 100), "{name}");
        for (ours, theirs) in ours.iter().zip(theirs) {
            let (loss, expected) = (ours["loss"].as_f64().unwrap(), theirs.as_f64().unwrap());
            assert!(
                (loss - expected).abs() <= 1e-5 * expected,
                "{name}, step {}: {loss}, TRL {expected}",
                ours["step"]
            );
        }
    }
}

#[test]
fn data_shows_each_token_and_what_counts() {
    let place = Place::new();
    place.write(
        "rows.jsonl",
        "{\"input_ids\": [5, 6, 7, 8], \"labels\": [5, -100, 7, 8], \"topic\": \"x\"}\n{\"input_ids\": [9]}\n\
         {\"input_ids\": [9, 10, 11, 12, 13, 14]}\n",
    );
    let sets = ["--set", "data.max_length=4", "--set", "data.eval=null"];
    let shown = data_json(&place, &sets);
    let train = &shown["train"];
    assert_eq!(shown["eval"], Value::Null);
    let counts = ["rows", "documents", "sequences", "tokens", "target_tokens", "truncated", "without_target"];
    assert_eq!(counts.map(|name| train[name].as_u64().unwrap()), [3, 2, 2, 8, 5, 1, 1], "{train}");
    assert_eq!(train["lengths"]["longest"], 4);
    assert_eq!(train["overlong_at"], json!(["rows.jsonl:3"]));
    assert_eq!(train["without_target_at"], json!(["rows.jsonl:2"]));
    assert_eq!(train["notes"], json!(["columns that nothing reads: `topic` in 1 row"]));
    let rows = train["first_rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    let tokens = rows[0]["documents"][0]["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().map(|t| t["target"] == true).collect::<Vec<_>>(), [false, false, true, true]);
    assert_eq!(tokens[1]["id"], 6);
    assert_eq!(rows[1], json!({"place": "rows.jsonl:2", "documents": []}));

    let text = data(&place, &[&sets[..], &["--rows", "2"]].concat());
    for words in [
        "training data\n\nrows.jsonl:1\n  document of sequence 0: 4 tokens, 2 of them count\n         │ 5:",
        "  counts │ 7:",
        "         └ end of the document\n\nrows.jsonl:2\n  nothing is left of this row\n",
        "                                          rows  3\n",
        "                       truncated to 4 tokens  1: rows.jsonl:3\n",
        "dropped because no token of them counts  1: rows.jsonl:2\n",
        "note: columns that nothing reads: `topic` in 1 row\n",
    ] {
        assert!(text.contains(words), "{words}\nis not in\n{text}");
    }
    assert!(!text.contains("rows.jsonl:3\n  document"), "{text}");
    let refused = fails(place.command(&["data", "-c", "recipe.yaml", "--device", "cpu"]), 2);
    assert!(refused.contains("data computes nothing"), "{refused}");
}

#[test]
fn data_shows_what_is_held_out() {
    let place = Place::new();
    let row = |i: usize| format!("{{\"text\": \"row number {i}\"}}\n");
    place.write("rows.jsonl", (0..40).map(row).collect::<String>());
    let shown = data_json(&place, &["--set", "data.eval=0.3", "--rows", "40"]);
    let places = |part: &str| {
        let rows = shown[part]["first_rows"].as_array().unwrap();
        rows.iter().map(|row| row["place"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let (train, eval) = (places("train"), places("eval"));
    assert_eq!((train.len() + eval.len(), eval.is_empty()), (40, false));
    assert!(train.iter().all(|place| !eval.contains(place)));
}

/// A message that a template leaves out would vanish without a word.
#[test]
fn messages_that_the_template_leaves_out_are_told() {
    let place = Place::new();
    let template = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.role + ': ' + m.content | trim }}\n\
                    {% endif %}{% endfor %}";
    place.write("model/chat_template.jinja", template);
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let row = |messages: Value| json!({ "messages": messages }).to_string();
    place.write(
        "rows.jsonl",
        [
            row(json!([message("user", " a \"b\" "), message("critic", "bad"), message("assistant", "c")])),
            row(json!([message("user", "a"), message("critic", "worse"), message("critic", "worst")])),
            row(json!([message("user", "a"), message("critic", " "), message("assistant", "\n")])),
        ]
        .join("\n"),
    );
    let notes = data_json(&place, &[])["train"]["notes"].clone();
    let said = "3 messages of the role critic that the chat template leaves out or changes: rows.jsonl:1, rows.jsonl:2, \
                rows.jsonl:2";
    assert_eq!(notes, json!([said]));
    let text = succeeds(place.command(&train_with(&["training.max_steps=1"])));
    assert!(text.contains(said), "{text}");
}

#[test]
fn sources_have_weights_and_splits() {
    let place = Place::new();
    std::fs::create_dir(place.path("set")).unwrap();
    place.write("set/train-00000-of-00001.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n");
    place.write("set/test.jsonl", "{\"question\": \"c\", \"answer\": \"d\"}\n");
    place.write("more.csv", "text\none\ntwo\n");
    place.write(
        "recipe.yaml",
        "model: model\ndata:\n  packing: false\n  train:\n  - {path: set, split: train, weight: 2}\n  - {path: more.csv, weight: 0.5, \
         columns: {}}\n  eval: {path: set, split: test}\n  columns: {prompt: question, completion: answer}\n",
    );
    let shown = data_json(&place, &[]);
    let texts = |part: &str| {
        let rows = shown[part]["first_rows"].as_array().unwrap();
        let documents = rows.iter().flat_map(|row| row["documents"].as_array().unwrap());
        documents.map(|document| document["text"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(texts("train"), ["ab<|im_end|>", "ab<|im_end|>", "two<|im_end|>"]);
    assert_eq!(texts("eval"), ["cd<|im_end|>"]);
    let refused = fails(place.command(&["data", "-c", "recipe.yaml", "--set", "data.train=set"]), 1);
    assert!(
        refused.contains("which are splits; help: name the file, or in a recipe the split: {path: set, split: train}"),
        "{refused}"
    );
}

/// Checks the table of the documentation: what counts of each example, and that TRL makes the same of it where the
/// table says so.
#[test]
fn the_table_of_rows_says_what_is_trained() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/rows.json");
    let table: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let trl: Value = serde_json::from_slice(&std::fs::read(golden("rows/trl.json")).unwrap()).unwrap();
    let mut formats: Vec<&str> = table.iter().map(|entry| entry["format"].as_str().unwrap()).collect();
    formats.dedup();
    assert_eq!(formats, ["text", "prompt_completion", "messages", "sharegpt", "alpaca", "tokenized"]);
    for entry in &table {
        let place = Place::new();
        use_template(&place, entry["template"].as_str());
        place.write("rows.jsonl", entry["row"].to_string());
        let loss_on = format!("data.loss_on={}", entry["loss_on"].as_str().unwrap());
        let format = |name: &str| {
            let set = format!("data.format={name}");
            data_json(&place, &["--set", &loss_on, "--set", &set, "--set", "data.packing=false"])
        };
        let shown = format(entry["format"].as_str().unwrap());
        assert_eq!(shown, format("auto"), "{entry}");
        let documents = shown["train"]["first_rows"][0]["documents"].as_array().unwrap();
        let trained: Vec<String> = documents.iter().map(trained).collect();
        assert_eq!(json!(trained), entry["trained"], "{}", entry["row"]);
        if entry["trl_1_16"] == "the same" {
            let label = |t: &Value| if t["target"] == true { t["id"].clone() } else { json!(-100) };
            let all = |of: &dyn Fn(&Value) -> Value| {
                let tokens = documents.iter().flat_map(|document| document["tokens"].as_array().unwrap());
                tokens.map(of).collect::<Vec<_>>()
            };
            let theirs = &trl[format!("{} {}", entry["loss_on"].as_str().unwrap(), entry["row"])];
            let mut labels = theirs["labels"].clone();
            // Nothing predicts the first token of a document.
            let mut first = 0;
            for document in documents {
                labels[first] = json!(-100);
                first += document["tokens"].as_array().unwrap().len();
            }
            assert_eq!(json!(all(&|t| t["id"].clone())), theirs["input_ids"], "{}", entry["row"]);
            assert_eq!(json!(all(&label)), labels, "{}", entry["row"]);
        }
    }
}

/// The tokens of a document as one text, those that count between 【 and 】.
fn trained(document: &Value) -> String {
    let tokens = document["tokens"].as_array().unwrap();
    let runs = tokens.chunk_by(|a, b| a["target"] == b["target"]);
    let text = |run: &[Value]| {
        let text: String = run.iter().map(|t| plain(t["token"].as_str().unwrap())).collect();
        if run[0]["target"] == true { format!("【{text}】") } else { text }
    };
    runs.map(text).collect()
}

/// Undoes what a byte-level vocabulary does to spaces and ends of lines.
fn plain(token: &str) -> String {
    token.replace('Ġ', " ").replace('Ċ', "\n")
}
