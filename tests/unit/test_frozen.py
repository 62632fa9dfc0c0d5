"""Layers frozen from the start, by a plan or by the user's own hand; and plans of any kind."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from freezeout import FreezeOut, Frozen, Plan, PrefixCache, Schedule, Timeline
from freezeout.errors import FreezeOutError, InvalidType, InvalidValue
from tests.models import ResNet, conv_net, images, linear_net, loss_of, run, vectors

STEPS = 20
EARLY = Schedule(0.4, "linear")


def start() -> nn.Sequential:
    torch.manual_seed(0)
    return conv_net()


def held(model: nn.Module, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Copies of what stands in the state under names that begin so."""
    state = model.state_dict()
    return {n: v.clone() for n, v in state.items() if n.split(".")[0] in prefixes}


def by_hand(build: Any, steps: int, anneal: Schedule | None) -> nn.Sequential:
    """The reference: plain torch, the first two layers without gradients and in evaluation mode,
    the others in an optimizer of their own at eq. 1's rates."""
    model = start()
    frozen, trained = model[:7], model[7:]
    frozen.requires_grad_(False)
    groups = [{"params": list(part.parameters())} for part in (model[7:9], model[12])]
    optimizer = build(groups)
    base = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        if anneal is not None:
            factors = anneal.factors(step, anneal.timeline(2, STEPS))
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = base * factor
                if factor == 0:
                    model[7:9].requires_grad_(False)
                    group["params"] = []
        model.train()
        frozen.eval()
        if anneal is not None and not any(p.requires_grad for p in model[7:9].parameters()):
            model[7:9].eval()
        torch.manual_seed(step)
        torch.autograd.backward(loss_of(model, *images(step)))
        optimizer.step()
        optimizer.zero_grad()
    trained.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: AdamW(p, 0.01, weight_decay=0.5),
        lambda p: AdamW(p, 0.01, weight_decay=0.5, fused=True),
    ],
)
@pytest.mark.parametrize("then", [None, EARLY])
@pytest.mark.parametrize("who", ["plan", "user"])
def test_equal_bit_for_bit_to_plain_torch(build: Any, then: Schedule | None, who: str) -> None:
    model = start()
    plan: Plan = Frozen(2, then=then)
    if who == "user":
        model[:7].requires_grad_(False)
        plan = then or Frozen(0)
    before = held(model, ["0", "1", "4", "5"])
    optimizer = build(model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"the layers in which nothing trains \(2: ")
        freezer = FreezeOut(model, optimizer, STEPS, schedule=plan, example_inputs=images(0)[0])
    assert [layer.name for layer in freezer.layers] == ["0", "4", "7", "12"]
    assert freezer.freeze_steps == ((0, 0, 20, 20) if then is None else (0, 0, 8, 20))
    for step in range(STEPS):
        run(model, [optimizer], freezer, images, [step])
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())
        frozen = [p for layer in freezer.layers[:2] for p in layer.parameters]
        assert all(p.grad is None and not p.requires_grad for p in frozen)
        assert not any(p in optimizer.state for p in frozen)
        assert not any(m.training for layer in freezer.layers[:2] for m in layer.modules)
    expected = by_hand(build, STEPS, then)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    freezer.release()
    assert all(p.requires_grad for p in model[:7].parameters()) is (who == "plan")


@pytest.mark.parametrize(
    ("plan", "frozen"),
    [
        (Frozen(3), 3),
        (Frozen(all_but_last=1), 5),
        (Frozen(share=0.5), 3),
        (Frozen(share=0), 0),
        (Frozen(up_to="bn1"), 1),
        (Frozen(up_to="layer1"), 3),
        (Frozen(up_to="layer2.0.conv2"), 4),
        (Schedule(times=(0, 0, 0.5, 0.5, 0.9, 1)), 2),
        (Frozen(2, then=Frozen(2, then=EARLY)), 4),
    ],
)
def test_ways_to_say_which(plan: Plan, frozen: int) -> None:
    model, x = ResNet(), torch.randn(2, 3, 8, 8)
    freezer = FreezeOut(model, SGD(model.parameters(), 0.1), 10, schedule=plan, example_inputs=x)
    assert freezer.num_frozen == frozen
    assert [layer.is_frozen for layer in freezer.layers] == [True] * frozen + [False] * (6 - frozen)
    table = str(freezer).splitlines()[2:8]
    assert ["start" in line for line in table] == [True] * frozen + [False] * (6 - frozen)


