"""Linear layers through oneDNN: the same results, and only where they can be had."""

import pytest
import torch
import torch.nn.functional as F
from perceptiondlm import onednn_linear
from perceptiondlm.onednn_linear import OneDNNLinear, fastest_linear


@pytest.fixture
def calls(monkeypatch) -> list:
    """Shapes of the inputs that go to oneDNN."""
    seen, linear = [], onednn_linear._linear

    def watched(x, *rest):
        seen.append(tuple(x.shape))
        return linear(x, *rest)

    monkeypatch.setattr(onednn_linear, "_linear", watched)
    return seen


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (1, 5, 64), (2, 131, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_same_result_to_rounding(calls, shape, bias):
    layer = torch.nn.Linear(64, 48, bias=bias).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        with fastest_linear(x.device):
            got = layer(x)
    assert calls == [shape] and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_strided_input_and_transposed_weight(calls):
    x, weight = torch.randn(2, 9, 64)[:, 3:], torch.randn(64, 48).t()
    with torch.no_grad(), OneDNNLinear():
        got = F.linear(x, weight)
    assert calls == [(2, 6, 64)]
    torch.testing.assert_close(got, x @ weight.t(), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(
    "use", [_bfloat16, _double, _with_gradient, _autocast, _no_rows, _keywords, _one_vector]
)
def test_all_else_is_left_alone(calls, use):
    layer, x = torch.nn.Linear(64, 48), torch.randn(2, 5, 64)
    with torch.no_grad():
        with fastest_linear(x.device):
            got = use(layer, x)
        expected = use(layer, x)
    assert calls == []
    assert torch.equal(got, expected)


def test_other_devices_and_builds_have_no_context_of_their_own(monkeypatch):
    assert not isinstance(fastest_linear(torch.device("cuda")), OneDNNLinear)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not isinstance(fastest_linear(torch.device("cpu")), OneDNNLinear)
