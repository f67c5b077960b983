"""Operators and store on CUDA tensors, held to the CPU's: same bytes, same dense numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from gpu import require_fused_attention, require_gpu
from operands import DIM, HEADS, QUERY_HEADS, REFUSED, Operands
from turboquant_cpp import CacheConfig, LayerStore, ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [
    {},
    {"bits": 3},
    {"bits": 2, "scale_dtype": "float16"},
    {"k_bits": 5, "v_bits": 3, "window_tokens": 128},
    {"k_bits": 8, "v_bits": 4, "sink_tokens": 0},
    {"recipe": "plain"},
    {"smooth_keys": False, "center_keys": False},
    {"bits": 2, "codebook": "vector"},
    {"bits": 3, "codebook": "vector"},
]

attend = functools.partial(ops.decode_attention, scaling=DIM**-0.5)


@pytest.fixture(autouse=True)
def gpu():
    return require_gpu()


@pytest.fixture
def fused():
    return require_fused_attention()


def on_both(**options):
    """Filled operands on the CPU and on the GPU."""
    return Operands(**options).fill(), Operands(device="cuda", **options).fill()


def assert_equal(expected, actual):
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0)


def assert_near(expected, actual):
    """Within what float16 operands lose, 2^-11 of every coordinate, and the dtype's rounding."""
    tolerance = max(2e-3, 4 * torch.finfo(expected.dtype).eps)
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(200, 90), (3, 0, 500)], ids=str)
def test_append_and_dequantize_give_the_bytes_of_the_cpu(options, dtype, lengths):
    cpu, gpu = on_both(lengths=lengths, dtype=dtype, **options)
    for name in ("exact_keys", "exact_values", "smoothing", "counters"):
        assert_equal(getattr(cpu, name), getattr(gpu, name))
    for expected, actual in zip(cpu.slabs, gpu.slabs, strict=True):
        assert_equal(expected, actual)
    results = []
    for operands in (cpu, gpu):
        arguments = operands.dequantize_arguments()
        torch.ops.turboquant.dequantize(*arguments)
        results.append(arguments[6:8])
    for expected, actual in zip(*results, strict=True):
        assert_equal(expected, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("query_tokens", [1, 16, 17, 90])
def test_attention_is_near_that_of_the_cpu(fused, options, dtype, query_tokens):
    cpu, gpu = on_both(dtype=dtype, query_tokens=query_tokens, **options)
    expected, expected_lse = attend(*cpu.attention_arguments())
    out, lse = attend(*gpu.attention_arguments())
    assert out.device == gpu.query.device
    assert_near(expected, out)
    assert_near(expected_lse, lse)


@pytest.mark.parametrize(
    "call", [{"softcap": 2.0}, {"sliding_window": 100}, {"scaling": 0.5}], ids=str
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_kinds_of_attention_are_near_those_of_the_cpu(fused, call, with_sinks):
    cpu, gpu = on_both()
    sinks = torch.linspace(-1, 1, QUERY_HEADS) if with_sinks else None
    expected = attend(*cpu.attention_arguments(sinks), **call)
    sinks = None if sinks is None else sinks.cuda()
    for one, other in zip(expected, attend(*gpu.attention_arguments(sinks), **call), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_attention_then_append(fused, options):
    # 16 tokens more move a block to a page.
    once, twice = (
        Operands(lengths=(180, 116), device="cuda", query_tokens=16, **options).fill()
        for _ in range(2)
    )
    plan, arguments = once.step_arguments()
    assert plan.moves_tokens
    out = ops.attend_append(*arguments)
    query, keys, values, *tables, _, ints = twice.attention_arguments()
    expected, _ = attend(query, keys, values, *tables, None, ints)
    assert torch.equal(out.transpose(1, 2), expected)
    *storage, _, rows = tables
    jobs = twice.upload(plan.jobs)
    ops.encode_append(keys, values, *storage, twice.counters, rows, jobs, ints)
    for name in ("exact_keys", "exact_values", "smoothing", "counters"):
        assert torch.equal(getattr(once, name), getattr(twice, name))
    for one, other in zip(once.slabs, twice.slabs, strict=True):
        assert torch.equal(one, other)


def test_operators_pass_opcheck(fused):
    _, arguments = Operands(device="cuda").append_arguments()
    torch.library.opcheck(torch.ops.turboquant.encode_append.default, arguments)
    operands = Operands(device="cuda").fill()
    torch.library.opcheck(torch.ops.turboquant.dequantize.default, operands.dequantize_arguments())
    arguments = (*operands.attention_arguments(), 0.125, 0.0, 0)
    torch.library.opcheck(torch.ops.turboquant.decode_attention.default, arguments)
    _, arguments = operands.step_arguments()
    torch.library.opcheck(torch.ops.turboquant.attend_append.default, arguments)


def test_operators_take_a_layer_without_slabs(fused):
    cpu = Operands(lengths=(20, 3))
    gpu = Operands(lengths=(20, 3), device="cuda")
    cpu.slabs, gpu.slabs = [], []
    expected = attend(*cpu.fill().attention_arguments())
    for one, other in zip(expected, attend(*gpu.fill().attention_arguments()), strict=True):
        assert_near(one, other)


def test_work_goes_to_the_current_stream_and_waits_for_nothing(fused):
    arguments = Operands(device="cuda").fill().attention_arguments()
    query = arguments[0]
    expected = attend(query * 2, *arguments[1:])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        query.mul_(2)  # another stream's work would not see this
        actual = attend(*arguments)
        has_waited = stream.query()
    stream.synchronize()
    assert not has_waited
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


def test_attention_replays_in_a_graph(fused):
    _, gpu = on_both()
    arguments = gpu.attention_arguments()
    expected = attend(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*arguments)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(expected, captured, strict=True):
        assert torch.equal(one, two)


def test_the_first_use_of_a_spec_is_not_captured():
    arguments = Operands(device="cuda").append_arguments()[1]
    unseen = CacheConfig(bits=4, seed=987654321).layer_spec(0, DIM, HEADS).to_ints()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(graph):
        ops.encode_append(*arguments[:-1], unseen)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, lambda t: t.cpu(), "value_states: expected a tensor on cuda:0"),
        (2, lambda t: t.cpu(), "exact_keys: expected a tensor on cuda:0"),
        (4, lambda t: t.cpu(), "smoothing: expected a tensor on cuda:0"),
        (5, lambda s: [s[0], s[1].cpu()], r"slabs\[1\]: expected a tensor on cuda:0"),
        (7, lambda t: t.cpu(), "rows: expected a tensor on cuda:0"),
        (8, lambda t: t.cpu(), "jobs: expected a tensor on cuda:0"),
        (7, lambda t: t.long(), "rows: expected dtype Int"),
        (8, lambda t: t[:, :5].contiguous(), "jobs: expected shape"),
        (0, lambda t: t.double(), "key_states: expected the dtype of exact_keys"),
        (1, lambda t: t[:, :1], "value_states: expected shape"),
    ],
)
def test_encode_append_refuses_what_does_not_fit(index, change, message):
    operands = Operands(device="cuda")
    _, arguments = operands.append_arguments()
    changed = (*arguments[:index], change(arguments[index]), *arguments[index + 1 :])
    with pytest.raises(REFUSED, match=message):
        ops.encode_append(*changed)
    assert not any(slab.any() for slab in operands.slabs)


