"""Parameters without entries: nothing to normalise, so the rest of the model trains as it does without them."""

import copy
import warnings

import pytest
import torch
from torch import nn

import modnorm_fx as mn
from modnorm_fx.normalizer import COLD_STEPS

D = 12
X = torch.randn(4, 5, D, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A net without empty parameters; the others add some to it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Registers(Net):
    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(1, 0, D))

    def forward(self, x):
        return super().forward(torch.cat([self.empty.expand(len(x), -1, -1), x], 1))


class NoExtraFeatures(Net):
    def __init__(self):
        super().__init__()
        self.empty = nn.Linear(0, D, bias=False)

    def forward(self, x):
        return super().forward(x) + self.empty(x[..., :0])


class NoExtraOutputs(Net):
    def __init__(self):
        super().__init__()
        self.empty = nn.Linear(D, 0)

    def forward(self, x):
        return torch.cat([super().forward(x), self.empty(x)], -1)


class EmptyVector(Net):
    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return super().forward(x) + self.empty.sum()


class NeverUsed(Net):
    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))


NETS = (Registers, NoExtraFeatures, NoExtraOutputs, EmptyVector, NeverUsed)
each_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)


def built(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising them is a no-op
        model = net()
    model.load_state_dict(PLAIN.state_dict(), strict=False)
    return model


torch.manual_seed(0)
PLAIN = Net()


def trained(model, make, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The weight decay")
        opt = mn.ModularOptimizer(
            make(model.parameters()), mn.convert(model, (X,)), lr=0.05, weight_decay=0.1, **options
        )
    for _ in range(COLD_STEPS + 2):
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()
    return opt


@each_net
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_the_rest_trains_as_without_them(net, make):
    model, plain = built(net), copy.deepcopy(PLAIN)
    names = [name for name, p in model.named_parameters() if not p.numel()]
    opt, alone = trained(model, make), trained(plain, make)
    assert opt.norm.empty == tuple(names) and opt.norm.unused == () and names[0].startswith("empty")
    assert f"empty, so without a norm: {', '.join(names)}" in str(opt.norm)
    assert opt.norm.targets == alone.norm.targets
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in plain.named_parameters())


@pytest.mark.parametrize("options", [{"mode": "dualize"}, {"backend": "eager"}, {"nonfinite": "skip"}], ids=str)
def test_in_other_modes_too(options):
    model, plain = built(Registers), copy.deepcopy(PLAIN)
    trained(model, torch.optim.AdamW, **options)
    trained(plain, torch.optim.AdamW, **options)
    assert torch.equal(model.up.weight, plain.up.weight)


@each_net
def test_the_norm_of_an_update_is_that_of_the_rest(net):
    norm = mn.convert(built(net), (X,))
    update = {name: torch.ones(shape) for name, shape in norm.shapes.items()}
    rest = {name: update[name].clone() for name in norm.shapes if name not in norm.empty}
    assert norm.norm(update) == norm.norm(rest)
    norm.normalize_(update, 0.5)
    norm.normalize_(rest, 0.5)
    assert all(torch.equal(update[name], rest[name]) for name in rest)


def test_a_saved_norm_knows_them(tmp_path):
    model = built(Registers)
    norm = mn.convert(model, (X,))
    norm.save(tmp_path / "norm.json")
    assert mn.ModularNorm.load(tmp_path / "norm.json", model).empty == norm.empty == ("empty",)


def test_the_backend_of_torch_compile_has_nothing_to_say_of_them():
    model = built(Registers)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="modnorm_fx", options={"then": "eager"})
    compiled(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = mn.compiled_norm(compiled)
    assert norm.unused == () and norm.empty == ("empty",)
