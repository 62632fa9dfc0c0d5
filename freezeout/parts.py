"""The shares of an optimizer's group in the layers, and the numbers that it keeps for each.

Many optimizers write into their groups: a step count, a sum of weights, an estimate. Somebody who
makes a group for each layer has each of these once a layer, and so it is here: what the optimizer
writes in a part stays with the part's layers. The user's group shows what the last part has.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Group = dict[str, Any]
# For each of an optimizer's groups, [layer, its own numbers] for each of the group's layers.
Saved = list[list[tuple[int, Group]]]

_ABSENT: Any = object()  # in place of a number which the optimizer has not written yet
_OWN_WAY = {"params", "lr", "param_names"}  # options that each part has in a way of their own
_CHANGED_IN_PLACE = (Tensor, list, dict, set)


def share_of(group: Group, parameters: Sequence[Tensor]) -> Group:
    """What a group of those of the group's parameters alone has as theirs: names, too, where all
    have one."""
    share: Group = {"params": list(parameters)}
    names = group.get("param_names")
    if isinstance(names, list) and len(names) == len(group["params"]):
        of = dict(zip(group["params"], names, strict=True))
        share["param_names"] = [of[parameter] for parameter in parameters]
    return share


def unshared(value: Any, parameters: Sequence[Tensor] = ()) -> Any:
    """The value, copied if it may be changed in place, but for parameters in it."""
    if not isinstance(value, _CHANGED_IN_PLACE):
        return value
    return deepcopy(value, {id(p): p for p in parameters})


class Family:
    """One of the user's groups, and the numbers of each layer in it.

    Args:
        origin: the user's group.
        begin: what numbers begin with, for layers that come back.
    """

    def __init__(self, origin: Group, begin: Mapping[str, Any]) -> None:
        self.origin = origin
        self._begin = begin
        self._numbers: dict[int, Group] = {}  # the layers of one part share theirs
        # What the optimizer has written, as the user's group shows it, and how that looked then.
        self._shown: dict[str, tuple[Any, object]] = {}
        self.in_place: list[str] = []  # options that may be changed so

    def look(self) -> None:
        """Look at the user's group, before parts are filled."""
        self.in_place = [
            key
            for key, value in self.origin.items()
            if isinstance(value, _CHANGED_IN_PLACE) and key not in _OWN_WAY
        ]

    def parts(self, layers: Mapping[nn.Parameter, int], is_whole: bool) -> "list[Part]":
        """The parts of those parameters, a layer each; or one, if the group `is_whole`. Then too
        layers with other numbers than the rest, as they have thawed, are apart."""
        begin = {key: self.copied(self._begin.get(key, _ABSENT)) for key in self._shown}
        known = self._numbers
        self._numbers = {i: known.get(i, begin) for i in sorted(set(layers.values()))}
        shares: list[tuple[Group, list[int]]] = []
        for layer, numbers in self._numbers.items():
            for alike, members in shares if is_whole else ():
                if _same(alike, numbers):
                    members.append(layer)
                    self._numbers[layer] = alike
                    break
            else:
                if any(numbers is other for other, _ in shares):
                    numbers = {key: self.copied(value) for key, value in numbers.items()}
                    self._numbers[layer] = numbers
                shares.append((numbers, [layer]))
        return [
            Part(
                self,
                members[-1],
                [p for p, layer in layers.items() if layer in members],
                numbers,
                is_alone=len(shares) == 1,
            )
            for numbers, members in shares
        ]

    def copied(self, value: Any) -> Any:
        """A copy that shares nothing but the parameters."""
        return unshared(value, self.origin["params"])

    def shows(self, key: str) -> bool:
        """Whether the user's group still shows what the optimizer wrote: nobody else has since."""
        value, stamp = self._shown.get(key, (None, None))
        now = self.origin.get(key, _ABSENT)
        return key in self._shown and now is value and _stamp(now) == stamp

    def show(self, key: str, value: Any) -> None:
        """Have the user's group show what the optimizer has written."""
        self.origin[key] = value
        self._shown[key] = value, _stamp(value)

    def saved(self) -> list[tuple[int, Group]]:
        """The numbers of each layer; empty if the optimizer writes none."""
        if not any(self._numbers.values()):
            return []
        return [
            (layer, {k: self.copied(v) for k, v in numbers.items() if v is not _ABSENT})
            for layer, numbers in self._numbers.items()
        ]

    def load(self, rows: list[tuple[int, Group]]) -> None:
        """Go on with what `saved` gave, and with what the user's group shows now."""
        for layer, numbers in rows:
            self._numbers[layer] = {
                key: _beside(value, self.origin.get(key)) for key, value in numbers.items()
            }
            for key in numbers:
                now = self.origin.get(key, _ABSENT)
                self._shown[key] = now, _stamp(now)


