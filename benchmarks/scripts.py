"""Runs somebody else's training script, seeded, in one thread, and watches each FreezeOut in it.

    python -m benchmarks.scripts OUT.json SCRIPT.py [its arguments]

After each step, all parameters and buffers of frozen layers are compared with what they were when
their layer froze. OUT.json gets the layers, the freeze steps, what moved, the summary, warnings,
and the CPU seconds of the script without those comparisons. results/scripts.md says what came out.
"""

import json
import random
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freezeout import FreezeOut


class Watch:
    """What stands still in one FreezeOut, and whether it does."""

    def __init__(self, freezer: FreezeOut) -> None:
        self.freezer = freezer
        self.table = str(freezer)
        self.steps = self.compared = 0
        self.moved: list[str] = []
        self.seconds = 0.0  # that looking took
        self._then: dict[int, list[Tensor]] = {}
        self._over = False
        self.look()

    def look(self, last: bool = False) -> None:
        if self._over:
            return
        self._over = last
        start = time.process_time()
        for i, layer in enumerate(self.freezer.layers):
            if i >= self.freezer.num_frozen:
                self._then.pop(i, None)
                continue
            now = dict(self._tensors(layer))
            then = self._then.setdefault(i, [tensor.detach().clone() for tensor in now.values()])
            self.compared += len(now)
            for (name, tensor), before in zip(now.items(), then, strict=True):
                if not torch.equal(tensor, before):
                    self.moved.append(f"step {self.steps}: {layer.name}: {name}")
        self.seconds += time.process_time() - start

    @staticmethod
    def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
        for i, parameter in enumerate(layer.parameters):
            yield f"parameter {i}", parameter
        for i, module in enumerate(layer.modules):
            for name, buffer in module.named_buffers(recurse=False):
                yield f"module {i}, buffer {name}", buffer

    def found(self) -> dict[str, Any]:
        self.look()
        return {
            "table": self.table.splitlines(),
            "layers": [layer.name for layer in self.freezer.layers],
            "freeze_steps": self.freezer.freeze_steps,
            "steps": self.steps,
            "tensors_compared": self.compared,
            "moved": self.moved,
            "summary": self.freezer.summary(),
        }


def watch(watches: dict[int, Watch]) -> None:
    """From now on, every FreezeOut that is built."""
    own_init, own_step, own_release = FreezeOut.__init__, FreezeOut.step, FreezeOut.release

    def init(self: FreezeOut, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        watches[id(self)] = Watch(self)

    def step(self: FreezeOut) -> Any:
        changed = own_step(self)
        watches[id(self)].steps += 1
        watches[id(self)].look()
        return changed

    def release(self: FreezeOut) -> Any:
        watches[id(self)].look(last=True)
        return own_release(self)

    FreezeOut.__init__, FreezeOut.step, FreezeOut.release = init, step, release  # type: ignore


def main() -> None:
    out, script, *arguments = sys.argv[1:]
    watches: dict[int, Watch] = {}
    watch(watches)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    error, start = "", time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            error = "" if end.code in (None, 0) else f"exit status {end.code}"
        except Exception:
            error = traceback.format_exc()
    seconds = time.process_time() - start - sum(each.seconds for each in watches.values())
    freezers = [each.found() for each in watches.values()]
    found = {
        "cpu_seconds": round(seconds, 2),
        "freezers": freezers,
        "warnings": [str(each.message) for each in told if "freez" in str(each.message).lower()],
        "error": error,
    }
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    print(error or "", *(each["summary"] for each in freezers), sep="\n")


if __name__ == "__main__":
    main()
