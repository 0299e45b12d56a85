"""Weights from other people's files: bitwise what was written, and nothing of theirs is run."""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm_unet import EDMPrecond, UNetBlock, karras_sigmas
from plumbing import edm_files
from plumbing.edm_files import load_edm, read_edm_file
from plumbing.files import write_tensors
from plumbing.options import UserError

TINY = dict(
    img_resolution=8, img_channels=3, label_dim=4, model_type="SongUNet", model_channels=16,
    channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], sigma_data=0.5,
)  # fmt: skip
TABLE = (TINY, {**TINY, "label_dim": 0})


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return EDMPrecond(**TINY).eval()


def equal(found: dict, expected: nn.Module, dtype=torch.float32):
    """Assert that tensors are those of a network's state dict, rounded to dtype, in float32."""
    state = expected.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == torch.float32 and found[name].is_contiguous()
        assert torch.equal(found[name], value.to(dtype).float()), name


def refused(path: Path, *words: str):
    """Assert that a file is refused in one line with its name and these words, and nothing run."""
    with pytest.raises(UserError) as caught:
        load_edm(path, TABLE)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and str(path) in message
    assert all(word in message for word in words), message
    assert not (path.parent / "marker").exists()


# --------------------------------------------------------------------------------------------------
# Writing pickles as EDM does: its classes' names, torch's own tensors


def named(module: str, name: str):
    """A function that pickle writes as `module`.`name`; reading a file must not call it."""

    def function(*_):
        raise AssertionError("the reader called what the file names")

    function.__module__, function.__qualname__ = module, name
    for each in (module.partition(".")[0], module):
        sys.modules.setdefault(each, types.ModuleType(each))
    setattr(sys.modules[module], name, function)
    return function


RECONSTRUCT = named("torch_utils.persistence", "_reconstruct_persistent_obj")
EASY_DICT = named("dnnlib.util", "EasyDict")


class EDMPickler(pickle.Pickler):
    """Writes a module as EDM does: its class's name, its __dict__, and source to be executed."""

    def reducer_override(self, value):
        if not isinstance(value, nn.Module) or isinstance(value, nn.ModuleDict):
            return NotImplemented
        class_name = getattr(value, "class_name", type(value).__name__)
        about = {"type": "class", "version": 6, "module_src": "raise SystemExit"}
        return RECONSTRUCT, ({**about, "class_name": class_name, "state": value.__dict__},)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def edm_network(net: EDMPrecond, dtype=torch.float32, **changed) -> nn.Module:
    """A copy of our network with the attributes and buffers that EDM's has. `changed` constructor
    arguments are recorded instead of its own."""
    network = copy.deepcopy(net).to(dtype)
    kwargs = {**network.__dict__.pop("kwargs"), "use_fp16": False, "augment_dim": 9, **changed}
    attributes = {k: kwargs.pop(k) for k in ("img_resolution", "label_dim", "sigma_data")}
    network.__dict__.update(attributes, _init_kwargs=kwargs, sigma_max=math.inf)
    network.model.map_augment = nn.Linear(9, 16, bias=False)
    for block in network.modules():
        if isinstance(block, UNetBlock):
            block.style, block.skip_scale = None, np.float64(0.5) ** 0.5
            for part in (block.conv0, block.skip):
                box = torch.full((1, 1, 2, 2), 0.25, dtype=dtype) if block.resample else None
                part.register_buffer("resample_filter", box)
    return network


def with_weight(tiny, value) -> nn.Module:
    """A network with this in the place of one of its tensors, which is (64, 16)."""
    network = edm_network(tiny)
    network.model.map_layer0._parameters["weight"] = value
    return network


