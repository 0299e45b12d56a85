"""Read EDM weights from other people's files, without running anything in them.

    fetch      a path, an https:// address or hf://owner/repo/file -> a local file
    load_edm   a file, whatever its format -> EDMPrecond in eval mode, ready to sample from

Four formats are told apart by their first bytes: NVIDIA's released `.pkl` files, torch.save's two
(zip, and the older one), and safetensors. All but the last are pickles, and a pickle is a program:
it names functions and calls them, so reading one from the network with pickle.load hands over the
machine. NVIDIA's files go further and carry the Python source of their networks, which NVIDIA's
own reader executes. None of that is needed for a table of numbers. Here

    check_instructions   goes through a pickle's instructions beforehand and refuses what no file
                         of weights needs (and numbers that would exhaust the memory)
    SafeUnpickler        knows a dozen names and hands out harmless stand-ins of our own for them
    read_storage         does the same for the second pickle that hides in every tensor's bytes
    fit                  compares every name and shape with the network before numbers are copied

torch.save's files go through torch.load(weights_only=True), which works by the same rules.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import reprlib
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from edm_unet import EDMPrecond, karras_sigmas
from plumbing.files import load_strictly, read_tensors
from plumbing.options import UserError

# The three networks that the paper starts from. Bare state dicts do not say which one they are;
# they are recognised by comparing their names and shapes with this table.
EDM_ARCHITECTURES = {
    "cifar10": dict(
        model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=10,
        model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16],
        dropout=0.13,
    ),
    "cifar10-uncond": dict(
        model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=0,
        model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16],
        dropout=0.13,
    ),
    "imagenet64": dict(
        model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000,
        model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
        attn_resolutions=[32, 16, 8], dropout=0.1,
    ),
}  # fmt: skip

EDM_URLS = {
    name: f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{name}"
    for name in (
        "edm-cifar10-32x32-cond-vp.pkl",
        "edm-cifar10-32x32-uncond-vp.pkl",
        "edm-imagenet-64x64-cond-adm.pkl",
    )
}

# The generator in github.com/devrimcavusoglu/dmd was trained one step below sigma = 80, because a
# zero is appended to its table of noise levels.
MODEL_G_SIGMA = float(karras_sigmas(1000)[-2])  # 79.56

# What reading a damaged or hostile file can end in, apart from UserError.
DAMAGE = (
    pickle.UnpicklingError, EOFError, struct.error, ValueError, TypeError, LookupError,
    AttributeError, ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Whatever goes wrong while reading `path` becomes a UserError of one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except UserError as error:
        named = str(error).startswith(str(path))
        raise UserError(one_line(error if named else f"{path} is refused: {error}")) from error
    except (*DAMAGE, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            one_line(f"{path} is damaged or not a file of weights; get it again ({reason})")
        ) from error


def one_line(text: object, limit: int = 500) -> str:
    """Text of unknown origin, fit to be printed: one line, printable, not endless."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else line[:limit] + " ..."


# --------------------------------------------------------------------------------------------------
# A pickle, without its powers

OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT",
    "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
}  # fmt: skip
MAX_OPCODES = 1_000_000  # ImageNet-64: 47,000
MAX_MODULES = 10_000


