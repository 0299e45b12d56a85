"""Read EDM weights from other people's files, without running anything in them.

    read_edm_file   NVIDIA's released .pkl, torch.save's formats, safetensors -> tensors by name

All but the last are pickles, and a pickle is a program: it names functions and calls them, so
reading one from the network with pickle.load hands over the machine. NVIDIA's files go further and
carry the Python source of their networks, which NVIDIA's own reader executes. None of that is
needed for a table of numbers. Here

    stand_ins    is the table of all names in NVIDIA's files: each gets something harmless of ours,
                 any other name is refused
    read_storage gives the bytes of every tensor, a pickle of their own, to
                 torch.load(weights_only=True), which works by the same rules
    rebuild      makes a tensor of them if it lies within these bytes

Names and shapes are compared with the network before it gets the numbers, see edm_unet.load_edm.
What is not guarded against: a file made on purpose to fill the memory or to keep the reader busy.
"""

import io
import json
import math
import pickle
import reprlib
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plumbing.files import read_tensors
from plumbing.foreign import file_format, one_line, restricted_load
from plumbing.options import UserError

# The generator in github.com/devrimcavusoglu/dmd was trained one step below sigma = 80, because a
# zero is appended to its table of noise levels.
MODEL_G_SIGMA = 79.56382521581216  # karras_sigmas(1000)[-2]


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


def read_storage(blob: bytes) -> Tensor:
    """Stand-in for torch.storage._load_from_bytes, which is an unrestricted torch.load -> (N,)."""
    storage = restricted_load(io.BytesIO(blob))
    if not isinstance(storage, torch.TypedStorage):
        raise UserError("it holds something else in the place of a tensor's numbers")
    with warnings.catch_warnings(action="ignore"):  # torch's, of its own older format
        return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


def rebuild(values: Tensor, offset: int, shape: Sequence[int], stride: Sequence[int], *_) -> Tensor:
    """Stand-in for torch._utils._rebuild_tensor_v2, which enlarges a storage that is too small."""
    numbers = (offset, *shape, *stride)
    if not isinstance(values, Tensor) or not all(type(n) is int for n in numbers):
        raise UserError("it describes a tensor by something else than numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if min(numbers) < 0 or min(shape, default=1) < 1 or last >= values.numel():
        raise UserError(f"it has a tensor {shape} that reaches beyond its {len(values)} numbers")
    return values.as_strided(tuple(shape), tuple(stride), offset)


def stand_ins() -> dict[tuple[str, str], Any]:
    """Every name in NVIDIA's pickles, and what is taken for it.

    Made anew for each file: a pickle may set attributes of what it is given.
    """

    def persistent(meta: dict) -> Pickled:
        # meta["module_src"] is the source of the class. It is dropped.
        kept = Pickled()
        kept.class_name, kept.state = meta["class_name"], meta["state"]
        return kept

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
        ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: rebuild(*arguments),
        ("torch.storage", "_load_from_bytes"): lambda blob: read_storage(blob),
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,
        ("numpy", "dtype"): type("dtype", (Float64,), {}),
        ("collections", "OrderedDict"): lambda: {},
        ("dnnlib.util", "EasyDict"): type("EasyDict", (dict,), {"__init__": lambda self: None}),
        ("builtins", "set"): lambda members=(): set(members),
        ("__builtin__", "set"): lambda members=(): set(members),
        ("_codecs", "encode"): encode,
    }


class SafeUnpickler(pickle.Unpickler):
    """Resolves the names that a pickle calls from a table of ours, and from nowhere else."""

    def __init__(self, file: io.BufferedIOBase, names: dict[tuple[str, str], Any]):
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what the pickle asks for."""
        if (module, name) not in self.names:
            raise UserError(
                f"it names {one_line(f'{module}.{name}', 80)}, which no EDM file needs and which "
                "could run anything; nothing was run"
            )
        return self.names[module, name]


def read_edm_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One of NVIDIA's files -> tensors by name, and the recorded arguments of EDMPrecond.

    Takes the `ema` network of a snapshot, or a network that is the whole pickle.
    """
    with open(path, "rb") as file:
        root = SafeUnpickler(file, stand_ins()).load()
    if isinstance(root, dict):
        root = root.get("ema")
    if not isinstance(root, Pickled) or not isinstance(root.state, dict):
        raise UserError("it is a pickle without a network under 'ema'")
    if root.class_name != "EDMPrecond":
        raise UserError(f"its network is a {root.class_name!r}, only EDMPrecond is supported")
    kwargs = dict(root.state["_init_kwargs"])
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_data"):
        if name in root.state:
            kwargs[name] = root.state[name]
    return module_tensors(root), kwargs


