"""Whether layers are listed in the order in which they run, and which stand side by side."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LayerOrderError
from .flow import Graph
from .layer import Layer
from .marks import copied_plainly, unhooked
from .scratch import uncompiled
from .trace import Trace

Related = Callable[[int, int], bool | None]  # whether a layer feeds another; None: not known


def check_order(layers: Sequence[Layer], trace: Trace) -> None:
    """Raise `LayerOrderError` unless the layers' last uses come in the layers' order, as far as one
    feeds another; and if a layer feeds one that is listed before it, but is not fed by it."""
    times = [
        max((trace.uses[p][0] for p in layer.parameters if p in trace.uses), default=None)
        for layer in layers
    ]
    feeds = _feeding(layers, trace)
    used = [(i, time) for i, time in enumerate(times) if time is not None]
    for number, (i, time) in enumerate(used):
        for j, earlier in used[:number]:
            one_way = feeds(i, j) and feeds(j, i) is False
            if one_way or (time < earlier and feeds(i, j) is not False):
                raise _out_of_order(layers, j, i, [k for k, _ in sorted(used, key=lambda u: u[1])])


def _feeding(layers: Sequence[Layer], trace: Trace) -> Related:
    """From what was recorded of a forward pass."""
    flow = trace.flow
    made = [flow.made(layer.parameters) if flow else 0 for layer in layers]
    taken = [flow.taken(layer.parameters) if flow else 0 for layer in layers]
    return lambda i, j: bool(made[i] & taken[j]) if made[i] and made[j] else None


def _out_of_order(
    layers: Sequence[Layer], early: int, late: int, order: Sequence[int]
) -> LayerOrderError:
    return LayerOrderError(
        f"layer {layers[late].name!r} is listed after {layers[early].name!r} but runs before it, "
        "so freezing in that order would save nothing; pass example_inputs=, or layers= in the "
        "order of execution" + (f": {', '.join(layers[i].name for i in order)}" if order else "")
    )


class OrderCheck:
    """Checks the layers' order once, in the first training forward pass, then goes away.

    That is a call of the model; or, where the loss comes from a method of it, calls of the layers'
    modules in the first step: what their inputs were computed from is in autograd's graph.
    `found`: the layers are those of the definition, and not the user's own.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], found: bool) -> None:
        self._model, self._layers, self._found = model, layers, found
        self._trace = Trace.recorder()
        self._recording: ExitStack | None = None
        # For each layer of which a module was called, the layers that its inputs came from.
        self._fed: dict[int, int] = {}
        self._graph = Graph(_bits(layers))
        copied_plainly(model)
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._number = {m: i for i, layer in enumerate(layers) for m in layer.boundary}
        self._number.pop(model, None)
        for module in self._number:
            copied_plainly(module)
            self._handles.append(
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            )

    def _before(self, model: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():  # a graph runs no hooks
            return
        if model.training and torch.is_grad_enabled() and self._recording is None:
            self._recording = ExitStack()
            self._recording.enter_context(uncompiled())
            self._recording.enter_context(self._trace.listening(model, running=True))

    def _after(self, model: nn.Module, args: object, output: object) -> None:
        if self._recording is not None:
            self._recording.close()
            self.remove()
            if output is not None:  # None after an exception, which is to be seen
                self._trace.gave(output)
                check_order(self._layers, self._trace)
                if self._found:
                    self._check_idle()
                    self._tell_side_by_side(_feeding(self._layers, self._trace))
                ahead = set(self._trace.ahead(model))
                for layer in self._layers[:-1]:
                    layer.hand_over(ahead, self._layers[-1])

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._recording is not None:
            return
        if self._model.training and torch.is_grad_enabled():
            i, fed = self._number[module], self._graph.behind((args, kwargs))
            self._fed[i] = self._fed.get(i, 0) | fed
            if self._layers[i].is_frozen and fed >> (i + 1):  # it would get no gradient
                self.remove()
                self._check_fed(complete=False)

    def stepped(self, freezes: bool) -> None:
        """A step was made, which freezes layers or does not. LayerOrderError if modules of the
        layers ran, though the model was not called, and in another order."""
        if not self._fed and not freezes:
            return
        self.remove()
        self._check_fed()
        seen = 0
        for i, fed in self._fed.items():
            seen |= 1 << i | fed
        names = [repr(each.name) for i, each in enumerate(self._layers) if not seen >> i & 1]
        if names:
            shown = [*names[:3], "...", names[-1]] if len(names) > 4 else names
            warnings.warn(
                f"the order of layers was never checked: {', '.join(shown)} were not seen in a "
                "training forward pass, and freeze in the order in which they are "
                f"{'defined' if self._found else 'listed'}; pass example_inputs=, or layers= in "
                "the order of execution",
                stacklevel=5,
            )

    def _check_fed(self, complete: bool = True) -> None:
        count = len(self._layers)
        feeds = [[bool(self._fed.get(j, 0) >> i & 1) for j in range(count)] for i in range(count)]
        for i in range(count):
            for j in range(i + 1, count):
                if feeds[j][i] and not feeds[i][j]:
                    order = sorted(range(count), key=lambda k: self._fed.get(k, 0).bit_count())
                    order = order if complete and len(self._fed) == count else []
                    raise _out_of_order(self._layers, i, j, order)
        if self._found:
            known = self._fed
            self._tell_side_by_side(lambda i, j: feeds[i][j] if i in known and j in known else None)

    def _check_idle(self) -> None:
        """LayerOrderError if a part that is not trained, and feeds nothing that is, would freeze
        with a layer that it does not belong to."""
        trace, flow = self._trace, self._trace.flow
        graded = trace.graded or set()
        trained = [
            p for layer in self._layers for p in layer.parameters if p.requires_grad and p in graded
        ]
        taken = 0 if flow is None else flow.taken(trained)
        for layer in self._layers[:-1]:
            for p in layer.parameters:
                made = 0 if flow is None else flow.made([p])
                if made and taken and not made & taken and not (p.requires_grad and p in graded):
                    name = next(name for name, each in self._model.named_parameters() if each is p)
                    raise LayerOrderError(
                        f"parameter {name!r} is not trained and feeds nothing that is (it is a "
                        f"teacher's, say), yet it would freeze with layer {layer.name!r}; pass "
                        "example_inputs=, with which such parts stay out of the layers"
                    )

    def _tell_side_by_side(self, feeds: Related) -> None:
        names = [layer.name for layer in self._layers]
        for i, (one, other) in enumerate(pairwise(names)):
            if feeds(i, i + 1) is False and feeds(i + 1, i) is False:
                warnings.warn(
                    f"layers {one!r} and {other!r} do not feed each other, yet {one!r} freezes "
                    "before the other, as it is defined first; pass example_inputs=, with which "
                    "branches (towers, heads) freeze side by side, or layers=, in which such "
                    f"layers are one: layers=[..., [{one}, {other}], ...]",
                    stacklevel=3,
                )
                return

    @property
    def pending(self) -> bool:
        """Whether the forward pass to check is still to come."""
        return bool(self._handles)

    def remove(self) -> None:
        """Stop checking."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._number:
            unhooked(module)
        self._number.clear()
        self._graph.forget()


def _bits(layers: Sequence[Layer]) -> dict[Tensor, int]:
    """A bit for each layer, by parameter; not for those that modules of other layers use too."""
    owners: dict[nn.Module, int] = {m: i for i, each in enumerate(layers) for m in each.modules}
    bits: dict[Tensor, int] = {p: 1 << i for i, each in enumerate(layers) for p in each.parameters}
    for module, i in owners.items():
        for parameter in module.parameters(recurse=False):
            if bits.get(parameter) != 1 << i:
                bits.pop(parameter, None)
    return bits
