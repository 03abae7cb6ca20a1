"""Linear layers through oneDNN: the same results, and only where they can be had."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from perceptiondlm import modeling_language as onednn_linear
from perceptiondlm.modeling_language import OneDNNLinear, fastest_linear, padded_rows
from torch.overrides import _get_current_function_mode_stack


@pytest.fixture
def calls(monkeypatch) -> list:
    """Shapes of the inputs that go to oneDNN."""
    seen, linear = [], onednn_linear.linear

    def watched(x, *rest):
        seen.append(tuple(x.shape))
        return linear(x, *rest)

    monkeypatch.setattr(onednn_linear, "linear", watched)
    return seen


@pytest.mark.parametrize("shape", [(16, 256), (1, 50, 256), (2, 131, 256), (2, 3, 4, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_same_result_to_rounding(calls, shape, bias):
    layer = torch.nn.Linear(256, 300, bias=bias).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        with fastest_linear(x.device):
            got = layer(x)
    assert calls == [shape] and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_strided_input_and_transposed_weight(calls):
    x, weight = torch.randn(2, 19, 256)[:, 3:], torch.randn(256, 300).t()
    with torch.no_grad(), OneDNNLinear():
        got = F.linear(x, weight)
    assert calls == [(2, 16, 256)]
    torch.testing.assert_close(got, x @ weight.t(), rtol=1e-5, atol=1e-4)


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


def _keywords(layer, x):
    return F.linear(x, layer.weight, bias=layer.bias)


def _one_vector(layer, x):
    return layer(x[0, 0])


def _few_rows(layer, x):
    return layer(x[0, :15])


def _small(layer, x):
    return F.linear(x[..., :64], layer.weight[:, :64])


@pytest.mark.parametrize(
    "use",
    [
        _bfloat16,
        _double,
        _with_gradient,
        _autocast,
        _no_rows,
        _keywords,
        _one_vector,
        _few_rows,
        _small,
    ],
)
def test_all_else_is_left_alone(calls, use):
    layer, x = torch.nn.Linear(256, 300), torch.randn(2, 20, 256)
    with torch.no_grad():
        with fastest_linear(x.device):
            got = use(layer, x)
        expected = use(layer, x)
    assert calls == []
    assert torch.equal(got, expected)


def test_lengths_are_padded_to_few_numbers():
    numbers = {padded_rows(rows) for rows in range(16, 16385)}
    assert len(numbers) < 80
    for rows in range(16, 16385):
        assert rows <= padded_rows(rows) < 1.125 * rows + 16


def test_other_devices_and_builds_have_no_context_of_their_own(monkeypatch):
    assert not isinstance(fastest_linear(torch.device("cuda")), OneDNNLinear)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not isinstance(fastest_linear(torch.device("cpu")), OneDNNLinear)


@pytest.mark.parametrize("outer", [contextlib.nullcontext, lambda: torch.device("cpu")])
def test_an_interrupt_inside_torch_reaches_the_caller(outer):
    def interrupt(frame, event, _):
        if event == "return" and frame.f_code.co_name == "_pop_mode":
            raise KeyboardInterrupt  # the mode is off torch's stack and not yet to be put back
        return interrupt

    x, before = torch.randn(20, 256), sys.gettrace()
    with outer():
        modes = _get_current_function_mode_stack()
        try:
            with pytest.raises(KeyboardInterrupt), fastest_linear(x.device):
                sys.settrace(interrupt)
                F.layer_norm(x, (256,))
        finally:
            sys.settrace(before)
        assert _get_current_function_mode_stack() == modes
    assert not _get_current_function_mode_stack()
