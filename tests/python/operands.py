"""Arguments of the torch operators, on any device."""

from __future__ import annotations

import torch
from turboquant_cpp import ops
from turboquant_cpp._core import BlockLayout, PageTable
from turboquant_cpp.spec import CacheConfig

BATCH, HEADS, QUERY_HEADS, DIM = 2, 2, 4, 64
# What an InvalidArgument thrown by an operator becomes, depending on the release of torch.
REFUSED = (RuntimeError, ValueError)


class Operands:
    """A layer's storage made by hand, so that the operators are tested without the store.

    Numbers are the same on every device.
    """

    def __init__(
        self, lengths=(200, 90), dtype=torch.float32, device="cpu", query_tokens=3, **options
    ):
        self.device = device
        self.spec = CacheConfig(**{"bits": 4, **options}).layer_spec(0, DIM, HEADS)
        self.ints = self.spec.to_ints()
        self.table = PageTable(self.spec, len(lengths))
        shape = (len(lengths), HEADS, self.spec.exact_capacity, DIM)
        self.exact_keys = torch.zeros(shape, dtype=dtype, device=device)
        self.exact_values = torch.zeros(shape, dtype=dtype, device=device)
        self.smoothing = torch.ones(len(lengths), HEADS, DIM, device=device)
        self.counters = torch.zeros(2, dtype=torch.int64, device=device)
        page_bytes = BlockLayout(self.spec).page_bytes(HEADS)
        self.slabs = [
            torch.zeros(4, page_bytes, dtype=torch.uint8, device=device) for _ in range(4)
        ]
        generator = torch.Generator().manual_seed(3)
        tokens = max(lengths)
        self.keys, self.values = torch.randn(
            2, len(lengths), HEADS, tokens, DIM, generator=generator
        ).to(device, dtype)
        self.query = torch.randn(
            len(lengths), QUERY_HEADS, query_tokens, DIM, generator=generator
        ).to(device, dtype)
        self.lengths = list(lengths)

    def upload(self, table):
        return torch.from_numpy(table).to(self.device)

    def append_arguments(self):
        plan = self.table.plan_append(self.lengths)
        return plan, (
            self.keys,
            self.values,
            self.exact_keys,
            self.exact_values,
            self.smoothing,
            self.slabs,
            self.counters,
            self.upload(self.table.rows(self.lengths)),
            self.upload(plan.jobs),
            self.ints,
        )

    def fill(self):
        plan, arguments = self.append_arguments()
        ops.encode_append(*arguments)
        self.table.prepare(plan)
        self.table.commit(plan)
        return self

    def dequantize_arguments(self):
        shape = (len(self.lengths), HEADS, max(self.lengths) + 5, DIM)
        return (
            self.exact_keys,
            self.exact_values,
            self.smoothing,
            self.slabs,
            self.upload(self.table.page_table()),
            self.upload(self.table.rows()),
            torch.empty(shape, dtype=self.keys.dtype, device=self.device),
            torch.empty(shape, dtype=self.keys.dtype, device=self.device),
            self.ints,
            max(self.lengths) + 5,
            0,
        )

    def attention_arguments(self, sinks=None):
        tokens = self.query.shape[2]
        return (
            self.query,
            self.keys[:, :, :tokens],
            self.values[:, :, :tokens],
            self.exact_keys,
            self.exact_values,
            self.smoothing,
            self.slabs,
            self.upload(self.table.page_table()),
            self.upload(self.table.rows([tokens] * len(self.lengths))),
            sinks,
            self.ints,
        )

    def step_arguments(self, sinks=None):
        """Of `attend_append`, and the plan to commit after it."""
        query, keys, values, *storage, page_table, rows, sinks, ints = self.attention_arguments(
            sinks
        )
        plan = self.table.plan_append([query.shape[2]] * len(self.lengths))
        jobs = self.upload(plan.jobs)
        return plan, (
            query,
            keys,
            values,
            *storage,
            self.counters,
            page_table,
            rows,
            jobs,
            sinks,
            ints,
            0.125,
            0.0,
            0,
        )
