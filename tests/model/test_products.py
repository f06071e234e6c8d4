"""Products and packed weights are `torch.mm`'s: the operators behind them are torch's own, but not documented."""

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from slimpajama_hf import devices
from slimpajama_hf.model import products
from slimpajama_hf.model.products import Weights, product, product_into

#: Rows, inputs, outputs: of a step, of a short sample, of no multiple of anything.
SHAPES = [(256, 256, 1024), (32, 48, 144), (1, 7, 5), (61, 129, 33)]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrices(*shapes):
    return [nn.Parameter(drawn(*shape, seed=place)) for place, shape in enumerate(shapes)]


def exact(left, right):
    return left.double() @ right.double()


@pytest.fixture(params=["as it is", "without oneDNN"])
def libraries(request, monkeypatch):
    if request.param == "without oneDNN":
        monkeypatch.setattr(products, "_onednn", lambda dtype: False)


def test_torch_has_the_operators_here():
    """A version of torch that takes them away shall be noticed."""
    if platform.machine() != "x86_64":
        pytest.skip("oneDNN's operators are those of x86 processors")
    assert products._onednn(torch.float32) == devices.is_amd()
    assert products._onednn(torch.bfloat16) or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not products._onednn(torch.float64)


@pytest.mark.parametrize(
    ("cpuinfo", "amd"), [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), ("", False)]
)
def test_whose_processor_it_is(monkeypatch, cpuinfo, amd):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo)
    assert devices.is_amd() == amd


def test_an_operator_that_fails_is_not_used(monkeypatch):
    def fails(*_):
        raise RuntimeError("could not create a primitive descriptor")

    products._onednn.cache_clear()
    monkeypatch.setattr(products, "_packed", fails)
    assert not products._onednn(torch.float32) and not products._onednn(torch.bfloat16)
    products._onednn.cache_clear()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_float32_product_is_exact_to_its_rounding(libraries, rows, inputs, outputs):
    left, right = drawn(rows, inputs), drawn(inputs, outputs, seed=1)
    expected = exact(left, right)
    # An element's error is at most a rounding of each of its summands.
    allowed = 1.2e-7 * inputs**0.5 * (left.double().abs() @ right.double().abs())
    for found in (
        product(left, right),
        product(left.t().contiguous().t(), right),
        product(left, right.t().contiguous().t()),
    ):
        assert found.dtype == torch.float32 and found.shape == (rows, outputs)
        assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_pieces_and_their_norm(libraries, monkeypatch, dtype):
    """A tall product is made in pieces; their squares add up to those of the whole."""
    left, right = drawn(300, 64, dtype=dtype), drawn(64, 40, dtype=dtype, seed=1)
    whole = torch.full((300, 40), float("nan"))
    squared = product_into(whole, left, right)
    torch.testing.assert_close(whole, (left @ right).float(), rtol=1e-5, atol=1e-5)
    assert squared.item() == pytest.approx(whole.double().square().sum().item(), rel=1e-5)
    monkeypatch.setattr(products, "ROWS_AT_ONCE", 128)
    pieces = torch.full((300, 40), float("nan"))
    assert product_into(pieces, left, right).item() == pytest.approx(squared.item(), rel=1e-5)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("seldom", [True, False])
def test_a_linear_layer_there_and_back(libraries, rows, inputs, outputs, low, seldom):
    """Packed or not: to the bit in bfloat16, and to float32's rounding."""
    dtype = low or torch.float32
    parameters = [*matrices((inputs, outputs)), nn.Parameter(drawn(outputs, seed=5))]
    weights = Weights(parameters, low, parameters[:1] if seldom else (), rows=64)
    weights.refresh()
    x, d = drawn(rows, inputs, dtype=dtype, seed=8), drawn(rows, outputs, dtype=dtype, seed=9)
    w, b = (each.detach().to(dtype) for each in parameters)
    there, back = weights.linear(x, 0, 1), weights.linear_backward(d, 0)
    assert there.dtype == back.dtype == dtype
    if low is None:
        torch.testing.assert_close(there, torch.addmm(b, x, w), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(back, d @ w.t(), rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(there, torch.addmm(b, x, w))
        assert torch.equal(back, d @ w.t())


def test_what_is_seldom_changed_is_looked_at_when_it_has_changed_and_only_then(libraries):
    matrix, table, bias = parameters = [*matrices((32, 64), (50, 32)), nn.Parameter(torch.zeros(64))]
    weights = Weights(parameters, torch.bfloat16, [matrix], rows=64)
    x = drawn(9, 32, dtype=torch.bfloat16, seed=8)

    def holds():
        low = matrix.detach().bfloat16()
        return torch.equal(weights.linear(x, 0, 2), torch.addmm(bias.detach().bfloat16(), x, low)) and torch.equal(
            weights.linear_backward(x @ low, 0), (x @ low) @ low.t()
        )

    assert weights.refresh() == [0, 1, 2] and holds()
    assert weights.refresh() == [1, 2] and holds()
    with torch.no_grad():
        matrix.add_(1.0)
        assert not holds(), "as it was at the last refresh"
    assert weights.refresh() == [0, 1, 2] and holds()
    with torch.no_grad():
        matrix.copy_(drawn(32, 64, seed=7))
        bias.fill_(2.0)
        table.fill_(3.0)
    assert weights.refresh() == [0, 1, 2] and holds()
    assert (weights[1] == 3.0).all() and weights[1].dtype == torch.bfloat16
    assert weights.refresh() == [1, 2]


@pytest.mark.skipif(not products._onednn(torch.bfloat16), reason="nothing is packed on this processor")
def test_packed_weights_stay_where_they_are(monkeypatch):
    """Memory freed one matrix at a time is a heap full of holes (230 MB of them after 48 steps of a 124M model)."""
    matrix, bias = parameters = [*matrices((256, 512)), nn.Parameter(torch.zeros(512))]
    weights = Weights(parameters, torch.bfloat16, [matrix], rows=64)
    weights.refresh()
    places = [torch.ops.mkldnn.data_ptr(packed) for packed in weights._packed[0]]
    with torch.no_grad():
        matrix.mul_(2.0)
        bias.add_(1.0)
    weights.refresh()
    assert [torch.ops.mkldnn.data_ptr(packed) for packed in weights._packed[0]] == places


def test_float32_weights_are_read_where_they_are():
    parameters = matrices((8, 8))
    weights = Weights(parameters, None, parameters, rows=8)
    assert weights.refresh() == []
    assert weights[0].data_ptr() == parameters[0].data_ptr()


def test_rows_that_are_asked_for_beyond_a_matrix_are_nothing():
    head, bias = parameters = [*matrices((9, 8)), nn.Parameter(drawn(9))]
    weights = Weights(parameters, torch.bfloat16, (), rows=8, padded={0: 16})
    weights.refresh()
    assert torch.equal(weights[0], head.detach().bfloat16()) and torch.equal(weights[1], bias.detach().bfloat16())
    assert weights.padded(0).shape == (16, 8) and torch.equal(weights.padded(0)[:9], weights[0])
    assert not weights.padded(0)[9:].any() and weights.padded(1) is weights[1]
    with torch.no_grad():
        head.mul_(2.0)
    weights.refresh()
    assert torch.equal(weights.padded(0)[:9], head.detach().bfloat16()) and not weights.padded(0)[9:].any()
    plain = Weights(parameters, None, (), rows=8, padded={0: 16})
    assert plain.padded(0).data_ptr() == head.data_ptr(), "in float32 there is no copy"
