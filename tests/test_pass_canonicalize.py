"""Walking a graph back: casts are looked through, cones stop where they are told."""

import torch
from modnorm_fx.passes.canonicalize import cone, is_call, number, shape, strip
from staged import stage

aten = torch.ops.aten
X = torch.randn(2, 6, 16)


def graph(function):
    return stage(function, X).module.graph


def last(g, target):
    return [n for n in g.nodes if n.target is target][-1]


def test_strip_looks_through_casts_and_what_it_is_told():
    g = graph(lambda x: torch.relu(x).double().contiguous().clone().float().unsqueeze(0))
    end = last(g, aten.unsqueeze.default)
    assert strip(end) is end
    assert strip(end.args[0]) is last(g, aten.relu.default)
    assert strip(end, aten.unsqueeze.default) is last(g, aten.relu.default)
    assert strip(3.0) == 3.0


def test_cone_is_everything_between_in_order():
    g = graph(lambda x: torch.tanh(torch.relu(x) * torch.sigmoid(x)) + torch.cos(x))
    relu = last(g, aten.relu.default)
    inside, frontier = cone(last(g, aten.tanh.default), lambda n: n is relu or n.op == "placeholder")
    assert [n.target for n in inside] == [aten.sigmoid.default, aten.mul.Tensor, aten.tanh.default]
    assert frontier[0].op == "placeholder" and frontier[1] is relu
    assert inside == sorted(inside)


def test_small_things():
    g = graph(lambda x: torch.relu(x))
    relu = last(g, aten.relu.default)
    assert is_call(relu, aten.gelu.default, aten.relu.default) and not is_call(relu, aten.gelu.default)
    assert not is_call(3.0, aten.relu.default) and not is_call(None)
    assert shape(relu) == (2, 6, 16)
    assert number(2) and number(0.5) and not number(True) and not number("2") and not number(relu)
