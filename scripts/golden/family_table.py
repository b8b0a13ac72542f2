"""The tiny models of families.py: a row a model, its cases, and each feature with the change that takes it away.

Configs are spelled as the files of transformers 4 are (families that are younger: as those of 5). A key that a released
file leaves out is left out here as well, so that the default of the class is tested.
"""

from dataclasses import dataclass, field

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"head_dim": 32}  # heads together are wider than hidden_size
ONE_LAYER = {"num_hidden_layers": 1}
SHORT_WINDOW = {"sliding_window": 8}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass
class Case:
    """Changes to the model's config, and features: a name and the changes that take the feature away.

    A change of a feature is a dict of config keys, or a string: the end of the names of tensors that become neutral.
    """

    changes: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)
    same: dict = field(default_factory=dict)  # changes that must not matter


@dataclass
class Model:
    """One file of weights and one adapter, for all its cases."""

    architecture: str
    model_type: str
    config: dict
    cases: dict
    outer: dict = field(default_factory=dict)  # keys beside text_config
    language_model: bool = False  # the text model of a model that also sees
    new_names: bool = False  # tensors of the file have the names that transformers 5 gives them in memory
    bfloat16: bool = False  # heads as wide as GPUs take them, and the errors of transformers' own bf16 are kept


def decoder(architecture, model_type, config, **cases):
    return Model(architecture, model_type, SIZES | config, cases)


def biases(*names):
    return {f"{name} bias": f"{name}_proj.bias" for name in names}


QKV, QKVO, MLP = biases("q", "k", "v"), biases("q", "k", "v", "o"), biases("gate", "up", "down")
QK_NORM = {"q norm": "q_norm.weight", "k norm": "k_norm.weight"}
BLOCK_NORMS = {"first norm": "input_layernorm.weight", "second norm": "post_attention_layernorm.weight"}
GEMMA_NORMS = BLOCK_NORMS | {"third norm": "pre_feedforward_layernorm.weight",
                             "fourth norm": "post_feedforward_layernorm.weight"}
OLMO_NORMS = {"first norm": "post_attention_layernorm.weight", "second norm": "post_feedforward_layernorm.weight"}

# One number for each pair of rotated dimensions: 8 for the whole of a head of 16, 6 for three quarters of it.
SHORT, LONG = [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.3, 2.6], [1.0, 1.5, 2.5, 4.0, 6.0, 9.0, 13.0, 18.0]


def longrope(spelling, width):
    """Rows up to 24 tokens take the short factors, longer ones the long."""
    scaling = {spelling: "longrope", "short_factor": SHORT[: width // 2], "long_factor": LONG[: width // 2]}
    return {"rope_scaling": scaling, "original_max_position_embeddings": 24, "rope_theta": 10000.0}


def longrope_features(spelling, width):
    scaling = longrope(spelling, width)["rope_scaling"]
    return {
        "short factors": {"rope_scaling": scaling | {"short_factor": scaling["long_factor"]}},
        "long factors": {"rope_scaling": scaling | {"long_factor": scaling["short_factor"]}},
        "attention factor": {"rope_scaling": scaling | {"attention_factor": 1.0}},
        "original length": {"original_max_position_embeddings": 96},
    }


MINISTRAL_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16,
                  "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
MSCALE_ROPE = MINISTRAL_ROPE | {"mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.0, "beta_fast": 2.0, "rope_theta": 1e4,
                               "original_max_position_embeddings": 64}


def ministral_rope(**changes):
    return {"rope_parameters": MINISTRAL_ROPE | changes}


def mscale_rope(**changes):
    return {"rope_parameters": MSCALE_ROPE | changes}


GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.55, "logits_scaling": 1.7}
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
          "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
GEMMA3 = {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 8, "sliding_window_pattern": 2,
          "rope_theta": 1e6, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
          "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
GEMMA3_FEATURES = GEMMA_NORMS | QK_NORM | {
    "window": {"sliding_window": 4096}, "pattern": {"sliding_window_pattern": 6}, "scaling": {"rope_scaling": None},
    "theta": {"rope_theta": 1e4}, "local theta": {"rope_local_base_freq": 1e6},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 32}, "tanh": {"hidden_activation": "silu"}}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}

