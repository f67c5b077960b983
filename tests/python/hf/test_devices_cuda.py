"""Caches that change devices, or are on several: offloading, `device_map`, copies, files."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import tiny_models
import torch
from contents import assert_same, contents
from faults import FailAt
from gpu import COMPILER_WARNINGS, MARGINS, require_fused_attention, require_gpu
from tiny_models import assert_same_tokens, generate, left_padded, prompt
from transformers import DynamicCache
from turboquant_cpp import CacheConfig, CompressedDynamicCache, FixedStore, LayerStore

HEADS, DIM = 2, 64
IMPLEMENTATIONS = ["turboquant", "sdpa"]
NAMES = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.fixture(autouse=True)
def gpu():
    return require_gpu()


def new_cache(model, **options):
    return CompressedDynamicCache(**{"config": model.config, "bits": 4, **options})


def devices_of(cache):
    return [layer.store.device.type for layer in cache.compressed_layers()]


def assert_generates_as_on_the_cpu(model, implementation, cache, **options):
    """The tokens of the same model on one CPU; which device the cache's layers are on then."""
    tokens = prompt(2, 200)
    cpu = tiny_models.llama(head_dim=DIM)
    expected = generate(cpu, "turboquant", new_cache(cpu), tokens, new_tokens=70, **options)
    ids, logits = generate(model, implementation, cache, tokens.cuda(), new_tokens=70, **options)
    actual = ids.cpu(), logits.cpu()
    assert_same_tokens(expected, actual, margin=MARGINS[implementation])
    return devices_of(cache)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_offloaded_layers_answer_as_layers_that_stay(implementation):
    """What an offloaded cache reads is dequantised, the same bits with `sdpa`."""
    model = tiny_models.llama(head_dim=DIM, num_hidden_layers=4).cuda()
    tokens, mask = left_padded(prompt(2, 200).cuda(), [37, 0])
    options = {"attention_mask": mask, "new_tokens": 70}
    stays = new_cache(model, attention_mask=mask.cpu())
    leaves = new_cache(model, attention_mask=mask.cpu(), offloading=True)
    expected = generate(model, "sdpa", stays, tokens, **options)
    actual = generate(model, implementation, leaves, tokens, **options)
    # The next step begins with layer 0, which is fetched at the end of each.
    assert devices_of(leaves) == ["cuda", "cpu", "cpu", "cpu"]
    if implementation == "turboquant":  # dense attention of its own
        assert_same_tokens(expected, actual, margin=MARGINS["sdpa"])
        return
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    fetch(leaves)
    assert_same(contents(leaves), contents(stays))


def fetch(cache):
    for layer in cache.compressed_layers():
        layer.prefetch()


