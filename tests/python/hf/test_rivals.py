import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, QuantizedCache
from turboquant_cpp.hf import rivals
from turboquant_cpp.hf.rivals import Rival, RivalUnavailableError, rival_maker

CONFIG = LlamaConfig(
    hidden_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2
)
OPTIONS = {"quanto": (4, "optimum.quanto", 0), "hqq": (4, "hqq", 1)}


@pytest.fixture(params=OPTIONS)
def installed(request):
    bits, module, axis = OPTIONS[request.param]
    if not rivals.is_installed(module):
        pytest.skip(f"{module} is not installed")
    return request.param, bits, axis


@pytest.mark.parametrize(
    ("arguments", "label"), [(("quanto", 2), "quanto:2"), (("hqq", 3), "hqq:3"), (("fp8",), "fp8")]
)
def test_label(arguments, label):
    assert Rival(*arguments).label == label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quanto",), "bits: expected one of 2, 4 for quanto, got None"),
        (("hqq", 5), "bits: expected one of 1, 2, 3, 4, 8 for hqq, got 5"),
        (("fp8", 8), "bits: expected none for fp8, got 8"),
        (("gguf", 4), "backend: expected one of quanto, hqq, fp8, got gguf"),
    ],
)
def test_what_no_backend_has_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rival(*arguments)


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum-quanto"), ("hqq", "hqq")])
def test_missing_backend(monkeypatch, backend, package):
    monkeypatch.setattr(rivals, "is_installed", lambda module: False)
    with pytest.raises(RivalUnavailableError, match=f"pip install {package}"):
        rival_maker(Rival(backend, 4), CONFIG)


def test_a_module_in_a_missing_package_is_not_installed():
    assert not rivals.is_installed("no_such_package.part")
    assert rivals.is_installed("transformers.cache_utils")


def test_sliding_layers_are_refused_before_the_run(installed):
    backend, bits, _ = installed
    with pytest.raises(ValueError, match="full attention"):
        rival_maker(Rival(backend, bits), Gemma2Config(num_hidden_layers=2))


def test_configured_as_transformers_does(installed):
    backend, bits, axis = installed
    cache = rival_maker(Rival(backend, bits), CONFIG)()
    assert isinstance(cache, QuantizedCache)
    assert len(cache.layers) == 3
    for layer in cache.layers:
        assert (layer.nbits, layer.axis_key, layer.axis_value) == (bits, axis, axis)
        assert (layer.q_group_size, layer.residual_length) == (64, 128)
    assert rival_maker(Rival(backend, bits, 64), CONFIG)().layers[0].residual_length == 64


def test_groups_lie_within_a_token(installed):
    """The axis asked for: a token's own 64 numbers share scale and zero point, and no others do."""
    backend, bits, _ = installed
    layer = rival_maker(Rival(backend, bits), CONFIG)().layers[0]
    states = torch.randn(1, 2, 16, 64, generator=torch.Generator().manual_seed(0))
    states[0, 0, 3] *= 1000.0  # spoils every group it is part of
    layer.update(states, states)
    read, _ = layer.update(states[:, :, :1], states[:, :, :1])
    error = (read[:, :, :16] - states).abs().amax(-1)[0]
    assert error[0, 3] > 10
    error[0, 3] = 0
    # Half a step of 4 bits over a range of at most 8, some more for hqq's own choice of zero.
    assert error.max() < 0.5
