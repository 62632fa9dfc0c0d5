"""`EstimateConfig`: the options of `freezeout estimate`. Torch is not imported here, so that the
command line answers at once."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import InvalidType, InvalidValue
from ...plan import Plan
from ...schedule import HowScale, Schedule
from ...values import whole_number
from ..config import PRECISIONS, check_number
from ..frozen import frozen_plan

_TIME = re.compile(r"(?=.)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_UNITS = (3600, 60, 1)  # seconds of an hour, a minute, a second


@dataclass(frozen=True)
class EstimateConfig:
    """What FreezeOut would save: time, FLOPs and memory of a run, before it is made.

    The step is counted without memory for weights, then measured on the device (50 steps at most).
    """

    model: str = "densenet"
    """densenet, wrn, vgg, timm:NAME, or MODULE:FUNCTION of your own, which takes nothing and
    returns a model and its example inputs, a batch as in training."""
    depth: int | None = None
    """Layers of the network: 76 for densenet, 40 for wrn, 16 for vgg if not given."""
    growth: int | None = None
    """densenet: channels that a unit adds (12 if not given)."""
    widen_factor: int | None = None
    """wrn: width multiplier (4 if not given)."""
    classes: int = 10
    """Classes that the network tells apart; a function's model has its own."""
    batch_size: int = 50
    """Images a step; a function's inputs have their own."""
    images: int = 45_000
    """Items in the training set."""
    epochs: int = 100
    """Passes over them."""
    optimizer: str = "SGD"
    """A class of torch.optim, for its memory and its time; SGD has momentum."""
    lr: float = 0.1
    """Base learning rate."""
    t_0: float = 0.8
    """When the first layer freezes, as a fraction of the run before --how-scale's power."""
    how_scale: str = "cubic"
    """linear, squared or cubic: the power that freeze times are raised to."""
    scale_lr: bool = True
    """Start early layers at higher rates, so that every layer's rates have the same sum."""
    frozen: str | None = None
    """First layers frozen from the start: a number (5), all but the last ones (-1), a share (0.5),
    or a module's name (layer1); the freeze times are those of the rest."""
    compare: bool = False
    """All strategies, t_0 from 0.3 to 0.9, in place of one."""
    target_saving: float | None = None
    """Find the t_0 that saves this share of the time, such as 0.2."""
    time_budget: str | None = None
    """Find the number of epochs that fit into this time, such as 2h, 90m or 1h30m."""
    measure: bool = True
    """Measure seconds; --no-measure only counts, which takes no memory."""
    cache: bool = False
    """As if the results of frozen layers were read from memory, not computed again."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the first accelerator, else the CPU."""
    precision: str = "auto"
    """fp32, bf16, or auto: as `freezeout train`, and fp32 for a function's model."""
    json: bool = False
    """Print JSON, not tables."""
    plot: Path | None = None
    """Draw costs, freeze times and what is saved into this file (.png, .svg or .pdf)."""

    def check(self) -> None:
        """Raise InvalidValue or InvalidType for the first value that is not allowed."""
        for name in ("classes", "batch_size", "images", "epochs"):
            whole_number(name, getattr(self, name))
        check_number("lr", self.lr, 0, math.inf, above=True)
        if self.precision not in PRECISIONS:
            raise InvalidValue(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        _ = self.plan
        if self.target_saving is not None:
            if isinstance(self.target_saving, bool) or not 0 < self.target_saving < 1:
                raise InvalidValue(
                    f"target_saving must be a share in (0, 1), such as 0.2, "
                    f"got {self.target_saving}"
                )
            if self.compare:
                raise InvalidValue("give either compare or target_saving, not both")
        if self.time_budget is not None:
            _ = self.budget_seconds
            if not self.measure:
                raise InvalidValue("time_budget needs measured seconds: leave out --no-measure")
        if self.cache and not self.measure:
            raise InvalidValue("cache needs measured seconds: leave out --no-measure")
        if self.plot is not None:
            if self.plot.suffix not in (".png", ".svg", ".pdf"):
                raise InvalidValue(f"plot must end in .png, .svg or .pdf, got {self.plot}")
            if not self.plot.absolute().parent.is_dir():
                raise InvalidValue(f"plot's folder {self.plot.parent} does not exist")

    @property
    def schedule(self) -> Schedule:
        """Of the layers that are not frozen from the start."""
        how_scale: HowScale = self.how_scale  # type: ignore[assignment]  # Schedule checks it
        return Schedule(self.t_0, how_scale, self.scale_lr)

    @property
    def plan(self) -> Plan:
        """What trains when, as the options describe it."""
        return self.schedule if self.frozen is None else frozen_plan(self.frozen, self.schedule)

    @property
    def budget_seconds(self) -> float:
        """`time_budget` in seconds. InvalidValue if it is no time."""
        text = self.time_budget or ""
        if not isinstance(text, str):
            raise InvalidType(f"time_budget must be a text such as 2h, got {text!r}")
        found = _TIME.fullmatch(text.replace(" ", ""))
        parts = found.groups() if found else ()
        total = sum(
            float(part or 0) * size for part, size in zip(parts, (3600, 60, 1), strict=False)
        )
        if not total > 0:
            raise InvalidValue(
                f"time_budget must be a time such as 2h, 90m, 45s or 1h30m, got {text!r}"
            )
        return total
