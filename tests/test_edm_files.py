"""Weights from other people's files: bitwise what was written, and nothing of theirs is run."""

import contextlib
import io
import json
import math
import os
import pickle
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_edm_unet import golden
from torch import nn

from edm_unet import EDMPrecond, karras_sigmas
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


def equal(found: dict, expected: nn.Module):
    """Assert that tensors are those of a network's state dict, bit by bit, in float32."""
    state = expected.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == torch.float32 and found[name].is_contiguous()
        assert torch.equal(found[name], value), name


def refused(path: Path, *words: str):
    """Assert that a file is refused in one line with its name and these words."""
    with pytest.raises(UserError) as caught:
        load_edm(path, TABLE)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and str(path) in message
    for word in words:
        assert word in message


# --------------------------------------------------------------------------------------------------
# Writing pickles as EDM does: its classes' names, torch's own tensors


@contextlib.contextmanager
def module_under_name(module: str, name: str):
    """A function that pickle will write as `module`.`name`."""

    def function(*_):
        raise AssertionError("the reader called what the file names")

    function.__module__, function.__qualname__ = module, name
    parents = [module.rpartition(".")[0]] if "." in module else []
    for each in [*parents, module]:
        sys.modules[each] = types.ModuleType(each)
    setattr(sys.modules[module], name, function)
    try:
        yield function
    finally:
        for each in [*parents, module]:
            del sys.modules[each]


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Persistent:
    """Pickles as an EDM object: its class's name, its attributes, and source to be executed."""

    reconstruct = None

    def __init__(self, class_name: str, state: dict, module_src: str = "raise SystemExit"):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": module_src,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return Persistent.reconstruct, (self.meta,)


def dumps(value, protocol: int = 4) -> bytes:
    with module_under_name("torch_utils.persistence", "_reconstruct_persistent_obj") as function:
        Persistent.reconstruct = function
        return pickle.dumps(value, protocol)


def state_of(parameters=None, buffers=None, modules=None, **attributes) -> dict:
    """The __dict__ of a module: torch's bookkeeping and plain attributes."""
    return {
        "training": False,
        "_parameters": OrderedDict(parameters or {}),
        "_buffers": OrderedDict(buffers or {}),
        "_non_persistent_buffers_set": set(),
        "_forward_hooks": OrderedDict(),
        "_modules": OrderedDict(modules or {}),
        "_init_args": (),
        **attributes,
    }


def as_edm(module: nn.Module, dtype=torch.float32):
    """One of our modules as EDM has it, with box filters where it resamples."""
    box = torch.full((1, 1, 2, 2), 0.25, dtype=dtype)
    children = {name: as_edm(child, dtype) for name, child in module._modules.items() if child}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules.update(children)
        return container
    if getattr(module, "resample", None):
        for name in ("conv0", "skip"):
            children[name].meta["state"]["_buffers"]["resample_filter"] = box.clone()
    parameters = {
        name: value if value is None else nn.Parameter(value.detach().to(dtype))
        for name, value in module._parameters.items()
    }
    attributes = {"skip_scale": np.float64(0.5) ** 0.5, "weight_gain": [np.sqrt(1 / 3), None]}
    name = type(module).__name__.replace("Identity", "Conv2d")
    return Persistent(name, state_of(parameters, {"unused": None}, children, **attributes))


def edm_network(net: EDMPrecond, dtype=torch.float32, **changed) -> Persistent:
    """An EDMPrecond as EDM pickles it. `changed` constructor arguments are recorded instead."""
    network = as_edm(net, dtype)
    kwargs = {**net.kwargs, "use_fp16": False, "augment_dim": 9, **changed}
    attributes = {k: kwargs.pop(k) for k in ("img_resolution", "label_dim", "sigma_data")}
    network.meta["state"].update(_init_kwargs=kwargs, **attributes, sigma_max=math.inf)
    augment = Persistent("Linear", state_of({"weight": nn.Parameter(torch.ones(16, 9))}))
    network.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_augment"] = augment
    return network


