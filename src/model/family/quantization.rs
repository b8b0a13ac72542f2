//! `quantization_config` of a config.json: a checkpoint that bitsandbytes has quantized to NF4 already.

use serde_json::{Value, json};

use super::json_fields::Fields;

/// Keys of a bitsandbytes `quantization_config` that do not change what the stored weights are.
const HARMLESS_BNB: &[&str] = &[
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_threshold",
];

/// What counts of a bitsandbytes `quantization_config`. Each tensor says for itself whether it is in 4 bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BnbConfig {
    /// `llm_int8_skip_modules`: modules that are not in 4 bit.
    pub skip_modules: Vec<String>,
}

impl BnbConfig {
    /// The entry of [`Self::skip_modules`] that names a module as transformers 5 understands it: as its path, the
    /// beginning of its path up to a dot, or the end of its path. `mlp` does not name `model.layers.1.mlp.up_proj`.
    /// Regular expressions are not tried.
    pub fn skips(&self, module: &str) -> Option<&str> {
        let names = |skipped: &&str| {
            let begins = module.strip_prefix(skipped).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            begins || module.ends_with(skipped)
        };
        self.skip_modules.iter().map(String::as_str).find(names)
    }
}

/// Takes the key; a method other than bitsandbytes' NF4 is a problem.
pub(super) fn read(fields: &mut Fields) -> Option<BnbConfig> {
    if !fields.has("quantization_config") {
        return None;
    }
    let mut quantization = fields.object("quantization_config");
    let method = quantization.take("quant_method");
    if let Some(other) = method.clone().filter(|method| method != "bitsandbytes") {
        quantization.refuse(
            "quant_method",
            other,
            "\"bitsandbytes\" in NF4; use the 16-bit model that this one was made from",
        );
        // The other keys mean something else with this method.
        quantization.map.clear();
    } else {
        if method.is_none() {
            quantization.problems.push("quantization_config.quant_method: missing, allowed: \"bitsandbytes\"".into());
        }
        // Written out, because bitsandbytes' own default of the type is fp4.
        if !quantization.has("bnb_4bit_quant_type") {
            quantization.problems.push("quantization_config.bnb_4bit_quant_type: missing, allowed: \"nf4\"".into());
        }
        quantization.check_neutral([
            ("load_in_8bit", json!(false)),
            ("load_in_4bit", json!(true)),
            ("bnb_4bit_quant_type", json!("nf4")),
            ("bnb_4bit_quant_storage", json!("uint8")),
        ]);
    }
    let strings = |value: &Value| value.as_array()?.iter().map(|v| v.as_str().map(str::to_string)).collect();
    let none = Some(Vec::new());
    let skip_modules =
        quantization.parse("llm_int8_skip_modules", none, Vec::new(), "a list of names of modules", strings);
    quantization.map.retain(|key, _| !HARMLESS_BNB.contains(&key.as_str()));
    quantization.check_rest();
    fields.problems.append(&mut quantization.problems);
    Some(BnbConfig { skip_modules })
}
