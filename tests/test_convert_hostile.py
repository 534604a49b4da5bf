"""Files made to run code: none does, each ends in one sentence.

Every payload that an unpickler follows would leave a file called ``marker`` behind.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.pickles.files import MAGIC, PROTOCOL, read
from runtime.errors import UserError
from tests.processes import finish, start

TOUCH = "touch marker"
WRITE = "open('marker', 'w').close()"


def put(value: Any) -> bytes:
    """Instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    return put(module) + put(name) + b"\x93"


def called(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def call(module: str, name: str, *args: Any) -> bytes:
    return called(glob(module, name), *map(put, args))


SYSTEM = glob("os", "system")
IMPORT_OS = call("builtins", "__import__", "os")
NAMESPACE = glob("argparse", "Namespace") + b")\x81"
SIGMOID = glob("torch.nn.modules.activation", "Sigmoid") + b")\x81"

#: (module, name, arguments): functions that touch the marker when they are called, ...
RUNS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("os", "system", (TOUCH,)),
    ("posix", "system", (TOUCH,)),
    ("os", "mkdir", ("marker",)),
    ("os", "open", ("marker", 65)),
    ("os", "mkfifo", ("marker",)),
    ("os", "symlink", ("/etc/passwd", "marker")),
    ("subprocess", "call", (["touch", "marker"],)),
    ("subprocess", "check_output", (["touch", "marker"],)),
    ("subprocess", "getoutput", (TOUCH,)),
    ("builtins", "eval", (WRITE,)),
    ("builtins", "exec", (WRITE,)),
    ("builtins", "open", ("marker", "w")),
    ("io", "open", ("marker", "w")),
    ("io", "FileIO", ("marker", "w")),
    ("codecs", "open", ("marker", "w")),
    ("shutil", "copyfile", ("/etc/hostname", "marker")),
    ("shutil", "copy", ("/etc/hostname", "marker")),
    ("timeit", "timeit", ("0", WRITE)),
    ("runpy", "run_path", ("script.py",)),
    ("importlib", "import_module", ("script",)),
    ("importlib._bootstrap", "_gcd_import", ("script",)),
    ("pydoc", "locate", ("script",)),
    ("logging", "FileHandler", ("marker",)),
    ("sqlite3", "connect", ("marker",)),
    ("zipfile", "ZipFile", ("marker", "w")),
    ("tarfile", "open", ("marker", "w")),
    ("gzip", "open", ("marker", "w")),
    ("bz2", "open", ("marker", "w")),
    ("lzma", "open", ("marker", "w")),
    ("dbm.dumb", "open", ("marker",)),
    ("pickle", "loads", (b"\x80\x02" + call("os", "system", TOUCH) + b".",)),
    ("_pickle", "loads", (b"\x80\x02" + call("os", "system", TOUCH) + b".",)),
    ("torch", "save", ([], "marker")),
    ("torch.serialization", "save", ([], "marker")),
    ("numpy", "save", ("marker", 0)),
    ("numpy", "savetxt", ("marker", [0])),
    ("numpy", "memmap", ("marker", "u1", "w+", 0, (1,))),
    ("numpy.lib.format", "open_memmap", ("marker", "w+", None, (1,))),
    ("numpy.testing._private.utils", "runstring", (WRITE, {})),
]
#: ... and such that reach further where they can: names alone have to be refused.
NAMES = [
    ("os", "popen"), ("cProfile", "run"), ("trace", "Trace"), ("__builtin__", "eval"),
    ("builtins", "getattr"), ("builtins", "compile"), ("builtins", "__import__"),
    ("builtins", "globals"), ("builtins", "type"), ("builtins", "vars"), ("builtins", "map"),
    ("builtins", "object"), ("operator", "attrgetter"), ("operator", "methodcaller"),
    ("functools", "partial"), ("functools", "reduce"), ("types", "FunctionType"),
    ("types", "CodeType"), ("marshal", "loads"), ("codecs", "decode"), ("webbrowser", "open"),
    ("ctypes", "CDLL"), ("socket", "create_connection"), ("pty", "spawn"), ("pip", "main"),
    ("sys", "exit"), ("sys", "settrace"), ("signal", "alarm"), ("multiprocessing", "Process"),
    ("copyreg", "__newobj__"), ("copyreg", "_reconstructor"), ("copyreg", "add_extension"),
    ("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"), ("torch", "Tensor"),
    ("torch.serialization", "load"), ("torch.storage", "_load_from_file"), ("torch.nn", "Module"),
    ("torch.utils.cpp_extension", "load"), ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch.utils.data", "DataLoader"),
    ("numpy", "load"), ("numpy.f2py", "run_main"), ("numpy.core.multiarray", "fromfile"),
    ("numpy.core.multiarray.scalar", "x"), ("torch_utils", "x.y"), ("__main__", "Net"),
    ("collections", "namedtuple"), ("dnnlib.util", "open_url"), ("os.path", "join"),
]  # fmt: skip

