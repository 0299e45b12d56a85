"""Read EDM weights from other people's files, without running anything in them.

Four formats are told apart by their first bytes: NVIDIA's released `.pkl` files, torch.save's two
(zip, and the older one), and safetensors. All but the last are pickles, and a pickle is a program:
it names functions and calls them, so reading one from the network with pickle.load hands over the
machine. NVIDIA's files go further and carry the Python source of their networks, which NVIDIA's
own reader executes. None of that is needed for a table of numbers. Here

    stand_ins   is the table of names that such a pickle may use, with harmless things of our own
                in their places; no other name is resolved
    rebuild     gives the second pickle, which hides in every tensor's bytes, to torch.load with
                weights_only=True, which works by the same rule, and checks that the tensor lies
                inside those bytes

torch.save's files are read with weights_only=True, too. Names and shapes are compared with a
network where one is built (edm_unet.load_edm). A file made to fill the memory, or to keep Python
busy, is not defended against; it can do no more than that.
"""

import io
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plumbing.files import is_web_page, one_line, one_line_errors, read_tensors, torch_load
from plumbing.options import UserError

# The generator of github.com/devrimcavusoglu/dmd was trained one step below sigma = 80, at
# karras_sigmas(1000)[-2], because a zero is appended to its table of noise levels.
MODEL_G_SIGMA = 79.56382521581216

MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # opens torch.save's older format


def read_edm_file(path: str | Path) -> tuple[dict[str, Tensor], dict | None, dict[str, Any]]:
    """The weights in a file of any of the formats. Understood are

        NVIDIA's pickles: the `ema` network of a snapshot, or a network that is the whole pickle
        this repository's own files
        state dicts, bare or in wrappers, such as DMD2's ImageNet-64 pytorch_model.bin
        checkpoints with the generator under "model_g", such as github.com/devrimcavusoglu/dmd's

    Returns:
        tensors: under the names of EDMPrecond's state dict. Of any floating type; the file may
            still be mapped to them, so copy them.
        kwargs: EDMPrecond's arguments, None if the file does not tell.
        metadata: of a file of ours, what was written with it. Of a "model_g" checkpoint,
            {"role": "generator", "sigma": 79.56}: its one step starts at sigma * z and runs the
            network at sigma, not at 80. Else {}.
    """
    path = Path(path)
    kwargs, metadata = None, {}
    with one_line_errors(path):
        kind = file_format(path)
        if kind == "pickle":
            stored, kwargs = read_edm_pickle(path)
        elif kind == "safetensors":
            stored, metadata = read_tensors(path)
            if "kwargs" in metadata:
                kwargs = dict(json.loads(metadata["kwargs"]))
        else:
            stored = torch_load(path)
            if isinstance(stored, dict) and "model_g" in stored:
                stored = stored["model_g"]
                metadata = {"role": "generator", "sigma": MODEL_G_SIGMA}
        return sampling_tensors(bare_names(stored)), kwargs, metadata


def file_format(path: Path) -> str:
    """ "pickle" (NVIDIA's), "torch" (zip or older) or "safetensors", by the file's first bytes."""
    with one_line_errors(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04") or MAGIC in head[:16]:
            return "torch"
        # First the length of a header: its low byte may well be the one that opens a pickle.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
            return "safetensors"
        if head.startswith(b"\x80"):
            return "pickle"
        if not head:
            raise UserError("it is empty; get it again")
        if is_web_page(head):
            raise UserError("it is a web page, not weights; open its address in a browser")
        raise UserError("it is neither an EDM pickle nor a file of torch.save nor safetensors")


# --------------------------------------------------------------------------------------------------
# NVIDIA's pickles


class SafeUnpickler(pickle.Unpickler):
    """Takes the functions and classes that a pickle names from a table, and from nowhere else."""

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self.names = stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; called wherever a pickle asks for one."""
        if (module, name) not in self.names:
            named = one_line(f"{module}.{name}", 80)
            raise UserError(f"it names {named}, which no EDM file needs; nothing was run")
        return self.names[module, name]

    def persistent_load(self, identity: Any) -> Any:
        """Things kept outside of the pickle: EDM's files have none."""
        raise UserError("it refers to something outside of it; no EDM file does")


class Pickled:
    """What is kept of a module: the name of its class and its attributes."""

    class_name, state = "ModuleDict", None

    def __setstate__(self, state: dict) -> None:
        self.state = state


class Float64:
    """numpy.dtype("<f8"), the only one that EDM's files have."""

    def __init__(self, code: str, *_):
        if code != "f8":
            raise UserError(f"it holds a numpy number of type {code!r}; EDM's files have only f8")

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise UserError("it holds big-endian numbers; EDM's files have none")


class StoredTensor(NamedTuple):
    """What torch._utils._rebuild_tensor_v2 is called with. It is checked by `rebuild`, when the
    whole pickle has been read and nothing in it can change it any more."""

    blob: bytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def stand_ins() -> dict[tuple[str, str], Any]:
    """Every name in NVIDIA's pickles, and what SafeUnpickler takes for it.

    The functions are made anew for each file, because a pickle may set attributes of them.
    """

    def persistent(meta: dict) -> Pickled:
        kept = Pickled()  # without meta["module_src"], the source of its class
        kept.class_name, kept.state = meta["class_name"], meta["state"]
        return kept

    def scalar(dtype: Float64, data: bytes) -> float:
        return struct.unpack("<d", data)[0]

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("torch.nn.modules.container", "ModuleDict"): Pickled,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *call: StoredTensor(*call[:4]),
        ("torch.storage", "_load_from_bytes"): lambda blob: blob,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,
        ("numpy", "dtype"): Float64,
        ("collections", "OrderedDict"): dict,
        ("dnnlib.util", "EasyDict"): dict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes, in protocol 2
    }


