"""The study of views: accuracy and seconds with the cache, without it, and at equal time.

    python -m benchmarks.cache_study OUT_DIR --data-dir DIR      # goes on where it was stopped
    freezeout report OUT_DIR

CIFAR-10, 10,000 training images, 30 epochs, WRN-16-1, three seeds, with augmentation. Arms:
ordinary; FreezeOut; FreezeOut with the cache and 1, 2, 4 or 8 views an image; and two ordinary
runs shortened (lab/equal_time.py), one to the time of FreezeOut and one to that of the cached
arms, which take about the same time each: the table is followed by how far they differ. All arms
of a seed are trained in turn.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

from freezeout.lab.config import TrainConfig
from freezeout.lab.equal_time import equal_time_steps
from freezeout.lab.runs import CONFIG, WEIGHTS, Run, read_run
from freezeout.lab.train import resume, train

from .small_wrn import add_options, small_wrn
from .study import HEAD, cells, in_turn, print_table

VIEWS = (1, 2, 4, 8)


def made(config: TrainConfig, folder: Path) -> Run:
    """The run in the folder, trained or gone on with if it is not there to its end."""
    if not (folder / CONFIG).exists():
        train(replace(config, out=folder))
    elif not (folder / WEIGHTS).exists():
        resume(folder)
    return read_run(folder)


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    add_options(parser, "cifar10", 10_000)
    args = parser.parse_args()
    base = replace(small_wrn(args), validate="test")
    ordinary = replace(base, freezeout=False)
    cached = {f"cached, {v} views": replace(base, cache="ram", views=v) for v in VIEWS}
    runs = in_turn({"ordinary": ordinary, "FreezeOut": base, **cached}, args.out, made)
    usual = runs["ordinary"]
    lengths = {name: equal_time_steps(its, usual) for name, its in runs.items()}
    rivals = {
        "time of FreezeOut": lengths["FreezeOut"],
        "time of cached": median(lengths[name] for name in cached),
    }
    shortened = {name: replace(ordinary, steps=round(steps)) for name, steps in rivals.items()}
    runs |= in_turn(shortened, args.out, made)
    print_table([HEAD, *(cells(name, its, usual) for name, its in runs.items())])
    each = ", ".join(f"{lengths[name]:.0f} ({name})" for name in cached)
    most = max(abs(lengths[name] / rivals["time of cached"] - 1) for name in cached)
    print(f"ordinary steps in the time of cached: {each}; at most {most:.1%} from the median")


if __name__ == "__main__":
    main()