#: Longer ways to the same end.
CHAINS: dict[str, bytes] = {
    "getattr": called(called(glob("builtins", "getattr"), IMPORT_OS, put("system")), put(TOUCH)),
    "attrgetter": called(called(call("operator", "attrgetter", "system"), IMPORT_OS), put(TOUCH)),
    "methodcaller": called(call("operator", "methodcaller", "system", TOUCH), IMPORT_OS),
    "partial": called(called(glob("functools", "partial"), SYSTEM, put(TOUCH))),
    "map": called(glob("builtins", "list"), called(glob("builtins", "map"), SYSTEM, put([TOUCH]))),
    "reduce in arguments": called(glob("builtins", "str"), call("os", "system", TOUCH)),
    "popped": call("os", "system", TOUCH) + b"0N",
    "as a key": b"}" + call("os", "system", TOUCH) + b"Ns",
    "dotted name": called(stacked("pathlib", "Path.touch"), call("pathlib", "Path", "marker")),
    "through a layer": called(stacked("torch.nn.modules.module", "torch.os.system"), put(TOUCH)),
    "stacked": called(stacked("os", "system"), put(TOUCH)),
    "memoised name": put("os") + b"q\x010h\x01" + put("system") + b"\x93" + put((TOUCH,)) + b"R",
    "new object": glob("subprocess", "Popen")
    + put(("true",))
    + b"\x81"
    + call("os", "system", TOUCH),
    "new object by name": glob("pathlib", "Path") + b")}\x92" + call("os", "system", TOUCH),
    "inst": b"(" + put(TOUCH) + b"ios\nsystem\n",
    "obj": b"(" + SYSTEM + put(TOUCH) + b"o",
    "setstate": NAMESPACE + b"}" + put("__setstate__") + SYSTEM + b"sb" + put(TOUCH) + b"b",
    "allowed around": called(
        glob("collections", "OrderedDict"), b"]" + call("os", "system", TOUCH) + b"a"
    ),
    "allowed before": call("torch", "device", "cpu") + b"0" + call("os", "system", TOUCH),
    "protocol 0": b"cos\nsystem\np0\n(S'touch marker'\np1\ntp2\nRp3\n",
}
NO_RUN: dict[str, bytes] = {
    "setstate of a layer": SIGMOID + b"}" + put("__setstate__") + put("x") + b"sb",
    "class of a layer": SIGMOID + b"}" + put("__class__") + glob("torch", "FloatStorage") + b"sb",
    "dict of a layer": SIGMOID + b"}" + put("__dict__") + b"}sb",
    "slots of a layer": SIGMOID + b"N}" + put("__reduce__") + b"Ns\x86b",
    "state of a class": glob("torch.nn.modules.activation", "Sigmoid") + b"}b",
    "state of a number": put(1) + b"}b",
    "state that is a list": SIGMOID + b"]b",
    "a called number": put(1) + put((1,)) + b"R",
    "a called layer": SIGMOID + b")R",
    "arguments in a list": glob("torch", "Size") + b"]R",
    "a mentioned type called": called(glob("builtins", "list"), b"]"),
    "a storage type called": called(glob("torch", "FloatStorage"), put(10**12)),
    "extension 1": b"\x82\x01",
    "extension 2": b"\x83\x01\x00",
    "extension 4": b"\x84\x01\x00\x00\x00",
    "out-of-band buffer": b"\x97",
    "text persistent id": b"Pstorage\n",
    "persistent number": put(7) + b"Q",
    "persistent module": put(("module", "x", "source", "code")) + b"Q",
    "persistent without type": put(("storage", "FloatStorage", "0", "cpu", 1)) + b"Q",
    "persistent layer": b"(" + put("storage") + SIGMOID + put("0") + put("cpu") + put(1) + b"tQ",
    "object array": called(glob("numpy", "dtype"), put("O8")),
    "object scalar": called(glob("numpy.core.multiarray", "scalar"), put("O"), put(b"x")),
    "void type": called(glob("numpy", "dtype"), put("V9999999999")),
    "type with fields": called(glob("numpy", "dtype"), put([("a", "f8")])),
    "latin of a number": called(glob("_codecs", "encode"), put(1), put("latin1")),
    "another codec": called(glob("_codecs", "encode"), put("x"), put("zlib")),
    "unicode that breaks lines": stacked("os\nsystem", "x\r\n\x1b[31m\u2028"),
    "long name": stacked("a" * 10**6, "b" * 10**6),
}  # fmt: skip


