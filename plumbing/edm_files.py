"""Read EDM weights from other people's files, without running anything in them.

All formats but safetensors are pickles, and a pickle is a program: it names functions and calls
them. NVIDIA's pickles even carry the source code of their networks, to be executed.

    stand_ins   is a table of the names that such a pickle may use, with a harmless stand-in for
                each. Any other name is an error.
    rebuild     reads the second pickle that the bytes of every tensor contain, by torch.load with
                weights_only=True (as for all files of torch.save), and checks the tensor's bounds.

There is no defence against a file that is made to fill the memory or to keep Python busy.
"""

import io
import json
import pickle
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm_unet import EDMPrecond
from plumbing.files import load_strictly, one_line_errors, read_tensors, torch_load
from plumbing.options import UserError

# github.com/devrimcavusoglu/dmd trains its generator, "model_g", one step below sigma = 80, at
# karras_sigmas(1000)[-2], because it appends a zero to its table of noise levels.
MODEL_G_SIGMA = 79.56382521581216

MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # at the start of torch.save's older format


def load_edm(path: str | Path, architectures: Sequence[dict] = ()) -> EDMPrecond:
    """Load a network from any file that read_edm_file reads: float32, in eval mode, frozen, on the
    CPU. Its attribute `metadata` is the file's metadata.

    Args:
        architectures: arguments of EDMPrecond. A file that does not record its own must have the
            names and shapes of one of these.
    """
    tensors, kwargs, metadata = read_edm_file(path)

    def shapes(state: dict[str, Tensor]) -> set:
        return {(name, value.shape) for name, value in state.items()}

    with one_line_errors(Path(path)):
        try:
            with torch.device("meta"):  # spend no time on initialising the weights
                nets = [EDMPrecond(**each) for each in ([kwargs] if kwargs else architectures)]
        except ValueError as error:  # an unsupported architecture
            raise UserError(str(error)) from error
        if not nets:
            raise UserError("it does not say which network it belongs to; use the file of a run")
        net = min(nets, key=lambda net: len(shapes(tensors) ^ shapes(net.state_dict())))
        nearest = f"the nearest takes images {net.image_shape} of {net.label_dim} classes"
        what = "it" if kwargs else f"it fits no known network; {nearest}; compared with that, it"
        load_strictly(net.to_empty(device="cpu"), tensors, what)
    net.metadata = metadata
    return net.eval().requires_grad_(False)


def read_edm_file(path: str | Path) -> tuple[dict[str, Tensor], dict | None, dict[str, Any]]:
    """Read NVIDIA's pickles (a snapshot's `ema` network, or a network alone), this repository's
    files, state dicts (bare or in wrappers), and checkpoints with the generator under "model_g".

    Returns:
        tensors: as in EDMPrecond's state dict, of any floating type; copy them, because they may
            be mapped to the file.
        kwargs: EDMPrecond's arguments, or None if the file does not record them.
        metadata: what this repository's files were written with; for a "model_g" checkpoint,
            {"role": "generator", "sigma": 79.56}, the noise level of its step; else {}.
    """
    path = Path(path)
    kwargs, metadata = None, {}
    with one_line_errors(path):
        kind = file_format(path)
        if kind == "pickle":
            stored, kwargs = read_edm_pickle(path)
        elif kind == "safetensors":
            stored, metadata = read_tensors(path)
            kwargs = json.loads(metadata.get("kwargs", "null"))
        else:
            stored = torch_load(path)
            if "model_g" in stored:
                stored = stored["model_g"]
                metadata = {"role": "generator", "sigma": MODEL_G_SIGMA}
        return sampling_tensors(stored), kwargs, metadata


def size_and_kind(teacher: str) -> tuple[int, bool]:
    """Pixels per side of an EDM network's images, and whether it is unconditional: from its file or
    the name of a released one."""
    if Path(teacher).is_file():
        net = load_edm(teacher)
        return net.image_shape[-1], net.label_dim == 0
    if named := re.search(r"-(\d+)x\d+-", teacher):
        return int(named[1]), "-uncond-" in teacher
    raise UserError(f"{teacher} is not a file; download the teacher, and give its path")


