//! Checks that a checkpoint has the tensors of its architecture, and no others.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};

use super::source::{BaseModel, Dtype, TensorView};
use crate::files::{listed, shown, shown_path};
use crate::model::family::BnbConfig;
use crate::model::spec::{ModelSpec, TensorSpec};

impl BaseModel {
    /// Checks that every tensor of the architecture is there in the right shape, as bf16, f16 or f32 — or, for a
    /// projection, in bitsandbytes' NF4 layout — and that there is no other. Only `*.rotary_emb.inv_freq` and, with
    /// tied embeddings, an `lm_head.weight` equal to the embedding may be there besides, and with a text tower the
    /// other towers.
    ///
    /// One error names what is missing, wrong or unknown.
    pub fn check(&self, model: &ModelSpec) -> Result<()> {
        // The list of tensors has as many layers.
        ensure!(
            model.num_layers() <= self.num_tensors(),
            "{}: config.json: num_hidden_layers is {}, but there are only {} tensors",
            shown_path(self.dir()),
            model.num_layers(),
            self.num_tensors()
        );
        let specs = model.tensors();
        let mut problems = Vec::new();
        let mut known = BTreeSet::new();
        for spec in &specs {
            match self.get(&spec.name) {
                None => problems.push(format!("{} is missing", spec.name)),
                Some(view) => problems.extend(self.check_tensor(&view, spec).err().map(|error| format!("{error:#}"))),
            }
            known.insert(spec.name.clone());
            if self.is_bnb(&spec.name) {
                known.extend(Self::bnb_parts(&spec.name));
            }
        }
        let is_ignored = |name: &str| name.ends_with(".rotary_emb.inv_freq") || model.is_beside_text(name);
        let unknown = self.names().filter(|name| !known.contains(*name) && !is_ignored(name));
        for name in unknown {
            let embedding = &model.embedding.name;
            if *name != model.head.untied_name {
                problems.push(format!("{} is no tensor of this architecture", shown(name)));
            } else if !self.same_bytes(name, embedding)? {
                problems.push(format!("{name} differs from {embedding} although tie_word_embeddings is true"));
            }
        }
        problems.extend(model.quantization.iter().flat_map(|bnb| self.check_quantized(bnb, &specs)));
        if problems.is_empty() {
            return Ok(());
        }
        bail!("{}: tensors do not fit config.json:{}", shown_path(self.dir()), listed(&problems))
    }

    /// Checks `quantization_config` against what is in 4 bit.
    fn check_quantized(&self, bnb: &BnbConfig, specs: &[TensorSpec]) -> Vec<String> {
        let mut in_4bit = specs.iter().filter(|spec| spec.is_linear() && self.is_bnb(&spec.name)).peekable();
        if in_4bit.peek().is_none() {
            return vec![
                "quantization_config says that the checkpoint is in 4 bit, but none of its projections is; remove that key to have \
                 them quantized"
                    .into(),
            ];
        }
        let contradicted = in_4bit.filter_map(|spec| {
            let module = bnb.skips(spec.name.strip_suffix(".weight")?)?;
            let name = &spec.name;
            let key = "quantization_config.llm_int8_skip_modules";
            Some(format!("{name} is in 4 bit, although {key} names {}", shown(module)))
        });
        contradicted.collect()
    }

    fn check_tensor(&self, view: &TensorView, spec: &TensorSpec) -> Result<()> {
        let found = match view.dtype {
            Dtype::BF16 | Dtype::F16 | Dtype::F32 => view.shape.to_vec(),
            Dtype::U8 if spec.is_linear() => self.read_bnb(view.name)?.shape,
            other if spec.is_linear() => {
                bail!("{view}: dtype {other:?}, allowed: BF16, F16, F32, or bitsandbytes NF4 with uint8 storage")
            }
            Dtype::U8 if self.read_bnb(view.name).is_ok() => bail!(
                "{view}: it is in 4 bit, which only projections of layers may be; help: name {} in llm_int8_skip_modules when the model \
                 is quantized",
                view.name.trim_end_matches(".weight")
            ),
            other => bail!("{view}: dtype {other:?}, allowed: BF16, F16, F32"),
        };
        if found != spec.shape {
            bail!("{view}: shape {found:?}, config.json makes it {:?}", spec.shape);
        }
        Ok(())
    }

