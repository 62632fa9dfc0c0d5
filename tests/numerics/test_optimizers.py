"""Every optimizer is driven exactly as by somebody who makes a group for each layer and sets its
learning rate by hand, or it is refused by name when FreezeOut is built."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from freezeout import FreezeOut, Plan, Schedule, Timeline
from freezeout.errors import CheckpointError, FreezeOutError, InvalidType, InvalidValue
from tests.models import linear_net, loss_of, vectors

STEPS = 24
PLAN = Schedule(0.4, "linear")  # the first three of four layers freeze after 10, 15 and 20 steps
Groups = list[Any]


# --- small ones of the kinds that packages ship -----------------------------------------------


class Small(Optimizer):
    """SGD of a kind; what it keeps in its groups is in `extra`."""

    def __init__(self, parameters: Any, lr: Any = 0.05, **extra: Any) -> None:
        super().__init__(parameters, {"lr": lr, **extra})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.begin()
        for group in self.param_groups:
            self.begin_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, group)

    def begin(self) -> None: ...

    def begin_group(self, group: dict[str, Any]) -> None: ...

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * grad)


class StepInGroup(Small):
    """Adam without momentum, whose bias correction counts in the group (as fused ones do)."""

    def begin_group(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        square = self.state[p].setdefault("square", torch.zeros_like(p))
        square.lerp_(grad.square(), 0.01)
        p.addcdiv_(grad, (square / (1 - 0.99 ** group["step"])).sqrt() + 1e-3, value=-group["lr"])


class TensorInGroup(Small):
    """Its count is a tensor, changed in place."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        for group in self.param_groups:
            group["count"] = torch.zeros(())

    def begin_group(self, group: dict[str, Any]) -> None:
        group["count"].add_(group["lr"])

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * grad / (1 + group["count"]))


class ScheduleFree(Small):
    """Weights are evaluated at an average, which is weighted by the rates so far."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, weight_sum=0.0, largest=-1.0, training=True)

    def begin_group(self, group: dict[str, Any]) -> None:
        assert group["training"]
        group["largest"] = max(float(group["lr"]), group["largest"])
        weight = group["largest"] ** 2
        group["weight_sum"] += weight
        group["share"] = weight / group["weight_sum"] if weight else 0.0

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        z = self.state[p].setdefault("z", p.clone())
        p.lerp_(z, group["share"]).add_(grad, alpha=group["lr"] * (0.9 * (1 - group["share"]) - 1))
        z.sub_(grad, alpha=group["lr"])

    @torch.no_grad()
    def eval(self) -> None:
        self._switch(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def train(self) -> None:
        self._switch(True, 1 - 0.9)

    def _switch(self, training: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
            group["training"] = training


class OneRate(Small):
    """As Prodigy: an estimate for all groups, which have to have one rate."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1.0, d=1e-2, k=0)

    def begin(self) -> None:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("different lr values are not supported")
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        for group in self.param_groups:
            group["d"] = self.param_groups[0]["d"] + 1e-3 * sum(float(g.norm()) for g in grads)
            group["k"] += 1

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * group["d"] * grad)


class FirstRate(Small):
    """Uses the first group's rate for all."""

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.sub_(self.param_groups[0]["lr"] * grad)


class RelativeStep(Small):
    """As Adafactor without a rate: has its own."""

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        steps = self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
        p.sub_(0.05 / steps**0.5 * grad)


class OwnList(Small):
    """Holds its parameters in a list of its own, and moves them with their last gradients."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.mine = [p for group in self.param_groups for p in group["params"]]
        self.last = [torch.zeros_like(p) for p in self.mine]

    def begin(self) -> None:
        for p, last in zip(self.mine, self.last, strict=True):
            if p.grad is not None:
                last.copy_(p.grad)
            p.sub_(self.param_groups[0]["lr"] * last)

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None: ...


class GroupTable(Small):
    """As AdaBound: a table beside the groups, in their order."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.bounds = [group["lr"] * 2 for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, bound in zip(self.param_groups, self.bounds, strict=False):
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(min(group["lr"], bound) * p.grad)


class Lookahead(Optimizer):
    """Averages all that it holds, gradient or not; shares the groups of what is within."""

    def __init__(self, base: Optimizer, every: int = 3) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.every, self.calls = base, every, 0
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.calls += 1
        for group in self.param_groups if self.calls % self.every == 0 else ():
            group["syncs"] = group.get("syncs", 0) + 1
            for p in group["params"]:
                p.copy_(self.slow[p].lerp_(p, 0.5))
        return loss