def rebuild(stored: StoredTensor) -> Tensor:
    """The tensor, if it lies inside its bytes; torch's own function does not check."""
    blob, offset, shape, stride = stored
    # In torch.save's older format: a header, the number of values as int64, the values. Its reader
    # tells their type; they are taken from the blob, as it would give uninitialised ones, too.
    storage = torch_load(io.BytesIO(blob)) if MAGIC in blob[:16] else None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UserError("it holds something else in the place of a tensor's numbers")
    nbytes = storage._untyped_storage.nbytes()  # public names warn that typed ones will go
    count, start = nbytes // storage.dtype.itemsize, len(blob) - nbytes
    if start < 8 or blob[start - 8 : start] != struct.pack("<q", count):
        raise UserError(f"it claims {count} numbers in a tensor of {len(blob)} bytes")
    if not all(type(number) is int for number in (offset, *shape, *stride)):
        raise UserError("it describes a tensor by something else than numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if min(offset, *shape, *stride, 0) < 0 or 0 in shape or last >= count:
        raise UserError(f"it has a tensor {tuple(shape)} that reaches beyond its {count} numbers")
    values = torch.frombuffer(bytearray(memoryview(blob)[start:]), dtype=storage.dtype)
    return values.as_strided(shape, stride, offset)


def read_edm_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One of NVIDIA's `.pkl` files -> all its tensors, and EDMPrecond's arguments as recorded."""
    with open(path, "rb") as file:
        root = SafeUnpickler(file).load()
    if isinstance(root, dict):
        root = root.get("ema")
    if not isinstance(root, Pickled):
        raise UserError("it is a pickle without a network under 'ema'")
    if root.class_name != "EDMPrecond":
        raise UserError(f"its network is a {root.class_name!r}, only EDMPrecond is supported")
    kwargs = dict(root.state["_init_kwargs"])
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_data"):
        if name in root.state:
            kwargs[name] = root.state[name]
    kwargs.pop("label_dropout", None)  # acts in training only
    stored = dict(named_tensors(root, ""))
    tensors = {k: rebuild(v) if isinstance(v, StoredTensor) else v for k, v in stored.items()}
    return tensors, kwargs


def named_tensors(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers of a tree of pickled modules, with their full names."""
    if not isinstance(module, Pickled):
        raise UserError(f"it holds something else in the place of the module {prefix[:-1]!r}")
    for kind in ("_parameters", "_buffers"):
        for name, value in module.state[kind].items():
            if value is not None:
                yield prefix + name, value
    for name, child in module.state["_modules"].items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.")


# --------------------------------------------------------------------------------------------------
# Names


def bare_names(stored: Any) -> dict[str, Tensor]:
    """Remove what wrappers put before the names: DDP's `module.`, DMD2's `feedforward_model.`,
    beside which DMD2 may have saved its other networks; these are left out."""
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


def sampling_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what EDM's files hold and EDMPrecond does not: `map_augment`, which sampling never
    uses, and the `resample_filter` buffers, which must be the 2x2 box."""
    tensors = {}
    for name, value in stored.items():
        if name.endswith(".resample_filter"):
            if tuple(value.shape) != (1, 1, 2, 2) or not (value == 0.25).all():
                raise UserError(
                    f"{name} is not the 2x2 box filter: NCSN++ networks (EDM's files named '-ve') "
                    "are not supported; use the '-vp' file of the same dataset"
                )
        elif not name.startswith("model.map_augment."):
            tensors[name] = value
    return tensors