def module_tensors(module: Pickled, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module and those in it, by their full names."""
    if not isinstance(module, Pickled):
        raise UserError("it holds something else in the place of a module")
    tensors = module.state["_parameters"] | module.state["_buffers"]
    found = {prefix + name: value for name, value in tensors.items() if value is not None}
    for name, child in module.state["_modules"].items():
        if child is not None:
            found |= module_tensors(child, f"{prefix}{name}.")
    return found


# --------------------------------------------------------------------------------------------------
# State dicts


def bare_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put before the names: DDP's `module.`, DMD2's `feedforward_model.`.

    Beside a `feedforward_model` DMD2 may have saved its other networks, which are left out.
    """
    if not isinstance(stored, dict) or not stored or not all(isinstance(k, str) for k in stored):
        raise UserError("it holds no state dict (a dict of names and tensors)")
    for wrapper in ("module.", "feedforward_model.", "module."):
        wrapped = [name for name in stored if name.startswith(wrapper)]
        stored = {name.removeprefix(wrapper): stored[name] for name in wrapped} or stored
    return stored


# --------------------------------------------------------------------------------------------------
# Any of them


def read_edm_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]:
    """Read an EDM network, whatever the file's format. Call it within one_line_errors.

    Understands NVIDIA's pickles, this repository's own files, plain state dicts (such as DMD2's
    ImageNet-64 pytorch_model.bin) and checkpoints that are a dict with the generator under
    "model_g" (such as model.pt of github.com/devrimcavusoglu/dmd).

    Returns:
        tensors: float32 copies, under the names of EDMPrecond's state dict.
        kwargs: arguments of EDMPrecond, or None if the file does not tell.
        metadata: of a file of ours, what was written with it. Of a "model_g" checkpoint,
            {"role": "generator", "sigma": 79.56}: its one step starts at sigma * z and runs the
            network at sigma, not at 80. Else {}.
    """
    kind, kwargs, metadata = file_format(path), None, {}
    if kind == "pickle":
        stored, kwargs = read_edm_pickle(path)
    elif kind == "safetensors":
        stored, metadata = read_tensors(path)
    else:
        stored = restricted_load(path)
        if isinstance(stored, dict) and "model_g" in stored:
            stored, metadata = stored["model_g"], {"role": "generator", "sigma": MODEL_G_SIGMA}
    if "kwargs" in metadata:
        kwargs = dict(json.loads(metadata["kwargs"]))
    if kwargs is not None:
        check_arguments(kwargs)
    return plain_tensors(bare_names(stored)), kwargs, metadata


def plain_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 copies, in memory of their own, of what is not a file's but the network's.

    Two things that EDM's files hold and EDMPrecond does not are left out: `map_augment`, which
    sampling never uses, and the `resample_filter` buffers, which must be the 2x2 box.
    """
    tensors = {}
    for name, value in stored.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not plain or not value.dtype.is_floating_point:
            raise UserError(f"it holds something else than a tensor under {name!r}")
        if name.endswith(".resample_filter"):
            if tuple(value.shape) != (1, 1, 2, 2) or not (value == 0.25).all():
                raise UserError(
                    f"{name} is not the 2x2 box filter: NCSN++ networks (EDM's files named '-ve') "
                    "are not supported; use the '-vp' file of the same dataset"
                )
        elif not name.startswith("model.map_augment."):
            tensors[name] = value.detach()
    return tensors


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Raise UserError for what no network is built of; drops what acts in training alone."""
    kwargs.pop("label_dropout", None)
    for name, value in kwargs.items():
        parts = value if isinstance(value, list | tuple) else [value]
        known = all(isinstance(part, int | float | str | None) for part in parts)
        if not known or any(isinstance(part, int) and not 0 <= part <= 8192 for part in parts):
            raise UserError(f"it records the argument {name} = {reprlib.repr(value)}")
    sigma_data = kwargs.get("sigma_data", 0.5)
    if not isinstance(sigma_data, int | float) or not 0 < sigma_data < math.inf:
        raise UserError(f"it records sigma_data = {sigma_data!r}, which is no standard deviation")
