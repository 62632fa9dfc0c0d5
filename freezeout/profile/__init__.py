"""What one training step costs at each depth: counted FLOPs, measured seconds, predicted memory."""

from .counted import StepCount, count_step
from .memory import Memory, StepMemory, peak_bytes, predict_memory
from .seconds import measure_step_costs

__all__ = [
    "Memory",
    "StepCount",
    "StepMemory",
    "count_step",
    "measure_step_costs",
    "peak_bytes",
    "predict_memory",
]
