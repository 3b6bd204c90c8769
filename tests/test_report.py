"""The printed tree, against the norm's own numbers, the models' configurations and an HTML parser."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modnorm_fx.models_zoo import build
from rich.console import Console

from modnorm_fx import ModularNorm, convert, report, report_rows
from modnorm_fx import tree as T
from modnorm_fx.atoms import Bias, Linear
from modnorm_fx.conventions import PAPER, TRACKED

MODELS = {
    "gpt2": ("hf:gpt2-tiny", {"layers": 4}),
    "t5": ("hf:t5-tiny", {"layers": 3}),  # a dag: its position biases are shared by all blocks
    "resmlp": ("zoo:resmlp", {"width": 16}),
    "resnet": ("timm:resnet10t", {}),
}


@pytest.fixture(scope="module")
def norms() -> dict[str, ModularNorm]:
    torch.set_num_threads(1)
    return {name: _convert(spec, sizes) for name, (spec, sizes) in MODELS.items()}


def _convert(spec: str, sizes: dict[str, int]) -> ModularNorm:
    model = build(spec, device="meta", **sizes)
    return convert(model, model.example_inputs() if hasattr(model, "example_inputs") else None)


each_model = pytest.mark.parametrize("name", MODELS)


def hand_made(tree: T.Node, convention=TRACKED, **more) -> ModularNorm:
    """A norm of a tree that no model has."""
    keys = list(dict.fromkeys(node.key for node in T.leaves(tree)))
    shapes = {node.key: node.atom.shape for node in T.leaves(tree)}
    return ModularNorm(tree, convention, shapes, {key: (key, ()) for key in keys}, **more)


def weight(key: str, mass: float = 1.0, gain: float = 1.0, status: str = "exact", use: int = 0) -> T.AtomNode:
    return T.AtomNode(key, use, Linear((4, 4)), gain, mass, 1.0, status)


def expand(pattern: str) -> list[str]:
    """Written anew, from the docstring: `{0…3}`, `{0,2…6}`, `{1,4}`."""
    parts: list[list[str]] = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if not piece.startswith("{"):
            parts.append([piece])
        elif "…" in piece:
            head, last = piece[1:-1].split("…")
            first = [int(n) for n in head.split(",")]
            step = first[1] - first[0] if len(first) > 1 else 1
            parts.append([str(n) for n in range(first[0], int(last) + 1, step)])
        else:
            parts.append(piece[1:-1].split(","))
    return ["".join(choice) for choice in itertools.product(*parts)]


def cells(text: str, key: str) -> list[str]:
    """The columns of the (first) row for a pattern of keys: atom, mass, sensitivity, scale, target."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if re.sub("[┃│├└─ ]*", "", line, count=1).split("  ")[0] == key)
    rest = lines[at].split(key, 1)[1].strip() or lines[at + 1].strip("┃│├└─ ")
    return re.split(r" {2,}", rest)


# Names and numbers ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 3, st.sampled_from(["h.{}.w{}[{}:9]", "x{}.{}.{}"])), min_size=1))
def test_patterns_stand_for_exactly_the_names(parts: list[tuple[int, int, int, str]]) -> None:
    names = [template.format(a, b, c) for a, b, c, template in parts]
    written_out = [name for pattern in report_rows.pattern(names) for name in expand(pattern)]
    assert sorted(written_out) == sorted(set(names))


def test_patterns_are_short() -> None:
    assert report_rows.pattern(f"h.{i}.w" for i in range(12)) == ["h.{0…11}.w"]
    assert report_rows.pattern(["f.1.w", "f.4.w", "f.7.w"]) == ["f.{1,4…7}.w"]
    assert report_rows.pattern(["f.1.w", "f.2.w"]) == ["f.{1,2}.w"]
    assert report_rows.pattern(f"b.{i}.l.{j}" for i in range(3) for j in range(2)) == ["b.{0…2}.l.{0,1}"]
    assert report_rows.pattern(["wte", "wte"]) == ["wte"]
    assert report_rows.pattern(["emb.norm", "h.0.norm", "h.1.norm"]) == ["emb.norm", "h.{0,1}.norm"]


