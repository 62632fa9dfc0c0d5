"""The cache in training frameworks: samples get numbers, and a module's calls are served.

A framework's loaders are made to give pairs, a batch and its samples' numbers; the adapter takes
the numbers off before anybody sees the batch, and says for which step they are. The module that
the step calls then goes through a `PrefixCache`, in place of running its frozen layers.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..cache import Indexed, PrefixCache
from ..cache.ids import copied_loader, index_in_place
from ..cache.inputs import thinned_sums
from ..cache.plan import CallsOf
from ..errors import CacheError, InvalidType, InvalidValue
from ..freezer import FreezeOut

TRAINING = object()  # the name of the set that is trained on
_OWN = ("freezer", "num_samples", "views", "model", "accumulate")  # what the adapter decides


def cache_options(cache: Any) -> dict[str, Any] | None:
    """What an adapter's argument `cache` asks for; None: no cache. InvalidType, InvalidValue."""
    if isinstance(cache, bool):
        return {} if cache else None
    if not isinstance(cache, Mapping):
        raise InvalidType(
            f"cache must be True, False or a mapping of the cache's options, got {cache!r}"
        )
    known = [name for name in signature(PrefixCache).parameters if name not in _OWN]
    known.append("evaluation")
    for name in cache:
        if name not in known:
            raise InvalidValue(f"cache has no option {name!r} here: {', '.join(known)}")
    return dict(cache)