def state_at(network: Persistent, name: str) -> dict:
    """The state of a submodule, by its dotted name."""
    for part in name.split("."):
        state = network.__dict__ if isinstance(network, nn.Module) else network.meta["state"]
        network = state["_modules"][part]
    return network.__dict__ if isinstance(network, nn.Module) else network.meta["state"]


@pytest.fixture
def pkl(tmp_path):
    """write(value, protocol) -> a file that holds the value's pickle, or these bytes."""

    def write(value, protocol: int = 4) -> Path:
        path = tmp_path / "network.pkl"
        path.write_bytes(value if isinstance(value, bytes) else dumps(value, protocol))
        return path

    return write


# --------------------------------------------------------------------------------------------------
# Pickles


@pytest.mark.parametrize("name", ["song_int", "adm_int"])
@torch.no_grad()
def test_golden_networks_out_of_a_pickle(name, pkl):
    net, meta, data = golden(name)
    loaded = load_edm(pkl({"ema": edm_network(net)}))
    equal(loaded.state_dict(), net)
    for key, value in meta["kwargs"].items():
        ignored = key in ("use_fp16", "sigma_min", "sigma_max", "augment_dim")
        assert ignored or loaded.kwargs.get(key, value) == value
    row = slice(2, 3)  # sigma = 1, where the network's output counts
    output = loaded(data["x"][row], data["sigma"][row], data["labels"][row])
    worst = (output - data["output"][row]).abs().max() / data["output"][row].abs().max()
    assert worst < 1e-5


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_bit_by_bit(tiny, pkl, protocol):
    with module_under_name("dnnlib.util", "EasyDict") as easy_dict:
        snapshot = {
            "ema": edm_network(tiny),
            "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
            "augment_pipe": None,
            "dataset_kwargs": Call(easy_dict),
        }
        path = pkl(snapshot, protocol)
    tensors, kwargs, metadata = read_edm_file(path)
    equal(tensors, tiny)
    assert {key: kwargs[key] for key in TINY} == TINY and metadata == {}
    equal(load_edm(pkl(edm_network(tiny), protocol)).state_dict(), tiny)  # not in a snapshot


def test_names_of_the_first_numpy(tiny, pkl):
    data = dumps({"ema": edm_network(tiny)}, 2)  # protocol 2 writes names without their lengths
    assert data.count(b"numpy._core.") == 1
    data = data.replace(b"numpy._core.", b"numpy.core.")
    equal(load_edm(pkl(data)).state_dict(), tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tiny, pkl, dtype):
    found = load_edm(pkl({"ema": edm_network(tiny, dtype)})).state_dict()
    for name, value in tiny.state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.to(dtype).float())


def test_views_of_a_storage(tiny, pkl):
    network = edm_network(tiny)
    parameters = state_at(network, "model.map_layer0")["_parameters"]
    expected = parameters["weight"].detach()
    inside = torch.randn(expected.shape[1] + 1, expected.shape[0] + 3)
    inside[1:, 2:-1] = expected.T
    parameters["weight"] = inside[1:, 2:-1].T
    equal(load_edm(pkl({"ema": network})).state_dict(), tiny)


def test_what_load_edm_returns(tiny, pkl):
    path = pkl({"ema": edm_network(tiny)})
    net = load_edm(str(path))
    path.unlink()
    assert not net.training and not any(module.training for module in net.modules())
    assert not list(net.buffers())  # load_edm would leave them on the meta device
    for parameter in net.parameters():
        assert parameter.device.type == "cpu" and parameter.dtype == torch.float32
        assert not parameter.requires_grad and parameter.data_ptr() % 16 == 0
    net.requires_grad_(True)
    net(torch.randn(2, 3, 8, 8), 1.0, torch.tensor([0, 3])).sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= parameter.grad  # the weights are writable


def test_class_defaults_apply_where_nothing_is_recorded(pkl):
    # What NVIDIA's CIFAR-10 files record, at a smaller width: no num_blocks, no attn_resolutions.
    recorded = dict(
        model_type="SongUNet", embedding_type="positional", encoder_type="standard",
        decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1], model_channels=8,
        channel_mult=[2, 2, 2], augment_dim=9, dropout=0.13, img_resolution=32, img_channels=3,
        label_dim=10,
    )  # fmt: skip
    net = EDMPrecond(**recorded)
    loaded = load_edm(pkl({"ema": edm_network(net)}))
    assert len(list(loaded.model.enc)) == 15 and loaded.model.enc["16x16_block3"].num_heads == 1
    equal(loaded.state_dict(), net)


