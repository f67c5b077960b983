"""What a user may choose about a compressed cache, and what each layer makes of it."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from turboquant_cpp._core import LayerSpec, VectorCodebook

__all__ = ["CacheConfig", "LayerSpec"]

MIN_BITS: Final = 1
MAX_BITS: Final = 8
POLICIES: Final = ("uniform", "auto")
RECIPES: Final = ("recommended", "plain")
#: Key and value widths of each preset, all with the recommended recipe; what they cost is in
#: docs/experiments/quality-smollm2.md.
PRESETS: Final[Mapping[str, tuple[int, int]]] = {
    "quality": (5, 4),
    "balanced": (4, 4),
    "max": (3, 2),
}
MAX_LAYER: Final = (1 << 31) - 1
MAX_EXACT_TOKENS: Final = 1 << 20  # LayerSpec's kMaxExactTokens
SCALE_RULES: Final = ("norm", "norm_preserving", "least_squares", "unbiased")
SCALE_DTYPES: Final = ("float32", "float16")
CODEBOOKS: Final = ("scalar", "vector")

# The recommended recipe: what each part buys is measured in docs/experiments.
_RECOMMENDED: Final[Mapping[str, Any]] = {
    "window_tokens": 64,
    "sink_tokens": 4,
    "center_keys": True,
    "smooth_keys": True,
    "k_scale_rule": "unbiased",
    "v_scale_rule": "norm_preserving",
    "scale_dtype": "float16",
}
# The paper's TurboQuant: every token is quantised at once, with its own norm.
_PLAIN: Final[Mapping[str, Any]] = {
    "window_tokens": 0,
    "sink_tokens": 0,
    "center_keys": False,
    "smooth_keys": False,
    "k_scale_rule": "norm",
    "v_scale_rule": "norm",
    "scale_dtype": "float32",
}


def _expect(argument: str, expected: str, actual: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {actual!r}")


def _check_int(argument: str, value: object, low: int, high: int | None = None) -> int:
    number = as_integer(argument, value)
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise _expect(argument, f"an integer of {bounds}", value)
    return number


def as_integer(argument: str, value: object) -> int:
    """An argument that is one of Python's or NumPy's integers, and no truth value."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _expect(argument, "an integer", value)
    return int(value)


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _expect(argument, "one of " + ", ".join(map(repr, choices)), value)


