"""`freezeout sweep`: every run of a study, each a `train` run in a process and folder of its own.

    freezeout sweep --preset quick

Stopped or killed anywhere, the same command goes on: finished runs stay as they are, the others
are resumed or begun. A run that fails is recorded with its error, and the rest goes on. A sweep's
folder holds, beside the runs,

    sweep.toml      the study, every option in it: `freezeout sweep FOLDER/sweep.toml` goes on
    sweep.json      how each run stands, and the error of one that failed
    GROUP/ARM/seedN.log      what the run's process said

No torch is loaded here: the processes do the work.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..atomic import write_atomically
from ..errors import CheckpointError, FreezeOutError, InvalidValue
from .config import TrainConfig
from .equal_time import equal_time_steps
from .forecast import Forecast
from .runs import CONFIG, WEIGHTS, Run, read_run
from .signals import stop_signals
from .study import STATE, STUDY, Cell, Study, impossible
from .sweep_display import SweepDisplay

COSTS = "step_costs.json"
_POLL_SECONDS = 0.05
# Of a run's configuration, what may differ when a sweep goes on.
_MAY_DIFFER = ("out", "device", "data_dir", "tensorboard")


class SweepStopped(FreezeOutError):
    """The sweep was asked to stop, and its runs have saved where they stand."""

    def __init__(self, command: str, number: int) -> None:
        super().__init__(f"stopped; go on with: {command}")
        self.signal = number


@dataclass
class _State:
    """How a cell's run stands."""

    cell: Cell
    status: str = "waiting"  # running, finished, failed
    error: str | None = None
    log: Path | None = None
    left: float = 1.0  # the share of its steps that an earlier sweep did not make

    @property
    def is_over(self) -> bool:
        return self.status in ("finished", "failed")


@dataclass
class _Slot:
    """A device, and the process at work on it."""

    device: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    state: _State | None = None
    begun: float = 0.0
    is_whole: bool = True  # the run was not begun before


def sweep(study: Study) -> Path:
    """Make every run of the study that is not finished, and return the sweep's folder.

    Raises:
        FreezeOutError: some runs failed (the others are made); the folder holds runs of another
            study, or another sweep is at work in it; `SweepStopped` on SIGINT or SIGTERM.
    """
    cells = study.cells()
    for cell in cells:  # before anything is written
        _check_same_run(cell)
    study.out.mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    with _locked(study.out), stop_signals(stop.note):
        _write_study(study)
        with SweepDisplay(len(cells)) as display:
            return _Sweep(study, cells, display, stop).run()


