"""`modnorm-fx`: look at the modular norm of a model by name, and try it in a small training run.

Every failure is one message on stderr: exit code 1, or 2 for a wrong command line. `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import __version__, commands
from .conventions import PAPER, TRACKED
from .errors import ModnormError
from .explain import STAGES
from .models_zoo import SIZES
from .models_zoo.recipes import RECIPES

__all__ = ["main"]

SPEC = "hf:NAME, timm:NAME, zoo:NAME or path/to/file.py:function (which returns an nn.Module)"
WARMUP = "steps over which the learning rate first rises (default: none)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
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
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = partial(commands_of.add_parser, parents=[_model_options()])

    inspect = add("inspect", usage="modnorm-fx inspect SPEC [options]", help="print the norm tree of a model")
    inspect.add_argument("--html", metavar="FILE", type=Path, help="also write it as one HTML page")
    inspect.add_argument("--json", metavar="FILE", type=Path, help="also save the norm, for ModularNorm.load")
    inspect.add_argument("--flat", action="store_true", help="print every leaf on a line of its own")
    inspect.set_defaults(run=commands.inspect)

    usage = "modnorm-fx explain SPEC --stage STAGE [options]"
    explain = add("explain", usage=usage, help="print one stage of the conversion")
    explain.add_argument("--stage", required=True, choices=STAGES, help="the stage")
    explain.set_defaults(run=commands.explain)

    usage = "modnorm-fx emit SPEC [options]"
    emit = add("emit", usage=usage, help="write the source of a model's normaliser")
    emit.add_argument("--out", metavar="FILE", type=Path, help="default: standard output")
    emit.add_argument("--mode", choices=("normalize", "dualize"), default="normalize", help="default: %(default)s")
    emit.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of updates (%(default)s)"
    )
    emit.add_argument("--device", default="cpu", help="of updates (default: %(default)s)")
    emit.set_defaults(run=commands.emit)

    usage = "modnorm-fx train SPEC [options]"
    training = add("train", usage=usage, help="train a causal language model or an image classifier")
    training.add_argument(
        "--data", metavar="FILE", type=Path, help="text for language models (default: Python's sources)"
    )
    training.add_argument("--steps", type=_count, default=100, metavar="N", help="default: %(default)s")
    training.add_argument("--warmup", type=_count, default=0, metavar="N", help=WARMUP)
    training.add_argument("--batch", type=_count, default=16, metavar="N", help="default: %(default)s")
    training.add_argument("--lr", type=_amount, default=0.5, help="modular norm of a step (default: %(default)s)")
    training.add_argument("--weight-decay", type=_amount, default=0.0, metavar="X", help="default: %(default)s")
    training.add_argument(
        "--optimizer", choices=commands.OPTIMIZERS, default="adamw", help="the base (default: %(default)s)"
    )
    training.add_argument("--mode", choices=("normalize", "dualize"), default="normalize", help="default: %(default)s")
    training.add_argument("--keep-init", action="store_true", help="train from the model's own initialisation")
    training.add_argument("--compare", action="store_true", help="also train with the base optimizer alone")
    training.add_argument("--base-lr", type=_amount, metavar="LR", help="its lr in that run (default: a usual one)")
    training.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    training.add_argument("--device", default="cpu", help="default: %(default)s")
    training.set_defaults(run=commands.train)

    usage = "modnorm-fx transfer SPEC --widths N ... --depths N ... [options]"
    sweep = commands_of.add_parser(
        "transfer", usage=usage, help="does the small model's learning rate fit larger ones?"
    )
    _add_sizes(sweep, steps=200)
    sweep.add_argument("--warmup", type=_count, default=0, metavar="N", help=WARMUP)
    sweep.add_argument("--full", action="store_true", help="every width with every depth, not only the smallest")
    names = ",".join(RECIPES)
    sweep.add_argument("--optimizers", type=_recipes, default="modnorm-adamw,adamw", metavar="NAMES", help=names)
    rates = "powers of 2, as 0.1,0.2 or adamw=0.001,0.002; extended while the best is at an end"
    sweep.add_argument("--lrs", type=commands.rates, nargs="+", default=[], metavar="LIST", help=rates)
    sweep.add_argument("--jobs", type=_count, default=max(1, os.cpu_count() or 1), metavar="N", help="runs at a time")
    sweep.add_argument("--out", type=Path, default=Path("transfer"), metavar="DIR", help="folder (default: transfer)")
    sweep.set_defaults(run=commands.sweep)

    usage = "modnorm-fx coordcheck SPEC --widths N ... --depths N ... [options]"
    check = commands_of.add_parser("coordcheck", usage=usage, help="does a step do the same at every size?")
    _add_sizes(check, steps=4)
    check.add_argument("--optimizer", choices=tuple(RECIPES), default="modnorm-adamw", help="default: %(default)s")
    check.add_argument("--lr", type=_amount, help="default: the middle of those that transfer tries")
    check.add_argument("--json", metavar="FILE", type=Path, help="also save every number")
    check.set_defaults(run=commands.check_coordinates)

    usage = "modnorm-fx coverage [options]"
    cover = commands_of.add_parser("coverage", usage=usage, help="convert every family of transformers and timm")
    cover.add_argument("--hf", action="store_true", help="those of transformers (default: both libraries)")
    cover.add_argument("--timm", action="store_true", help="those of timm")
    cover.add_argument("--select", default="", metavar="PATTERN", help="only families that match a regular expression")
    cover.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes at a time (default: %(default)s)")
    cover.add_argument("--timeout", type=_amount, default=300.0, metavar="S", help="seconds for one (default: 300)")
    cover.add_argument("--out", type=Path, default=Path("docs/coverage.json"), metavar="FILE", help="%(default)s")
    cover.add_argument("--again", action="store_true", help="anew, also what an earlier run has finished")
    cover.add_argument("--debug", action="store_true", help="show tracebacks, warnings and log messages")
    cover.set_defaults(run=commands.cover)
    return parser


def _add_sizes(command: argparse.ArgumentParser, steps: int) -> None:
    """What commands have that train a model at several sizes."""
    command.add_argument("spec", metavar="SPEC", help=SPEC)
    command.add_argument("--widths", type=_count, nargs="+", default=[64, 128, 256], metavar="N", help="64 128 256")
    command.add_argument("--depths", type=_count, nargs="+", default=[2, 4, 8], metavar="N", help="2 4 8")
    size = "features of an attention head (default: as in the narrowest model)"
    command.add_argument("--head-size", type=_count, metavar="N", help=size)
    command.add_argument("--steps", type=_count, default=steps, metavar="N", help="default: %(default)s")
    command.add_argument("--batch", type=_count, default=16, metavar="N", help="default: %(default)s")
    command.add_argument("--context", type=_count, default=64, metavar="N", help="tokens (default: %(default)s)")
    command.add_argument("--seeds", type=_count, default=2, metavar="K", help="how many (default: %(default)s)")
    command.add_argument("--weight-decay", type=_amount, default=0.0, metavar="X", help="default: %(default)s")
    command.add_argument("--data", metavar="FILE", help="text for language models (default: Python's sources)")
    command.add_argument("--convention", choices=[TRACKED.name, PAPER.name], default=TRACKED.name, help="%(default)s")
    _add_masses(command)
    command.add_argument("--debug", action="store_true", help="show tracebacks, warnings and log messages")


def _add_masses(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--mass",
        action="append",
        type=_mass,
        default=[],
        metavar="NAME=VALUE",
        help="mass of stem, stacks, head, vectors, biases, a module path or a parameter; repeatable",
    )


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("spec", metavar="SPEC", help=SPEC)
    for name in SIZES:
        options.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help="size of the model")
    names = [TRACKED.name, PAPER.name]
    options.add_argument("--convention", choices=names, default=TRACKED.name, help="default: %(default)s")
    options.add_argument("--unknown", choices=("sample", "error"), default="sample", help="ops without a rule")
    _add_masses(options)
    options.add_argument("--debug", action="store_true", help="show tracebacks, warnings and log messages")
    return options


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a positive integer")
    return int(given)


def _recipes(given: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    if unknown := [name for name in names if name not in RECIPES]:
        raise argparse.ArgumentTypeError(f"there is no optimizer {unknown[0]!r}; use {', '.join(RECIPES)}")
    if not names:
        raise argparse.ArgumentTypeError(f"no optimizer is named; use {', '.join(RECIPES)}")
    return names


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
                if one.filename in (__file__, commands.__file__):
                    print(f"modnorm-fx: warning: {one.message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
