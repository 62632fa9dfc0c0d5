"""What the tests and benchmarks of predicted memory measure on real steps."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from freezeout import Layer


def resident(model: nn.Module, optimizer: Optimizer, batch: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that are there between two steps."""
    states = [v for state in optimizer.state.values() for v in state.values()]
    state = [v for v in states if isinstance(v, Tensor)]
    return [*model.parameters(), *model.buffers(), *state, *batch]


def freeze(layers: Sequence[Layer], optimizer: Optimizer) -> None:
    """As FreezeOut does: the optimizer forgets what it holds of their parameters."""
    for layer in layers:
        layer.freeze()
        for parameter in layer.parameters:
            optimizer.state.pop(parameter, None)


def allocator_peak_bytes(step: Callable[[], object], tensors: Iterable[Tensor]) -> int:
    """Bytes of `tensors`, there before the step, and the most that torch's CPU allocator had
    handed out at once in it, workspaces of single operations included."""
    # Without acc_events torch 2.11 warns that there may be more cycles than one.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + most
