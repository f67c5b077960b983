from __future__ import annotations

import functools

import pytest
import torch
from operands import BATCH, DIM, QUERY_HEADS, REFUSED, Operands
from turboquant_cpp import ops

attend = functools.partial(ops.decode_attention, scaling=0.125)


def test_encode_append_passes_opcheck():
    _, arguments = Operands().append_arguments()
    torch.library.opcheck(torch.ops.turboquant.encode_append.default, arguments)


def test_dequantize_passes_opcheck():
    arguments = Operands().fill().dequantize_arguments()
    torch.library.opcheck(torch.ops.turboquant.dequantize.default, arguments)


def fixed_tables(past=(200, 90), padding=(0, 0), max_tokens=500):
    """Tables of two rows with `past` tokens, and the spec's integers."""
    operands = Operands()
    table = operands.table
    plan = table.plan_append(past)
    table.prepare(plan)
    table.commit(plan)
    entries = torch.from_numpy(table.page_table())
    page_table = torch.zeros(2, 6, 2, dtype=torch.int32)
    page_table[:, :, 0] = torch.arange(12).view(2, 6)
    page_table[:, : entries.shape[1], 1] = entries[:, :, 1]
    positions = torch.zeros(2, 3, dtype=torch.int32)
    positions[:, 0] = torch.tensor(padding)
    return torch.from_numpy(table.rows()), page_table, positions, operands.ints


def test_plan_append_passes_opcheck():
    arguments = (*fixed_tables(), 70, 500)
    torch.library.opcheck(torch.ops.turboquant.plan_append.default, arguments)


def test_commit_append_passes_opcheck():
    tables = fixed_tables()
    planned, _ = ops.plan_append(*tables, chunk_tokens=70, max_tokens=500)
    arguments = (planned, *tables, 70, 500)
    torch.library.opcheck(torch.ops.turboquant.commit_append.default, arguments)


def test_a_plan_changes_nothing_and_its_commit_is_the_plan():
    tables = fixed_tables(past=(195, 0), padding=(0, 68))
    before = [table.clone() for table in tables[:3]]
    planned, jobs = ops.plan_append(*tables, chunk_tokens=70, max_tokens=500)
    assert all(torch.equal(a, b) for a, b in zip(before, tables, strict=False))
    assert planned.tolist() == [[195, 1, 68, 70], [0, 0, 0, 2]]
    # Row 0 has 197 tokens behind its page: two more pages. 70 tokens may take two jobs a row.
    assert jobs.tolist()[0] == [0, 68, 64, 1, 0, 0]
    assert jobs[1:, 2].tolist() == [64, 0, 0]
    ops.commit_append(planned, *tables, chunk_tokens=70, max_tokens=500)
    assert tables[0].tolist() == [[265, 3, 196, 0], [2, 0, 2, 0]]
    assert tables[1][0, :, 1].tolist() == [64, 64, 64, 0, 0, 0]
    assert tables[2].tolist() == [[0, 70, 0], [68, 70, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": lambda t: t.long()}, "rows: expected dtype Int"),
        ({"rows": lambda t: t[:, :3].contiguous()}, "rows: expected shape"),
        ({"rows": lambda t: t + 1000}, "rows"),
        ({"page_table": lambda t: t[:1]}, "page_table: expected shape"),
        ({"page_table": lambda t: t[:, :4].contiguous()}, "page_table: expected 6 entries"),
        ({"positions": lambda t: t[:, :2].contiguous()}, "positions: expected shape"),
        ({"positions": lambda t: t - 1}, "positions"),
        ({"chunk_tokens": lambda n: -1}, "chunk_tokens: expected"),
        ({"chunk_tokens": lambda n: 301}, "at most 300 more tokens in row 0 .* made for 500"),
        ({"max_tokens": lambda n: 0}, "max_tokens: expected"),
    ],
)
def test_plan_append_refuses_what_does_not_fit(change, message):
    names = ("rows", "page_table", "positions", "spec")
    arguments = dict(zip(names, fixed_tables(), strict=True), chunk_tokens=70, max_tokens=500)
    for name, make in change.items():
        arguments[name] = make(arguments[name])
    with pytest.raises(REFUSED, match=message):
        ops.plan_append(**arguments)


