"""`FreezeOutTrainerCallback` in Hugging Face's Trainer: the same bits as a plain loop."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("accelerate")
from transformers import TrainerCallback, get_scheduler

from freezeout import FreezeOut, FreezeOutError, Frozen, Plan, Schedule
from freezeout.errors import CheckpointError, InvalidValue
from freezeout.integrations.transformers import FreezeOutTrainerCallback
from tests.integration.processes import KILLED, process, torchrun
from tests.integration.trainer_runs import (
    STEPS,
    TOTAL,
    History,
    adapted,
    data,
    decoder,
    encoder,
    encoder_decoder,
    one_run,
    trainer,
)
from tests.plain_loop import EARLY, PLANS, Row, row, same, update

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
Make = Callable[[], nn.Module]


def plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    loss: Callable[..., Tensor],
    *,
    steps: int = TOTAL,
    accumulate: int = 1,
    scheduler: str = "constant",
    warmup: int = 0,
    plan: Plan = EARLY,
) -> list[Row]:
    """The plain loop over the batches that the Trainer took, and what happened in it."""
    freezer = FreezeOut(model, optimizer, steps, schedule=plan, example_inputs=batches[0])
    lr_scheduler = get_scheduler(scheduler, optimizer, warmup, steps)
    waiting, rows = iter(batches), []
    for step in range(steps):
        last = (step + 1) % math.ceil(STEPS / accumulate) == 0
        taken = [
            next(waiting) for _ in range(STEPS % accumulate or accumulate if last else accumulate)
        ]
        torch.manual_seed(step)
        model.train()
        for batch in taken:
            torch.autograd.backward(loss(model(**batch), batch, taken))
        update(freezer, [optimizer], [lr_scheduler], 1.0)
        rows.append(row(freezer))
    return rows


def own_loss(output: Any, batch: Any, taken: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def check(
    make: Make,
    folder: Path,
    *,
    sequences: bool = False,
    loss: Any = own_loss,
    plan: Plan = EARLY,
    **options: Any,
) -> FreezeOutTrainerCallback:
    """A run with the Trainer and a plain loop: equal rates, freeze steps and weights."""
    batches: list[dict[str, Tensor]] = []
    callback = FreezeOutTrainerCallback(plan)
    history = History(callback)
    run = trainer(
        model := make(),
        folder,
        callback,
        history,
        batches=batches,
        examples=data(sequences),
        **options,
    )
    run.train()
    assert callback.freezer is not None
    other = make()
    if options.get("activation_checkpointing"):
        other.activation_checkpointing_enable()  # type: ignore[operator]
    optimizer = trainer(other, folder, **options).create_optimizer()
    rows = plain(
        other,
        optimizer,
        batches,
        loss,
        steps=run.state.max_steps,
        accumulate=options.get("gradient_accumulation_steps", 1),
        scheduler=str(getattr(run.args.lr_scheduler_type, "value", "constant")),
        warmup=int(run.args.warmup_steps),
        plan=plan,
    )
    assert history.rows == rows
    assert rows[-1][0] == run.state.max_steps
    assert rows[-1][1] == max(callback.freezer.timeline.depths) > 0
    assert same(model, other)
    return callback


BERT = ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "bert.pooler"]
GPT = ["transformer.wpe", *(f"transformer.h.{i}" for i in range(3)), "lm_head"]
T5 = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "lm_head"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 12, "lr_scheduler_type": "linear", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine"},
        {"activation_checkpointing": True},
    ],
    ids=lambda options: ",".join(options) or "constant",
)
def test_an_encoder(options: dict[str, Any], tmp_path: Path) -> None:
    callback = check(encoder, tmp_path, **options)
    assert callback.freezer is not None
    assert [layer.name for layer in callback.freezer.layers] == [*BERT, "classifier"]


def given() -> nn.Module:
    """As somebody writes it who has never heard of plans."""
    model = encoder()
    for part in ("embeddings", "encoder.layer.0", "encoder.layer.1"):
        model.get_submodule(f"bert.{part}").requires_grad_(False)
    return model


@pytest.mark.filterwarnings("ignore:the layers in which nothing trains")
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (encoder, Frozen(up_to="bert.encoder.layer.1")),
        (encoder, Frozen(all_but_last=3, then=EARLY)),
        (given, EARLY),
    ],
)
def test_frozen_from_the_start(make: Make, plan: Plan, tmp_path: Path) -> None:
    callback = check(make, tmp_path, plan=plan)
    assert callback.freezer is not None
    assert callback.freezer.freeze_steps[:4].count(0) == 3
    first = dict(make().named_parameters())
    moved = [n for n, p in callback.freezer.model.named_parameters() if not p.equal(first[n])]
    assert [name for name in first if name not in moved] == [
        name for name in first if name.startswith((BERT[0], BERT[1], BERT[2]))
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_leaves_an_ordinary_model(
    error: type[BaseException], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 12:
                raise error

    model = encoder()
    callback = FreezeOutTrainerCallback(EARLY)
    with pytest.raises(error):
        trainer(model, tmp_path, callback, Stop()).train()
    assert callback.freezer is not None
    assert callback.freezer.summary().startswith("froze 4 of 6 layers; made 12 of 15 steps")
    assert all(p.requires_grad for p in model.parameters())
    assert not any({"train", "__reduce_ex__"} & {*vars(module)} for module in model.modules())


def test_a_model_that_another_run_left_frozen_is_thawed_in_time(tmp_path: Path) -> None:
    """Before the Trainer builds an optimizer of what requires a gradient."""
    model = encoder()
    FreezeOut(model, torch.optim.SGD(model.parameters(), 0.1), None, schedule=Frozen(4))
    callback = FreezeOutTrainerCallback(EARLY)
    run = trainer(model, tmp_path, callback)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.train()
    assert callback.freezer is not None
    assert len(callback.freezer.layers) == 6
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("make", "names"), [(decoder, GPT), (encoder_decoder, T5)])
def test_models_whose_output_matrix_is_their_embedding(
    make: Make, names: list[str], tmp_path: Path
) -> None:
    def loss(output: Any, batch: Any, taken: Any) -> Tensor:
        """As the Trainer has it: the sum over words by their number."""
        if make is encoder_decoder:
            return own_loss(output, batch, taken)
        labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
        total = cross_entropy(output.logits.reshape(len(labels), -1), labels, reduction="sum")
        mean: Tensor = total / (batch["labels"] != -100).sum()
        return mean

    callback = check(make, tmp_path, sequences=True, loss=loss)
    assert callback.freezer is not None
    assert [layer.name for layer in callback.freezer.layers] == names


@pytest.mark.filterwarnings("ignore:the layers in which nothing trains")
def test_lora_adapters_freeze_layer_by_layer(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    callback = check(adapted, tmp_path)
    assert callback.freezer is not None
    layers = callback.freezer.layers
    assert [layer.name.rpartition("bert.")[2] for layer in layers[:-1]] == [
        "embeddings",  # in front of the first adapter: frozen from the start
        *(f"encoder.layer.{i}" for i in range(3)),
    ]
    assert callback.freezer.freeze_steps[0] == 0
    trained = [name for name, p in callback.freezer.model.named_parameters() if p.requires_grad]
    assert all("lora" in name or "classifier" in name for name in trained)


def test_accumulation(tmp_path: Path) -> None:
    """Five batches an epoch, two a step, and the fifth one by itself."""

    def mean(output: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        total = cross_entropy(output.logits, labels, reduction="sum")
        mean: Tensor = total / num_items_in_batch
        return mean

    def loss(output: Any, batch: Any, taken: Any) -> Tensor:
        return mean(output, batch["labels"], sum(len(each["labels"]) for each in taken))

    batches: list[dict[str, Tensor]] = []
    callback = FreezeOutTrainerCallback(EARLY)
    history = History(callback)
    two: Any = {"gradient_accumulation_steps": 2}
    model = encoder()
    run = trainer(model, tmp_path, callback, history, batches=batches, **two)
    run.compute_loss_func = mean
    run.train()
    other = encoder()
    optimizer = trainer(other, tmp_path).create_optimizer()
    assert history.rows == plain(other, optimizer, batches, loss, steps=9, accumulate=2)
    assert same(model, other)


# --- checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_killed_and_resumed(tmp_path: Path, plan: str) -> None:
    """By SIGKILL in the middle of an epoch, some layers frozen."""
    whole = one_run(tmp_path / "whole", -1, plan)
    ended = process("-m", "tests.integration.trainer_runs", tmp_path / "killed", 8, plan)
    assert ended.returncode == KILLED, ended.stderr
    state = json.loads((tmp_path / "killed" / "checkpoint-8" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["FreezeOutTrainerCallback"]["attributes"]
    assert saved["freezer_state"]["num_frozen"] == 2
    assert same(one_run(tmp_path / "killed", -1, plan), whole)
    optimizer = torch.load(tmp_path / "killed" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    held = sum(len(group["params"]) for group in optimizer["param_groups"])
    assert 0 < len(optimizer["state"]) < held  # nothing of frozen parameters


def run_in_parts(
    folder: Path, callbacks: list[FreezeOutTrainerCallback], **options: Any
) -> tuple[nn.Module, Any]:
    """Saves after 8 steps and goes on with another model and callback, to the end."""
    model = run = None
    for callback in callbacks:
        model = encoder()
        run = trainer(model, folder, callback, save_strategy="steps", save_steps=8, **options)
        run.train(
            resume_from_checkpoint=(folder / "checkpoint-8").exists()
            and str(folder / "checkpoint-8")
        )
    assert model is not None
    return model, run


def test_resuming_with_callbacks_that_the_trainer_restores(tmp_path: Path) -> None:
    """It makes new ones, from what the checkpoint says of them."""
    options: Any = {"layers": list(BERT), "freeze_every": 2}
    whole, _ = run_in_parts(tmp_path / "whole", [FreezeOutTrainerCallback(EARLY, **options)])
    resumed, run = run_in_parts(
        tmp_path / "parts",
        [FreezeOutTrainerCallback(EARLY, **options), FreezeOutTrainerCallback()],
        restore_callback_states_from_checkpoint=True,
    )
    assert same(resumed, whole)
    (restored,) = [
        each
        for each in run.callback_handler.callbacks
        if isinstance(each, FreezeOutTrainerCallback)
    ]
    assert restored.schedule == EARLY
    assert restored.freezer is not None
    assert restored.freezer.step_count == TOTAL
    module = FreezeOutTrainerCallback(layers=[encoder().get_submodule(BERT[0])])
    assert module.state()["args"]["layers"] == [None]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """An early one, of which layers were still trained that are frozen by then."""

    class Best(TrainerCallback):
        """The third evaluation is the best."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            others["metrics"]["eval_loss"] = abs(state.global_step - 3.0)

    model = encoder()
    run = trainer(
        model,
        tmp_path,
        FreezeOutTrainerCallback(EARLY),
        Best(),
        load_best_model_at_end=True,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
    )
    run.train()
    assert run.state.best_global_step == 3
    from safetensors.torch import load_file

    best = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], best[name]) for name in best)
    assert all(p.requires_grad for p in model.parameters())


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    run = trainer(encoder(), tmp_path, save_strategy="steps", save_steps=8)
    run.train()
    with pytest.raises(CheckpointError, match="of step 8, was saved without FreezeOutTrainerCall"):
        run_in_parts(tmp_path, [FreezeOutTrainerCallback(EARLY)])
    other = Schedule(0.6)
    with pytest.raises(CheckpointError, match="of another schedule"):
        run_in_parts(
            tmp_path / "other", [FreezeOutTrainerCallback(EARLY), FreezeOutTrainerCallback(other)]
        )
    allowed = FreezeOutTrainerCallback(other, allow_schedule_change=True)
    run_in_parts(tmp_path / "other", [allowed])
    assert allowed.freezer is not None
    assert allowed.freezer.step_count == TOTAL