@pytest.mark.parametrize(
    ("plan", "total", "message"),
    [
        (lambda: Frozen(6), 10, r"Frozen\(first=6\) does not go with 6 layers: 0 to 5 of them can"),
        (lambda: Frozen(99), 10, r"Frozen\(first=99\) does not go with 6 layers"),
        (lambda: Frozen(all_but_last=7), 10, r"Frozen\(all_but_last=7\) does not go with 6 layers"),
        (lambda: Frozen(all_but_last=0), 10, "all_but_last must be at least 1, got 0"),
        (lambda: Frozen(-1), 10, "first must be at least 0, got -1"),
        (lambda: Frozen(share=1.0), 10, r"share must be in \[0, 1\), got 1.0"),
        (lambda: Frozen(up_to="layer9"), 10, "up_to='layer9' is no module of the model"),
        (lambda: Frozen(up_to="fc"), 10, r"Frozen\(up_to='fc'\) does not go with 6 layers"),
        (lambda: Frozen(2, share=0.5), 10, "takes one of .*, got first and share"),
        (lambda: Frozen(), 10, "takes one of first, all_but_last, share, up_to, got none"),
        (lambda: Schedule(times=(-0.1, 1)), 10, r"times\[0\] must be in \[0, 1\], got -0.1"),
        (lambda: Schedule(times=(0, 1.5)), 10, r"times\[1\] must be in \[0, 1\], got 1.5"),
        (lambda: Schedule(times=(0, 0.5)), 10, "times must end in 1"),
        (Schedule, None, "total_steps must be given"),
        (lambda: Frozen(1, then=Schedule()), None, "total_steps must be given"),
        (lambda: Frozen(2, then=Schedule(times=(0.5, 1))), 10, "times has 2 entries for 4 layers"),
    ],
)
def test_plans_that_do_not_go(plan: Any, total: int | None, message: str) -> None:
    model, x = ResNet(), torch.randn(2, 3, 8, 8)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(InvalidValue, match=message) as error:
        FreezeOut(model, optimizer, total, schedule=plan(), example_inputs=x)
    assert "\n" not in str(error.value)
    assert all(p.requires_grad for p in model.parameters())
    assert "step" not in vars(optimizer)
    for kind in (Frozen, "cubic", 3):
        with pytest.raises(InvalidType, match="schedule must be a plan, such as"):
            FreezeOut(model, optimizer, 10, schedule=kind, example_inputs=x)  # type: ignore[arg-type]


def test_a_run_whose_length_is_not_known() -> None:
    model = start()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, None, schedule=Frozen(3), example_inputs=images(0)[0])
    run(model, [optimizer], freezer, images, range(50))
    assert (freezer.num_frozen, freezer.next_freeze, freezer.is_unfinished) == (3, None, False)
    assert freezer.freeze_steps == (0, 0, 0, None)
    assert freezer.learning_rates == (0, 0, 0, 0.1)
    assert str(freezer).startswith("FreezeOut at step 50, 3 of 4 layers frozen")
    assert freezer.summary().startswith("froze 3 of 4 layers, 3 of them from the start; ")
    other = start()
    again = FreezeOut(
        other, SGD(other.parameters(), 0.1), None, schedule=Frozen(3), example_inputs=images(0)[0]
    )
    again.load_state_dict(freezer.state_dict())
    assert again.step_count == 50


# --- what the user froze --------------------------------------------------------------------


