"""The state of a `ModularOptimizer` as plain data: how it is packed, and what is checked before anything is loaded.

A state dict has `state` and `param_groups` as that of every torch optimizer, and beside them `base_param_groups` and
`modnorm`. Tools that know optimizers keep only the first two (`torch.distributed.checkpoint` does), so every group also
carries the base's part of it, and the rest as bytes: those tools take containers apart, and put them together by what a
new optimizer holds.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base_step import NOT_SHARED
from .errors import FormatError, OptimizerError

if TYPE_CHECKING:
    from .norm import ModularNorm
    from .optim import ModularOptimizer

__all__ = ["Saved", "load_base", "pack", "unpack"]

VERSION = 2
#: relative difference of a target that makes another norm; other machines and versions of torch differ in last digits
AGREEMENT = 1e-3
#: under which every group carries what must not be lost
CARRIED = "modnorm"
ON_PURPOSE = (
    "to go on with another norm or mode on purpose, load only the base's part into a new optimizer: "
    'opt.base.load_state_dict({"state": saved["state"], "param_groups": saved["base_param_groups"]})'
)


@dataclass(frozen=True)
class Saved:
    """A state that fits an optimizer.

    Attributes:
        base: for the base's own `load_state_dict`. groups: settings of the wrapper's groups.
        leaves: leaf key -> its power vectors and steps. base_lr: of each group, see `BaseStep`.
    """

    base: dict[str, Any]
    groups: list[dict[str, Any]]
    leaves: dict[str, Any]
    base_lr: list[float]


def pack(packed: dict[str, Any], base_state: dict[str, Any], norm: ModularNorm, **entries: Any) -> dict[str, Any]:
    """The state dict of a wrapper, from what torch's `state_dict` gives for it and for its base."""
    packed["state"] = base_state.pop("state")
    packed["base_param_groups"] = base_state.pop("param_groups")
    targets = {leaf.key: leaf.target for leaf in norm.leaves}
    about = {"version": VERSION, "digest": norm.digest, "targets": targets, **entries, "base_extra": base_state}
    packed["modnorm"] = about
    torch.save(about, file := io.BytesIO())
    norm_as_bytes = file.getvalue()
    pairs = zip(packed["param_groups"], packed["base_param_groups"], entries["base_lr"], strict=True)
    for ours, theirs, lr in pairs:
        own = {key: value for key, value in theirs.items() if key in NOT_SHARED and key != "params"}
        ours[CARRIED] = {"base": own, "base_lr": lr, "norm": norm_as_bytes}
    return packed


def unpack(state_dict: Mapping[str, Any], opt: ModularOptimizer) -> Saved:
    """What is in a state dict, after every check; nothing is changed.

    Raises:
        FormatError: it is not the state of a ModularOptimizer, of another version, or damaged.
        OptimizerError: it is that of another norm, mode or class of base, or other parameter groups.
    """
    groups: Any = state_dict.get("param_groups")
    whole = isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    _require(whole and isinstance(state_dict.get("state"), Mapping), "'state' or 'param_groups' is missing or no list")
    saved, theirs = _parts(state_dict, groups)
    if saved.get("version") != VERSION:
        raise FormatError(
            f"This optimizer state has version {saved.get('version')}; this package reads version {VERSION}.",
            do="load it with the version of modnorm_fx that saved it",
        )
    leaves = saved.get("leaves")
    _require(isinstance(leaves, dict), "'leaves' is missing")
    for key, entry in leaves.items():
        vectors = entry.get("vectors") if isinstance(entry, Mapping) else None
        good = isinstance(vectors, list) and all(isinstance(vector, Tensor) for vector in vectors)
        _require(good and isinstance(entry.get("steps"), int), f"the power vectors of {key}")
    _check_setting(saved, opt)
    sizes = [len(group["params"]) for group in opt.param_groups]
    if [len(group["params"]) for group in groups] != sizes:
        raise OptimizerError(
            "This optimizer state has other parameter groups.",
            why=f"this optimizer has groups of {sizes} parameters",
            do="build the groups (including those added later) as they were when it was saved",
        )
    _require(
        isinstance(theirs, list) and len(theirs) == len(sizes) and all(isinstance(group, dict) for group in theirs),
        "'base_param_groups' has other groups than 'param_groups'",
    )
    rates = saved.get("base_lr")
    _require(
        isinstance(rates, list) and len(rates) == len(sizes) and all(isinstance(rate, Real) for rate in rates),
        "'base_lr' is missing or has other groups than 'param_groups'",
    )
    extra = saved.get("base_extra", {})
    _require(isinstance(extra, dict), "'base_extra'")
    theirs = [group | {"params": ours["params"]} for group, ours in zip(theirs, groups, strict=True)]
    own = [{k: v for k, v in group.items() if k not in ("params", CARRIED)} for group in groups]
    base = {"state": state_dict["state"], "param_groups": theirs} | extra
    return Saved(base, copy.deepcopy(own), leaves, list(rates))


