"""The command `freezeout`."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from .errors import FreezeOutError, InvalidValue

try:
    import tyro

    from .lab.config import TrainConfig
    from .lab.estimate.config import EstimateConfig
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


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exit status: 0 done, 2 for a mistake in what it was given (one line says
    which), 128 + the signal's number when stopped."""
    words = sys.argv[1:] if argv is None else argv
    app = tyro.extras.SubcommandApp()
    commands: list[Callable[..., None]] = [train, estimate]
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
