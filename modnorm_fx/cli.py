"""`modnorm-fx`: look at the modular norm of a model by name, and try it in a small training run.

Every failure is one message on stderr: exit code 1, or 2 for a wrong command line. `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__, report
from .conventions import PAPER, TRACKED
from .errors import CaptureError, ModnormError
from .explain import STAGES
from .inputs import example_inputs
from .models_zoo import SIZES, build
from .models_zoo.data import Corpus, Images, digits, text
from .models_zoo.train import Curve, evaluate, train
from .norm import ModularNorm
from .optim import ModularOptimizer
from .pipeline import convert

__all__ = ["main"]

SPEC = "hf:NAME, timm:NAME, zoo:NAME or path/to/file.py:function (which returns an nn.Module)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        with _quiet(args.debug):
            return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone: not a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        print(_message(error), file=sys.stderr)
        return 1


def _message(error: Exception) -> str:
    lines = [str(error), *getattr(error, "__notes__", ())]
    if not isinstance(error, ModnormError):
        lines[0] = f"{type(error).__name__}: {error}"
        lines.append("  do: This is a defect of modnorm_fx: please report what --debug prints.")
    return "modnorm-fx: error: " + "\n".join(lines)


# The command line -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modnorm-fx", description="The modular norm of PyTorch models.")
    parser.add_argument("--version", action="version", version=f"modnorm-fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = partial(commands.add_parser, parents=[_model_options()])

    inspect = add("inspect", usage="modnorm-fx inspect SPEC [options]", help="print the norm tree of a model")
    inspect.add_argument("--html", metavar="FILE", type=Path, help="also write it as one HTML page")
    inspect.add_argument("--json", metavar="FILE", type=Path, help="also save the norm, for ModularNorm.load")
    inspect.add_argument("--flat", action="store_true", help="print every leaf on a line of its own")
    inspect.set_defaults(run=_inspect)

    usage = "modnorm-fx explain SPEC --stage STAGE [options]"
    explain = add("explain", usage=usage, help="print one stage of the conversion")
    explain.add_argument("--stage", required=True, choices=STAGES, help="the stage")
    explain.set_defaults(run=_explain)

    usage = "modnorm-fx train SPEC [options]"
    training = add("train", usage=usage, help="train a causal language model or an image classifier")
    training.add_argument(
        "--data", metavar="FILE", type=Path, help="text for language models (default: Python's sources)"
    )
    training.add_argument("--steps", type=_count, default=100, metavar="N", help="default: %(default)s")
    training.add_argument("--batch", type=_count, default=16, metavar="N", help="default: %(default)s")
    training.add_argument("--lr", type=_amount, default=0.5, help="modular norm of a step (default: %(default)s)")
    training.add_argument("--weight-decay", type=_amount, default=0.0, metavar="X", help="default: %(default)s")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="the base (default: %(default)s)")
    training.add_argument("--mode", choices=("normalize", "dualize"), default="normalize", help="default: %(default)s")
    training.add_argument("--keep-init", action="store_true", help="train from the model's own initialisation")
    training.add_argument("--compare", action="store_true", help="also train with the base optimizer alone")
    training.add_argument("--base-lr", type=_amount, metavar="LR", help="its lr in that run (default: a usual one)")
    training.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    training.add_argument("--device", default="cpu", help="default: %(default)s")
    training.set_defaults(run=_train)
    return parser


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("spec", metavar="SPEC", help=SPEC)
    for name in SIZES:
        options.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help="size of the model")
    names = [TRACKED.name, PAPER.name]
    options.add_argument("--convention", choices=names, default=TRACKED.name, help="default: %(default)s")
    options.add_argument("--unknown", choices=("sample", "error"), default="sample", help="ops without a rule")
    options.add_argument(
        "--mass",
        action="append",
        type=_mass,
        default=[],
        metavar="NAME=VALUE",
        help="mass of stem, stacks, head, vectors, a module path or a parameter; repeatable",
    )
    options.add_argument("--debug", action="store_true", help="show tracebacks, warnings and log messages")
    return options


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a positive integer")
    return int(given)


def _amount(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number >= 0")
    return value


def _mass(given: str) -> tuple[str, float]:
    name, equals, value = given.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{given!r} is not NAME=VALUE")
    return name, _amount(value)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silences what torch and model libraries log and warn of; warnings meant for our caller become a line each."""
    if debug:
        yield
        return
    for name in ("torch", "torch._subclasses.fake_tensor", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for one in caught:
                if one.filename == __file__:
                    print(f"modnorm-fx: warning: {one.message}", file=sys.stderr)


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner, if somebody watches."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


# inspect, explain -----------------------------------------------------------------------------------------------------


def _sizes(args: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(args, name) for name in SIZES}


def _norm(args: argparse.Namespace, model: nn.Module) -> ModularNorm:
    with _working(f"converting {args.spec}"):
        options = {"convention": args.convention, "unknown": args.unknown, "masses": dict(args.mass)}
        try:
            return convert(model, *_inputs(model), **options)
        except CaptureError as error:
            if not hasattr(model, "example_inputs"):
                error.add_note("  on the command line: give the model a method example_inputs() that returns the "
                               "arguments of forward as a tuple, or as a dict by name")  # fmt: skip
            raise


def _inputs(model: nn.Module) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """(args, kwargs) as the model itself gives them; (None, None) for models of a library that `convert` knows."""
    make: Any = getattr(model, "example_inputs", None)
    given = make() if callable(make) else None
    return (None, given) if isinstance(given, dict) else (given, None)


def _norm_without_weights(args: argparse.Namespace) -> ModularNorm:
    with _working(f"building {args.spec}"):
        model = build(args.spec, device="meta", **_sizes(args))
    return _norm(args, model)


def _inspect(args: argparse.Namespace) -> int:
    norm = _norm_without_weights(args)
    for path, write in ((args.json, norm.save), (args.html, norm.to_html)):
        if path is not None:
            try:
                write(path)
            except OSError as error:
                raise ModnormError(f"Cannot write {path}.", why=str(error)) from error
            print(f"wrote {path}", file=sys.stderr)
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


def _explain(args: argparse.Namespace) -> int:
    print(_norm_without_weights(args).explain(args.stage))
    return 0


# train ----------------------------------------------------------------------------------------------------------------

WINDOW = 64  # tokens a training example has, unless --context says otherwise
EVALUATION_BATCHES = 8  # of text

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
class Task:
    """What a model is trained on: endless batches (inputs, labels) for a seed, and a validation set of some more."""

    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    validation: Sequence[tuple[Tensor, Tensor]]
    classes: int
    source: str
    is_text: bool


@dataclass(frozen=True)
class Result:
    name: str
    lr: float
    curve: Curve
    val_loss: float
    val_accuracy: float


def _train(args: argparse.Namespace) -> int:
    with _working(f"building {args.spec}"):
        task = _task(args)
        torch.manual_seed(args.seed)
        model = _build_for(args, task)
        _check_trainable(args.spec, model, task)
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
    print(f"{args.spec}, {size:,} parameters, {args.steps} steps of {args.batch} on {task.source}, lr falling to 0")
    print(_table(results))
    if (step := results[0].curve.diverged) is not None:
        raise ModnormError(f"The loss was not finite at step {step} of the modular run.", do="Pass a lower --lr.")
    return 0


def _task(args: argparse.Namespace) -> Task:
    """Text or images, by what the model takes."""
    model = build(args.spec, device="meta", **_sizes(args))
    given, named = _inputs(model)
    if given is None and named is None:
        given, named = example_inputs(model)
    floating = [x for x in (*(given or ()), *(named or {}).values()) if isinstance(x, Tensor) and x.is_floating_point()]
    if not floating:
        return _text_task(text(args.data), args)
    shape = tuple(floating[0].shape[1:])
    if len(shape) == 1:  # flattened images
        squares = ((c, size, size) for c in (1, 3) for size in [math.isqrt(shape[0] // c)])
        shape = next((square for square in squares if math.prod(square) == shape[0]), shape)
    if len(shape) != 3:
        raise _untrainable(args.spec, f"it takes a tensor of shape {list(floating[0].shape)}")
    if args.data is not None:
        raise ModnormError("--data is a text, and this model takes images.", do="Leave it out: digits are built in.")
    return _image_task(digits(), args, shape, flat=floating[0].dim() == 2)


def _text_task(corpus: Corpus, args: argparse.Namespace) -> Task:
    window = args.context or WINDOW
    held_out = corpus.batches("val", args.batch, window, seed=1)
    validation = [next(held_out) for _ in range(EVALUATION_BATCHES)]

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return corpus.batches("train", args.batch, window, seed)

    return Task(batches, validation, corpus.vocab, corpus.source, is_text=True)


def _image_task(images: Images, args: argparse.Namespace, shape: tuple[int, ...], flat: bool) -> Task:
    channels, *size = shape

    def fit(image: Tensor) -> Tensor:
        image = F.interpolate(image, size=size, mode="bilinear").expand(-1, channels, -1, -1)
        return image.flatten(1) if flat else image

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((fit(image), label) for image, label in images.batches("train", args.batch, seed))

    parts = zip(*(part.split(args.batch) for part in images.val), strict=True)
    validation = [(fit(image), label) for image, label in parts]
    return Task(batches, validation, images.classes, "handwritten digits", is_text=False)


def _build_for(args: argparse.Namespace, task: Task) -> nn.Module:
    """The model with as many outputs as the data needs, where it can be told; else as it is."""
    sizes, flag = _sizes(args), "vocab" if task.is_text else "classes"
    given = sizes[flag]
    if given is None:
        try:
            return build(args.spec, device=args.device, **{**sizes, flag: task.classes})
        except ModnormError:
            pass
    elif given < task.classes:
        why = f"{task.source} has {task.classes} different {'tokens' if task.is_text else 'labels'}"
        raise ModnormError(f"--{flag} {given} is too small.", why=why, do="Leave it out.")
    return build(args.spec, device=args.device, **sizes)


@torch.no_grad()
def _check_trainable(spec: str, model: nn.Module, task: Task) -> None:
    inputs, labels = next(task.batches(0))
    model.eval()
    try:
        logits = _logits(model, inputs)
        expected = (*labels.shape, logits.shape[-1])
        if logits.shape != expected or logits.shape[-1] < task.classes:
            why = f"its output has shape {list(logits.shape)}, for labels of shape {list(labels.shape)}"
            raise _untrainable(spec, f"{why} and {task.classes} classes")
        if task.is_text:
            changed = inputs.clone()
            changed[:, -1] = (changed[:, -1] + 1) % task.classes
            if not torch.allclose(_logits(model, changed)[:, :-1], logits[:, :-1], rtol=1e-3, atol=1e-5):
                raise _untrainable(spec, "its predictions look at later tokens")
    except ModnormError:
        raise
    except Exception as error:
        raise _untrainable(spec, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        model.train()


def _untrainable(spec: str, why: str) -> ModnormError:
    return ModnormError(
        f"{spec} cannot be trained here.",
        why=why,
        do="Name a causal language model or an image classifier; for others, write the loop with ModularOptimizer.",
    )


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Called by name where the model has a name for its input (transformers), else by position."""
    inputs = inputs.to(next(model.parameters()).device)
    name = getattr(model, "main_input_name", None)
    output = model(**{name: inputs}) if isinstance(name, str) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = _logits(model, inputs).flatten(0, -2).float()
    return F.cross_entropy(logits, labels.flatten().to(logits.device))


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = _logits(model, inputs)
    return (logits.argmax(-1) == labels.to(logits.device)).float().mean()


def _run(name: str, args: argparse.Namespace, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    from tqdm import tqdm

    (lr,) = {group["lr"] for group in optimizer.param_groups}
    torch.manual_seed(args.seed)  # dropout
    with tqdm(total=args.steps, desc=name, disable=not sys.stderr.isatty(), leave=False) as bar:

        def watch(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        curve = train(model, optimizer, task.batches(args.seed), args.steps, loss=_loss, watch=watch)
    with _working("validating"):
        val_loss, val_accuracy = (evaluate(model, task.validation, loss=score) for score in (_loss, _accuracy))
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


if __name__ == "__main__":
    sys.exit(main())