def test_layers_without_norms_or_dropout_are_taken_without_a_word() -> None:
    model = linear_net()
    model[:3].requires_grad_(False)
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), 20, schedule=EARLY, example_inputs=vectors(0)[0]
    )
    assert freezer.freeze_steps == (0, 0, 8, 20)
    assert freezer.num_frozen == 2


def test_norms_and_dropout_can_be_kept_awake() -> None:
    model = start()
    model[:7].requires_grad_(False)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.warns(
        UserWarning, match=r"layers in which nothing trains \(2: '0' to '4'\) are fr"
    ):
        FreezeOut(model, optimizer, 20, example_inputs=images(0)[0]).release()
    freezer = FreezeOut(model, optimizer, 20, example_inputs=images(0)[0], keep_awake=True)
    assert [layer.name for layer in freezer.layers] == ["7", "12"]
    run(model, [optimizer], freezer, images, range(3))
    assert model[1].num_batches_tracked == 3
    assert model[3].training


def test_the_users_frozen_layers_count_among_the_first_ones_of_a_plan() -> None:
    for plan, expected in (
        (Frozen(3), (0, 0, 0, 20)),
        (Frozen(1), (0, 0, 20, 20)),
        (Frozen(1, then=EARLY), (0, 0, 8, 20)),
        (Frozen(share=0.75, then=EARLY), (0, 0, 0, 20)),
        (Frozen(up_to="4"), (0, 0, 0, 20)),
        (Schedule(times=(0.5, 1)), (0, 0, 10, 20)),
    ):
        model = linear_net()
        model[:3].requires_grad_(False)
        freezer = FreezeOut(
            model, SGD(model.parameters(), 0.1), 20, schedule=plan, example_inputs=vectors(0)[0]
        )
        assert freezer.freeze_steps == expected, plan


