"""Saved norms: the same bytes for the same norm, everything back, and a clear refusal of anything else."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict

import pytest
import torch
from every_atom import CASES, CONVENTIONS, EveryAtom, updates
from torch import nn

import modnorm_fx as mn
from modnorm_fx.errors import FormatError, ModelMismatchError, ModnormError
from modnorm_fx.norm import ModularNorm
from modnorm_fx.norm_json import FIELDS, FORMAT, VERSION, from_json, to_json

both = pytest.mark.parametrize("convention", CONVENTIONS)


@both
def test_there_and_back(convention, tmp_path):
    model, norm = CASES[convention]
    norm.save(tmp_path / "a.json")
    loaded = ModularNorm.load(tmp_path / "a.json")
    assert loaded.leaves == norm.leaves  # every number, atom and slice
    assert loaded.tree == norm.tree and loaded.convention == norm.convention
    assert loaded.shapes == dict(norm.shapes) and loaded.aliases == dict(norm.aliases) and loaded.unused == norm.unused
    assert loaded.digest == norm.digest and loaded.mass == norm.mass and loaded.sensitivity == norm.sensitivity
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@both
def test_a_loaded_norm_works(convention, tmp_path):
    model, norm = CASES[convention]
    norm.save(str(tmp_path / "a.json"))
    loaded = ModularNorm.load(str(tmp_path / "a.json"), model)
    assert loaded.parameter_name(model.shift) == "shift"
    given, same = updates(norm), updates(norm)
    loaded.normalize_(given)
    norm.normalize_(same)
    assert all(torch.equal(given[k], same[k]) for k in given)
    assert loaded.tare("qkv", 7.0).targets == norm.tare("qkv", 7.0).targets
    assert str(loaded) == str(norm)


def test_data_only(tmp_path):
    """Plain JSON: numbers, strings, lists and objects; no names of classes or modules of this package."""
    text = json.dumps(to_json(CASES["tracked"][1]))
    assert json.loads(text) == to_json(CASES["tracked"][1])
    assert "modnorm_fx.norm" in text and text.count("modnorm_fx") == 1
    assert "NaN" not in text and "Infinity" not in text


def test_a_tared_norm_and_names_beyond_ascii(tmp_path):
    norm = mn.convert(nn.Sequential(OrderedDict(größe=nn.Linear(3, 4))), (torch.zeros(2, 3),)).tare("größe", 1 / 3)
    norm.save(tmp_path / "a.json")
    assert ModularNorm.load(tmp_path / "a.json").targets == norm.targets
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_another_model_is_refused(tmp_path):
    CASES["tracked"][1].save(tmp_path / "a.json")
    other = EveryAtom()
    other.shift = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ModelMismatchError, match=r"shift has shape \[5\], not \[16\]"):
        ModularNorm.load(tmp_path / "a.json", other)


def test_a_loaded_norm_has_no_stages(tmp_path):
    CASES["tracked"][1].save(tmp_path / "a.json")
    with pytest.raises(ModnormError, match="keeps the tree but not the stages"):
        ModularNorm.load(tmp_path / "a.json").explain("atoms")


# --- what is not a norm -----------------------------------------------------------------------------------------------


def refused(path) -> str:
    with pytest.raises(FormatError) as caught:
        ModularNorm.load(path)
    return str(caught.value)


@pytest.mark.parametrize("content, text", [
    (b"", "is not JSON"),
    (b'{"format": "modnorm', "is not JSON"),
    (b"\xff\xfe", "Cannot read"),
    (b"[]", "not a modular norm"),
    (b"{}", "not a modular norm"),
    (b'{"format": "pickle"}', "not a modular norm"),
    (b"null", "not a modular norm"),
])  # fmt: skip
def test_other_files(tmp_path, content, text):
    (tmp_path / "a.json").write_bytes(content)
    assert text in refused(tmp_path / "a.json")


def test_no_file(tmp_path):
    assert "Cannot read" in refused(tmp_path / "none.json")
    assert "Cannot read" in refused(tmp_path)


@pytest.mark.parametrize("version", [VERSION + 1, "1", None, 0])
def test_another_version_says_which_and_what_to_do(version):
    data = to_json(CASES["tracked"][1]) | {"version": version}
    with pytest.raises(FormatError) as caught:
        from_json(data)
    assert repr(version) in str(caught.value) and f"reads version {VERSION}" in str(caught.value)
    assert "newer modnorm_fx" in str(caught.value)


@pytest.mark.parametrize("name", [f for f in FIELDS if f not in ("format", "version")])
def test_every_field_is_needed_and_no_other_is_known(name):
    data = to_json(CASES["tracked"][1])
    with pytest.raises(FormatError, match=name):
        from_json({k: v for k, v in data.items() if k != name})
    with pytest.raises(FormatError, match="extra"):
        from_json(data | {"extra": 1})


def first(node: dict, kind: str) -> dict | None:
    """The first node of a kind, depth first."""
    if kind in node:
        return node
    for value in node.values():
        for child in value if isinstance(value, list) else ():
            child = child[2] if isinstance(child, list) else child
            found = first(child, kind) if isinstance(child, dict) else None
            if found:
                return found
    return None


def damaged(change) -> dict:
    data = copy.deepcopy(to_json(CASES["tracked"][1]))
    change(data)
    return data


def atom(data: dict) -> dict:
    return first(data["tree"], "atom")


def leaf(data: dict) -> list:
    """The first leaf, as [parameter, slices]."""
    return next(iter(data["leaves"].values()))


DAMAGE = {
    "an unknown node": lambda d: d.update(tree={"loop": []}),
    "a tree that is no node": lambda d: d.update(tree=[]),
    "an unknown field of an atom": lambda d: atom(d).update(color="red"),
    "an atom without mass": lambda d: atom(d).pop("mass"),
    "a negative mass": lambda d: atom(d).update(mass=-1.0),
    "a mass that is text": lambda d: atom(d).update(mass="1.0"),
    "a mass that is true": lambda d: atom(d).update(mass=True),
    "a gain that is no number": lambda d: atom(d).update(gain=math.nan),
    "an infinite gain": lambda d: atom(d).update(gain=math.inf),
    "an unknown kind of atom": lambda d: atom(d)["of"].update(kind="Wavelet"),
    "an atom without shape": lambda d: atom(d)["of"].pop("shape"),
    "an atom with a field too many": lambda d: atom(d)["of"].update(color="red"),
    "an atom that the leaves do not know": lambda d: atom(d).update(atom="other.weight"),
    "a leaf that the tree does not know": lambda d: d["leaves"].update({"other": ["shift", []]}),
    "a leaf of an unknown parameter": lambda d: leaf(d).__setitem__(0, "other"),
    "a leaf that is no pair": lambda d: leaf(d).clear(),
    "a slice with three numbers": lambda d: leaf(d).__setitem__(1, [[0, 1, 2]]),
    "a slice of an axis that is not there": lambda d: leaf(d).__setitem__(1, [[7, 0, 1, 2]]),
    "a slice beyond the end": lambda d: leaf(d).__setitem__(1, [[0, 0, 500, 500]]),
    "a slice of text": lambda d: leaf(d).__setitem__(1, ["abcd"]),
    "a bond without sensitivity": lambda d: first(d["tree"], "bond").pop("sensitivity"),
    "a bond with negative sensitivity": lambda d: first(d["tree"], "bond").update(sensitivity=-1.0),
    "a changed shape": lambda d: d["parameters"].update(shift=[17]),
    "a missing parameter": lambda d: d["parameters"].pop("unused"),
    "another digest": lambda d: d.update(digest="0" * 64),
    "an unknown convention": lambda d: d.update(convention="certain"),
    "a convention that is a list": lambda d: d.update(convention=["paper"]),
    "parameters that are a list": lambda d: d.update(parameters=[]),
    "leaves that are a list": lambda d: d.update(leaves=[]),
    "unused that is a number": lambda d: d.update(unused=3),
    "shapes of text": lambda d: d["parameters"].update(shift=["a"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str):
    with pytest.raises(FormatError):
        from_json(damaged(DAMAGE[name]))


def test_a_dag_that_leads_backwards_is_refused():
    bond = {"bond": "b", "sensitivity": 1.0, "status": "exact"}
    for edges in ([[1, 0, bond]], [[0, 5, bond]], [[0, 0, bond]], [[0, 1]], [["a", "b", bond]]):
        with pytest.raises(FormatError):
            from_json(damaged(lambda d, edges=edges: d.update(tree={"dag": [d["tree"], bond], "edges": edges})))


def test_an_atom_that_does_not_fit_its_part_is_refused():
    """Else the first step would fail, far from the cause."""

    def change(data):
        of = atom(data)["of"]
        of["shape"] = [n + 1 for n in of["shape"]]

    with pytest.raises(FormatError, match="do not fit together"):
        from_json(damaged(change))


def test_the_format_is_named():
    data = to_json(CASES["paper"][1])
    assert (data["format"], data["version"], data["convention"]) == (FORMAT, VERSION, "paper")
    assert tuple(data) == FIELDS