def bare(payload: bytes) -> bytes:
    return b"\x80\x04" + payload + b"."


def snapshot(payload: bytes) -> bytes:
    return bare(b"}" + put("ema") + payload + b"s")


def state(payload: bytes) -> bytes:
    """Among the attributes of a persistent object."""
    attributes = b"}" + put("_init_kwargs") + b"}" + put("model_type") + payload + b"ss"
    meta = b"}" + put("type") + put("class") + b"s" + put("class_name") + put("EDMPrecond") + b"s"
    meta += put("module_src") + put(WRITE) + b"s" + put("state") + attributes + b"s"
    return snapshot(called(glob("torch_utils.persistence", "_reconstruct_persistent_obj"), meta))


def callbacks(payload: bytes) -> bytes:
    """Beside the weights, in a callback of Lightning."""
    hook = glob("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint") + b")\x81"
    hook += b"}" + put("best") + payload + b"sb"
    return bare(b"}" + put("state_dict") + b"}s" + put("callbacks") + b"]" + hook + b"as")


def storage(payload: bytes) -> bytes:
    """As the bytes of a storage."""
    return bare(called(glob("torch.storage", "_load_from_bytes"), put(bare(payload))))


def legacy(payload: bytes) -> bytes:
    """As the object in PyTorch's older format, keys of no storage after it."""
    system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, system))
    return head + bare(payload) + pickle.dumps([], 2)


def legacy_storage(payload: bytes) -> bytes:
    return bare(called(glob("torch.storage", "_load_from_bytes"), put(legacy(payload))))


def archive(payload: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", bare(payload))
        made.writestr("archive/version", "3\n")


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    f.__name__: f for f in (bare, snapshot, state, callbacks, storage, legacy, legacy_storage)
}
PAYLOADS = {f"{m}.{n}": call(m, n, *args) for m, n, args in RUNS}
PAYLOADS |= {f"{m}.{n}": called(glob(m, n)) for m, n in NAMES} | CHAINS | NO_RUN


def refusal(path: Path, reader: Callable[[Path], Any] = read) -> str:
    """The one sentence in which reading ends."""
    with pytest.raises(UserError) as refused:
        reader(path)
    sentence = str(refused.value)
    assert sentence.startswith(str(path)) and sentence.isprintable() and len(sentence) < 500
    return sentence


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh folder, with a script in it that would leave the marker, to be imported or run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "script.py").write_text(WRITE)


def plain_pickle() -> None:
    """Print the payloads that plain pickle runs without a trace."""
    for name in [*(f"{m}.{n}" for m, n, _ in RUNS), *CHAINS]:
        sys.modules.pop("script", None)
        with contextlib.suppress(Exception):  # some fail afterwards
            pickle.loads(bare(PAYLOADS[name]))
        left = list(Path().glob("marker*"))
        for path in left:
            path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
        if not left:
            print(name)


@pytest.mark.skipif(sys.platform != "linux", reason="the payloads are for Linux, in a fork")
def test_plain_pickle_would_run_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("log") / "child"
    done = finish(start(plain_pickle, log), log)
    assert done.code == 0 and done.out == "", done.out + done.err


def test_there_are_enough() -> None:
    assert len(PAYLOADS) * (len(CONTAINERS) + 1) > 1000
    assert len({*PAYLOADS.values()}) == len(PAYLOADS)


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    for wrap in CONTAINERS.values():
        path.write_bytes(wrap(PAYLOADS[name]))
        sentence = refusal(path)
        assert "published checkpoint" in sentence, sentence  # refused, not merely stumbled over
    archive(PAYLOADS[name], path)
    assert "published checkpoint" in refusal(path)
    assert {p.name for p in tmp_path.iterdir()} == {"script.py", "x.pkl"}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, n, _ in RUNS] + NAMES)
def test_names_are_refused_by_name(module: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    shown = f"{module}.{name}"
    for old, new in (("__builtin__.", "builtins."), ("numpy.core.", "numpy._core.")):
        shown = shown.replace(old, new)
    for function in (glob(module, name), stacked(module, name)):
        path.write_bytes(state(function))
        assert f"asks for '{shown}', which no published checkpoint does" in refusal(path)