def test_unsupported_networks(tiny, pkl):
    ncsnpp = dict(encoder_type="residual", embedding_type="fourier", resample_filter=[1, 3, 3, 1])
    refused(pkl({"ema": edm_network(tiny, **ncsnpp)}), "NCSN++", "'-vp' file")
    network = edm_network(tiny)
    network.meta["class_name"] = "two\nlines"
    refused(pkl({"ema": network}), "two\\nlines")
    for name in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):
        network.meta["class_name"] = name
        refused(pkl({"ema": network}), name, "only EDMPrecond is supported")
    network = edm_network(tiny)
    state_at(network, "model.enc.4x4_down.conv0")["_buffers"]["resample_filter"][0, 0, 0, 0] = 0.3
    refused(pkl({"ema": network}), "model.enc.4x4_down.conv0.resample_filter", "NCSN++")
    refused(pkl({"G": 1}), "its network ('ema') is None")
    refused(pkl({"ema": edm_network(tiny, num_bloks=3)}), "num_bloks")
    for sigma_data in ("0.5", None, [0.5], -0.5, 0, math.nan, math.inf):
        refused(pkl({"ema": edm_network(tiny, sigma_data=sigma_data)}), "sigma_data is")
    refused(pkl({"ema": edm_network(tiny, img_resolution="8")}), "")
    for number in (np.float32(0.5), np.int64(8)):
        refused(pkl({"ema": edm_network(tiny, channel_mult_emb=number)}), "not float64")
    refused(pkl({"ema": edm_network(tiny, model_type="VGG")}), "unknown model_type 'VGG'")


def test_missing_surplus_and_misshapen_tensors(tiny, pkl):
    network = edm_network(tiny)
    del state_at(network, "model.map_layer0")["_parameters"]["bias"]
    state_at(network, "model")["_parameters"]["extra"] = torch.ones(1)
    state_at(network, "model.map_layer1")["_parameters"]["bias"] = torch.ones(5)
    refused(
        pkl({"ema": network}),
        "1 missing (model.map_layer0.bias)",
        "1 surplus (model.extra)",
        "1 misshapen (model.map_layer1.bias (5,) instead of (64,))",
    )
    network = edm_network(tiny)
    del state_at(network, "model")["_modules"]["enc"]
    count = sum(name.startswith("model.enc.") for name in tiny.state_dict())
    refused(pkl({"ema": network}), f"{count} missing (model.enc.4x4_block0.affine.bias", ", ...)")


# --------------------------------------------------------------------------------------------------
# Hostile pickles


@pytest.fixture
def marker(tmp_path):
    """A file that hostile pickles try to create. It must not exist in the end."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def payload(name: str, marker: Path) -> Call:
    """A call that would create `marker`, or hand out the means to."""
    source = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(eval, source),
        "builtins.exec": Call(exec, source),
        "builtins.getattr": Call(getattr, "text", "upper"),
        "_io.open": Call(open, str(marker), "w"),
        "torch.serialization.load": Call(torch.load, str(marker)),
    }[name]


FOREIGN = ["posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "_io.open"]
FOREIGN += ["torch.serialization.load"]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_names_are_refused(tiny, pkl, marker, name, protocol):
    written = name.replace("builtins", "__builtin__") if protocol == 2 else name
    written = written.replace("_io.open", "io.open")
    network = edm_network(tiny)
    network.meta["state"]["payload"] = payload(name, marker)
    refused(pkl({"ema": network}, protocol), written, "nothing was run")
    refused(pkl([payload(name, marker), network], protocol), written, "nothing was run")


def test_source_in_the_file_is_not_executed(tiny, pkl, marker):
    network = edm_network(tiny)
    source = f"open({str(marker)!r}, 'w').close()"
    network.meta["module_src"] = source
    network.meta["state"]["_modules"]["model"].meta["module_src"] = source
    equal(load_edm(pkl({"ema": network})).state_dict(), tiny)


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_are_refused(tiny, pkl, marker, protocol):
    refused(pkl(payload("posix.system", marker), protocol), "neither an EDM pickle nor")


class Persistently(pickle.Pickler):
    """Writes a Call to `persistent_id` as a persistent id, as torch.save does with storages."""

    def persistent_id(self, value):
        return value.call[1] if isinstance(value, Call) and value.call[0] is None else None


def blob(numel=6, count=None, values=None, header=None, keys=("0",)) -> Call:
    """A storage as torch.save's older format has it, with the lies one wants in it."""
    header = header or ("storage", torch.FloatStorage, "0", "cpu", numel, None)
    file = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for part in (0x1950A86A20F9469CFC6C, 1001, system, Call(None, *header), list(keys)):
        Persistently(file, 2).dump(part)
    file.write(struct.pack("<q", numel if count is None else count))
    file.write(np.arange(6, dtype="<f4").tobytes() if values is None else values)
    return Call(torch.storage._load_from_bytes, file.getvalue())


