//! Greedy texts of every case, with keys and values kept, are those of transformers (scripts/golden/generated.py).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use fsdp_qlora::testing::generate::{Finish, Sampling, generate};
use fsdp_qlora::testing::{Mode, ModelSpec, adapter};
use serde::Deserialize;

use super::{families, model_with};
use crate::common::{EngineOptions, golden, on_all_ranks};

/// generated.json.
#[derive(Deserialize)]
struct Generated {
    /// Length of each prompt, a beginning of the last row, and the number of new tokens.
    prompts: Vec<(usize, usize)>,
    /// By model/case.
    tokens: BTreeMap<String, Texts>,
}

/// The new tokens after each prompt.
#[derive(Deserialize)]
struct Texts {
    base: Vec<String>,
    adapter: Vec<String>,
}

fn check_case(name: &str, texts: &Texts, prompts: &[(usize, usize)], row: &[u32]) {
    let (model, case) = name.split_once('/').unwrap();
    let folder = golden(&format!("families/{model}"));
    let place = model_with(&folder.join(case).join("config.v5.json"), &folder.join("model.safetensors"));
    let spec = ModelSpec::load(place.path()).unwrap();
    let options = EngineOptions {
        model: place.path().into(),
        adapter: Some(adapter::load(&folder.join("adapter"), &spec).unwrap()),
        load_in_4bit: false,
        max_tokens: 80,
        ..EngineOptions::new("", Mode::Generate)
    };
    let shards = tempfile::tempdir().unwrap();
    on_all_ranks(1, |groups| {
        let mut engine = options.engine(groups, shards.path());
        for (with_adapter, expected) in [(false, &texts.base), (true, &texts.adapter)] {
            assert_eq!(expected.len(), prompts.len(), "{name}");
            for (&(length, max_new_tokens), expected) in prompts.iter().zip(expected) {
                let sampling = Sampling::greedy(max_new_tokens);
                let prompts = [row[..length].to_vec()];
                let new = generate(&mut engine, &prompts, &[], &sampling, with_adapter, &mut ()).unwrap();
                assert_eq!(new[0].finish, Finish::Length, "{name}");
                let found = new[0].tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
                assert_eq!(&found, expected, "{name}, adapter: {with_adapter}, {length} tokens");
            }
        }
    });
}

#[test]
fn greedy_texts_are_those_of_transformers() {
    let golden_files = families();
    let generated: Generated = serde_json::from_slice(&fs::read(golden("generated.json")).unwrap()).unwrap();
    let cases = |(name, model): (&String, &super::Model)| -> Vec<String> {
        model.cases.keys().map(|case| format!("{name}/{case}")).collect()
    };
    let all: BTreeSet<String> = golden_files.models.iter().flat_map(cases).collect();
    assert_eq!(generated.tokens.keys().cloned().collect::<BTreeSet<_>>(), all);
    for (name, texts) in &generated.tokens {
        check_case(name, texts, &generated.prompts, golden_files.rows.last().unwrap());
    }
}
