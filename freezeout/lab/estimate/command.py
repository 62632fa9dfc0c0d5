"""The command `freezeout estimate`: tables or JSON on standard output, a figure on request."""

import json
import sys

from rich.console import Console

from .config import EstimateConfig
from .estimate import estimate
from .table import show


def run(config: EstimateConfig) -> None:
    """Estimate, print, draw. Raises as `estimate` does; OSError if the figure cannot be written."""
    console = Console(highlight=False)
    progress = Console(stderr=True, highlight=False)
    with progress.status("") as status:
        result = estimate(config, say=status.update)
    if config.json:
        json.dump(result.to_json(), sys.stdout, indent=2)
        print()
    else:
        show(result, console, config.lr)
    if config.plot is not None:
        from .figure import draw

        draw(result, config.plot)
        progress.print(f"drawn into {config.plot}", markup=False, soft_wrap=True)