class BareLookahead(Optimizer):
    """Never set up as an optimizer; its groups are a property, without a setter."""

    def __init__(self, base: Optimizer) -> None:
        self.base_optimizer = base
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.slow[p].lerp_(p, 0.5))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)


class PlacesLookahead(Lookahead):
    """Knows its slow weights by their places in the groups."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self.tables = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.base.step(closure)
        for group, slow in zip(self.param_groups, self.tables, strict=False):
            for p, q in zip(group["params"], slow, strict=False):
                p.copy_(q.lerp_(p, 0.5))


class SAM(Optimizer):
    """Goes up, computes gradients there by calling the closure, and steps from where it was."""

    def __init__(self, parameters: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(parameters, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        moved = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in moved]).norm()
        for p in moved:
            self.state[p]["old"] = p.clone()
            p.add_(0.05 / norm * p.grad)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in [p for g in self.param_groups for p in g["params"] if p.grad is not None]:
            p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        closure()
        self.second_step()


class Scaled(Small):
    """Around another: scales gradients by the rates that it sees (as LARC does)."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups)
        self.inside = {"the one": base}

    def begin(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(min(1.0, 0.02 / (group["lr"] + 1e-9)))
        self.inside["the one"].step()

    def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None: ...


class Copies(Optimizer):
    """Trains copies of the parameters, in another precision."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        copies = [p.detach().double() for g in self.param_groups for p in g["params"]]
        self.master = SGD(copies, 0.1)


def lookahead_of(*options: Any) -> Callable[[Groups], Optimizer]:
    return lambda groups: Lookahead(SGD(groups, 0.05, 0.9, *options))


# --- the table --------------------------------------------------------------------------------

Build = Callable[[Groups], Optimizer]
optim = torch.optim
TORCHS: dict[str, Build] = {
    "ASGD": lambda g: optim.ASGD(g, 0.1, t0=5),
    "Adadelta": lambda g: optim.Adadelta(g, 0.5),
    "Adafactor": lambda g: optim.Adafactor(g, 0.1),
    "Adagrad": lambda g: optim.Adagrad(g, 0.05, lr_decay=0.1),
    "Adam": lambda g: optim.Adam(g, 0.01, amsgrad=True),
    "AdamW": lambda g: optim.AdamW(g, torch.tensor(0.01), weight_decay=0.5),
    "Adamax": lambda g: optim.Adamax(g, 0.01),
    "Muon": lambda g: optim.Muon(g, 0.01),
    "NAdam": lambda g: optim.NAdam(g, 0.01),
    "RAdam": lambda g: optim.RAdam(g, 0.01),
    "RMSprop": lambda g: optim.RMSprop(g, 0.01, momentum=0.9, centered=True),
    "SGD": lambda g: optim.SGD(g, 0.1, 0.9, weight_decay=0.1, nesterov=True),
}
REFUSED_OF_TORCHS = {"LBFGS", "Rprop"}
OTHERS: dict[str, Build] = {
    "a step count in the group": StepInGroup,
    "a tensor in the group": TensorInGroup,
    "schedule-free": ScheduleFree,
    "Lookahead": lookahead_of(),
    "Lookahead around numbers in groups": lambda g: Lookahead(StepInGroup(g)),
    "Lookahead around Lookahead": lambda g: Lookahead(Lookahead(SGD(g, 0.05), 2)),
    "a bare Lookahead": lambda g: BareLookahead(optim.Adam(g, 0.01)),
    "SAM": lambda g: SAM(g, SGD, lr=0.1, momentum=0.9),
    "SAM around AdamW": lambda g: SAM(g, AdamW, lr=0.01),
    "a wrapper that looks at rates": lambda g: Scaled(SGD(g, 0.05)),
}
WHOLE = {  # taken where nothing is annealed
    "Rprop": lambda g: optim.Rprop(g, 0.01),
    "one rate": OneRate,
    "the first group's rate": FirstRate,
    "a rate of its own": RelativeStep,
    "no rate": lambda g: RelativeStep(g, lr=None),
    "a table of groups": GroupTable,
    "SGD": TORCHS["SGD"],
    "a step count in the group": StepInGroup,
    "schedule-free": ScheduleFree,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = linear_net()
    for layer in linears(model):  # matrices alone, for Muon
        layer.bias = None  # type: ignore[assignment]
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    return [part for part in model.modules() if isinstance(part, nn.Linear)]


def one_step(model: nn.Module, optimizer: Any, step: int) -> None:
    def closure() -> Tensor:
        loss = loss_of(model, *vectors(step))
        torch.autograd.backward(loss)
        return loss

    closure()
    optimizer.step(closure) if isinstance(optimizer, SAM) else optimizer.step()
    model.zero_grad()


def resting(model: nn.Module, optimizer: Any, layer: nn.Module) -> None:
    """By hand: a layer leaves; with an optimizer that averages, at its averaged weights."""
    if isinstance(optimizer, ScheduleFree):
        for p in layer.parameters():
            p.data.lerp_(optimizer.state[p]["z"], 1 - 1 / 0.9)
    layer.requires_grad_(False)


def by_hand(
    build: Build, plan: Plan, anneal: bool, timeline: Timeline, apart: bool
) -> Iterator[list[Tensor]]:
    """The model's parameters after each update: rates set by hand, frozen parameters taken out."""
    model = net()
    layers = linears(model)
    groups: Any = [{"params": list(layer.parameters())} for layer in layers]
    optimizer: Any = build(groups if apart else list(model.parameters()))
    listed = {id(g): g for g in optimizer.param_groups}
    base = [g["lr"] for g in listed.values()]
    depth = 0
    for step in range(STEPS):
        frozen = timeline.num_frozen(step)
        for layer in layers[depth:frozen]:
            resting(model, optimizer, layer)
        depth = frozen
        gone = {p for layer in layers[:frozen] for p in layer.parameters()}
        factors = plan.factors(step, timeline)
        for i, group in enumerate(listed.values()):
            if anneal:
                group["lr"] = base[i] * factors[i]
            group["params"] = [p for p in group["params"] if p not in gone]
        one_step(model, optimizer, step)
        yield [p.detach().clone() for p in model.parameters()]


def driven(build: Build, **options: Any) -> tuple[nn.Sequential, Any, FreezeOut]:
    model = net()
    optimizer = build(list(model.parameters()))
    options = {"schedule": PLAN, "example_inputs": vectors(0)[0], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model, optimizer, FreezeOut(model, optimizer, STEPS, **options)


def check_as_by_hand(build: Build, anneal: bool) -> None:
    model, optimizer, freezer = driven(build, anneal=anneal)
    kept: dict[str, Tensor] = {}
    reference = by_hand(build, PLAN, anneal, freezer.timeline, apart=anneal)
    for step, expected in enumerate(reference):
        before = optimizer.param_groups[0]["lr"]
        one_step(model, optimizer, step)
        for mine, its in zip(model.parameters(), expected, strict=True):
            assert torch.equal(mine, its), step
        assert optimizer.param_groups[0]["lr"] is before
        freezer.step()
        for name, p in model.named_parameters():
            if not p.requires_grad:
                assert torch.equal(kept.setdefault(name, p.detach().clone()), p)
    assert len(kept) == 3


def test_the_table_has_every_optimizer_of_torch() -> None:
    classes = {
        name
        for name, each in vars(torch.optim).items()
        if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
    }
    assert classes <= set(TORCHS) | REFUSED_OF_TORCHS | {"SparseAdam"}


@pytest.mark.parametrize("name", [*TORCHS, *OTHERS])
def test_each_layer_has_its_rate_and_its_numbers_as_by_hand(name: str) -> None:
    if name in TORCHS and not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    check_as_by_hand({**TORCHS, **OTHERS}[name], anneal=True)


@pytest.mark.parametrize("name", WHOLE)
def test_without_annealing_groups_stay_whole_as_by_hand(name: str) -> None:
    check_as_by_hand(WHOLE[name], anneal=False)


def test_sparse_adam() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(9, 5, sparse=True), nn.Linear(5, 5), nn.Linear(5, 3))

    data = torch.randint(9, (STEPS, 4, 3), generator=torch.Generator().manual_seed(1))
    mine, theirs = build(), build()
    sparse = optim.SparseAdam(mine[0].parameters(), 0.01)
    dense = SGD(mine[1:].parameters(), 0.1)
    freezer = FreezeOut(mine, [sparse, dense], STEPS, schedule=PLAN, example_inputs=data[0])
    hand = optim.SparseAdam(theirs[0].parameters(), 0.01)
    hands = SGD([{"params": list(layer.parameters())} for layer in linears(theirs)], 0.1)
    for step in range(STEPS):
        factors = PLAN.factors(step, freezer.timeline)
        hand.param_groups[0]["lr"] = 0.01 * factors[0]
        for group, factor in zip(hands.param_groups, factors[1:], strict=True):
            group["lr"] = 0.1 * factor
        for model, optimizers in ((mine, (sparse, dense)), (theirs, (hand, hands))):
            torch.autograd.backward(model(data[step]).square().sum())
            for optimizer in optimizers:
                if model is mine or factors[0] or optimizer is not hand:
                    optimizer.step()  # type: ignore[no-untyped-call]
            model.zero_grad()
        for layer, factor in zip(theirs, PLAN.factors(step + 1, freezer.timeline), strict=True):
            layer.requires_grad_(factor > 0)
        freezer.step()
        assert all(map(torch.equal, mine.parameters(), theirs.parameters())), step


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message", "takes_whole"),
    [
        (WHOLE["Rprop"], "^Rprop .* does not use the learning rate .* anneal=False", True),
        (WHOLE["a rate of its own"], "^RelativeStep .* does not use the learning rate", True),
        (WHOLE["no rate"], "^RelativeStep keeps no learning rate .* anneal=False", True),
        (OneRate, r"^OneRate .* one learning rate .* \(RuntimeError: different", True),
        (FirstRate, "^FirstRate .* one learning rate for all groups", True),
        (GroupTable, "^GroupTable .* cannot be split .* anneal=False", True),
        (lambda g: Lookahead(OneRate(g)), "^Lookahead .* one learning rate", True),
        (lambda g: SAM(g, optim.Rprop, lr=0.1), "^SAM .* does not use the learning rate", True),
        (OwnList, "^OwnList .*", False),
        (lambda g: PlacesLookahead(SGD(g, 0.1)), "^PlacesLookahead .*", False),
        (lambda g: Lookahead(optim.LBFGS(g)), "^LBFGS cannot be used", False),
        (Copies, "^Copies .* the SGD in it trains other tensors", False),
    ],
)
def test_what_cannot_be_driven_is_refused_by_name(
    build: Build, message: str, takes_whole: bool
) -> None:
    with pytest.raises(InvalidType, match=message) as refused:
        driven(build)
    assert isinstance(refused.value, FreezeOutError)
    if takes_whole:
        driven(build, anneal=False)
    else:
        with pytest.raises(InvalidType):
            driven(build, anneal=False)