MODELS = {
    "llama": decoder(
        "LlamaForCausalLM", "llama", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, **UNTIED},
        default=Case(features=BLOCK_NORMS)),
    "qwen2": decoder(
        "Qwen2ForCausalLM", "qwen2",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, **TIED, "use_sliding_window": False, "max_window_layers": 1} | SHORT_WINDOW,
        default=Case(features=QKV | {"ignored window": {"use_sliding_window": True}}),
        window=Case({"use_sliding_window": True}, {
            "window": {"sliding_window": 4096}, "max_window_layers": {"max_window_layers": 0}, "size": {"sliding_window": 9}}),
        yarn=Case({"rope_scaling": {"type": "yarn"} | {k: v for k, v in YARN.items() if k != "rope_type"},
                   "rope_theta": 10000.0}, {"yarn": {"rope_scaling": None}})),
    "qwen2-untied": decoder(
        "Qwen2ForCausalLM", "qwen2", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, **ONE_LAYER},
        default=Case(features=QKV, same={"attention_bias": False})),
    "qwen3": decoder(
        "Qwen3ForCausalLM", "qwen3",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False, "max_window_layers": 1, **UNTIED, **WIDE,
         **SHORT_WINDOW},
        default=Case(features=QK_NORM | {"ignored window": {"use_sliding_window": True}}),
        window=Case({"use_sliding_window": True}, {
            "window": {"sliding_window": 4096}, "max_window_layers": {"max_window_layers": 0}}),
        # attn_factor is another project's word: it is not attention_factor and changes nothing.
        yarn=Case({"rope_scaling": YARN | {"attn_factor": 0.8782488562869419}, "rope_theta": 10000.0}, {
            "yarn": {"rope_scaling": None}, "attention factor": {"rope_scaling": YARN | {"attention_factor": 1.0}}},
            same={"rope_scaling": YARN})),
    "qwen3-bias": decoder(
        "Qwen3ForCausalLM", "qwen3",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 16, "attention_bias": True, **TIED, **ONE_LAYER},
        default=Case(features=QKVO | QK_NORM)),
    "mistral": decoder(
        "MistralForCausalLM", "mistral", {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **UNTIED, **WIDE, **ONE_LAYER,
                                          "sliding_window": None},
        default=Case(features={"no window": SHORT_WINDOW}),
        window=Case(SHORT_WINDOW, {"window": {"sliding_window": None}, "size": {"sliding_window": 9}})),
    "mistral-tied": decoder(
        "MistralForCausalLM", "mistral", {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "head_dim": None, **TIED, **ONE_LAYER,
                                          **SHORT_WINDOW},
        default=Case(features={"window": {"sliding_window": None}})),
    "ministral3": decoder(
        "Ministral3ForCausalLM", "ministral3",
        {"rms_norm_eps": 1e-5, "sliding_window": None, **UNTIED, **WIDE, **ONE_LAYER, **ministral_rope()},
        default=Case(features={
            "beta": ministral_rope(llama_4_scaling_beta=0.0), "original length": ministral_rope(original_max_position_embeddings=64),
            "mscale pair": ministral_rope(mscale_all_dim=0.0), "factor": ministral_rope(factor=2.0)}),
        mscale=Case(mscale_rope(), {
            "mscale": mscale_rope(mscale=0.5), "all dim": mscale_rope(mscale_all_dim=1.0), "beta_fast": mscale_rope(beta_fast=32.0),
            "theta": mscale_rope(rope_theta=1e6)})),
    "mistral3": Model(
        "Mistral3ForConditionalGeneration", "mistral3", SIZES | {"rms_norm_eps": 1e-5, "sliding_window": None, **WIDE, **ONE_LAYER,
                                                                 "model_type": "ministral3", **ministral_rope()},
        {"default": Case(features={"beta": ministral_rope(llama_4_scaling_beta=0.0)})}, language_model=True),
    "mistral3-untied": Model(
        "Mistral3ForConditionalGeneration", "mistral3",
        SIZES | {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1e9, "head_dim": 16, **ONE_LAYER, **SHORT_WINDOW},
        {"default": Case(features={"window": {"sliding_window": None}, "theta": {"rope_theta": 1e4}})},
        outer=UNTIED, language_model=True, new_names=True),
    "smollm3": decoder(
        "SmolLM3ForCausalLM", "smollm3", {"rope_theta": 5e3, "rms_norm_eps": 1e-6, "no_rope_layer_interval": 2},
        default=Case(features={"NoPE": {"no_rope_layers": [1, 1]}, "the other layer": {"no_rope_layers": [0, 1]}},
                     same={"sliding_window": 8, "use_sliding_window": False}),
        listed=Case({"no_rope_layers": [0, 1], "no_rope_layer_interval": 4}, {"list": {"no_rope_layers": [1, 1]}}),
        window=Case({"use_sliding_window": True, **SHORT_WINDOW}, {
            "window": {"use_sliding_window": False}, "on the layer without RoPE only": {"layer_types": ["sliding_attention"] * 2}})),
    "smollm3-bias": decoder(
        "SmolLM3ForCausalLM", "smollm3",
        {"rms_norm_eps": 1e-6, "attention_bias": True, "mlp_bias": True, **UNTIED, **ONE_LAYER},
        # The only layer has RoPE: without it a bias of k adds the same to all scores of a query and changes nothing.
        default=Case(features=QKVO | MLP | {"RoPE": {"no_rope_layers": [0]}})),
    "granite": decoder(
        "GraniteForCausalLM", "granite", {"rope_theta": 1e4, "rms_norm_eps": 1e-5, **TIED, **GRANITE},
        default=Case(features={name: {name: 0.25 if name == "attention_multiplier" else 1.0} for name in GRANITE})),
    "granite-bias": decoder(
        "GraniteForCausalLM", "granite",
        {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True, **UNTIED, **ONE_LAYER},
        # Without attention_multiplier the scores are not scaled at all.
        default=Case(features=QKVO | MLP | {"scale 1": {"attention_multiplier": 0.25}})),
    "seed_oss": decoder(
        "SeedOssForCausalLM", "seed_oss",
        {"rope_theta": 1e7, "rms_norm_eps": 1e-6, "rope_scaling": {"rope_type": "default"}, **UNTIED, **WIDE, **ONE_LAYER},
        default=Case(features=QKV, same={"residual_dropout": 0.0, "attention_dropout": 0.0, "pretraining_tp": 1})),
    "seed_oss-bias": decoder(
        "SeedOssForCausalLM", "seed_oss",
        {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "head_dim": 16, "attention_bias": False, "attention_out_bias": True,
         "mlp_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0, **TIED, **ONE_LAYER},
        default=Case(features=biases("o") | MLP)),
    "olmo2": decoder(
        "Olmo2ForCausalLM", "olmo2", {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "num_key_value_heads": 4, **UNTIED, **ONE_LAYER},
        default=Case(features=QK_NORM | OLMO_NORMS)),
    "olmo2-bias": decoder(
        "Olmo2ForCausalLM", "olmo2", {"rope_theta": 1e4, "attention_bias": True, **TIED, **ONE_LAYER},
        default=Case(features=QK_NORM | QKVO)),
    "olmo3": decoder(
        "Olmo3ForCausalLM", "olmo3", {"rope_theta": 5e5, "rms_norm_eps": 1e-6, **UNTIED, **SHORT_WINDOW, **LAYER_TYPES},
        default=Case(features=QK_NORM | OLMO_NORMS | {
            "window": {"sliding_window": 4096}, "layer_types": {"layer_types": LAYER_TYPES["layer_types"][::-1]}}),
        # The layers with a window keep the class's theta, 500,000, and no scaling.
        yarn=Case({"rope_theta": 1e4, "rope_scaling": YARN}, {
            "yarn": {"rope_scaling": None}, "theta": {"rope_theta": 5e5}, "attention factor": {
                "rope_scaling": YARN | {"attention_factor": 1.0}}})),
    "phi3": decoder(
        "Phi3ForCausalLM", "phi3", {"rope_theta": 2.5e3, "rms_norm_eps": 1e-5, **UNTIED, **ONE_LAYER, "sliding_window": None},
        default=Case(features=BLOCK_NORMS | {"theta": {"rope_theta": 1e4}}),
        window=Case(SHORT_WINDOW, {"window": {"sliding_window": None}}),
        partial=Case({"partial_rotary_factor": 0.5}, {"partial": {"partial_rotary_factor": 1.0}}),
        longrope=Case(longrope("type", 16), longrope_features("type", 16)),
        longrope_partial=Case({"partial_rotary_factor": 0.75, **longrope("rope_type", 12)},
                              longrope_features("rope_type", 12))),
    "phi3-tied": decoder(
        "Phi3ForCausalLM", "phi3", {"rope_theta": 1e4, "num_key_value_heads": 4, **TIED, **ONE_LAYER},
        default=Case(features=BLOCK_NORMS)),
    "gemma2": decoder(
        "Gemma2ForCausalLM", "gemma2", {"rope_theta": 1e4, **GEMMA2},
        default=Case(features=GEMMA_NORMS | {
            "attention cap": {"attn_logit_softcapping": None}, "final cap": {"final_logit_softcapping": None},
            "window": {"sliding_window": 4096}, "parity": {"layer_types": LAYER_TYPES["layer_types"][::-1]},
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 32}, "tanh": {"hidden_activation": "silu"}}),
        uncapped=Case({"attn_logit_softcapping": None, "final_logit_softcapping": None}, {
            "no attention cap": {"attn_logit_softcapping": 2.0}, "no final cap": {"final_logit_softcapping": 3.0}})),
    "gemma2-untied": decoder(
        "Gemma2ForCausalLM", "gemma2", GEMMA2 | {"attention_bias": True, **UNTIED, **ONE_LAYER, "head_dim": 16},
        default=Case(features=QKVO)),
    "gemma3": decoder(
        "Gemma3ForCausalLM", "gemma3_text", GEMMA3,
        # The cap of the scores is kept in the config, and not applied.
        default=Case(features=GEMMA3_FEATURES, same={"attn_logit_softcapping": 2.0}),
        capped=Case({"final_logit_softcapping": 3.0}, {"final cap": {"final_logit_softcapping": None}}),
        listed=Case({"layer_types": LAYER_TYPES["layer_types"][::-1], "sliding_window_pattern": 6}, {
            "list": {"layer_types": LAYER_TYPES["layer_types"]}})),
    "gemma3-untied": decoder(
        "Gemma3ForCausalLM", "gemma3_text", GEMMA3 | {"attention_bias": True, **UNTIED, **ONE_LAYER, "head_dim": 16},
        default=Case(features=QKVO)),
    "gemma3-multimodal": Model(
        "Gemma3ForConditionalGeneration", "gemma3", SIZES | GEMMA3 | {"model_type": "gemma3_text", "head_dim": 16},
        {"default": Case(features=GEMMA3_FEATURES)}, language_model=True),
}


