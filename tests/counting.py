"""A step counted literally: at each depth the layers are really frozen and the step is made."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from freezeout import Layer
from freezeout.layers.trace import ExampleInputs, call_arguments
from freezeout.profile.counted import flop_counter


def loss_of(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Tensor]:
    """One number from all that the model returns."""
    args, kwargs = call_arguments(inputs)

    def loss() -> Tensor:
        output = model(*args, **kwargs)
        tensors = tree_leaves(dict(output) if isinstance(output, dict) else output)
        results = [
            v
            for v in tensors
            if isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad
        ]
        return torch.stack([result.float().mean() for result in results]).sum()

    return loss


def count_literally(
    model: nn.Module, layers: Sequence[Layer], loss: Callable[[], Tensor], batch: ExampleInputs
) -> tuple[list[int], list[int], list[int]]:
    """FLOPs forward, FLOPs backward and bytes saved for backward, for k = 0 ... n - 1."""
    forward, backward, saved = [], [], []
    own = [*model.parameters(), *model.buffers()]
    own += [v for v in tree_leaves(call_arguments(batch)) if isinstance(v, Tensor)]
    excluded = {tensor.untyped_storage()._cdata for tensor in own}
    for depth in range(len(layers)):
        for layer in layers[:depth]:
            layer.freeze()
        kept: list[tuple[StorageWeakRef, int, int]] = []  # with its address and size

        def keep(tensor: Tensor, kept: list[Any] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            kept.append((reference, storage._cdata, storage.nbytes()))
            return tensor

        with flop_counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                value = loss()
            forward.append(counter.get_total_flops())
            held = {
                address: size
                for reference, address, size in kept
                if not reference.expired()  # type: ignore[no-untyped-call]
            }
            saved.append(sum(size for key, size in held.items() if key not in excluded))
            torch.autograd.backward(value)
            backward.append(counter.get_total_flops() - forward[-1])
        for parameter in model.parameters():
            parameter.grad = None
    for layer in layers:
        layer.unfreeze()
    return forward, backward, saved
