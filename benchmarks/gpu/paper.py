"""The paper's experiment in a few minutes: FreezeOut against ordinary training, of the same number
of epochs and of the same time.

WRN-16-4 (arXiv 1605.07146) on CIFAR-10, FreezeOut with layers that freeze from cubic 0.8 and from
linear 0.5, an ordinary run, and for each of the two an ordinary run shortened to its time
(`freezeout.lab.equal_time`). The seeds of an arm are trained beside each other on the one device,
and arms one after the other, so that each run shares the device with as many. As many epochs as
fit: that number is worked out once, from runs of a few steps.

The paper's batch of 50 images is small for a large GPU: 125 are taken, with its rate of 0.1.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from freezeout.cost import saving
from freezeout.lab.config import TrainConfig
from freezeout.lab.equal_time import equal_time_steps
from freezeout.lab.job import Job
from freezeout.lab.runs import METRICS, Epoch, Run, network_name, read_run

from .paper_data import unpack
from .paper_workers import train_beside
from .part import Case, Part, Row, Rows, Setup, Wrong

NAME, LENGTH, ORDINARY = "paper", "length", "ordinary"
ARMS: dict[str, dict[str, Any]] = {
    "cubic 0.8": {"how_scale": "cubic", "t_0": 0.8, "scale_lr": True},
    "linear 0.5": {"how_scale": "linear", "t_0": 0.5, "scale_lr": True},
}
SHORT = "ordinary, as long as "  # and the arm's name

_COMMON = TrainConfig(
    model="wrn", lr=0.1, validate="test", validate_every=10**6, freezeout=False, batch_size=125
)
_LARGE = replace(_COMMON, dataset="cifar10", depth=16, widen_factor=4)
_TINY = replace(
    _COMMON, dataset="digits", depth=10, widen_factor=1, batch_size=10, images=100, epochs=2
)
_DATA = {"cifar10": "CIFAR-10 (JPEG copy)"}
_SEEDS, _TINY_SEEDS = (0, 1, 2), (0, 1)
_TRIAL: dict[str, Any] = {
    "epochs": 3,
    "images": 25_000,
}  # steps that are timed, to know how many fit
_TINY_TRIAL: dict[str, Any] = {"epochs": 2, "images": 30}
_KEPT = 0.9  # of the time that is left, for what was not foreseen
_LEAST = 2  # epochs
_COLUMNS = ("step", "train_loss", "valid_error", "frozen_layers", "seconds", "step_seconds")


def cases(setup: Setup) -> list[Case]:
    """The length of runs, and each arm."""
    if setup.data is None and not setup.tiny:
        return [Case("data", _no_data)]
    freezing = [*ARMS][: 1 if setup.tiny else None]
    names = [ORDINARY, *freezing, *(SHORT + name for name in freezing)]
    arms = [Case(name, partial(_arm, setup, name)) for name in names]
    return [Case(LENGTH, partial(_length, setup)), *arms]


def _no_data() -> list[Row]:
    raise Wrong("CIFAR-10 is needed: --data CIFAR10.npz")


# --- runs ---------------------------------------------------------------------------------


def _problem(setup: Setup) -> TrainConfig:
    """What all runs have in common."""
    config = _TINY if setup.tiny else _LARGE
    if setup.data is not None and not setup.tiny:
        config = replace(config, data_dir=unpack(setup.data, _scratch(setup)))
    return replace(config, device=str(setup.device))


def _scratch(setup: Setup) -> Path:
    return setup.out / NAME


def _seeds(setup: Setup) -> tuple[int, ...]:
    return _TINY_SEEDS if setup.tiny else _SEEDS


def _train(setup: Setup, name: str, config: TrainConfig) -> list[Path]:
    """Run folders of an arm, one a seed, trained to their ends."""
    folder = _scratch(setup) / "runs" / name.replace(",", "").replace(" ", "-")
    configs = [replace(config, seed=s, out=folder / f"seed{s}") for s in _seeds(setup)]
    train_beside(configs, 4 if setup.on_gpu else 1, setup.deadline)
    return [each.folder for each in configs]


def _length(setup: Setup) -> list[Row]:
    """How many epochs fit, from the steps of short runs; and what a step costs in FLOPs."""
    runs = _scratch(setup) / "runs"
    if runs.exists():  # of another length, or another machine
        shutil.rmtree(runs)
    problem = _problem(setup)
    counting = replace(problem, device="cpu", precision="fp32", freezeout=True)
    flops = Job(counting).step_costs(measured=False)
    saved = [_counted(flops, {**vars(counting), **arm}, 1000) for arm in ARMS.values()]
    begin = time.monotonic()
    trial = replace(problem, **(_TINY_TRIAL if setup.tiny else _TRIAL))
    found = [read_run(path) for path in _train(setup, "trial", trial)]
    overhead = time.monotonic() - begin - max(run.seconds for run in found)
    # The first epoch has the device warm up.
    step_seconds = max(epoch.seconds / epoch.steps for run in found for epoch in run.epochs[1:])
    images = problem.images or 50_000
    steps = -(-images // problem.batch_size)
    # An ordinary run, and two for each arm; savings are believed by half.
    units = 1 + sum(2 * (1 - share / 2) for share in saved)
    left = _KEPT * (setup.deadline - time.monotonic()) - (1 + 2 * len(saved)) * overhead
    fit = max(_LEAST, int(left / (units * steps * step_seconds)))
    return [
        {
            "network": network_name(problem.to_json()),
            "data": _DATA.get(problem.dataset, problem.dataset),
            "precision": found[0].precision,
            "batch": problem.batch_size,
            "lr": problem.lr,
            "seeds": len(found),
            "epochs": problem.epochs if setup.tiny else fit,
            "steps_per_epoch": steps,
            "trial_step_seconds": step_seconds,
            "start_and_end_seconds": overhead,
            "step_flops": flops,
        }
    ]


def _counted(flops: Sequence[float], options: Mapping[str, Any], steps: int) -> float:
    """The share of FLOPs that freezing saves."""
    schedule = TrainConfig(**options).schedule
    return saving(flops, schedule.timeline(len(flops), steps).counts())


def _arm(setup: Setup, name: str) -> list[Row]:
    """Train an arm: its curves, a row for each seed, and one for all."""
    known = _results(setup)
    if LENGTH not in known:
        raise Wrong("the number of epochs is not known: finding it failed")
    length = known[LENGTH][0]
    total = length["epochs"] * length["steps_per_epoch"]
    config = replace(_problem(setup), epochs=length["epochs"])
    if name in ARMS:
        config = replace(config, freezeout=True, **ARMS[name])
    elif name.startswith(SHORT):
        steps = _equal_steps(known, name.removeprefix(SHORT))
        if steps is None:
            raise Wrong("its length is not known: another arm failed")
        config = replace(config, steps=max(1, round(steps)))
    curves = [_curves(path) for path in _train(setup, name, config)]
    rows = [_seed_row(each) for each in curves]
    whole: Row = {"arm": name, "steps": curves[0]["step"][-1]}
    whole["epochs"] = whole["steps"] / length["steps_per_epoch"]
    whole["test_error"] = fmean(row["test_error"] for row in rows)
    whole["median_seconds"] = fmean(row["median_seconds"] for row in rows)
    whole["wall_seconds"] = fmean(row["wall_seconds"] for row in rows)
    if name in ARMS:
        whole["saved_counted"] = _counted(length["step_flops"], vars(config), total)
    return [{"curves": curves}, *rows, whole]


def _results(setup: Setup) -> dict[str, list[Row]]:
    """The rows of the cases that are done."""
    found = json.loads((setup.out / f"{NAME}.json").read_text())["cases"]
    return {name: case["rows"] for name, case in found.items() if "rows" in case}


def _curves(path: Path) -> Row:
    """A finished run, column by column of its epochs."""
    run = read_run(path)
    lines = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    curves = {key: [_short(line[key]) for line in lines] for key in _COLUMNS}
    return {"seed": run.seed, "hardware": run.hardware, **curves}


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _seed_row(curves: Row) -> Row:
    run = _run(curves)
    return {
        "seed": run.seed,
        "test_error": run.error,
        "train_loss": curves["train_loss"][-1],
        "median_seconds": sum(epoch.steps * epoch.step_seconds for epoch in run.epochs),
        "wall_seconds": run.seconds,
    }


def _run(curves: Row) -> Run:
    """The run again, as far as its times and errors go."""
    epochs: list[Epoch] = []
    for number, (step, _, error, frozen, seconds, step_seconds) in enumerate(
        zip(*(curves[key] for key in _COLUMNS), strict=True), 1
    ):
        made = step - (epochs[-1].step if epochs else 0)
        epochs.append(Epoch(number, step, made, 0.0, error, frozen, seconds, step_seconds))
    return Run(
        path=Path(),
        values={"seed": curves["seed"]},
        total_steps=epochs[-1].step,
        precision="",
        hardware=curves["hardware"],
        epochs=tuple(epochs),
        savings=None,
    )


def _equal_steps(rows: Rows, name: str) -> float | None:
    """The number of ordinary steps that take as long as the arm; None: an arm is missing."""
    if name not in rows or ORDINARY not in rows:
        return None
    arm, ordinary = ([_run(each) for each in rows[n][0]["curves"]] for n in (name, ORDINARY))
    return equal_time_steps(arm, ordinary)


# --- table --------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    """The arms that are done, and FreezeOut less the shortened run, seed by seed."""
    if LENGTH not in rows:
        return ""
    (length,) = rows[LENGTH]
    text = (
        f"{length['network']} on {length['data']}, {length['epochs']} epochs of "
        f"{length['steps_per_epoch']} steps, batch {length['batch']}, rate {length['lr']:g}, "
        f"{length['precision']}; {length['seeds']} seeds, trained beside each other on the one "
        "device. Errors: mean and standard deviation over seeds. Seconds are a run's mean, with "
        "the others at its side: of steps, each epoch's median times their number; of training, "
        "by the clock, without evaluation. Saved of the ordinary run's: measured by either, and "
        "FLOPs as counted.\n\n"
        "| arm | steps | epochs | test error, % | of each seed | seconds of steps | of training "
        "| saved, steps | saved, training | saved, counted |\n" + "|---" * 10 + "|\n"
    )
    arms = [name for name in rows if name != LENGTH]
    for name in arms:
        *_, whole = rows[name]
        errors = [100 * error for error in _errors(rows[name])]
        spread = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
        cells = [
            name,
            f"{whole['steps']:,}",
            f"{whole['epochs']:.3g}",
            f"{fmean(errors):.2f}{spread}",
            ", ".join(f"{error:.2f}" for error in errors),
            f"{whole['median_seconds']:.1f}",
            f"{whole['wall_seconds']:.1f}",
            *_saved(rows, name),
        ]
        text += "| " + " | ".join(cells) + " |\n"
    for name in ARMS:
        if name in rows and SHORT + name in rows:
            pairs = zip(_errors(rows[name]), _errors(rows[SHORT + name]), strict=True)
            gaps = [100 * (mine - other) for mine, other in pairs]
            text += (
                f"\n{name} less {SHORT}it, in points of test error, seed by seed: mean "
                f"{fmean(gaps):+.2f}, from {min(gaps):+.2f} to {max(gaps):+.2f}.\n"
            )
    return text


def _errors(rows: Sequence[Row]) -> list[float]:
    return [row["test_error"] for row in rows if "seed" in row]


def _saved(rows: Rows, name: str) -> list[str]:
    """By medians of steps, by the clock, and by counted FLOPs."""
    if name == ORDINARY or ORDINARY not in rows:
        return ["", "", ""]
    whole, full = rows[name][-1], rows[ORDINARY][-1]
    steps = _equal_steps(rows, name)
    counted = whole.get("saved_counted")
    return [
        "" if steps is None else f"{1 - steps / full['steps']:.1%}",
        f"{1 - whole['wall_seconds'] / full['wall_seconds']:.1%}",
        "" if counted is None else f"{counted:.1%}",
    ]


PART = Part(
    NAME,
    "The paper: FreezeOut against ordinary training, of full length and shortened",
    cases,
    table,
)