def tensor(storage: Call, offset=0, shape=(2, 3), stride=(3, 1)) -> Call:
    arguments = (storage, offset, shape, stride, False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


def with_tensor(tiny, value) -> dict:
    """A snapshot with this in the place of one of its tensors, (2, 3) if it is well-formed."""
    network = edm_network(tiny)
    state_at(network, "model.map_layer0")["_parameters"]["weight"] = value
    return {"ema": network}


MISSHAPEN = "model.map_layer0.weight (2, 3) instead of"


def test_a_blob_without_lies_is_read(tiny, pkl):
    """What the next tests distort is well-formed to begin with: only its shape is wrong."""
    refused(pkl(with_tensor(tiny, tensor(blob()))), MISSHAPEN)
    refused(pkl(with_tensor(tiny, tensor(blob(), 0, (2, 3), (1, 2)))), MISSHAPEN)
    refused(pkl(with_tensor(tiny, tensor(blob(), 0, (2, 3), (1, 1)))), MISSHAPEN)  # overlapping
    data = blob().call[1][0]
    assert edm_files.rebuild(data, 1, (2, 2), (1, 3)).tolist() == [[1, 4], [2, 5]]
    assert edm_files.rebuild(data, 1, (), ()).item() == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((1, (2, 3), (3, 1)), "reaches beyond"),
        ((0, (2, 4), (3, 1)), "reaches beyond"),
        ((0, (2, 3), (4, 1)), "reaches beyond"),
        ((-1, (2, 3), (3, 1)), "reaches beyond"),
        ((6, (), ()), "reaches beyond"),
        ((0, (2, 3), (-1, 1)), "reaches beyond"),
        ((0, (0, 3), (3, 1)), "reaches beyond"),
        ((0, (1 << 62, 1 << 62), (1 << 62, 1)), "reaches beyond"),
        ((0, (2, 3), (3,)), "zip()"),
        ((0, (2.0, 3), (3, 1)), "TypeError"),
        ((0.0, (2, 3), (3, 1)), "TypeError"),
        ((math.nan, (2, 3), (3, 1)), "TypeError"),
        ((None, (2, 3), (3, 1)), "TypeError"),
    ],
)
def test_a_tensor_must_lie_inside_its_storage(tiny, pkl, arguments, word):
    refused(pkl(with_tensor(tiny, tensor(blob(), *arguments))), word)


FLOATS = torch.FloatStorage


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        (dict(numel=1 << 50), ""),
        (dict(numel=1 << 50, count=6), ""),
        (dict(count=1 << 50), ""),
        (dict(numel=-1), ""),
        (dict(numel=7), "unexpected EOF"),
        (dict(numel=7, count=6), "wrong byte size"),
        (dict(numel=5), "claims 5 numbers"),
        (dict(values=b""), ""),
        (dict(header=("storage", FLOATS, "0", "cpu", 6.0, None)), ""),
        (dict(header=("storage", "float", "0", "cpu", 6, None)), ""),
        (dict(header=("module", FLOATS, "0", "cpu", 6, None)), ""),
        (dict(header=("storage", FLOATS, "0", "cpu")), "damaged"),
        (dict(header=("storage", torch.LongStorage, "0", "cpu", 3, None), count=3), ""),
        (dict(header=("storage", FLOATS, "0", "cpu", 6, ("1", 1, 3))), ""),
        (dict(keys=("1",)), "damaged"),
        (dict(keys=(), values=b""), "claims 6 numbers"),  # torch leaves them uninitialised
    ],
)
def test_a_storage_that_lies(tiny, pkl, lie, word):
    refused(pkl(with_tensor(tiny, tensor(blob(**lie)))), word)


