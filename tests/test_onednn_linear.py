"""Linear layers through oneDNN: the same results, and only where they can be had."""

import copy

import pytest
import torch
import torch.nn.functional as F
from perceptiondlm import modeling_language
from perceptiondlm.modeling_language import OneDNNLinear, fastest_linear, padded_rows
from torch import nn


@pytest.fixture
def calls(monkeypatch) -> list:
    """Shapes of the inputs that go to oneDNN."""
    seen, linear = [], modeling_language.onednn_linear

    def watched(x, *rest):
        seen.append(tuple(x.shape))
        return linear(x, *rest)

    monkeypatch.setattr(modeling_language, "onednn_linear", watched)
    return seen


def fast(layer: nn.Linear) -> nn.Linear:
    """The same layer as `fastest_linear` leaves it in a model."""
    model = nn.Sequential(copy.deepcopy(layer))
    fastest_linear(model)
    return model[0]


@pytest.mark.parametrize("shape", [(16, 256), (1, 50, 256), (2, 131, 256), (2, 3, 4, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_same_result_to_rounding(calls, shape, bias):
    layer = torch.nn.Linear(256, 300, bias=bias).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        got = fast(layer)(x)
    assert calls == [shape] and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_strided_input(calls):
    layer, x = nn.Linear(256, 300), torch.randn(2, 19, 256)[:, 3:]
    with torch.no_grad():
        got = fast(layer)(x)
        expected = layer(x)
    assert calls == [(2, 16, 256)]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def _bfloat16(layer, x):
    return layer.bfloat16()(x.bfloat16())


def _double(layer, x):
    return layer.double()(x.double())


def _with_gradient(layer, x):
    with torch.enable_grad():
        y = layer(x)
    assert y.requires_grad
    return y


def _autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    return y


def _no_rows(layer, x):
    return layer(x[:, :0])


def _one_vector(layer, x):
    return layer(x[0, 0])


def _few_rows(layer, x):
    return layer(x[0, :15])


def _small(layer, x):
    layer.weight = nn.Parameter(layer.weight[:4])
    layer.bias = None
    return layer(x)


@pytest.mark.parametrize(
    "use",
    [
        _bfloat16,
        _double,
        _with_gradient,
        _autocast,
        _no_rows,
        _one_vector,
        _few_rows,
        _small,
    ],
)
def test_all_else_is_left_alone(calls, use):
    layer, x = torch.nn.Linear(256, 300), torch.randn(2, 20, 256)
    with torch.no_grad():
        got = use(fast(layer), x)
        expected = use(layer, x)
    assert calls == []
    assert torch.equal(got, expected)


def test_lengths_are_padded_to_few_numbers():
    numbers = {padded_rows(rows) for rows in range(16, 16385)}
    assert len(numbers) < 80
    for rows in range(16, 16385):
        assert rows <= padded_rows(rows) < 1.125 * rows + 16


def test_only_plain_linear_layers_are_changed_and_only_their_way_of_computing(monkeypatch):
    class Quantized(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "other": Quantized(4, 4), "norm": nn.ReLU()})
    model["plain"].register_forward_hook(lambda *_: None)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    fastest_linear(model)
    assert [type(module) for module in model.values()] == [OneDNNLinear, Quantized, nn.ReLU]
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert len(model["plain"]._forward_hooks) == 1


def test_a_build_without_onednn_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    fastest_linear(model)
    assert type(model[0]) is nn.Linear


def test_other_code_in_the_process_is_untouched(make, draw_image, calls):
    model, processor = make()
    model.diffusion_generate(draw_image(40, 40), prompts="What?", processor=processor)
    seen = len(calls)
    with torch.no_grad():
        F.linear(torch.randn(20, 256), torch.randn(300, 256))
    assert len(calls) == seen