def load_base(opt: ModularOptimizer, saved: Saved) -> None:
    """Loads the base's part; where the base refuses it, the base is as before."""
    base = opt.base
    kept = base.state, base.param_groups
    try:
        base.load_state_dict(saved.base)
    except Exception as error:
        base.state, base.param_groups = kept
        raise FormatError(
            f"{type(base).__name__} does not take the state that was saved of the base.",
            why=f"{type(error).__name__}: {error}",
            do="wrap an optimizer of the class that was saved",
        ) from error


def _parts(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> tuple[Any, Any]:
    """What is known of the norm, and the groups of the base: from their entries, else from what the groups carry."""
    saved, theirs = state_dict.get("modnorm"), state_dict.get("base_param_groups")
    if isinstance(saved, dict) and theirs is not None:
        return saved, theirs
    carried = [group[CARRIED] for group in groups if isinstance(group.get(CARRIED), dict)]
    if len(carried) != len(groups) or not carried or not all(isinstance(c.get("norm"), bytes) for c in carried):
        raise FormatError(
            "This state dict was not saved by a ModularOptimizer, or has lost what one saves.",
            why="it has no entry 'modnorm', nor do its parameter groups (flatten_optimizer_state_dict=True of "
            "torch.distributed.checkpoint drops it)",
            do="save opt.state_dict(), or get_optimizer_state_dict without flattening; to start from a plain "
            "optimizer's state, load it into the base before wrapping it",
        )
    try:
        saved = torch.load(io.BytesIO(carried[0]["norm"]), weights_only=True, map_location="cpu")
    except Exception as error:
        raise _damaged(f"'norm' in its groups: {type(error).__name__}: {error}") from error
    shared = [{k: v for k, v in group.items() if k not in (*NOT_SHARED, CARRIED)} for group in groups]
    theirs = [ours | entry.get("base", {}) for ours, entry in zip(shared, carried, strict=True)]
    return saved | {"base_lr": [entry.get("base_lr") for entry in carried]}, theirs  # groups may be in another order


def _check_setting(saved: dict[str, Any], opt: ModularOptimizer) -> None:
    now = {leaf.key: leaf.target for leaf in opt.norm.leaves}
    then = saved.get("targets", now)  # not there in states saved before they were
    _require(isinstance(then, dict) and all(isinstance(target, Real) for target in then.values()), "'targets'")
    why = None
    if not saved["leaves"].keys() <= now.keys() or then.keys() != now.keys():
        why = "its leaves differ"
    elif saved.get("digest") != opt.norm.digest:
        why = f"digest {saved.get('digest')}, not {opt.norm.digest}"
    elif then and (worst := max(then, key=lambda key: _distance(then[key], now[key]))):
        if _distance(then[worst], now[worst]) > AGREEMENT:
            why = f"the target of {worst} was {then[worst]:.4g} and is {now[worst]:.4g} (of all leaves it differs most)"
    if why is not None:
        raise OptimizerError(
            "This optimizer state was saved with another norm.",
            why=why,
            do="load the norm that was saved with the checkpoint (ModularNorm.load), or convert with the same options "
            f"and masses; {ON_PURPOSE}",
        )
    if saved.get("mode") != opt.mode:
        raise OptimizerError(
            f"This optimizer state was saved with mode={saved.get('mode')!r}; this optimizer has mode={opt.mode!r}.",
            do=f"pass mode={saved.get('mode')!r} to ModularOptimizer; {ON_PURPOSE}",
        )
    name = type(opt.base).__name__
    then_base = saved.get("base", name)  # not there in states saved before it was
    if then_base != name:
        raise OptimizerError(
            f"This optimizer state was saved with {then_base} as the base; this optimizer has {name}.",
            why="another class would take from it what happens to bear the same name, or nothing",
            do=f"wrap {then_base}; {ON_PURPOSE}",
        )


def _distance(a: float, b: float) -> float:
    """Relative difference, 0 for equal numbers; NaN differs from everything."""
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a - b) else math.inf


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _damaged(what)


def _damaged(what: str) -> FormatError:
    return FormatError(
        "This optimizer state is damaged; nothing was loaded.", why=what, do="load another checkpoint of the run"
    )
