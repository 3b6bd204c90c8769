"""Small data sets that are always there: the sources of Python itself (or any text file), and scikit-learn's digits.

Nothing is downloaded. Batches are drawn with a `torch.Generator` that the caller seeds: a run can be repeated exactly.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modnorm_fx.errors import ModnormError

__all__ = ["Corpus", "Images", "digits", "text"]

Split = Literal["train", "val"]
TEXT_BYTES = 1_000_000  # of text read by default: enough for runs of a few thousand small steps
VAL_SHARE = 0.1  # the tail of a text, and every tenth image


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: token `i` is the byte `vocabulary[i]`; the vocabulary is the bytes that occur, in order."""

    train: Tensor
    val: Tensor
    vocabulary: bytes
    source: str

    @property
    def vocab(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        unknown = sorted(set(text.encode()) - set(self.vocabulary))
        if unknown:
            raise ModnormError(
                f"The text holds bytes that {self.source} does not: {bytes(unknown[:8])!r}.",
                why="The vocabulary is the set of bytes of the corpus.",
                do="Leave these characters out, or make the corpus from a text that has them.",
            )
        return torch.tensor([self.vocabulary.index(byte) for byte in text.encode()], dtype=torch.long)

    def decode(self, tokens: Tensor) -> str:
        return bytes(self.vocabulary[i] for i in tokens.flatten().tolist()).decode(errors="replace")

    def batch(
        self, split: Split, batch_size: int, context: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Windows at random places and their next tokens, both `[batch_size, context]`, on the CPU."""
        tokens = self.train if split == "train" else self.val
        last = len(tokens) - context - 1
        if last < 0:
            raise ModnormError(
                f"The {split} split of {self.source} has {len(tokens)} tokens, too few for a context of {context}.",
                do="Use a shorter context or a longer text.",
            )
        starts = torch.randint(last + 1, (batch_size, 1), generator=generator)
        windows = tokens[starts + torch.arange(context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def batches(self, split: Split, batch_size: int, context: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches; the same seed gives the same batches."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(split, batch_size, context, generator)


def text(path: str | Path | None = None, max_bytes: int = TEXT_BYTES) -> Corpus:
    """The first `max_bytes` of a file; without `path`, of the sources of Python's standard library, by name.

    Deterministic: the same file, or the same Python version, gives the same tokens.
    """
    raw, source = (
        (_stdlib(max_bytes), "Python's standard library") if path is None else (_file(path, max_bytes), str(path))
    )
    if len(raw) < 2:
        raise ModnormError(f"{source} holds no text.", do="Name a text file that is not empty.")
    vocabulary = bytes(sorted(set(raw)))
    table = torch.zeros(256, dtype=torch.uint8)
    table[torch.tensor(list(vocabulary))] = torch.arange(len(vocabulary)).to(torch.uint8)
    tokens = table[torch.frombuffer(bytearray(raw), dtype=torch.uint8).int()]
    cut = len(tokens) - max(1, int(VAL_SHARE * len(tokens)))
    return Corpus(train=tokens[:cut], val=tokens[cut:], vocabulary=vocabulary, source=source)


def _file(path: str | Path, max_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise ModnormError(
            f"The text file {path} cannot be read.",
            why=str(error),
            do="Check the path, or leave it out to use Python's own sources.",
        ) from error


def _stdlib(max_bytes: int) -> bytes:
    """Files that are not pure ASCII are left out: a handful of odd bytes would only widen the vocabulary."""
    raw = bytearray()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        raw += content if content.isascii() else b""
        if len(raw) >= max_bytes:
            break
    if not raw:
        raise ModnormError(
            "This Python installation comes without the sources of its standard library.",
            do="Name a text file to train on.",
        )
    return bytes(raw[:max_bytes])


@dataclass(frozen=True)
class Images:
    """Images `[n, channels, size, size]` of mean 0 and RMS 1 over the training split, and their labels `[n]`."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    classes: int

    def batch(self, split: Split, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Random images (with replacement) and labels, on the CPU."""
        images, labels = self.train if split == "train" else self.val
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        return images[chosen], labels[chosen]

    def batches(self, split: Split, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches; the same seed gives the same batches."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(split, batch_size, generator)


def digits() -> Images:
    """scikit-learn's 1797 handwritten digits, 8x8 grey pixels; they ship inside that package."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModnormError(
            "The digits data set needs scikit-learn, which is not installed.", do="pip install 'modnorm-fx[train]'"
        ) from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.long)
    held_out = torch.arange(len(labels)) % round(1 / VAL_SHARE) == 0
    images = images - images[~held_out].mean()
    images = images / images[~held_out].square().mean().sqrt()
    return Images(train=(images[~held_out], labels[~held_out]), val=(images[held_out], labels[held_out]), classes=10)
