"""FreezeOut in a loop under Accelerate: the same bits as without it, and the example's recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from freezeout import FreezeOut
from tests.integration.accelerate_runs import one_run
from tests.integration.processes import KILLED, process
from tests.models import conv_net, images
from tests.plain_loop import BATCHES, EARLY, PLANS, row, same, train

EPOCHS = 4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("before", [False, True], ids=["prepared first", "FreezeOut first"])
def test_equal_to_the_plain_loop(accumulate: int, before: bool, plan: str) -> None:
    """With a scheduler and clipping; the fifth batch of an epoch is a step by itself."""
    updates = EPOCHS * -(-BATCHES // accumulate)

    def parts() -> tuple[nn.Module, AdamW, StepLR]:
        torch.manual_seed(0)
        net = conv_net()
        optimizer = AdamW(net.parameters(), 0.01)
        return net, optimizer, StepLR(optimizer, 3, 0.5)

    def freezing(net: nn.Module, optimizer: Any) -> FreezeOut:
        inputs = images(0)[0]
        return FreezeOut(net, optimizer, updates, schedule=PLANS[plan], example_inputs=inputs)

    net, optimizer, scheduler = parts()
    expected = train(
        *(net, [optimizer], updates),
        schedulers=[scheduler],
        accumulate=accumulate,
        clip=0.5,
        plan=PLANS[plan],
    )

    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    own, bare, bare_scheduler = parts()
    early = freezing(own, bare) if before else None
    loader: Any = DataLoader([images(i) for i in range(BATCHES)], batch_size=None)  # type: ignore[arg-type]
    model, wrapped, loader, its_scheduler = accelerator.prepare(own, bare, loader, bare_scheduler)
    freezer = early or freezing(accelerator.unwrap_model(model), wrapped)
    rows, batch = [], 0
    for _ in range(EPOCHS):
        for x, y in loader:
            model.train()
            torch.manual_seed(batch)
            batch += 1
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                wrapped.step()
                its_scheduler.step()
                wrapped.zero_grad()
            if accelerator.sync_gradients:
                freezer.step()
            rows.append(row(freezer))
    assert rows == expected
    assert rows[-1][:2] == (updates, 3)
    assert same(own, net)


@pytest.mark.parametrize("before", [False, True], ids=["wrapped first", "FreezeOut first"])
def test_steps_that_a_scaler_skips(before: bool) -> None:
    """Accelerate puts functions of its own in the place of `step`; rates are scaled all the same,
    skipped steps change nothing, and they count."""
    Accelerator()
    weights = []
    for wrap in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
        bare = AdamW(net.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        x, y = torch.randn(8, 5), torch.arange(8) % 3
        if before or not wrap:
            freezer = FreezeOut(net, bare, 12, schedule=EARLY, example_inputs=x)
        optimizer: Any = AcceleratedOptimizer(bare, scaler=scaler) if wrap else bare
        if wrap and not before:
            freezer = FreezeOut(net, optimizer, 12, schedule=EARLY, example_inputs=x)
        skipped = []
        for step in range(12):
            loss = cross_entropy(net(x), y) * (float("inf") if step in (2, 7) else 1.0)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            earlier = [p.detach().clone() for p in net.parameters()]
            if wrap:
                optimizer.step()
                skipped.append(optimizer.step_was_skipped)
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            freezer.step()
            moved = [
                not torch.equal(p, old) for p, old in zip(net.parameters(), earlier, strict=True)
            ]
            assert moved == [step < 5 and step != 2] * 2 + [step not in (2, 7)] * 2
        assert not wrap or [i for i, each in enumerate(skipped) if each] == [2, 7]
        assert freezer.num_frozen == 1
        weights.append(net)
    assert same(*weights)


def test_the_recipe_killed_and_resumed(tmp_path: Path) -> None:
    """By SIGKILL in the middle of its second epoch, some layers frozen; equal to a run that was
    left alone."""
    _, whole = one_run(tmp_path / "whole", -1)
    ended = process("-m", "tests.integration.accelerate_runs", tmp_path / "killed", 24)
    assert ended.returncode == KILLED, ended.stderr
    state = torch.load(
        tmp_path / "killed" / "step_24" / "custom_checkpoint_0.pkl", weights_only=True
    )
    assert (state["step"], state["num_frozen"]) == (24, 2)
    _, resumed = one_run(tmp_path / "killed", -1)
    assert whole.step_count == resumed.step_count == 36
    assert same(whole.model, resumed.model)