class RunCache:
    """The caches of one run: one for training, and one for each set that is evaluated on.

    Args:
        options: of `PrefixCache`, and `evaluation`: whether evaluation is served as well.
        freezer: gives the run's FreezeOut; None: it is not built yet.
        autocast: what the module's forward pass runs in, if it enters that by itself.
        accumulate: batches for each optimizer step.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        freezer: Callable[[], FreezeOut | None],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        accumulate: int = 1,
    ) -> None:
        self._options = dict(options)
        self._evaluates = bool(self._options.pop("evaluation", True))
        self._freezer, self._autocast, self._accumulate = freezer, autocast, accumulate
        self.module: nn.Module | None = None
        self._calls: CallsOf | None = None
        self.is_wanted = True  # until it is known that no module can be served
        self.before_call: Callable[..., None] | None = None
        self.state: Mapping[str, Any] | None = None  # of a checkpoint
        self._caches: dict[Any, PrefixCache | None] = {}
        self._sizes: dict[Any, int] = {}  # of data sets
        self._undo: list[Callable[[], Any]] = []
        self._step: tuple[Any, Tensor] | None = None  # which set, and the numbers
        self._was_called = False
        self._weights: tuple[int, list[int]] | None = None  # frozen layers, checksums
        self._unlike: bool | None = None  # whether this evaluation is of other weights
        self._told: set[str] = set()

    @property
    def training(self) -> PrefixCache | None:
        """The cache of training."""
        return self._caches.get(TRAINING)

    def number(self, loader: Any, name: Any = TRAINING) -> bool:
        """Have a loader give pairs, until the run ends. What cannot be numbered stays as it is,
        with a warning. Returns whether it gives pairs."""
        if name is not TRAINING and not self._evaluates:
            return False
        try:
            self.in_the_end(index_in_place(loader, lenient=True))
        except (InvalidType, InvalidValue) as error:
            self.refuse(str(error))
            return False
        self._sizes[name] = len(loader.dataset)
        return True

    def numbered(self, loader: Any, name: Any = TRAINING) -> Any:
        """A loader like this one that gives pairs; or this one, with a warning."""
        copied = copied_loader(loader)
        return copied if self.number(copied, name) else loader

    def take(self, batch: Any) -> tuple[Any, Tensor | None]:
        """The batch as the collate function made it, and its samples' numbers, if it has them."""
        if not isinstance(batch, Indexed):
            return batch, None
        if bool((batch.ids < 0).any()):
            self.refuse("the sampler gives what is no sample's number: use one that gives integers")
            return batch.batch, None
        return batch

    def in_the_end(self, undo: Callable[[], Any]) -> None:
        """Call this when the run ends."""
        self._undo.append(undo)

    def refuse(self, reason: str) -> None:
        """Say, once, that and why the cache has no part in something."""
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"FreezeOut's cache: {reason}", stacklevel=2)

    def attach(self, module: nn.Module) -> None:
        """Serve this module's calls, in steps whose numbers are known."""
        if module._compiled_call_impl is not None:
            self.is_wanted = False
            self.refuse("the model is compiled as a whole")
            return
        self.module = module
        self._calls = CallsOf(module, self.call)

    def end(self) -> None:
        """Leave the module and the loaders as they were; memory is given back."""
        if self._calls is not None:
            self._calls.end()
            self._calls = self.module = None
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        for cache in self._caches.values():
            if cache is not None:
                cache.close()
        self._step = None

    def evaluation_begins(self) -> None:
        """Whose weights may be others than those that are trained: averages of them, say."""
        self._unlike = None

    @contextmanager
    def step(self, ids: Tensor | None, name: Any = TRAINING) -> Iterator[None]:
        """Inside, the module is called for these samples of a set."""
        self._step = None if ids is None else (name, ids)
        self._was_called = False
        try:
            yield
        finally:
            self._step = None

    def call(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """What a call of the module gives; `own`: without a cache."""
        step, module = self._step, self.module
        if step is None or module is None:
            return own(*args, **kwargs)
        name, ids = step
        is_training = module.training and torch.is_grad_enabled()
        if (name is TRAINING) != is_training:
            return own(*args, **kwargs)
        if self._was_called:
            self.refuse(
                "the model is called more than once for a batch: the calls after the first are "
                "not served"
            )
            return own(*args, **kwargs)
        if self.before_call is not None and self._freezer() is None:
            self.before_call(module, args, kwargs)
        cache = self._cache_for(name)
        if cache is None or cache.off is not None:
            return own(*args, **kwargs)
        self._step = None  # the cache calls the module as well
        try:
            with self._autocast():
                return cache(*args, ids=ids, **kwargs)
        except (InvalidValue, CacheError) as error:
            # It is about this batch's numbers or inputs, or a pass that did not come to its end.
            cache.close()
            self.refuse(f"{error}; from here on nothing is cached of this data set")
            return own(*args, **kwargs)
        finally:
            self._step, self._was_called = step, True

    def _cache_for(self, name: Any) -> PrefixCache | None:
        freezer = self._freezer()
        if freezer is None or name not in self._sizes:
            return None
        if name is TRAINING:
            self._look_at_weights(freezer)
        elif not self._may_evaluate(freezer):
            return None
        if name not in self._caches:
            self._caches[name] = self._new_cache(freezer, name)
        return self._caches[name]

    def _new_cache(self, freezer: FreezeOut, name: Any) -> PrefixCache | None:
        options: dict[str, Any] = {"accumulate": self._accumulate, **self._options}
        if name is not TRAINING:
            training = self.training
            assert training is not None
            options["depths"] = training.depths
            if options.get("where", "ram") not in ("ram", "device"):
                options["where"] = "ram"
                options.pop("budget", None)  # it was the folder's
            elif "budget" in options:
                others = (cache for cache in self._caches.values() if cache is not None)
                taken = sum(cache.record_bytes * cache.num_samples for cache in others)
                options["budget"] = max(1, options["budget"] - taken)
        try:
            cache = PrefixCache(freezer, self._sizes[name], model=self.module, **options)
        except InvalidValue as error:
            self.refuse(str(error))
            return None
        if name is TRAINING and self.state is not None:
            cache.load_state_dict(self.state)
        return cache

    def _may_evaluate(self, freezer: FreezeOut) -> bool:
        """Whether an evaluation may be served: it pays where training does, and frozen layers are
        those of training."""
        training = self.training
        if training is None or training.off is not None or not training.depths:
            return False
        if self._unlike is None:
            depth, sums = self._weights or (0, [])
            self._unlike = depth > freezer.num_frozen or sums != _sums(freezer, depth)
            if self._unlike:
                self.refuse(
                    "evaluation is of other weights than those that are trained (averages of "
                    "them?), so it is left to the model"
                )
        return not self._unlike

    def _look_at_weights(self, freezer: FreezeOut) -> None:
        depth = freezer.num_frozen
        if self._weights is None or self._weights[0] != depth:
            self._weights = depth, _sums(freezer, depth)


def _sums(freezer: FreezeOut, depth: int) -> list[int]:
    """Checksums of a part of each frozen parameter, quick enough for each evaluation."""
    parameters = [p for layer in freezer.layers[:depth] for p in layer.parameters]
    return [int(thinned_sums(parameter.detach().reshape(1, -1))) for parameter in parameters]


class Outermost:
    """Which modules a step calls, but for those that others call, until `remove()`."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[nn.Module] = []
        self._inside = 0
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._inside:
            self.calls.append(module)
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def served(self, freezer: FreezeOut) -> nn.Module:
        """The one that holds the most layers that will be frozen. InvalidValue if there is none,
        or if it is called again in the same step."""
        frozen = list(freezer.layers[: max(freezer.timeline.depths)])

        def held(module: nn.Module) -> int:
            inside = set(module.parameters())
            return sum(inside.issuperset(layer.parameters) for layer in frozen)

        best = max(self.calls, key=held, default=None)
        if best is None or not held(best):
            raise InvalidValue("no module that the training step calls holds a whole frozen layer")
        if self.calls.count(best) > 1:
            raise InvalidValue(
                f"the training step calls the frozen {type(best).__name__} more than once for a "
                "batch"
            )
        return best
