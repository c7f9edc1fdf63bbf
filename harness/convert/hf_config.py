"""config.json of a Hugging Face model and our `model` section, each made from the other.

What the decoder cannot express is refused by the key that says it. Keys that no architecture here reads are left alone:
transformers' code does not read them either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import HarnessError, validate
from harness.model import ModelSection

from .names import GPT2, LLAMA
from .records import Fields, listed
from .rules import Row
from .stand_ins import EPSILONS

Config = Mapping[str, Any]


_WINDOW = 4096
"""What transformers takes for a sliding_window that is not said; null is none."""


@dataclass(frozen=True)
class Architecture:
    """One class of transformers' models that the decoder can express."""

    name: str
    """As `architectures` in config.json has it."""
    model_type: str
    rows: Sequence[Row]
    read: Callable[[Fields], dict[str, Any]]
    """Values of our section; raises HarnessError."""
    write: Callable[[ModelSection], dict[str, Any]]
    needs: Mapping[str, Any]
    """What `ModelSection.architecture` must say for a model of ours to be written as one: values, or functions of the
    section that give them."""


def read_config(config: Config, label: str) -> tuple[Architecture, ModelSection]:
    """The architecture and our section of a config.json; a norm-free one has the epsilon of its stand-ins.

    Raises HarnessError, naming the key, where the decoder cannot express the model.
    """
    known, reader = {each.name: each for each in ARCHITECTURES}, Fields(config, label)
    names = reader.texts("architectures")
    if not names:
        names = [each.name for each in ARCHITECTURES if each.model_type == config.get("model_type")]
    if len(names) != 1 or names[0] not in known:
        said = " and ".join(names) or f"model_type {config.get('model_type')!r}"
        raise HarnessError(f"{label}: architectures: {said} cannot be read; one of these can: {', '.join(known)}")
    architecture = known[names[0]]
    if config.get("quantization_config") is not None:
        raise HarnessError(f"{label}: quantization_config: quantized weights cannot be read; take the original model")
    values = architecture.read(reader)
    values |= {
        "vocab_size": reader.integer("vocab_size"),
        "init_std": reader.number("initializer_range", 0.02),
        "norm_free": values["norm_epsilon"] in EPSILONS,
        "tied_head": reader.expect("tie_word_embeddings", True, False, default=architecture is _GPT2),
    }
    return architecture, validate(ModelSection, values, f"{label} as our model section")