@settings(deadline=None)
@given(st.floats(1e-15, 1e15))
def test_numbers_keep_three_digits(value: float) -> None:
    shown = report_rows.number(value)
    assert math.isclose(float(shown), value, rel_tol=5.1e-3)
    assert len(shown) <= 8


def test_numbers_read_as_people_write_them() -> None:
    numbers = {0.0: "0", 1.0: "1", 0.70710678: "0.707", 12345.6: "12346", 2.5e-7: "2.5e-7", 1e-4: "0.0001", 3e9: "3e9"}
    assert {value: report_rows.number(value) for value in numbers} == numbers


def test_spans() -> None:
    assert report_rows.span([2.0, 2.0001]) == "2"
    assert report_rows.span([3.0, 2.0, 1.0]) == "3…1"
    assert report_rows.span([1.0, 3.0, 2.0]) == "1–3"


# The text -------------------------------------------------------------------------------------------------------------


@each_model
def test_text_is_plain_and_deterministic(norms: dict[str, ModularNorm], name: str, tmp_path: Path) -> None:
    norm = norms[name]
    text = report.text(norm)
    assert text == str(norm)
    assert all(line == line.rstrip() and line.isprintable() for line in text.splitlines())
    norm.save(tmp_path / "norm.json")
    assert report.text(ModularNorm.load(tmp_path / "norm.json")) == text


@each_model
def test_every_leaf_is_there_once_folded_or_not(norms: dict[str, ModularNorm], name: str) -> None:
    keys = {leaf.key for leaf in norms[name].leaves}
    uses = len(list(T.leaves(norms[name].tree)))
    found: list[str] = []
    for line in report.text(norms[name]).splitlines()[3:]:
        label = re.sub("[┃│├└─ ]*", "", line, count=1).split("  ")[0]
        pattern, _, note = label.partition(" (")
        times = int(note.split()[0]) if re.match(r"\d+ uses", note) else 1
        shared = re.match(r"use (\{.*\}|\d+) of", note)
        times = len(expand(shared[1])) if shared else times
        found += [key for key in expand(pattern) if key in keys] * times
    assert set(found) == keys
    assert len(found) == uses


@each_model
def test_flat_text_has_a_line_for_every_leaf(norms: dict[str, ModularNorm], name: str) -> None:
    norm = norms[name]
    rows = [re.split(r" {2,}", line) for line in report.flat(norm).splitlines()[4 : 4 + len(norm.leaves)]]
    assert [row[0] for row in rows] == [leaf.key for leaf in norm.leaves]
    assert [row[1] for row in rows] == [leaf.atom.describe() for leaf in norm.leaves]
    for row, leaf in zip(rows, norm.leaves, strict=True):
        shown = [float(cell) for cell in row[2:]]
        assert shown == pytest.approx([leaf.mass, leaf.sensitivity, leaf.scale, leaf.target], rel=5.1e-3)


def test_gpt2_fits_on_a_screen(norms: dict[str, ModularNorm]) -> None:
    lines = report.text(norms["gpt2"]).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 140


def test_copies_are_counted_and_named(norms: dict[str, ModularNorm]) -> None:
    assert "×4 copies of transformer.h.{0…3} " in report.text(norms["gpt2"])
    assert "×3 copies of blocks.{0…2} " in report.text(norms["resmlp"])


def test_blocks_within_blocks() -> None:
    blocks = [
        [T.Compose((weight(f"b.{i}.l.{j}.w", mass=i + 1), T.Bond("relu", 0.5))) for j in (1, 2)] for i in range(3)
    ]
    text = report.text(hand_made(T.Power(tuple(T.Power(tuple(block)) for block in blocks))))
    assert re.search(r"^×3 copies of b\.\{0…2\} +12$", text, re.MULTILINE)
    assert re.search(r"^┃ ×2 copies of b\.\{0…2\}\.l\.\{1,2\} +2…6$", text, re.MULTILINE)
    assert cells(text, "b.{0…2}.l.{1,2}.w")[:2] == ["Linear 4→4", "1…3"]