def test_an_offloaded_cache_has_copies_and_files(tmp_path):
    """Layers are on the host and on the GPU at that moment; what they hold stays where it is."""
    model = tiny_models.llama(head_dim=DIM).cuda()
    cache = new_cache(model, offloading=True)
    reply, _ = generate(model, "sdpa", cache, prompt(2, 200).cuda())
    devices = devices_of(cache)
    assert devices == ["cuda", "cpu"]
    twin = copy.deepcopy(cache)
    cache.save(tmp_path / "cache")
    stays, leaves = (
        CompressedDynamicCache.load(
            tmp_path / "cache", config=model.config, device="cuda", offloading=offloading
        )
        for offloading in (False, True)
    )
    assert devices_of(cache) == devices_of(twin) == devices_of(leaves) == devices
    results = [
        generate(model, "sdpa", each, reply, new_tokens=70) for each in (cache, twin, stays, leaves)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for each in (cache, twin, leaves):
        assert devices_of(each) == devices
        fetch(each)
        assert_same(contents(each), contents(stays))


def test_beams_over_an_offloaded_cache():
    """Rows are reordered on whichever device a layer's storage is."""
    model = tiny_models.llama(head_dim=DIM).cuda()
    options = {"num_beams": 3, "num_return_sequences": 2, "new_tokens": 40}
    expected, actual = (
        generate(
            model, "sdpa", new_cache(model, offloading=offloading), prompt(2, 150).cuda(), **options
        )
        for offloading in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_an_offloaded_stock_cache_is_taken_over(monkeypatch):
    """With its tokens, of which layer 0's are on the GPU and the others' on the host."""

    def in_order(cache, *arguments, prefetch=DynamicCache.prefetch):
        # The stock cache's copies overtake each other on a busy GPU; see OffloadableCache.
        torch.cuda.synchronize()
        prefetch(cache, *arguments)

    monkeypatch.setattr(DynamicCache, "prefetch", in_order)
    model = tiny_models.llama(head_dim=DIM, num_hidden_layers=4).cuda()
    results = []
    for offloading in (False, True):
        stock = DynamicCache(config=model.config, offloading=offloading)
        ids, _ = generate(model, "sdpa", stock, prompt(2, 200).cuda())
        cache = CompressedDynamicCache(stock, DIM, 4, model_config=model.config)
        devices = ["cuda", *["cpu" if offloading else "cuda"] * 3]
        for each in (cache, stock):  # both objects work
            assert devices_of(cache) == devices
            ids, logits = generate(model, "sdpa", each, ids, new_tokens=70)
            results.append(logits)
        cache.restore()
        assert [layer.keys.device.type for layer in stock.layers] == devices
        results += generate(model, "sdpa", stock, ids)
    half = len(results) // 2
    assert all(map(torch.equal, results[:half], results[half:]))


def test_an_offloaded_cache_holds_no_layer_but_one_on_the_gpu():
    model = tiny_models.llama(head_dim=DIM, num_hidden_layers=8).to("cuda", torch.bfloat16)
    tokens = prompt(1, 2000).cuda()
    generate(model, "sdpa", new_cache(model), tokens, new_tokens=3)  # workspaces of libraries
    held = []
    for offloading in (False, True):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = new_cache(model, offloading=offloading)
        generate(model, "sdpa", cache, tokens, new_tokens=3)
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del cache
    # One layer of eight is there, and its tables.
    assert held[1] < held[0] / 8 + 16 * 1024


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_that_a_device_map_keeps_on_the_host(implementation):
    """accelerate runs such layers on the GPU all the same: so their cache is there."""
    accelerate = pytest.importorskip("accelerate")
    device_map = {**dict.fromkeys(NAMES, 0), "model.layers.0": "cpu"}
    model = accelerate.dispatch_model(tiny_models.llama(head_dim=DIM), device_map)
    devices = assert_generates_as_on_the_cpu(model, implementation, new_cache(model))
    assert devices == ["cuda", "cuda"]


def runs_on_cpu(layer):
    """Make a layer of a model on a GPU compute on the CPU, as pipelines over devices do."""

    def moved(value, device):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(moved(part, device) for part in value)
        return value

    def before(module, args, kwargs):
        cpu = {name: moved(value, "cpu") for name, value in kwargs.items()}
        return moved(args, "cpu"), cpu

    layer.cpu()
    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(lambda module, args, out: moved(out, "cuda"))


def assert_goes_on_from_a_file(model, implementation, cache, devices, folder):
    """What is loaded to the same devices holds the same and gives the same logits."""
    cache.save(folder / "cache")
    loaded = CompressedDynamicCache.load(folder / "cache", config=model.config, device=devices)
    assert_same(contents(loaded), contents(cache))
    tokens = prompt(2, 290, seed=1).to(model.device)
    options = {"new_tokens": 9, "disable_compile": True}
    results = [generate(model, implementation, each, tokens, **options) for each in (cache, loaded)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 300}], ids=["growing", "fixed"])
def test_layers_on_the_cpu_and_on_the_gpu(implementation, options, tmp_path):
    model = tiny_models.llama(head_dim=DIM).cuda()
    runs_on_cpu(model.model.layers[0])
    cache = new_cache(model, **options)
    devices = assert_generates_as_on_the_cpu(model, implementation, cache, disable_compile=True)
    assert devices == ["cpu", "cuda"]
    twin = copy.deepcopy(cache)
    assert devices_of(twin) == devices
    assert_same(contents(twin), contents(cache))
    assert_goes_on_from_a_file(model, implementation, cache, devices, tmp_path)


