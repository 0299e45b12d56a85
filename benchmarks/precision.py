"""Measure the error of half precision in Stable Diffusion's UNet, and whether fp16 overflows there.

    python benchmarks/precision.py                         full size: 20 minutes on a CPU core
    python benchmarks/precision.py --width 32 --size 16    a small network, in seconds

One sample is computed in float32, in bf16 and in fp16. Half precision is used by autocast, as in G
and mu_fake, and then also for the weights, as in the teacher (SDTeacher.to). Errors are the root
mean square of the difference from float32:

    eps, t = 999        of the UNet without guidance, relative to eps
    x, t = 999          of the one-step sample (Eq. 11): sigma / alpha = 14.6 times that of eps
    mu_real, t = 979    of the guided teacher (scale 3) at the noisiest level of the KL gradient

The largest activation is taken over the inputs and outputs of all layers. The weights are PyTorch's
random initial ones. With them eps has a standard deviation of about 0.3, while a trained network's
is about 1. Therefore the errors of x and mu_real are also divided by the root mean square of eps:
they are the errors of latents with standard deviation 1. Random weights do not tell how large the
activations are with the released weights. On a CPU without fp16 instructions, a forward in fp16
takes minutes. The last line it prints:

    fp16 overflows at 65504
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from dmd_loss import T_MAX, T
from plumbing.devices import autocast, pick_device
from plumbing.files import write_json
from plumbing.options import Options, UserError, option, run_script
from sd_loader import SD15, SDTeacher, UNet, sd_noise_table

TEXT_WIDTH = SD15["unet"]["cross_attention_dim"]


@dataclass
class Config(Options):
    """What to measure."""

    width: int = option(320, "channels at the UNet's highest resolution, a multiple of 32", least=1)
    size: int = option(64, "height and width of the latents, a multiple of 8", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    json: str | None = option(None, "write the numbers to this file")

    def __post_init__(self):
        super().__post_init__()
        for name, unit in (("width", 32), ("size", 8)):
            if getattr(self, name) % unit:
                raise UserError(f"--{name} must be a multiple of {unit}")


def make_teacher(config: Config) -> SDTeacher:
    """A guided teacher, always with the same random weights. It has only the UNet and the text
    states of the empty prompt."""
    torch.manual_seed(0)
    widths = [config.width * factor for factor in (1, 2, 4, 4)]
    unet = UNet(SD15["unet"] | {"block_out_channels": widths, "sample_size": config.size})
    null_text, nothing = torch.randn(1, 77, TEXT_WIDTH), nn.Identity()
    parts = {"text_encoder": nothing, "vae": nothing, "tiny_vae": nothing}
    sd = SimpleNamespace(unet=unet, encode_text=lambda prompts: null_text, **parts)
    return SDTeacher(sd, {"name": "random weights"}, guidance=3.0)


@torch.no_grad()
def predict(config: Config, amp: str, half_weights: bool) -> tuple[Tensor, Tensor, float]:
    """Compute one sample -> eps at t = 999 and mu_real at t = 979, (1, 4, size, size) each, and the
    largest magnitude of any layer's input or output."""
    device, largest = pick_device(config.device), [0.0]

    def look(layer: nn.Module, inputs: tuple, output: Tensor):
        for x in (*inputs, output):
            largest[0] = max(largest[0], x.abs().max().item())

    teacher = make_teacher(config).to(device, amp if half_weights else "off")
    for layer in teacher.mu_real.modules():
        if not list(layer.children()):
            layer.register_forward_hook(look)
    x_t = torch.randn(1, *teacher.image_shape).to(device)
    text = torch.randn(1, 77, TEXT_WIDTH).to(device)
    t_G, t_kl = (torch.full((1,), t, device=device) for t in (T - 1, T_MAX - 1))
    with autocast(device, amp):
        eps = teacher.sd.unet(x_t, t_G, text)
        return eps, teacher.mu_real(x_t, t_kl, text), largest[0]


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


def main(config: Config) -> None:
    """Measure and print."""
    alpha, sigma = sd_noise_table()
    amplification = (sigma[T - 1] / alpha[T - 1]).item()  # 14.6
    eps, mu_real, largest = predict(config, "off", half_weights=False)
    found = {"off": {"eps_rms": rms(eps), "largest": largest}}

    print("| half precision | eps, t = 999 | x, t = 999 | mu_real, t = 979 | largest activation |")
    print("|---|---|---|---|---|")
    print(f"| off | 0 | 0 | 0 | {largest:.2f} |", flush=True)
    for amp, half_weights in itertools.product(("bf16", "fp16"), (False, True)):
        eps_half, mu_half, largest = predict(config, amp, half_weights)
        of_eps, of_mu = rms(eps_half - eps) / rms(eps), rms(mu_half - mu_real) / rms(eps)
        of_x = amplification * of_eps
        name = f"{amp}, weights too" if half_weights else amp
        found[name] = {"eps": of_eps, "x": of_x, "mu_real": of_mu, "largest": largest}
        print(f"| {name} | {of_eps:.3%} | {of_x:.4f} | {of_mu:.4f} | {largest:.2f} |", flush=True)
    if config.json is not None:
        write_json(Path(config.json), found)
    print(f"fp16 overflows at {torch.finfo(torch.float16).max:.0f}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
