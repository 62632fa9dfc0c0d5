"""`Depths`: behind how many frozen layers activations are kept, decided once, from measurements."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, InvalidValue
from ..freezer import FreezeOut
from ..values import whole_number
from .files import FileStore
from .inputs import Batch
from .pays import Survey, best_depths, measure_store, survey, why_none
from .store import ALIGNMENT, Store


class Depths:
    """The numbers of frozen layers behind which activations are kept.

    Args:
        asked: "auto": where measurements say that it pays and fits; "all": where it fits; or the
            depths themselves.
        samples: of the data set, those that this process sees.
        views: of each of them.
        dtype: of activations in store; None: the type they have.
        model: what is called, the freezer's model or a part of it.
        accumulate: batches for each optimizer step.

    Raises:
        InvalidValue, InvalidType: for depths that the model does not have.
    """

    def __init__(
        self,
        asked: str | Iterable[int],
        freezer: FreezeOut,
        samples: int,
        views: int,
        dtype: torch.dtype | None,
        model: nn.Module,
        accumulate: int = 1,
    ) -> None:
        self._freezer, self._dtype, self._model = freezer, dtype, model
        self._samples, self._views, self._accumulate = samples, views, accumulate
        self.keys = samples * views
        self._asked = asked if isinstance(asked, str) else "given"
        self._survey: Survey | None = None
        self._time = 0  # T of the batch surveyed, where there are sequences
        self.chosen: frozenset[int] | None = None  # None: not decided yet
        if not isinstance(asked, str):
            self.chosen = self._checked(asked)
        elif asked not in ("auto", "all"):
            raise InvalidValue(f"depths must be 'auto', 'all' or numbers, got {asked!r}")

    def __contains__(self, depth: int) -> bool:
        return self.chosen is not None and depth in self.chosen

    @property
    def is_surveyed(self) -> bool:
        """Whether sizes and times have been measured."""
        return self._survey is not None

    def decide(self, batch: Batch, store: Store) -> str | None:
        """Measure sizes and times of this batch, and choose for this store. Returns why none was
        chosen, if none was."""
        freezer = self._freezer
        is_open = self.chosen is None and self._asked == "auto"
        if is_open and max(self._visits(batch, store)[1:], default=0) <= 1:
            self.chosen = frozenset()  # nothing has to be measured
            return "samples do not come back once layers are frozen; freeze earlier or train longer"
        self._time = batch.time if batch.lengths is not None else 0
        self._survey = survey(self._model, freezer.layers, batch, store.serve_on, is_open)
        if self.chosen is not None:
            return None
        keys, count = self.keys, len(freezer.layers)
        sizes = [self._survey.bytes_at(depth, self._dtype) for depth in range(count)]
        fitting = [s if s and s * keys <= store.budget else None for s in sizes]
        if not any(fitting):  # part of the samples then, where they are smallest
            smallest = min((s for s in sizes if s), default=None)
            fitting = [s if s == smallest else None for s in sizes]
        if self._asked == "all":
            self.chosen = frozenset(depth for depth in range(1, count) if fitting[depth])
        else:
            # Where the run never stands, nothing would be served; but another frontier may do.
            stands = [s if d in freezer.timeline.depths else None for d, s in enumerate(fitting)]
            given = self._measured(batch, stands if any(stands) else fitting, store)
            self.chosen = frozenset(best_depths(*given))
            if not self.chosen and any(fitting):
                return f"by measurement it would not save time here: {why_none(*given)}"
        if self.chosen:
            return None
        return "no frozen layer's output has a row for each sample"

    def _measured(self, batch: Batch, sizes: list[int | None], store: Store) -> Any:
        """What `best_depths` takes."""
        assert self._survey is not None
        keys = self.keys
        folder = store.path if isinstance(store, FileStore) else None
        measured = {
            size: measure_store(size, batch.size, store.device, store.serve_on, folder, size * keys)
            for size in {s for s in sizes if s}
        }
        costs = [measured[size] if size else None for size in sizes]
        return self._survey.seconds, costs, self._visits(batch, store), keys / batch.size

    def _visits(self, batch: Batch, store: Store) -> list[float]:
        """How often each key is seen once the first 0 ... n - 1 layers are frozen: in whole passes
        over the data, since views may change between two of them only. What lies in a folder
        another run will see, too."""
        freezer = self._freezer
        if freezer.total_steps is None:  # as long as it takes
            reached = max(freezer.timeline.depths)
            return [math.inf if depth <= reached else 0.0 for depth in range(len(freezer.layers))]
        counts = freezer.timeline.counts(start=freezer.step_count)
        at_least = [sum(counts[depth:]) for depth in range(len(counts))]
        steps = self._samples / batch.size / self._accumulate  # of a pass
        others = int(isinstance(store, FileStore))
        return [count // steps / self._views + others for count in at_least]

    @property
    def reached(self) -> list[int]:
        """Depths that are kept and that the schedule reaches."""
        deepest = max(self._freezer.timeline.depths)
        return [depth for depth in range(1, deepest + 1) if depth in self]

    def record_bytes(self, length: int = 0) -> int:
        """Bytes to set aside for a sample's record, so that one of any depth fits; of a sequence
        of that length, if it is not 0."""
        assert self._survey is not None
        sizes = [self._survey.bytes_at(depth, self._dtype) or 0 for depth in self.reached]
        largest = max(sizes, default=0)
        size = -(-largest * length // self._time) if self._time and length else largest
        return -(-size // ALIGNMENT) * ALIGNMENT

    def state_dict(self) -> dict[str, Any]:
        """What was decided from measurements, so that a resumed run decides alike."""
        return {
            "depths": None if self.chosen is None else sorted(self.chosen),
            "layers": [layer.name for layer in self._freezer.layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` returned. CheckpointError if it is of other layers."""
        if not isinstance(state, Mapping) or {"depths", "layers"} - set(state):
            raise CheckpointError("this is no PrefixCache state")
        if state["layers"] != self.state_dict()["layers"]:
            raise CheckpointError("the PrefixCache state is of other layers")
        if state["depths"] is not None:
            self.chosen = self._checked(state["depths"])

    def _checked(self, depths: Iterable[int]) -> frozenset[int]:
        chosen = frozenset(whole_number("depths", depth) for depth in depths)
        count = len(self._freezer.layers)
        for depth in chosen:
            if not 1 <= depth < max(count, 2):
                raise InvalidValue(f"depths must be in 1..{count - 1}, got {depth}")
        return chosen