def test_numbers_of_a_block_run_from_the_first_copy_to_the_last(norms: dict[str, ModularNorm]) -> None:
    leaves = {leaf.key: leaf for leaf in norms["gpt2"].leaves}
    first, last = (leaves[f"transformer.h.{i}.mlp.c_fc.weight"] for i in (0, 3))
    atom, mass, sensitivity, scale, target = cells(report.text(norms["gpt2"]), "transformer.h.{0…3}.mlp.c_fc.weight")
    assert atom == first.atom.describe()
    assert [float(mass), float(scale)] == pytest.approx([first.mass, first.scale], rel=5.1e-3)
    for shown, ends in ((sensitivity, (first.sensitivity, last.sensitivity)), (target, (first.target, last.target))):
        assert [float(end) for end in shown.split("…")] == pytest.approx(list(ends), rel=5.1e-3)


def test_sensitivities_of_ops_are_those_of_the_tree(norms: dict[str, ModularNorm]) -> None:
    norm = norms["gpt2"]
    power = next(node for node in norm.tree.children if isinstance(node, T.Power))
    values = [bond.value for copy in power.parts for bond in _bonds(copy) if bond.name == "layer_norm"]
    assert len(values) == 2 * 4
    for first, last in ((values[0], values[-2]), (values[1], values[-1])):
        assert f"└─ layer_norm ×{report_rows.number(first)}…{report_rows.number(last)}\n" in report.text(norm)


def _bonds(node: T.Node) -> Iterator[T.Bond]:
    if isinstance(node, T.Bond):
        yield node
    for child in node.children:
        yield from _bonds(child)


def test_the_header_says_what_is_in_the_norm(norms: dict[str, ModularNorm]) -> None:
    norm = norms["gpt2"]
    head = "\n".join(report.text(norm).splitlines()[:2])
    sizes = [p.numel() for p in build("hf:gpt2-tiny", device="meta", layers=4).parameters()]
    assert f"{sum(sizes):,} parameters in {len(sizes)} tensors" in head
    assert f"{len(norm.leaves)} leaves: {sum(leaf.atom.is_matrix for leaf in norm.leaves)} matrices" in head
    assert "tracked convention" in head
    assert "total mass 3 " in head
    assert "no sampled numbers" in head


def test_tied_weights_are_marked_at_each_use(norms: dict[str, ModularNorm]) -> None:
    text = report.text(norms["gpt2"])
    leaf = next(leaf for leaf in norms["gpt2"].leaves if leaf.key == "transformer.wte.weight")
    first = cells(text, "transformer.wte.weight (use 1 of 2)")
    second = cells(text, "transformer.wte.weight (use 2 of 2, by rows)")  # tracked: in the norm of the lookups
    assert first[0].startswith("Embedding") and second[0].startswith("Linear")
    assert first[-1] == second[-1] == report_rows.number(leaf.target)
    assert float(first[1]) + float(second[1]) == pytest.approx(leaf.mass, rel=1e-2)
    gains = [float(use[2]) * float(use[3]) for use in (first, second)]
    assert math.hypot(*gains) == pytest.approx(leaf.sensitivity * leaf.scale, rel=1e-2)
    assert "tied: transformer.wte.weight is also lm_head.weight" in text
    assert "where counted (in quadrature for uses of one kind)" in text and "by rows: per RMS of a row" in text


def test_uses_that_count_add_up_to_the_leaf() -> None:
    norm = hand_made(T.Compose((weight("w"), T.Bond("relu", 0.5), weight("w", gain=3.0, use=1))), PAPER)
    rows = [cells(report.text(norm), f"w (use {use} of 2)") for use in (1, 2)]
    gains = [float(sensitivity) * float(scale) for _, _, sensitivity, scale, _ in rows]
    assert gains == [0.5, 3.0]
    (leaf,) = norm.leaves
    assert leaf.sensitivity * leaf.scale == sum(gains)


def test_a_weight_shared_by_all_copies_is_one_name() -> None:
    copies = [T.Compose((weight("shared", use=i), T.Bond("relu", 0.5))) for i in range(3)]
    text = report.text(hand_made(T.Power(tuple(copies))))
    assert "┃ shared (3 uses)  Linear 4→4" in text


