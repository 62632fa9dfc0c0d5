"""`estimate`: a step counted, measured, and made into what whole runs cost."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..device import choose_device, hardware, versions
from .config import EstimateConfig
from .run import Run, runs_of
from .step import Step, step_of


@dataclass(frozen=True)
class Estimate:
    """What `freezeout estimate` tells: one step, runs (the ordinary one first), and remarks."""

    model: str
    hardware: str
    optimizer: str
    step: Step
    runs: tuple[Run, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "versions": versions()}


def estimate(config: EstimateConfig, say: Callable[[str], None] = lambda text: None) -> Estimate:
    """Count and measure one step of the model that `config` names, and predict whole runs.

    Args:
        say: told what is being done.

    Raises:
        FreezeOutError: anything in the configuration, the model or the device that is not so,
            and targets that cannot be reached.
    """
    config.check()
    device = choose_device(config.device)
    remarks: list[str] = []
    step = step_of(config, device, remarks, say)
    runs = runs_of(config, step, remarks)
    machine = hardware(device) if config.measure else "counted, not measured"
    return Estimate(config.model, machine, config.optimizer, step, tuple(runs), tuple(remarks))