def dumps(value, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    EDMPickler(file, protocol).dump(value)
    return file.getvalue()


@pytest.fixture
def pkl(tmp_path):
    """write(value, protocol) -> a file of these bytes, or of the value's pickle, networks in a
    snapshot."""

    def write(value, protocol: int = 4) -> Path:
        path = tmp_path / "network.pkl"
        value = {"ema": value} if isinstance(value, nn.Module) else value
        path.write_bytes(value if isinstance(value, bytes) else dumps(value, protocol))
        return path

    return write


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_bit_by_bit(tiny, pkl, protocol):
    loss = Call(RECONSTRUCT, {"class_name": "EDMLoss", "state": {"P_mean": -1.2}})
    snapshot = {"ema": edm_network(tiny), "loss_fn": loss, "dataset_kwargs": Call(EASY_DICT)}
    path = pkl({**snapshot, "augment_pipe": None}, protocol)
    tensors, kwargs, metadata = read_edm_file(path)
    equal(tensors, tiny)
    assert {key: kwargs[key] for key in TINY} == TINY and metadata == {}
    data = dumps(edm_network(tiny), protocol)  # not in a snapshot
    if protocol == 2:  # which writes names without their lengths: as the first numpy has them
        assert data.count(b"numpy._core.") == 1
        data = data.replace(b"numpy._core.", b"numpy.core.")
    equal(load_edm(pkl(data)).state_dict(), tiny)
    adm = EDMPrecond(**TINY | {"model_type": "DhariwalUNet", "model_channels": 64})
    loaded = load_edm(pkl(edm_network(adm), protocol))
    equal(loaded.state_dict(), adm)
    assert loaded.kwargs == adm.kwargs


def test_other_precisions_become_float32(tiny, pkl, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        equal(load_edm(pkl(edm_network(tiny, dtype))).state_dict(), tiny, dtype)
        path = save(tmp_path / "model.pt", released_state(tiny, "", dtype))
        equal(load_edm(path, TABLE).state_dict(), tiny, dtype)


def test_what_load_edm_returns(tiny, pkl, tmp_path):
    """A copy of its own, in memory that can be written, of a file that may change."""
    for path in (pkl(edm_network(tiny)), save(tmp_path / "model.pt", released_state(tiny))):
        net = load_edm(str(path), TABLE)
        path.write_bytes(bytes(path.stat().st_size))  # torch.load maps the file
        equal(net.state_dict(), tiny)
        assert not any(module.training for module in net.modules())
        assert not list(net.buffers())  # load_edm would leave them on the meta device
        for parameter in net.parameters():
            assert parameter.device.type == "cpu" and not parameter.requires_grad
            parameter.zero_()


def test_unsupported_networks(tiny, pkl):
    ncsnpp = dict(encoder_type="residual", embedding_type="fourier", resample_filter=[1, 3, 3, 1])
    for changed, word in (
        (ncsnpp, "use the '-vp' file"),
        ({"num_bloks": 3}, "num_bloks"),
        ({"model_type": "VGG"}, "unknown model_type 'VGG'"),
        ({"sigma_data": "0.5"}, "sigma_data must be"),
        ({"channel_mult_emb": np.int64(8)}, "i8"),
    ):
        refused(pkl(edm_network(tiny, **changed)), word)
    network = edm_network(tiny)
    network.class_name = "two\nlines"
    refused(pkl(network), repr(network.class_name), "only EDMPrecond is supported")
    network = edm_network(tiny)
    network.model.enc["4x4_down"].conv0.resample_filter[0, 0, 0, 0] = 0.3
    refused(pkl(network), "model.enc.4x4_down.conv0.resample_filter", "NCSN++", "'-vp' file")
    refused(pkl({"G": 1}), "its network ('ema') is None")
    network = edm_network(tiny)
    del network.model.map_layer0.bias
    refused(pkl(network), "refused: it holds another architecture: 1 missing (model.map_layer0.b")
    network = edm_network(tiny)  # no tree
    loop = network.model.enc["loop"] = nn.ModuleDict()
    loop._modules["loop"] = loop
    refused(pkl(network), "RecursionError")


# --------------------------------------------------------------------------------------------------
# Hostile pickles


def payloads(folder: Path) -> dict[str, Call]:
    """Calls that would create a file `marker`, or hand out the means to, by what they name."""
    return {
        "posix.system": Call(os.system, f"touch {folder}/marker"),
        "builtins.getattr": Call(getattr, "text", "upper"),
        "io.open": Call(open, f"{folder}/marker", "w"),
    }


@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_names_are_refused(tiny, pkl, tmp_path, protocol):
    for name, payload in payloads(tmp_path).items():
        name = name.replace("builtins", "__builtin__") if protocol == 2 else name
        network = edm_network(tiny)
        network.payload = payload
        for value in (network, [payload, network]):
            refused(pkl(value, protocol), name, "nothing was run")


class Persistently(pickle.Pickler):
    """Writes a Call of None as a persistent id, as torch.save does with storages."""

    def persistent_id(self, value):
        return value.call[1] if isinstance(value, Call) and value.call[0] is None else None


def blob(kind=torch.FloatStorage, numel=6, count=6, values=None, keys=("0",), beside=()) -> Call:
    """A storage of 0 .. 5 as torch.save's older format has it, with the lies one wants in it."""
    file = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    storage = Call(None, "storage", kind, "0", "cpu", numel, None)
    storage = [*(tensor(storage, *each) for each in beside), storage] if beside else storage
    for part in (0x1950A86A20F9469CFC6C, 1001, system, storage, list(keys)):
        Persistently(file, 2).dump(part)
    values = np.arange(6, dtype="<f4").tobytes() if values is None else values
    return Call(torch.storage._load_from_bytes, file.getvalue() + struct.pack("<q", count) + values)


def saved(value, legacy=False) -> Call:
    """A whole file of torch.save in the place of a storage."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return Call(torch.storage._load_from_bytes, file.getvalue())


def tensor(storage, offset=0, shape=(2, 3), stride=(3, 1), then=()) -> Call:
    made = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})
    made.call += then
    return made


def test_a_blob_without_lies_is_read(tiny, pkl):
    """What the next tests distort is well-formed to begin with: only its shape is wrong."""
    refused(pkl(with_weight(tiny, tensor(blob()))), "map_layer0.weight (2, 3) instead of")
    data = blob().call[1][0]
    assert edm_files.rebuild(data, 1, (2, 2), (1, 3)).tolist() == [[1, 4], [2, 5]]
    assert edm_files.rebuild(data, 5, (), ()).item() == 5
    unread = blob(keys=()).call[1][0]  # torch.load leaves its values uninitialised
    assert edm_files.rebuild(unread, 1, (2, 2), (1, 3)).tolist() == [[1, 4], [2, 5]]


BEYOND = [
    (1, (2, 3), (3, 1)), (0, (2, 3), (4, 1)), (-1, (2, 3), (3, 1)), (6, (), ()),
    (0, (2, 3), (-1, 1)), (0, (0, 3), (3, 1)), (0, (1 << 62, 1 << 62), (1 << 62, 1)),
]  # fmt: skip
MALFORMED = [(0, (2, 3), (3,)), (0, (2.0, 3), (3, 1)), (None, (2, 3), (3, 1))]
LIES = [
    ({"numel": 1 << 50}, "cannot be read"), ({"count": 1 << 50}, "damaged"),
    ({"values": b""}, "damaged"), ({"keys": ("1",)}, "damaged"),
    ({"numel": 7, "count": 7}, "unexpected EOF"),
    ({"numel": 5, "count": 5}, "to hold 5 numbers"),
    ({"keys": (), "values": b""}, "to hold 6 numbers"),  # torch leaves them uninitialised
]  # fmt: skip
# BUILD, after the call: of a real tensor, the first would be `set_`, which checks nothing.
CHANGED = [(blob(), 0, (64, 64), (64, 1)), {"shape": (64, 64)}, (None, {"shape": (64, 64)})]


def test_what_is_not_a_tensor_inside_its_storage(tiny, pkl):
    cases = [(tensor(blob(), *arguments), "reaches beyond") for arguments in BEYOND]
    cases += [(tensor(blob(**lie)), word) for lie, word in LIES]
    # By a tensor beside the storage, made by torch's own function, which checks no bounds.
    cases += [(tensor(blob(beside=[(0, (1000,), (1,))]), 0, (2, 300), (300, 1)), "")]
    others = [tensor(blob(), *arguments) for arguments in MALFORMED]
    others += [tensor(blob(), then=(state,)) for state in CHANGED]
    others += [tensor("text"), tensor(saved(torch.ones(2, 3)))]
    others += ["text", 1.5, {}, [1, 2], blob(), nn.Module()]
    for value, word in cases + [(other, "damaged") for other in others]:
        refused(pkl(with_weight(tiny, value)), word)


def test_a_second_pickle_in_a_tensors_bytes(tiny, pkl, tmp_path):
    evil = payloads(tmp_path)["posix.system"]
    for bad in (blob(kind=evil), blob(keys=(evil,)), saved(evil), saved(evil, legacy=True)):
        refused(pkl(with_weight(tiny, tensor(bad))), "posix.system", "nothing was run")


def test_no_file_leaves_a_mark_on_the_next(pkl):
    """A pickle can set attributes of the functions and classes that it is given."""
    for name in edm_files.stand_ins():
        head = b"\x80\x04c" + "\n".join(name).encode() + b"\n"
        refused(pkl(head + b"N}\x8c\x04markK\x01s\x86b."))
        assert not hasattr(edm_files.stand_ins()[name], "mark")


def test_damaged_pickles(tiny, pkl):
    """Missing, truncated anywhere, or with a wrong byte: never another error than a UserError."""
    refused(Path("absent.pkl"), "does not exist")
    data = dumps({"ema": edm_network(tiny)})
    for length in (1, 9, 100, 5000, len(data) // 2, len(data) - 1):
        refused(pkl(data[:length]))
    equal(load_edm(pkl(data + b"surplus")).state_dict(), tiny)  # a pickle says itself where it ends
    random = np.random.default_rng(0)
    for at in random.integers(0, 4000, 20):
        broken = bytearray(data)
        broken[at] = random.integers(256)
        with contextlib.suppress(UserError):
            load_edm(pkl(bytes(broken)))


def test_files_of_other_kinds(pkl):
    for data, word in (
        (b"", "neither"), (bytes(100), "neither"), (b"\n<HTML>", "web page"),
        (b"cposix\nsystem\n(S'true'\ntR.", "neither"),  # a pickle of protocol 0
        (b"PK\x03\x04 no zip", "damaged"), (b"\x80\x04N.", "its network ('ema') is None"),
        (b"\x50\x00\x00\x00\x00\x00\x00\x00{" + b" " * 30, "damaged"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "damaged"),
        (b"\x80\x04Pname\n.", "no persistent_load function"),
    ):  # fmt: skip
        refused(pkl(data), word)


# --------------------------------------------------------------------------------------------------
# State dicts


def released_state(net: EDMPrecond, prefix: str = "", dtype=torch.float32) -> dict:
    """A state dict as EDM's own classes have it, with the tensors that ours have not."""
    return {prefix + name: value for name, value in edm_network(net, dtype).state_dict().items()}


def save(path: Path, value) -> Path:
    """Write with torch.save, in its older format if the name says so."""
    torch.save(value, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


@pytest.mark.parametrize("name", ["model.pt", "legacy.pt"])
def test_state_dicts_of_torch(tiny, tmp_path, name):
    """Bare, in wrappers (DMD2's with its other networks beside it), and a DMD checkpoint's."""
    others = {f"guidance_model.{name}": torch.zeros(3) for name in ("fake_unet.a", "cls.weight")}
    wrappers = ("", "module.", "module.feedforward_model.", "feedforward_model.module.")
    for prefix in (*wrappers, "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        state = released_state(tiny, prefix) | (others if "feedforward" in prefix else {})
        net = load_edm(save(tmp_path / name, state), TABLE)
        equal(net.state_dict(), tiny)
        assert net.kwargs == TINY and net.metadata == {}
    others = {
        "model_d": EDMPrecond(**TINY).state_dict(),
        "optimizer_g": {"state": {0: {"step": 3}}},
    }
    path = save(tmp_path / name, {"model_g": released_state(tiny), **others, "epoch": 3})
    net = load_edm(path, TABLE)
    equal(net.state_dict(), tiny)
    assert net.metadata["role"] == "generator"
    assert net.metadata["sigma"] == karras_sigmas(1000)[-2] == pytest.approx(79.5638, abs=1e-4)


def test_safetensors(tiny, tmp_path):
    """By content, not by name: others', then ours, which says what it is."""
    path = tmp_path / "misnamed.pkl"
    write_tensors(path, released_state(tiny), {})
    net = load_edm(path, TABLE)
    equal(net.state_dict(), tiny)
    assert net.kwargs == TINY and net.metadata == {}
    metadata = {"kwargs": json.dumps(tiny.kwargs), "role": "generator", "dataset": "mnist"}
    write_tensors(path, tiny.state_dict(), metadata)
    net = load_edm(path)  # TINY is not in the table
    equal(net.state_dict(), tiny)
    assert net.metadata == metadata
    for broken in ('{"img_resolution": 8}', "[1]", "{", "3"):
        write_tensors(path, tiny.state_dict(), {**metadata, "kwargs": broken})
        refused(path)
    for length in (0x80, 0x1280):  # of the header; its low byte opens every pickle
        path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
        assert edm_files.file_format(path) == "safetensors"


def test_state_dicts_that_fit_nothing(tiny, tmp_path):
    path = tmp_path / "model.pt"
    state = released_state(tiny)
    state["model.map_layer0.bias"] = torch.ones(3)
    state["model.extra"] = state.pop("model.map_layer1.bias")
    nearest = "fits no known network; the nearest takes images (3, 8, 8) of 4 classes"
    misshapen = "1 misshapen (model.map_layer0.bias (3,) instead of (64,))"
    refused(save(path, state), nearest, "1 missing", "1 surplus (model.extra)", misshapen)
    with pytest.raises(UserError, match="does not say which network"):
        load_edm(path)
    box = {"model.enc.4x4_down.conv0.resample_filter": torch.full((1, 1, 4, 4), 0.25)}
    refused(save(path, released_state(tiny) | box), "NCSN++", "'-vp' file")
    for other in ([1, 2], {1: torch.ones(1)}, torch.ones(3)):
        refused(save(path, other), "damaged or of another kind")
    for other in ({"weights": 3}, {"weights": torch.ones(2).long()}):
        refused(save(path, other), "'weights' in it is not a tensor of floating-point weights")
    refused(save(path, {}), "missing")


@pytest.mark.parametrize("name", ["model.pt", "legacy.pt"])
def test_hostile_files_of_torch(tiny, tmp_path, name):
    state = {**released_state(tiny), "evil": payloads(tmp_path)["posix.system"]}
    refused(save(tmp_path / name, state), "posix.system", "nothing was run")
    big = torch.zeros(1).expand(1 << 45)  # a shape that no memory holds, in a few bytes
    refused(save(tmp_path / name, {**released_state(tiny), "model.big": big}), "1 surplus")
    path = save(tmp_path / name, released_state(tiny))
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "damaged")
