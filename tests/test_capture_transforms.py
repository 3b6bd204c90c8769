"""`torch.vmap`, the transforms of `torch.func` and flex_attention within a model: graphs that equal the eager model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import assert_same_outputs
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modnorm_fx import convert
from modnorm_fx.capture import capture

X = torch.linspace(-1, 1, 12).view(3, 4)


class Ensemble(nn.Module):
    """Several linear maps of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6, 4)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(nn.functional.linear, in_dims=(None, 0, 0))(x, self.weight, self.bias).mean(0)


class Transformed(nn.Module):
    """What a transform makes of a two-layer network."""

    def __init__(self, transform: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(lambda row: self.second(self.first(row).tanh()))(x)


TRANSFORMS = {
    "vmap": torch.vmap,
    "gradient": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "gradient of each": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum())),
    "jacrev": lambda f: torch.vmap(torch.func.jacrev(f)),
    "jacfwd": lambda f: torch.vmap(torch.func.jacfwd(f)),
}


def test_an_ensemble_by_vmap() -> None:
    model = Ensemble()
    captured = capture(model, (X,))
    assert (captured.route, captured.unused) == ("make_fx(below autograd)", ())
    assert_same_outputs(captured, model, (X,), {})
    assert "Experts 5× 4→6" in str(convert(model, (X,)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    model = Transformed(TRANSFORMS[name])
    captured = capture(model, (X,))
    assert captured.route == "make_fx(below autograd)"
    assert set(captured.unused) <= {"first.bias", "second.bias"}  # which derivatives do not always hold
    assert_same_outputs(captured, model, (X,), {})
    assert {"first.weight", "second.weight"} <= {leaf.weight for leaf in convert(model, (X,)).leaves}


class Flex(nn.Module):
    """Attention of four heads on two pairs of keys and values, with a learned bias of distances, or causal."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.causal = causal
        self.register_buffer("slopes", torch.linspace(0.1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, 2, 4).permute(2, 0, 3, 1, 4)
        if self.causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device=x.device)
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            y = flex_attention(q, k, v, lambda s, b, h, i, j: s - self.slopes[h] * (i - j).abs(), enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, 16))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention(causal: bool) -> None:
    x = torch.randn(2, 6, 16)
    model = Flex(causal)
    captured = capture(model, (x,))
    assert captured.unused == ()
    assert_same_outputs(captured, model, (x,), {})
    norm = convert(model, (x,))
    assert "attention" in str(norm)
    assert {type(leaf.atom).__name__ for leaf in norm.leaves if leaf.weight.endswith("weight")} == {"Linear"}


def test_masks_that_index_under_vmap() -> None:
    """As transformers makes them where a model adds its own condition (t5gemma2)."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            places = torch.arange(x.shape[0])
            with TransformGetItemToIndex():
                mask = torch.vmap(lambda i: torch.vmap(lambda j: (i >= j) & padding[j])(places))(places)
            return mask.to(x.dtype) @ self.linear(x)

    model, padding = Masked(), torch.tensor([True, False, True])
    captured = capture(model, (X, padding))
    assert captured.unused == ()
    assert_same_outputs(captured, model, (X, padding), {})


class Forces(nn.Module):
    """Minus the gradient of an energy, as models of molecules have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            places = x.detach().requires_grad_(True)
            energy = self.second(self.first(places).tanh()).sum()
            return -torch.autograd.grad(energy, places, create_graph=True)[0]


def test_gradients_that_a_model_takes_follow_its_weights() -> None:
    model = Forces()
    captured = capture(model, (X,))
    assert set(captured.unused) <= {"second.bias"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert_same_outputs(captured, model, (X,), {})
    targets = {leaf.weight: leaf.target for leaf in convert(model, (X,)).leaves}
    assert targets.keys() == {"first.weight", "first.bias", "second.weight"}
