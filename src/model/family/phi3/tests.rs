use super::super::tests::{changed, error_of, spec_of};
use super::*;
use crate::model::spec::{ModuleId, Rows};

fn phi(changes: Value) -> Value {
    changed(
        json!({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}),
        &changes,
    )
}

fn longrope(len: usize) -> Value {
    json!({"type": "longrope", "short_factor": vec![1.0; len], "long_factor": vec![2; len]})
}

#[test]
fn rows_of_a_fused_module_are_queries_keys_values_then_gate_up() {
    let spec = spec_of(phi(json!({"num_key_value_heads": 2})));
    let layer = &spec.layers[1];
    let modules: Vec<_> = layer.modules().map(|module| (module.name.as_str(), module.out_features)).collect();
    assert_eq!(
        modules,
        [
            ("model.layers.1.self_attn.qkv_proj", 128),
            ("model.layers.1.self_attn.o_proj", 64),
            ("model.layers.1.mlp.gate_up_proj", 192),
            ("model.layers.1.mlp.down_proj", 64)
        ]
    );
    let rows = |rows: &Rows| (rows.module, rows.rows.clone());
    let (attention, mlp) = (&layer.attention, &layer.mlp);
    assert_eq!(
        [&attention.q, &attention.k, &attention.v].map(rows),
        [(ModuleId::Qkv, 0..64), (ModuleId::Qkv, 64..96), (ModuleId::Qkv, 96..128)]
    );
    assert_eq!([&mlp.gate, &mlp.up].map(rows), [(ModuleId::GateUp, 0..96), (ModuleId::GateUp, 96..192)]);
    let numbers: Vec<u32> = spec.modules().map(|module| module.number).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn absent_keys_are_the_defaults_of_the_class() {
    let spec = spec_of(phi(json!({})));
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.window), (4, 16, None));
    assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (4096, 1e-5, false));
    let rope = RopeConfig {
        rope_theta: 10_000.0,
        rotary_dim: 16,
        max_position_embeddings: 4096,
        scaling: RopeScaling::Default,
        ..spec.ropes[0].clone()
    };
    assert_eq!(spec.ropes, [rope]);
    assert_eq!(spec_of(phi(json!({"sliding_window": 7}))).layers[1].attention.window, Some(7));
}

#[test]
fn longrope_in_both_spellings() {
    let old = spec_of(phi(json!({"max_position_embeddings": 131_072, "partial_rotary_factor": 0.75,
        "rope_theta": 50_000, "rope_scaling": longrope(6)})));
    let RopeScaling::LongRope(found) = &old.ropes[0].scaling else { panic!("{:?}", old.ropes) };
    assert_eq!((old.ropes[0].rotary_dim, found.original_max_position_embeddings), (12, 4096));
    assert_eq!((&found.short_factor, &found.long_factor), (&vec![1.0; 6], &vec![2.0; 6]));
    // √(1 + ln 32 / ln 4096), as transformers has it for the models of 128k.
    assert!((found.attention_factor - 1.190_238_071_4).abs() < 1e-10, "{found:?}");
    let mut parameters = longrope(6);
    let inner = json!({"rope_type": "su", "rope_theta": 50_000, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096});
    parameters.as_object_mut().unwrap().extend(inner.as_object().unwrap().clone());
    let new = spec_of(phi(json!({"max_position_embeddings": 131_072, "rope_parameters": parameters})));
    assert_eq!(old, new);
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let mut contradiction = longrope(8);
    contradiction[ORIGINAL_LENGTH] = json!(2048);
    for (changes, expected) in [
        (json!({"resid_pdrop": 0.1}), "resid_pdrop: found 0.1"),
        (json!({"attention_bias": true}), "attention_bias: found true"),
        (json!({"embd_layer": {}}), "embd_layer: found {}, not a key"),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), "rope_scaling.rope_type: found \"linear\""),
        (json!({"rope_scaling": longrope(7)}), "rope_scaling.short_factor: found [1.0,"),
        (json!({"rope_scaling": {"type": "longrope"}}), "long_factor: missing, a list of 8 numbers above 0"),
        (
            json!({"rope_scaling": contradiction}),
            "original_max_position_embeddings: it must be the one beside it, 4096",
        ),
        (json!({"partial_rotary_factor": 0.45}), "partial_rotary_factor: found 0.45, allowed: at most 1, and an even"),
        (json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor: found 1.5, allowed: at most 1"),
    ] {
        let error = error_of(phi(changes));
        assert!(error.contains(expected), "{expected} is not in {error}");
    }
}