def test_a_head_alone_is_a_plan_like_any_other_and_is_cached() -> None:
    """As somebody writes it who has never heard of plans: all hits from the second epoch on."""
    model = start()
    model[:12].requires_grad_(False)
    optimizer = Adam(model[12].parameters(), 0.01)
    with pytest.warns(UserWarning, match=r"the layers in which nothing trains \(3: "):
        freezer = FreezeOut(model, optimizer, 12, example_inputs=images(0)[0])
    x = torch.cat([images(i)[0] for i in range(3)])
    y = torch.cat([images(i)[1] for i in range(3)])
    cache = PrefixCache(freezer, len(x), depths=[3], budget=10**7)
    found = []
    for _ in range(4):
        for ids in torch.arange(len(x)).chunk(3):
            model.train()
            torch.autograd.backward(nn.functional.cross_entropy(cache(x[ids], ids=ids), y[ids]))
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        stats = cache.stats.take()
        found.append((stats.hits, stats.misses, stats.bypassed))
    assert found == [(0, len(x), 0)] + [(len(x), 0, 0)] * 3
    assert model[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:PrefixCache. by measurement it would not save time")
@pytest.mark.parametrize("total", [None, 800])
def test_the_cache_chooses_the_depth_at_which_the_run_stands(total: int | None) -> None:
    """Behind the layers that are frozen from the start, and nowhere before."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(5)]
    model = nn.Sequential(*blocks, nn.Linear(256, 3))
    x = torch.randn(64, 256)
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), total, schedule=Frozen(4), example_inputs=x[:2]
    )
    cache = PrefixCache(freezer, 64)
    cache.prepare(x[:32])
    assert cache.depths in ([4], [])  # by measurement it may not pay on a busy machine


@pytest.mark.parametrize("plan", [Frozen(3), Frozen(up_to="4"), Frozen(3, then=EARLY)])
def test_an_optimizer_of_what_trains_may_leave_out_what_the_plan_freezes(plan: Plan) -> None:
    """Though its parameters require gradients."""
    model = linear_net(5)
    optimizer = SGD(model[6:].parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, schedule=plan, example_inputs=vectors(0)[0])
    assert [layer.name for layer in freezer.layers] == ["0", "2", "4", "6", "8"]
    assert freezer.num_frozen == 3
    before = [p.detach().clone() for p in model[:6].parameters()]
    run(model, [optimizer], freezer, vectors, range(5))
    assert all(map(torch.equal, before, model[:6].parameters()))
    assert all(p.grad is None for p in model[:6].parameters())
    freezer.release()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(InvalidValue, match=r"Frozen\(first=5\) does not go with 5 layers"):
        FreezeOut(model, optimizer, 20, schedule=Frozen(5), example_inputs=vectors(0)[0])
    # What the plan does not freeze may be trained by something else: as ever.
    with pytest.warns(UserWarning, match="6 parameters .* are in no optimizer"):
        other = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
    assert [layer.name for layer in other.layers] == ["6", "8"]


def test_a_layer_that_the_user_froze_behind_one_that_something_else_may_train() -> None:
    """It is joined to the next one with it, and neither is frozen from the start."""
    model = linear_net(4)
    model[2].requires_grad_(False)
    optimizer = SGD(model[4:].parameters(), 0.1)
    with pytest.warns(UserWarning, match="2 parameters .* are in no optimizer"):
        freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
    assert [layer.name for layer in freezer.layers] == ["4", "6"]
    assert freezer.num_frozen == 0
    assert model[0].weight.requires_grad


# --- plans of one's own ---------------------------------------------------------------------


@dataclass(frozen=True)
class Changes(Plan):
    """Whatever is written down, at half the rate."""

    changes: tuple[tuple[int, int], ...]

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline.of(num_layers, total_steps, self.changes, freeze_every)

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        return tuple(0.5 * each for each in super().factors(step, timeline))


def test_a_plan_that_thaws() -> None:
    """The number of frozen layers may fall: `step()` returns what changed, either way, and what
    comes back trains, with a fresh state of the optimizer."""
    torch.manual_seed(0)
    model = linear_net()
    for i in (1, 3, 5):
        model[i] = nn.Tanh()  # passes a gradient whatever comes in
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    plan = Changes(((0, 3), (5, 1), (10, 2), (15, 0)))
    freezer = FreezeOut(model, optimizer, 20, schedule=plan, example_inputs=vectors(0)[0])
    changed, moved = {}, []
    for step in range(20):
        before = [layer.parameters[0].detach().clone() for layer in freezer.layers]
        loss = loss_of(model, *vectors(step))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        now = [layer.parameters[0] for layer in freezer.layers]
        moved.append([not torch.equal(a, b) for a, b in zip(before, now, strict=True)])
        if layers := freezer.step():
            changed[step + 1] = [layer.name for layer in layers]
    assert changed == {5: ["2", "4"], 10: ["2"], 15: ["0", "2"]}
    frozen = [3] * 5 + [1] * 5 + [2] * 5 + [0] * 5
    assert moved == [[i >= depth for i in range(4)] for depth in frozen]
    assert freezer.learning_rates == (0.05,) * 4
    assert freezer.timeline.counts() == [5, 5, 5, 5]
    assert freezer.next_freeze is None


def test_resuming_with_a_plan_of_ones_own() -> None:
    torch.manual_seed(0)
    model, other = linear_net(), linear_net()
    other.load_state_dict(model.state_dict())
    plan = Changes(((0, 2), (6, 1), (12, 3)))

    def parts(net: nn.Module) -> tuple[SGD, FreezeOut]:
        optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
        return optimizer, FreezeOut(net, optimizer, 20, schedule=plan, example_inputs=vectors(0)[0])

    optimizer, freezer = parts(model)
    run(model, [optimizer], freezer, vectors, range(9))
    resumed, again = parts(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes its tensors
    again.load_state_dict(freezer.state_dict())
    for net, opt, driver in ((model, optimizer, freezer), (other, resumed, again)):
        run(net, [opt], driver, vectors, range(9, 20))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.num_frozen == 3
    third = FreezeOut(
        linear := linear_net(),
        SGD(linear.parameters(), 0.1),
        20,
        schedule=Changes(((0, 2), (6, 1), (12, 2))),
        example_inputs=vectors(0)[0],
    )
    with pytest.raises(FreezeOutError, match=r"another schedule: plan was .*Changes.* and is now"):
        third.load_state_dict(freezer.state_dict())


def test_going_on_with_another_plan_keeps_what_either_has_frozen() -> None:
    torch.manual_seed(0)
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    cosine = FreezeOut(
        model, optimizer, 100, schedule=Schedule(t_0=1), example_inputs=vectors(0)[0]
    )
    run(model, [optimizer], cosine, vectors, range(50))
    state = cosine.state_dict()
    cosine.release()
    for plan, depth, changes in (
        (Frozen(2), 2, ((0, 0), (50, 2))),
        (Frozen(2, then=Schedule(times=(0.7, 1))), 2, ((0, 0), (50, 2), (70, 3))),
        (Schedule(times=(0.2, 0.45, 0.7, 1)), 2, ((0, 0), (50, 2), (70, 3))),
    ):
        freezer = FreezeOut(model, optimizer, 100, schedule=plan, example_inputs=vectors(0)[0])
        freezer.load_state_dict(state, allow_schedule_change=True)
        assert (freezer.num_frozen, freezer.timeline.changes) == (depth, changes)
        assert freezer.learning_rates[:2] == (0, 0)
        freezer.release()


def test_a_layer_that_has_thawed_is_annealed_to_its_next_freeze() -> None:
    thawed = FreezeOut(
        model := linear_net(),
        SGD(model.parameters(), 0.1),
        20,
        schedule=Changes(((2, 2), (4, 0))),
        example_inputs=vectors(0)[0],
    )
    for _ in range(6):
        thawed.step()
    state = thawed.state_dict()
    plan = Schedule(times=(0.5, 0.6, 0.8, 1))
    other = FreezeOut(
        again := linear_net(), SGD(again.parameters(), 0.1), 20, schedule=plan, layers=list(again)
    )
    other.load_state_dict(state, allow_schedule_change=True)
    assert other.timeline.changes == ((0, 0), (2, 2), (4, 0), (10, 1), (12, 2), (16, 3))
    expected = plan.factors(6, plan.timeline(4, 20))
    assert other.learning_rates == tuple(0.1 * each for each in expected)
    assert min(expected) > 0


def test_layers_without_parameters_are_nobodys_frozen_layers() -> None:
    model = nn.Sequential(nn.Dropout(0.5), *linear_net(3))
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(1), layers=list(model)
    )
    assert [layer.name for layer in freezer.layers] == ["1", "3", "5"]
    assert (freezer.num_frozen, model[1].weight.requires_grad) == (1, False)
    freezer.release()
    model[1].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"the layers in which nothing trains \(1: "):
        freezer = FreezeOut(
            model, SGD(model.parameters(), 0.1), None, schedule=Frozen(0), layers=list(model)
        )
    assert [layer.name for layer in freezer.layers] == ["1", "3", "5"]
    assert freezer.num_frozen == 1


class Scores(nn.Module):
    """Its output is a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: self.b(torch.tanh(self.a(y))).sum())(x)  # type: ignore[no-any-return]


