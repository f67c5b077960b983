"""Failures on order: what is left behind when a step runs out of memory halfway."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FailAt(TorchDispatchMode):
    """While active, the n-th tensor operation fails as if memory were short, and does nothing.

    Operations that allocate nothing (views, in-place ones) fail as well: more ways to stop, and
    none is left out.
    """

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.nth = nth
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls == self.nth:
            raise torch.OutOfMemoryError(f"injected at operation {self.nth}: {func}")
        return func(*args, **(kwargs or {}))