def on_two_gpus():
    """A model whose first layer is on one GPU and whose second is on another."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NOT RUN: one CUDA device")
    accelerate = pytest.importorskip("accelerate")
    device_map = {**dict.fromkeys(NAMES, 1), "model.layers.0": 0, "model.embed_tokens": 0}
    return accelerate.dispatch_model(tiny_models.llama(head_dim=DIM), device_map)


def gpus_of(cache):
    return [layer.store.device.index for layer in cache.compressed_layers()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 300}], ids=["growing", "fixed"])
def test_layers_on_two_gpus(implementation, options, tmp_path):
    model = on_two_gpus()
    cache = new_cache(model, **options)
    assert_generates_as_on_the_cpu(model, implementation, cache, disable_compile=True)
    assert gpus_of(cache) == [0, 1]
    twin = copy.deepcopy(cache)
    assert gpus_of(twin) == [0, 1]
    assert_same(contents(twin), contents(cache))
    assert_goes_on_from_a_file(model, implementation, cache, ["cuda:0", "cuda:1"], tmp_path)


def test_rows_of_layers_on_two_gpus():
    """Beams reorder every layer's rows on its own GPU; a crop goes back on both."""
    model = on_two_gpus()
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("NOT RUN: two CUDA devices of different kinds, whose bits may differ")
    tokens = prompt(2, 150).cuda()
    options = {"num_beams": 3, "num_return_sequences": 2, "new_tokens": 70}
    alone = tiny_models.llama(head_dim=DIM).cuda()
    expected = generate(alone, "turboquant", new_cache(alone), tokens, **options)
    cache = new_cache(model)
    actual = generate(model, "turboquant", cache, tokens, **options)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, actual, strict=True))
    before = [layer.get_seq_length() for layer in cache.layers]
    cache.crop(-30)
    assert gpus_of(cache) == [0, 1]
    assert [layer.get_seq_length() for layer in cache.layers] == [n - 30 for n in before]


def test_a_copy_on_the_gpu_goes_on_by_itself():
    model = tiny_models.llama(head_dim=DIM).cuda()
    cache = new_cache(model)
    reply, _ = generate(model, "turboquant", cache, prompt(2, 200).cuda())
    twin = copy.deepcopy(cache)
    places = {tensor.data_ptr() for layer in cache.layers for tensor in layer.store._slabs}
    assert not places & {t.data_ptr() for layer in twin.layers for t in layer.store._slabs}
    before = contents(cache)
    expected = generate(model, "turboquant", twin, reply, new_tokens=70)
    assert_same(contents(cache), before)
    actual = generate(model, "turboquant", cache, reply, new_tokens=70)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def random_chunk(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, HEADS, tokens, DIM, generator=generator).cuda().half()


def filled_store(is_fixed):
    """On the GPU, with rows of 300 and 170 tokens."""
    spec = CacheConfig(bits=4).layer_spec(0, DIM, HEADS)
    options = {"batch_size": 2, "dtype": torch.float16, "device": "cuda"}
    store = FixedStore(spec, max_tokens=600, **options) if is_fixed else LayerStore(spec, **options)
    store.append(*random_chunk(300), [300, 170])
    return store


@pytest.mark.parametrize("is_fixed", [False, True], ids=["growing", "fixed"])
def test_a_move_that_fails_leaves_the_store_where_it_is(is_fixed):
    require_fused_attention()
    expected, failures = filled_store(is_fixed), 0
    query, chunk = random_chunk(1, seed=2)[0], random_chunk(1, seed=3)
    step = expected.attend_append(query, *chunk, scaling=0.125)
    for nth in itertools.count(1):
        store = filled_store(is_fixed)
        store.attend(query, scaling=0.125)  # its tables are on the GPU
        try:
            with FailAt(nth):
                store.to("cpu")
        except torch.OutOfMemoryError:
            failures += 1
        else:
            break
        assert store.device.type == "cuda"
        assert torch.equal(store.attend_append(query, *chunk, scaling=0.125), step)
        assert all(map(torch.equal, store.codes(), expected.codes()))
    assert failures > 5


