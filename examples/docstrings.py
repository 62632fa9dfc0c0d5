"""A real text task that needs no download: which module of Python's standard library a piece of
its documentation is from."""

import ast
import importlib.util
import random
import re
from pathlib import Path

MODULES = ("asyncio", "email", "logging", "unittest")


def sentences(module: str) -> list[str]:
    """Paragraphs of the docstrings in a module's source, without the module's own name."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    found: dict[str, None] = {}  # in order, each once
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    text = re.sub(module, "it", " ".join(paragraph.split()), flags=re.I)
                    if len(text) >= 40:
                        found[text] = None
    return list(found)


def load(per_class: int, seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(text, class) pairs to train on and, a fifth of them, to test with."""
    chosen: list[tuple[str, int]] = []
    generator = random.Random(seed)
    for number, module in enumerate(MODULES):
        texts = sentences(module)
        generator.shuffle(texts)
        chosen += [(text, number) for text in texts[:per_class]]
    generator.shuffle(chosen)
    test = len(chosen) // 5
    return chosen[test:], chosen[:test]