def wide(architecture, model_type, head_dim, config, **arguments):
    """A model for GPUs: heads of 64, 96, 128 or 256, and a config that leaves layer patterns to the class where it can."""
    features = arguments.pop("features", {})
    sizes = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim, "rms_norm_eps": 1e-5}
    return Model(architecture, model_type, sizes | config, {"default": Case(features=features)}, bfloat16=True, **arguments)


LOCAL = {**SHORT_WINDOW, "rope_theta": 1e4}
WINDOW = {"window": {"sliding_window": 4096}}
MODELS |= {
    "llama-64": wide("LlamaForCausalLM", "llama", 64, {"rope_theta": 1e4}),
    "qwen2-64": wide("Qwen2ForCausalLM", "qwen2", 64, {"rope_theta": 1e6, **TIED}, features=QKV),
    "qwen3-128": wide("Qwen3ForCausalLM", "qwen3", 128, {"rope_theta": 1e6, **ONE_LAYER}, features=QK_NORM),
    "mistral-128": wide("MistralForCausalLM", "mistral", 128, LOCAL | ONE_LAYER, features=WINDOW),
    "ministral-128": wide("MinistralForCausalLM", "ministral", 128, LOCAL | LAYER_TYPES, features=WINDOW | {
        "layer_types": {"layer_types": LAYER_TYPES["layer_types"][::-1]}}),
    "ministral-tied": wide("MinistralForCausalLM", "ministral", 64, LOCAL | TIED | ONE_LAYER, features=WINDOW),
    "ministral3-128": wide("Ministral3ForCausalLM", "ministral3", 128, ministral_rope() | ONE_LAYER, features={
        "beta": ministral_rope(llama_4_scaling_beta=0.0)}),
    "mistral3-64": wide("Mistral3ForConditionalGeneration", "mistral3", 64, {"model_type": "mistral", **LOCAL},
                        features=WINDOW, language_model=True),
    # No RoPE on the last of four layers, as the class has it.
    "smollm3-64": wide("SmolLM3ForCausalLM", "smollm3", 64, {"num_hidden_layers": 4}, features={
        "NoPE": {"no_rope_layers": [1, 1, 1, 1]}, "layer": {"no_rope_layers": [1, 1, 0, 1]}}),
    "granite-64": wide("GraniteForCausalLM", "granite", 64, {"hidden_size": 128, **ONE_LAYER, "rope_theta": 1e4, **TIED, **GRANITE}),
    "seed_oss-128": wide("SeedOssForCausalLM", "seed_oss", 128, {"rope_theta": 1e7, **ONE_LAYER}, features=QKV),
    "olmo2-64": wide("Olmo2ForCausalLM", "olmo2", 64, {"hidden_size": 128, **ONE_LAYER, "num_key_value_heads": 2, "rope_theta": 5e5},
                     features=QK_NORM | OLMO_NORMS),
    # A window on the first three of four layers.
    "olmo3-64": wide("Olmo3ForCausalLM", "olmo3", 64, {"num_attention_heads": 1, "num_hidden_layers": 4, "rope_theta": 5e5, **SHORT_WINDOW},
                     features=WINDOW),
    "phi3-96": wide("Phi3ForCausalLM", "phi3", 96, {"hidden_size": 192, **ONE_LAYER, **LOCAL}, features=WINDOW),
    "gemma2-256": wide("Gemma2ForCausalLM", "gemma2", 256, GEMMA2 | {"head_dim": 256}, features=WINDOW),
    # A window on the first five of six layers.
    "gemma3-64": wide("Gemma3ForCausalLM", "gemma3_text", 64, {"num_hidden_layers": 6, **SHORT_WINDOW}, features=WINDOW | {
        "pattern": {"sliding_window_pattern": 2}, "local theta": {"rope_local_base_freq": 1e6}}),
    "gemma3-256": wide("Gemma3ForConditionalGeneration", "gemma3", 256,
                       GEMMA3 | {"model_type": "gemma3_text", "head_dim": 256}, features=WINDOW, language_model=True),
}
