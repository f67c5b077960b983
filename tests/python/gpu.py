"""What a test that needs a GPU does on a machine without one."""

from __future__ import annotations

import os

import pytest
import torch
from turboquant_cpp import ops

# How far a tiny model's logits on a GPU may be from the CPU's, by attention implementation.
# Decode attention rounds queries and weights to float16, 2^-11 of every coordinate. Errors of that
# size, put into the CPU's attention, moved the tiny model's logits (deviation 1) by up to 0.02.
MARGINS = {"turboquant": 0.05, "sdpa": 1e-3, "eager": 1e-3}

# What Inductor and its graph trees warn of by themselves: TF32 that is off, an empty first graph.
COMPILER_WARNINGS = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


def require_gpu() -> torch.device:
    """The first CUDA device; without one the test is skipped, with the reason.

    TURBOQUANT_REQUIRE_GPU=1 makes that a failure, so that a GPU machine cannot pass by skipping.
    """
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif "cuda" not in ops.device_types():
        reason = "turboquant_cpp was built without CUDA kernels"
    else:
        return torch.device("cuda", 0)
    if os.environ.get("TURBOQUANT_REQUIRE_GPU") == "1":
        pytest.fail(f"NOT RUN: {reason}, and TURBOQUANT_REQUIRE_GPU=1 asks for one")
    pytest.skip(f"NOT RUN: {reason}")


def require_fused_attention() -> torch.device:
    """`require_gpu`, and one that attention on the codes runs on."""
    device = require_gpu()
    if torch.cuda.get_device_capability(device)[0] < 8:
        pytest.skip("NOT RUN: attention on the codes needs compute capability 8.0")
    return device
