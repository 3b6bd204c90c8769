"""Composite operations are traced as their parts, which compute the same and have rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modnorm_fx import ATEN, convert
from modnorm_fx._composites import COMPOSITES
from modnorm_fx.capture import capture

X = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([0, 2, 1, 0])

FUNCTIONS = {
    "aliases": lambda x: torch.absolute(x.multiply(2).subtract(1)).clip(0, 3).divide(2),
    "joining": lambda x: torch.hstack([x, x]).sum() + torch.column_stack([x, x]).sum() + torch.concat([x, x]).sum(),
    "broadcasting": lambda x: torch.broadcast_tensors(x, x[0])[1] + x.tile(1).mean(),
    "moving": lambda x: torch.fliplr(x).moveaxis(0, 1).swapdims(0, 1),
    "products": lambda x: torch.outer(x[0, 0], x[0, 1]) + torch.inner(x[0], x[1]) + torch.tensordot(x[0], x[1], 1),
    "kron": lambda x: torch.kron(x[0], x[1]),
    "norms": lambda x: torch.linalg.norm(x, dim=1) + F.cosine_similarity(x, 2 * x + 1, 1),
    "statistics": lambda x: x.var(1) + x.std(1) + x.quantile(0.5),
    "cross entropy": lambda x: F.cross_entropy(x[:, 0], INDEX),
    "divergence": lambda x: F.kl_div(x.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
    "triplets": lambda x: F.triplet_margin_loss(x[0], x[1], x[2]),
    "spectrum": lambda x: torch.fft.rfft2(x).abs() + torch.fft.fft2(x).real[..., :4],
    "mixing": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x)),
    "spectrogram": lambda x: torch.stft(x.flatten(1), 8, window=torch.hann_window(8), return_complex=True).abs(),
    "sampling": lambda x: F.grid_sample(x[None], x[None, :2, :, :2].tanh()),
}


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        return self.function(x * self.weight)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_compute_the_same_and_have_rules(name: str):
    model = Of(FUNCTIONS[name])
    captured = capture(model, (X,))
    assert COMPOSITES.isdisjoint(node.target for node in captured.graph_module.graph.nodes)
    torch.testing.assert_close(captured(model, X)[0], model(X).detach(), rtol=1e-4, atol=1e-5)
    norm = convert(model, (X,), unknown="error")
    assert "  sampled  " not in norm.explain("scales")


def test_what_passes_know_whole_is_left_whole():
    aten = torch.ops.aten
    whole = {aten.linear.default, aten.layer_norm.default, aten.einsum.default, aten.reshape.default,
             aten.matmul.default, aten.scaled_dot_product_attention.default, aten.conv2d.default}  # fmt: skip
    assert not whole & COMPOSITES
    assert whole <= set(ATEN)