def test_jobs_of_no_tokens_are_skipped():
    """Room for jobs, before, between and behind them, encodes nothing, whatever else it says."""
    results = []
    for pad in (False, True):
        operands = Operands()
        _, arguments = operands.append_arguments()
        jobs = arguments[8]
        if pad:
            room = torch.full((2 * len(jobs) + 1, 6), 12345, dtype=torch.int32)
            room[:, 2] = 0
            room[1::2] = jobs
            jobs = room
        ops.encode_append(*replaced(arguments, 8, jobs))
        results.append([*operands.slabs, operands.exact_keys, operands.smoothing])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sinks", [None, torch.zeros(QUERY_HEADS)])
def test_decode_attention_passes_opcheck(sinks):
    arguments = (*Operands().fill().attention_arguments(sinks), 0.125, 0.0, 0)
    torch.library.opcheck(torch.ops.turboquant.decode_attention.default, arguments)


@pytest.mark.parametrize("sinks", [None, torch.zeros(QUERY_HEADS)])
def test_attend_append_passes_opcheck(sinks):
    # 60 tokens a row more: both rows move a block to a page.
    _, arguments = Operands(query_tokens=60).fill().step_arguments(sinks)
    torch.library.opcheck(torch.ops.turboquant.attend_append.default, arguments)


def test_an_operator_without_slabs_passes_opcheck():
    operands = Operands(lengths=(20, 3))
    operands.slabs = []
    _, arguments = operands.append_arguments()
    torch.library.opcheck(torch.ops.turboquant.encode_append.default, arguments)
    operands.fill()
    arguments = (*operands.attention_arguments(), 0.125, 0.0, 0)
    torch.library.opcheck(torch.ops.turboquant.decode_attention.default, arguments)


def test_compiled_functions_give_the_same_bits():
    def read(arguments):
        out, lse = attend(*arguments)
        return out * 2, lse + 1

    eager = Operands().fill()
    traced = Operands()
    plan, arguments = traced.append_arguments()
    compiled = torch.compile(
        lambda *args: ops.encode_append(*args), fullgraph=True, backend="aot_eager"
    )
    compiled(*arguments)
    traced.table.prepare(plan)
    traced.table.commit(plan)
    assert all(torch.equal(a, b) for a, b in zip(traced.slabs, eager.slabs, strict=True))
    assert torch.equal(traced.exact_keys, eager.exact_keys)
    assert torch.equal(traced.smoothing, eager.smoothing)
    compiled_read = torch.compile(read, fullgraph=True, backend="aot_eager")
    arguments = eager.attention_arguments()
    for mine, theirs in zip(compiled_read(arguments), read(arguments), strict=True):
        assert torch.equal(mine, theirs)


