//! Adapters of other tools: what changes the base or the arithmetic is refused by name, and so is what contradicts the
//! tensors.

use serde_json::{Value, json};

use crate::common::cli::{Place, TRAIN, fails, succeeds};

const EVAL: [&str; 7] = ["eval", "--model", "model", "--adapter", "out", "--dataset", "rows.jsonl"];

/// A place with a trained adapter in `out`, and its config.
fn trained() -> (Place, Value) {
    let place = Place::new();
    succeeds(place.command(&TRAIN));
    let config = serde_json::from_slice(&place.read("out/adapter_config.json")).unwrap();
    (place, config)
}

#[test]
fn configs_that_belong_to_another_base_or_another_arithmetic() {
    let (place, whole) = trained();
    for (key, value) in [
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("olora")),
        ("r", json!(4.7)),
        ("r", json!(1e30)),
        ("r", json!(8)),
        ("use_dora", json!(true)),
        ("target_modules", json!(["q_proj"])),
        ("exclude_modules", json!(["q_proj"])),
        ("a_key_of_tomorrow", json!(2)),
    ] {
        let mut config = whole.clone();
        config[key] = value;
        place.write("out/adapter_config.json", config.to_string());
        let text = fails(place.command(&EVAL), 1);
        assert!(text.contains("adapter_config.json") && text.contains(key), "{key} in {text}");
        let going_on = ["train", "-c", "recipe.yaml", "--set", "lora={r: 4, adapter: out}", "--set", "output_dir=new"];
        let text = fails(place.command(&going_on), 2);
        assert!(text.contains("lora.r: it is given by the adapter"), "{text}");
    }
}

#[test]
fn another_base_is_said_and_the_start_is_kept() {
    let (place, mut config) = trained();
    config["init_lora_weights"] = json!("gaussian");
    config["base_model_name_or_path"] = json!("org/other-7b");
    place.write("out/adapter_config.json", config.to_string());
    let text = succeeds(place.command(&EVAL));
    assert!(text.contains("--adapter: adapter_config.json says that it was made for \"org/other-7b\""), "{text}");
    place.write(
        "on.yaml",
        "model: model\noutput_dir: new\ndata: {train: rows.jsonl, max_length: 128}\nlora: {adapter: out}\n\
         training: {global_batch_size: 6, max_steps: 1, learning_rate: 1.0e-2}\n",
    );
    succeeds(place.command(&["train", "-c", "on.yaml"]));
    let saved: Value = serde_json::from_slice(&place.read("new/adapter_config.json")).unwrap();
    assert_eq!(saved["init_lora_weights"], json!("gaussian"));
}

/// An adapter of another model is refused with the model that it was made for and how that differs from this one.
#[test]
fn an_adapter_of_another_model() {
    let place = Place::new();
    let families = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families");
    let mistral3 = [
        "made for \"mistral3\"",
        "its layers are \"model.language_model.layers\", those of this model \"model.layers\"",
    ];
    let phi3 = [
        "made for \"phi3\"",
        "its number of layers is 1, that of this model 2",
        "its qkv_proj is no module of this model",
    ];
    let olmo2 = [
        "made for \"olmo2-64\"",
        "family llama: ",
        "its down_proj has 64 inputs and 128 outputs, that of this model 128 and 64",
    ];
    for (adapter, words) in [("mistral3", &mistral3[..]), ("phi3", &phi3), ("olmo2-64", &olmo2)] {
        let adapter = families.join(adapter).join("adapter");
        let text = fails(
            place.command(&[
                "eval",
                "--model",
                "model",
                "--adapter",
                adapter.to_str().unwrap(),
                "--dataset",
                "rows.jsonl",
            ]),
            1,
        );
        assert!(text.contains("\nhelp: the adapter was made for "), "{text}");
        for word in words {
            assert!(text.contains(word), "{word} is not in:\n{text}");
        }
    }
}