def test_residuals_show_their_identity() -> None:
    residual = T.Tuple((T.Compose(()), T.Compose((T.Bond("layer_norm", 0.7071), weight("w")))))
    assert _tree(hand_made(residual)) == ["residual ×1.22", "├─ identity", "└─ layer_norm ×0.707", "   w"]


def test_a_gate_is_no_residual() -> None:
    gate = T.Tuple((T.Bond("mul", 0.5), T.Compose((weight("w"), T.Bond("mul", 1.0)))), join="mul")
    assert _tree(hand_made(gate)) == ["mul ×1.12", "├─ mul ×0.5", "└─ w", "   mul ×1"]
    assert _tree(hand_made(T.Tuple(gate.parts)))[0] == "residual ×1.12"


def test_nested_structure_is_flattened() -> None:
    inner = T.Tuple((weight("k"), weight("v")))
    both = T.Compose((T.Compose((weight("a"), T.Bond("mul", 0.5))), T.Bond("gelu", 2.0), T.Tuple((weight("q"), inner))))
    assert _tree(hand_made(both)) == ["a", "mul ×0.5 · gelu ×2", "add ×1.73", "├─ q", "├─ k", "└─ v"]


def test_sampled_numbers_are_marked_and_counted() -> None:
    tree = T.Compose((weight("w", gain=0.25, status="sampled"), T.Bond("fft", 3.0, "sampled"), weight("v")))
    text = report.text(hand_made(tree))
    assert "~ 2 sampled numbers" in text
    assert "fft ×~3" in text
    assert cells(text, "w")[3] == "~0.25"
    assert cells(text, "v")[3] == "1"
    assert "~: sampled on random inputs" in text
    assert "~" not in report.text(hand_made(weight("v")))


def test_unused_parameters_are_named() -> None:
    text = report.text(hand_made(weight("w"), unused=("h.0.extra", "h.1.extra")))
    assert "unused, so without a norm: h.{0,1}.extra" in text


def test_the_legend_follows_the_convention() -> None:
    assert "target: √(mass / total mass) / (sensitivity · scale)" in report.text(hand_made(weight("w"), TRACKED))
    assert "target: mass / total mass / (sensitivity · scale)" in report.text(hand_made(weight("w"), PAPER))


def test_long_names_do_not_push_the_columns_away() -> None:
    name = "encoder." * 12 + "weight"
    lines = report.text(hand_made(T.Compose((weight(name), weight("w"))))).splitlines()
    assert name in lines
    assert max(len(line) for line in lines[3:7] if line != name) < 100


def _tree(norm: ModularNorm) -> list[str]:
    """The names of the printed tree."""
    lines = report.text(norm).splitlines()[4:]
    return [re.split(r" {2,}(?=Linear|Bias|\d)", line)[0] for line in lines[: lines.index("")]]


# Dags -----------------------------------------------------------------------------------------------------------------

EMPTY = T.Compose(())


def test_a_dag_lists_every_vertex_with_its_edges() -> None:
    edges = ((0, 1, weight("a")), (0, 2, weight("b")), (1, 2, EMPTY), (1, 3, T.Bond("relu", 0.5)), (2, 3, weight("c")))
    dag = T.Dag((EMPTY, EMPTY, T.Compose((T.Bond("gelu", 2.0), weight("inside"))), EMPTY), edges)
    assert _tree(hand_made(dag, PAPER)) == [
        "dag of 4 vertices and 5 edges ×4.5",
        "├─ v1 ← input",
        "│  a",
        "├─ v2",
        "│  ├─ from input",
        "│  │  b",
        "│  └─ from v1: identity",
        "│  gelu ×2",
        "│  inside",
        "└─ output",
        "   ├─ from v1: relu ×0.5",
        "   └─ from v2",
        "      c",
    ]