@pytest.mark.parametrize("is_fixed", [False, True], ids=["growing", "fixed"])
def test_a_store_moves_to_the_host_and_back(is_fixed):
    require_fused_attention()
    stays, moves = filled_store(is_fixed), filled_store(is_fixed)
    places = [tensor.data_ptr() for tensor in moves._slabs]
    assert moves.to("cpu") is moves
    assert moves.device.type == "cpu"
    assert moves.lengths == [300, 170]
    for mine, theirs in zip(moves.codes(), stays.codes(), strict=True):
        assert torch.equal(mine, theirs.cpu())
    # On the host it goes on with the same codes: every backend makes the same.
    chunk = random_chunk(100, seed=1)
    moves.append(*chunk.cpu())
    stays.append(*chunk)
    with pytest.raises(ValueError, match="key_states: expected device cpu, got cuda:0"):
        moves.append(*chunk)
    moves.to("cuda")
    assert moves.device == stays.device
    assert [tensor.data_ptr() for tensor in moves._slabs] != places or is_fixed
    for mine, theirs in zip(
        (*moves.codes(), *moves.dequantize()), (*stays.codes(), *stays.dequantize()), strict=True
    ):
        assert torch.equal(mine, theirs)
    query, chunk = random_chunk(1, seed=2)[0], random_chunk(1, seed=3)
    steps = [store.attend_append(query, *chunk, scaling=0.125) for store in (stays, moves)]
    assert torch.equal(*steps)
    assert moves.lengths == stays.lengths == [401, 271]


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 400}], ids=["growing", "fixed"])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_file_goes_from_device_to_device(tmp_path, options, saved_on, loaded_on):
    """What is loaded holds the same bytes and goes on with the same tokens."""
    models = {
        "cpu": tiny_models.llama(head_dim=DIM),
        "cuda": tiny_models.llama(head_dim=DIM).cuda(),
    }
    model, other = models[saved_on], models[loaded_on]
    cache = new_cache(model, **options)
    tokens = prompt(2, 200).to(saved_on)
    reply, _ = generate(model, "turboquant", cache, tokens, disable_compile=True)
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache", config=other.config, device=loaded_on)
    assert devices_of(loaded) == [loaded_on] * 2
    for mine, theirs in zip(loaded.compressed_layers(), cache.compressed_layers(), strict=True):
        for a, b in zip(mine.store.codes(), theirs.store.codes(), strict=True):
            assert torch.equal(a.cpu(), b.cpu())
    results = [
        generate(
            each, "turboquant", held, reply.to(each.device), new_tokens=70, disable_compile=True
        )
        for each, held in ((model, cache), (other, loaded))
    ]
    expected, actual = (tuple(part.cpu() for part in result) for result in results)
    assert_same_tokens(expected, actual, margin=MARGINS["turboquant"])


@COMPILER_WARNINGS
def test_a_fixed_cache_loaded_on_the_gpu_is_compiled_there(tmp_path):
    """`generate()` compiles the steps after the new prompt, in CUDA graphs."""
    require_fused_attention()
    model = tiny_models.llama(head_dim=DIM).cuda()
    cache = new_cache(model, max_cache_len=400)
    reply, _ = generate(model, "turboquant", cache, prompt(1, 150).cuda(), disable_compile=True)
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache", config=model.config, device="cuda")
    expected = generate(model, "turboquant", cache, reply, new_tokens=100, disable_compile=True)
    actual = generate(model, "turboquant", loaded, reply, new_tokens=100)
    assert_same_tokens(expected, actual, margin=MARGINS["turboquant"])
    assert int(loaded.get_seq_length()) == int(cache.get_seq_length())
