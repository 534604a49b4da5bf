"""Files are whole or absent; downloads resume and are checked."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from runtime.errors import UserError
from runtime.files import (
    atomic_write,
    download,
    remove_leftovers,
    sha256_file,
    temporary_name,
)
from tests.processes import finished

CONTENT = bytes(range(256)) * 40
HASH = hashlib.sha256(CONTENT).hexdigest()


def test_a_finished_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("old", "new"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(RuntimeError, match="nothing was written"), atomic_write(path):
        pass
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_text("old")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 2  # it is still being written
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=30) == -signal.SIGKILL
    child.stdout.close()
    assert path.read_text() == "old"
    left = [name for name in os.listdir(tmp_path) if name != "image.png"]
    assert len(left) == 1 and left[0].startswith(".") and left[0].endswith(".tmp")
    assert [p.name for p in tmp_path.glob("*.png")] == ["image.png"]
    remove_leftovers(tmp_path / "image.pn")
    assert len(os.listdir(tmp_path)) == 2  # of another file
    remove_leftovers(path)
    assert os.listdir(tmp_path) == ["image.png"]


def test_leftovers_are_those_of_dead_processes_of_this_machine(tmp_path: Path) -> None:
    dead, below = finished(), tmp_path / "rows"
    below.mkdir()
    here = temporary_name("a [1].npz", dead)
    machine = here.split(".")[-2].split("-")[0]
    kept = {
        temporary_name("b.npz", os.getpid()),
        temporary_name("b.npz", 1),  # of another user, if this one is not root
        here.replace(machine, "0" * 8),
        ".keep.tmp",
        "a.tmp",
    }
    for name in (here, f"{here}.mode.tmp", temporary_name("c", dead), *kept):
        (below / name).write_text("half")
    remove_leftovers(below / "a [1].npz")
    assert not (below / here).exists() and len(list(below.iterdir())) == len(kept) + 1
    remove_leftovers(tmp_path)
    assert {path.name for path in below.iterdir()} == kept
    remove_leftovers(tmp_path / "nowhere" / "file")


KILLED = """
import sys, time
from runtime.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    with open(temporary, "w") as file:
        file.write("new, but only ha")
        file.flush()
        print("half", flush=True)
        time.sleep(60)
"""


def torch_zip(path: Path) -> None:
    torch.save({"x": torch.zeros(100_000)}, path)


def torch_older(path: Path) -> None:
    torch.save({"x": torch.zeros(100_000)}, path, _use_new_zipfile_serialization=False)


def safetensors_file(path: Path) -> None:
    """Its writer makes a file of its own, so its error is that of a real full disk, as text."""
    path.unlink()
    raise safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def arrays(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros(100_000))


def picture(path: Path) -> None:
    Image.new("RGB", (500, 500)).save(path, "PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("write", [torch_zip, torch_older, safetensors_file, arrays, picture])
def test_a_full_disk_is_one_sentence(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(UserError) as caught, atomic_write(path) as temporary:
        temporary.symlink_to("/dev/full")  # on which every write fails for lack of space
        write(temporary)
    assert re.fullmatch(
        rf"{path} cannot be written, the disk is full \([0-9.]+ MiB are free\): make room "
        "and run again",
        str(caught.value),
    )
    assert os.listdir(path.parent) == []


def test_other_errors_are_not_a_full_disk(tmp_path: Path) -> None:
    for error in (RuntimeError("a defect"), OSError(5, "Input/output error"), UserError("mine")):
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file"):
            raise error
        assert caught.value is error


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    )


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ``ranges`` says whether it can resume, ``stop`` after how many bytes."""

    ranges = True
    stop: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/models/net%201.bin?v=1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        if start > len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_download_once_and_check_ever_after(server: Server, tmp_path: Path) -> None:
    path = download(server.url, tmp_path / "cache")
    assert path == tmp_path / "cache" / "net 1.bin" and path.read_bytes() == CONTENT
    assert download(server.url, tmp_path / "cache") == path
    assert download(server.url, tmp_path / "cache", sha256=HASH) == path
    assert server.asked == [None]
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="net 1.bin has the SHA-256"):
        download(server.url, tmp_path / "cache")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_resumes(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.stop = ranges, 1000
    with pytest.raises(UserError, match="after 1000 of 10240 bytes"):
        download(server.url, tmp_path, sha256=HASH)
    assert not (tmp_path / "net 1.bin").exists()
    server.stop = None
    assert download(server.url, tmp_path, sha256=HASH).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-"]
    assert os.listdir(tmp_path) == ["net 1.bin"]


def test_a_part_of_something_longer_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "net 1.bin.part").write_bytes(CONTENT * 2)
    assert download(server.url, tmp_path, sha256=HASH).read_bytes() == CONTENT
    assert server.asked == ["bytes=20480-", None]


def test_a_wrong_download_is_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"where 000000000000"):
        download(server.url, tmp_path, sha256="0" * 64)
    assert os.listdir(tmp_path) == []


def test_offline_names_file_address_and_folder(tmp_path: Path) -> None:
    with Server() as gone:
        url = gone.url
    with pytest.raises(UserError) as caught:
        download(url, tmp_path)
    for part in ("net 1.bin", url, "refused", str(tmp_path)):
        assert part in str(caught.value)
