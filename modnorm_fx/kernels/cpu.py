"""C++ kernels (`cpu.cpp`, `power.hpp`) for float32 tensors on the CPU: compiled on first use, kept in a cache folder.

A compiler (`$CXX`, `g++`, `clang++` or `c++`) is optional. Without one, or with `MODNORM_FX_CPP=0` in the environment,
`library()` is None, a log line says why, and torch does the same arithmetic in more passes over memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Adam",
    "adamw",
    "available",
    "counted",
    "largest_entry",
    "library",
    "matrix_factors",
    "piece_factors",
    "power_step",
    "scale_apply",
    "step_matrices",
    "takes",
]

logger = logging.getLogger("modnorm_fx")

#: what is compiled; what it includes
SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.cpp", "power.hpp", "products.hpp"))
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-fno-math-errno")
#: tried in this order: compilers without OpenMP (Apple's) give one thread, some know no vector width
TRIES = ((*FLAGS, "-fopenmp"), FLAGS, ("-O3", "-march=native"), ("-O3",))
SECONDS = 120
PLAIN = (Tensor, torch.nn.Parameter)
_long, _float = ctypes.c_int64, ctypes.c_float


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler."""
    if os.environ.get("MODNORM_FX_CPP", "1") == "0":
        logger.info("C++ kernels are switched off by MODNORM_FX_CPP=0.")
        return None
    compiler = _compiler()
    if compiler is None:
        logger.warning("No C++ compiler was found: updates are normalised by torch, which takes about twice as long.")
        return None
    try:
        found = _loaded(_built(compiler))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        logger.warning("The C++ kernels could not be used (%s): torch normalises updates instead.", error)
        return None
    if found is not None and not _is_right(found):
        logger.warning("%s compiles the C++ kernels to wrong code: torch normalises updates instead.", compiler)
        return None
    return found


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _loaded(path: Path | None) -> ctypes.CDLL | None:
    if path is None:
        return None
    found = ctypes.CDLL(str(path))
    found.largest_entry.restype = ctypes.c_float
    at = ctypes.c_void_p
    found.matrix_factors.argtypes = [at, *[_long] * 5, *[at] * 4, _float, ctypes.c_double, at, ctypes.c_int]
    found.matrix_factors.restype = None
    return found


def _is_right(compiled: ctypes.CDLL) -> bool:
    """Whether a norm comes out as it should. (GCC 12 has been seen to compile an earlier version to nonsense.)"""
    for rows, columns in ((64, 48), (21, 35)):
        wave = torch.arange(rows * columns, device="cpu").mul(0.7).sin().view(1, rows, columns)
        start = torch.arange(8 * columns, device="cpu").mul(1.3).cos().view(1, 8, columns)
        basis = torch.linalg.qr((start.double() @ wave.double().mT).mT).Q
        wanted = torch.linalg.matrix_norm(basis.mT @ wave.double(), 2)
        found, _ = _power_step(compiled, wave, start, torch.zeros(8, columns, device="cpu"), 0.0)
        if not torch.allclose(found.double(), wanted, rtol=1e-2) or not _steps_right(compiled, wave[0], start):
            return False
    return True


def _steps_right(compiled: ctypes.CDLL, wave: Tensor, start: Tensor) -> bool:
    """Whether a step of AdamW comes out as it should, and its norm as that of `power_step`."""
    rows, columns = wave.shape
    gradient, average, square, weight = wave * 3.0, wave.cos(), wave.square() + 0.5, wave.flip(0).contiguous()
    m, v = 0.9 * average + 0.1 * gradient, 0.75 * square + 0.25 * gradient**2
    update, before = m / (v.sqrt() + 0.125), weight.clone()
    adam = Adam(0.9, 0.75, 0.125, 1.0, -1.0)
    none, vectors = torch.zeros(8, columns, device="cpu"), start.clone()
    places = [[x.data_ptr()] for x in (gradient, average, square, weight)]
    shape = (1, 1, rows, columns, columns)
    norms = step_matrices(places, [adam], [2.0], [0.5], [vectors], none, 0.0, shape, True, compiled)
    wanted, _ = _power_step(compiled, update[None], start, none, 0.0)
    pairs = ((average, m), (square, v), (norms[0, 0], wanted), (weight, 0.5 * before - 2.0 * update / wanted))
    return all(torch.allclose(found, expected, rtol=1e-3, atol=1e-4) for found, expected in pairs)