def test_the_fake_operators_know_shapes_and_dtypes():
    arguments = Operands(dtype=torch.bfloat16).fill().attention_arguments()
    meta = [
        [slab.to("meta") for slab in argument]
        if isinstance(argument, list) and isinstance(argument[0], torch.Tensor)
        else argument.to("meta")
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in arguments
    ]
    out, lse = attend(*meta)
    assert (out.shape, out.dtype) == ((BATCH, QUERY_HEADS, 3, DIM), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((BATCH, QUERY_HEADS, 3), torch.float32)


def test_results_do_not_depend_on_the_number_of_threads():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            operands = Operands().fill()
            results.append([*operands.slabs, operands.smoothing])
            results[-1] += attend(*operands.attention_arguments())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_devices_with_kernels_are_listed():
    assert "cpu" in ops.device_types()
    assert "meta" not in ops.device_types()


def replaced(arguments, index, value):
    return (*arguments[:index], value, *arguments[index + 1 :])


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.double(), "key_states: expected the dtype of exact_keys"),
        (1, lambda t: t[:, :1], "value_states: expected shape"),
        (2, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "exact_keys: expected a con"),
        (2, lambda t: t[0], "exact_keys: expected shape"),
        (3, lambda t: t.half(), "exact_values: expected the dtype of exact_keys"),
        (4, lambda t: t.double(), "smoothing: expected dtype Float"),
        (4, lambda t: t[:1], "smoothing: expected shape"),
        (5, lambda s: [slab[:, :-1].contiguous() for slab in s], r"slabs\[0\]: expected shape"),
        (5, lambda s: [s[0], s[1][:2]], r"slabs\[1\]: expected shape"),
        (5, lambda s: [slab.char() for slab in s], r"slabs\[0\]: expected dtype Byte"),
        (5, lambda s: [], "page"),
        (6, lambda t: t.int(), "counters: expected dtype Long"),
        (7, lambda t: t.long(), "rows: expected dtype Int"),
        (7, lambda t: t[:, :3].contiguous(), "rows: expected shape"),
        (7, lambda t: t + 1000, "rows"),
        (8, lambda t: t.t().contiguous().t(), "jobs: expected a contiguous"),
        (8, lambda t: t + 100, "jobs"),
        (8, lambda t: t - 100, "jobs"),
        (9, lambda i: i[:-1], "spec: expected 14 integers, got 13"),
        (9, lambda i: [72, *i[1:]], "head_dim"),
    ],
)
def test_encode_append_refuses_what_does_not_fit(index, change, message):
    operands = Operands()
    _, arguments = operands.append_arguments()
    with pytest.raises(REFUSED, match=message):
        ops.encode_append(*replaced(arguments, index, change(arguments[index])))
    assert not any(slab.any() for slab in operands.slabs)
    assert not operands.exact_keys.any()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (3, lambda s: s[:0], "page"),
        (4, lambda t: t + 100, "page"),
        (4, lambda t: -t, "page"),
        (4, lambda t: t[:1], "page_table: expected shape"),
        (5, lambda t: t * 2, "rows"),
        (6, lambda t: t[:, :, 10:], "out_values: expected shape"),
        (7, lambda t: t.int(), "out_values: expected dtype"),
        (9, lambda n: n - 6, "past_tokens: expected at least the longest row's length 200, got"),
        (9, lambda n: n - 1, "out_keys: expected at most past_tokens positions, 204, got 205"),
        (10, lambda n: 1, "first_position: expected 0 to .*, 0, got 1"),
        (10, lambda n: -1, "first_position: expected"),
    ],
)
def test_dequantize_refuses_what_does_not_fit(index, change, message):
    arguments = Operands().fill().dequantize_arguments()
    operator = torch.ops.turboquant.dequantize
    with pytest.raises(REFUSED, match=message):
        operator(*replaced(arguments, index, change(arguments[index])))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[:, :3], "query"),
        (0, lambda t: t[..., :32], "query"),
        (0, lambda t: t[0], "query: expected shape"),
        (0, lambda t: t.long(), "query: expected the dtype"),
        (1, lambda t: t[:, :, :2], "(key|value)_states"),
        (7, lambda t: t + 100, "page"),
        (8, lambda t: t[:1], "rows: expected shape"),
        (9, lambda t: torch.zeros(3), "sink_logits: expected shape"),
        (9, lambda t: torch.zeros(4).half(), "sink_logits: expected dtype Float"),
    ],
)
def test_decode_attention_refuses_what_does_not_fit(index, change, message):
    arguments = Operands().fill().attention_arguments()
    with pytest.raises(REFUSED, match=message):
        attend(*replaced(arguments, index, change(arguments[index])))


def test_no_output_carries_a_gradient():
    arguments = Operands().fill().attention_arguments()
    query = arguments[0].clone().requires_grad_()
    with torch.no_grad():
        out, _ = attend(query, *arguments[1:])
    assert not out.requires_grad
