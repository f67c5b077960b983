"""`save` and `load`: the same tokens in another process, what is in a file, files to refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import damage
import pytest
import tiny_models
import torch
from contents import assert_same, contents
from faults import FailAt
from saved_caches import filled, fixed_and_filled, fixed_config, states
from tiny_models import generate, left_padded, prompt
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from turboquant_cpp import CompressedDynamicCache, FormatError, container

_CONTINUE = """
import sys, torch, tiny_models
from turboquant_cpp import CompressedDynamicCache
path, implementation, padding = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = tiny_models.{model}()
cache = CompressedDynamicCache.load(path, config=model.config)
tokens, mask = (torch.load(path + name) for name in (".tokens", ".mask"))
ids, _ = tiny_models.generate(
    model, implementation, cache, tokens, new_tokens=90, attention_mask=mask)
print(ids[:, tokens.shape[1]:].tolist())
"""


def saved(cache: CompressedDynamicCache, path: Path) -> bytes:
    cache.save(path)
    return path.read_bytes()


def run_python(code: str, *arguments: str) -> str:
    """Run code in another interpreter and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("model", "implementation", "padding"),
    [("llama", "turboquant", 0), ("llama", "turboquant", 9), ("gemma3", "sdpa", 0)],
)
def test_another_process_continues_with_the_same_tokens(tmp_path, model, implementation, padding):
    made = getattr(tiny_models, model)()
    tokens, mask = left_padded(prompt(2, 200), [0, padding])
    cache = CompressedDynamicCache(config=made.config, bits=4, layer_bits={1: (8, 3)})
    reply, _ = generate(made, implementation, cache, tokens, attention_mask=mask)
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    longer = torch.cat([reply, prompt(2, 9, seed=1)], 1)
    mask = torch.cat([mask, torch.ones(2, longer.shape[1] - 200, dtype=mask.dtype)], 1)
    torch.save(longer, f"{path}.tokens")
    torch.save(mask, f"{path}.mask")
    printed = run_python(_CONTINUE.format(model=model), str(path), implementation, str(padding))
    ids, _ = generate(made, implementation, cache, longer, new_tokens=90, attention_mask=mask)
    assert printed == str(ids[:, longer.shape[1] :].tolist())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "window_tokens": 128, "sink_tokens": 0},
        {"bits": 8, "layer_bits": {0: (5, 2)}, "seed": 2**63 - 1},
        {"bits": 2, "recipe": "plain"},
        {"bits": 2, "codebook": "vector"},
        {"bits": 1, "scale_dtype": "float32", "center_keys": False, "k_scale_rule": "norm"},
        {"bits": 4, "exact_first_layers": 1, "prefill": "quantized"},
        {"bits": 4, "left_padding": [0, 250]},
    ],
    ids=str,
)
def test_what_is_loaded_is_what_was_saved(tmp_path, options):
    cache = filled(**options)
    cache.crop(-3)
    path = tmp_path / "cache"
    cache.save(path)
    loaded = CompressedDynamicCache.load(path)
    assert loaded.context.config == cache.context.config
    assert loaded.context.prefill == cache.context.prefill
    assert_same(contents(loaded), contents(cache))
    for one, other in zip(loaded.compressed_layers(), cache.compressed_layers(), strict=True):
        assert one.store.spec == other.store.spec
        assert one.committed_tokens == other.committed_tokens == 297
        assert one.store.saturated_scales == other.store.saturated_scales
    # It goes on like the original: enough to fill pages and to continue a partly filled one.
    for step, tokens in enumerate((1, 70, 150)):
        for layer in range(2):
            chunk = states(tokens, 2, seed=10 + step)
            read, expected = loaded.update(*chunk, layer), cache.update(*chunk, layer)
            for row, start in enumerate(options.get("left_padding", [0, 0])):
                for mine, theirs in zip(read, expected, strict=True):
                    assert torch.equal(mine[row, :, start:], theirs[row, :, start:])
    assert_same(contents(loaded), contents(cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype(tmp_path, dtype):
    cache = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4)
    cache.update(*states(200).to(dtype), 0)
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache", device=torch.device("cpu"))
    assert_same(contents(loaded), contents(cache))


def test_a_device_for_each_layer(tmp_path):
    """That they may differ is tested where there are several (test_devices_cuda.py)."""
    cache = filled()
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache", device=["cpu", torch.device("cpu")])
    assert_same(contents(loaded), contents(cache))
    for config in (None, tiny_models.llama().config):
        with pytest.raises(ValueError, match=r"device: expected one, or 2 \(one a layer\), got 1"):
            CompressedDynamicCache.load(tmp_path / "cache", config=config, device=["cpu"])


def test_tokens_that_are_not_finite_stay_what_they_were(tmp_path):
    cache = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4)
    chunk = states(300)
    chunk[0, 0, 0, 20, 3] = float("nan")
    chunk[1, 0, 1, 290, 3] = float("inf")
    cache.update(*chunk, 0)
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache")
    for mine, theirs in zip(loaded.layers[0].dense(), cache.layers[0].dense(), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert loaded.layers[0].store.non_finite_tokens == 1


def test_shared_pages_are_written_once_and_stay_shared(tmp_path):
    cache = filled(tokens=1000, batch=1)
    alone = len(saved(cache, tmp_path / "one"))
    pages = cache.layers[0].store.nbytes()["pages"]
    cache.batch_repeat_interleave(8)
    page_bytes = cache.layers[0].store.export_state().pages.shape[1]
    shared = len(saved(cache, tmp_path / "eight"))
    exact = sum(layer.store.nbytes()["exact"] for layer in cache.layers)
    # Seven more rows of exact tokens, smoothing and tables; not one page.
    assert shared - alone < exact + 2 * page_bytes
    loaded = CompressedDynamicCache.load(tmp_path / "eight")
    assert loaded.layers[0].store.nbytes()["pages"] <= pages
    chunk = states(200, batch=8, seed=5)
    for layer in range(2):
        loaded.update(*chunk, layer)
        cache.update(*chunk, layer)
    assert_same(contents(loaded), contents(cache))


def test_only_pages_in_use_are_written(tmp_path):
    cache = filled(tokens=1000, batch=3)
    cache.crop(-700)
    cache.batch_select_indices(torch.tensor([2, 0]))
    used = cache.layers[0].store.export_state().pages
    assert len(used) == 2 * 5  # (300 - 4 sinks) / 64 tokens, rounded up, in each row
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache")
    assert_same(contents(loaded), contents(cache))
    # Nothing is left of exact tokens that were cropped.
    state = cache.layers[0].store.export_state()
    dead = ~torch.from_numpy(state.table.live_slots())
    assert dead.any()
    for buffer in (state.exact_keys, state.exact_values):
        assert not buffer.transpose(1, 2)[dead].any()


def test_a_pending_chunk_is_saved(tmp_path):
    model = tiny_models.llama()
    model.set_attn_implementation("turboquant")
    cache = CompressedDynamicCache(config=model.config, bits=4)
    for layer in range(2):
        cache.update(*states(70), layer)
    cache.save(tmp_path / "cache")
    assert CompressedDynamicCache.load(tmp_path / "cache").get_seq_length() == 70


@pytest.mark.parametrize("source", [damage.damaged_files, damage.hostile_files])
@pytest.mark.parametrize("is_fixed", [False, True], ids=["growing", "fixed"])
def test_every_damaged_file_is_refused_with_the_field(tmp_path, is_fixed, source):
    path = tmp_path / "damaged"
    config = fixed_config() if is_fixed else None
    wrong = []
    number = 0
    whole = saved(fixed_and_filled() if is_fixed else filled(), tmp_path / "whole")
    CompressedDynamicCache.load(tmp_path / "whole", config=config)
    for name, content, message in source(whole):
        number += 1
        path.write_bytes(content)
        try:
            CompressedDynamicCache.load(path, config=config)
            wrong.append(f"{name}: accepted")
        except FormatError as error:
            if not re.search(message, str(error)) or len(str(error)) > 600:
                wrong.append(f"{name}: {error!s:.300}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {error!s:.300}")
    assert not wrong
    assert number >= 100


_LIMITED = """
import re, resource, sys, tracemalloc
from pathlib import Path
import damage, saved_caches
from turboquant_cpp import CompressedDynamicCache, FormatError
path = Path(sys.argv[1])
config = saved_caches.fixed_config() if sys.argv[2] == "fixed" else None
whole = path.read_bytes()
CompressedDynamicCache.load(path, config=config)
CompressedDynamicCache.load(path, config=config)
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 4 * len(whole) + (64 << 20), -1))
tracemalloc.start()
worst = {}
for source in (damage.damaged_files, damage.hostile_files):
    for name, content, _ in source(whole):
        path.write_bytes(content)
        size = len(content)
        del content
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            CompressedDynamicCache.load(path, config=config)
        except FormatError:
            pass
        worst[name] = tracemalloc.get_traced_memory()[1] - before - size
del worst["wide header"]  # an object for every three bytes of its header; see MAX_HEADER_BYTES
print(max(worst.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_no_damaged_file_makes_loading_allocate_more_than_it_holds(tmp_path, kind):
    """Address space for 64 MiB more than in use: claims of 2^31 tokens or pages cannot be met."""
    path = tmp_path / "whole"
    (filled if kind == "growing" else fixed_and_filled)(tokens=2000).save(path)
    surplus = int(run_python(_LIMITED, str(path), kind))
    assert surplus < 256 << 10  # the header of a few KiB, parsed


_LARGE = """
import re, resource, sys
from pathlib import Path
from turboquant_cpp import CompressedDynamicCache
small, large = sys.argv[1:]
CompressedDynamicCache.load(small)
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
size = Path(large).stat().st_size
# The file mapped once and copied once; 5 % for slabs.
resource.setrlimit(resource.RLIMIT_AS, (used + int(2.05 * size) + (4 << 20), -1))
print(CompressedDynamicCache.load(large).get_seq_length())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_loading_takes_the_memory_of_the_file(tmp_path):
    filled(tokens=200, batch=1).save(tmp_path / "small")
    cache = filled(tokens=30000, batch=4, bits=8)
    cache.save(tmp_path / "large")
    assert (tmp_path / "large").stat().st_size > 16 << 20
    assert run_python(_LARGE, str(tmp_path / "small"), str(tmp_path / "large")) == "30000"


@pytest.mark.parametrize("kind", ["directory", "missing", "device"])
def test_what_is_no_file(tmp_path, kind):
    path = {"directory": tmp_path, "missing": tmp_path / "none", "device": Path("/dev/zero")}[kind]
    error = FileNotFoundError if kind == "missing" else FormatError
    with pytest.raises(error, match=re.escape(str(path))):
        CompressedDynamicCache.load(path)


def test_format_error_is_a_value_error():
    assert issubclass(FormatError, ValueError)


def test_another_models_configuration_is_refused(tmp_path):
    model = tiny_models.llama()
    cache = CompressedDynamicCache(config=model.config, bits=4)
    generate(model, "sdpa", cache, prompt(1, 150))
    cache.save(tmp_path / "cache")
    load = CompressedDynamicCache.load
    with pytest.raises(ValueError, match="a model of 2 layers like the file's, got 3"):
        load(tmp_path / "cache", config=tiny_models.llama(num_hidden_layers=3).config)
    mixed = tiny_models.gemma3().config
    mixed.num_hidden_layers, mixed.layer_types = 2, mixed.layer_types[:2]
    with pytest.raises(ValueError, match="expected layer 0 to be compressed"):
        load(tmp_path / "cache", config=mixed)
    with pytest.raises(TypeError, match="a model's configuration"):
        load(tmp_path / "cache", config="a/model")


@pytest.mark.parametrize("implementation", ["sdpa", "turboquant"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_key_value_heads": 4}, r"expected shape \(1, 2, 9, 16\)"),
        ({"head_dim": 32}, r"expected shape \(1, 2, 9, 16\)"),
        ({"num_hidden_layers": 3}, r"expected 0 to 1 \(the cache has 2 layers\), got 2"),
    ],
    ids=["heads", "head_dim", "layers"],
)
def test_another_model_is_refused_by_its_first_step(tmp_path, implementation, shape, message):
    model = tiny_models.llama()
    cache = CompressedDynamicCache(config=model.config, bits=4)
    ids, _ = generate(model, "sdpa", cache, prompt(1, 150))
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache")
    longer = torch.cat([ids, prompt(1, 8)], 1)
    with pytest.raises(ValueError, match=message):
        generate(tiny_models.llama(**shape), implementation, loaded, longer)


def test_a_model_with_fewer_layers_is_refused_by_its_second_step(tmp_path):
    model = tiny_models.llama(num_hidden_layers=3)
    cache = CompressedDynamicCache(config=model.config, bits=4)
    ids, _ = generate(model, "sdpa", cache, prompt(1, 150))
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="a step failed between them"):
        generate(tiny_models.llama(), "sdpa", loaded, ids)


