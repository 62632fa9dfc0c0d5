"""The study of views: accuracy and seconds with the cache, without it, and at equal time.

    python -m benchmarks.cache_study OUT_DIR --data-dir DIR      # goes on where it was stopped

CIFAR-10, 10,000 training images, 30 epochs, WRN-16-1, three seeds, with augmentation. Arms:
ordinary; FreezeOut; FreezeOut with the cache and 1, 2, 4 or 8 views an image; and, for each of
the cached ones, an ordinary run shortened to the same time. Prints a table; runs are folders of
OUT_DIR, for `freezeout report`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from freezeout.lab.config import TrainConfig
from freezeout.lab.run_folder import CONFIG, METRICS, WEIGHTS
from freezeout.lab.train import resume, train

SEEDS = (0, 1, 2)
VIEWS = (1, 2, 4, 8)


def run(config: TrainConfig) -> tuple[float, float, int]:
    """Test error, training seconds and steps; of the run in the folder, where there is one."""
    folder = config.folder
    if not (folder / CONFIG).exists():
        train(config)
    elif not (folder / WEIGHTS).exists():
        resume(folder)
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return rows[-1]["valid_error"], sum(row["seconds"] for row in rows), rows[-1]["step"]


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    base = TrainConfig(
        model="wrn",
        depth=16,
        widen_factor=1,
        dataset=args.dataset,
        data_dir=args.data_dir,
        images=args.images,
        validate="test",
        epochs=args.epochs,
        cache_budget="8G",
    )
    arms = {"ordinary": replace(base, freezeout=False), "FreezeOut": base}
    arms |= {f"cached, {v} views": replace(base, cache="ram", views=v) for v in VIEWS}
    found: dict[str, list[tuple[float, float, int]]] = {}

    def all_seeds(name: str, config: TrainConfig) -> None:
        folder = args.out / name.replace(", ", "-").replace(" ", "-").lower()
        found[name] = [
            run(replace(config, seed=seed, out=folder.with_name(f"{folder.name}-seed{seed}")))
            for seed in SEEDS
        ]

    for name, config in arms.items():
        all_seeds(name, config)
    full = median(seconds for _, seconds, _ in found["ordinary"])
    steps = found["ordinary"][0][2]
    for name in list(arms)[1:]:
        share = min(1.0, median(seconds for _, seconds, _ in found[name]) / full)
        shortened = replace(arms["ordinary"], steps=max(1, round(steps * share)))
        all_seeds(f"ordinary, time of {name}", shortened)
    print("| arm | steps | test error (three seeds) | seconds | time saved |")
    print("| --- | --- | --- | --- | --- |")
    for name, results in found.items():
        errors = [error for error, _, _ in results]
        seconds = median(seconds for _, seconds, _ in results)
        print(
            f"| {name} | {results[0][2]} | {mean(errors):.2%} ({min(errors):.2%} to "
            f"{max(errors):.2%}) | {seconds:.1f} | {1 - seconds / full:.1%} |"
        )


if __name__ == "__main__":
    main()