def test_a_warm_up_from_a_rate_of_0_is_no_reason_to_refuse() -> None:
    driven(lambda g: StepInGroup(g, lr=0.0))
    with pytest.raises(InvalidType, match=r"RelativeStep .* does not use"):
        driven(lambda g: RelativeStep(g, lr=0.0))


def test_trying_out_leaves_no_trace() -> None:
    model = net()
    optimizer = Lookahead(StepInGroup(model.parameters()))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict())), optimizer.calls
    torch.manual_seed(3)
    with FreezeOut(model, optimizer, STEPS, example_inputs=vectors(0)[0]):
        after = (model.state_dict(), optimizer.state_dict()), optimizer.calls
        assert str(before) == str(after)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(()))
    assert not any("step" in vars(each) for each in (optimizer, optimizer.base))


def test_one_that_cannot_be_tried_out_is_told_of() -> None:
    class Picky(Small):
        def move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
            if p.numel() < 20:
                raise ValueError("too small")
            super().move(p, grad, group)

    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 30, bias=False))
    with pytest.warns(UserWarning, match="could not try Picky out .*too small"):
        FreezeOut(model, Picky(model.parameters()), STEPS, example_inputs=vectors(0)[0])


def test_an_optimizer_and_the_one_within_are_not_both_listed() -> None:
    model = net()
    outer = Lookahead(SGD(model.parameters(), 0.1))
    with pytest.raises(InvalidValue, match="the same SGD is listed twice: Lookahead and SGD both"):
        FreezeOut(model, [outer, outer.base], STEPS, example_inputs=vectors(0)[0])


