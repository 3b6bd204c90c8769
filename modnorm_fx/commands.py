"""What the commands of `modnorm-fx` do, given their parsed arguments. Each returns the exit code."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from . import codegen, report
from .errors import CaptureError, ModnormError
from .models_zoo import (
    SIZES,
    build,
    coordcheck,
    coordcheck_report,
    coverage,
    coverage_report,
    transfer,
    transfer_report,
)
from .models_zoo.recipes import RECIPES
from .models_zoo.train import Curve, evaluate
from .models_zoo.train import train as train_model
from .models_zoo.training import Task, accuracy, check_trainable, given_inputs, logits_loss, model_for, task_for
from .norm import ModularNorm
from .optim import ModularOptimizer
from .pipeline import convert

__all__ = ["OPTIMIZERS", "check_coordinates", "cover", "emit", "explain", "inspect", "rates", "sweep", "train"]


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner, if somebody watches."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


# inspect, explain, emit -----------------------------------------------------------------------------------------------


def _sizes(args: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(args, name) for name in SIZES}


def _norm(args: argparse.Namespace, model: nn.Module) -> ModularNorm:
    with _working(f"converting {args.spec}"):
        options = {"convention": args.convention, "unknown": args.unknown, "masses": dict(args.mass)}
        try:
            return convert(model, *given_inputs(model), **options)
        except CaptureError as error:
            if not hasattr(model, "example_inputs"):
                error.add_note("  on the command line: give the model a method example_inputs() that returns the "
                               "arguments of forward as a tuple, or as a dict by name")  # fmt: skip
            raise


def _norm_without_weights(args: argparse.Namespace) -> ModularNorm:
    with _working(f"building {args.spec}"):
        model = build(args.spec, device="meta", **_sizes(args))
    return _norm(args, model)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ModnormError(f"Cannot write {path}.", why=str(error)) from error
    print(f"wrote {path}", file=sys.stderr)


def _check_file(path: Path | None) -> None:
    """Raises ModnormError for a file that could not be written: before the work, not after it."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "permission denied"
    else:
        return
    raise ModnormError(f"Cannot write {path}.", why=why, do="Make the folder first, or give another file.")


def _check_folder(path: Path) -> None:
    """Raises ModnormError for a folder that is none and could not be made."""
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return
    why = "permission denied" if nearest.is_dir() else f"{nearest} is a file"
    raise ModnormError(f"Cannot write into {path}.", why=why, do="Give another folder with --out.")


def inspect(args: argparse.Namespace) -> int:
    """Prints the norm tree, and writes it where asked."""
    _check_file(args.json)
    _check_file(args.html)
    norm = _norm_without_weights(args)
    for path, write in ((args.json, norm.save), (args.html, norm.to_html)):
        if path is not None:
            _write(path, write)
    if args.flat:
        print(report.flat(norm))
    elif not _print_coloured(norm):
        print(report.text(norm))
    return 0


def _print_coloured(norm: ModularNorm) -> bool:
    """Prints the rich tree, if stdout is a terminal wide enough for it."""
    if not sys.stdout.isatty():
        return False
    from rich.console import Console

    console, tree = Console(), report.rich_tree(norm)
    if console.measure(tree).maximum > console.width:
        return False
    console.print(tree)
    return True


def explain(args: argparse.Namespace) -> int:
    """Prints one stage of the conversion."""
    print(_norm_without_weights(args).explain(args.stage))
    return 0


def emit(args: argparse.Namespace) -> int:
    """Writes the source of the model's normaliser."""
    _check_file(args.out)
    dtype = getattr(torch, args.dtype)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ModnormError(f"--device {args.device!r} is no device.", why=str(error).splitlines()[0]) from error
    norm = _norm_without_weights(args)
    text = codegen.source(norm, dict.fromkeys(norm.shapes, (dtype, device)), args.mode)
    if args.out is None:
        print(text, end="")
        return 0
    _write(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


# train ----------------------------------------------------------------------------------------------------------------

#: base optimizers: how to make one, and the learning rate that people use it with
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "adamw": (torch.optim.AdamW, 1e-3),
    "adam": (torch.optim.Adam, 1e-3),
    "nadam": (torch.optim.NAdam, 1e-3),
    "radam": (torch.optim.RAdam, 1e-3),
    "rmsprop": (torch.optim.RMSprop, 1e-3),
    "adagrad": (torch.optim.Adagrad, 1e-2),
    "sgd": (lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options), 0.1),
}


@dataclass(frozen=True)
class Result:
    """One training run: its name and learning rate, the losses, and the scores on the validation set."""

    name: str
    lr: float
    curve: Curve
    val_loss: float
    val_accuracy: float


