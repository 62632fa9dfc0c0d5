"""Which modules feed which: from whose results each module computed its own, in one forward."""

from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Flow:
    """For each module that ran, the modules whose results it took, directly or through others.

    Results are known by their storage, so that views and changes in place count. A set of
    modules is an integer, with a bit a module.
    """

    def __init__(self) -> None:
        self._bit: dict[nn.Module, int] = {}
        self._taken: dict[nn.Module, int] = {}
        self._made_by: dict[int, int] = {}  # by storage

    def record(
        self, running: Sequence[nn.Module], taken: Iterable[Any], given: Any, in_place: bool
    ) -> None:
        """One operation: the modules running, what it took and gave, whether it changes any."""
        sources = {memory for value in taken for memory in memory_of(value)}
        makers = 0
        for memory in sources:
            makers |= self._made_by.get(memory, 0)
        for module in running:
            self._taken[module] = self._taken.get(module, 0) | makers
        for module in running:
            makers |= self._bit.setdefault(module, 1 << len(self._bit))
        for value in (given,) if isinstance(given, Tensor) else tree_leaves(given):
            for memory in memory_of(value):
                if memory not in sources:
                    self._made_by[memory] = makers
                elif in_place:  # and otherwise a view, that nobody made
                    self._made_by[memory] = self._made_by.get(memory, 0) | makers

    def feeds(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether `other` took anything that was computed from a result of `one`."""
        return bool(self._taken.get(other, 0) & self._bit.get(one, 0))

    def apart(self, modules: Iterable[nn.Module]) -> bool:
        """Whether some of the modules ran and none took what another gave: branches, experts."""
        ran = [module for module in modules if module in self._bit]
        return bool(ran) and not any(self.feeds(a, b) for a, b in permutations(ran, 2))


def memory_of(value: Any) -> tuple[int, ...]:
    """What two tensors of the same memory have in common; nothing for any other value."""
    if not isinstance(value, Tensor):
        return ()
    try:
        return (value.untyped_storage()._cdata,)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and some subclasses, have none
        return ()