def test_models_that_take_gradients_of_their_own_are_taken() -> None:
    """torch.func takes no hooks on saved tensors; what these would count is then not known."""
    model, x = Scores(), vectors(0)[0]
    freezer = FreezeOut(model, SGD(model.parameters(), 0.1), 10, example_inputs=x)
    assert len(freezer.layers) == 2
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), 10, schedule=Frozen(1), example_inputs=x
    )
    assert freezer.bytes_saved().activations is None


class Broken(Plan):
    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline(num_layers + 1, total_steps)


class Short(Frozen):
    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        return (1.0,)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Broken(), "gave a timeline of 5 layers and 20 steps, for 4 and 20"),
        (Short(1), "gave 1 factors for 4 layers"),
        (Changes(((0, 4),)), "4 of 4 layers frozen at step 0: at most 3 can be"),
    ],
)
def test_a_plan_that_contradicts_itself_is_named(plan: Plan, message: str) -> None:
    model = linear_net()
    with pytest.raises(InvalidValue, match=message):
        FreezeOut(
            model, SGD(model.parameters(), 0.1), 20, schedule=plan, example_inputs=vectors(0)[0]
        )


# --- what was saved -------------------------------------------------------------------------


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: Sequence[float]) -> None:
    """Steps that take so long, one after another, from the second on."""
    now = [0.0]
    for each in seconds:
        now.append(now[-1] + each)
    times = iter(now)
    monkeypatch.setattr("freezeout.clock.time.perf_counter", lambda: next(times))