# --- wrappers ---------------------------------------------------------------------------------


def test_the_two_steps_of_sam_without_its_step() -> None:
    model, optimizer, freezer = driven(OTHERS["SAM"])
    for step, expected in enumerate(by_hand(OTHERS["SAM"], PLAN, True, freezer.timeline, True)):
        torch.autograd.backward(loss_of(model, *vectors(step)))
        optimizer.first_step()
        torch.autograd.backward(loss_of(model, *vectors(step)))
        optimizer.second_step()
        model.zero_grad()
        freezer.step()
        if step < 9:  # then freezing is by FreezeOut alone
            assert all(map(torch.equal, model.parameters(), expected))
    assert freezer.num_frozen == 3


@pytest.mark.parametrize("where", ["inside", "closure"])
def test_an_error_in_a_wrapped_step_puts_all_groups_back(where: str) -> None:
    model, optimizer, _ = driven(lambda g: SAM(g, StepInGroup, lr=0.1))
    groups = list(optimizer.param_groups)

    def closure() -> None:
        assert optimizer.param_groups == groups  # the user's, as without FreezeOut
        if where == "closure":
            raise ZeroDivisionError
        torch.autograd.backward(loss_of(model, *vectors(0)))

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    torch.autograd.backward(loss_of(model, *vectors(0)))
    if where == "inside":
        optimizer.base_optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert [id(g) for g in optimizer.param_groups] == list(map(id, groups))
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_release_gives_wrappers_back() -> None:
    model, optimizer, freezer = driven(lookahead_of())
    scheduler = optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # wraps our step
    freezer.release()
    assert scheduler.get_last_lr() == [0.05]
    seen = []
    optimizer.base.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
    one_step(model, optimizer, 0)
    assert seen == [1]