class _Sweep:
    """The runs of a sweep, and where they stand."""

    def __init__(
        self, study: Study, cells: Sequence[Cell], display: SweepDisplay, stop: "_Stop"
    ) -> None:
        self.study, self.display, self.stop = study, display, stop
        self.states = {cell.folder: _State(cell) for cell in cells}
        self.slots = _slots(study.devices)
        self.forecast = Forecast()
        self.is_ending = False

    def run(self) -> Path:
        """Make what is left."""
        self.take_what_is_done()
        done = sum(state.status == "finished" for state in self.states.values())
        self.display.introduce(self.study.out, done, self.continue_command)
        for state in self.states.values():
            reason = impossible(state.cell.config)
            if reason is not None and not state.is_over:
                self.fail(state, reason)
        try:
            self.write_state()
            self.measure_step_costs()
            while not self.stop.number and self.start_what_can() | self.is_busy:
                time.sleep(_POLL_SECONDS)
                self.look_after_processes()
                self.display.progress(self.running(), self.seconds_left())
        finally:
            self.end_processes()
            self.write_state()
        if self.stop.number:
            raise SweepStopped(self.continue_command, self.stop.number)
        self.display.finish(self.study.out)
        failed = [s for s in self.states.values() if s.status == "failed"]
        if failed:
            raise FreezeOutError(
                f"{len(failed)} of {len(self.states)} runs failed, the first being "
                f"{failed[0].cell.name}: {failed[0].error}; the same command tries them again"
            )
        return self.study.out

    @property
    def continue_command(self) -> str:
        return f"freezeout sweep {shlex.quote(str(self.study.out / STUDY))}"

    @property
    def is_busy(self) -> bool:
        return any(slot.process is not None for slot in self.slots)

    def running(self) -> list[str]:
        return [slot.state.cell.name for slot in self.slots if slot.state is not None]

    @property
    def homes(self) -> dict[Path, Cell]:
        """The folder of each network and data set, and one of its cells."""
        return {folder.parents[1]: state.cell for folder, state in self.states.items()}

    def take_what_is_done(self) -> None:
        """What earlier sweeps left: costs of steps, finished runs, and parts of others."""
        for home in self.homes:
            self.forecast.read_costs(home, home / COSTS)
        for folder, state in self.states.items():
            if (run := _finished_run(folder)) is not None:
                state.status = "finished"
                self.forecast.learn(state.cell, run, None)
            elif (run := _run_in(folder)) is not None and run.epochs:
                state.left = max(0.0, 1 - run.epochs[-1].step / max(1, run.total_steps))

    def measure_step_costs(self) -> None:
        """For the forecast, once for each network and data set, on the first device."""
        for home, cell in self.homes.items():
            target = home / COSTS
            waits = any(
                not s.is_over for s in self.states.values() if s.cell.folder.parents[1] == home
            )
            if not target.exists() and waits and not self.stop.number:
                self.display.say(f"measuring the cost of a step of {cell.problem}")
                # Of a network whose layers all freeze in time.
                config = replace(cell.config, freezeout=True, steps=None, out=None)
                slot = self.slots[0]
                target.parent.mkdir(parents=True, exist_ok=True)
                slot.process = _start(config, home / "step_costs.log", slot, str(target))
                while slot.process.poll() is None and not self.stop.number:
                    time.sleep(_POLL_SECONDS)
                _end([slot.process], self.stop)
                slot.process = None
            self.forecast.read_costs(home, target)

    def start_what_can(self) -> bool:
        """Give each free device the first run that can be made; whether any was begun, or found
        impossible."""
        any_change = False
        for slot in self.slots:
            while slot.process is None and (state := self.next_ready()) is not None:
                any_change = True
                self.start(slot, state)
        return any_change

    def next_ready(self) -> _State | None:
        for state in self.states.values():
            if state.status == "waiting" and all(
                self.states[folder].is_over for folder in state.cell.waits_for
            ):
                return state
        return None

    def start(self, slot: _Slot, state: _State) -> None:
        cell = state.cell
        config = cell.config
        if cell.is_equal_time:
            try:
                config = replace(config, steps=self.equal_time_steps(cell))
            except FreezeOutError as error:
                return self.fail(state, str(error))
        state.log = cell.folder.with_name(f"{cell.folder.name}.log")
        state.log.parent.mkdir(parents=True, exist_ok=True)
        state.status, slot.state, slot.begun = "running", state, time.monotonic()
        slot.is_whole = not cell.folder.exists()
        slot.process = _start(replace(config, device=slot.device), state.log, slot)
        self.write_state()
        return None

    def equal_time_steps(self, cell: Cell) -> int:
        """The length of an equal-time run: that of one which has been begun, else worked out."""
        for config in sorted(cell.folder.parent.glob(f"*/{CONFIG}")):  # of any seed
            begun = _run_in(config.parent)
            if begun is not None and isinstance(steps := begun.values["steps"], int):
                return steps
        baseline = cell.waits_for[-1].parent
        arms: list[Run] = []
        ordinary: list[Run] = []
        for folder in cell.waits_for:
            if (run := _finished_run(folder)) is not None:
                (ordinary if folder.parent == baseline else arms).append(run)
        if not arms or not ordinary:
            name = (cell.waits_for[0].parent if not arms else baseline).name
            raise FreezeOutError(f"its length is unknown: no run of {name} was finished")
        length = equal_time_steps(arms, ordinary)
        if length is None:
            raise FreezeOutError(
                f"its length is unknown: no run of {cell.waits_for[0].parent.name} was made on the "
                f"hardware of those of {baseline.name}"
            )
        return max(1, round(length))

    def look_after_processes(self) -> None:
        """Take in the processes that have ended."""
        for slot in self.slots:
            process, state = slot.process, slot.state
            if process is None or state is None or process.poll() is None:
                continue
            slot.process = slot.state = None
            run = _finished_run(state.cell.folder)
            if run is not None:
                state.status = "finished"
                wall = time.monotonic() - slot.begun
                self.forecast.learn(state.cell, run, wall if slot.is_whole else None)
                over = sum(s.is_over for s in self.states.values())
                self.display.finished(over, state.cell.name, run, self.seconds_left())
            elif self.is_ending:
                state.status = "waiting"  # stopped, with all that it has done saved
            else:
                self.fail(state, _last_words(state.log, process.returncode))
            self.write_state()

    def fail(self, state: _State, reason: str) -> None:
        state.status, state.error = "failed", reason
        over = sum(s.is_over for s in self.states.values())
        self.display.failed(over, state.cell.name, reason, state.log)

    def end_processes(self) -> None:
        """Ask the processes to save and stop, and wait until they have."""
        self.is_ending = True
        processes = [slot.process for slot in self.slots if slot.process is not None]
        if processes:
            self.display.say("stopping: the runs save where they stand")
        _end(processes, self.stop)
        self.look_after_processes()

    def seconds_left(self) -> float | None:
        """Until the last run is made, None while too little is known."""
        now = time.monotonic()
        begun = {s.state.cell.folder: s.begun for s in self.slots if s.state is not None}
        left: list[float | None] = []
        for folder, state in self.states.items():
            rivals = [self.states[path] for path in state.cell.waits_for]
            rival = next((r for r in rivals if r.status != "failed"), None)
            if state.is_over or (rivals and rival is None):
                continue
            rival_cell = None if rival is None else rival.cell
            seconds = self.forecast.seconds(state.cell, rival_cell, state.left)
            if seconds is not None:
                seconds = max(0.0, seconds - (now - begun.get(folder, now)))
            left.append(seconds)
        known = [seconds for seconds in left if seconds is not None]
        if left and not known:
            return None
        # A network of which nothing is known is taken to be as slow as the slowest.
        every = [max(known) if seconds is None else seconds for seconds in left]
        return max(sum(every) / len(self.slots), max(every, default=0.0))  # a run fills one slot

    def write_state(self) -> None:
        """How each run stands, for a reader and for the report."""
        out = self.study.out
        runs = [
            {"run": str(folder.relative_to(out)), "status": s.status, "error": s.error}
            for folder, s in self.states.items()
        ]
        write_atomically(out / STATE, json.dumps({"runs": runs}, indent=2) + "\n")


