"""The examples for JAX and Keras run, and the documents' lines are theirs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {"jax": "jax_digits.py", "keras": "keras_digits.py"}


@pytest.mark.parametrize("framework", EXAMPLES)
def test_the_example_learns(framework: str) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / EXAMPLES[framework]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "jax"},
    )
    assert result.returncode == 0, result.stderr
    assert "4 frozen" in result.stdout or "4 of 5 layers were frozen" in result.stdout
    error = re.search(r"test error ([\d.]+)%", result.stdout)
    assert error is not None
    assert float(error[1]) < 12, result.stdout  # chance: 90 %; an ordinary run: about 5 %


@pytest.mark.parametrize("document", ["README.md", "docs/{}.md"])
@pytest.mark.parametrize("framework", EXAMPLES)
def test_the_documents_lines_are_copied_from_the_example(framework: str, document: str) -> None:
    example = (ROOT / "examples" / EXAMPLES[framework]).read_text()
    lines = {line.strip() for line in example.splitlines()}
    text = (ROOT / document.format(framework)).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    mark = {"jax": "freezer.init(params)\n", "keras": "FreezeOutCallback()"}[framework]
    block = next(block for block in blocks if mark in block)
    assert len(block.splitlines()) <= 3
    for line in block.splitlines():
        assert line in lines