def check_instructions(file: io.BufferedIOBase, allowed: set[str]) -> None:
    """Go through one pickle's instructions without executing them; leaves the file at its end.

    Raises:
        UserError: an instruction that no file of weights needs, or too many of them.
        ValueError: not a pickle, or a truncated one.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name not in allowed:
            raise UserError(f"it holds the pickle instruction {opcode.name}; no EDM file does")
        # The interpreter allocates its table of memos up to the largest number it meets.
        memo = argument if opcode.name.endswith("BINPUT") else 0
        if max(count, memo) > MAX_OPCODES:
            raise UserError("it is a pickle of more instructions than any EDM file has")


class SafeUnpickler(pickle._Unpickler):  # the one written in Python, whose steps can be checked
    """Resolves the names that a pickle calls from a table of ours, and from nowhere else.

    Keys of dicts and members of sets must be plain: Python hashes a tuple of tuples by visiting
    all it contains, for ever if each contains the one before twice, and crashes a million deep.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BufferedIOBase, names: dict[tuple[str, str], Any]):
        super().__init__(file)
        self.names = names

    def load_setitem(self) -> None:
        self.check_plain(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_plain(self.stack[::2])
        super().load_setitems()

    def load_additems(self) -> None:
        self.check_plain(self.stack)
        super().load_additems()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems

    @staticmethod
    def check_plain(keys: list) -> None:
        """Raise UserError unless all keys are strings or numbers."""
        if not all(isinstance(key, str | int | float | None) for key in keys):
            raise UserError("it has a dict or set of something else than names and numbers")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise UserError(
                f"it names {one_line(f'{module}.{name}', 80)}, which no EDM file needs and which "
                "could run anything; nothing was run"
            )
        return self.names[module, name]

    def persistent_load(self, identity: Any) -> Any:
        return identity  # occurs only in the header of a storage, whose reader checks it


def load_pickle(file: io.BufferedIOBase, allowed: set[str], names: dict) -> Any:
    """Read the pickle at the file's position; leaves the file behind it."""
    start = file.tell()
    check_instructions(file, allowed)
    end = file.tell()
    file.seek(start)
    value = SafeUnpickler(file, names).load()
    file.seek(end)
    return value


# --------------------------------------------------------------------------------------------------
# Tensors in NVIDIA's pickles: bytes in torch.save's older format, one blob a storage

MAGIC = 0x1950A86A20F9469CFC6C  # opens every file in that format
DTYPES = {
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
}
HEADER_BYTES = 4096  # about 250 are used


class Storage(NamedTuple):
    """Where the numbers of a tensor lie: blob[start:], numel values of dtype."""

    blob: bytes
    start: int
    numel: int
    dtype: torch.dtype


class StoredTensor(NamedTuple):
    """A tensor whose numbers have not been copied yet. They lie inside the storage: see `of`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, storage: Storage, offset, shape, stride, *_) -> "StoredTensor":
        """Stand-in for torch._utils._rebuild_tensor_v2, which checks none of this.

        Raises:
            UserError: a shape that reaches beyond the storage, or has more numbers than it.
        """
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int for n in numbers):
            raise UserError("it describes a tensor by something else than numbers")
        steps = zip(shape, stride, strict=True)
        last = offset + sum((n - 1) * step for n, step in steps)
        if min(numbers) < 0 or min(shape, default=1) < 1 or last >= storage.numel:
            raise UserError(
                f"it has a tensor {shape} that reaches beyond its {storage.numel} numbers"
            )
        if math.prod(shape) > storage.numel:
            raise UserError(f"it has a tensor {shape} made of only {storage.numel} numbers")
        return cls(storage, offset, tuple(shape), tuple(stride))

    def float(self) -> Tensor:
        """A float32 copy of the numbers, and of no others, in memory of its own."""
        blob, start, _, dtype = self.storage
        span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        values = torch.empty(span, dtype=dtype)
        # By way of bytes: numbers in a blob start anywhere, those of a tensor at a multiple of 64.
        into = memoryview(values.view(torch.uint8).numpy())
        start += self.offset * dtype.itemsize
        into[:] = memoryview(blob)[start : start + len(into)]
        return values.as_strided(self.shape, self.stride).float().contiguous()


def read_storage(blob: bytes) -> Storage:
    """Stand-in for torch.storage._load_from_bytes, which is an unrestricted torch.load.

    A blob is five pickles (magic number, version, byte order, a description, keys), the number of
    values as int64, and the values.

    Raises:
        UserError: anything else, or a number of values that the blob's length contradicts.
    """
    stream = io.BytesIO(blob[:HEADER_BYTES])
    allowed = OPCODES | {"BINPERSID"}
    magic, version, system, described, keys = (
        load_pickle(stream, allowed, DTYPES) for _ in range(5)
    )
    if (magic, version) != (MAGIC, 1001) or system["little_endian"] is not True:
        raise UserError("it holds a tensor that is not in torch.save's little-endian format")
    kind, dtype, key, _location, numel, view = described
    if kind != "storage" or not isinstance(dtype, torch.dtype) or keys != [key] or view:
        raise UserError("it holds something else in the place of a tensor's numbers")
    start = stream.tell() + 8
    (count,) = struct.unpack_from("<q", blob, start - 8)
    if type(numel) is not int or numel != count or len(blob) - start != count * dtype.itemsize:
        raise UserError(f"it claims {numel} numbers in a tensor of {len(blob) - start} bytes")
    return Storage(blob, start, numel, dtype)


# --------------------------------------------------------------------------------------------------
# NVIDIA's pickles


class Pickled:
    """What is kept of an object in a pickle: the name of its class and its attributes."""

    class_name = "ModuleDict"
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Float64:
    """Stand-in for numpy.dtype("<f8"), the only one that EDM's files have."""

    def __init__(self, code: str, *_):
        if code != "f8":
            raise UserError(f"it holds a numpy number of type {code!r}; EDM's files have only f8")

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise UserError("it holds big-endian numbers; EDM's files have none")


def stand_ins() -> dict[tuple[str, str], Any]:
    """Every name in NVIDIA's pickles, and what SafeUnpickler takes for it.

    Made anew for each file: a pickle may set attributes of what it is given.
    """

    def persistent(meta: dict) -> Pickled:
        # meta["module_src"] is the source of the class. It is dropped.
        kept = Pickled()
        kept.class_name, kept.state = meta["class_name"], meta["state"]
        if not isinstance(kept.class_name, str):
            raise UserError("it has a class whose name is no text")
        return kept

    def plain_set(members: list = ()) -> set:
        SafeUnpickler.check_plain(members)
        return set(members)

    def scalar(dtype: Float64, data: bytes) -> float:
        return struct.unpack("<d", data)[0]

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise UserError("it names a codec; EDM's files only have latin1")
        return text.encode("latin1")

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("torch.nn.modules.container", "ModuleDict"): type("ModuleDict", (Pickled,), {}),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: StoredTensor.of(*arguments),
        ("torch.storage", "_load_from_bytes"): lambda blob: read_storage(blob),
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,
        ("numpy", "dtype"): type("dtype", (Float64,), {}),
        ("collections", "OrderedDict"): lambda: {},
        ("dnnlib.util", "EasyDict"): type("EasyDict", (dict,), {"__init__": lambda self: None}),
        ("builtins", "set"): plain_set,
        ("__builtin__", "set"): plain_set,
        ("_codecs", "encode"): encode,
    }


