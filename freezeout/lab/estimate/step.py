"""What one training step costs at every depth: counted, and measured if that is asked for."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...cache.pays import measure_store, survey
from ...cost import with_cache
from ...errors import FreezeOutError, InvalidValue
from ...profile import (
    Memory,
    StepCount,
    count_step,
    measure_step_costs,
    predict_memory,
)
from ...profile.fake import faked
from ...words import duration, first_line, size
from ..device import hardware
from .config import EstimateConfig
from .subject import Subject, build, moved

_READ_BYTES = 32 * 2**20  # of the batch whose reading is measured


@dataclass(frozen=True)
class LayerCost:
    """One layer: its parameters, and its share of the FLOPs of a full step."""

    name: str
    parameters: int
    forward_flops: int
    backward_flops: int  # that its freezing spares


@dataclass(frozen=True)
class CountedStep:
    """What is known of a training step without making one, at every depth k = 0 ... n - 1.

    Attributes:
        given, frozen: how many layers are frozen from the start in an ordinary run, because the
            model comes so, and in the others.
    """

    layers: tuple[LayerCost, ...]
    given: int
    frozen: int
    count: StepCount
    memory: Memory
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Step(CountedStep):
    """A step that may have been measured as well.

    Attributes:
        seconds: measured; None: only counted. cached_seconds: if frozen results were read.
    """

    seconds: tuple[float, ...] | None
    cached_seconds: tuple[float, ...] | None

    @property
    def costs(self) -> list[float]:
        """Seconds if they were measured, FLOPs otherwise."""
        return self.count.step_costs() if self.seconds is None else list(self.seconds)


def step_of(
    config: EstimateConfig,
    device: torch.device,
    remarks: list[str],
    say: Callable[[str], None],
) -> Step:
    """The step of the model that `config` names. Raises as `estimate` does.

    Args:
        remarks: to which lines for a person are added.
        say: told what is being done.
    """
    say("counting FLOPs and memory of one step")
    counted, reason = _without_memory(config, device)
    if counted is None and not config.measure:
        raise InvalidValue(
            f"{config.model} cannot be counted without real tensors ({reason}); leave out "
            "--no-measure"
        )
    if not config.measure and counted is not None:
        return Step(**vars(counted), seconds=None, cached_seconds=None)
    with _real_mistakes(config, device, counted):
        with torch.device(device):
            built = build(config)
        subject = Subject(config, moved(built, device), device)
        if counted is None:
            remarks.append(f"counted with real tensors, since it does not run without ({reason})")
            counted = _counted(subject)
        say(f"measuring it on {hardware(device)}")
        start = time.perf_counter()
        shape = counted.count.step_costs()
        seconds = measure_step_costs(subject.step, subject.layers, shape=shape, device=device)
        cached = _cached(subject, seconds, device) if config.cache else None
        say(f"measured in {duration(time.perf_counter() - start)}")
    return Step(**vars(counted), seconds=tuple(seconds), cached_seconds=cached)


def _without_memory(
    config: EstimateConfig, device: torch.device
) -> tuple[CountedStep | None, str | None]:
    """The counts, from tensors without memory; or None and why there are none."""
    try:
        with torch.device("meta"):
            built = build(config)
        model, inputs = moved(built, torch.device("meta"))
        with faked(model, inputs, device) as inputs:
            return _counted(Subject(config, (model, inputs), device)), None
    except Exception as error:  # what a foreign model does with such tensors: anything
        if isinstance(error, FreezeOutError) and error.__cause__ is None:
            raise  # of ours, and true of real tensors as well
        return None, (first_line(error) or type(error).__name__).rstrip(".")


def _counted(subject: Subject) -> CountedStep:
    count = count_step(subject.model, subject.layers, subject.loss)
    memory = predict_memory(
        subject.step,
        subject.model,
        subject.layers,
        subject.optimizer,
        subject.batch,
        count.saved_bytes,
    )
    spared = [before - after for before, after in pairwise((*count.backward, 0))]
    layers = tuple(
        LayerCost(layer.name, sum(p.numel() for p in layer.parameters), forward, backward)
        for layer, forward, backward in zip(subject.layers, count.forward, spared, strict=True)
    )
    return CountedStep(
        layers,
        subject.given,
        subject.frozen,
        count,
        memory,
        subject.batch_size,
        subject.precision,
    )


@contextmanager
def _real_mistakes(
    config: EstimateConfig, device: torch.device, counted: CountedStep | None
) -> Iterator[None]:
    """What goes wrong in a model's own step, as one line."""
    try:
        yield
    except FreezeOutError:
        raise
    except torch.OutOfMemoryError as error:
        needed = f", which needs {size(counted.memory.steps[0].peak)}" if counted else ""
        raise InvalidValue(
            f"a training step of {config.model}{needed}, does not fit into the memory of {device}; "
            "take fewer items a step, or --no-measure"
        ) from error
    except Exception as error:  # the user's own code: anything
        said = first_line(error) or "no message"
        raise InvalidValue(
            f"a training step of {config.model} failed with {type(error).__name__}: {said}"
        ) from error
    finally:
        gc.collect()


def _cached(subject: Subject, seconds: list[float], device: torch.device) -> tuple[float, ...]:
    """Seconds of a step at each depth if the frozen layers' results were read from memory."""
    with subject.autocast():
        found = survey(subject.model, subject.layers, subject.as_batch(), device)
    # A byte, as the cache reads rows of a large tensor into a batch.
    row = max(1, _READ_BYTES // subject.batch_size)
    cpu = torch.device("cpu")
    reading, *_ = measure_store(row, subject.batch_size, cpu, device, folder=None, total=0)
    prefix, read = [0.0], [0.0]
    for depth in range(1, len(seconds)):
        held = found.bytes_at(depth, None)  # None: what an earlier depth gave is read
        prefix.append(prefix[-1] if held is None else found.seconds[depth])
        read.append(read[-1] if held is None else held / row * reading)
    return tuple(with_cache(seconds, prefix, read))
