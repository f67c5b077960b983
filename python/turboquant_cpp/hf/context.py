"""What all layers of one cache share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from turboquant_cpp.hf import compat
from turboquant_cpp.spec import CacheConfig

__all__ = ["CacheContext"]

_PREFILL: Final = ("exact", "quantized")
_DEQUANTIZE: Final = ("full", "incremental")


@dataclass(frozen=True)
class CacheContext:
    """Settings of a cache, made once and never copied: `model_config` must stay the model's own.

    Parameters
    ----------
    config : CacheConfig
        The controls of the quantisation.
    model_config : optional
        The decoder's configuration; ``set_attn_implementation`` changes it while the cache lives.
    head_dim : int, optional
        The width that keys must have; None takes what comes.
    prefill, dequantize, left_padding
        See `CompressedDynamicCache`.
    kv_source_layers : frozenset of int
        Layers whose keys later layers read again.
    is_offloaded : bool
        Whether layers move to the host after `update`, before attention could read their codes.
    max_cache_len : int, optional
        Capacity of layers that do not grow; see `CompressedDynamicCache`.
    """

    config: CacheConfig
    model_config: Any = None
    head_dim: int | None = None
    prefill: str = "exact"
    dequantize: str = "full"
    left_padding: tuple[int, ...] | None = None
    kv_source_layers: frozenset[int] = frozenset()
    is_offloaded: bool = False
    max_cache_len: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("prefill", _PREFILL), ("dequantize", _DEQUANTIZE)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}"
                )

    @property
    def is_fused(self) -> bool:
        """Whether the model's attention reads the codes at this moment.

        Not where layers work with the keys before attention: those need all of them.
        """
        implementation = compat.attention_implementation(self.model_config)
        return (
            implementation == "turboquant"
            and not self.is_offloaded
            and not compat.has_bias_by_distance(self.model_config)
        )

    @property
    def reads_quantized(self) -> bool:
        """Whether a chunk reads even its own tokens through the codes."""
        return self.prefill == "quantized"

    @property
    def is_undecided(self) -> bool:
        """Whether the widths of layers wait for the prompt (`policy.decide`)."""
        return self.config.policy == "auto" and not self.config.layer_bits

    @property
    def is_incremental(self) -> bool:
        """Whether layers keep a dense copy beside their codes."""
        return self.dequantize == "incremental"

    @property
    def model_name(self) -> str:
        """How messages call the model."""
        return compat.model_name(self.model_config)

    def different_widths(self, key_width: int, value_width: int) -> str:
        """Why a model with multi-head latent attention is refused."""
        return (
            f"{self.model_name}: keys have {key_width} channels and values {value_width}. Layers "
            "with multi-head latent attention (MLA) are not supported: a page holds keys and "
            "values of one width"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheContext:
        return self