def test_incremental_reading_of_what_was_loaded(tmp_path):
    cache = filled()
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache", dequantize="incremental")
    chunk = states(3, 2)
    for mine, theirs in zip(loaded.update(*chunk, 0), cache.update(*chunk, 0), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="dequantize: expected one of"):
        CompressedDynamicCache.load(tmp_path / "cache", dequantize="never")


def test_caches_that_cannot_be_saved(tmp_path):
    path = tmp_path / "cache"
    cases: Iterable[tuple[CompressedDynamicCache, str]] = []
    disabled = filled()
    disabled.disable()
    foreign = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4)
    foreign.layers.append(type("OtherLayer", (DynamicLayer,), {})())
    with pytest.warns(UserWarning, match="compressed already"):
        shared = CompressedDynamicCache(filled().wrapped, head_dim=16, bits=2)
    cases = [
        (CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4), "holds no tokens"),
        (disabled, "is disabled"),
        (foreign, "a layer that a file can hold, got a OtherLayer"),
        (shared, "got one of another cache"),
    ]
    for cache, message in cases:
        with pytest.raises(ValueError, match=message):
            cache.save(path)
    with pytest.raises(IsADirectoryError, match="got a directory"):
        filled().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="a directory that exists"):
        filled().save(tmp_path / "no" / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_description_that_no_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="expected at most 1000"):
        filled().save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_an_older_file_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    filled(tokens=10).save(tmp_path / "link")
    filled(tokens=20).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert CompressedDynamicCache.load(tmp_path / "target").get_seq_length() == 20


