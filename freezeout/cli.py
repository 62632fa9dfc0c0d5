"""The command `freezeout`."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from .errors import FreezeOutError, InvalidValue
from .words import size

try:
    import tyro

    from .lab.config import TrainConfig
    from .lab.estimate.config import EstimateConfig
    from .lab.study import StudyOptions
except ImportError as error:  # the extra is not installed
    sys.exit(f"freezeout: {error}; the command needs: pip install 'freezeout[lab]'")


def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    resume: Path | None = None,
) -> None:
    """Train one network, with FreezeOut or without, into one run folder.

    Without options this is the paper's default run: DenseNet-BC-76 on CIFAR-100, 100 epochs. With
    --resume, all options come from the folder.

    Args:
        config: the run.
        resume: Go on with the run in this folder, with the configuration it has.
    """
    from .lab import train as lab  # torch is loaded here, not for --help

    if resume is None:
        lab.train(config)
    else:
        lab.resume(resume)


def estimate(config: Annotated[EstimateConfig, tyro.conf.arg(name="")]) -> None:
    """Predict what FreezeOut saves on a model: time, FLOPs and memory, before training it.

    One step is counted, which takes no memory, and measured on the device (60 steps at most).
    """
    from .lab.estimate.command import run  # torch is loaded here, not for --help

    run(config)


def sweep(
    file: tyro.conf.Positional[Path | None] = None,
    preset: Literal["quick", "mini", "paper"] | None = None,
    options: Annotated[StudyOptions, tyro.conf.arg(name="")] = StudyOptions(),  # noqa: B008
) -> None:
    """Train every run of a study: networks, data sets, strategies and seeds, and ordinary runs
    of full length and of each strategy's time.

    The study is a TOML file, a preset (quick: digits, minutes; mini: CIFAR-10 on a CPU, hours;
    paper: the paper's grid, GPUs), or options, which come before what the file or preset says.
    The same command goes on with a sweep that was stopped, and so does FOLDER/sweep.toml.

    Args:
        file: a TOML file; the names in it are the options' names, with underscores.
        preset: a study that is built in.
        options: the study.
    """
    from .lab import study
    from .lab.sweep import sweep as run_sweep

    if file is not None and preset is not None:
        raise InvalidValue(f"give either a file or --preset, not both: {file} and {preset}")
    if file is None and preset is None and not study.names_a_study(options):
        raise InvalidValue(
            f"say what to train: a TOML file, --preset {', '.join(study.PRESETS)}, or at least one "
            "of --models, --datasets and --strategies"
        )
    name, below = "sweep", StudyOptions()
    if preset is not None:
        name, below = preset, study.preset_options(preset)
    if file is not None:
        name = file.stem if file.stem not in ("study", "sweep") else file.absolute().parent.name
        below = study.read_options(file)
        if (home := study.folder_of_sweep(file)) is not None:
            below = replace(below, out=home)
    run_sweep(study.Study.from_options(study.merged(below, options), name))


def report(folder: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Write a page, tables and figures about the runs in a folder.

    Args:
        folder: holds run folders, at any depth.
        out: where the page and the figures go (FOLDER/report if not given).
    """
    from .lab.report import write_report

    page, warned = write_report(folder, out)
    for line in warned:
        print(f"freezeout: warning: {line}", file=sys.stderr)
    print(f"report: {page}")


def cache(
    action: tyro.conf.Positional[Literal["list", "remove"]],
    folder: tyro.conf.Positional[Path],
    key: tuple[str, ...] = (),
) -> None:
    """List or remove what runs have kept of their frozen layers in a folder (--cache FOLDER of
    train, or where=FOLDER of PrefixCache).

    Args:
        action: list: which model, how many of its layers, samples, bytes; remove: delete.
        folder: of the cache.
        key: Only what has a key, as `list` shows it, that begins so. Without, remove deletes the
            folder.
    """
    from .cache import files  # torch is loaded here, not for --help

    if not folder.is_dir():
        raise InvalidValue(f"there is no folder {folder}")
    files.check_folder(folder)
    remove = action == "remove"
    chosen = files.remove(folder, key) if remove else files.contents(folder, key)
    for held in chosen:
        print(held)
    total = size(sum(held.bytes for held in chosen))
    done, s = "removed" if remove else "held", "s" * (len(chosen) != 1)
    print(f"{folder}: {total} {done} under {len(chosen)} key{s}")


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exit status: 0 done, 2 for a mistake in what it was given (one line says
    which), 128 + the signal's number when stopped."""
    words = sys.argv[1:] if argv is None else argv
    app = tyro.extras.SubcommandApp()
    commands: list[Callable[..., None]] = [train, estimate, sweep, report, cache]
    for command in commands:
        app.command(command)
    warnings.showwarning = _show_warning
    try:
        _check_resume_alone(words)
        app.cli(prog="freezeout", args=words)
    except (FreezeOutError, OSError) as error:
        if not getattr(error, "is_said_elsewhere", False):  # by another rank of the run
            line = " ".join(str(error).split())
            print(f"freezeout: {line}", file=sys.stderr)
        signal = getattr(error, "signal", None)
        sys.exit(2 if signal is None else 128 + signal)
    except KeyboardInterrupt:
        print("freezeout: interrupted", file=sys.stderr)
        sys.exit(130)


def _check_resume_alone(words: list[str]) -> None:
    """An option beside --resume would be ignored, also where it repeats a default."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    others = [option for option in options if option not in ("--resume", "--help")]
    if "--resume" in options and others:
        raise InvalidValue(f"--resume takes the folder's own configuration; leave out {others[0]}")


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"freezeout: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