    fn same_bytes(&self, name: &str, other: &str) -> Result<bool> {
        let (a, b) = (self.tensor(name)?, self.tensor(other)?);
        let same = a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes;
        self.release(&a)?;
        self.release(&b)?;
        Ok(same)
    }
}

#[cfg(test)]
mod tests {
    use super::super::bnb;
    use super::super::source::tests::{Written, f32s, write};
    use super::*;
    use serde_json::{Value, json};
    use tempfile::TempDir;

    fn config_with(changes: &Value) -> ModelSpec {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
            "tie_word_embeddings": true, "max_position_embeddings": 32,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelSpec::parse(config.to_string().as_bytes(), "config.json").unwrap()
    }

    fn config() -> ModelSpec {
        config_with(&json!({}))
    }

    fn plain(config: &ModelSpec) -> Vec<Written> {
        let tensor = |spec: TensorSpec| f32s(&spec.name, &spec.shape, &vec![0.5; spec.num_elements()]);
        config.tensors().into_iter().map(tensor).collect()
    }

    fn check(tensors: &[Written], config: &ModelSpec) -> Result<()> {
        let dir = TempDir::new().unwrap();
        write(&dir.path().join("model.safetensors"), tensors);
        BaseModel::open(dir.path()).unwrap().check(config)
    }

    #[test]
    fn whole_models_pass() {
        let tied = config();
        let mut tensors = plain(&tied);
        check(&tensors, &tied).unwrap();
        tensors.push(f32s("lm_head.weight", &[10, 8], &[0.5; 80]));
        tensors.push(f32s("model.layers.0.self_attn.rotary_emb.inv_freq", &[2], &[1.0, 0.1]));
        check(&tensors, &tied).unwrap();
        let other = config_with(&json!({"tie_word_embeddings": false, "attention_bias": true, "mlp_bias": true}));
        check(&plain(&other), &other).unwrap();
    }

