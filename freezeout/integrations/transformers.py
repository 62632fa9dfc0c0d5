"""FreezeOut in Hugging Face's Trainer:

trainer = Trainer(model, args, train_dataset=data, callbacks=[FreezeOutTrainerCallback()])
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from ..cache import Indexed
from ..cache.inputs import Itself
from ..errors import CheckpointError, FreezeOutError, InvalidValue
from ..freezer import thaw
from ..parallel import check_ranks_agree
from .adapter import Adapter
from .caching import RunCache


class FreezeOutTrainerCallback(Adapter, TrainerCallback, ExportableState):
    """Anneals and freezes a model's layers, one after another (see `FreezeOut`).

        callback = FreezeOutTrainerCallback(Schedule(t_0=0.5))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])

    Each layer's learning rate is the Trainer's times the layer's factor: with
    `lr_scheduler_type="constant"` that is the paper's. Layers are found in the first training
    step's forward pass. Checkpoints hold the state, in `trainer_state.json`. After `train()` the
    model is an ordinary one again, everything trainable.

    With `cache=True` frozen layers are not computed again: each sample's activation is kept, and
    served in training and in evaluation on a fixed set. `callback.cache` is the `PrefixCache`.

    Logs get `freezeout/num_frozen` and `freezeout/saved_share`, the share of the steps' time that
    freezing has saved.
    """

    _of_run = ("_hook", "_numbers", "_evaluated", "_trainer")
    _hook: RemovableHandle | None = None
    _trainer: Trainer | None = None  # while it trains
    _numbers: deque[Any]  # of the batches that are to be trained on next
    _evaluated: tuple[Any, Any] = None, None  # numbers of a batch, and of which set
    cache_state: dict[str, Any] | None = None
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
        cache_state: Any = None
        if state.global_step:
            callbacks: Any = state.stateful_callbacks
            saved = callbacks.get(type(self).__name__)
            if saved is None:
                raise CheckpointError(
                    f"the checkpoint, of step {state.global_step}, was saved without "
                    "FreezeOutTrainerCallback; start from its weights instead, or go on without "
                    "the callback"
                )
            cache_state = saved["attributes"].get("cache_state")
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
        if self._cache_options is not None and self._trainer is not None:
            caching = RunCache(
                self._cache_options,
                lambda: self.freezer,
                self._trainer.accelerator.autocast,
                args.gradient_accumulation_steps,
            )
            self._caching, caching.state, caching.before_call = caching, cache_state, begin
            self._numbers.clear()
            if args.torch_compile:
                caching.refuse(
                    "TrainingArguments(torch_compile=True) compiles the model as a whole"
                )
            else:
                caching.number(others["train_dataloader"])
                caching.attach(model)

    def on_epoch_begin(self, *args: Any, **others: Any) -> None:
        if self._trainer is not None:
            self._numbers.clear()

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
        if self._caching is not None:
            self._caching.end()
        super()._end()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the arguments that make another callback like this one, and
        the freezer's state."""
        return {
            "args": self._options(),
            "attributes": {
                "freezer_state": None if self.freezer is None else self.freezer.state_dict(),
                "cache_state": None if self.cache is None else self.cache.state_dict(),
            },
        }

    @contextmanager
    def _driving(self, trainer: Trainer) -> Iterator[None]:
        """While a Trainer trains: numbers are taken off its batches, and it is said for which
        batch it calls the model. In the end all is as it was."""
        self._trainer, self._numbers = trainer, deque()
        names = ("get_batch_samples", "training_step", "get_eval_dataloader", "prediction_step")
        kept = {name: vars(trainer).get(name) for name in names}
        own = {name: getattr(trainer, name) for name in names}

        def get_batch_samples(batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            return own["get_batch_samples"](map(self._taken, batches), *args, **kwargs)

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert self._caching is not None
            if isinstance(inputs, Indexed):  # from a loop of one's own
                inputs = self._taken(inputs)
            with self._caching.step(self._numbers.popleft() if self._numbers else None):
                return own["training_step"](model, inputs, *args, **kwargs)

        def get_eval_dataloader(eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
            loader = own["get_eval_dataloader"](eval_dataset, *args, **kwargs)
            if self._caching is None:
                return loader
            if eval_dataset is None or eval_dataset is trainer.eval_dataset:
                eval_dataset = "evaluation"
            name = eval_dataset if isinstance(eval_dataset, str) else Itself(eval_dataset)
            self._caching.number(loader, name)
            return _Taken(loader, partial(self._evaluating, name))

        def prediction_step(*args: Any, **kwargs: Any) -> Any:
            assert self._caching is not None
            with self._caching.step(*self._evaluated):
                return own["prediction_step"](*args, **kwargs)

        try:
            if self._cache_options is not None:
                vars(trainer).update(
                    get_batch_samples=get_batch_samples,
                    training_step=training_step,
                    get_eval_dataloader=get_eval_dataloader,
                    prediction_step=prediction_step,
                )
            yield
        finally:
            self._end()
            self._trainer = None
            if self._cache_options is not None:
                for name, value in kept.items():
                    vars(trainer).pop(name)
                    if value is not None:
                        vars(trainer)[name] = value

    def _taken(self, batch: Any) -> Any:
        """The batch without its numbers, which are kept for its step."""
        assert self._caching is not None
        batch, ids = self._caching.take(batch)
        self._numbers.append(ids)
        return batch

    def _evaluating(self, name: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches without their numbers; while one is worked on, they are `_evaluated`."""
        assert self._caching is not None
        self._caching.evaluation_begins()
        try:
            for each in batches:
                batch, ids = self._caching.take(each)
                self._evaluated = ids, name
                yield batch
        finally:
            self._evaluated = None, None


class _Taken:
    """A loader whose batches pass through a function; for the rest, it is the loader."""

    def __init__(self, loader: Any, through: Callable[[Iterator[Any]], Iterator[Any]]) -> None:
        self._loader, self._through = loader, through

    def __iter__(self) -> Iterator[Any]:
        return self._through(iter(self._loader))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _released_in_the_end(train: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.train`, after which the model is an ordinary one, also after an exception or Ctrl-C,
    of which the Trainer tells its callbacks nothing."""

    @wraps(train)
    def released(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FreezeOutTrainerCallback):
                    stack.enter_context(callback._driving(self))
            return train(self, *args, **kwargs)

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