def test_of_a_static_prefix_the_flops_are_told_and_no_seconds() -> None:
    """Four equal layers: a full step costs 4 forward and 8 backward passes of one; two frozen ones
    leave 4 and 4. What a step takes, loading its batch included, says nothing of a full one."""
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4)))
    x = torch.randn(8, 5)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    freezer = FreezeOut(model, optimizer, None, schedule=Frozen(2), example_inputs=x[:2])
    assert freezer.flops_saved() is None
    for _ in range(20):
        torch.autograd.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert freezer.seconds_saved() is None
    assert freezer.flops_saved() == pytest.approx(1 / 3)
    kept = freezer.bytes_saved()
    # Each frozen layer: 25 weights of 4 bytes, and as much momentum; the second one's input of
    # 5 numbers for each of 8 items. The first one's is the batch, which is there all the same.
    assert (kept.gradients, kept.optimizer_state) == (200, 200)
    assert kept.activations == 5 * 4 * 8
    assert freezer.summary() == (
        "froze 2 of 4 layers, 2 of them from the start; 33% of the network's FLOPs saved; "
        "time saved is not known, as no step trained all layers; a step takes 200 B of gradients, "
        "200 B of optimizer state and 160 B of activations less"
    )


def test_what_a_cache_saves_counts() -> None:
    """Steps in which it served are a kind of their own: 4 of 12 passes are left."""
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4)))
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(
        model, optimizer, None, schedule=Frozen(2), example_inputs=torch.randn(2, 5)
    )
    for step in range(20):
        if step >= 10:
            freezer.served()
        freezer.step()
    assert freezer.flops_saved() == pytest.approx((10 * 4 + 10 * 6) / (20 * 12))


def test_noise_is_no_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take longer with layers frozen, and a pause among too few of them."""
    model, x = linear_net(), vectors(0)[0]
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 40, schedule=EARLY, example_inputs=x)
    first = freezer.freeze_steps[0] or 0
    clocked(monkeypatch, [1.0] * (first - 1) + [2.0, 50.0] + [2.0] * 40)
    for step in range(40):
        torch.autograd.backward(model(x).sum())
        optimizer.step()
        freezer.step()
        if step == first + 2:  # three steps at depth 1 are too few
            assert freezer.seconds_saved() is None
            assert "time saved is not known, as too few steps were timed" in freezer.summary()
    saved = freezer.seconds_saved()
    assert saved is not None
    assert (saved.seconds, saved.share) == (0, 0)
    assert "no time saved: steps with frozen layers took as long" in freezer.summary()


def test_depths_of_few_steps_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps at each of two depths are six durations together."""
    model, x = linear_net(), vectors(0)[0]
    optimizer = SGD(model.parameters(), 0.1)
    plan = Schedule(times=(0.5, 0.65, 0.8, 1.0))
    freezer = FreezeOut(model, optimizer, 20, schedule=plan, example_inputs=x)
    clocked(monkeypatch, [4.0] * 9 + [3.0] * 3 + [2.0] * 3 + [1.0] * 4)
    for _ in range(20):
        torch.autograd.backward(model(x).sum())
        optimizer.step()
        freezer.step()
    saved = freezer.seconds_saved()
    assert saved is not None
    # Ten steps of 4 s; six whose median is 2.5 s; and the last four, too few, are held for such.
    assert (saved.seconds, saved.share) == (10 * 1.5, 15 / 80)