def read_edm_pickle(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one of NVIDIA's released `.pkl` files.

    Takes the `ema` network of a snapshot, or a network that is the whole pickle.

    Returns:
        tensors: float32, under the names of EDMPrecond's state dict, and all of them.
        kwargs: arguments of EDMPrecond, as the file records them.

    Raises:
        UserError: no such file, a damaged or hostile one, or a network that is not EDMPrecond with
            DDPM++ or ADM inside.
    """
    path = Path(path)
    with one_line_errors(path):
        with open(path, "rb") as file:
            root = load_pickle(file, OPCODES, stand_ins())
        if isinstance(root, dict):
            root = root.get("ema")
        if not isinstance(root, Pickled) or not isinstance(root.state, dict):
            raise UserError("it is a pickle without a network under 'ema'")
        if root.class_name != "EDMPrecond":
            raise UserError(
                f"its network is a {root.class_name!r}, only EDMPrecond is supported; use one of "
                + ", ".join(EDM_URLS)
            )
        kwargs = recorded_arguments(root.state)
        empty_network(kwargs)  # says so if it is an NCSN++, before its tensors look wrong
        stored = stored_tensors(root)
        if sum(math.prod(tensor.shape) for tensor in stored.values()) > path.stat().st_size:
            raise UserError("its tensors share their numbers")
        del root  # from here on `fit` can free the file's bytes tensor by tensor
        return fit(stored, kwargs)


def recorded_arguments(state: dict[str, Any]) -> dict[str, Any]:
    """The arguments that rebuild an EDMPrecond, from the attributes of a pickled one.

    Raises:
        UserError: values that no network has.
    """
    kwargs = dict(state["_init_kwargs"])
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_data"):
        if name in state:
            kwargs[name] = state[name]
    kwargs.pop("label_dropout", None)  # acts in training only

    for name, value in kwargs.items():
        parts = value if isinstance(value, list | tuple) else [value]
        limit = 64 if name == "num_blocks" else 8192
        # An absurd size would take minutes and gigabytes merely to lay out.
        if len(parts) > 16 or not all(
            part is None
            or isinstance(part, float)
            or (isinstance(part, int) and 0 <= part <= limit)
            or (isinstance(part, str) and len(part) < 40)
            for part in parts
        ):
            shown = one_line(reprlib.repr(value), 60)  # str() of what is shared has no bounds
            raise UserError(f"it records the argument {name} = {shown}")
    return kwargs


def stored_tensors(root: Pickled) -> dict[str, StoredTensor]:
    """Parameters and buffers of a tree of pickled modules, by their full names.

    Raises:
        UserError: a tree that is none, or holds other things in a tensor's place.
    """
    found: dict[str, StoredTensor] = {}
    todo = [("", root)]
    visited = 0
    while todo:
        prefix, module = todo.pop()
        visited += 1
        # A module may be its own descendant, or be shared in exponentially many places.
        if not isinstance(module, Pickled) or len(prefix) > 500 or visited > MAX_MODULES:
            raise UserError("its modules do not form a tree of a network's size")
        for kind in ("_parameters", "_buffers"):
            for name, value in module.state[kind].items():
                if value is not None:
                    found[prefix + name] = value
        for name, child in module.state["_modules"].items():
            if child is not None:
                todo.append((f"{prefix}{name}.", child))
    if not all(isinstance(value, StoredTensor) for value in found.values()):
        raise UserError("it holds something else in the place of a tensor")
    return found


# --------------------------------------------------------------------------------------------------
# State dicts


def read_edm_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Read an EDM network's state dict from a safetensors file or one of torch.save (.pt, .bin).

    Understands this repository's own files, plain state dicts (such as DMD2's ImageNet-64
    pytorch_model.bin) and checkpoints that are a dict with the generator under "model_g" (such as
    model.pt of github.com/devrimcavusoglu/dmd).

    Returns:
        tensors: float32, under the names of EDMPrecond's state dict, and all of them.
        kwargs: arguments of EDMPrecond, from the file or by comparison with EDM_ARCHITECTURES.
        metadata: of a file of ours, what was written with it. Of a "model_g" checkpoint,
            {"role": "generator", "sigma": 79.56}: its one step starts at sigma * z and runs the
            network at sigma, not at 80. Else {}.

    Raises:
        UserError: no such file, a damaged or hostile one, or no architecture that fits.
    """
    path = Path(path)
    kwargs, metadata = None, {}
    with one_line_errors(path):
        if file_format(path) == "safetensors":
            stored, metadata = read_tensors(path)
        else:
            stored = torch_load(path)
            if isinstance(stored, dict) and "model_g" in stored:
                stored = stored["model_g"]
                metadata = {"role": "generator", "sigma": MODEL_G_SIGMA}
        if "kwargs" in metadata:
            kwargs = recorded_arguments({"_init_kwargs": json.loads(metadata["kwargs"])})
        stored = bare_names(stored)
        tensors, kwargs = fit(stored, kwargs)
        return tensors, kwargs, dict(metadata)


def torch_load(path: Path) -> Any:
    """torch.load of tensors and plain containers only; maps the file where its format allows.

    Raises:
        UserError: the file wants something else to be called or built.
    """
    with open(path, "rb") as file:
        mmap = file.read(2) == b"PK"  # what is never asked for is then never read
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise
        raise UserError(
            f"it names {one_line(named[1], 80)}, which no state dict needs; nothing was run"
        ) from error


def bare_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put before the names: DDP's `module.`, DMD2's `feedforward_model.`.

    Beside a `feedforward_model` DMD2 may have saved its other networks, which are left out.

    Raises:
        UserError: not a dict of tensors.
    """
    if not isinstance(stored, dict) or not stored or not all(isinstance(k, str) for k in stored):
        raise UserError("it holds no state dict (a dict of names and tensors)")
    for wrapper in ("module.", "feedforward_model.", "module."):
        inside = {
            name.removeprefix(wrapper): value
            for name, value in stored.items()
            if name.startswith(wrapper)
        }
        stored = inside or stored
    for name, value in stored.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not plain or not value.dtype.is_floating_point:
            raise UserError(f"it holds something else than a tensor under {name!r}")
    return stored


# --------------------------------------------------------------------------------------------------
# From stored tensors to a network


def empty_network(kwargs: dict[str, Any]) -> EDMPrecond:
    """The network on torch's meta device: names and shapes, no memory.

    Raises:
        UserError: there is no such network.
    """
    try:
        with torch.device("meta"):
            return EDMPrecond(**kwargs)
    except DAMAGE as error:
        raise UserError(f"its network cannot be built: {error}") from error


def fit(
    stored: dict[str, StoredTensor] | dict[str, Tensor], kwargs: dict[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors -> (float32 copies, kwargs), after all names and shapes have been checked.

    Two things that EDM's files hold and EDMPrecond does not are left out: `map_augment`, which
    sampling never uses, and the `resample_filter` buffers, which must be the 2x2 box.

    Args:
        stored: emptied on the way, so that the bytes of what is copied already can be freed.
        kwargs: of EDMPrecond; None if the file does not tell, then the table is searched.

    Raises:
        UserError: missing, surplus or misshapen tensors.
    """
    for name in [name for name in stored if name.startswith("model.map_augment.")]:
        del stored[name]
    for name in [name for name in stored if name.endswith(".resample_filter")]:
        box = stored.pop(name)
        if tuple(box.shape) != (1, 1, 2, 2) or not (box.float() == 0.25).all():
            raise UserError(
                f"{name} is not the 2x2 box filter: NCSN++ networks (EDM's files named '-ve') are "
                "not supported; use the '-vp' file of the same dataset"
            )

    shapes = {
        name: torch.empty(tuple(value.shape), device="meta") for name, value in stored.items()
    }
    what = "it"
    if kwargs is None:  # the file does not tell
        row = nearest_architecture(shapes)
        kwargs = EDM_ARCHITECTURES[row]
        what = f"it fits none of {', '.join(EDM_ARCHITECTURES)}; beside the nearest, {row}, it"
    load_strictly(empty_network(kwargs), shapes, what)

    tensors = {}
    for name in list(stored):
        value = stored.pop(name)
        if isinstance(value, StoredTensor):
            tensors[name] = value.float()
        else:  # a copy, because a mapped file may change or vanish later
            tensors[name] = value.detach().to(
                torch.float32, copy=True, memory_format=torch.contiguous_format
            )
    return tensors, dict(kwargs)


def nearest_architecture(shapes: dict[str, Tensor]) -> str:
    """The row of EDM_ARCHITECTURES that differs in the fewest names and shapes."""
    found = {(name, value.shape) for name, value in shapes.items()}

    def differences(row: str) -> int:
        state = empty_network(EDM_ARCHITECTURES[row]).state_dict()
        return len(found ^ {(name, value.shape) for name, value in state.items()})

    return min(EDM_ARCHITECTURES, key=differences)


def file_format(path: Path) -> str:
    """ "pickle" (NVIDIA's), "torch" (zip or older) or "safetensors", by the file's first bytes.

    Raises:
        UserError: none of them.
    """
    with one_line_errors(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04") or MAGIC.to_bytes(10, "little") in head[:16]:
            return "torch"
        # First the length of a header: its low byte may well be the one that opens a pickle.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
            return "safetensors"
        if head.startswith(b"\x80"):
            return "pickle"
        if not head:
            raise UserError("it is empty; get it again")
        if is_web_page(head):
            raise UserError(
                "it is a web page, not weights; open the address in a browser to see why"
            )
        raise UserError("it is neither an EDM pickle nor a file of torch.save nor safetensors")


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins like this is HTML or XML, e.g. a server's error message."""
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype", b"<html", b"<?xml"))


def load_edm_with_metadata(path: str | Path) -> tuple[EDMPrecond, dict[str, Any]]:
    """load_edm, and what the file says beside the weights (see read_edm_state).

    Raises:
        UserError: as load_edm.
    """
    path = Path(path)
    if file_format(path) == "pickle":
        (tensors, kwargs), metadata = read_edm_pickle(path), {}
    else:
        tensors, kwargs, metadata = read_edm_state(path)
    # Assigned, not copied. EDMPrecond has no buffers, so this leaves nothing on the meta device.
    net = empty_network(kwargs)
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.eval().requires_grad_(False), metadata


def load_edm(path: str | Path) -> EDMPrecond:
    """An EDM network from NVIDIA's pickle, a state dict of torch.save, or safetensors.

    Returns:
        the network in eval mode, float32, on the CPU, without gradients.

    Raises:
        UserError: no such file, an unknown format, a damaged or hostile file, an unsupported
            architecture, or tensors that are missing, surplus or misshapen.
    """
    return load_edm_with_metadata(path)[0]


# --------------------------------------------------------------------------------------------------
# Downloads

BY_HAND = "download it yourself and give its path instead"


def fetch(source: str, cache: Path | None = None) -> Path:
    """The local file for a path or an address; downloads are kept and not repeated.

    Args:
        source: a path (returned as it is, existing or not), https://..., hf://owner/repo/file on
            Hugging Face, or a name in EDM_URLS.
        cache: folder of downloads; None for $DMD_CACHE, else ~/.cache/dmd. With None, hf:// files
            are left to huggingface_hub's own cache.

    Raises:
        UserError: it cannot be had.
    """
    if source in EDM_URLS and not Path(source).exists():
        source = EDM_URLS[source]
    if source.startswith("hf://"):
        return fetch_from_hub(source, cache)
    if not source.startswith(("https://", "http://")):
        return Path(source)
    _host, _, path = re.split(r"[?#]", source)[0].partition("://")[2].partition("/")
    name = path.rpartition("/")[2]
    if name in ("", ".", ".."):
        raise UserError(f"{source} names no file; give the whole address of the file")
    # A folder per address: many files are called pytorch_model.bin.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    cache = cache or Path(os.environ.get("DMD_CACHE") or Path.home() / ".cache" / "dmd")
    path = cache / folder / name
    if not path.exists():
        download(source, path)
    return path


def fetch_from_hub(source: str, cache: Path | None) -> Path:
    """hf://owner/repo/file -> the file in huggingface_hub's cache.

    Raises:
        UserError: a malformed address, no huggingface_hub, no network, no such file.
    """
    owner, _, rest = source.removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise UserError(f"{source} is incomplete; write hf://owner/repo/file")
    try:
        from huggingface_hub import hf_hub_download  # only needed here
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise UserError(
            f"{source} needs huggingface_hub: pip install huggingface_hub, or {BY_HAND}"
        ) from None
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file, cache_dir=cache))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise UserError(one_line(f"{source} cannot be had ({error}); {BY_HAND}", 400)) from error