def write_config(section: ModelSection, dtype: str, eod: int | None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a section and its config.json, weights in `dtype` ("float32").

    Raises HarnessError, naming the key, where transformers has no class for the model.
    """
    has, closest, problems = section.architecture(), "", [""] * 100
    for architecture in ARCHITECTURES:
        wanted = {key: value(section) if callable(value) else value for key, value in architecture.needs.items()}
        wrong = [f"model.{key} {has[key]!r} for {value!r}" for key, value in wanted.items() if has[key] != value]
        if not wrong:
            break
        if len(wrong) < len(problems) and architecture is not _MISTRAL:
            closest, problems = architecture.name, wrong
    else:
        raise HarnessError(
            f"no architecture of transformers that is known here expresses the model; {closest} comes closest, but it "
            f"has {', '.join(problems)}"
        )
    shared = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": section.vocab_size,
        "tie_word_embeddings": section.tied_head,
        "initializer_range": section.init_std,
        "torch_dtype": dtype,
        "bos_token_id": eod,  # documents follow each other with one such token between them
        "eos_token_id": eod,
        "use_cache": True,
    }
    return architecture, shared | architecture.write(section)


def _read_gpt2(config: Fields) -> dict[str, Any]:
    config.expect("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    config.expect("scale_attn_weights", True, default=True)
    config.expect("scale_attn_by_inverse_layer_idx", False, default=False)
    config.expect("add_cross_attention", False, default=False)
    drops = {config.number(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return {
        "family": "gpt2",
        "layers": config.integer("n_layer"),
        "hidden_size": config.integer("n_embd"),
        "heads": config.integer("n_head"),
        "mlp_size": config.get("n_inner"),
        "max_positions": config.integer("n_positions"),
        "norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "dropout": drops.pop() if len(drops) == 1 else 0.0,  # only one rate here; a run says its own
    }


def _write_gpt2(section: ModelSection) -> dict[str, Any]:
    return {
        "n_layer": section.layers,
        "n_embd": section.hidden_size,
        "n_head": section.heads,
        "n_inner": section.mlp_width,
        "n_positions": section.max_positions,
        "n_ctx": section.max_positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": section.norm_epsilon,
        "resid_pdrop": section.dropout,
        "embd_pdrop": section.dropout,
        "attn_pdrop": section.dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _read_llama(config: Fields) -> dict[str, Any]:
    """What Llama, Mistral, Qwen 2 and Qwen 3 have in common."""
    config.expect("hidden_act", "silu", default="silu")
    return {
        "family": "llama",
        "layers": config.integer("num_hidden_layers"),
        "hidden_size": config.integer("hidden_size"),
        "heads": config.integer("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads"),
        "head_size": config.get("head_dim"),
        "mlp_size": config.integer("intermediate_size"),
        "max_positions": config.integer("max_position_embeddings"),
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        **_read_rope(config),
    }


def _read_rope(config: Fields) -> dict[str, Any]:
    """transformers 5 says all of it in rope_parameters, earlier ones in rope_theta and rope_scaling."""
    late, early = config.mapping("rope_parameters"), config.mapping("rope_scaling")
    if late and early and _without_theta(late) != _without_theta(early):
        raise HarnessError(
            f"{config.label}: rope_parameters and rope_scaling do not agree, and transformers 5 takes the latter; "
            f"remove one of them"
        )
    key = "rope_parameters" if late else "rope_scaling"
    rope = Fields(late or early, f"{config.label}: {key}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    named = "rope_type" if "rope_type" in rope.config or "type" not in rope.config else "type"
    if rope.expect(named, "default", "llama3", default="default", why="the decoder has no other") == "default":
        return {"rope_theta": theta}
    factors = {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    original = rope.integer("original_max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": {**factors, "original_max_positions": original}}


def _without_theta(rope: dict[str, Any]) -> dict[str, Any]:
    named = {"rope_type" if key == "type" else key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_type": "default", **named}


def _read_plain_llama(config: Fields) -> dict[str, Any]:
    bias = config.expect("attention_bias", True, False, default=False)
    config.expect("mlp_bias", bias, default=False, why="all linear layers have biases, or none has")
    return _read_llama(config) | {"bias": bias}


def _read_mistral(config: Fields) -> dict[str, Any]:
    _refuse_window(config)
    return _read_llama(config)


def _read_qwen2(config: Fields) -> dict[str, Any]:
    if config.get("use_sliding_window", False):
        _refuse_window(config)
    _refuse_layer_types(config)
    return _read_llama(config) | {"qkv_bias": True}


def _read_qwen3(config: Fields) -> dict[str, Any]:
    config.expect("attention_bias", False, default=False)
    if config.get("use_sliding_window", False):
        _refuse_window(config)
    _refuse_layer_types(config)
    return {"head_size": 128, **_drop_none(_read_llama(config)), "qk_norm": True}


def _refuse_window(config: Fields) -> None:
    longest = config.integer("max_position_embeddings")
    if config.config.get("sliding_window", _WINDOW) is None:
        return
    window = config.integer("sliding_window", _WINDOW)
    if window < longest:
        raise HarnessError(
            f"{config.label}: sliding_window is {window}, less than max_position_embeddings {longest}: the decoder "
            f"attends to all earlier tokens"
        )


def _refuse_layer_types(config: Fields) -> None:
    others = {kind for kind in config.texts("layer_types") if kind != "full_attention"}
    if others:
        raise HarnessError(f"{config.label}: layer_types has {listed(sorted(others))}: only full_attention can be read")


def _drop_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _write_llama(section: ModelSection) -> dict[str, Any]:
    scaling = section.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "num_hidden_layers": section.layers,
        "hidden_size": section.hidden_size,
        "num_attention_heads": section.heads,
        "num_key_value_heads": section.key_value_heads,
        "head_dim": section.head_width,
        "intermediate_size": section.mlp_width,
        "max_position_embeddings": section.max_positions,
        "rms_norm_eps": section.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": section.bias,
        "attention_dropout": 0.0,
        # Both for transformers 4, which knows no rope_parameters.
        "rope_theta": section.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": section.rope_theta},
    }


def _write_plain_llama(section: ModelSection) -> dict[str, Any]:
    return _write_llama(section) | {"mlp_bias": section.bias}


def _write_qwen(section: ModelSection) -> dict[str, Any]:
    return _write_llama(section) | {"use_sliding_window": False, "sliding_window": None}


_LLAMA_LIKE = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "logit_softcap": None}
_GPT2 = Architecture(
    "GPT2LMHeadModel",
    "gpt2",
    GPT2,
    _read_gpt2,
    _write_gpt2,
    {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "logit_softcap": None,
        "bias": True,
        "qkv_bias": True,
        "qk_norm": False,
        "kv_heads": lambda section: section.heads,
        "head_size": lambda section: section.hidden_size / section.heads,
    },
)
_LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    LLAMA,
    _read_plain_llama,
    _write_plain_llama,
    {**_LLAMA_LIKE, "qkv_bias": lambda section: section.bias, "qk_norm": False},
)
_QWEN2 = Architecture(
    "Qwen2ForCausalLM",
    "qwen2",
    LLAMA,
    _read_qwen2,
    _write_qwen,
    {
        **_LLAMA_LIKE,
        "bias": False,
        "qkv_bias": True,
        "qk_norm": False,
        "head_size": lambda section: section.hidden_size / section.heads,
    },
)
_QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    LLAMA,
    _read_qwen3,
    _write_qwen,
    {**_LLAMA_LIKE, "bias": False, "qkv_bias": False, "qk_norm": True},
)
# A model of ours that could be one is written as Llama, which it is while its window reaches over all its positions.
_MISTRAL = Architecture(
    "MistralForCausalLM", "mistral", LLAMA, _read_mistral, _write_plain_llama, {"norm": "none of ours"}
)
ARCHITECTURES = (_GPT2, _LLAMA, _QWEN2, _QWEN3, _MISTRAL)