def _built(compiler: str, *defined: str) -> Path | None:
    """The shared library for this source, compiler and processor; compiled if it is not in the cache.

    `-DSINGLE` among the flags `defined`: products in float32, also where the processor multiplies bfloat16 faster.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    text = "\0".join([*sources, repr(TRIES), *defined, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modnorm_fx"
    path = folder / f"cpu-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # another process may build the same: the last to end wins
        output = Path(work) / path.name
        for flags in TRIES:
            command = [compiler, *flags, *defined, "-std=c++17", "-shared", "-fPIC", str(SOURCES[0]), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode == 0:
                os.replace(output, path)
                return path
    logger.warning("%s cannot compile the C++ kernels: torch normalises updates instead.\n%s", compiler, done.stderr)
    return None


def _processor() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor() + platform.machine()


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there are compiled kernels."""
    return library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: plain float32 tensors on the CPU, and a compiler at hand."""
    for t in tensors:
        if t.dtype != torch.float32 or not t.is_cpu or type(t) not in PLAIN:
            return False
    return available()


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def power_step(matrices: Tensor, vectors: Tensor, dither: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """`power_iteration` for float32 `matrices` `[P, rows, c]` with unit stride along c; eight vectors."""
    return _power_step(_library(), matrices, vectors, dither, amount)


def _power_step(
    compiled: ctypes.CDLL, matrices: Tensor, vectors: Tensor, dither: Tensor, amount: float
) -> tuple[Tensor, Tensor]:
    vectors = vectors if vectors.is_contiguous() else vectors.contiguous()
    fresh = torch.empty_like(vectors)
    estimates = torch.empty(len(matrices), device="cpu")
    pieces, rows, c = matrices.shape
    compiled.power_step(
        _at(matrices), _long(pieces), _long(matrices.stride(0)), _long(matrices.stride(1)), _long(rows), _long(c),
        _at(vectors), _at(fresh), _at(dither), ctypes.c_double(amount), _at(estimates), torch.get_num_threads(),
    )  # fmt: skip
    return estimates, fresh


def piece_factors(norms: Tensor, targets: Tensor) -> Tensor:
    """`runtime.factors` for float32 norms `[n, …]`, not empty, and targets `[n]`."""
    norms, targets = norms.contiguous(), targets.contiguous()
    found = torch.empty_like(norms)
    n = norms.shape[0]
    _library().piece_factors(_at(norms), _at(targets), _at(found), _long(n), _long(norms.numel() // n), _float(1.0))
    return found


def matrix_factors(
    matrices: Tensor, vectors: Tensor, targets: Tensor, unit: float, dither: Tensor, amount: float
) -> tuple[Tensor, Tensor]:
    """`power_step` for `[n, rows, c]`, and `runtime.factors` `[n, 1, 1]` of `unit` times its norms; targets `[n]`."""
    vectors = vectors if vectors.is_contiguous() else vectors.contiguous()
    targets = targets if targets.is_contiguous() else targets.contiguous()
    n, rows, c = matrices.shape
    apart, ld, _ = matrices.stride()
    fresh, found = torch.empty_like(vectors), matrices.new_empty((n, 1, 1))
    _library().matrix_factors(
        matrices.data_ptr(), n, apart, ld, rows, c, vectors.data_ptr(), fresh.data_ptr(), dither.data_ptr(),
        targets.data_ptr(), unit, amount, found.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return found, fresh


class Adam(ctypes.Structure):
    """The settings of one step of `torch.optim.AdamW` with lr 1 for one tensor."""

    _fields_ = [(name, _float) for name in ("beta1", "beta2", "eps", "sign", "scale")]

    @classmethod
    def of(cls, group: Mapping[str, Any], step: float) -> Adam:
        """For a parameter group of the optimizer, and the number of the step."""
        beta1, beta2 = group["betas"]
        root = math.sqrt(1.0 - beta2**step)
        return cls(beta1, beta2, group["eps"] * root, -1.0 if group["maximize"] else 1.0, -root / (1.0 - beta1**step))


def counted(steps: Sequence[Tensor]) -> list[float]:
    """Adds 1 to each of these float32 numbers; what they are then."""
    found = (_float * len(steps))()
    _library().count(_addresses(steps), _long(len(steps)), found)
    return list(found)


def adamw(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    updates: Sequence[Tensor],
    settings: Sequence[Adam],
) -> None:
    """AdamW's updates for contiguous float32 `gradients` of one shape, written to `updates`; the averages move on."""
    _library().adamw(
        _addresses(gradients), _addresses(averages), _addresses(squares), _addresses(updates),
        (Adam * len(settings))(*settings), _long(len(gradients)), _long(updates[0].numel()), torch.get_num_threads(),
    )  # fmt: skip


