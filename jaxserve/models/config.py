"""What a decoder is: every number that its forward pass needs, read once from `config.json`.

A value that jaxserve cannot honour is an error that names it, and so are two keys that say different
things; keys that do not touch inference are listed in `INERT`, features that are absent when false in
`OFF`. Each model file says which of the remaining keys it reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 10_000  # so that a nonsensical config.json is an error before anything is made for each layer

# Training, bookkeeping and generation defaults: nothing here changes a logit.
INERT = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id eos_token_id pad_token_id unk_token_id
    sep_token_id decoder_start_token_id cls_token_id initializer_range model_type pretraining_tp
    transformers_version use_cache hidden_dropout attn_implementation output_attentions
    output_hidden_states return_dict resid_pdrop embd_pdrop task_specific_params problem_type id2label
    label2id tokenizer_class finetuning_task is_decoder chunk_size_feed_forward torchscript prefix
    license name_or_path is_llama_config transformers.js_config unsloth_fixed gradient_checkpointing
    _name_or_path _commit_hash _from_model_config _flash_attn_2_enabled _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation
    """.split()
)

# Features that jaxserve has not, or not in this model: false says that they are not asked for. A key that
# is not here may mean anything when false, as `"is_causal": false` does.
OFF = frozenset(
    """
    attention_bias mlp_bias qkv_bias bias use_qk_norm qk_layernorm use_sliding_window use_mrope
    rope_interleaved use_dynamic_ntk use_logn_attn use_bidirectional_attention add_cross_attention
    is_encoder_decoder tie_encoder_decoder output_router_logits use_bfloat16 tf_legacy_loss
    remove_invalid_values do_sample early_stopping output_scores return_dict_in_generate
    """.split()
)


class ConfigError(ValueError):
    """A `config.json` that cannot be served; the message names the key and its value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scalings, named as transformers names them.

    factor: linear (Chen et al. 2023), llama3 and yarn (Peng et al. 2023) stretch by this.
    attention_factor: multiplies cos and sin (yarn).
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer, dense or with a mixture of experts for the MLP of every layer.

    mlp_size: inner size of the MLP, or of one expert.
    windows: per layer, how many positions a query sees counting its own; None sees all before it.
    num_experts: in each layer; 0 for a dense model. experts_per_token: of them, those that a token goes to.
    normalise_top_k: their probabilities are scaled to sum to 1.
    dtype: of the checkpoint, or None where it does not say.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    rope: Rope
    windows: tuple[int | None, ...]
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    normalise_top_k: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads} is not a multiple of"
                f" num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd: rotary embeddings need pairs")
        if len(self.windows) != self.num_layers:
            raise ConfigError(
                f"{len(self.windows)} attention windows for num_hidden_layers={self.num_layers}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.experts_per_token} is more than the {self.num_experts} experts"
            )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


class Fields:
    """Reads a config once, key by key; `finish()` refuses whatever nobody read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)

    def take(self, key: str, default: Any = None) -> Any:
        value = self._config.pop(key, None)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.take(key, default)
        if value is None:
            raise ConfigError(f"config.json has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"config.json: {key}={value!r} must be an integer in [{low}, {high}]")
        return value

    def optional_integer(self, key: str, *, absent: int | None) -> int | None:
        """None where the key is null, `absent` where it is missing."""
        if key not in self._config:
            return absent
        return None if self._config[key] is None else self.integer(key)

    def peek(self, key: str) -> Any:
        """The raw value, left for a later reader."""
        return self._config.get(key)

    def number(self, key: str, default: float) -> float:
        return _number(key, self.take(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key}={value!r} must be true or false")
        return value

    def require(self, key: str, *accepted: Any) -> None:
        """The key may be absent or null; another value is refused."""
        value = self._config.pop(key, None)
        if value is not None and value not in accepted:
            raise ConfigError(f"config.json: {key}={value!r} is not supported; it must be {accepted[0]!r}")

    def finish(self) -> None:
        left = {
            key: value
            for key, value in self._config.items()
            if value is not None
            and not (value is False and key in OFF)
            and key not in INERT
            and not key.endswith("_version")
        }
        if left:
            named = ", ".join(f"{key}={value!r}"[:80] for key, value in sorted(left.items())[:5])
            raise ConfigError(
                f"config.json has {len(left)} value(s) that jaxserve does not know how to honour: {named};"
                " remove them if they do not change the computation"
            )


def _agreed(values: Mapping[str, Any]) -> Any:
    """What several keys say alike, or None where all are null."""
    given = {key: value for key, value in values.items() if value is not None}
    first = next(iter(given.values()), None)
    if any(value is not first and value != first for value in given.values()):
        named = " and ".join(f"{key}={value!r}"[:80] for key, value in given.items())
        raise ConfigError(f"config.json: {named} differ")
    return first


def _number(key: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ConfigError(f"config.json: {key}={value!r} must be a positive number")
    return float(value)


def decoder_config(
    model_type: str, fields: Fields, *, windows: tuple[int | None, ...] | None = None, **family: Any
) -> ModelConfig:
    """The keys that every decoder shares; `family` holds what its file decided. Calls `finish()`."""
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    max_position = fields.integer("max_position_embeddings")
    head_dim = fields.take("head_dim")
    if head_dim is None and hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}"
        )
    head_dim = hidden // heads if head_dim is None else head_dim
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 2:
        raise ConfigError(f"config.json: head_dim={head_dim!r} must be an even integer of at least 2")
    fields.require("hidden_act", "silu")
    fields.require("partial_rotary_factor", 1.0)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        mlp_size=family.pop("mlp_size", None) or fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=max_position,
        rope=_rope(fields, max_position),
        windows=(None,) * layers if windows is None else windows,
        tie_embeddings=fields.flag("tie_word_embeddings", family.pop("tie_default", False)),
        dtype=_dtype(fields),
        **family,
    )
    fields.finish()
    return config


