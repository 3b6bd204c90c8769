"""What to tell about a model that does not run, or that runs and cannot be traced."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._copies import MAX_REAL_BYTES, dry_run, real_bytes
from .errors import CaptureError

__all__ = ["LIBRARIES", "advice", "check_runs", "part", "place", "reason", "short"]

#: where frames are not the user's
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises a CaptureError with the model's own error and line, if the model runs on these inputs in neither mode."""
    try:
        dry_run(model, args, kwargs)
        return
    except CaptureError:
        raise
    except Exception as error:
        failure = error
    with contextlib.suppress(Exception):  # the error in evaluation is the one to tell
        dry_run(model, args, kwargs, training=True)
        return
    operator = re.search(r"Could not run '(\w+::\w+)|Couldn't load (custom C\+\+ ops)", str(failure))
    raise CaptureError(
        f"{type(model).__name__} does not run on these inputs.",
        where=place(failure),
        why=short(failure),
        do="pass the args and kwargs with which model(*args, **kwargs) runs"
        if operator is None
        else f"{operator[1] or operator[2]} cannot run here: install a build of their library that fits this torch, or "
        + part(model),
    ) from failure


def advice(model: nn.Module, failures: Sequence[Exception]) -> str:
    """What to do about a model that runs but that no route traces."""
    if operator := re.search(r"no fake impl.*?(\w+::\w+|\w+\.\w+\.\w+)", "\n".join(map(str, failures))):
        return f"give the operator {operator[1]} a fake kernel (torch.library.register_fake), or {part(model)}"
    if real_bytes(model) > MAX_REAL_BYTES:
        return (
            "its code needs values, for which it is too large here: convert one of the same class with fewer or "
            "narrower layers, or move what branches on values out of forward"
        )
    return f"{part(model)}, or report the model's name and these lines"


def part(model: nn.Module) -> str:
    """Advice to convert a part of the model, with the names of some."""
    parts = [f"model.{name}" for name, part in model.named_children() if next(part.parameters(), None) is not None]
    return f"convert a part of the model ({', '.join(parts[:4])})" if parts else "convert a part of the model"


def reason(error: BaseException) -> str:
    """Type and beginning of an error, with the line of the user's code that it comes from, where one is known."""
    line = place(error)
    return short(error) + (f"\n        at {line}" if line else "")


def place(error: BaseException) -> str | None:
    """`file:line: code` of the innermost frame outside of libraries, of the error or of the traceback in its text."""
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    quoted = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', str(error))
    for found in (quoted, frames):
        own = [frame for frame in found if not frame[0].startswith(LIBRARIES)]
        if own:
            return "{}:{}: {}".format(*own[-1])
    return None


def short(error: BaseException, limit: int = 300) -> str:
    """Type and beginning of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + ' ...'}"
