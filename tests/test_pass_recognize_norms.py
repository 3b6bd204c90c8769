"""Norm layers written out by hand: which spellings are one, which are not, and that nothing is computed differently."""

import math

import pytest
import torch
import torch.nn.functional as F
from modnorm_fx.models_zoo import paper
from staged import Staged, stage
from torch import nn

D = 16
X = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def convnext(x):
    """ConvNeXt's own layer norm for channels: the mean is subtracted twice."""
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return (x - u) / torch.sqrt(s + 1e-6)


def centred_once(x):
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + 1e-6)


def var_mean(x):
    v, m = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
    return (x - m) * torch.rsqrt(v + 1e-6)


def in_float32(x):
    h = x.to(torch.float32)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def response(x):
    """ConvNeXt v2's global response normalisation, without its gain and bias."""
    norms = x.norm(p=2, dim=1, keepdim=True)
    return x + x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))


UNIT, SUMMED = 1.0, 1 / math.sqrt(D)  # RMS after division by a root mean square, and by a norm
RMS_SPELLINGS = {
    "rsqrt": (rms, UNIT),
    "Llama": (in_float32, UNIT),
    "T5": (lambda x: x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6), UNIT),
    "division by sqrt": (lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6), UNIT),
    "x*x": (lambda x: x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt(), UNIT),
    "power -1/2": (lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5), UNIT),
    "power 1/2": (lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5, UNIT),
    "reciprocal": (lambda x: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), UNIT),
    "sum over n": (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / D + 1e-6), UNIT),
    "sum": (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6), SUMMED),
    "F.normalize": (lambda x: F.normalize(x, dim=-1), SUMMED),
    "Tensor.norm": (lambda x: x / x.norm(dim=-1, keepdim=True), SUMMED),
    "linalg.norm": (lambda x: x / torch.linalg.norm(x, dim=-1, keepdim=True), SUMMED),
    "vector_norm": (lambda x: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-8), SUMMED),
    "norm over root n": (lambda x: x / (x.norm(dim=-1, keepdim=True) * D**-0.5).clamp(min=1e-8), UNIT),
    "constant inside": (lambda x: x / (4 * x.pow(2).mean(-1, keepdim=True)).sqrt(), UNIT / 2),
    "constant outside": (lambda x: x / (2 * x.pow(2).mean(-1, keepdim=True).sqrt()), UNIT / 2),
    "all axes but one": (lambda x: paper.rms_divide(x, (1, 2)), UNIT),
}
LAYER_SPELLINGS = {
    "var": lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "rsqrt": lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "std": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-5),
    "mean of squares, subtracted twice": convnext,
    "mean of squares, subtracted once": centred_once,
    "var_mean": var_mean,
    "mean of squares less the square of the mean": lambda x: (
        (x - x.mean(-1, keepdim=True))
        * torch.rsqrt(x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square() + 1e-5)
    ),
}
OTHERS = {
    "another signal's": lambda x: x / (x.roll(1, 0).pow(2).mean(-1, keepdim=True).sqrt() + 1e-6),
    "1-norm": lambda x: x / x.norm(1, dim=-1, keepdim=True),
    "mean of absolute values": lambda x: x / x.abs().mean(-1, keepdim=True),
    "by the square": lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "times the root": lambda x: x * x.pow(2).mean(-1, keepdim=True).sqrt(),
    "squashing, x/(1+|x|)": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "fourth powers": lambda x: x / x.pow(4).mean(-1, keepdim=True).sqrt(),
    "norms over another signal's mean": lambda x: x * (x.norm(dim=1, keepdim=True) / x.roll(1, 0).norm(dim=1).mean()),
    "other minuend": lambda x: x - x.roll(1, 0).mean(-1, keepdim=True),
    "half of the mean": lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=0.5),
}


def found(function, *inputs) -> Staged:
    staged = stage(function, *(inputs or (X,)))
    staged.rewrite("norms")
    assert staged.error() == 0.0
    return staged


@pytest.mark.parametrize("name", RMS_SPELLINGS)
def test_rms_norm(name: str):
    function, scale = RMS_SPELLINGS[name]
    (region,) = found(function).regions()
    assert region.kind == "rms_norm"
    assert region.facts["scale"] == pytest.approx(scale)
    assert float(function(X).square().mean().sqrt()) == pytest.approx(scale, rel=0.03)  # and so it is


@pytest.mark.parametrize("name", LAYER_SPELLINGS)
def test_layer_norm(name: str):
    (region,) = found(LAYER_SPELLINGS[name]).regions()
    assert region.kind == "layer_norm" and region.facts["scale"] == 1.0
    assert torch.allclose(LAYER_SPELLINGS[name](X), F.layer_norm(X, (D,)), atol=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_layer_stays(name: str):
    staged = stage(OTHERS[name], X)
    before = staged.targets()
    assert staged.rewrite("norms") == {"norms": 0}
    assert staged.targets() == before


def test_global_response_normalisation():
    staged = found(response)
    assert staged.kinds() == ["response_norm"]
    change = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 400, D, generator=torch.Generator().manual_seed(2))
    _, moved = torch.autograd.functional.jvp(lambda x: response(x) - x, x, change[:, :1].expand(2, 400, D).contiguous())
    assert float(moved.square().mean().sqrt() / change[:, :1].square().mean().sqrt()) == pytest.approx(1.0, abs=0.2)


def test_mean_subtraction():
    assert found(lambda x: x - x.mean(-1, keepdim=True)).kinds() == ["mean_subtract"]


def test_the_papers_layer_norm_is_one():
    assert found(paper.layer_norm).kinds() == ["layer_norm"]


def test_half_precision_is_looked_through():
    (region,) = found(in_float32, X.bfloat16()).regions()
    assert region.kind == "rms_norm"


def test_a_gain_stays_outside():
    class Gemma(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(D))

        def forward(self, x):
            return (rms(x.float()) * (1.0 + self.weight.float())).type_as(x)

    staged = found(Gemma())
    assert staged.kinds() == ["rms_norm"]
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    assert len(call.args) == 1  # the signal alone


def test_one_after_the_other():
    assert found(lambda x: rms(rms(x) + x)).kinds() == ["rms_norm", "rms_norm"]


def test_several_users_of_the_result():
    staged = found(lambda x: (lambda y: y + torch.relu(y))(rms(x)))
    assert staged.kinds() == ["rms_norm"]


def test_a_statistic_that_others_use_stays_for_them():
    def function(x):
        square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(square + 1e-6), square

    staged = found(function)
    assert staged.kinds() == ["rms_norm"]
    assert torch.ops.aten.mean.dim in staged.targets()


def test_fused_layers_are_left_alone():
    staged = stage(lambda x: F.rms_norm(F.layer_norm(x, (D,)), (D,)), X)
    assert staged.rewrite("norms") == {"norms": 0}


def test_the_call_takes_over_place_and_value():
    staged = found(nn.Sequential(RMS(), nn.Linear(D, D)))
    (call,) = (n for n in staged.module.graph.nodes if n.op == "call_module")
    assert tuple(call.meta["val"].shape) == tuple(X.shape)
    assert call.meta.get("nn_module_stack")


class RMS(nn.Module):
    def forward(self, x):
        return rms(x)
