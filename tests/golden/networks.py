"""The small networks of the golden vectors, with their parameters filled in by a rule."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from edm_unet import EDMPrecond
from sd_loader import NETWORKS, SD15, SDTeacher, StableDiffusion

GOLDEN = Path(__file__).parent
CONFIGS = json.loads((GOLDEN / "sd" / "configs.json").read_text())
RULES = {  # chirp, gain, spread
    "rule_a": (0, 0.5, 0), "rule_b": (0.013, 1.4, 0.001), "eps_probe": (0.013, 1.4, 0.001),
}  # fmt: skip
PARTS = {  # our name -> the golden files' names of config and of vectors
    "unet": ("unet", "unet"), "text_encoder": ("text_encoder", "text_encoder"),
    "vae": ("vae", "vae_decoder"), "tiny_vae": ("taesd", "taesd_decoder"),
}  # fmt: skip


def edm_fill(net, rule):
    """The parameters of EDM's golden networks: a function of each one's name and shape."""
    for name, parameter in net.named_parameters():
        module, leaf = name.split(".")[-2:]
        k = np.arange(parameter.numel(), dtype=np.int64)
        u = ((31 * k * k + 17 * k + zlib.crc32(name.encode()) % 1009) % 1009) / 504 - 1
        u = u.reshape(parameter.shape)
        if parameter.ndim > 1:
            u = 2 * u / np.sqrt(parameter.numel() / parameter.shape[0])
        else:
            u = 0.3 * u + (leaf == "weight" and "norm" in module)
        residual = module in ("conv0", "conv1", "proj") or module.endswith("x64_conv")
        residual |= module == "32x32_conv" or (module == "skip" and leaf == "bias")
        if rule == "eps" and residual:
            u = 0.01 * u
        parameter.data = torch.from_numpy(u).float()


def edm_network(name):
    """A golden network of EDM (song_int, song_eps, adm_int, adm_eps), what is said of it, and its
    vectors."""
    data = dict(np.load(GOLDEN / f"golden_{name}.npz"))
    meta = json.loads(str(data.pop("meta")))
    if "x" not in data:
        data["x"] = np.load(GOLDEN / meta["x_from"])["x"][slice(*meta["x_rows"])]
    net = EDMPrecond(**meta["kwargs"]).eval()
    edm_fill(net, meta["fill"] if isinstance(meta["fill"], str) else name.split("_")[1])
    return net, meta, {key: torch.from_numpy(value) for key, value in data.items()}


def edm_unet_inputs(data):
    """The inputs of the bare U-Net, for which `unet_output` holds: row 2 of the int files."""
    row = slice(2, 3) if len(data["x"]) == 5 else slice(1)
    return data["x"][row], torch.zeros(1), data["labels"][row]


def sd_fill(name, shape, rule):
    """The parameters of the Stable Diffusion networks: a function of name and shape, float64."""
    chirp, gain, spread = RULES[rule]
    h, numel = zlib.crc32(name.encode()), int(np.prod(shape))
    i = np.arange(numel, dtype=np.float64)
    w = 0.7 + spread * (h // 1000 % 997)
    s = np.sin(w * i + chirp * i * i + h % 1000).reshape(shape)
    if len(shape) > 1:
        value = s * gain / np.sqrt(numel / shape[0])
    else:
        value = 0.1 * s + name.endswith(".weight")
    damped = ["conv_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "to_out"]
    is_damped = name.endswith(".bias") or any(part in name for part in [*damped, "ff.net.2"])
    return 0.05 * value if rule == "eps_probe" and is_damped and "norm" not in name else value


def sd_network(part, rule="rule_b"):
    """A golden network of Stable Diffusion, one of PARTS."""
    net = NETWORKS[part](SD15[part] | CONFIGS[PARTS[part][0]]).eval()
    for name, parameter in net.named_parameters():
        parameter.data = torch.from_numpy(sd_fill(name, parameter.shape, rule)).float()
    return net


def sd_vectors(rule, vectors):
    """The vectors of a file of Stable Diffusion."""
    found = np.load(GOLDEN / "sd" / rule / f"{vectors}.npz")
    return {k: torch.from_numpy(v) for k, v in found.items()}


def sd_teacher():
    """A small Stable Diffusion of golden networks, whose prompts are "0", "1" and "2"."""
    nets = {part: sd_network(part).requires_grad_(part == "unet") for part in PARTS}
    ids = sd_vectors("rule_b", "text_encoder")["input_ids"]
    sd = StableDiffusion(tokenizer=lambda texts: ids[[int(k or 0) for k in texts]], **nets)
    return SDTeacher(sd, {}, guidance=3.0)


def relative_error(found, expected):
    """The largest error, relative to the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()