def _check_same_run(cell: Cell) -> None:
    """InvalidValue if the cell's folder holds a run of another configuration."""
    if not (cell.folder / CONFIG).exists():
        return
    mine = cell.config.to_json()
    may_differ = {*_MAY_DIFFER, *(("steps",) if cell.is_equal_time else ())}
    try:
        theirs = read_run(cell.folder).values
    except CheckpointError:
        return  # its process will say so
    for name, value in mine.items():
        if name not in may_differ and theirs[name] != value:
            raise InvalidValue(
                f"{cell.folder} holds a run with {name} = {theirs[name]!r}, and the sweep asks for "
                f"{value!r}; choose another folder with --out"
            )


def _run_in(folder: Path) -> Run | None:
    """The run in the folder, if there is one that can be read."""
    try:
        return read_run(folder)
    except CheckpointError:
        return None


def _finished_run(folder: Path) -> Run | None:
    """The run, if it was made to its end; its weights are what is written last."""
    run = _run_in(folder) if (folder / WEIGHTS).exists() else None
    return run if run is not None and run.is_finished else None


def _slots(devices: Sequence[str]) -> list[_Slot]:
    """One a device; several on the CPU share its processors."""
    environment = dict(os.environ)
    on_cpu = sum(device == "cpu" for device in devices)
    if on_cpu > 1 and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, _processors() // on_cpu))
    return [_Slot(device, environment) for device in devices]


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(
    config: TrainConfig, log: Path, slot: _Slot, step_costs: str | None = None
) -> subprocess.Popen[bytes]:
    """A process that trains what `config` describes, or measures the costs of its steps."""
    task: dict[str, Any] = {"config": config.to_json()}
    if step_costs is not None:
        task = {"config": replace(config, device=slot.device).to_json(), "step_costs": step_costs}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "freezeout.lab.worker"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=slot.environment,
            # Ctrl-C reaches this process alone, which asks the others to stop, once.
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already, and its exit status says so
    return process


def _end(processes: Sequence[subprocess.Popen[bytes]], stop: "_Stop") -> None:
    """Until the processes have ended; after a second signal they are killed."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        while process.poll() is None:
            if stop.again:
                process.kill()
            time.sleep(_POLL_SECONDS)
        if process.stdin is not None:
            process.stdin.close()


def _last_words(log: Path | None, status: int) -> str:
    """Why a process ended: its last line, or its signal."""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    try:
        lines = log.read_text(errors="replace").strip().splitlines() if log is not None else []
    except OSError:
        lines = []
    said = lines[-1].strip().removeprefix("freezeout: ") if lines else "it said nothing"
    return said if status else f"it ended before its last step: {said}"


def _write_study(study: Study) -> None:
    """Without touching a file that says the same."""
    path, text = study.out / STUDY, study.to_toml()
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """InvalidValue if another sweep is at work in the folder."""
    with open(folder / ".lock", "w") as file:
        _lock(file, folder)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not POSIX
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InvalidValue(f"another sweep is at work in {folder}") from error


class _Stop:
    """Whether a signal has asked the sweep to stop, which, and whether it came again."""

    number: int | None = None
    again: bool = False

    def note(self, number: int) -> None:
        """A signal has come."""
        self.again = self.number is not None
        self.number = number
