"""`PrefixCache`: what the frozen layers computed of each sample, kept and served."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CacheError, InvalidType, InvalidValue
from ..freezer import FreezeOut
from ..layers.scratch import close
from ..layers.trace import sharded_modules
from ..values import whole_number
from ..words import duration, size
from .activations import Activations, precision
from .depths import Depths
from .fingerprint import Watch
from .inputs import Batch, check_ids
from .placeholders import Placeholders, Unservable, reason_of
from .plan import CallsOf, Plan
from .planning import check_labels, check_padding, check_plan, check_unused, make_plan, real_pass
from .shards import Alone, num_processes
from .stats import CacheStats
from .store import Damaged, Keys
from .where import store_for

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_TRIES = 4  # depths tried at one move of the frontier, from the deepest on


class PrefixCache:
    """Keeps what the frozen layers compute of each sample, and serves it in their place.

        cache = PrefixCache(freezer, num_samples=len(dataset))
        for x, y, ids in batches:
            criterion(cache(x, ids=ids), y).backward()
            ...
            freezer.step()

    `cache(x, ids=ids)` returns what `model(x)` would. Where frozen layers cannot be skipped
    safely, it calls the model, and a warning says why. Whatever is served has been compared with
    the real forward pass, in the first batch of each kind at each depth.

    Args:
        freezer: over the model.
        num_samples: of the data set; ids are 0 ... num_samples - 1.
        where: "ram", "device" (the accelerator's memory), or the path of a folder, which any
            number of runs share: each reads what others with the same frozen weights have stored.
        budget: bytes that activations may take; None: half of the memory, or nine tenths of the
            disk, that is free. Samples beyond it are computed anew each time.
        dtype: "fp32", "bf16" or "fp16" for activations in store; None: the type they have.
        views: different versions of each sample's input, told by `view`.
        depths: at which depths (numbers of frozen layers) to keep activations. "auto": where
            measurements, made once, say that it pays and fits; "all": where it fits; or the
            depths themselves.
        accumulate: batches for each optimizer step.
        model: the module of the freezer's model that is called in the model's place, where a
            training step calls parts of it; None: the model.

    Raises:
        InvalidValue, InvalidType: arguments out of range, or a folder that holds other files.
        CacheError: the folder cannot be used.
    """

    def __init__(
        self,
        freezer: FreezeOut,
        num_samples: int,
        *,
        where: str | Path = "ram",
        budget: int | None = None,
        dtype: str | None = None,
        views: int = 1,
        depths: str | Iterable[int] = "auto",
        accumulate: int = 1,
        model: nn.Module | None = None,
    ) -> None:
        if not isinstance(freezer, FreezeOut):
            raise InvalidType(f"freezer must be a FreezeOut, got {type(freezer).__name__}")
        self.freezer = freezer
        self.num_samples = whole_number("num_samples", num_samples)
        self.views = whole_number("views", views)
        if dtype is not None and dtype not in DTYPES:
            raise InvalidValue(f"dtype must be None, {', '.join(DTYPES)}, got {dtype!r}")
        if budget is not None:
            whole_number("budget", budget)
        self.dtype = dtype
        self.stats = CacheStats()
        self._model = freezer.model if model is None else model
        if all(module is not self._model for module in freezer.model.modules()):
            raise InvalidValue("model is no module of the freezer's model")
        self._device = next(self._model.parameters()).device
        if sharded_modules(self._model):
            raise InvalidValue("the cache does not take a model that fully_shard was applied to")
        kept_as = DTYPES[dtype] if dtype else None
        mine = -(-self.num_samples // num_processes())
        batches = whole_number("accumulate", accumulate)
        self._depths = Depths(depths, freezer, mine, self.views, kept_as, self._model, batches)
        self._placeholders = Placeholders()
        self._plans: dict[Any, Plan] = {}
        self._refused: dict[Any, str] = {}
        self._verified: set[Any] = set()
        self._told: set[str] = set()
        self._numerics: Any = None
        self._shared: dict[Any, Any] = {}  # values of arguments that all samples share
        self._unused: dict[Any, str | None] = {}  # which of them, and why not
        self._alike: set[int] = set()  # places of tensors that have had no row for each sample
        self._watch = Watch(self._model, freezer.layers)
        self.off: str | None = None  # why the cache is off for good
        keys = self.num_samples * self.views
        store = store_for(where, budget, keys, self._device)
        freezer.attach(self)
        self._activations = Activations(
            store,
            freezer.layers,
            self._depths,
            kept_as,
            self.stats,
            self._tell,
            _name(self._model),
        )

    # --- calling ------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def summary(self) -> str:
        """What is kept, how often it was served, the seconds that this saved against computing it,
        and why anything was not cached, in a line."""
        store, spared = self._activations.store, self._activations.spared
        held = store.index["depth"][store.index["depth"] > 0]
        what = "samples" if self.views == 1 else "versions of samples"
        parts = [f"cache in {store.place}"]
        if len(held):
            parts[0] += (
                f": what the first {held.max()} of {len(self.freezer.layers)} layers give of "
                f"{len(held):,} of {len(store.index):,} {what}, {size(self.bytes_held)}"
            )
        else:
            parts[0] += f": nothing of {len(store.index):,} {what}"
        if spared.hits:
            parts.append(f"served {spared.hits:,} times")
            if (seconds := spared.seconds) is not None:
                cost = spared.cost
                parts.append(
                    f"{duration(seconds - cost)} saved ({duration(seconds)} of frozen layers "
                    f"not computed, less {duration(cost)} of reading, writing and checks)"
                )
        return "; ".join([*parts, *self.refusals])

    def __call__(self, *args: Any, ids: Any, view: Any = 0, **kwargs: Any) -> Any:
        """The model's output for these arguments.

        Args:
            ids: the samples' numbers, (batch,); a number stands for the same input each time.
            view: which version of the samples this is, a number for all or one for each; None:
                one that will not come again (random augmentation), so nothing is kept of it.

        Raises:
            InvalidValue, InvalidType: ids or views out of range, or a sample whose input is not
                what it was.
            CacheError: a served forward pass failed where earlier ones did not.
        """
        numbers = check_ids(ids, self.num_samples)
        keys = self._keys(numbers, view)
        frozen = self.freezer.num_frozen
        if frozen < self._watch.frozen:
            self._watch.forget()
            self._reset()  # an earlier state was loaded: what freezes next has other weights
        if keys is None or self.off is not None or not frozen:
            return self._plain(args, kwargs, len(numbers))
        self._check_weights(frozen)
        batch = Batch(args, kwargs, len(numbers), shared=self._alike)
        self._alike |= batch.alike
        try:
            plan = self._plan_for(batch)
        except Unservable as refusal:
            self._tell(f"a batch is not cached: {refusal}")
            plan = None
        if plan is None:
            return self._plain(args, kwargs, len(numbers))
        return self._cached(plan, batch, numbers, keys)

    @contextmanager
    def batch(self, ids: Any, view: Any = 0) -> Iterator[None]:
        """Inside, the model's first call is served, whatever it is called through:

            with cache.batch(ids):
                loss = criterion(ddp(x), y)

        where `ddp(x)` is a DistributedDataParallel's, or a method of the model calls it. `ids`,
        `view` and errors are those of a call of the cache.
        """
        was_called = is_inside = False

        def call(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal was_called, is_inside
            if is_inside:  # the cache calls it as well
                return own(*args, **kwargs)
            if was_called:
                self._tell(
                    "the model is called more than once for a batch: only the first is served"
                )
                return own(*args, **kwargs)
            was_called = is_inside = True
            try:
                return self(*args, ids=ids, view=view, **kwargs)
            finally:
                is_inside = False

        calls = CallsOf(self._model, call)
        try:
            yield
        finally:
            calls.end()
        if not was_called:
            self._tell("the model was not called for a batch, or is compiled as a whole")

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> Any:
        self.stats.bypassed += samples
        return self._model(*args, **kwargs)

    def _keys(self, numbers: Keys, view: Any) -> Keys | None:
        if view is None:
            return None
        if isinstance(view, Tensor):
            view = view.detach().cpu().numpy()
        views = np.asarray(view)
        if views.dtype.kind not in "iu" or views.shape not in ((), numbers.shape):
            raise InvalidType("view must be an integer, or one for each sample, or None")
        if views.min() < 0 or views.max() >= self.views:
            raise InvalidValue(
                f"view {views.max() if views.max() >= self.views else views.min()} is out of "
                f"range: views={self.views} allows 0..{self.views - 1}"
            )
        keys: Keys = numbers * self.views + views.astype(np.int64)
        return keys

    # --- plans --------------------------------------------------------------------------

    def _plan_for(self, batch: Batch) -> Plan | None:
        """For the deepest frontier that can be served; None if there is none."""
        frozen = self.freezer.num_frozen
        if not batch.has_rows:
            raise Unservable("no argument has a row for each id")
        if batch.left_padded:
            raise Unservable("attention_mask pads on the left; only padding on the right is served")
        if torch.is_grad_enabled() and batch.requires_grad:
            raise Unservable(
                "an input requires a gradient, which has to pass through the frozen layers"
            )
        batch.check_objects()
        numerics = self._numerics_of(batch)
        if self._numerics is None:
            self._numerics = numerics
        if numerics != self._numerics:
            raise Unservable(
                "the call differs in precision or in options from the first one that was cached"
            )
        if not self._depths.is_surveyed:
            self._decide(batch)
            if self.off is not None:
                return None
        tries = 0
        for depth in range(frozen, 0, -1):
            if depth not in self._depths or (depth, batch.family) in self._refused:
                continue
            if tries == _TRIES:
                break
            tries += 1
            plan = self._plan_at(depth, batch)
            if plan is not None:
                self._check_shared(plan, batch)
                return plan
        return None

    def _plan_at(self, depth: int, batch: Batch) -> Plan | None:
        """The plan for this kind of batch, made if it has to be; None: refused, and said."""
        modes = (self._model.training, torch.is_grad_enabled())
        kind, family = (depth, modes, batch.kind), (depth, modes, batch.family)
        plan = self._plans.get(kind)
        if plan is not None and plan.only_size in (None, batch.size):
            return plan if self._is_without_labels(plan, batch) else None
        sibling = self._plans.get(family)
        if sibling is not None and sibling.only_size is not None:
            sibling = None
        try:
            with self._checking():
                plan = make_plan(
                    self._model, self.freezer.layers, depth, batch, self._placeholders, sibling
                )
                self._activations.plan_for(plan, batch)
        except Unservable as refusal:
            self._refuse(depth, batch, str(refusal))
            return None
        self._plans[kind] = plan
        if plan.only_size is None:
            self._plans.setdefault(family, plan)
        return plan

    def _is_without_labels(self, plan: Plan, batch: Batch) -> bool:
        """Whether frozen layers leave labels alone, as far as seen; refused if they do not."""
        if plan.labels_checked:
            return True
        try:
            with self._checking():
                check_labels(plan, self._model, batch)
        except Unservable as refusal:
            self._refuse(plan.depth, batch, str(refusal))
            return False
        return True

    def _refuse(self, depth: int, batch: Batch, reason: str) -> None:
        self._refused[depth, batch.family] = reason
        layer = self.freezer.layers[depth - 1].name
        self._tell(f"nothing is cached behind layer {layer!r}: {reason}")

    def _numerics_of(self, batch: Batch) -> Any:
        """What decides the bits of the frozen layers' results beside weights and inputs."""
        return precision(self._device.type), batch.family

    def _check_shared(self, plan: Plan, batch: Batch) -> None:
        """What is stored depends on arguments that all samples share, too, if frozen layers use
        them. Where one changes, that is found out, once."""
        for argument, value in batch.shared.items():
            if self._shared.get(argument, value) == value:
                continue
            place = argument[0]
            key = plan.depth, self._model.training, batch.family, place
            if key not in self._unused:
                self._unused[key] = None
                try:
                    with self._checking():
                        check_unused(plan, self._model, batch, place)
                except Unservable as refusal:
                    self._unused[key] = str(refusal)
            reason = self._unused[key]
            if reason is not None:
                raise Unservable(reason)

    def _check_weights(self, frozen: int) -> None:
        if self._watch.have_changed(frozen):
            self._reset()
            self._tell("weights of frozen layers were changed; what was stored is dropped")

    def _reset(self) -> None:
        """Drop whatever depends on weights."""
        self._activations.clear()
        self._shared.clear()
        self._unused.clear()
        self._plans.clear()
        self._verified.clear()

    # --- serving ------------------------------------------------------------------------

    def _cached(self, plan: Plan, batch: Batch, numbers: Keys, keys: Keys) -> Any:
        try:
            self._activations.begin(plan.depth, batch, self.freezer.num_frozen)
        except CacheError as error:
            self._turn_off(str(error))
            return self._plain(batch.args, batch.kwargs, batch.size)
        for argument, value in batch.shared.items():
            self._shared.setdefault(argument, value)
        inputs = batch.checksums()
        while True:
            try:
                return self._visit(plan, batch, numbers, keys, inputs)
            except Damaged as damage:  # they are dropped now
                self._tell(str(damage))

    def _visit(self, plan: Plan, batch: Batch, numbers: Keys, keys: Keys, inputs: Any) -> Any:
        activations, depth = self._activations, plan.depth
        held = activations.held(keys, numbers, inputs, depth)
        if (held == depth).all():
            tensors = activations.read(depth, batch, keys)
            return self._serve(plan, batch, keys, tensors, batch.size)
        fits = activations.make_room(depth, batch, keys, held)
        starts = set(held.tolist())
        if starts == {0} and not fits.any():
            return self._plain(batch.args, batch.kwargs, batch.size)
        if len(starts) == 1:
            return self._compute(plan, batch, keys, inputs, int(held[0]), fits)
        return self._mixed(plan, batch, keys, inputs, held, fits)

    def _serve(self, plan: Plan, batch: Batch, keys: Keys, tensors: list[Tensor], hits: int) -> Any:
        """The model's output from what is stored, of `hits` samples before this call."""
        if not self._is_right(plan, batch, keys, tensors):
            return self._plain(batch.args, batch.kwargs, batch.size)
        self.stats.hits += hits
        self._activations.spared.served(plan.depth, hits)
        if hits == batch.size and self._model.training:  # evaluation is no part of a step
            self.freezer.served()
        try:
            return plan.run(batch, tensors)
        except Exception as error:
            raise self._failed(error) from error

    def _is_right(self, plan: Plan, batch: Batch, keys: Keys, tensors: list[Tensor]) -> bool:
        """Compares what was stored with the real forward pass, if it is the first of its kind to
        be used, or the first of another process. If they differ, the cache is off; what another
        process stored is dropped (Damaged)."""
        modes = (self._model.training, torch.is_grad_enabled())
        kind = (plan.depth, modes, batch.is_padded, batch.family, tuple(batch.shared))
        store = self._activations.store
        strangers = store.strangers(keys)
        if kind in self._verified and not strangers:
            return True
        try:
            with self._checking():
                self._verify(plan, batch, tensors)
        except Unservable as refusal:
            if strangers:
                store.distrust(strangers)
                raise Damaged(f"what another run has stored is left alone: {refusal}") from refusal
            self._turn_off(str(refusal))
            return False
        self._verified.add(kind)
        store.trust(strangers)
        return True

    def _verify(self, plan: Plan, batch: Batch, tensors: list[Tensor]) -> None:
        """Unservable unless the stored tensors are the real ones, up to summation order and the
        type they are stored in, and the model does the same with real ones bit for bit."""
        exact = self._activations.is_exact(plan.depth)
        lap = self._activations.lap
        lap()
        reached = partial(lap, (plan.depth, 0, batch.size))
        real, *rest = real_pass(plan, self._model, batch, reached)
        if batch.is_padded:
            check_padding(plan, self._model, batch)
        rounded = self._activations.as_read(plan.depth, batch, real)
        for stored, computed in zip(tensors, rounded, strict=True):
            same = close if exact else _near
            if not same(stored, computed):
                raise Unservable("what is stored is not what the frozen layers compute")
        whole = rounded if exact else self._activations.emptied(plan, batch, real)
        check_plan(plan, self._model, batch, whole, (rest[0], rest[1]))

    def _compute(
        self, plan: Plan, batch: Batch, keys: Keys, inputs: Any, start: int, fits: Any
    ) -> Any:
        """One ordinary pass, from the input or from an earlier depth's activations, in which what
        passes the frontier is stored."""

        def take(tensors: list[Tensor]) -> list[Tensor]:
            self._activations.lap((plan.depth, start, batch.size))
            return self._keep(plan.depth, batch, keys, inputs, fits, tensors)

        before, given = self._earlier(start, batch, keys)
        if self.off is not None:
            return self._plain(batch.args, batch.kwargs, batch.size)
        self._activations.lap()
        if before is None:
            start = 0
            self.stats.misses += batch.size
            with plan.capture(take):
                return self._model(*batch.args, **batch.kwargs)
        self.stats.advanced += batch.size
        try:
            with before.serving(batch.size, given), plan.capture(take):
                output = self._model(*batch.args, **batch.kwargs)
            before.check(output)
            return output
        except Exception as error:
            raise self._failed(error) from error

    def _earlier(self, start: int, batch: Batch, keys: Keys) -> tuple[Plan | None, list[Tensor]]:
        """What is stored of these samples at an earlier depth, and the plan to go on from there;
        none if it is not to be used."""
        before = self._plan_at(start, batch) if start else None
        if before is None:
            return None, []
        self._activations.check_held(keys, start)
        given = self._activations.read(start, batch, keys)
        return (before, given) if self._is_right(before, batch, keys, given) else (None, [])

    def _mixed(
        self, plan: Plan, batch: Batch, keys: Keys, inputs: Any, held: Any, fits: Any
    ) -> Any:
        """Samples that stand at different depths: each group is brought to the frontier by
        itself, then all are served."""
        activations, depth = self._activations, plan.depth
        places: list[Any] = []
        pieces: list[list[Tensor]] = []
        for start in sorted(set(held.tolist()) - {depth}):
            rows = np.flatnonzero(held == start)
            more = _padded(rows, batch.size)
            group, few = batch.rows(more), keys[more]
            before, given = self._earlier(int(start), group, few)
            try:
                activations.lap()
                tensors = plan.prefix(group, before, given)
                activations.lap((depth, 0 if before is None else int(start), group.size))
            except Exception as error:
                raise self._failed(error) from error
            tensors = self._keep(depth, group, few, inputs[more], fits[more], tensors)
            if before is None:
                self.stats.misses += len(rows)
            else:
                self.stats.advanced += len(rows)
            places.append(rows)
            pieces.append([tensor[: len(rows)] for tensor in tensors])
        if self.off is not None:  # one of them is too large to be stored
            return self._plain(batch.args, batch.kwargs, batch.size)
        rows = np.flatnonzero(held == depth)
        if (activations.store.depths(keys) == depth).all():
            tensors = activations.read(depth, batch, keys)
            return self._serve(plan, batch, keys, tensors, len(rows))
        if len(rows):
            places.append(rows)
            pieces.append(activations.read(depth, batch.rows(rows), keys[rows]))
        order = torch.from_numpy(np.concatenate(places).argsort()).to(self._device)
        joined = [torch.cat(same).index_select(0, order) for same in zip(*pieces, strict=True)]
        joined = activations.as_read(depth, batch, joined)
        return self._serve(plan, batch, keys, joined, len(rows))

    def _keep(
        self, depth: int, batch: Batch, keys: Keys, inputs: Any, fits: Any, tensors: list[Tensor]
    ) -> list[Tensor]:
        """Store what fits; the tensors to go on with, as they will be read later."""
        try:
            return self._activations.write(depth, batch, keys, inputs, fits, tensors)
        except CacheError as error:
            self._turn_off(str(error))
            return tensors

    # --- when something is wrong ----------------------------------------------------------

    def _failed(self, error: Exception) -> Exception:
        """What to raise for an exception from a served pass."""
        reason = reason_of(error)
        if reason is None:
            return error
        self._turn_off(reason)
        return CacheError(
            f"a served forward pass failed where earlier ones did not: {reason}; the cache is off "
            "now, and this step can be made again"
        )

    def clear(self) -> None:
        """Forget what is stored. Weights of frozen layers that were changed behind autograd's back
        (`parameter.data.copy_(…)`) are not noticed, and call for this."""
        self._reset()

    def _turn_off(self, reason: str) -> None:
        self.off = reason
        self._tell(f"{reason}; the cache is off from here on")

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"PrefixCache: {reason}", stacklevel=4)

    @property
    def refusals(self) -> list[str]:
        """Why the cache had no part in some calls, each reason once."""
        return sorted(self._told)

    @property
    def num_held(self) -> int:
        """Of how many samples, or views of them, there is a stored activation."""
        return int((self._activations.store.index["depth"] > 0).sum())

    @property
    def bytes_held(self) -> int:
        """Bytes of all stored activations."""
        return self._activations.store.bytes_held

    @property
    def record_bytes(self) -> int:
        """Bytes set aside for one sample's record, where all are equally long; 0: not known."""
        return self._depths.record_bytes() if self._depths.is_surveyed else 0

    def close(self) -> None:
        """Give the memory back; from here on the model is called as it is. What is in a folder
        stays there, for later runs."""
        self._activations.store.close()
        self.off = "it was closed"

    # --- what is decided once -------------------------------------------------------------

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Measure sizes and times on one batch, and choose the depths, now and not at the first
        freeze. Under the autocast of training, if there is one."""
        rows = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not rows or not rows[0].ndim:
            raise InvalidValue("prepare() takes what the model takes: tensors, a row a sample")
        self._decide(Batch(args, kwargs, rows[0].shape[0]))

    def _decide(self, batch: Batch) -> None:
        """Measure, once, and choose the depths."""
        try:
            with self._checking():
                reason = self._depths.decide(batch, self._activations.store)
        except Unservable as refusal:
            reason = str(refusal)
        if reason is not None:
            self._turn_off(reason)

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """Counts the seconds of what happens inside, which is not to talk to other processes: they
        do not check the same batch."""
        begin = time.perf_counter()
        try:
            with Alone() if num_processes() > 1 else nullcontext():  # type: ignore[no-untyped-call]
                yield
        finally:
            seconds = time.perf_counter() - begin
            self.stats.check_seconds += seconds
            self._activations.spared.cost += seconds

    @property
    def depths(self) -> list[int] | None:
        """The depths at which activations are kept; None: not decided yet."""
        return None if self._depths.chosen is None else sorted(self._depths.chosen)

    def state_dict(self) -> dict[str, Any]:
        """What was decided from measurements, so that a resumed run decides alike."""
        return self._depths.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` returned. CheckpointError if it is of other layers."""
        self._depths.load_state_dict(state)
        if self._depths.chosen == frozenset():
            self.off = "it was decided before that it would save nothing"


def _padded(rows: Any, size: int) -> Any:
    """Places in a batch of that size, the last one repeated until their number is a multiple of
    an eighth of it: kernels are prepared anew for each number of samples."""
    step = -(-size // 8)
    missing = min(-len(rows) % step, size - len(rows))
    return np.pad(rows, (0, missing), mode="edge")


def _name(model: nn.Module) -> str:
    """The model's class, and what its weights were loaded from, where it knows."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    return type(model).__name__ + (f" ({source})" if source and isinstance(source, str) else "")


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree to the precision of the 16-bit type they were stored in."""
    difference = (one.double() - other.double()).norm()
    return bool(difference <= 2e-2 * other.double().norm())