def test_a_dag_says_which_module_its_weights_are_in() -> None:
    names = ("block.3.up", "block.3.mix.down", "block.3.gate")
    a, b, c = (weight(f"{name}.weight") for name in names)
    edges = ((0, 1, a), (0, 2, b), (1, 2, EMPTY), (1, 3, EMPTY), (2, 3, c))
    norm = hand_made(T.Dag((EMPTY,) * 4, edges), PAPER)
    assert _tree(norm)[0].startswith("dag of 4 vertices and 5 edges in block.3 ×")


def test_long_lists_of_unused_parameters_are_cut() -> None:
    names = tuple(f"{letter}.weight" for letter in "abcdefghijkl")
    norm = hand_made(weight("w"), unused=names)
    (line,) = (line for line in report.text(norm).splitlines() if line.startswith("unused"))
    assert line.endswith("h.weight and 4 more") and "i.weight" not in line


def test_alike_vertices_of_a_dag_are_folded() -> None:
    """A chain of blocks that all see the input, too, as blocks see one table of position biases."""
    chain = [(v - 1, v, weight(f"h.{v}.w", mass=v)) for v in range(1, 7)]
    edges = sorted([*chain, *((0, v, T.Bond("attention", 1.0)) for v in range(2, 6))], key=lambda edge: edge[:2])
    norm = hand_made(T.Dag((EMPTY,) * 7, tuple(edges)))
    assert _tree(norm)[3:10] == [
        "├─ ×4 copies",
        "│  ┃ v{2…5}",
        "│  ┃ ├─ from input: attention ×1",
        "│  ┃ └─ from v{1…4}",
        "│  ┃    h.{2…5}.w",
        "└─ output ← v5",
        "   h.6.w",
    ]
    assert cells(report.text(norm), "h.{2…5}.w")[1] == "2…5"


def test_a_dag_of_a_real_model_folds_its_blocks(norms: dict[str, ModularNorm]) -> None:
    text = report.text(norms["t5"])
    assert "encoder.block.{1,2}.layer.0.SelfAttention.q.weight" in text
    assert "decoder.block.{1,2}.layer.1.EncDecAttention.k.weight" in text


# Rich and HTML --------------------------------------------------------------------------------------------------------


@each_model
def test_the_rich_tree_says_what_the_text_says(norms: dict[str, ModularNorm], name: str) -> None:
    out = io.StringIO()
    Console(file=out, width=250).print(report.rich_tree(norms[name]))
    rich = _words(out.getvalue().replace(" branch\n", "\n"))
    assert rich == _words(report.text(norms[name]))


def _words(text: str) -> list[str]:
    return sorted(re.sub("[┃│├└─·:]|one row for all copies", " ", text).split())


class Page(HTMLParser):
    """Tags in balance, text, and attributes."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.attributes: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@each_model
def test_html_is_one_page_with_every_leaf(norms: dict[str, ModularNorm], name: str) -> None:
    page = Page(report.html(norms[name]))
    lines = set(re.split(r"\n| \(", page.text))
    assert all(any(line.startswith(leaf.key) for line in lines) for leaf in norms[name].leaves)
    assert page.tags.count("html") == page.tags.count("body") == 1
    assert "details" in page.tags and "summary" in page.tags
    assert not {"src", "href"} & page.attributes.keys()
    assert not re.search("https?:|url\\(|@import", report.html(norms[name]))


def test_html_shows_the_values_of_all_copies(norms: dict[str, ModularNorm]) -> None:
    targets = [leaf.target for leaf in norms["gpt2"].leaves if leaf.key.endswith("mlp.c_fc.weight")]
    assert len(targets) == 4
    assert ", ".join(map(report_rows.number, targets)) in Page(report.html(norms["gpt2"])).attributes["title"]


def test_html_escapes_names() -> None:
    page = report.html(hand_made(T.Compose((weight("a<b>&.w"), T.Bond("<script>", 0.5)))))
    assert "<script>" not in page and "<b>&" not in page
    assert "a<b>&.w" in Page(page).text


def test_to_html_writes_the_page(tmp_path: Path) -> None:
    norm = hand_made(T.Compose((weight("w"), T.AtomNode("b", 0, Bias((4,)), 1.0, 0.1, 0.0, "exact"))))
    norm.to_html(tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text(encoding="utf-8") == report.html(norm)
