"""Keep the configurations and metrics of runs, without weights and without this machine's paths.

python -m benchmarks.keep RUNS RESULTS     # copies what is new; `freezeout report` reads it
"""

import argparse
import json
import shutil
from pathlib import Path

from freezeout.lab.runs import CONFIG, METRICS, SAVINGS, find_run_folders, read_run

PATHS = ("data_dir", "out")  # of a configuration


def keep(folder: Path, target: Path) -> None:
    """What one finished run's folder tells, into another folder."""
    target.mkdir(parents=True, exist_ok=True)
    saved = json.loads((folder / CONFIG).read_text())
    saved["config"] |= dict.fromkeys(PATHS)
    if "/" in saved["config"].get("cache", ""):
        saved["config"]["cache"] = "folder"
    (target / CONFIG).write_text(json.dumps(saved, indent=2) + "\n")
    for name in (METRICS, SAVINGS):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


def main() -> None:
    """Copy every finished run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    for folder in find_run_folders(args.runs):
        if read_run(folder).is_finished:
            keep(folder, args.results / folder.relative_to(args.runs))


if __name__ == "__main__":
    main()