# --- numbers in groups ------------------------------------------------------------------------


def test_the_users_group_shows_the_numbers_of_the_last_layer() -> None:
    model, optimizer, freezer = driven(ScheduleFree)
    for step in range(6):
        one_step(model, optimizer, step)
        freezer.step()
    total = sum(
        (0.05 * max(PLAN.factors(s, freezer.timeline)[3] for s in range(n + 1))) ** 2
        for n in range(6)
    )
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("own_value", [0, 100])
def test_a_number_that_the_user_sets_holds_for_all_layers(own_value: int) -> None:
    seen: list[int] = []

    class Noted(StepInGroup):
        def begin_group(self, group: dict[str, Any]) -> None:
            seen.append(group.get("step", 0))
            super().begin_group(group)

    model, optimizer, freezer = driven(Noted)
    for step in range(4):
        one_step(model, optimizer, step)
        freezer.step()
    optimizer.param_groups[0]["step"] = own_value
    seen.clear()
    one_step(model, optimizer, 4)
    assert seen == [own_value] * 4


RESUMED = {**OTHERS, **{f"whole: {name}": build for name, build in WHOLE.items()}}


def loadable(name: str) -> bool:
    """Our small wrappers have no state_dict of their own."""
    return "ookahead" not in name and "SAM" not in name and "wrapper" not in name


@pytest.mark.parametrize("freezer_first", [False, True])
@pytest.mark.parametrize("at", [1, 10, 21])
@pytest.mark.parametrize("name", [name for name in RESUMED if loadable(name)])
def test_a_resumed_run_has_the_same_bits(
    name: str, at: int, freezer_first: bool, tmp_path: Any
) -> None:
    options = {"anneal": not name.startswith("whole")}
    model, optimizer, freezer = driven(RESUMED[name], **options)
    for step in range(STEPS):
        if step == at:
            parts = model.state_dict(), optimizer.state_dict(), freezer.state_dict()
            torch.save(parts, tmp_path / "state")
        one_step(model, optimizer, step)
        freezer.step()
    other, its, resumed = driven(RESUMED[name], **options)
    states = torch.load(tmp_path / "state", weights_only=True)
    order = list(zip((other, its, resumed), states, strict=True))
    for part, state in reversed(order) if freezer_first else order:
        part.load_state_dict(state)
    # Saved again before any step, it is the same.
    assert str(resumed.state_dict()) == str(states[2])
    for step in range(at, STEPS):
        one_step(other, its, step)
        resumed.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert str(its.state_dict()) == str(optimizer.state_dict())
    assert str(resumed.state_dict()) == str(freezer.state_dict())