def _half_written(tensors, path, metadata) -> None:
    Path(path).write_bytes(b"half a file")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", ["save_file", "fsync", "replace"])
def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "cache"
    whole = saved(filled(tokens=10), path)
    cache = filled()
    shown = contents(cache)
    with monkeypatch.context() as patch:
        if failure == "save_file":
            patch.setattr(container, "save_file", _half_written)
        elif failure == "fsync":
            patch.setattr(os, "fsync", _refuse)
        else:
            patch.setattr(Path, "replace", _refuse)
        with pytest.raises(OSError, match=r"No space|refused"):
            cache.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == whole
    assert_same(contents(cache), shown)


def _refuse(*arguments) -> None:
    raise OSError("refused")


@pytest.mark.parametrize("is_fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("action", ["save", "load"])
def test_running_out_of_memory_anywhere(tmp_path, action, is_fixed):
    """Every tensor operation of a save or load fails once; then it works as if nothing had been."""
    path = tmp_path / "cache"
    whole = saved(filled(tokens=10), path)
    cache = fixed_and_filled() if is_fixed else filled()
    config = fixed_config() if is_fixed else None
    shown = contents(cache)
    if action == "load":
        whole = saved(cache, path)
    failed = 0
    while True:
        fault = FailAt(failed + 1)
        try:
            with fault:
                if action == "save":
                    cache.save(path)
                else:
                    CompressedDynamicCache.load(path, config=config)
        except FormatError:
            raise
        except (torch.OutOfMemoryError, ValueError):
            # torch.asarray, with which safetensors makes tensors, has its own error for failures.
            failed += 1
            assert path.read_bytes() == whole
            assert list(tmp_path.iterdir()) == [path]
            continue
        break
    assert failed > 5
    assert_same(contents(cache), shown)
    assert_same(contents(CompressedDynamicCache.load(path, config=config)), shown)
