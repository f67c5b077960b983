"""The device that --device names."""

from __future__ import annotations

import torch

from turboquant_cpp.cli.exit_codes import UserError

__all__ = ["usable_device"]


def usable_device(name: str) -> torch.device:
    """A torch device that tensors can be made on.

    Raises
    ------
    UserError
        With torch's reason.

    Examples
    --------
    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device: cannot use {name!r}: {reason}") from error
    return device