class _Matrices(ctypes.Structure):
    """What the kernel `step_matrices` works on; cpu.cpp describes the fields."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("g", "m", "v", "w", "adam", "moves", "kept", "vectors", "dither")),
        ("dither_size", _float),
        ("norms", ctypes.c_void_p),
        *((name, _long) for name in ("n", "groups", "blocks", "taps", "rows", "c", "ld")),
        ("guarded", ctypes.c_int),
    ]


def step_matrices(
    places: Sequence[Sequence[int]],
    settings: Sequence[Adam],
    moves: Sequence[float],
    kept: Sequence[float],
    vectors: Sequence[Tensor],
    dither: Tensor,
    amount: float,
    shape: tuple[int, int, int, int, int],
    guarded: bool,
    compiled: ctypes.CDLL | None = None,
) -> Tensor:
    """A whole step of AdamW, normalised, for the same part of n parameters; norms `[n, blocks, groups·taps]`.

    `weight = kept · weight + moves · update / norm` piece by piece, where no factor is more than `PIECE_CAP` times that
    of the largest piece of the block.

    Args:
        places: addresses of the part in all gradients, then in averages, averages of squares and weights, all float32.
        settings: of each parameter. moves, kept: for each parameter and block of columns. vectors: for each block
        `[n·groups·taps, 8, c]`, replaced. shape: groups, taps, rows, c and ld, as in cpu.cpp.
        guarded: whether weights stay as they are where a norm is not finite. compiled: the library, if not `library()`.
    """
    n, blocks = len(settings), len(vectors)
    groups, taps, *sizes = shape
    norms = torch.empty(n, blocks, groups * taps, device="cpu")
    pointers: list[Any] = [(ctypes.c_void_p * n)(*column) for column in places]
    numbers: list[Any] = [(Adam * n)(*settings), (_float * (n * blocks))(*moves), (_float * (n * blocks))(*kept)]
    arrays = [*pointers, *numbers, _addresses(vectors)]
    given = _Matrices(
        *map(ctypes.addressof, arrays), dither.data_ptr(), amount, norms.data_ptr(), n, groups, blocks, taps, *sizes,
        guarded,
    )  # fmt: skip
    (compiled or _library()).step_matrices(ctypes.byref(given), torch.get_num_threads())
    return norms


def largest_entry(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude in contiguous float32 tensors; NaN if one holds NaN."""
    sizes = (_long * len(tensors))(*[t.numel() for t in tensors])
    return _library().largest_entry(_addresses(tensors), sizes, _long(len(tensors)), torch.get_num_threads())


def scale_apply(weights: Sequence[Tensor], updates: Sequence[Tensor], factors: Tensor, decays: Tensor) -> None:
    """`weight = decay · weight + factor · update` for contiguous float32 weights and updates of one shape.

    `factors` and `decays` are `[n, rows, 1]` for the first axis and all others joined, or `[n, 1, columns]` with the
    last axis as columns.
    """
    by_column = factors.shape[2] > 1
    rows = weights[0].numel() // factors.shape[2] if by_column else factors.shape[1]
    _library().scale_apply(
        _addresses(weights), _addresses(updates), _long(len(weights)), _long(rows), _long(weights[0].numel() // rows),
        _at(factors), _at(decays), int(by_column), torch.get_num_threads(),
    )  # fmt: skip


def _library() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("modnorm_fx: a C++ kernel was called where none is compiled (see kernels.cpu.takes).")
    return found
