"""Which parameter is which in a live model: by the modules that own them.

A norm outlives what happens to a model: `.to(dtype)` may put other tensors in the place of parameters, or swap what is
in them (torch.utils.swap_tensors), which no tensor allows that something refers to weakly. Modules stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .errors import ModelMismatchError

__all__ = ["Binding"]


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: an attribute of a module, which is not kept alive. `name`: the first one that it has."""

    module: weakref.ref[nn.Module]
    attribute: str
    name: str

    def parameter(self) -> Tensor | None:
        return getattr(self.module(), self.attribute, None)


@dataclass(eq=False)
class Binding:
    places: tuple[_Place, ...] = ()
    _found: dict[int, list[_Place]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Binding:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return cls(
            tuple(
                _Place(weakref.ref(module), attribute, names[id(parameter)])
                for module in model.modules()
                for attribute, parameter in module._parameters.items()
                if id(parameter) in names
            )
        )

    def name(self, parameter: Tensor) -> str | None:
        """The qualified name of a parameter of the model, by identity; None for any other tensor.

        Raises:
            ModelMismatchError: it has two that were different weights when the model was bound.
        """
        places = self._held(parameter)
        if not places:
            self._found = {}
            for place in self.places:
                if (now := place.parameter()) is not None:
                    self._found.setdefault(id(now), []).append(place)
            places = self._held(parameter)
        names = list(dict.fromkeys(place.name for place in places))
        if len(names) > 1:
            raise ModelMismatchError(
                f"{names[0]} and {names[1]} are one weight now, and were two when the model was converted.",
                why="the norm of a tied weight is that of all its uses",
                do="convert the model again after tying",
            )
        return names[0] if names else None

    def _held(self, parameter: Tensor) -> list[_Place]:
        return [place for place in self._found.get(id(parameter), ()) if place.parameter() is parameter]

    def copied(self, memo: Mapping[int, object]) -> Binding | None:
        """The binding to a copy of the model that copy.deepcopy has made already, None if it has made none."""
        places = tuple(
            _Place(weakref.ref(copy), place.attribute, place.name)
            for place in self.places
            if isinstance(copy := memo.get(id(place.module())), nn.Module)
        )
        return Binding(places) if places else None