def download(url: str, path: Path) -> None:
    """Download to `path` by way of `path`.part, which a later call resumes. One process at a time.

    Raises:
        UserError: no network, no such file, a web page instead, a broken connection, a full disk.
    """
    part = path.with_name(path.name + ".part")
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        have = part.stat().st_size
    response = open_url(url, have)
    if response is not None:  # else the part is the whole already
        with response:
            copy_response(response, part, have, url)
    with disk_errors(part):
        with open(part, "r+b") as file:
            head = file.read(64)
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
        if not head or is_web_page(head):
            part.unlink()
            raise UserError(f"{url} gave a web page or nothing instead of weights; {BY_HAND}")
        os.replace(part, path)


def open_url(url: str, have: int) -> HTTPResponse | None:
    """The server's answer, without the first `have` bytes if it agrees; None if none are left.

    Raises:
        UserError: no answer, or an error.
    """
    headers = {"User-Agent": "dmd-reference/1.0"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing follows: all is there, or the file has changed
            complete = error.headers.get("Content-Range") == f"bytes */{have}"
            return None if complete else open_url(url, 0)
        raise UserError(f"{url}: the server answers {error.code}; {BY_HAND}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = one_line(getattr(error, "reason", error), 100)
        raise UserError(f"{url} cannot be reached ({reason}); {BY_HAND}") from None


def copy_response(response: HTTPResponse, part: Path, have: int, url: str) -> None:
    """Write the answer to `part`, from byte `have` on if the server resumes, with a progress bar.

    Raises:
        UserError: the connection breaks (what is there is kept), or the disk is full.
    """
    pattern = r"bytes (\d+)-\d+/(\d+)"
    resumed = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
    if response.status == 206 and resumed and int(resumed[1]) == have:
        total = int(resumed[2])
    else:  # the server starts from the beginning
        length = response.headers.get("Content-Length", "")
        have, total = 0, int(length) if length.isdigit() else None

    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
    with disk_errors(part), open(part, "r+b") as file, bar:
        file.truncate(have)
        file.seek(have)
        reason = "the connection ended"
        while True:
            try:
                chunk = response.read(1 << 20)
            except (OSError, HTTPException) as error:
                reason, chunk, total = one_line(error, 100), b"", -1  # a size that none has
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
        if total not in (None, file.tell()):
            raise UserError(f"{url} broke off at byte {file.tell()} ({reason}); rerun to resume")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that says what to do about the disk."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, or choose another "
            "folder with the environment variable DMD_CACHE"
        ) from error
