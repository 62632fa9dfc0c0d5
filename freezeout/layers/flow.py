"""What was computed from what: which modules feed which in one forward pass, by the tensors that
they hand on; and what is behind a tensor in autograd's graph."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Node = nn.Module | nn.Parameter


class Flow:
    """For each module that ran, the modules whose results it took, directly or through others; and
    the same for each parameter, of the operations that applied it to data.

    Results are known by their storage, so that views and changes in place count. A set of
    modules and parameters is an integer, with a bit each.

    What is computed from parameters and constants alone, a scaled weight say, is no data yet: the
    parameter is applied where it meets some. Its own module may never run.
    """

    def __init__(self) -> None:
        self._bit: dict[Node, int] = {}
        self._taken: dict[Node, int] = {}
        self._made_by: dict[int, int] = {}  # by storage
        # By storage, of what is no data: the parameters that it was computed from.
        self._plain: dict[int, frozenset[nn.Parameter]] = {}
        self._given: set[int] = set()  # the storages of parameters, which stay what they are

    def know(self, parameter: nn.Parameter, value: Any) -> None:
        """`value` is the parameter: itself, or what stands in its place."""
        for memory in memory_of(value):
            self._plain[memory] = frozenset((parameter,))
            self._given.add(memory)

    def know_constant(self, value: Any) -> None:
        """`value` is no data: a buffer."""
        for memory in memory_of(value):
            self._plain.setdefault(memory, frozenset())

    def enter(self, module: nn.Module, values: Any) -> None:
        """The module starts to run, on these values: it may hand them back as they are. They may
        be parameters, or made of them alone: codes that it makes weights of, say."""
        for value in tree_leaves(values):
            for memory in memory_of(value):
                made = self._made_by.get(memory, 0)
                for parameter in self._plain.get(memory, ()):
                    made |= self._bit.setdefault(parameter, 1 << len(self._bit))
                self._taken[module] = self._taken.get(module, 0) | made

    def record(
        self, running: Sequence[nn.Module], taken: Iterable[Any], given: Any, in_place: bool
    ) -> frozenset[nn.Parameter]:
        """One operation: the modules running, what it took and gave, whether it changes any.
        Returns the parameters that it applied to data."""
        sources = {memory for value in taken for memory in memory_of(value)}
        makers, origin, is_data = 0, frozenset[nn.Parameter](), False
        for memory in sources:
            makers |= self._made_by.get(memory, 0)
            if memory in self._plain:
                origin |= self._plain[memory]
            else:
                is_data = True
        applied = origin if is_data else frozenset[nn.Parameter]()
        nodes: list[Node] = [*running, *applied]
        for node in nodes:
            self._taken[node] = self._taken.get(node, 0) | makers
        for node in nodes:
            makers |= self._bit.setdefault(node, 1 << len(self._bit))
        for value in (given,) if isinstance(given, Tensor) else tree_leaves(given):
            for memory in memory_of(value):
                if memory not in sources:
                    self._made_by[memory] = makers
                elif in_place:
                    self._made_by[memory] = self._made_by.get(memory, 0) | makers
                else:  # a view, that nobody made
                    continue
                if memory in self._given:
                    continue
                if is_data:
                    self._plain.pop(memory, None)
                else:
                    self._plain[memory] = origin
        return applied

    def feeds(self, one: Node, other: Node) -> bool:
        """Whether `other` took anything that was computed from a result of `one`."""
        return bool(self._taken.get(other, 0) & self._bit.get(one, 0))

    def made(self, nodes: Iterable[Node]) -> int:
        """The modules and parameters, as a set; of those that took no part nothing."""
        return _union(self._bit, nodes)

    def taken(self, nodes: Iterable[Node]) -> int:
        """The set of what any of them took a result of."""
        return _union(self._taken, nodes)

    def apart(self, modules: Iterable[nn.Module]) -> bool:
        """Whether some of the modules ran and none took what another gave: branches, experts."""
        ran = [module for module in modules if module in self._bit]
        return bool(ran) and not any(self.feeds(a, b) for a, b in permutations(ran, 2))


class Graph:
    """What tensors were computed from, in autograd's graph: sets of bits, given by leaf."""

    def __init__(self, bits: Mapping[Tensor, int]) -> None:
        self._bits = bits
        self._known: dict[Any, int] = {}  # by node

    def behind(self, values: Any) -> int:
        found = 0
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                found |= self._of(value.grad_fn)
        return found

    def _of(self, node: Any) -> int:
        waiting = [node]
        while waiting:
            each = waiting[-1]
            if each in self._known:
                waiting.pop()
                continue
            following = [other for other, _ in each.next_functions if other is not None]
            missing = [other for other in following if other not in self._known]
            if missing:
                waiting += missing
                continue
            variable = getattr(each, "variable", None)
            found = 0 if variable is None else self._bits.get(variable, 0)
            for other in following:
                found |= self._known[other]
            self._known[each] = found
        return self._known[node]

    def forget(self) -> None:
        self._known.clear()


def leaves_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor that a backward pass from any tensor among the values would give a gradient."""
    values = list(values)
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
            yield value
    yield from (node.variable for node in nodes_of(values) if hasattr(node, "variable"))


def nodes_of(values: Iterable[Any]) -> Iterator[Any]:
    """Every node that a backward pass from any tensor among the values would visit."""
    waiting = [value.grad_fn for value in values if isinstance(value, Tensor)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _union(sets: dict[Node, int], nodes: Iterable[Node]) -> int:
    union = 0
    for node in nodes:
        union |= sets.get(node, 0)
    return union


def memory_of(value: Any) -> tuple[int, ...]:
    """What two tensors of the same memory have in common; nothing for any other value."""
    if not isinstance(value, Tensor):
        return ()
    try:
        return (value.untyped_storage()._cdata,)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and some subclasses, have none
        return ()