def file_format(path: Path) -> str:
    """Tell a "pickle" (NVIDIA's), "torch" (zip or older) and "safetensors" by the first bytes."""
    with one_line_errors(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04") or MAGIC in head[:16]:
            return "torch"
        # Before pickle: the low byte of the header's length may be 0x80, which starts a pickle.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
            return "safetensors"
        if head.startswith(b"\x80"):
            return "pickle"
        if head.lstrip().startswith(b"<"):
            raise UserError("it is a web page, not weights; open its address in a browser")
        begins = f"it begins with {head[:9]!r}"
        raise UserError(f"it is neither an EDM pickle nor torch.save's nor safetensors: {begins}")


def sampling_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under EDMPrecond's names, without what it does not need: `map_augment` and the
    `resample_filter`s, which must be 2x2 boxes."""
    # torch.compile's wrapper, DDP's, then DMD2's. A file may hold other networks beside these.
    stored = {name.replace("_orig_mod.", ""): value for name, value in stored.items()}
    for wrapper in ("module.", "feedforward_model.", "module."):
        inside = {k.removeprefix(wrapper): v for k, v in stored.items() if k.startswith(wrapper)}
        stored = inside or stored
    tensors = {}
    for name, value in stored.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"{name!r} in it is not a tensor of floating-point weights")
        if name.endswith(".resample_filter"):
            if tuple(value.shape) != (1, 1, 2, 2) or not (value == 0.25).all():
                raise UserError(f"{name} is not a 2x2 box: this is NCSN++; use the '-vp' file")
        elif not name.startswith("model.map_augment."):
            tensors[name] = value
    return tensors


# --------------------------------------------------------------------------------------------------
# NVIDIA's pickles


def read_edm_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One of NVIDIA's `.pkl` files -> all its tensors, and the recorded EDMPrecond arguments."""
    with open(path, "rb") as file:
        network = SafeUnpickler(file).load()
    if isinstance(network, dict):
        network = network.get("ema")
    kind = getattr(network, "class_name", None)
    if kind != "EDMPrecond":
        raise UserError(f"its network ('ema') is {kind!r}; only EDMPrecond is supported")
    state, names = network.state, ("img_resolution", "img_channels", "label_dim", "sigma_data")
    kwargs = state["_init_kwargs"] | {name: state[name] for name in names if name in state}
    return dict(named_tensors(network)), kwargs


class SafeUnpickler(pickle.Unpickler):
    """Looks up the functions and classes that a pickle names in `stand_ins`, and nowhere else."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; pickle calls this for every name."""
        names = stand_ins()
        if (module, name) not in names:
            raise UserError(f"it names {module}.{name}, which no EDM file needs; nothing was run")
        return names[module, name]


class Pickled:
    """What is kept of a module (or a numpy.dtype): the name of its class, and its attributes."""

    def __init__(self, class_name: str, state: Any = None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state: Any) -> None:
        self.state = state


def stand_ins() -> dict[tuple[str, str], Any]:
    """The names in NVIDIA's pickles -> stand-ins, made anew because a pickle can change them."""

    def scalar(dtype: Pickled, data: bytes) -> float:
        return struct.unpack({"f8": "<d"}[dtype.class_name], data)[0]  # all of EDM's are float64

    return {
        # Leaves out "module_src", the source of the class.
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): (
            lambda meta: Pickled(meta["class_name"], meta["state"])
        ),
        ("torch.nn.modules.container", "ModuleDict"): Pickled,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *call: call[:4],  # for `rebuild`
        ("torch.storage", "_load_from_bytes"): lambda blob: blob,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,
        ("numpy", "dtype"): lambda code, *_: Pickled(code),
        ("collections", "OrderedDict"): dict,
        ("dnnlib.util", "EasyDict"): dict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes, in protocol 2
    }


def named_tensors(module: Pickled, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a tree of pickled modules, by their full names."""
    for name, stored in (module.state["_parameters"] | module.state["_buffers"]).items():
        if stored is not None:
            yield prefix + name, rebuild(*stored)
    for name, child in module.state["_modules"].items():
        yield from named_tensors(child, f"{prefix}{name}.")


def rebuild(blob: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The tensor, after a check that torch's own function omits: it must lie inside its bytes. Call
    this after the whole pickle has been read, when it can no longer change the tensor."""
    storage = torch_load(io.BytesIO(blob))
    # The blob ends with the number of values, as int64, and the values. Only their type is taken
    # from torch.load, because a file can make it leave the values uninitialised.
    nbytes = storage._untyped_storage.nbytes()  # the public names raise warnings
    count = nbytes // storage.dtype.itemsize
    if blob[-nbytes - 8 : -nbytes] != struct.pack("<q", count):
        raise UserError(f"it claims to hold {count} numbers in {len(blob)} bytes")
    values = torch.frombuffer(bytearray(blob[-nbytes:]), dtype=storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if min(offset, *shape, *stride, 0) < 0 or 0 in shape or last >= count:
        raise UserError(f"it has a tensor {tuple(shape)} that reaches beyond its {count} numbers")
    return values.as_strided(shape, stride, offset)