class _Copy(NamedTuple):
    """A part's own copy of an option that may be changed in place."""

    source: Any
    source_stamp: object
    copy: Any
    copy_stamp: object


class Part:
    """The share of one of the user's groups in one layer, or in all that are trained alike."""

    def __init__(
        self,
        family: Family,
        layer: int,
        parameters: list[nn.Parameter],
        numbers: Group,
        is_alone: bool = True,
    ) -> None:
        self.layer, self._family = layer, family
        self._numbers, self._is_alone = numbers, is_alone
        self.size = len(parameters)
        self.group: Group = {}
        self._given: Group = {}
        self._copies: dict[str, _Copy] = {}
        self._share = share_of(family.origin, parameters)

    def fill(self, factor: float) -> None:
        """Take the user's group's options as they are now, with its learning rate scaled, and its
        own numbers."""
        family = self._family
        given = {**family.origin, **self._share}
        if factor != 1:
            given["lr"] = given["lr"] * factor
        for key in list(self._numbers):
            if not family.shows(key):
                del self._numbers[key]  # the user has set another
            elif self._numbers[key] is _ABSENT:
                given.pop(key, None)
            else:
                given[key] = self._numbers[key]
        if not self._is_alone:
            for key in family.in_place:
                if key not in self._numbers:
                    given[key] = self._copy(key, given[key])
        self._given = given
        self.group.clear()
        self.group.update(given)

    def _copy(self, key: str, value: Any) -> Any:
        kept = self._copies.get(key)
        if kept is None or kept.source is not value or kept.source_stamp != _stamp(value):
            copy = self._family.copied(value)
            kept = self._copies[key] = _Copy(value, _stamp(value), copy, _stamp(copy))
        return kept.copy

    def carry_back(self, factor: float) -> None:
        """Keep every value that the optimizer has changed in this part, and have the user's group
        show it."""
        group, given = self.group, self._given
        changed = [key for key, value in group.items() if value is not given.get(key, _ABSENT)]
        changed += [key for key in self._numbers if key in group]
        changed += [key for key, own in self._copies.items() if _stamp(own.copy) != own.copy_stamp]
        for key in changed:
            if key not in _OWN_WAY:
                self._numbers[key] = group[key]
                self._copies.pop(key, None)
                self._family.show(key, group[key])
            elif key == "lr" and factor:
                rate = group["lr"]
                self._family.origin["lr"] = rate if factor == 1 else rate / factor


def _stamp(value: Any) -> object:
    """Another one after a change in place."""
    if isinstance(value, Tensor):
        return value._version
    return repr(value) if isinstance(value, _CHANGED_IN_PLACE) else None


def _same(one: Group, other: Group) -> bool:
    return one.keys() == other.keys() and all(_equal(v, other[k]) for k, v in one.items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return a is b or (type(a) is type(b) and repr(a) == repr(b))


def _beside(value: Any, shown: Any) -> Any:
    """A loaded number, on the device of the one that the optimizer has loaded."""
    if isinstance(value, Tensor) and isinstance(shown, Tensor):
        return value.to(shown.device)
    return deepcopy(value)
