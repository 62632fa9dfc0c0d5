"""FreezeOut in Lightning:

    trainer = Trainer(callbacks=[FreezeOutCallback()])

Lightning calls a module's `training_step`, not the module, and calls it inside of
`optimizer.step(closure)`. So the layers are found in the first training step itself, while it
runs, and its closure is called before the optimizer's step, in which FreezeOut then takes part.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..cache.plan import CallsOf
from ..errors import CheckpointError, FreezeOutError, InvalidValue
from ..freezer import thaw
from ..layers import Layer, Trace
from ..layers.names import from_names, to_names
from ..layers.trace import rows_of
from ..parallel import check_ranks_agree, rewrap
from .adapter import Adapter
from .caching import Outermost, RunCache


class FreezeOutCallback(Adapter, Callback):
    """Anneals and freezes the layers of a LightningModule, one after another (see `FreezeOut`).

        trainer = Trainer(max_epochs=10, callbacks=[FreezeOutCallback(Schedule(t_0=0.5))])

    With automatic and manual optimization, on one device or with the DDP strategy. Layers are
    found with the module's `example_input_array` if it has one, else in the first training step;
    those that are frozen from the start are, in that case, told by the order of definition, which
    the first step then has to bear out.
    Checkpoints hold its state. After `fit` the module is an ordinary one again: what you did not
    freeze yourself is trainable. A batch in which an optimizer made a step counts as one step.

    With `cache=True` frozen layers are not computed again: each sample's activation is kept, and
    served in training and in validation on a fixed set. `callback.cache` is the `PrefixCache`.
    What is served is the module that `training_step` calls and that holds the frozen layers.

    The progress bar shows how many layers are `frozen`. Loggers get `freezeout/num_frozen` and
    the shares that freezing has saved: `freezeout/flops_saved`, of the network's FLOPs, and
    `freezeout/saved_share`, of the steps' time where it can be told.
    """

    _of_run = ("_first", "_early", "_outermost", "_numbers")
    _state: dict[str, Any] | None = None  # of a checkpoint, or of the last fit
    _first: "_FirstStep | None" = None  # the first training step, while it is watched
    _early: tuple[Layer, ...] = ()  # frozen in it, before FreezeOut is built
    _outermost: Outermost | None = None  # what a step calls, while that is watched
    _numbers: tuple[Any, Any] = None, 0  # of the batch that goes on, and which loader's it is
    _counted = 0  # trainer.global_step when it was last looked at

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        thaw(pl_module)  # before optimizers are built of what requires a gradient
        if stage == "fit":
            _check_others(trainer, pl_module)
            if self._cache_options is not None:
                self._cache_in(trainer, pl_module, self._cache_options)

    def _cache_in(
        self, trainer: Trainer, pl_module: LightningModule, options: Mapping[str, Any]
    ) -> None:
        """Have loaders number their samples, when Lightning has made them what it wants and before
        it begins to draw from them; and take the numbers off each batch before anybody sees it."""
        caching = RunCache(
            options, lambda: self.freezer, accumulate=trainer.accumulate_grad_batches
        )
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            caching.refuse("the model is compiled as a whole")
            return
        self._caching = caching
        fit, evaluation = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
        before_first, set_up = fit._load_combined_loader_states, evaluation.setup_data

        def exchange(loaders: Any, others: list[Any]) -> None:
            caching.in_the_end(partial(setattr, loaders, "flattened", loaders.flattened))
            loaders.flattened = others

        def numbered() -> None:
            loaders = fit._combined_loader
            assert loaders is not None
            if isinstance(loaders.iterables, list | tuple | dict):
                caching.refuse("there are several training loaders, whose samples share numbers")
            else:
                exchange(loaders, [caching.numbered(loaders.flattened[0])])
            before_first()

        def set_up_numbered() -> None:
            set_up()
            loaders = evaluation._combined_loader
            if loaders is not None and loaders._mode == "sequential":
                pairs = enumerate(loaders.flattened)
                exchange(loaders, [caching.numbered(loader, number) for number, loader in pairs])

        def without_numbers(own: Any, args: Any, kwargs: Any) -> Any:
            (batch, *index), others = args, dict(kwargs)
            batch, ids = caching.take(batch)
            self._numbers = ids, index[0] if index else others.get("dataloader_idx", 0)
            return own(batch, *index, **others)

        # Not from hooks: under DDP, the module's own forward pass is made to be the step.
        def training_step(own: Any, args: Any, kwargs: Any) -> Any:
            (ids, _), self._numbers = self._numbers, (None, 0)
            if not trainer.training:  # from another step
                return own(*args, **kwargs)
            if ids is not None and caching.module is None and caching.is_wanted:
                self._outermost = Outermost(pl_module)
            try:
                with caching.step(ids):
                    return own(*args, **kwargs)
            finally:
                if self._outermost is not None:
                    self._outermost.remove()

        def validation_step(own: Any, args: Any, kwargs: Any) -> Any:
            (ids, name), self._numbers = self._numbers, (None, 0)
            with caching.step(ids, name):
                return own(*args, **kwargs)

        for owner, name, function in (
            (fit, "_load_combined_loader_states", numbered),
            (evaluation, "setup_data", set_up_numbered),
        ):
            vars(owner)[name] = function
            caching.in_the_end(partial(vars(owner).pop, name, None))
        for name, instead in (
            ("_on_before_batch_transfer", without_numbers),
            ("training_step", training_step),
            ("validation_step", validation_step),
        ):
            caching.in_the_end(CallsOf(pl_module, instead, name).end)

    def _attach_cache(self) -> None:
        """Serve what the step has called."""
        caching, watched = self._caching, self._outermost
        assert caching is not None
        self._outermost = None
        if watched is not None and self.freezer is not None:
            try:
                caching.attach(watched.served(self.freezer))
            except InvalidValue as error:
                caching.is_wanted = False
                caching.refuse(str(error))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._caching is not None:
            self._caching.evaluation_begins()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        self.freezer, self._first = None, None
        self._counted = trainer.global_step
        if self._counted == 0:
            self._state = None
        elif self._state is None:
            raise CheckpointError(
                f"the checkpoint, of step {self._counted}, was saved without FreezeOutCallback; "
                "start from its weights instead, or go on without the callback"
            )
        inputs = pl_module.example_input_array
        if self._state is not None:
            found = from_names(pl_module, self._state["layers"])
            self._begin(trainer, pl_module, found=found, state=self._state["freezer"])
            if self._caching is not None:
                self._caching.state = self._state.get("cache")
        elif inputs is not None:
            inputs = trainer.strategy.batch_to_device(
                trainer.precision_plugin.convert_input(inputs)
            )
            self._begin(trainer, pl_module, example_inputs=inputs)
        else:
            self._freeze_early(trainer, pl_module)
            self._first = _FirstStep(
                pl_module,
                trainer.optimizers,
                lambda trace: self._begin(trainer, pl_module, example_inputs=trace),
            )

    def _begin(self, trainer: Trainer, pl_module: LightningModule, **how: Any) -> None:
        self._first = None
        early, self._early = self._early, ()
        for layer in early:
            layer.unfreeze()
        wrapper = trainer.strategy.model
        if wrapper is not pl_module and not isinstance(wrapper, DistributedDataParallel):
            raise InvalidValue(
                "FreezeOutCallback works on one device and with the DDP strategy, not with "
                f"{type(trainer.strategy).__name__}"
            )
        total = self._total(trainer)
        with _length_asked_for(total):
            freezer = self._start(pl_module, trainer.optimizers, total, **how)
        check_ranks_agree(freezer)
        if freezer.num_frozen and not early:
            self._rewrap(trainer)

    def _total(self, trainer: Trainer) -> int | None:
        total = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        return total if isinstance(total, int) and total > 0 else None

    def _freeze_early(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Layers that are frozen from the start are so in the first training pass, too."""
        try:
            self._early = tuple(
                self._frozen_from_start(pl_module, trainer.optimizers, self._total(trainer))
            )
        except FreezeOutError:
            return  # the first step will tell more
        trained = any(p.requires_grad for layer in self._early for p in layer.parameters)
        for layer in self._early:
            layer.freeze(pl_module)
        if trained:
            self._rewrap(trainer)

    def _rewrap(self, trainer: Trainer) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model = rewrap(trainer.strategy.model)

    def _check_early(self, trainer: Trainer, pl_module: LightningModule, trace: Trace) -> None:
        """InvalidValue unless the first training pass bears out which layers are frozen in it."""
        assert self._first is not None
        for layer in self._early:
            layer.unfreeze()
        total = self._total(trainer)
        with self._first.untoggled(), _length_asked_for(total):
            found = self._frozen_from_start(pl_module, trainer.optimizers, total, trace)
        for layer in self._early:
            layer.freeze(pl_module)
        ahead = set(trace.ahead(pl_module))  # with the last layer, which is not frozen
        if [_parts(layer) for layer in found] != [_parts(layer) - ahead for layer in self._early]:
            raise InvalidValue(
                "layers are to be frozen from the start, and the order in which modules are "
                "defined does not tell which: give the module an example_input_array"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first is not None:
            self._first.forward_begins(batch)
        if self.freezer is not None:
            self.freezer.forward_begins()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._first is not None:
            trace = self._first.forward_ended()
            if trace is not None:
                self._check_early(trainer, pl_module, trace)
        if self.freezer is not None:
            self.freezer.forward_ended(loss)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._first is not None:
            self._first.batch_ended()
        if self._caching is not None:
            self._attach_cache()
        if self.freezer is None:
            return
        if trainer.global_step > self._counted and self.freezer.step():
            self._rewrap(trainer)
        self._counted = trainer.global_step
        pl_module.log("frozen", float(self.freezer.num_frozen), prog_bar=True, logger=False)
        for name, value in self._figures().items():
            pl_module.log(name, value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.freezer is None or trainer.should_stop:  # early
            return
        made, planned = self.freezer.step_count, self.freezer.total_steps
        if planned is not None and self.freezer.is_unfinished:
            warnings.warn(
                f"the run made {made} steps, but its schedule was for {planned}: layers froze too "
                f"late, and learning rates did not reach zero; give FreezeOutCallback("
                f"total_steps={made})",
                stacklevel=2,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._first is not None:
            self._first.leave()
            self._first = None
        self._state = self.state_dict() or None
        self._outermost = None
        if self._caching is not None:
            self._caching.end()
        self._end()
        if self._early:
            self._early = ()
            thaw(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        if self.freezer is None:
            return self._state or {}
        return {
            "freezer": self.freezer.state_dict(),
            "layers": to_names(self.freezer.model, self.freezer.layers),
            **({} if self.cache is None else {"cache": self.cache.state_dict()}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict


def _check_others(trainer: Trainer, pl_module: LightningModule) -> None:
    """InvalidValue for callbacks that compute norms' statistics anew, or thaw layers."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    thawing = [c for c in callbacks if isinstance(c, BaseFinetuning)]
    if thawing:
        raise InvalidValue(
            f"{type(thawing[0]).__name__} thaws layers during the run and adds them to the "
            "optimizer, where FreezeOutCallback drives what is there when training starts; leave "
            "out one of the two. For layers that stay frozen, give FreezeOutCallback(Frozen(...)), "
            "or call requires_grad_(False) on them in the module"
        )
    averaging = [c for c in callbacks if isinstance(c, StochasticWeightAveraging)]
    if averaging and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pl_module.modules()
    ):
        raise InvalidValue(
            f"{type(averaging[0]).__name__} resets the statistics of norms, and adds an epoch to "
            "compute them anew, in which frozen norms would stand still; use WeightAveraging or "
            "EMAWeightAveraging with FreezeOutCallback, which average a copy, or leave out one "
            "of the two"
        )


@contextmanager
def _length_asked_for(total_steps: int | None) -> Iterator[None]:
    """Where a plan needs the length of the run and Lightning does not know it: what to do."""
    try:
        yield
    except InvalidValue as error:
        if total_steps is not None or "total_steps" not in str(error):
            raise
        raise InvalidValue(
            f"{error}; how many steps the run will make is not known: give "
            "Trainer(max_steps=...), or FreezeOutCallback(total_steps=...)"
        ) from error


def _parts(layer: Layer) -> set[Any]:
    return {*layer.modules, *layer.parameters}


class _FirstStep:
    """Records the first training step's forward pass, then calls `build` with the record, before
    any optimizer's first step."""

    def __init__(
        self,
        module: LightningModule,
        optimizers: list[Optimizer],
        build: Callable[[Trace], None],
    ) -> None:
        self._module, self._build = module, build
        self._trace: Trace | None = None  # of a whole forward pass
        self._recording: tuple[Trace, ExitStack] | None = None
        # Inside of toggle_optimizer() parameters of other optimizers require no gradient.
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._own_steps = [(each, each.__dict__.get("step")) for each in optimizers]
        for optimizer in optimizers:
            optimizer.step = self._after_closure(optimizer)  # type: ignore[method-assign]

    def forward_begins(self, batch: Any) -> None:
        if self._trace is None and self._recording is None:
            trace, stack = Trace.recorder(), ExitStack()
            trace.rows = rows_of(batch)
            stack.enter_context(trace.listening(self._module, running=True))
            self._recording = trace, stack

    def forward_ended(self) -> Trace | None:
        """The record, if this ends the first forward pass."""
        if self._recording is None:
            return None
        self._trace, stack = self._recording
        self._recording = None
        stack.close()
        return self._trace

    @contextmanager
    def untoggled(self) -> Iterator[None]:
        """Inside, what is trained requires a gradient, whatever toggle_optimizer() has done."""
        held = [p for p in self._trained if not p.requires_grad]
        for parameter in held:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in held:
                parameter.requires_grad_(False)

    def batch_ended(self) -> None:
        """Without a loss, if it is still being recorded."""
        if self._recording is not None:
            self._recording[1].close()
            self._recording = None

    def leave(self) -> None:
        self.batch_ended()
        for optimizer, own in self._own_steps:
            optimizer.__dict__.pop("step", None)
            if own is not None:
                optimizer.__dict__["step"] = own
        self._own_steps = []

    def _after_closure(self, optimizer: Optimizer) -> Callable[..., Any]:
        step = optimizer.step

        @wraps(step)
        def first(*args: Any, **kwargs: Any) -> Any:
            if args:
                kwargs["closure"] = args[0]
            closure = kwargs.get("closure")
            if closure is not None:
                result = closure()
                kwargs["closure"] = lambda: result
            if self._trace is None:
                if not self._module.automatic_optimization:
                    raise FreezeOutError(
                        "an optimizer made a step, but manual_backward() was not called: call "
                        "self.manual_backward(loss), or give the module an example_input_array"
                    )
                return step(**kwargs)  # training_step() gave no loss
            self.leave()
            with self.untoggled():
                self._build(self._trace)
            return optimizer.step(**kwargs)

        return first
