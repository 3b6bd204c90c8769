"""The table refuses what it cannot stand for; calls read schemas; extended tables leave the original alone."""

import pytest
import torch
from op_calls import Example, T, W, build
from torch import fx, nn

from modnorm_fx import ATEN, ModnormError
from modnorm_fx.errors import InternalError
from modnorm_fx.rules import STATUSES, Call, Local, RuleTable, arguments, operands

aten = torch.ops.aten


def one(call: Call) -> Local:
    return Local(1.0, {"self": 1.0})


def table() -> RuleTable:
    rules = RuleTable()
    rules.rule(aten.relu.default, status="exact", source="half")(one)
    return rules


def refused(op, status="exact", source="half", rules=None) -> str:
    rules = rules if rules is not None else table()
    before = dict(rules)
    with pytest.raises(ModnormError) as caught:
        rules.rule(op, status=status, source=source)(one)
    assert dict(rules) == before
    return str(caught.value)


def test_a_duplicate_is_refused():
    assert "already a rule for aten.relu.default" in refused(aten.relu.default)


def test_a_packet_is_refused_and_its_overloads_are_named():
    text = refused(aten.gelu)
    assert "packet" in text and "aten.gelu.default" in text


@pytest.mark.parametrize("op", [aten.relu_.default, aten.add_.Tensor, aten.gelu.out], ids=str)
def test_ops_that_write_are_refused(op):
    assert "writes into its input" in refused(op)


@pytest.mark.parametrize("source", ["", "  \n"])
def test_a_missing_source_is_refused(source):
    assert "has no source" in refused(aten.gelu.default, source=source)


@pytest.mark.parametrize("status", ["sampled", "guess", ""])
def test_a_status_that_does_not_exist_is_refused(status):
    assert "not a status" in refused(aten.gelu.default, status=status)


def test_one_bad_op_among_several_is_refused():
    with pytest.raises(ModnormError):
        table().rule(aten.gelu.default, aten.relu.default, status="exact", source="half")(one)


def test_an_extended_table_leaves_the_original_alone():
    rules = ATEN.extended()
    n = len(ATEN)
    rules.rule(aten.special_airy_ai.default, status="typical", source="for the test")(one)
    assert len(rules) == n + 1 and len(ATEN) == n
    assert aten.special_airy_ai.default not in ATEN
    assert rules[aten.special_airy_ai.default].source == "for the test"
    assert "already a rule" in refused(aten.relu.default, rules=rules)


def test_every_row_of_the_table_is_complete():
    for op, row in ATEN.items():
        assert row.status in STATUSES[:-1] and row.source.strip(), op
        assert not (row.view and row.pointwise), op
        if isinstance(op, torch._ops.OpOverload):
            named = {a.name for a in op._schema.arguments}
            assert not op._schema.is_mutable, op
            if len(row.weights) < 2:  # others serve several schemas
                assert set(row.weights) <= named, f"{op}: {set(row.weights) - named} are no arguments"


def test_views_of_the_table_are_views():
    """A row marked view returns an alias of its input, by its own schema (reshape and _unsafe_view may copy)."""
    for op, row in ATEN.items():
        if row.view and op is not aten._unsafe_view.default:
            assert any(a.alias_info is not None for a in op._schema.arguments), op


# --- arguments -------------------------------------------------------------------------------------------------------


def called(op, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    return x, graph.call_function(op, tuple(x if a is ... else a for a in args), kwargs)


def test_arguments_go_by_schema_names_with_defaults():
    x, node = called(aten.layer_norm.default, ..., [8])
    key, args = arguments(node, nn.Module())
    assert key is aten.layer_norm.default
    assert args["input"] is x and args["normalized_shape"] == [8] and args["weight"] is None
    assert args["eps"] == pytest.approx(1e-5)


def test_keyword_arguments_are_found():
    x, node = called(aten.add.Tensor, ..., ..., alpha=3)
    assert arguments(node, nn.Module())[1] == {"self": x, "other": x, "alpha": 3}


def test_operands_looks_into_lists():
    x, node = called(aten.cat.default, [], 1)
    node.args = ([x, 2.0, x], 1)
    assert list(operands(arguments(node, nn.Module())[1])) == [(("tensors", 0), x), (("tensors", 2), x)]


def test_other_callables_get_numbered_arguments():
    import operator

    x, node = called(operator.getitem, ..., 1)
    assert arguments(node, nn.Module())[1] == {"arg0": x, "arg1": 1}


def test_a_module_that_is_no_region_is_an_internal_error():
    root = nn.Module()
    root.add_module("layer", nn.Linear(2, 2))
    graph = fx.Graph()
    with pytest.raises(InternalError):
        arguments(graph.call_module("layer", (graph.placeholder("x"),)), root)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_a_call_knows_scales_shapes_and_weights():
    call, _ = build(aten.linear.default, Example((T((5, 6), 0.7), W("linear", (9, 6)))))
    assert call.scale("input") == 0.7 and call.shape("weight") == (9, 6) and call.shape() == (5, 9)
    assert call.is_weight("weight") and not call.is_weight("input")
    assert call.is_tensor("input") and not call.is_tensor("bias")
    assert call["bias"] is None


def test_numbers_count_as_themselves():
    call, _ = build(aten.mul.Tensor, Example((T((5, 6), 0.7), -2.5)))
    assert call.scale("other") == 2.5


def test_an_operand_without_a_scale_is_an_internal_error():
    call, _ = build(aten.mul.Tensor, Example((T((5, 6)), T((5, 6)))))
    bare = Call(call.node, call.args, {}, {}, call.convention)
    with pytest.raises(InternalError, match="has no scale"):
        bare.scale("self")


def test_local_of_lists():
    found = Local(1.0, {"tensors": [0.5, 2.0], "self": 3.0})
    assert found.of(("tensors", 1)) == 2.0
    assert found.of(("self", None)) == 3.0
    assert found.of(("other", None)) is None