def expert_fields(fields: Fields, *, count: int, per_token: int) -> dict[str, int]:
    """`num_experts` and `experts_per_token`, by default `count` and `per_token`: transformers' own defaults.

    The count goes by two names: `num_local_experts`, which transformers 5 writes, and `num_experts`.
    """
    names = ("num_local_experts", "num_experts")
    _agreed({name: fields.peek(name) for name in names})
    given = [fields.integer(name) for name in names if fields.peek(name) is not None]
    for name in ("router_aux_loss_coef", "output_router_logits"):  # what training does with the router
        fields.take(name)
    return {
        "num_experts": given[0] if given else count,
        "experts_per_token": fields.integer("num_experts_per_tok", per_token),
    }


def same_windows(fields: Fields, window: int | None) -> tuple[int | None, ...]:
    """One window for all layers."""
    layers = fields.peek("num_hidden_layers")  # checked when decoder_config reads it
    return (window,) * (layers if isinstance(layers, int) and layers <= MAX_LAYERS else 0)


def layer_windows(fields: Fields, window: int | None, first_sliding: int = 0) -> tuple[int | None, ...]:
    """Per-layer windows from `layer_types`, or from the first layer that slides where that is absent."""
    layers = fields.peek("num_hidden_layers")
    types = fields.take("layer_types")
    if types is None:
        return tuple(w if i >= first_sliding else None for i, w in enumerate(same_windows(fields, window)))
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"config.json: layer_types must list {layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"config.json: layer_types holds {kind!r}, which is not supported")
        if kind == "sliding_attention" and window is None:
            raise ConfigError("config.json: layer_types has sliding_attention, but sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _dtype(fields: Fields) -> str | None:
    value = _agreed({key: fields.take(key) for key in ("torch_dtype", "dtype")})
    if value is not None and value not in DTYPES:
        raise ConfigError(f"config.json: torch_dtype={value!r} is not supported; one of {', '.join(DTYPES)}")
    return value


def _rope(fields: Fields, max_position: int) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before it), or both alike."""
    thetas = {"rope_theta": fields.take("rope_theta")}
    given: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        values = fields.take(name)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"config.json: {name}={values!r} must be an object")
        given[name] = dict(values)
        thetas[f"{name}.rope_theta"] = given[name].pop("rope_theta", None)
    theta = _agreed(thetas)
    theta = _number("rope_theta", 10000.0 if theta is None else theta)
    if theta <= 1.0:
        raise ConfigError(f"config.json: rope_theta={theta:g} must be more than 1")
    ropes = [_scaled_rope(name, inner, theta, max_position) for name, inner in given.items()]
    if any(rope != ropes[0] for rope in ropes):
        raise ConfigError(f"config.json: {' and '.join(given)} differ: remove one of them")
    return ropes[0] if ropes else Rope(theta=theta)


def _scaled_rope(name: str, inner: dict[str, Any], theta: float, max_position: int) -> Rope:
    """What the object called `name` asks for; `inner` is used up."""
    kind = _agreed({f"{name}.{key}": inner.pop(key, None) for key in ("rope_type", "type")})
    kind = "default" if kind is None else kind
    partial = inner.pop("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"config.json: {name}.partial_rotary_factor={partial!r} is not supported")

    def original() -> int:
        value = inner.pop("original_max_position_embeddings", None)
        value = max_position if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"config.json: {name}.original_max_position_embeddings={value!r} must be an integer"
            )
        return value

    def number(key: str, default: float | None = None) -> float:
        value = inner.pop(key, None)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json: {name} of type {kind!r} has no {key!r}")
        return _number(f"{name}.{key}", value)

    match kind:
        case "default":
            rope = Rope(theta=theta)
        case "linear":
            rope = Rope(kind, theta, number("factor"))
        case "dynamic":
            # The base grows with the sequence, and with it every key that is already cached. Up to the
            # original length it equals `default`, and `context` ends there.
            number("factor")
            rope = Rope(kind, theta, original_max_position=min(original(), max_position))
        case "llama3":
            rope = Rope(
                kind,
                theta,
                number("factor"),
                original(),
                low_freq_factor=number("low_freq_factor"),
                high_freq_factor=number("high_freq_factor"),
            )
        case "yarn":
            factor = number("factor")
            attention = inner.pop("attention_factor", None)
            # 0 counts as absent, as in transformers
            keys = ("mscale", "mscale_all_dim")
            mscales = [number(key) if inner.get(key) else inner.pop(key, None) for key in keys]
            if attention is None and all(mscales):
                attention = _mscale(factor, mscales[0]) / _mscale(factor, mscales[1])
            elif attention is None:
                attention = _mscale(factor, 1.0)
            truncate = inner.pop("truncate", True)
            if not isinstance(truncate, bool):
                raise ConfigError(f"config.json: {name}.truncate={truncate!r} must be true or false")
            rope = Rope(
                kind,
                theta,
                factor,
                original(),
                beta_fast=number("beta_fast", 32.0),
                beta_slow=number("beta_slow", 1.0),
                truncate=truncate,
                attention_factor=_number(f"{name}.attention_factor", attention),
            )
        case _:
            raise ConfigError(
                f"config.json: {name}.rope_type={kind!r} is not supported;"
                " default, linear, dynamic, llama3 or yarn"
            )
    left = sorted(key for key, value in inner.items() if value is not None)
    if left:
        raise ConfigError(f"config.json: {name} of type {kind!r} has unknown keys: {', '.join(left[:5])}")
    return rope


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def context_limit(config: ModelConfig) -> int:
    """The longest context in tokens that the model can be given."""
    if config.rope.kind == "dynamic":
        return min(config.max_position, config.rope.original_max_position)
    return config.max_position