def train(args: argparse.Namespace) -> int:
    """Trains a model in its modular norm, and with the base alone if asked; prints a table."""
    codegen.usable(args.device, torch.float32)
    with _working(f"building {args.spec}"):
        task = task_for(args.spec, _sizes(args), data=args.data, batch=args.batch, context=args.context)
        torch.manual_seed(args.seed)
        model = model_for(args.spec, _sizes(args), task, args.device)
        check_trainable(args.spec, model, task)
    plain = copy.deepcopy(model)
    norm = _norm(args, model)
    if not args.keep_init:
        norm.initialize_(model, torch.Generator().manual_seed(args.seed))
    make, usual_lr = OPTIMIZERS[args.optimizer]
    base = make(model.parameters(), lr=usual_lr, weight_decay=0.0)
    optimizer = ModularOptimizer(base, norm, lr=args.lr, weight_decay=args.weight_decay, mode=args.mode)
    results = [_run(f"modular {args.optimizer}", args, task, model, optimizer)]
    if args.compare:
        lr = usual_lr if args.base_lr is None else args.base_lr
        alone = make(plain.parameters(), lr=lr, weight_decay=args.weight_decay)
        results.append(_run(f"plain {args.optimizer}", args, task, plain, alone))
    size = sum(p.numel() for p in model.parameters())
    schedule = f"rising for {args.warmup} steps, then falling to" if args.warmup else "falling to"
    print(f"{args.spec}, {size:,} parameters, {args.steps} steps of {args.batch} on {task.source}, lr {schedule} 0")
    print(_table(results))
    if (step := results[0].curve.diverged) is not None:
        raise ModnormError(f"The loss was not finite at step {step} of the modular run.", do="Pass a lower --lr.")
    return 0


