"""Converts every family of transformers and timm, one after the other, and records what became of each.

Each family is built and converted in a process of its own with a time limit, so that a crash or a hang costs one row.
A row is one line of JSON in a work file beside the output; a run that is started again goes on where it stopped.

Beside the conversion a row says two things that are checked on real weights: whether the captured graph computes what
the model computes, and whether every parameter that receives a gradient has an atom.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata, resources
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modnorm_fx import ModularNorm, __version__
from modnorm_fx._copies import keep_layers, seed
from modnorm_fx._outputs import named_leaves
from modnorm_fx.capture import capture
from modnorm_fx.errors import CaptureError, ModnormError
from modnorm_fx.inputs import example_inputs
from modnorm_fx.pipeline import convert

from . import build, from_hf

__all__ = ["Row", "cover", "families", "published", "read", "without_model"]

Tell = Callable[["Row"], object]
Examine = Callable[[str, Tell], "Row"]

#: models with more weights are converted but not run
MOST_PARAMETERS = 100_000_000
#: relative difference of two float32 computations of the same thing: a few hundred roundings of 6e-8, amplified by norm
#: layers whose input is small
SAME = 1e-3
EXPORTED = (
    "The model asks torch whether it is being exported, and if so computes something else (its outputs change by "
    "{:.2g} of their size): the graph is what it computes then."
)
#: functions that drop something out among other things -> place of its probability among their arguments
ATTENTION = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
#: files of the package that no conversion passes through
FACES = tuple(
    "cli commands report report_rows buckets atom_code normalizer codegen orthogonal fused_adamw fused_triton "
    "base_step graph step_op optim compile norm_json".split()
)


@dataclass
class Row:
    """What became of one family.

    Attributes:
        spec: `hf:NAME-tiny` or `timm:NAME`. versions: of what it depends on.
        stage: `done`, or where it ended: `build`, `inputs`, `capture`, `conversion`, `run`, `timeout`, `crash`.
        error: type and text, where it ended. warnings: of the conversion.
        limit: seconds that it was given, where they did not suffice.
        model: class. route: of the capture. seconds: of making inputs and converting. megabytes: the largest memory of
            the process until then.
        parameters, leaves: tensors, and leaves of the norm. atoms: kind -> leaves.
        ops, sampled_ops: operations on signals, and of them those without a rule. sampled: their places.
        sampled_leaves: weights whose number is an estimate.
        unused: parameters that reach no output. outputs: names of those that count.
        targets: the smallest and the largest target.
        difference: of captured graph and model, relative to the model's output; None where `unchecked` says why.
        homeless: parameters with a gradient in entries that belong to no leaf.
    """

    spec: str
    versions: dict[str, str]
    stage: str = "build"
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    limit: float = 0.0
    model: str = ""
    route: str = ""
    seconds: float = 0.0
    megabytes: int = 0
    parameters: int = 0
    leaves: int = 0
    atoms: dict[str, int] = field(default_factory=dict)
    ops: int = 0
    sampled_ops: int = 0
    sampled: list[str] = field(default_factory=list)
    sampled_leaves: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    difference: float | None = None
    homeless: list[str] = field(default_factory=list)
    unchecked: str = ""

    @property
    def good(self) -> bool:
        """Converted, and nothing that was checked is wrong."""
        same = self.difference is None or self.difference <= SAME
        return self.stage == "done" and not self.homeless and same and all(0 < t < float("inf") for t in self.targets)


def families(*, hf: bool, timm: bool) -> list[str]:
    """Specs of all families: every architecture of transformers, and of each file of timm one model or more."""
    specs = [f"hf:{name}-tiny" for name in from_hf.families()] if hf else []
    if timm:
        text = resources.files(__package__).joinpath("timm_families.txt").read_text(encoding="utf-8")
        specs += [f"timm:{name}" for name in text.split()]
    return specs


def without_model() -> list[str]:
    """Architectures of transformers that are no family: parts of others, or configurations without a model."""
    return sorted(set(from_hf.names()) - set(from_hf.families()))


def versions(spec: str) -> dict[str, str]:
    """What a row depends on: if one of them changes, it is made again."""
    library = "transformers" if spec.startswith("hf:") else "timm"
    try:
        return {
            "modnorm_fx": f"{__version__}+{_source()}",
            "torch": torch.__version__,
            library: metadata.version(library),
        }
    except metadata.PackageNotFoundError as error:
        raise ModnormError(f"{library} is not installed.", do=f"pip install {library}") from error


@cache
def _source() -> str:
    """A digest of the code that a row depends on: between two releases the version stays the same."""
    package, zoo = find_spec("modnorm_fx"), Path(__file__).parent
    assert package is not None and package.submodule_search_locations is not None
    passes = find_spec("modnorm_fx.passes")
    assert passes is not None and passes.submodule_search_locations is not None
    files = [
        *(path for path in Path(package.submodule_search_locations[0]).glob("*.py") if path.stem not in FACES),
        *Path(passes.submodule_search_locations[0]).glob("*.py"),
        *(zoo / f"{name}.py" for name in ("__init__", "coverage", "from_hf", "from_timm", "tiny", "tiny_types")),
    ]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.parent.name, path.name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# One family -----------------------------------------------------------------------------------------------------------


def examine(spec: str, tell: Tell) -> Row:
    """Builds, converts and runs one family; whatever goes wrong is in the row.

    `tell` is given the row as far as it is known, at the beginning of every stage: a process that is ended while the
    model runs has still converted it.
    """
    row = Row(spec, versions(spec))

    def enter(stage: str) -> None:
        row.stage = stage
        tell(row)

    try:
        enter("build")
        model = build(spec, device="meta")
        row.model, row.parameters = type(model).__name__, len(list(model.parameters()))
        start = time.perf_counter()
        try:
            enter("inputs")
            args, kwargs = example_inputs(model)
            enter("conversion")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                norm = convert(model, args, kwargs)
        finally:
            row.seconds = time.perf_counter() - start
        row.warnings = [str(one.message) for one in caught if one.filename == __file__]
        row.megabytes = _megabytes()
        _describe(norm, row)
        enter("run")
        size = sum(p.numel() for p in model.parameters())
        if size > MOST_PARAMETERS:
            row.unchecked = f"not run: {size / 1e6:.0f} million weights"
        else:
            _check_on_weights(spec, row, norm)
        row.stage = "done"
    except Exception as error:
        if isinstance(error, CaptureError) and row.stage == "conversion":
            row.stage = "capture"
        row.error = f"{type(error).__name__}: {error}"
        if not isinstance(error, ModnormError):
            frames = traceback.extract_tb(error.__traceback__)[-3:]  # file names, not where they lie on this machine
            row.error += "".join(f"\n  {Path(f.filename).name}:{f.lineno}: {f.line}" for f in frames)
    row.megabytes = row.megabytes or _megabytes()
    return row


def _describe(norm: ModularNorm, row: Row) -> None:
    """Writes down what the norm says of itself."""
    assert norm.conversion is not None  # convert() fills it in
    row.route, row.outputs = norm.conversion.route, list(norm.conversion.outputs)
    row.leaves, row.unused = len(norm.leaves), list(norm.unused)
    row.ops = sum(norm.conversion.ops.values())
    row.sampled, row.sampled_ops = list(norm.conversion.sampled), len(norm.conversion.sampled)
    for leaf in norm.leaves:
        kind = getattr(leaf.atom, "inner", leaf.atom).kind
        row.atoms[kind] = row.atoms.get(kind, 0) + 1
    row.sampled_leaves = [leaf.key for leaf in norm.leaves if leaf.status == "sampled"]
    targets = [leaf.target for leaf in norm.leaves]
    row.targets = [min(targets), max(targets)]


def _megabytes() -> int:
    """The largest memory of this process so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _check_on_weights(spec: str, row: Row, norm: ModularNorm) -> None:
    """Runs the model with random weights: does the graph agree, and does every gradient have a leaf?"""
    torch.manual_seed(0)
    model = build(spec).float()
    keep_layers(model)
    args, kwargs = example_inputs(model)
    captured = capture(model, args, kwargs)
    model.train("train" in captured.route)  # the mode that the graph was captured in
    with _NoDropout(), torch.no_grad():
        seed()
        found = dict(zip(captured.outputs, captured(model, *args, **kwargs), strict=True))

        def difference() -> float:
            seed()
            expected = dict(named_leaves(model(*args, **kwargs)))
            return max(_difference(tensor, expected.get(name)) for name, tensor in found.items())

        row.difference = difference()
        if row.difference > SAME:  # transformers makes causal masks when exported where it forgoes them when run
            with mock.patch("torch.compiler.is_exporting", return_value=True):
                exported = difference()
            if exported <= SAME:
                row.warnings.append(EXPORTED.format(row.difference))
                row.difference = exported
    for training in (True, False):  # dropout, and layers that are left out, only in the first
        model.train(training)
        seed()
        try:
            outputs = [x for _, x in named_leaves(model(*args, **kwargs)) if _moves(x)]
            if not outputs:
                row.unchecked = "gradients not checked: no output has one"
                return
            torch.autograd.backward(outputs, [torch.randn_like(x) for x in outputs])
        except Exception as error:
            if not training:
                row.unchecked = f"gradients not checked: {type(error).__name__}: {str(error)[:200]}"
                return
            model.zero_grad()
        else:
            break
    row.homeless = homeless({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, norm)


class _NoDropout(TorchFunctionMode):
    """Leaves dropout out: what a model draws is drawn anew by its graph, and not in the same order."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "").partition(".")[0], dict(kwargs or {})
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if (place := ATTENTION.get(name)) is not None:
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _moves(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad


def homeless(gradients: dict[str, Tensor], norm: ModularNorm) -> list[str]:
    """Names of parameters whose gradient is not zero in entries that no leaf of `norm` covers."""
    left = {name: gradient.clone() for name, gradient in gradients.items()}
    for leaf in norm.leaves:
        if leaf.weight in left:
            part = leaf.read(left[leaf.weight])
            leaf.write_(left[leaf.weight], part.zero_())
    return sorted(name for name, gradient in left.items() if bool(gradient.any()))


def _difference(found: Tensor, expected: Any) -> float:
    """The largest difference relative to the RMS of the expected output; infinite if the two do not compare."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    mine, theirs = found[finite].double(), expected[finite].double()
    size, gap = theirs.square().mean().sqrt().item(), (mine - theirs).abs().max().item()
    return gap / size if size else gap


# All of them ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Row]:
    """The rows of a work file, the last one of each family.

    A line that was cut off, or that another version of this file wrote, is left out: its family is made again.
    """
    rows: dict[str, Row] = {}
    names = {entry.name for entry in fields(Row)}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.keys() == names:
            rows[found["spec"]] = Row(**found)
    return rows


def published(path: Path) -> dict[str, Row]:
    """The rows in the JSON of an earlier run, by family; those that another version of this file wrote are left out."""
    names = {entry.name for entry in fields(Row)}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [{key: value for key, value in row.items() if key != "good"} for row in found]
    return {row["spec"]: Row(**row) for row in rows if row.keys() == names}


def cover(
    specs: Iterable[str],
    work: Path,
    *,
    jobs: int = 1,
    timeout: float = 300.0,
    again: bool = False,
    watch: Callable[[Row, bool], object] | None = None,
    examine: Examine = examine,
) -> list[Row]:
    """The rows of all `specs`, in order; those that `work` does not have (of these versions) are made.

    Args:
        specs: families. work: file of JSON lines, extended by a row as soon as it is made.
        jobs: processes at a time, with one thread each. timeout: seconds a family may take; one that a shorter limit
            has ended is made again.
        again: make the rows of `specs` anew; those of other families stay.
        watch: called with every row, and whether it was made now.
        examine: what is done with a family, and told while it is done.
    """
    specs = list(dict.fromkeys(specs))
    rows = {} if again else {spec: row for spec, row in read(work).items() if _current(row, specs, timeout)}
    for row in rows.values():
        if watch is not None:
            watch(row, False)
    missing = [spec for spec in specs if spec not in rows]
    _warm_up(missing)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        file = work.open("a+", encoding="utf-8")
    except OSError as error:
        raise ModnormError(f"Cannot write {work}.", why=str(error)) from error
    with file, closing(_made(missing, jobs, timeout, examine)) as made:
        file.write("" if _ends_a_line(work) else "\n")
        for row in made:
            rows[row.spec] = row
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            if watch is not None:
                watch(row, True)
    return [rows[spec] for spec in specs]


def _current(row: Row, specs: list[str], timeout: float) -> bool:
    return row.spec in specs and row.versions == versions(row.spec) and not 0 < row.limit < timeout


def _ends_a_line(work: Path) -> bool:
    content = work.read_bytes()
    return not content or content.endswith(b"\n")


def _warm_up(specs: Iterable[str]) -> None:
    """Imports what the families need once, so that each forked process has it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
    for library in sorted({"transformers" if spec.startswith("hf:") else "timm" for spec in specs}):
        __import__(library)


class _Process:
    """One family at work: its process, and the row as far as the process has told."""

    def __init__(self, context: Any, spec: str, timeout: float, examine: Examine) -> None:
        self.row = Row(spec, versions(spec))
        self.timeout, self.done = timeout, False
        self.rows, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(writer, spec, examine), daemon=True)
        self.process.start()
        writer.close()  # before another process could inherit it
        self.deadline = time.monotonic() + timeout

    def listen(self) -> bool:
        """Takes in what the process has told; whether it has ended, or was ended because its time is up."""
        alive = self.process.is_alive()  # asked first: what was told before the end is still in the pipe
        late = alive and time.monotonic() > self.deadline
        try:
            while self.rows.poll():
                row, self.done = self.rows.recv()
                self.row = Row(**row)
        except EOFError:
            alive = False
        if alive and not late and not self.done:
            return False
        self.end()
        if not self.done:
            self._say(late)
        return True

    def _say(self, late: bool) -> None:
        if late:
            reason, self.row.limit = f"not done after {self.timeout:g} s", self.timeout
        else:
            code = self.process.exitcode
            name = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            reason = f"the process ended ({name})"
        if self.row.stage == "run":  # the conversion is complete
            self.row.stage, self.row.unchecked = "done", f"run with weights: {reason}"
        else:
            self.row.error = f"{reason}, in the stage {self.row.stage}"
            self.row.stage = "timeout" if late else "crash"

    def end(self) -> None:
        if not self.done:
            self.process.kill()
        self.process.join()
        self.rows.close()


def _made(specs: list[str], jobs: int, timeout: float, examine: Examine) -> Generator[Row, None, None]:
    """The families' rows in the order in which they are done; when the generator is closed no process is left.

    There are no threads here: a process that is forked while another thread holds a pipe or a lock keeps it.
    """
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    waiting, running = specs[::-1], list[_Process]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Process(context, waiting.pop(), timeout, examine))
            nearest = min(process.deadline for process in running) - time.monotonic()
            wait([process.rows for process in running], min(1.0, max(0.0, nearest)))
            for process in [process for process in running if process.listen()]:
                running.remove(process)
                yield process.row
    finally:
        for process in running:
            process.end()


def _child(writer: Any, spec: str, examine: Examine) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row = examine(spec, lambda row: writer.send((asdict(row), False)))
    writer.send((asdict(row), True))