    #[test]
    fn other_towers_may_stand_beside_a_text_tower() {
        let config = config();
        let text = json!({"model_type": "mistral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10});
        let whole = json!({"model_type": "mistral3", "text_config": text}).to_string();
        let tower = ModelSpec::parse(whole.as_bytes(), "config.json").unwrap();
        let vision =
            ["vision_tower.a.weight", "multi_modal_projector.b.weight"].map(|name| f32s(name, &[2], &[0.5; 2]));
        let new_names = [plain(&tower), vision.to_vec()].concat();
        check(&new_names, &tower).unwrap();
        let mut old_names = new_names;
        for (name, ..) in &mut old_names {
            *name = name.replace("model.language_model.", "language_model.model.");
        }
        check(&old_names, &tower).unwrap();
        let error = check(&[plain(&config), vision.to_vec()].concat(), &config).unwrap_err().to_string();
        assert!(error.contains("model.vision_tower.a.weight is no tensor of this architecture"), "{error}");
        assert_eq!(error.lines().count(), 3, "{error}");
    }

    #[test]
    fn a_projection_may_be_nf4() {
        let config = config();
        let name = "model.layers.1.mlp.up_proj.weight";
        let mut tensors: Vec<_> = plain(&config).into_iter().filter(|tensor| tensor.0 != name).collect();
        let good = bnb::tests::nested(name, 12, 8);
        check(&[tensors.clone(), good].concat(), &config).unwrap();
        tensors.extend(bnb::tests::nested(name, 8, 12));
        let error = check(&tensors, &config).unwrap_err().to_string();
        assert!(error.contains("mlp.up_proj.weight: shape [8, 12], config.json makes it [12, 8]"), "{error}");
    }

    #[test]
    fn all_that_does_not_fit_is_named_at_once() {
        let config = config();
        let mut tensors = plain(&config);
        tensors.retain(|(name, ..)| name != "model.norm.weight" && name != "model.layers.1.mlp.down_proj.weight");
        tensors.push(f32s("lm_head.weight", &[10, 8], &[0.25; 80]));
        tensors.push(f32s("score.weight", &[1], &[0.25]));
        for (name, dtype, shape, bytes) in &mut tensors {
            match name.as_str() {
                "model.layers.0.self_attn.k_proj.weight" => *shape = vec![8, 4],
                "model.layers.1.input_layernorm.weight" => (*dtype, *bytes) = (Dtype::U8, vec![0; 8]),
                "model.layers.1.self_attn.o_proj.weight" => (*dtype, *bytes) = (Dtype::I8, vec![0; 64]),
                _ => {}
            }
        }
        let error = check(&tensors, &config).unwrap_err().to_string();
        for expected in [
            "model.norm.weight is missing",
            "model.layers.1.mlp.down_proj.weight is missing",
            "k_proj.weight: shape [8, 4], config.json makes it [4, 8]",
            "input_layernorm.weight: dtype U8, allowed: BF16, F16, F32",
            "o_proj.weight: dtype I8, allowed: BF16, F16, F32, or bitsandbytes NF4",
            "score.weight is no tensor of this architecture",
            "lm_head.weight differs from model.embed_tokens.weight",
        ] {
            assert!(error.contains(expected), "{expected} is not in {error}");
        }
        assert_eq!(error.lines().count(), 8, "{error}");
    }

    #[test]
    fn a_checkpoint_in_4_bit_may_keep_projections_plain() {
        let bnb = |skip_modules: &[&str]| ModelSpec {
            quantization: Some(BnbConfig { skip_modules: skip_modules.iter().map(|m| m.to_string()).collect() }),
            ..config()
        };
        let name = "model.layers.1.mlp.up_proj.weight";
        let plain = plain(&config());
        let mut mixed: Vec<_> = plain.iter().filter(|tensor| tensor.0 != name).cloned().collect();
        mixed.extend(bnb::tests::nested(name, 12, 8));
        check(&mixed, &bnb(&[])).unwrap();
        check(&mixed, &bnb(&["lm_head", "model.layers.0", "mlp", "model.layers.1.mlp.up"])).unwrap();
        for module in ["model.layers.1.mlp.up_proj", "model.layers.1", "up_proj"] {
            let error = check(&mixed, &bnb(&["lm_head", module])).unwrap_err().to_string();
            let expected =
                format!("{name} is in 4 bit, although quantization_config.llm_int8_skip_modules names {module}");
            assert!(error.contains(&expected), "{error}");
        }
        let error = check(&plain, &bnb(&[])).unwrap_err().to_string();
        assert!(error.contains("in 4 bit, but none of its projections is"), "{error}");
    }

    /// transformers quantizes the head too if a list of modules to skip is given that does not name it.
    #[test]
    fn a_head_in_4_bit_is_refused_with_advice() {
        let config = config_with(&json!({"tie_word_embeddings": false}));
        let mut tensors = plain(&config);
        tensors.retain(|tensor| tensor.0 != "lm_head.weight");
        tensors.extend(bnb::tests::nested("lm_head.weight", 10, 8));
        let error = check(&tensors, &config).unwrap_err().to_string();
        assert!(error.contains("lm_head.weight: it is in 4 bit") && error.contains("help: name lm_head in"), "{error}");
    }

    #[test]
    fn sizes_of_a_config_are_compared_with_the_tensors_before_lists_are_made() {
        let config = config_with(&json!({"num_hidden_layers": 999}));
        let error = check(&plain(&self::config()), &config).unwrap_err().to_string();
        assert!(error.contains("num_hidden_layers is 999, but there are only 20 tensors"), "{error}");
        let mut many = plain(&self::config());
        many.extend((0..100).map(|i| f32s(&format!("extra\x1b.{i}"), &[1], &[0.5])));
        let error = check(&many, &self::config()).unwrap_err().to_string();
        assert!(error.ends_with("\n  and 80 more") && error.contains("extra\\u{1b}.0 is no tensor"), "{error}");
    }
}
