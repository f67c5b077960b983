"""Failures on order within the package's C++ code: what `faults` is for torch's operations.

Run as a program, in a process that has `failing_new.cpp` preloaded, it makes every allocation of
every operation fail once and prints, as JSON, how many failures each operation survived.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from contents import contents
from turboquant_cpp import CacheConfig, CompressedDynamicCache, FixedStore, LayerStore

HEADS, DIM, PAST = 2, 16, 260
SOURCE = Path(__file__).with_name("failing_new.cpp")
CORE, OPERATORS = "_core.", "_torch_ops."


def survived_failures(folder: Path) -> dict[str, int]:
    """Compile the library, run this file with it, and return what it printed."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or compiler is None:
        pytest.skip("NOT RUN: needs Linux's LD_PRELOAD and a C++ compiler")
    library = folder / "failing_new.so"
    build = ["-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
    subprocess.run([compiler, *build], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "2",
    }
    run = [sys.executable, "-W", "ignore", __file__, str(library)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Faults:
    """The preloaded library."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.watch_range.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self._library.fail_allocation.argtypes = [ctypes.c_int64]

    def watch(self, *libraries: str) -> None:
        """Let allocations of these fail, and of no others."""
        self._library.watch_nothing()
        watched = set()
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights, *_, name = line.split()
            if "x" in rights and Path(name).name.startswith(libraries):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                assert self._library.watch_range(begin, end)
                watched.add(Path(name).name)
        assert len(watched) == len(libraries), watched

    def numbers(self) -> Iterator[int]:
        """0, 1, ... until `failing` was given a number that no allocation had."""
        self.survived, self._has_failed = 0, True
        while True:
            yield self.survived
            if not self._has_failed:
                return
            self.survived += 1

    def failing(self, number: int, action: Callable[[], Any]) -> Any:
        """What the action returns or raises where the allocation of that number fails."""
        self._library.fail_allocation(number)
        result: Any
        try:
            result = action()
        except (MemoryError, RuntimeError) as error:
            result = error
        self._has_failed = bool(self._library.has_failed())
        if isinstance(result, Exception) and not self._has_failed:
            raise result
        return result


def states(tokens: int, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    if tokens > 1:
        keys[0, 0, tokens // 2] = torch.nan  # counted, once
    return [keys, values]


def store(kind: type[LayerStore], seed: int, **options: Any) -> LayerStore:
    spec = CacheConfig(**{"bits": 4, "seed": seed, **options}).layer_spec(0, DIM, HEADS)
    common = {"batch_size": 2, "dtype": torch.float32, "device": "cpu"}
    if kind is FixedStore:
        common["max_tokens"] = 600
    made = kind(spec, **common)
    made.append(*states(PAST), [PAST, PAST - 70])
    return made


def shared(store: LayerStore) -> LayerStore:
    """With rows that share pages, the last ones part full."""
    store.crop(210)
    store.select([0, 0])
    return store


def shown(store: LayerStore) -> list[Any]:
    counts = [store.lengths, store.encoded_tokens, store.saturated_scales, store.non_finite_tokens]
    return [counts, store.nbytes()["pages"], *store.dequantize()]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.isnan(), other.isnan()) and torch.equal(
            one.nan_to_num(), other.nan_to_num()
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, LayerStore):
        return same(shown(one), shown(other))
    return bool(one == other)


def step(store: LayerStore, tokens: int = 1) -> torch.Tensor:
    query, _ = states(tokens, seed=2)
    return store.attend_append(query.nan_to_num(), *states(tokens, seed=3), scaling=0.25)


def planned_step(store: FixedStore) -> torch.Tensor:
    query, _ = states(1, seed=2)
    plan = store.plan(1)
    return store.attend_append_planned(query.nan_to_num(), *states(1, seed=3), plan, scaling=0.25)


def attend(store: LayerStore) -> Any:
    return store.attend(states(3, seed=2)[0].nan_to_num(), *states(3, seed=3), scaling=0.25)


# These make objects of classes of _core. pybind11 takes note of a new one outside of what catches
# its exceptions (`init_instance` in its dispatcher): the process would end there.
CONSTRUCTING = ("clone", "export_state")
# Operations of stores of both kinds, by how a store is made for them.
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "append 1": lambda store: store.append(*states(1, seed=1)),
    "append 200": lambda store: store.append(*states(200, seed=1), [200, 130]),
    "attend": attend,
    "attend_append 1": step,
    "attend_append 66": lambda store: step(store, 66),
    "dequantize": lambda store: store.dequantize(),
    "crop": lambda store: store.crop([201, 100]),
    "select": lambda store: store.select([1, 0, 1]),
    "repeat": lambda store: store.repeat(2),
    "clone": lambda store: store.clone(),
    "codes": lambda store: store.codes(),
    "export_state": lambda store: LayerStore.from_state(store.export_state(), "cpu"),
}
STORES: dict[str, Callable[[int], LayerStore]] = {
    "growing": lambda seed: store(LayerStore, seed),
    "growing, shared pages": lambda seed: shared(store(LayerStore, seed, recipe="plain")),
    "fixed": lambda seed: store(FixedStore, seed),
    "fixed, no window": lambda seed: shared(store(FixedStore, seed, recipe="plain")),
}


def cases() -> Iterator[tuple[str, Callable[[int], LayerStore], Callable[[Any], Any]]]:
    for (kind, make), (name, action) in itertools.product(STORES.items(), OPERATIONS.items()):
        yield f"{kind}: {name}", make, action
    yield "fixed: planned step", STORES["fixed"], planned_step


def survive_store(faults: Faults, make: Callable[[int], LayerStore], action: Any) -> int:
    """Every failure leaves the store as it was, and the next try does what was asked."""
    prepared = make(0)
    before = shown(prepared)
    expected = prepared.clone()
    expected_result = action(expected)
    for number in faults.numbers():
        tried = prepared.clone()
        result = faults.failing(number, partial(action, tried))
        if isinstance(result, Exception):
            assert same(shown(tried), before), (number, result)
            result = action(tried)
        assert same(result, expected_result), number
        assert same(shown(tried), shown(expected)), number
    return faults.survived


def survive_first_use(faults: Faults) -> int:
    """The tables of a spec (codebooks, rotations) are made at its first use, and kept."""
    keys, values = (part.nan_to_num() for part in states(PAST))
    for number in faults.numbers():
        spec = CacheConfig(bits=4, seed=1000 + number).layer_spec(0, DIM, HEADS)
        fresh = LayerStore(spec, batch_size=2, dtype=torch.float32, device="cpu")
        append = partial(fresh.append, keys, values)
        if isinstance(faults.failing(number, append), Exception):
            assert fresh.lengths == [0, 0]
            append()
        for dense, exact in zip(fresh.dequantize(), (keys, values), strict=True):
            assert (dense - exact).norm() < 0.15 * exact.norm()  # 4 bits: 0.0095 of the variance
    return faults.survived


def survive_model_step(faults: Faults, implementation: str, **options: Any) -> int:
    """A step is repeated at once, or after the crop that the cache asks for."""
    model = tiny_models.llama()
    model.set_attn_implementation(implementation)
    past = CompressedDynamicCache(config=model.config, bits=4, **options)

    def forward(cache: Any, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, past_key_values=cache).logits

    forward(past, tiny_models.prompt(1, 190))
    step = partial(forward, tokens=tiny_models.prompt(1, 3, seed=1))
    before, expected = contents(past), copy.deepcopy(past)
    expected_logits = step(expected)
    for number in faults.numbers():
        cache = copy.deepcopy(past)
        result = faults.failing(number, partial(step, cache))
        if isinstance(result, Exception):
            lengths = [int(layer.get_seq_length()) for layer in cache.layers]
            if len(set(lengths)) > 1:
                with pytest.raises(RuntimeError, match=r"crop\(-3\), or forget .* reset\(\)"):
                    step(cache)
            cache.crop(190 - lengths[0])
            assert same(contents(cache), before), (number, result)
            result = step(cache)
        assert torch.equal(result, expected_logits), number
        assert same(contents(cache), contents(expected)), number
    return faults.survived


def main() -> None:
    faults = Faults(sys.argv[1])
    torch.set_num_threads(2)
    counts = {}
    for name, make, action in cases():
        faults.watch(*([OPERATORS] if name.endswith(CONSTRUCTING) else [CORE, OPERATORS]))
        counts[name] = survive_store(faults, make, action)
    faults.watch(CORE, OPERATORS)
    counts["first use of a spec"] = survive_first_use(faults)
    for name, options in (("growing", {}), ("fixed", {"max_cache_len": 300})):
        for implementation in ("turboquant", "sdpa"):
            count = survive_model_step(faults, implementation, **options)
            counts[f"model step, {name}, {implementation}"] = count
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
