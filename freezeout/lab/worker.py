"""One task of a sweep, in a process of its own, which ends when the sweep does.

    python -m freezeout.lab.worker < task      # started by sweep.py, never by hand

The task is one line of JSON on standard input, which stays open while the sweep lives. When it is
closed, be it because the sweep was killed, the process asks itself to stop: a run then saves and
ends after its step. Standard output is the run's log, and is locked, so that the sweep that comes
next starts no second process on the same run folder while the first is still saving.
"""

import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

from ..atomic import temporary_name, write_atomically
from ..errors import FreezeOutError
from .config import TrainConfig
from .runs import CONFIG


def main() -> None:
    """Do the task on standard input. Exit status as the command's."""
    # Unbuffered: a thread that waits inside of sys.stdin could not be left behind at the end.
    task = json.loads(open(0, "rb", buffering=0, closefd=False).readline())  # noqa: SIM115
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    warnings.showwarning = lambda message, *where, **more: print(f"freezeout: warning: {message}")
    _lock_log()
    try:
        config = TrainConfig.from_json(task["config"])
        if "step_costs" in task:
            _measure(config, Path(task["step_costs"]))
        else:
            _train(config)
    except (FreezeOutError, OSError) as error:
        print(f"freezeout: {' '.join(str(error).split())}", flush=True)
        number = getattr(error, "signal", None)
        sys.exit(2 if number is None else 128 + number)


def _train(config: TrainConfig) -> None:
    from .train import resume, train  # torch is loaded here, once it is this process's turn

    folder = config.folder
    if (folder / CONFIG).exists():
        # Another device than it was begun on may be free, and the data may have moved.
        resume(folder, device=config.device, data_dir=config.data_dir)
        return
    _remove_unborn(folder)
    train(config)


def _measure(config: TrainConfig, target: Path) -> None:
    from .job import Job

    job = Job(config)
    costs = job.step_costs()
    found = {
        "step_costs_seconds": costs,
        "steps_per_epoch": job.steps_per_epoch,
        "layers": job.layers,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(found, indent=2) + "\n")


def _remove_unborn(folder: Path) -> None:
    """A folder of a run that was killed before it had its first whole file."""
    if folder.is_dir() and {*folder.iterdir()} <= {temporary_name(folder / CONFIG)}:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _end_with_the_sweep() -> None:
    os.read(0, 1)  # nothing more is written, so this returns when the sweep is gone
    os.kill(os.getpid(), signal.SIGTERM)


def _lock_log() -> None:
    try:
        import fcntl
    except ImportError:  # not POSIX
        return
    fcntl.flock(sys.stdout.fileno(), fcntl.LOCK_EX)


if __name__ == "__main__":
    main()
