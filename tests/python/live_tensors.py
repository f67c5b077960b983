"""Which tensors are alive in this process, and the memory they hold."""

from __future__ import annotations

import gc

import torch


def storages() -> dict[int, int]:
    """Bytes of every tensor storage alive, by address.

    Tensors without memory of their own are left out: the fake and functional ones of torch's
    tracing, which other tests' `opcheck` leaves behind, have no address to ask for.
    """
    gc.collect()
    tensors = [
        thing
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter)
        and not torch._is_functional_tensor(thing)
    ]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