def _run(name: str, args: argparse.Namespace, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    from tqdm import tqdm

    (lr,) = {group["lr"] for group in optimizer.param_groups}
    torch.manual_seed(args.seed)  # dropout
    with tqdm(total=args.steps, desc=name, disable=not sys.stderr.isatty(), leave=False) as bar:

        def watch(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        curve = train_model(
            model, optimizer, task.batches(args.seed), args.steps, loss=logits_loss, watch=watch, warmup=args.warmup
        )
    with _working("validating"):
        val_loss, val_accuracy = (evaluate(model, task.validation, loss=score) for score in (logits_loss, accuracy))
    return Result(name, lr, curve, val_loss, val_accuracy)


def _table(results: Sequence[Result]) -> str:
    rows = [["", "lr", "train loss", "val loss", "val accuracy", "s/step"]]
    for r in results:
        numbers = [f"{r.curve.final:.3f}", f"{r.val_loss:.3f}", f"{r.val_accuracy:.1%}"]
        if r.curve.diverged is not None:
            numbers = [f"diverged at step {r.curve.diverged}", "", ""]
        rows.append([r.name, f"{r.lr:g}", *numbers, f"{r.curve.seconds / len(r.curve.losses):.3f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# coverage -------------------------------------------------------------------------------------------------------------


def cover(args: argparse.Namespace) -> int:
    """Converts every family, writes what became of them, and fails if one of them is not good."""
    from tqdm import tqdm

    both = not (args.hf or args.timm)
    every = coverage.families(hf=args.hf or both, timm=args.timm or both)
    try:
        specs = [spec for spec in every if re.search(args.select, spec)]
    except re.error as error:
        raise ModnormError(f"--select {args.select!r} is not a regular expression.", why=str(error)) from error
    if not specs:
        raise ModnormError(f"No family matches --select {args.select!r}.", do="Leave --select out to see all.")
    _check_folder(args.out.absolute().parent)
    work: Path = args.out.with_suffix(".work.jsonl")
    with tqdm(total=len(specs), unit="family", disable=not sys.stderr.isatty()) as bar:

        def watch(row: coverage.Row, new: bool) -> None:
            bar.set_postfix_str(row.spec, refresh=False)
            bar.update()
            if new and not row.good:
                first = (row.error or "see the page").splitlines()[0]
                tqdm.write(f"{row.spec}: {row.stage}: {first[:200]}", file=sys.stderr)

        coverage.cover(specs, work, jobs=args.jobs, timeout=args.timeout, again=args.again, watch=watch)
    known = coverage.published(args.out) | coverage.read(work)  # of earlier, narrower runs too
    rows = [known[spec] for spec in sorted(known)]
    page = args.out.with_suffix(".md")
    command = shlex.join(["modnorm-fx", "coverage", *([] if both else ["--hf"] * args.hf + ["--timm"] * args.timm)])
    without_model = coverage.without_model() if args.hf or both else []
    args.out.write_text(json.dumps(coverage_report.as_json(rows), indent=1) + "\n", encoding="utf-8")
    left = [spec for spec in every if spec not in known]
    page.write_text(coverage_report.markdown(rows, command, without_model, left), encoding="utf-8")
    bad = [row for row in rows if row.spec in set(specs) and not row.good]
    print(f"{len(specs) - len(bad)} of {len(specs)} families are good; wrote {args.out} and {page}")
    return 1 if bad else 0


# transfer -------------------------------------------------------------------------------------------------------------


def sweep(args: argparse.Namespace) -> int:
    """Runs a sweep over learning rates and sizes, or what is missing of it, and writes its report."""
    from tqdm import tqdm

    _check_folder(args.out)
    lrs = {name: rates for names, rates in args.lrs for name in (names or args.optimizers)}
    plan = transfer.Plan(
        args.spec, tuple(args.widths), tuple(args.depths), tuple(args.optimizers), lrs, args.steps, args.batch,
        args.context, args.seeds, args.weight_decay, args.data, args.full, args.convention, _head_size(args),
        args.warmup, _masses(args),
    )  # fmt: skip
    with tqdm(total=1, unit="", disable=not sys.stderr.isatty(), bar_format=SWEEP_BAR) as bar:

        def watch(run: transfer.Run | None, done: int, known: int) -> None:
            bar.total, bar.n = max(known, 1), done
            if run is not None:
                trial = run.trial
                bar.set_postfix_str(
                    f"{trial.recipe}, {trial.size}, lr {trial.lr:g}: {run.train_loss:.3f}", refresh=False
                )
            bar.refresh()

        runs = transfer.sweep(plan, args.out / "runs.jsonl", jobs=args.jobs, watch=watch)
    command = shlex.join(["modnorm-fx", *args.argv])
    for path in transfer_report.write(runs, args.out, command):
        print(f"wrote {path}")
    print(transfer_report.summary(runs))
    return 0


def _head_size(args: argparse.Namespace) -> int | None:
    """The one that was asked for, or that of the narrowest model."""
    return args.head_size or transfer.common_head_size(args.spec, args.widths, min(args.depths))


def _masses(args: argparse.Namespace) -> transfer.Masses:
    """The last one given of each name: the same masses are the same sweep, in whatever order."""
    return tuple(sorted(dict(args.mass).items()))


def check_coordinates(args: argparse.Namespace) -> int:
    """Measures outputs of modules and effects of leaves at several sizes, and prints tables of them."""
    from rich.console import Console

    _check_file(args.json)
    recipe = RECIPES[args.optimizer]
    lr = recipe.lrs[len(recipe.lrs) // 2] if args.lr is None else args.lr
    plan = transfer.Plan(
        args.spec, tuple(args.widths), tuple(args.depths), (args.optimizer,), {}, args.steps, args.batch, args.context,
        args.seeds, args.weight_decay, args.data, False, args.convention, _head_size(args),
        masses=_masses(args),
    )  # fmt: skip
    with Console(stderr=True).status(args.spec) as status:
        coordinates, predictions = coordcheck.measure(plan, lr, lambda size: status.update(f"{args.spec}, {size}"))
    if args.json is not None:
        found = {"coordinates": [*map(asdict, coordinates)], "predictions": [*map(asdict, predictions)]}
        text = json.dumps(found, indent=1) + "\n"
        _write(args.json, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{args.spec}: {recipe.title}, lr {lr:g}")
    tables = coordcheck_report.coordinate_tables(coordinates)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(*tables, *([coordcheck_report.prediction_table(predictions)] if predictions else []))
    return 0


#: columns of tables that are written to a file or a pipe
WIDE = 160

#: new runs turn up while others end: the time left is that of the runs known so far
SWEEP_BAR = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"


def rates(given: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """`0.1,0.2` for all optimizers, or `adamw=0.001,0.002` for one: (names or none, learning rates)."""
    name, equals, values = given.rpartition("=")
    if equals and name not in RECIPES:
        raise argparse.ArgumentTypeError(f"there is no optimizer {name!r}; use {', '.join(RECIPES)}")
    try:
        numbers = tuple(sorted(float(value) for value in values.split(",") if value))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] <= 0:
        raise argparse.ArgumentTypeError(f"{values!r} is not a list of positive numbers, as 0.1,0.2")
    return ((name,) if equals else ()), numbers
