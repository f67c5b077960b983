"""A cache whose layers may live on the host, and are fetched for their turn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

__all__ = ["OffloadableCache"]


class OffloadableCache(DynamicCache):
    """transformers' offloading with an order that a busy device keeps.

    Parameters
    ----------
    config, offloading, offload_only_non_sliding
        As in `DynamicCache`.

    Raises
    ------
    ValueError
        When there is nothing to offload from.
    """

    def __init__(self, config: Any, offloading: bool, offload_only_non_sliding: bool) -> None:
        try:
            super().__init__(
                config=config,
                offloading=offloading,
                offload_only_non_sliding=offload_only_non_sliding,
            )
        except RuntimeError as error:  # of the stream to prefetch on
            if not offloading:
                raise
            raise ValueError(
                "offloading: expected False, as torch finds no accelerator whose memory layers "
                "could leave, got True"
            ) from error

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Fetch the next offloaded layer, behind the work that is queued on its device.

        transformers' stream waits for nothing: it would read a stock layer's host memory before
        that is written, and take memory again that queued work still reads.
        """
        self.prefetch_stream.wait_stream(torch.accelerator.current_stream())
        super().prefetch(layer_idx, only_non_sliding)