def test_a_blob_that_enlarges_its_storage(tiny, pkl):
    """A tensor beside the storage, made by torch's own function, which checks no bounds."""
    file = io.BytesIO()
    header = Call(None, "storage", torch.FloatStorage, "0", "cpu", 6, None)
    arguments = (header, 0, (1000,), (1,), False, OrderedDict())
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    both = [Call(torch._utils._rebuild_tensor_v2, *arguments), header]
    for part in (0x1950A86A20F9469CFC6C, 1001, system, both, ["0"]):
        Persistently(file, 2).dump(part)
    file.write(struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes())
    bad = Call(torch.storage._load_from_bytes, file.getvalue())
    refused(pkl(with_tensor(tiny, tensor(bad, 0, (2, 300), (300, 1)))))


def test_a_second_pickle_in_a_tensors_bytes(tiny, pkl, marker):
    evil = payload("posix.system", marker)
    for legacy in (False, True):  # torch.save of something hostile, in the place of a storage
        file = io.BytesIO()
        torch.save(evil, file, _use_new_zipfile_serialization=not legacy)
        bad = Call(torch.storage._load_from_bytes, file.getvalue())
        refused(pkl(with_tensor(tiny, tensor(bad))), "posix.system", "nothing was run")
    bad = blob(header=("storage", evil, "0", "cpu", 6, None))
    refused(pkl(with_tensor(tiny, tensor(bad))), "posix.system", "nothing was run")
    bad = blob(keys=(evil,))
    refused(pkl(with_tensor(tiny, tensor(bad))), "posix.system", "nothing was run")


def test_other_things_in_the_place_of_a_tensor(tiny, pkl):
    for thing in ("text", 1.5, {}, [1, 2], blob(), Persistent("Linear", {})):
        refused(pkl(with_tensor(tiny, thing)), "damaged")
    things = ["text", 3, b"text"]
    for legacy in (False, True):
        saved = io.BytesIO()
        torch.save(torch.ones(2, 3), saved, _use_new_zipfile_serialization=not legacy)
        things.append(Call(torch.storage._load_from_bytes, saved.getvalue()))
    for thing in things:
        refused(pkl(with_tensor(tiny, tensor(thing))), "damaged")
    refused(pkl(with_tensor(tiny, Call(torch.storage._load_from_bytes, "text"))), "damaged")


@pytest.mark.parametrize(
    "state",
    [
        (blob(), 0, (64, 64), (64, 1)),  # of a real tensor it would be `set_`, which checks nothing
        {"shape": (64, 64)},
        (None, {"shape": (64, 64)}),
    ],
)
def test_what_was_read_cannot_be_changed(tiny, pkl, state):
    changed = tensor(blob())
    changed.call = (*changed.call, state)  # BUILD, after the call
    refused(pkl(with_tensor(tiny, changed)), "damaged")


@pytest.mark.parametrize("protocol", [0, 2])
def test_persistent_ids_are_refused(pkl, protocol):
    at = {0: b"Pname\n", 2: b"\x8c\x04nameQ"}[protocol]
    refused(pkl(b"\x80\x04" + at + b"."), "no persistent_load function")


def test_modules_that_are_no_tree(tiny, pkl):
    network = edm_network(tiny)  # a module inside itself
    loop = nn.ModuleDict()
    loop._modules["loop"] = loop
    state_at(network, "model.enc")["_modules"]["loop"] = loop
    refused(pkl({"ema": network}), "RecursionError")
    network = edm_network(tiny)
    network.meta["state"]["_modules"]["more"] = "text"
    refused(pkl({"ema": network}), "damaged")


