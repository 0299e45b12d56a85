"""Read EDM weights from other people's files, without running anything in them.

All but safetensors are pickles, and a pickle is a program: it names functions and calls them.
NVIDIA's even carry the source of their networks, to be executed. Here

    stand_ins   is the table of names that such a pickle may use, with harmless things of our own
                in their places; no other name is resolved
    rebuild     gives the second pickle, which hides in every tensor's bytes, to torch.load with
                weights_only=True (as torch.save's files), and checks the tensor's bounds

load_edm builds the network and compares names and shapes. A file made to fill the
memory, or to keep Python busy, is not defended against; it can do no more than that.
"""

import io
import json
import pickle
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm_unet import EDMPrecond
from plumbing.files import load_strictly, one_line_errors, read_tensors, torch_load
from plumbing.options import UserError

# The generator of github.com/devrimcavusoglu/dmd was trained one step below sigma = 80, at
# karras_sigmas(1000)[-2], because a zero is appended to its table of noise levels.
MODEL_G_SIGMA = 79.56382521581216

MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # opens torch.save's older format


def load_edm(path: str | Path, architectures: Sequence[dict] = ()) -> EDMPrecond:
    """A network from a file of any format that read_edm_file knows: in eval mode, float32, on the
    CPU, without gradients. The file's metadata is its attribute `metadata`.

    Args:
        architectures: arguments of EDMPrecond. A file that does not record its own must have the
            names and shapes of one of these.
    """
    tensors, kwargs, metadata = read_edm_file(path)
    found = {(name, value.shape) for name, value in tensors.items()}

    def differences(net: EDMPrecond) -> int:
        return len(found ^ {(name, value.shape) for name, value in net.state_dict().items()})

    with one_line_errors(Path(path)):
        try:
            with torch.device("meta"):  # do not spend time on initialising the weights
                nets = [EDMPrecond(**each) for each in ([kwargs] if kwargs else architectures)]
        except ValueError as error:  # an architecture that is not supported
            raise UserError(str(error)) from error
        if not nets:
            raise UserError("it does not say which network it is of; use the file of a run")
        net = min(nets, key=differences)
        nearest = f"the nearest takes images {net.image_shape} of {net.label_dim} classes"
        what = "it" if kwargs else f"it fits no known network; {nearest}, beside which it"
        load_strictly(net.to_empty(device="cpu"), tensors, what)
    net.metadata = metadata
    return net.eval().requires_grad_(False)


def read_edm_file(path: str | Path) -> tuple[dict[str, Tensor], dict | None, dict[str, Any]]:
    """The weights in NVIDIA's pickles (the `ema` network of a snapshot, or a network alone), in
    this repository's files, in state dicts, bare or in wrappers, and in checkpoints with the
    generator under "model_g", such as github.com/devrimcavusoglu/dmd's.

    Returns:
        tensors: under the names of EDMPrecond's state dict. Of any floating type; the file may
            still be mapped to them, so copy them.
        kwargs: EDMPrecond's arguments, None if the file does not tell.
        metadata: what a file of ours was written with. Of a "model_g" checkpoint, {"role":
            "generator", "sigma": 79.56}: its one step takes sigma * z, at sigma, not 80. Else {}.
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


def file_format(path: Path) -> str:
    """ "pickle" (NVIDIA's), "torch" (zip or older) or "safetensors", by the file's first bytes."""
    with one_line_errors(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK\x03\x04") or MAGIC in head[:16]:
            return "torch"
        # The length of a header comes first: its low byte may be the one that opens a pickle.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
            return "safetensors"
        if head.startswith(b"\x80"):
            return "pickle"
        if head.lstrip().startswith(b"<"):
            raise UserError("it is a web page, not weights; open its address in a browser")
        kinds = "neither an EDM pickle nor a file of torch.save nor safetensors"
        raise UserError(f"it is {kinds}: it begins with {head[:9]!r}")


def sampling_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under EDMPrecond's names, without what sampling never uses: `map_augment`, and
    the `resample_filter`s, which must be 2x2 boxes."""
    # DDP's wrapper, and DMD2's, beside which other networks may be saved.
    for wrapper in ("module.", "feedforward_model.", "module."):
        inside = {k.removeprefix(wrapper): v for k, v in stored.items() if k.startswith(wrapper)}
        stored = inside or stored
    tensors = {}
    for name, value in stored.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"it holds something else than a tensor of weights under {name!r}")
        if name.endswith(".resample_filter"):
            if tuple(value.shape) != (1, 1, 2, 2) or not (value == 0.25).all():
                raise UserError(
                    f"{name} is not a 2x2 box: NCSN++ networks (EDM's '-ve' files) are not "
                    "supported; use the '-vp' file of the same dataset"
                )
        elif not name.startswith("model.map_augment."):
            tensors[name] = value
    return tensors


# --------------------------------------------------------------------------------------------------
# NVIDIA's pickles


def read_edm_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One of NVIDIA's `.pkl` files -> all its tensors, and EDMPrecond's arguments as recorded."""
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
    """Takes the functions and classes that a pickle names from a table, and from nowhere else."""

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self.names = stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; called wherever a pickle asks for one."""
        if (module, name) not in self.names:
            raise UserError(f"it names {module}.{name}, which no EDM file needs; nothing was run")
        return self.names[module, name]


class Pickled:
    """What is kept of a module (or a numpy.dtype): the name of its class, and its attributes."""

    def __init__(self, class_name: str, state: Any = None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state: Any) -> None:
        self.state = state


def stand_ins() -> dict[tuple[str, str], Any]:
    """Every name in NVIDIA's pickles, and what SafeUnpickler takes for it.

    The functions are made anew for each file, because a pickle may set attributes of them.
    """

    def scalar(dtype: Pickled, data: bytes) -> float:
        if dtype.class_name != "f8" or dtype.state[1] != "<":
            raise UserError("it holds a numpy number that is not float64, as all of EDM's are")
        return struct.unpack("<d", data)[0]

    return {
        # Without "module_src", the source of the class.
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
    """Parameters and buffers of a tree of pickled modules, with their full names."""
    for kind in ("_parameters", "_buffers"):
        for name, stored in module.state[kind].items():
            if stored is not None:
                yield prefix + name, rebuild(*stored)
    for name, child in module.state["_modules"].items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.")


def rebuild(blob: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The tensor, if it lies inside its bytes; torch's own function does not check. Done when the
    whole pickle has been read, and nothing in it can change the tensor any more."""
    storage = torch_load(io.BytesIO(blob))
    # The blob ends with the number of values, as int64, and the values. They are taken from there:
    # torch.load tells their type, but a file can make it leave the values uninitialised.
    nbytes = storage._untyped_storage.nbytes()  # public names warn that typed ones will go
    count = nbytes // storage.dtype.itemsize
    if blob[-nbytes - 8 : -nbytes] != struct.pack("<q", count):
        raise UserError(f"it claims {count} numbers in a tensor of {len(blob)} bytes")
    values = torch.frombuffer(bytearray(blob[-nbytes:]), dtype=storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if min(offset, *shape, *stride, 0) < 0 or 0 in shape or last >= count:
        raise UserError(f"it has a tensor {tuple(shape)} that reaches beyond its {count} numbers")
    return values.as_strided(shape, stride, offset)