def _check_bits(argument: str, value: object) -> int:
    return _check_int(argument, value, MIN_BITS, MAX_BITS)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The controls of a compressed cache, with every default filled in.

    Parameters
    ----------
    bits : int, optional
        Width of key and value codes, 1 to 8. ``k_bits`` and ``v_bits`` take precedence; one of
        the two ways must give each width.
    k_bits, v_bits : int, optional
        Widths of key and value codes. Keys need bits more than values.
    preset : {"quality", "balanced", "max"}, optional
        Widths by purpose, in the place of `bits`: 5+4 bits (a third of the divergence of 4+4), 4+4,
        and 3+2, the smallest that still speaks as the model does (2+2 is there as ``bits=2``).
    recipe : {"recommended", "plain"}
        Where the defaults of the next seven options come from. ``"plain"`` is the paper's
        TurboQuant: every token is quantised at once, no window, no sinks, no centring, no
        smoothing, the plain norm as a float32 scale.
    window_tokens : int, optional
        Most recent tokens kept exact: 0 or a multiple of 64. With 64, between 64 and 127 tokens
        are exact at any time. 0 turns the defaults of ``center_keys`` and ``smooth_keys`` off.
    sink_tokens : int, optional
        First tokens of a sequence kept exact.
    center_keys : bool, optional
        Store the mean key of every block of 64 tokens and quantise the differences.
    smooth_keys : bool, optional
        Divide key channels by their spread in the sequence's first block, multiply queries by it.
    k_scale_rule, v_scale_rule : {"norm", "norm_preserving", "least_squares", "unbiased"}, optional
        Which scale is stored with a token's codes.
    scale_dtype : {"float32", "float16"}, optional
        How scales are stored. What float16 costs was not measurable (docs/experiments).
    codebook : {"scalar", "vector"}
        What codes stand for. ``"vector"``: pairs of coordinates, at 2, 3 and 4 bits only; less
        error in the same bytes, for slower encoding.
    seed : int
        Seed of the rotations, 0 to 2**63 - 1.
    exact_first_layers, exact_last_layers : int
        Layers at either end of the model that keep the stock, uncompressed cache.
    policy : {"uniform", "auto"}
        ``"auto"`` decides the widths of every layer from the prompt, once 512 tokens are there
        (they are exact until then), so that a budget of bytes does least harm; `layer_bits` holds
        them afterwards, and a cache that is reset keeps them. It needs an exact window and the
        queries, which the attention ``"turboquant"`` shows.
    bytes_per_token : int, optional
        Budget of ``policy="auto"``: bytes that a token takes in the pages of all compressed layers
        together. Without it, what the widths asked for take.
    layer_bits : mapping of int to (int, int), optional
        ``{layer: (k_bits, v_bits)}`` for layers that differ from the rest.

    Raises
    ------
    ValueError
        When an option is missing, out of range or contradicts another; the message names it.

    Examples
    --------
    >>> from turboquant_cpp import CacheConfig
    >>> config = CacheConfig(bits=4, layer_bits={0: (8, 8)})
    >>> config.window_tokens, config.k_scale_rule
    (64, 'unbiased')
    >>> CacheConfig(preset="quality").bits_of(3)
    (5, 4)
    >>> config.layer_spec(0, head_dim=64, num_kv_heads=2).k_bits
    8
    >>> CacheConfig(k_bits=3, v_bits=2, recipe="plain").window_tokens
    0
    """

    bits: int | None = None
    k_bits: int = None  # type: ignore[assignment]  # __post_init__ fills every None but `bits` in
    v_bits: int = None  # type: ignore[assignment]
    preset: str | None = None
    recipe: str = "recommended"
    window_tokens: int = None  # type: ignore[assignment]
    sink_tokens: int = None  # type: ignore[assignment]
    center_keys: bool = None  # type: ignore[assignment]
    smooth_keys: bool = None  # type: ignore[assignment]
    k_scale_rule: str = None  # type: ignore[assignment]
    v_scale_rule: str = None  # type: ignore[assignment]
    scale_dtype: str = None  # type: ignore[assignment]
    codebook: str = "scalar"
    seed: int = 42
    exact_first_layers: int = 0
    exact_last_layers: int = 0
    policy: str = "uniform"
    bytes_per_token: int | None = None
    layer_bits: Mapping[int, tuple[int, int]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Fill the defaults in and check every option."""
        self._resolve_preset()
        self._resolve_bits()
        self._resolve_recipe()
        _check_choice("codebook", self.codebook, CODEBOOKS)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_int("exact_first_layers", self.exact_first_layers, 0)
        _check_int("exact_last_layers", self.exact_last_layers, 0)
        self._check_policy()
        self._resolve_layer_bits()
        # The library checks the rest (how window, centring and smoothing fit together); any
        # head shape does for that.
        self.layer_spec(0, head_dim=64, num_kv_heads=1)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> CacheConfig:
        """Build a config from named options; an unknown name lists the known ones.

        Raises
        ------
        TypeError
            When `options` has a name that is no option.
        ValueError
            As the constructor does.

        Examples
        --------
        >>> CacheConfig.from_options({"bit": 4})
        Traceback (most recent call last):
            ...
        TypeError: unknown cache option 'bit' (did you mean 'bits'?); the options are bits, \
k_bits, v_bits, preset, recipe, window_tokens, sink_tokens, center_keys, smooth_keys, \
k_scale_rule, v_scale_rule, scale_dtype, codebook, seed, exact_first_layers, exact_last_layers, \
policy, bytes_per_token, layer_bits
        """
        names = [option.name for option in fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise TypeError(
                    f"unknown cache option {name!r}{hint}; the options are {', '.join(names)}"
                )
        return cls(**options)

    def is_exact(self, layer: int, num_layers: int) -> bool:
        """Whether `layer` of a model of `num_layers` keeps the stock, uncompressed cache."""
        _check_int("layer", layer, 0, num_layers - 1)
        return layer < self.exact_first_layers or layer >= num_layers - self.exact_last_layers

    def bits_of(self, layer: int) -> tuple[int, int]:
        """Key and value width of `layer`."""
        return self.layer_bits.get(layer, (self.k_bits, self.v_bits))

    def layer_spec(self, layer: int, head_dim: int, num_kv_heads: int) -> LayerSpec:
        """Everything that fixes the meaning of one layer's bytes.

        Parameters
        ----------
        layer : int
            Index of the layer in the model; rotations differ from layer to layer.
        head_dim, num_kv_heads : int
            Shape of the keys that the layer really sees (under tensor parallelism fewer heads
            than the model's configuration says).

        Raises
        ------
        ValueError
            When `head_dim` is not supported; the message names what is.
        """
        k_bits, v_bits = self.bits_of(layer)
        return LayerSpec(
            head_dim=as_integer("head_dim", head_dim),
            num_kv_heads=as_integer("num_kv_heads", num_kv_heads),
            k_bits=k_bits,
            v_bits=v_bits,
            k_rule=self.k_scale_rule,
            v_rule=self.v_scale_rule,
            scale_type=self.scale_dtype,
            center_keys=self.center_keys,
            smooth_keys=self.smooth_keys,
            sink_tokens=self.sink_tokens,
            window_tokens=self.window_tokens,
            seed=self.seed,
            layer=_check_int("layer", layer, 0, MAX_LAYER),
            codebook=self.codebook,
        )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_preset(self) -> None:
        if self.preset is None:
            return
        _check_choice("preset", self.preset, tuple(PRESETS))
        if self.recipe == "plain":
            raise _expect("recipe", f"'recommended' with preset={self.preset!r}", self.recipe)
        for name, width in zip(("k_bits", "v_bits"), PRESETS[self.preset], strict=True):
            given = self.bits if getattr(self, name) is None else getattr(self, name)
            if given not in (None, width):
                raise _expect(name, f"{width} or None with preset={self.preset!r}", given)
            self._set(name, width)

    def _resolve_bits(self) -> None:
        if self.bits is not None:
            _check_bits("bits", self.bits)
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            if value is None:
                if self.bits is None:
                    raise ValueError(
                        f"{name}: expected a width (set bits, both k_bits and v_bits, or preset), "
                        "got None"
                    )
                value = self.bits
            self._set(name, _check_bits(name, value))

    def _resolve_recipe(self) -> None:
        _check_choice("recipe", self.recipe, RECIPES)
        defaults = dict(_RECOMMENDED if self.recipe == "recommended" else _PLAIN)
        if self.window_tokens == 0:
            defaults.update(center_keys=False, smooth_keys=False)
        for name, default in defaults.items():
            if getattr(self, name) is None:
                self._set(name, default)
        for name in ("window_tokens", "sink_tokens"):
            self._set(name, _check_int(name, getattr(self, name), 0, MAX_EXACT_TOKENS))
        for name in ("center_keys", "smooth_keys"):
            if not isinstance(getattr(self, name), bool):
                raise _expect(name, "True or False", getattr(self, name))
        _check_choice("k_scale_rule", self.k_scale_rule, SCALE_RULES)
        _check_choice("v_scale_rule", self.v_scale_rule, SCALE_RULES)
        _check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    def _check_policy(self) -> None:
        _check_choice("policy", self.policy, POLICIES)
        if self.policy == "auto" and self.window_tokens == 0:
            raise _expect("policy", "'uniform' without an exact window", self.policy)
        if self.bytes_per_token is None:
            return
        if self.policy != "auto":
            raise _expect("bytes_per_token", "None without policy='auto'", self.bytes_per_token)
        _check_int("bytes_per_token", self.bytes_per_token, 1)

    def _resolve_layer_bits(self) -> None:
        if not isinstance(self.layer_bits, Mapping):
            raise _expect("layer_bits", "a mapping {layer: (k_bits, v_bits)}", self.layer_bits)
        checked = {}
        for layer, pair in self.layer_bits.items():
            _check_int("layer_bits: layer", layer, 0)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise _expect(f"layer_bits[{layer}]", "a pair (k_bits, v_bits)", pair)
            checked[layer] = (
                _check_bits(f"layer_bits[{layer}][0]", pair[0]),
                _check_bits(f"layer_bits[{layer}][1]", pair[1]),
            )
        self._set("layer_bits", checked)
        if self.codebook == "vector":
            for layer, widths in checked.items():
                if not all(VectorCodebook.exists(bits) for bits in widths):
                    raise _expect(
                        f"layer_bits[{layer}]", "widths of 2, 3 or 4 with a vector codebook", widths
                    )