def test_no_file_leaves_a_mark_on_the_next(tiny, pkl):
    """A pickle may set attributes of the functions it is given; the next file gets fresh ones. A
    class's own __setstate__ keeps it from setting the class's."""
    first, second = edm_files.stand_ins(), edm_files.stand_ins()
    for name, stand_in in first.items():
        if isinstance(stand_in, types.FunctionType):
            assert second[name] is not stand_in
            continue
        head = b"\x80\x04c" + "\n".join(name).encode() + b"\n"
        refused(pkl(head + b"N}\x8c\x04markK\x01s\x86b."), "damaged")
        assert not hasattr(stand_in, "mark")
    equal(load_edm(pkl({"ema": edm_network(tiny)})).state_dict(), tiny)


# --------------------------------------------------------------------------------------------------
# Damaged files, and files of other kinds


def test_truncated_anywhere(tiny, pkl):
    data = dumps({"ema": edm_network(tiny)})
    for length in (1, 2, 9, 15, 100, 1000, 5000, len(data) // 2, len(data) - 100, len(data) - 1):
        refused(pkl(data[:length]))
    equal(load_edm(pkl(data + b"surplus")).state_dict(), tiny)  # a pickle says itself where it ends


def test_flipped_bytes_never_escape_as_another_error(tiny, pkl):
    data = dumps({"ema": edm_network(tiny)})
    random = np.random.default_rng(0)
    for at in random.integers(0, 4000, 20):
        broken = bytearray(data)
        broken[at] = random.integers(256)
        path = pkl(bytes(broken))
        with contextlib.suppress(UserError):
            load_edm(path)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "neither"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n<HTML>", "web page"),
        (b"PK\x03\x04 no zip", "damaged"),
        (b"\x50\x00\x00\x00\x00\x00\x00\x00{" + b" " * 30, "damaged"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "damaged"),
        (bytes(100), "neither"),
        (b"\x80\x04N.", "its network ('ema') is None"),
    ],
)
def test_files_of_other_kinds(pkl, data, word):
    refused(pkl(data), word)


def test_no_file(tmp_path):
    refused(tmp_path / "absent.pkl", "does not exist")
    refused(tmp_path, "directory")


# --------------------------------------------------------------------------------------------------
# State dicts


def released_state(net: EDMPrecond, prefix: str = "", dtype=torch.float32) -> dict:
    """A state dict as EDM's own classes have it, with the tensors that ours have not."""
    state = {prefix + name: value.to(dtype) for name, value in net.state_dict().items()}
    for block in ("enc.4x4_down", "dec.8x8_up"):
        for part in ("conv0", "skip"):
            box = torch.full((1, 1, 2, 2), 0.25, dtype=dtype)
            state[f"{prefix}model.{block}.{part}.resample_filter"] = box
    state[prefix + "model.map_augment.weight"] = torch.ones(16, 9, dtype=dtype)
    return state


def save(path: Path, value) -> Path:
    """Write with torch.save, in its older format if the name says so."""
    torch.save(value, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


@pytest.mark.parametrize("name", ["model.pt", "legacy.pt", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "feedforward_model.", "module.feedforward_model."]
)
def test_state_dicts_of_torch(tiny, tmp_path, name, prefix):
    path = save(tmp_path / name, released_state(tiny, prefix))
    net = load_edm(path, TABLE)
    equal(net.state_dict(), tiny)
    assert net.kwargs == TINY and net.metadata == {}


def test_dmd2_with_its_other_networks(tiny, tmp_path):
    state = released_state(tiny, "feedforward_model.")
    state |= {f"guidance_model.{name}": torch.zeros(3) for name in ("fake_unet.a", "cls.weight")}
    equal(load_edm(save(tmp_path / "pytorch_model.bin", state), TABLE).state_dict(), tiny)


def test_generator_of_a_dmd_checkpoint(tiny, tmp_path):
    torch.manual_seed(1)
    other = EDMPrecond(**TINY).state_dict()
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 5e-5, "betas": (0.9, 0.999)}]}
    checkpoint = {"model_g": released_state(tiny), "model_d": other, "optimizer_g": optimizer}
    for name in ("model.pt", "legacy.pt"):
        path = save(tmp_path / name, {**checkpoint, "epoch": 3})
        net = load_edm(path, TABLE)
        equal(net.state_dict(), tiny)
        assert net.metadata["role"] == "generator"
        assert net.metadata["sigma"] == karras_sigmas(1000)[-2] == pytest.approx(79.5638, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_dicts_in_half_precision(tiny, tmp_path, dtype):
    path = save(tmp_path / "half.pt", released_state(tiny, "", dtype))
    found = load_edm(path, TABLE).state_dict()
    for name, value in tiny.state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.to(dtype).float())