# --- what is said, and what is left ----------------------------------------------------------


class Reports(TrainerCallback):
    """As the Trainer's own reporters, which it calls before callbacks of the user's."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(dict(logs))


def test_logs(tmp_path: Path) -> None:
    """In the history and in what is printed; in reports when the callback comes first."""
    reports = Reports()
    callback = FreezeOutTrainerCallback(EARLY)
    run = trainer(encoder(), tmp_path, reports, callback)
    callbacks = run.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop(callbacks.index(callback)))
    run.train()
    key = "freezeout/num_frozen"
    assert [each[key] for each in run.state.log_history if "loss" in each][-1] == 5
    assert [each[key] for each in reports.rows if "loss" in each][5:9] == [1, 1, 2, 2]
    assert all(0 < r["freezeout/flops_saved"] < 1 for r in reports.rows[8:] if "loss" in r)
    assert not any(key in each for each in reports.rows if "train_loss" in each)


def test_training_twice_and_an_ordinary_model_afterwards(tmp_path: Path) -> None:
    model = encoder()
    callback = FreezeOutTrainerCallback(EARLY)
    run = trainer(model, tmp_path, callback, eval_strategy="epoch", eval_on_start=True)
    for _ in range(2):
        run.train()
        assert callback.freezer is not None
        assert callback.freezer.summary().startswith("froze 5 of 6 layers")
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert run.evaluate()["eval_loss"] > 0


# --- several processes, and what is refused --------------------------------------------------


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    run = trainer(
        encoder(),
        tmp_path,
        FreezeOutTrainerCallback(EARLY),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(FreezeOutError, match="use_reentrant=False"):
        run.train()


def test_a_model_that_is_not_called_is_refused(tmp_path: Path) -> None:
    run = trainer(encoder(), tmp_path, FreezeOutTrainerCallback(EARLY))

    def parts_only(model: Any, inputs: Any, *_: Any, **others: Any) -> Any:
        return model.classifier(model.bert(inputs["input_ids"]).pooler_output).square().mean()

    run.compute_loss = parts_only  # type: ignore[method-assign]
    with pytest.raises(FreezeOutError, match="the model itself was not called in the first"):
        run.train()


def test_what_would_not_freeze_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments
    from transformers.training_args import ParallelMode

    run = trainer(encoder(), tmp_path, FreezeOutTrainerCallback(EARLY))
    run.callback_handler.optimizer = run.create_optimizer()
    for name, value, line in (
        ("deepspeed", "zero.json", "does not work with FSDP or DeepSpeed"),
        ("n_gpu", 2, "does not work with DataParallel"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(TrainingArguments, name, value)
            if name in vars(run.args):
                patch.setitem(vars(run.args), name, value)
            with pytest.raises(InvalidValue, match=line):
                run.callback_handler.on_train_begin(run.args, run.state, run.control)
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    run.args.activation_checkpointing = True
    with pytest.raises(InvalidValue, match=re.escape("(ddp_find_unused_parameters=True)")):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    run.args.ddp_find_unused_parameters = True
    run.callback_handler.on_train_begin(run.args, run.state, run.control)


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks(tmp_path: Path, plan: str) -> None:
    """Under the DistributedDataParallel that the Trainer sets up, as in a plain loop with it."""
    ended = torchrun("-m", "tests.integration.trainer_runs", "ddp", tmp_path / "found", plan)
    assert ended.returncode == 0, ended.stderr
    ranks = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2)]
    for found in ranks:
        start = "" if plan == "early" else ", 1 of them from the start"
        assert found["summary"] == f"froze 5 of 6 layers{start}"
        expected = ranks[0]["plain"]
        assert all(torch.equal(found["trainer"][key], expected[key]) for key in expected)