@pytest.mark.parametrize("freezer_first", [False, True])
def test_a_wrapper_is_resumed_whose_groups_are_not_the_inner_ones_after_loading(
    freezer_first: bool,
) -> None:
    def build(groups: Groups) -> Any:
        return Lookahead(ScheduleFree(groups))

    model, optimizer, freezer = driven(build)
    for step in range(STEPS):
        if step == 12:
            parts = model, optimizer, optimizer.base, freezer
            states = copy.deepcopy([part.state_dict() for part in parts])
            slow = [p.clone() for p in optimizer.slow.values()]
        one_step(model, optimizer, step)
        freezer.step()
    other, its, resumed = driven(build)
    order = list(zip((other, its, its.base, resumed), states, strict=True))
    for part, state in reversed(order) if freezer_first else order:
        part.load_state_dict(state)
    its.slow, its.calls = dict(zip(its.slow, slow, strict=True)), 12
    assert its.param_groups[0] is not its.base.param_groups[0]
    for step in range(12, STEPS):
        one_step(other, its, step)
        resumed.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_most_optimizers_add_nothing_to_the_state() -> None:
    model, optimizer, freezer = driven(TORCHS["Adam"])
    one_step(model, optimizer, 0)
    freezer.step()
    assert "numbers" not in freezer.state_dict()


def test_numbers_of_other_optimizers_are_refused() -> None:
    model, optimizer, freezer = driven(StepInGroup)
    one_step(model, optimizer, 0)
    freezer.step()
    state = freezer.state_dict()
    _, _, other = driven(StepInGroup)
    with pytest.raises(CheckpointError, match="of 2 optimizers, this FreezeOut has 1"):
        other.load_state_dict({**state, "numbers": state["numbers"] * 2})


class Thaws(Plan):
    """Two layers are frozen for a while, after some steps."""

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline(num_layers, total_steps, ((0, 0), (5, 2), (10, 0)))


@pytest.mark.parametrize("annealed", [False, True])
def test_layers_that_come_back_begin_with_fresh_numbers(annealed: bool) -> None:
    """Their averages begin with zeros, which only a count from zero corrects."""

    class Plain(Thaws):
        def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
            rates = super().factors(step, timeline)
            return tuple(f * (1 - i / 10) for i, f in enumerate(rates)) if annealed else rates

    model, optimizer, freezer = driven(StepInGroup, schedule=Plain())
    seen: list[tuple[int, int]] = []
    begin = optimizer.begin_group

    def noted(group: dict[str, Any]) -> None:
        begin(group)
        seen.append((group["step"], len(group["params"])))

    optimizer.begin_group = noted
    for step in range(12):
        seen.clear()
        one_step(model, optimizer, step)
        freezer.step()
        if step == 7:
            assert sorted(seen) == ([(8, 1)] * 2 if annealed else [(8, 2)])
    assert sorted(seen) == ([(2, 1)] * 2 + [(12, 1)] * 2 if annealed else [(2, 2), (12, 2)])


def test_frozen_layers_of_an_averaging_optimizer_keep_the_average() -> None:
    model, optimizer, freezer = driven(ScheduleFree)
    p = linears(model)[0].weight
    for step in range(10):
        one_step(model, optimizer, step)
        if step == 9:
            expected = p.detach().lerp(optimizer.state[p]["z"], 1 - 1 / 0.9)
            assert not torch.equal(p, expected)
        freezer.step()
    assert freezer.num_frozen == 1
    assert torch.equal(p, expected)
    optimizer.eval()
    assert torch.equal(p, expected)
    optimizer.train()
    assert torch.equal(p, expected)
    one_step(model, optimizer, 10)


def test_names_in_groups_go_with_their_parameters() -> None:
    class Named(Small):
        names: dict[Any, str]

        def begin_group(self, group: dict[str, Any]) -> None:
            assert [self.names[p] for p in group["params"]] == group["param_names"]

    model = net()
    optimizer = Named(model.parameters())
    optimizer.names = {p: name for name, p in model.named_parameters()}
    optimizer.param_groups[0]["param_names"] = list(optimizer.names.values())
    freezer = FreezeOut(model, optimizer, STEPS, schedule=PLAN, example_inputs=vectors(0)[0])
    for step in range(STEPS):
        one_step(model, optimizer, step)
        freezer.step()
    assert len(optimizer.param_groups[0]["param_names"]) == 4