def test_safetensors(tiny, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, released_state(tiny), {})
    path.rename(tmp_path / "misnamed.pkl")
    net = load_edm(tmp_path / "misnamed.pkl", TABLE)
    equal(net.state_dict(), tiny)
    assert net.kwargs == TINY and net.metadata == {}


def test_a_header_as_long_as_a_pickles_first_byte(tmp_path):
    """Its length may end in 0x80, which opens every pickle."""
    for length in (0x80, 0x1280):
        path = tmp_path / "x.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
        assert edm_files.file_format(path) == "safetensors"


def test_our_own_files(tiny, tmp_path):
    path = tmp_path / "generator.safetensors"
    metadata = {"kwargs": json.dumps(tiny.kwargs), "role": "generator", "dataset": "mnist"}
    write_tensors(path, tiny.state_dict(), metadata)
    net = load_edm(path)  # TINY is not in the table
    equal(net.state_dict(), tiny)
    assert net.metadata == metadata and not net.training
    wrong = json.dumps({**tiny.kwargs, "sigma_data": "0.5"})
    for broken in ('{"img_resolution": 8}', "[1]", "{", "3", wrong):
        write_tensors(path, tiny.state_dict(), {**metadata, "kwargs": broken})
        refused(path)


def test_the_copies_do_not_depend_on_the_file(tiny, tmp_path):
    path = save(tmp_path / "model.pt", released_state(tiny))
    net = load_edm(path, TABLE)
    with open(path, "r+b") as file:  # torch.load maps the file, and this writes under the map
        file.write(bytes(path.stat().st_size))
    equal(net.state_dict(), tiny)


def test_state_dicts_that_fit_nothing(tiny, tmp_path):
    state = released_state(tiny)
    state["model.map_layer0.bias"] = torch.ones(3)
    state["model.extra"] = state.pop("model.map_layer1.bias")
    refused(
        save(tmp_path / "model.pt", state),
        "fits no known network; the nearest takes images (3, 8, 8) of 4 classes, beside which",
        "1 missing (model.map_layer1.bias)",
        "1 surplus (model.extra)",
        "1 misshapen (model.map_layer0.bias (3,) instead of (64,))",
    )
    state = released_state(tiny)
    state["model.enc.4x4_down.conv0.resample_filter"] = torch.ones(1, 1, 4, 4)
    refused(save(tmp_path / "model.pt", state), "NCSN++", "'-vp' file")
    for other in ([1, 2], {1: torch.ones(1)}, torch.ones(3)):
        refused(save(tmp_path / "model.pt", other), "damaged or of another kind")
    refused(save(tmp_path / "model.pt", {"weights": 3}), "something else than a tensor")
    refused(save(tmp_path / "model.pt", {}), "missing")
    with pytest.raises(UserError, match="does not say which network"):
        load_edm(save(tmp_path / "model.pt", released_state(tiny)))
    ints = {name: value.long() for name, value in tiny.state_dict().items()}
    refused(save(tmp_path / "model.pt", ints), "something else than a tensor")


@pytest.mark.parametrize("name", ["model.pt", "legacy.pt"])
def test_hostile_files_of_torch(tiny, tmp_path, marker, name):
    state = {**released_state(tiny), "evil": payload("posix.system", marker)}
    refused(save(tmp_path / name, state), "posix.system", "nothing was run")
    big = torch.zeros(1).expand(1 << 45)  # a shape that no memory holds, in a few bytes
    refused(save(tmp_path / name, {**released_state(tiny), "model.big": big}), "1 surplus")
    path = save(tmp_path / name, released_state(tiny))
    data = path.read_bytes()
    for length in (100, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:length])
        refused(path, "damaged")
