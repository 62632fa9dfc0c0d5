"""FreezeOut in Hugging Face's Trainer:

trainer = Trainer(model, args, train_dataset=data, callbacks=[FreezeOutTrainerCallback()])
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from ..errors import CheckpointError, FreezeOutError, InvalidValue
from ..freezer import thaw
from ..parallel import check_ranks_agree
from .adapter import Adapter


class FreezeOutTrainerCallback(Adapter, TrainerCallback, ExportableState):
    """Anneals and freezes a model's layers, one after another (see `FreezeOut`).

        callback = FreezeOutTrainerCallback(Schedule(t_0=0.5))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])

    Each layer's learning rate is the Trainer's times the layer's factor: with
    `lr_scheduler_type="constant"` that is the paper's. Layers are found in the first training
    step's forward pass. Checkpoints hold the state, in `trainer_state.json`. After `train()` the
    model is an ordinary one again, everything trainable.

    Logs get `freezeout/num_frozen` and `freezeout/saved_share`, the share of the steps' time that
    freezing has saved.
    """

    _of_run = ("_hook",)
    _hook: RemovableHandle | None = None
    freezer_state: dict[str, Any] | None = None  # what a Trainer that restores callbacks sets

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        # Before the Trainer builds an optimizer of what requires a gradient.
        if model is not None:
            thaw(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **others: Any,
    ) -> None:
        assert model is not None
        assert optimizer is not None
        self._end()
        self.freezer = None
        _refuse(args)
        saved: Any = None
        if state.global_step:
            callbacks: Any = state.stateful_callbacks
            saved = callbacks.get(type(self).__name__)
            if saved is None:
                raise CheckpointError(
                    f"the checkpoint, of step {state.global_step}, was saved without "
                    "FreezeOutTrainerCallback; start from its weights instead, or go on without "
                    "the callback"
                )
            saved = saved["attributes"]["freezer_state"]
        total = state.max_steps if self.total_steps is None else self.total_steps

        def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                self._unhook()
                freezer = self._start(
                    model, optimizer, total, example_inputs=(inputs, named), state=saved
                )
                check_ranks_agree(freezer)

        self._hook = model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)

    def on_pre_optimizer_step(self, *args: Any, **others: Any) -> None:
        if self.freezer is None:
            raise FreezeOutError(
                "the model itself was not called in the first training step (by a compute_loss() "
                "that calls parts of it?), so that its layers cannot be found"
            )

    def on_step_end(self, *args: Any, **others: Any) -> None:
        assert self.freezer is not None
        self.freezer.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            figures = self._figures()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(self, *args: Any, **others: Any) -> None:
        self._end()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _end(self) -> None:
        self._unhook()
        super()._end()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the arguments that make another callback like this one, and
        the freezer's state."""
        return {
            "args": self._options(),
            "attributes": {
                "freezer_state": None if self.freezer is None else self.freezer.state_dict()
            },
        }


def _released_in_the_end(train: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.train`, after which the model is an ordinary one, also after an exception or Ctrl-C,
    of which the Trainer tells its callbacks nothing."""

    @wraps(train)
    def released(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FreezeOutTrainerCallback):
                    callback._end()

    return released


Trainer.train = _released_in_the_end(Trainer.train)  # type: ignore[method-assign]


def _refuse(args: TrainingArguments) -> None:
    """What would not freeze, or not without an error that says nothing."""
    if args.fsdp or args.deepspeed:
        raise InvalidValue("FreezeOutTrainerCallback does not work with FSDP or DeepSpeed")
    if args.n_gpu > 1:
        raise InvalidValue(
            f"FreezeOutTrainerCallback does not work with DataParallel, which the Trainer uses on "
            f"{args.n_gpu} GPUs in one process: start it with torchrun, or show it one GPU"
        )
    if args.parallel_mode is ParallelMode.DISTRIBUTED:
        unused = args.ddp_find_unused_parameters
        if args.ddp_static_graph or not (
            not args.activation_checkpointing if unused is None else unused
        ):
            raise InvalidValue(
                "DistributedDataParallel would wait for gradients of frozen layers: give "
                "TrainingArguments(ddp_find_unused_parameters=True), without ddp_static_graph"
            )
