"""What is estimated: a model with a batch, an optimizer and a loss, on one device or on none."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from ...cache.inputs import Batch
from ...errors import InvalidValue
from ...freezer import FreezeOut
from ...layers.trace import call_arguments
from ...plan import Plan
from ...words import first_line
from ..device import choose_precision
from ..frozen import check_named
from ..models import build_model, model_layers
from .config import EstimateConfig

Built = tuple[nn.Module, Any]  # a model, and its example inputs


class Subject:
    """One training step of the model that the options name.

    Attributes:
        model: in training mode. layers: that freeze. optimizer: over its parameters.
        given: how many layers, the first ones, the model's maker has frozen. frozen: how many are
            frozen from the start, these or by the option `frozen`.
        batch: the step's tensors, in any structure. batch_size: how many items it has.
        precision: "fp32" or "bf16".
    """

    def __init__(self, config: EstimateConfig, built: Built, device: torch.device) -> None:
        self.model, inputs = built
        self._is_own = ":" in config.model and not config.model.startswith("timm:")
        asked = "fp32" if self._is_own and config.precision == "auto" else config.precision
        self.precision = choose_precision(asked, device)
        self._device = device
        self.model.train()
        self._args, self._kwargs = call_arguments(inputs)
        tensors = [v for v in tree_leaves((self._args, self._kwargs)) if isinstance(v, Tensor)]
        if not tensors:
            raise InvalidValue(f"the example inputs of {config.model} hold no tensor")
        if next(self.model.parameters(), None) is None:
            raise InvalidValue("the model has no parameters: there is nothing to train or freeze")
        self.batch_size = len(tensors[0]) if tensors[0].dim() else 1
        with torch.device(device):
            self._labels = torch.zeros(self.batch_size, dtype=torch.int64)
            self.optimizer = self._make_optimizer(config)
        self.batch = [*tensors, self._labels]
        check_named(config.plan, self.model)
        with self.freezer(1, config.plan) as freezer:
            self.layers, self.frozen = freezer.layers, freezer.num_frozen
        trains = (any(p.requires_grad for p in layer.parameters) for layer in self.layers)
        self.given = list(trains).index(True)

    def freezer(self, total_steps: int, plan: Plan) -> FreezeOut:
        """FreezeOut over the model's own layers, or those that a forward pass finds."""
        layers = None if self._is_own else model_layers(self.model)
        return FreezeOut(
            self.model,
            self.optimizer,
            total_steps,
            schedule=plan,
            layers=layers,
            example_inputs=None if layers is not None else (self._args, self._kwargs),
        )

    def loss(self) -> Tensor:
        """One forward pass, and the loss to go backward from.

        A function's model may return its own (an output with `.loss`, or one number); otherwise
        the mean of what it returns will do, whose value does not matter here.
        """
        with self.autocast():
            output = self.model(*self._args, **self._kwargs)
        if not self._is_own:
            return F.cross_entropy(output.float(), self._labels)
        own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        results = [v for v in tree_leaves(_plain(output)) if isinstance(v, Tensor)]
        results = [v for v in results if v.is_floating_point() and v.requires_grad]
        if not results:
            raise InvalidValue("the model returns no tensor that depends on its parameters")
        return torch.stack([result.float().mean() for result in results]).sum()

    def as_batch(self) -> Batch:
        """What the model takes, as the cache sees it."""
        return Batch(self._args, self._kwargs, self.batch_size)

    def step(self) -> None:
        """One training step."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def _make_optimizer(self, config: EstimateConfig) -> Optimizer:
        known = [
            name
            for name, value in vars(torch.optim).items()
            if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
        ]
        if config.optimizer not in known:
            close = difflib.get_close_matches(config.optimizer, known, n=3, cutoff=0.3)
            hint = f"; close matches: {', '.join(close)}" if close else ""
            raise InvalidValue(f"torch.optim has no optimizer {config.optimizer!r}{hint}")
        kind: Any = getattr(torch.optim, config.optimizer)
        options: dict[str, Any] = {"lr": config.lr}
        if config.optimizer == "SGD":
            options |= {"momentum": 0.9, "nesterov": True}
        is_fake = isinstance(next(self.model.parameters()), FakeTensor)
        if config.optimizer == "SGD" and not is_fake:
            options["fused"] = self._device.type in ("cpu", "cuda")  # as `freezeout train`
        elif config.optimizer != "SGD" and is_fake:
            # What torch chooses for real tensors: all at once takes memory for results on the way.
            takes_it = "foreach" in inspect.signature(kind).parameters
            options |= {"foreach": self._device.type != "cpu"} if takes_it else {}
        optimizer: Optimizer = kind(self.model.parameters(), **options)
        return optimizer


def build(config: EstimateConfig) -> Built:
    """The model and its example inputs, on torch's default device; see `EstimateConfig.model`.

    InvalidValue for a name that leads nowhere and for a function that fails or returns something
    else.
    """
    if ":" in config.model and not config.model.startswith("timm:"):
        return _from_function(config.model)
    model = build_model(
        config.model,
        num_classes=config.classes,
        depth=config.depth,
        growth=config.growth,
        widen_factor=config.widen_factor,
    )
    images = torch.empty(config.batch_size, 3, 32, 32).normal_()
    channels_last = torch.channels_last
    return model.to(memory_format=channels_last), images.to(memory_format=channels_last)  # type: ignore[call-overload]


def moved(built: Built, device: torch.device) -> Built:
    """The same, on `device`, whatever device the function chose."""
    model, inputs = built
    return model.to(device), tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)


def _from_function(path: str) -> Built:
    function = _find(path)
    try:
        result = function()
    except Exception as error:  # the user's own code: anything
        raise InvalidValue(f"{path} failed with {_line(error)}") from error
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        kind = type(result).__name__
        if isinstance(result, tuple):
            kind = f"({', '.join(type(part).__name__ for part in result)})"
        raise InvalidValue(
            f"{path} must return a pair, a torch.nn.Module and its example inputs; it returned "
            f"{kind}"
        )
    model, inputs = result
    if any(map(is_lazy, model.parameters())):  # they get their sizes from the first inputs
        args, kwargs = call_arguments(inputs)
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        except Exception as error:
            raise InvalidValue(f"the model of {path} failed with {_line(error)}") from error
    return model, inputs


def _find(path: str) -> Callable[[], Any]:
    """The function at MODULE:FUNCTION, modules of the current folder included."""
    module_name, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        # Tensors made at import stay, and are to be real ones.
        with torch.device("cpu"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InvalidValue(
                f"model {path!r}: there is no module {error.name!r} here or on Python's path"
            ) from error
        raise InvalidValue(f"model {path!r}: importing it failed with {_line(error)}") from error
    except Exception as error:  # the user's own code: anything
        raise InvalidValue(f"model {path!r}: importing it failed with {_line(error)}") from error
    finally:
        sys.path.pop(0)
    function = module
    for part in name.split("."):
        function = getattr(function, part, None)  # type: ignore[assignment]
    if not callable(function):
        close = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], n=3)
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise InvalidValue(f"model {path!r}: {module_name} has no function {name!r}{hint}")
    return function


def _plain(output: Any) -> Any:
    """Outputs that are classes of their own, such as transformers', as dictionaries."""
    return dict(output) if isinstance(output, dict) else output


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error) or 'no message'}"
