"""Downloads, from a real server on this machine: good, damaged, dying, absent and hostile ones."""

import gc
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from freezeout.errors import DataError
from freezeout.lab.data import ImageData, Source, load_source

# pooch leaves the connection of a failed download to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

SOURCE = Source(
    name="tiny",
    archive="tiny-binary.tar.gz",
    md5="",
    folder="tiny-bin",
    train=(("train.bin", 40),),
    test=(("test.bin", 10),),
    label_bytes=1,
    label_index=0,
    num_classes=10,
    validation=5,
)


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tiny_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for name, count in SOURCE.train + SOURCE.test:
        records = rng.integers(0, 256, (count, SOURCE.record_length), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        files[f"{SOURCE.folder}/{name}"] = records.tobytes()
    return files


@dataclass
class Mirror:
    """What the server has, how many requests it got, and how many of them it lets die."""

    content: dict[str, bytes] = field(default_factory=dict)
    hits: list[str] = field(default_factory=list)
    deaths: int = 0

    def offer(self, files: dict[str, bytes]) -> Source:
        """Serve an archive of `files`; the source that names its true checksum."""
        content = archive_of(files)
        self.content = {f"/{SOURCE.archive}": content}
        return replace(SOURCE, md5=hashlib.md5(content).hexdigest())


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    state = Mirror()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.hits.append(self.path)
            if self.path not in state.content:
                self.send_error(404)
                return
            content = state.content[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if state.deaths:
                state.deaths -= 1
                content = content[: len(content) // 2]  # the connection closes after half
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("FREEZEOUT_DATA_URL", f"http://127.0.0.1:{server.server_port}/")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # pooch's waits between attempts
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FREEZEOUT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    gc.collect()  # here, where pytestmark holds, and not in the midst of another module's test


def load(source: Source) -> ImageData:
    return load_source(source, data_dir=None, validate="test", device="cpu")


def failure(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        load(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_names_both_ways_out(message: str) -> None:
    assert SOURCE.archive in message
    assert "--data-dir" in message
    assert "--dataset digits" in message


def test_downloads_once(mirror: Mirror, cache: Path) -> None:
    files = tiny_files()
    source = mirror.offer(files)
    data = load(source)
    assert data.train_labels.tolist() == [i % 10 for i in range(40)]
    first = files["tiny-bin/train.bin"][1 : 1 + 3072]
    assert data.train_images[0].numpy().tobytes() == first
    assert {path.name for path in cache.iterdir()} == {SOURCE.archive, SOURCE.folder}
    load(source)
    assert mirror.hits == [f"/{SOURCE.archive}"]


def test_a_verified_archive_is_not_fetched_again(mirror: Mirror, cache: Path) -> None:
    """As after a crash between the download and the end of unpacking."""
    source = mirror.offer(tiny_files())
    load(source)
    for path in (cache / SOURCE.folder).iterdir():
        path.unlink()
    (cache / SOURCE.folder).rmdir()
    load(source)
    assert len(mirror.hits) == 1


def test_a_damaged_archive_in_the_cache_is_fetched_again(mirror: Mirror, cache: Path) -> None:
    source = mirror.offer(tiny_files())
    cache.mkdir()
    (cache / SOURCE.archive).write_text("half an archive")
    load(source)
    assert len(mirror.hits) == 1


def test_wrong_checksum(mirror: Mirror, cache: Path) -> None:
    mirror.offer(tiny_files())
    message = failure(replace(SOURCE, md5="0" * 32))
    assert_names_both_ways_out(message)
    assert "0" * 32 in message
    assert not list(cache.iterdir())


def test_a_server_that_dies_in_mid_transfer_is_tried_again(mirror: Mirror) -> None:
    source = mirror.offer(tiny_files())
    mirror.deaths = 1
    assert len(load(source).train_images) == 40
    assert len(mirror.hits) == 2


def test_a_server_that_always_dies(mirror: Mirror, cache: Path) -> None:
    source = mirror.offer(tiny_files())
    mirror.deaths = 99
    assert_names_both_ways_out(failure(source))
    assert len(mirror.hits) == 3
    assert not list(cache.iterdir())


def test_progress_on_a_terminal(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = mirror.offer(tiny_files())
    mirror.deaths = 1
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    load(source)
    shown = terminal.getvalue()
    size = len(mirror.content[f"/{SOURCE.archive}"]) / 1000
    assert f"{size:.1f}/{size:.1f} kB" in shown
    assert "Downloading" not in shown


def test_one_line_elsewhere(mirror: Mirror, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, since pooch keeps the stderr that it was imported with."""
    source = mirror.offer(tiny_files())
    program = f"""
from freezeout.lab.data import Source, load_source
load_source({source!r}, data_dir=None, validate="none", device="cpu")
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert source.url in err


def test_not_found(mirror: Mirror) -> None:
    message = failure(SOURCE)
    assert_names_both_ways_out(message)
    assert "404" in message


def test_no_server(monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    monkeypatch.setenv("FREEZEOUT_DATA_URL", "http://127.0.0.1:9")
    assert_names_both_ways_out(failure(SOURCE))


@pytest.mark.parametrize("address", ["gopher://127.0.0.1", "no address"])
def test_an_address_of_no_known_kind(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("FREEZEOUT_DATA_URL", address)
    assert_names_both_ways_out(failure(SOURCE))


def test_a_member_outside_the_folder(mirror: Mirror, cache: Path) -> None:
    source = mirror.offer(tiny_files() | {"../outside.bin": b"x"})
    assert "member '../outside.bin' lies outside tiny-bin" in failure(source)
    assert [path.name for path in cache.iterdir()] == [SOURCE.archive]
    assert not (cache.parent / "outside.bin").exists()


def test_a_damaged_folder_in_the_cache(mirror: Mirror, cache: Path) -> None:
    source = mirror.offer(tiny_files())
    load(source)
    os.truncate(cache / SOURCE.folder / "test.bin", 1)
    assert failure(source) == (
        f"{cache / SOURCE.folder / 'test.bin'}: found 1 bytes, expected 30,730; "
        f"delete {cache / SOURCE.folder} to have it fetched again"
    )


def test_a_cache_that_cannot_be_written(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FREEZEOUT_CACHE", str(tmp_path / "file"))
    message = failure(mirror.offer(tiny_files()))
    assert message.startswith(f"cannot write to {tmp_path / 'file'}: ")
    assert "FREEZEOUT_CACHE" in message
