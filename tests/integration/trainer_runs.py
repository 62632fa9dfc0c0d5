"""Small models and runs of Hugging Face's Trainer that tests start, here or in processes of their
own:

    python -m tests.integration.trainer_runs FOLDER STOP PLAN     one run, killed after step STOP
    torchrun ... -m tests.integration.trainer_runs ddp FILE PLAN  on two ranks, beside a plain loop
"""

import os
import signal
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (first: lets torchvision be imported)

# isort: split
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from freezeout import FreezeOut
from freezeout.integrations.transformers import FreezeOutTrainerCallback
from tests.integration.processes import one_rank
from tests.plain_loop import PLANS, Row, row, update

EPOCHS, EXAMPLES, BATCH = 3, 20, 4
STEPS = EXAMPLES // BATCH  # an epoch
TOTAL = EPOCHS * STEPS
WORDS, LENGTH = 50, 8

logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_labels": 3,
    }
    config = BertConfig(vocab_size=WORDS, intermediate_size=32, **sizes)
    return BertForSequenceClassification(config)


def decoder() -> nn.Module:
    """Its output matrix is its embedding."""
    torch.manual_seed(0)
    sizes: Any = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": LENGTH}
    ends: Any = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **sizes, **ends))


def encoder_decoder() -> nn.Module:
    """Three uses of one embedding."""
    torch.manual_seed(0)
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ends: Any = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, **sizes, **ends))


def adapted() -> nn.Module:
    """The encoder, of which LoRA adapters and the classifier are trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return get_peft_model(encoder(), config)


def data(sequences: bool = False) -> list[dict[str, Any]]:
    """Words, and a class or as many words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2, WORDS, (EXAMPLES, LENGTH), generator=generator)
    labels = words.flip(1) if sequences else words.sum(1) % 3
    classes: list[Any] = list(labels) if sequences else labels.tolist()
    return [{"input_ids": w, "labels": y} for w, y in zip(words, classes, strict=True)]


class Seed(TrainerCallback):
    """Dropout draws the same masks in the n-th step of every run."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        torch.manual_seed(state.global_step)


class History(TrainerCallback):
    """After each step: steps made, layers frozen, learning rates."""

    def __init__(self, callback: FreezeOutTrainerCallback) -> None:
        self.callback = callback
        self.rows: list[Row] = []

    def on_step_end(self, *args: Any, **others: Any) -> None:
        self.rows.append(row(self.callback.freezer))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        }
    )


def trainer(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    batches: list[dict[str, Tensor]] | None = None,
    examples: Any = None,
    **options: Any,
) -> Trainer:
    """A Trainer, which keeps a list of the batches that it takes."""

    def collate(features: list[Any]) -> dict[str, Any]:
        batch = default_data_collator(features)
        if batches is not None:
            batches.append(batch)
        return batch

    return Trainer(
        model,
        arguments(folder, **options),
        data_collator=collate,
        train_dataset=data() if examples is None else examples,
        eval_dataset=data()[:4] if examples is None else list(islice(examples, 4)),
        callbacks=[Seed(), *callbacks],
    )


class Kill(TrainerCallback):
    def __init__(self, stop: int) -> None:
        self.stop = stop

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGKILL)


def one_run(
    folder: Path, stop: int, plan: str = "early", make: Callable[[], nn.Module] = encoder
) -> nn.Module:
    """Goes on from the last checkpoint in the folder, if there is one."""
    torch.set_num_threads(1)
    model = make()
    run = trainer(
        model,
        folder,
        FreezeOutTrainerCallback(PLANS[plan]),
        Kill(stop),
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=1,
    )
    run.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return model


@one_rank()
def ddp(file: Path, plan: str) -> None:
    """In each of two ranks: a run of the Trainer, and torch's own DistributedDataParallel in a
    plain loop over the same batches."""
    from torch.nn.parallel import DistributedDataParallel

    from freezeout.parallel import rewrap

    batches: list[dict[str, Tensor]] = []
    callback = FreezeOutTrainerCallback(PLANS[plan])
    model = encoder()
    run = trainer(
        model,
        file.parent,
        callback,
        batches=batches,
        max_steps=10,
        ddp_backend="gloo",
        average_tokens_across_devices=False,  # this would double BERT's loss, on two ranks
    )
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    assert callback.freezer is not None
    found = {"trainer": model.state_dict(), "summary": callback.freezer.summary().split(";")[0]}

    net = encoder()
    optimizer = trainer(net, file.parent).create_optimizer()
    freezer = FreezeOut(net, optimizer, 10, schedule=PLANS[plan], example_inputs=batches[0])
    wrapper = DistributedDataParallel(net)
    for step in range(10):
        torch.manual_seed(step)
        net.train()
        torch.autograd.backward(wrapper(**batches[step]).loss)
        if update(freezer, [optimizer], clip=1.0):
            wrapper = rewrap(wrapper)
    torch.save({**found, "plain": net.state_dict()}, file.with_suffix(f".{os.environ['RANK']}"))


if __name__ == "__main__":
    if sys.argv[1] == "ddp":
        ddp(Path(sys.argv[2]), sys.argv[3])
    else:
        one_run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