def make_stores(batch=2, head_dim=DIM, dtype=torch.bfloat16, **options):
    spec = CacheConfig(**{"bits": 4, **options}).layer_spec(0, head_dim, HEADS)
    return [
        LayerStore(spec, batch_size=batch, dtype=dtype, device=device) for device in ("cpu", "cuda")
    ]


def chunk(tokens, batch=2, head_dim=DIM, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, tokens, head_dim, generator=generator).to(dtype)


def assert_same_store(cpu, gpu):
    assert cpu.lengths == gpu.lengths
    assert cpu.encoded_tokens == gpu.encoded_tokens
    for expected, actual in zip(cpu.dequantize(), gpu.dequantize(), strict=True):
        assert_equal(expected, actual)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}, {"bits": 3}], ids=str)
def test_a_store_lives_through_the_same_life_on_both_devices(fused, head_dim, options):
    stores = make_stores(head_dim=head_dim, **options)
    assert stores[1].device == torch.device("cuda", torch.cuda.current_device())
    make = functools.partial(chunk, head_dim=head_dim)

    def append(tokens, seed, new_tokens=None):
        keys, values = make(tokens, len(stores[0].lengths), seed=seed)
        for store in stores:
            store.append(keys.to(store.device), values.to(store.device), new_tokens)
        assert_same_store(*stores)

    append(300, 0, [300, 170])
    for step in range(3):
        append(1, 1 + step)
    for store in stores:
        store.select([1, 0, 1])
    append(150, 5)  # rows that share pages write to copies of them
    for store in stores:
        store.crop([200, 301, 17])
    append(70, 6)
    query = make(1, 3, seed=7)[0].repeat_interleave(2, 1)
    keys, values = make(1, 3, seed=8)
    results = [
        store.attend(
            *(part.to(store.device) for part in (query, keys, values)), scaling=head_dim**-0.5
        )
        for store in stores
    ]
    for expected, actual in zip(*results, strict=True):
        assert_near(expected, actual)
    for expected, actual in zip(*(store.codes() for store in stores), strict=True):
        assert_equal(expected, actual)


def test_a_store_moves_between_devices(fused):
    cpu, gpu = make_stores()
    keys, values = chunk(300)
    cpu.append(keys, values)
    gpu.append(keys.cuda(), values.cuda())
    gpu.to("cpu")
    assert_same_store(cpu, gpu)
    cpu.to("cuda")
    twin = cpu.clone()
    more = chunk(100, seed=1)
    for store in (cpu, twin):
        store.append(*more.cuda())
    gpu.append(*more)
    assert_same_store(gpu, cpu)
    assert_same_store(gpu, twin)


def test_a_store_measures_its_memory():
    _, store = make_stores(batch=1)
    keys, values = chunk(4096, batch=1).cuda()
    store.append(keys[:, :, :64], values[:, :, :64])  # the codec's tables are there from now on
    store.reset()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    store.append(keys, values)
    held = torch.cuda.memory_allocated() - before
    parts = sum(store.nbytes().values())
    # The allocator rounds every tensor up to 512 bytes.
    assert parts <= held <= parts + 512 * (len(store._slabs) + 5)


def test_what_cannot_be_attended_is_said_and_can_be_dequantised():
    for head_dim, options, message in (
        (64, {"bits": 1}, r"k_bits\+v_bits 4\+4 .*, got head_dim 64 with 1\+1"),
        (160, {}, "head_dim 64 80 96 128 256 with .*, got head_dim 160"),
    ):
        _, store = make_stores(head_dim=head_dim, **options)
        keys, values = chunk(200, head_dim=head_dim).cuda()
        store.append(keys, values)
        with pytest.raises(ValueError, match=f"query: CUDA attention takes .*{message}"):
            store.attend(keys[:, :, :1], scaling=0.1)
        assert store.dequantize()[0].shape == keys.shape


def test_rows_too_long_for_the_kernels_are_refused():
    with pytest.raises(ValueError, match="head_dim: expected at most 256 on CUDA devices, got 320"):
        make_stores(head_dim=320)
