"""`freezeout estimate` as a user meets it: what it prints, and what each mistake says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from freezeout import Frozen, Schedule
from freezeout.cli import main
from freezeout.cost import paper_costs, paper_saving, saving
from freezeout.lab.estimate import estimate as estimating
from freezeout.lab.estimate.subject import Subject
from tests.command import Outcome, environment

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

# A user's module, in the current folder.
OWN = """
import torch
from torch import nn

SHIFT = torch.full((32,), 0.5)

def net(width=32):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(5)), nn.Linear(width, 4))

def good():
    return net(), torch.randn(16, 32)

def mapping():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net(), nn.Linear(4, 4)
        def forward(self, x, labels):
            logits = self.head(self.body(x))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
    return Model(), {"x": torch.randn(16, 32), "labels": torch.zeros(16, dtype=torch.long)}

def fixed_backbone():
    backbone = nn.Linear(2048, 2048).requires_grad_(False)
    head = nn.Sequential(backbone, nn.Linear(2048, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    return head, torch.randn(64, 2048)

def late():
    layers = [nn.Linear(8, 8) for _ in range(12)]
    layers += [nn.Linear(8, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 4)]
    return nn.Sequential(*layers), torch.randn(64, 8)

def wrong_shape():
    return net(), torch.randn(16, 31)

def reads_values():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()
        def forward(self, x):
            return self.body(x if x.abs().sum().item() > 0 else -x)
    return Model(), torch.randn(16, 32)

class Shifted(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.body, self.shift = net(), torch.full((32,), 0.5) if own else None
    def forward(self, x):
        return self.body(x - (SHIFT if self.shift is None else self.shift))

def made_at_import():
    return Shifted(own=False), torch.randn(16, 32)

def no_buffer():
    return Shifted(own=True), torch.randn(16, 32)

def lazy():
    layers = [nn.LazyLinear(32), *net()[1:]]
    return nn.Sequential(*layers), torch.randn(16, 32)

def reads_values_at_once():
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
    return nn.Sequential(nn.Dropout(rates[1]), *net()), torch.randn(16, 32)

def fails():
    raise OSError("no such weights")

def alone():
    return net()

def no_tensor():
    return net(), 3

def no_parameters():
    return nn.ReLU(), torch.randn(4, 4)

def huge():
    return nn.Sequential(*(nn.Linear(16384, 16384) for _ in range(12))), torch.randn(4, 16384)

number = 3
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: Patch) -> Path:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return tmp_path


def estimate(capsys: Capture, *arguments: object) -> Outcome:
    """`freezeout estimate ...` in this process. What `main` does not turn into a line is raised."""
    capsys.readouterr()
    status: Any = 0
    try:
        main(["estimate", "--device", "cpu", *map(str, arguments)])
    except SystemExit as end:
        status = end.code
    return Outcome(status, *capsys.readouterr())


def unwrapped(outcome: Outcome) -> str:
    return " ".join(outcome.out.split())


def read(capsys: Capture, *arguments: object) -> dict[str, Any]:
    ended = estimate(capsys, "--json", *arguments)
    assert ended.status == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


SMALL = ("--model", "wrn", "--depth", 10, "--widen-factor", 1, "--batch-size", 8, "--images", 800)
COUNTED = ("--model", "own_networks:good", "--no-measure", "--images", 1600)


def test_a_table_that_a_person_reads(capsys: Capture) -> None:
    ended = estimate(capsys, *SMALL, "--epochs", 2, "--lr", 0.2)
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("wrn: 77,850 parameters in 5 layers, 8 items a step, ")
    assert "SGD" in lines[0]
    assert max(map(len, lines[1:])) <= 80
    shown = {line.strip().split("  ")[0]: line for line in lines if line.startswith("  ")}
    assert "103 steps, 52%" in shown["stem"]
    assert "never" in shown["head"]
    assert shown["the run"].split() == ["the", "run", "ordinary", "cubic", "0.8"]
    assert shown["steps"].split() == ["steps", "200", "200"]
    assert shown["layers freeze at"].split()[-4:] == ["none", "52%", "to", "86%"]
    # 0.2 / 0.512, at a whole step: 103 of 200.
    assert shown["highest learning rate"].split()[-2:] == ["0.2", "0.388"]
    assert shown["time saved"].split()[-1].endswith("%")
    start, end = (shown[each].split() for each in ("memory at the start", "at the end"))
    assert start[-4:-2] == start[-2:] == end[-4:-2] != end[-2:]  # the number and its unit
    assert shown["batch of the same memory, then"].split()[-2] == "8"


def test_json_holds_what_the_schedule_and_the_counts_say(capsys: Capture) -> None:
    found = read(capsys, *COUNTED, "--epochs", 10, "--t-0", 0.5, "--how-scale", "linear")
    ordinary, run = found["runs"]
    step = found["step"]
    one = 2 * 16 * 32 * 32  # a square layer's FLOPs
    assert step["count"]["forward"] == [one] * 5 + [one // 8]
    assert step["count"]["backward"][0] == 9 * one + one // 4  # all but the input's gradient
    assert step["seconds"] is None
    assert run["total_steps"] == ordinary["total_steps"] == 1000
    timeline = Schedule(0.5, "linear").timeline(6, 1000)
    assert tuple(run["freeze_steps"]) == timeline.freeze_steps
    assert (ordinary["frozen"], run["frozen"]) == (0, 0)
    costs = [sum(step["count"]["forward"]) + each for each in step["count"]["backward"]]
    assert (
        run["saved"]
        == run["flops_saved"]
        == pytest.approx(saving(costs, timeline.counts()), abs=1e-12)
    )
    assert run["flops"] == pytest.approx(ordinary["flops"] * (1 - run["saved"]))
    assert run["largest_rate"] == pytest.approx(0.2)
    peaks = [each["peak"] for each in step["memory"]["steps"]]
    assert run["peak_bytes"] == [peaks[0], peaks[1], peaks[5]]
    assert run["paper_saved"] is None
    assert found["versions"]["torch"]


def test_measured_seconds_make_the_saving(capsys: Capture) -> None:
    found = read(capsys, *SMALL, "--epochs", 2, "--cache")
    costs, cached = found["step"]["seconds"], found["step"]["cached_seconds"]
    assert len(costs) == len(cached) == 5
    ordinary, run, served = found["runs"]
    assert ordinary["seconds"] == pytest.approx(200 * costs[0])
    assert run["saved"] == pytest.approx(saving(costs, Schedule().timeline(5, 200).counts()))
    assert run["seconds"] == pytest.approx((1 - run["saved"]) * ordinary["seconds"])
    assert served["name"] == "cubic 0.8, cached"
    assert served["seconds"] <= run["seconds"]
    assert all(with_it <= without for with_it, without in zip(cached, costs, strict=True))


def test_measuring_takes_at_most_60_steps(capsys: Capture, monkeypatch: Patch) -> None:
    real, steps = Subject.step, 0

    def counted(self: Subject) -> None:
        nonlocal steps
        steps += "Fake" not in type(next(self.model.parameters())).__name__
        real(self)

    monkeypatch.setattr(Subject, "step", counted)
    assert estimate(capsys, "--model", "own_networks:good", "--cache").status == 0
    assert 20 < steps <= 60


def test_every_strategy_can_be_compared(capsys: Capture) -> None:
    found = read(capsys, *COUNTED, "--compare")
    runs = found["runs"]
    assert len(runs) == 1 + 2 * 3 * 7
    for run in runs[1:]:
        schedule = Schedule(**run["schedule"])
        timeline = schedule.timeline(6, run["total_steps"])
        assert run["largest_rate"] == pytest.approx(0.1 * max(schedule.factors(0, timeline)))
        assert tuple(run["freeze_steps"]) == timeline.freeze_steps
    ended = estimate(capsys, *COUNTED, "--compare")
    rows = [line for line in ended.out.splitlines() if line.startswith("  cubic 0.")]
    assert len(rows) == 7
    assert "3.7 !" in rows[0]
    assert "rates marked ! start above 10 times the base learning rate" in unwrapped(ended)
    assert max(map(len, ended.out.splitlines()[1:])) <= 80


@pytest.mark.parametrize("how_scale", ["linear", "cubic"])
def test_a_target_is_turned_into_the_latest_t_0(capsys: Capture, how_scale: str) -> None:
    arguments = (*COUNTED, "--how-scale", how_scale)
    found = read(capsys, *arguments, "--target-saving", 0.2)
    run = found["runs"][1]
    assert 0.2 <= run["saved"] < 0.21
    later = read(capsys, *arguments, "--t-0", run["schedule"]["t_0"] + 0.001)
    assert later["runs"][1]["saved"] < 0.2


def test_a_target_that_takes_steep_rates_says_so(capsys: Capture) -> None:
    found = read(capsys, *COUNTED, "--target-saving", 0.49)
    assert found["runs"][1]["largest_rate"] > 1
    assert any("times the base learning rate" in remark for remark in found["remarks"])
    unscaled = read(capsys, *COUNTED, "--target-saving", 0.49, "--no-scale-lr")
    assert unscaled["remarks"] == []


def test_a_time_budget_is_turned_into_epochs(capsys: Capture) -> None:
    found = read(capsys, *SMALL, "--time-budget", "1h30m")
    step_seconds = found["step"]["seconds"][0]
    ordinary, run = found["runs"]
    assert ordinary["epochs"] == int(5400 / (100 * step_seconds))
    assert run["epochs"] > ordinary["epochs"]
    assert run["seconds"] <= 5400 < run["seconds"] * (1 + 1.5 / run["epochs"])


def test_the_papers_formula_stands_beside_densenet(capsys: Capture) -> None:
    found = read(capsys, "--no-measure", "--depth", 10, "--batch-size", 2)
    assert found["runs"][1]["paper_saved"] == paper_saving(paper_costs(10, 12), Schedule())


@pytest.mark.parametrize("frozen", ["2", "-4", "0.4"])
def test_layers_frozen_from_the_start(capsys: Capture, frozen: str) -> None:
    found = read(capsys, *COUNTED, "--frozen", frozen)
    ordinary, run = found["runs"]
    line = Frozen(2, then=Schedule()).timeline(6, run["total_steps"])
    step = found["step"]
    costs = [sum(step["count"]["forward"]) + each for each in step["count"]["backward"]]
    assert (ordinary["frozen"], run["frozen"], run["name"]) == (0, 2, "cubic 0.8 frozen 2")
    assert tuple(run["freeze_steps"]) == line.freeze_steps
    assert run["saved"] == pytest.approx(saving(costs, line.counts()), abs=1e-12)
    peaks = [each["peak"] for each in step["memory"]["steps"]]
    assert run["peak_bytes"] == [peaks[2], peaks[2], peaks[5]]
    assert ordinary["peak_bytes"][0] == peaks[0]


def test_layers_frozen_from_the_start_in_a_table(capsys: Capture) -> None:
    ended = estimate(capsys, *SMALL, "--epochs", 2, "--frozen", "group1_block1", "--t-0", 1)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    shown = {line.strip().split("  ")[0]: line for line in lines if line.startswith("  ")}
    assert max(map(len, lines[1:])) <= 80
    assert "frozen at the start" in shown["stem"]
    assert "frozen at the start" in shown["group1_block1"]
    assert "never" in shown["group2_block1"]
    assert shown["the run"].split() == ["the", "run", "ordinary", "frozen", "2"]
    assert shown["layers freeze at"].split()[-2:] == ["none", "start"]


def test_layers_frozen_from_the_start_with_every_other_option(capsys: Capture, home: Path) -> None:
    given = (*SMALL, "--frozen", 2)
    found = read(capsys, *given, "--cache", "--time-budget", "1h", "--plot", home / "figure.svg")
    ordinary, run, served = found["runs"]
    assert served["name"] == "cubic 0.8 frozen 2, cached"
    assert ordinary["epochs"] < run["epochs"] <= served["epochs"]
    assert run["seconds"] <= 3600
    assert (home / "figure.svg").exists()
    compared = read(capsys, *COUNTED, "--frozen", 2, "--compare")["runs"]
    assert {run["frozen"] for run in compared[1:]} == {2}
    assert len({run["name"] for run in compared}) == 1 + 2 * 3 * 7
    ended = estimate(capsys, *COUNTED, "--frozen", 2, "--compare")
    assert max(map(len, ended.out.splitlines()[1:])) <= 80
    # The latest t_0 that saves half, beside the two layers.
    saved, later = (
        read(capsys, *COUNTED, "--frozen", 2, *more)["runs"][1]["saved"]
        for more in (("--target-saving", 0.45), ("--t-0", t_0_found(capsys) + 0.001))
    )
    assert later < 0.45 <= saved
    easy = read(capsys, *COUNTED, "--frozen", 2, "--target-saving", 0.05)
    assert easy["runs"][1]["schedule"]["t_0"] == 1
    assert "2 layers that are frozen from the start save" in easy["remarks"][0]


def t_0_found(capsys: Capture) -> float:
    found = read(capsys, *COUNTED, "--frozen", 2, "--target-saving", 0.45)
    return float(found["runs"][1]["schedule"]["t_0"])


def test_layers_that_the_maker_froze_are_frozen_in_an_ordinary_run_too(capsys: Capture) -> None:
    model = ("--model", "own_networks:fixed_backbone", "--no-measure")
    ordinary, run = read(capsys, *model)["runs"]
    assert (ordinary["frozen"], run["frozen"], run["name"]) == (1, 1, "cubic 0.8")
    ordinary, run = read(capsys, *model, "--frozen", 2)["runs"]
    assert (ordinary["frozen"], run["frozen"], run["name"]) == (1, 2, "cubic 0.8 frozen 2")


def test_a_models_own_loss_and_names_are_taken(capsys: Capture) -> None:
    found = read(capsys, "--model", "own_networks:mapping", "--optimizer", "AdamW")
    assert found["step"]["batch_size"] == 16
    assert [layer["name"] for layer in found["step"]["layers"]][-1] == "head"
    fixed = found["step"]["memory"]["steps"][0]["fixed"]
    parameters = sum(layer["parameters"] for layer in found["step"]["layers"])
    assert fixed == pytest.approx(3 * 4 * parameters, rel=0.01)


def test_a_model_that_reads_values_is_counted_with_real_tensors(capsys: Capture) -> None:
    found = read(capsys, "--model", "own_networks:reads_values")
    assert "counted with real tensors" in found["remarks"][0]
    without = read(capsys, "--model", "own_networks:good")
    assert found["step"]["count"] == without["step"]["count"]


@pytest.mark.parametrize("function", ["made_at_import", "no_buffer", "lazy"])
def test_other_tensors_than_parameters_do_no_harm(capsys: Capture, function: str) -> None:
    """Constants of the file, attributes that are no buffers, and parameters without sizes yet."""
    without = read(capsys, "--model", "own_networks:good", "--no-measure")["step"]["count"]
    model = "--model", f"own_networks:{function}"
    assert read(capsys, *model, "--no-measure")["step"]["count"]["forward"] == without["forward"]
    assert read(capsys, *model)["step"]["count"]["backward"] == without["backward"]


def test_a_function_that_reads_values_is_called_for_real_tensors(capsys: Capture) -> None:
    found = read(capsys, "--model", "own_networks:reads_values_at_once")
    assert "counted with real tensors" in found["remarks"][0]
    ended = estimate(capsys, "--model", "own_networks:reads_values_at_once", "--no-measure")
    assert "cannot be counted without real tensors" in ended.err


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("fixed_backbone", "with all but the last layer frozen a step still costs"),
        ("late", "the cost sits in the last layers"),
    ],
)
def test_a_saving_below_two_percent_is_explained(capsys: Capture, function: str, why: str) -> None:
    ended = estimate(capsys, "--model", f"own_networks:{function}", "--no-measure", "--t-0", 0.95)
    assert ended.status == 0
    assert "this saves less than 2%" in unwrapped(ended)
    assert why in unwrapped(ended)


def test_counting_takes_no_memory_for_weights(home: Path) -> None:
    """12.9 GB of weights, and as much of gradients and momentum, in less than 4 GB, of which a
    build of torch for CUDA takes two."""
    code = (
        "import resource, sys; from freezeout.cli import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    arguments = ["estimate", "--model", "own_networks:huge", "--no-measure", "--json"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(),
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    first = json.loads(ended.stdout)["step"]["memory"]["steps"][0]
    assert first["peak"] > 3 * 12.8e9
    assert int(ended.stderr.split()[-1]) < 4e6  # KiB


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_drawn(capsys: Capture, home: Path, suffix: str) -> None:
    file = home / f"figure{suffix}"
    ended = estimate(capsys, *COUNTED, "--plot", file)
    assert ended.status == 0
    assert str(file) in ended.err
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert file.read_bytes().startswith(start)
    assert set(os.listdir(home)) - {"__pycache__"} == {file.name, "own_networks.py"}
    if suffix == ".svg":
        assert b"<path" in file.read_bytes()


def test_what_is_drawn_is_the_costs_and_the_schedule(monkeypatch: Patch, home: Path) -> None:
    from matplotlib.axes import Axes

    from freezeout.lab.estimate.config import EstimateConfig
    from freezeout.lab.estimate.figure import draw

    found = estimating.estimate(
        EstimateConfig(model="own_networks:good", measure=False, device="cpu", images=1600)
    )
    saved_area, curves = 0.0, []
    fill, plot = Axes.fill_between, Axes.plot

    def filled(self: Axes, x: Any, low: Any, high: Any, **options: Any) -> Any:
        nonlocal saved_area
        if "hatch" in options:
            saved_area += (x[1] - x[0]) * (high - low)
        return fill(self, x, low, high, **options)

    def plotted(self: Axes, x: Any, y: Any, **options: Any) -> Any:
        curves.append((x, y))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "fill_between", filled)
    monkeypatch.setattr(Axes, "plot", plotted)
    draw(found, home / "figure.svg")
    run = found.runs[1]
    assert saved_area == pytest.approx(run.saved, abs=1e-9)
    for (x, y), end in zip(curves, run.freeze_steps, strict=False):
        for share, rate in zip(x, y, strict=True):
            step = round(share * run.total_steps)
            factor = Schedule().factors(step, Schedule().timeline(6, run.total_steps))
            assert rate == pytest.approx(0.1 * factor[run.freeze_steps.index(end)], abs=1e-12)


MISTAKES = {
    "--model nowhere": ("densenet, wrn, vgg or timm:NAME", "'nowhere'"),
    "--model nowhere:good": ("no module 'nowhere'",),
    "--model own_networks.inner:good": ("own_networks.inner",),
    "--model own_networks:god": ("no function 'god'", "close matches: good"),
    "--model own_networks:number": ("no function 'number'",),
    "--model own_networks:fails": ("own_networks:fails failed with OSError: no such weights",),
    "--model own_networks:alone": ("must return a pair", "it returned Sequential"),
    "--model own_networks:no_tensor": ("hold no tensor",),
    "--model own_networks:no_parameters": ("no parameters",),
    "--model own_networks:wrong_shape": ("16x31 and 32x32",),
    "--model own_networks:wrong_shape --no-measure": ("31",),
    "--model own_networks:reads_values --no-measure": ("leave out --no-measure",),
    "--model own_networks:good --target-saving 0.9": ("90.0% cannot be reached", "at most"),
    "--model own_networks:good --target-saving 20": ("share in (0, 1)", "20"),
    "--model own_networks:good --target-saving 0.2 --compare": ("not both",),
    "--model own_networks:good --time-budget soon": ("2h, 90m", "'soon'"),
    "--model own_networks:good --time-budget 2h --no-measure": ("leave out --no-measure",),
    "--model own_networks:good --images 1000000000 --time-budget 1s": ("not one epoch fits",),
    "--model own_networks:good --cache --no-measure": ("leave out --no-measure",),
    "--model own_networks:good --plot x.gif": (".png, .svg or .pdf", "x.gif"),
    "--model own_networks:good --plot no/x.png": ("folder no does not exist",),
    "--model own_networks:good --optimizer SDG": ("'SDG'", "SGD"),
    "--model own_networks:good --optimizer LBFGS": ("LBFGS",),
    "--model own_networks:good --how-scale quartic": ("'quartic'",),
    "--model own_networks:good --t-0 0": ("t_0 must be in (0, 1]",),
    "--model own_networks:good --precision fp8": ("fp32, bf16", "'fp8'"),
    "--model own_networks:good --epochs 0": ("epochs must be at least 1, got 0",),
    "--model own_networks:good --lr 0": ("lr must be in (0, inf), got 0",),
    "--model own_networks:good --device cuda:7": ("cuda:7",),
    "--model wrn --growth 3": ("growth is not an option of wrn",),
    "--model own_networks:good --frozen 99": ("first=99", "0 to 5 of them can be frozen"),
    "--model own_networks:good --frozen 6 --no-measure": ("first=6", "0 to 5 of them"),
    "--model own_networks:good --frozen 0.0.1": ("a number of layers", "got '0.0.1'"),
    "--model own_networks:good --frozen layer99": ("a module's name such as", "got 'layer99'"),
    "--model own_networks:good --frozen 0": ("got '0'", "leave it out"),
    "--model own_networks:good --frozen 5 --target-saving 0.9": ("90.0% cannot be reached",),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(capsys: Capture, words: str) -> None:
    ended = estimate(capsys, *words.split())
    assert ended.status == 2
    assert ended.out == ""
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("freezeout: ")
    for part in MISTAKES[words]:
        assert part in lines[0]
