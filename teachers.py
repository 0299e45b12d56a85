"""A pretrained diffusion model, as every script uses it, whether it is EDM's or Stable Diffusion.

teacher = load_teacher("imagenet64", None)        the released network, or the embedded one
teacher.mu_real(x_t, t, cond)                     the teacher of Eq. 4, guided (Section 3.4)
teacher.student()                                 what G and mu_fake start as: unguided
teacher.encode(labels or prompts) -> cond         what the networks take
teacher.solve(z, cond, steps) -> y                its ODE solution, for the pairs
teacher.decode(x) -> images                       in [-1, 1]; EDM's x are images already

G, metadata = load_generator("runs/mnist/generator.safetensors")
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmd_loss import OneStepGenerator
from edm_unet import SIGMA_MAX, EDMDenoiser, EDMPrecond, heun_sample
from plumbing.devices import DTYPES
from plumbing.edm_files import (
    fetch,
    file_format,
    load_edm,
    load_edm_with_metadata,
    one_line_errors,
    torch_load,
)
from plumbing.files import file_hash, read_header, read_json
from plumbing.options import UserError
from sd_loader import (
    TAESD_REPO,
    GuidedUNet,
    SDDenoiser,
    StableDiffusion,
    find_weights,
    load_network,
    load_sd,
    pndm_sample,
)
from workloads import ASSETS, MNIST_GENERATOR, WORKLOADS, Workload, get_workload

DECODERS = ("tiny", "full")


class EDMTeacher:
    """An EDM network: pixels, class labels or nothing as condition, Heun's solver.

    Attributes:
        mu_real: the teacher as a denoiser, frozen.
        record: {"name", "sha256"}, what a run or its pairs remember it by.
        image_shape: (C, H, W) of z, x and y.
    """

    def __init__(self, net: EDMPrecond, record: dict[str, str]):
        self.mu_real = EDMDenoiser(net).eval().requires_grad_(False)
        self.record = record
        self.image_shape = (net.img_channels, net.img_resolution, net.img_resolution)

    def to(self, device: torch.device, amp: str = "off") -> "EDMTeacher":
        """Move it to a device. (Its weights stay float32 under any `amp`: they are small.)"""
        self.mu_real.to(device, memory_format=torch.channels_last)
        return self

    def student(self) -> EDMDenoiser:
        """A trainable copy."""
        return copy.deepcopy(self.mu_real).requires_grad_(True)

    def encode(self, labels: Tensor | None) -> Tensor | None:
        """Labels (B,) long are the condition; None for an unconditional network."""
        return None if labels is None else labels.to(self.mu_real.sigma.device)

    def solve(self, z: Tensor, cond: Tensor | None, steps: int) -> Tensor:
        """EDM's Heun solver: z ~ N(0, I) (B, C, H, W) -> y (B, C, H, W)."""
        return heun_sample(self.mu_real.net, z, cond, steps)

    def evaluations(self, steps: int) -> int:
        """Network evaluations of `solve`."""
        return 2 * steps - 1

    def decode(self, x: Tensor) -> Tensor:
        """Samples are images already."""
        return x


class SDTeacher:
    """Stable Diffusion v1.x: latents, prompts as condition, guidance, PNDM solver.

    Attributes as for EDMTeacher; mu_real is None if the UNet was not loaded.

    Args:
        sd: what load_sd returned.
        guidance: scale of classifier-free guidance in mu_real and in `solve`; 1 is none.
        decoder: "tiny" or "full", whichever `decode` shall use.
        image_shape: of the latents, (4, 64, 64).
    """

    def __init__(
        self,
        sd: StableDiffusion,
        record: dict[str, str],
        guidance: float,
        decoder: str,
        image_shape: tuple[int, int, int],
    ):
        self.sd, self.record, self.decoder, self.image_shape = sd, record, decoder, image_shape
        self.mu_real = None
        if sd.unet is not None:
            guided = GuidedUNet(sd.unet, sd.encode_text([""]), guidance)
            self.mu_real = SDDenoiser(guided).eval().requires_grad_(False)

    def to(self, device: torch.device, amp: str = "off") -> "SDTeacher":
        """Move it to a device; under `amp` the UNet and the text encoder become half precision."""
        if self.mu_real is not None:
            self.mu_real.to(device, memory_format=torch.channels_last)
            self.mu_real.net.to(DTYPES[amp])  # not the noise table, which is mu_real's own
        self.sd.text_encoder.to(device, DTYPES[amp])
        for decoder in (self.sd.vae, self.sd.tiny_vae):
            if decoder is not None:
                decoder.to(device, memory_format=torch.channels_last)
        return self

    def student(self) -> SDDenoiser:
        """A trainable copy, without guidance; before `to` it is float32."""
        return SDDenoiser(copy.deepcopy(self.sd.unet)).eval().requires_grad_(True)

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> text states (B, 77, 768) float32."""
        return self.sd.encode_text(prompts).float()

    def solve(self, z: Tensor, cond: Tensor, steps: int) -> Tensor:
        """PNDM with guidance: z ~ N(0, I) (B, 4, H, W) -> latents y (B, 4, H, W)."""
        return pndm_sample(self.mu_real.net, z, cond, steps)

    def evaluations(self, steps: int) -> int:
        """Network evaluations of `solve`: PNDM's first step takes two, guidance doubles them."""
        return (steps + 1) * (1 if self.mu_real.net.scale == 1 else 2)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about [-1, 1], not clamped."""
        return self.sd.decode(x, tiny=self.decoder == "tiny")


Teacher = EDMTeacher | SDTeacher


def load_teacher(
    dataset: str,
    source: str | None,
    *,
    guidance: float | None = None,
    decoder: str = "tiny",
    tiny_source: str | None = None,
    parts: Sequence[str] = ("unet", "text_encoder"),
) -> Teacher:
    """The teacher of a workload, on the CPU.

    Args:
        dataset: a row of WORKLOADS.
        source: the weights. EDM: a file or an address that edm_files.fetch knows. sd15: a folder
            in the diffusers layout or a Hub repository. None for the workload's own, which is
            downloaded if it is not embedded.
        guidance: sd15's scale; None for the workload's.
        decoder: of sd15: "tiny" (TAESD) or "full" (the VAE).
        tiny_source: folder, file or repository of the tiny decoder; None for TAESD's.
        parts: of sd15: what to load beside the decoder; sampling does without the UNet.

    Raises:
        UserError: missing or unreadable files, or a network for other images.
    """
    workload = get_workload(dataset)
    if workload.latent:
        guidance = workload.guidance if guidance is None else guidance
        source = source or workload.teacher
        return load_sd_teacher(workload, source, guidance, decoder, tiny_source, parts)
    embedded = ASSETS / workload.teacher
    file = embedded if source is None and embedded.exists() else fetch(source or workload.teacher)
    net = load_edm(file)
    check_fits(dataset, net, file)
    return EDMTeacher(net, {"name": file.name, "sha256": file_hash(file)})


def load_sd_teacher(
    workload: Workload,
    source: str,
    guidance: float,
    decoder: str,
    tiny_source: str | None,
    parts: Sequence[str],
) -> SDTeacher:
    """load_teacher for Stable Diffusion.

    Raises:
        UserError: unknown decoder, missing or unreadable files.
    """
    if decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}; known: {', '.join(DECODERS)}")
    full = ("vae",) if decoder == "full" else ()
    tiny = (tiny_source or TAESD_REPO) if decoder == "tiny" else None
    sd = load_sd(source, (*parts, *full), tiny_source=tiny)
    record, image_shape = {"name": str(source)}, workload.image_shape
    if sd.unet is not None:
        record["sha256"] = file_hash(find_weights("unet", source)[0])
        image_shape = latent_shape(sd.unet.config)
    return SDTeacher(sd, record, guidance, decoder, image_shape)


def latent_shape(config: dict) -> tuple[int, int, int]:
    """(4, 64, 64), from a UNet's config."""
    size = config.get("sample_size", 64)
    return (config["in_channels"], size, size)


# --------------------------------------------------------------------------------------------------
# Generators


def load_generator(source: str | Path) -> tuple[OneStepGenerator, dict[str, str]]:
    """G_theta from a run's generator.safetensors, and the file's metadata (its dataset, step, ...).

    Also from others' EDM checkpoints (see edm_files.read_edm_state), whose dataset is told by the
    network's shape, and from UNets of Stable Diffusion v1.x under diffusers' names.

    Args:
        source: a file, or an address that edm_files.fetch knows.

    Raises:
        UserError: missing or unreadable file, or one that holds no generator.
    """
    path = fetch(str(source))
    if is_sd_unet(path):
        return load_sd_generator(path)
    net, metadata = load_edm_with_metadata(path)
    if "kwargs" not in metadata:  # not a file of ours
        metadata = {"role": "generator", "dataset": dataset_of(net)} | metadata
    check_role(metadata, path)
    check_fits(metadata["dataset"], net, path)
    return OneStepGenerator(EDMDenoiser(net, metadata.get("sigma", SIGMA_MAX))), metadata


def load_sd_generator(path: Path) -> tuple[OneStepGenerator, dict[str, str]]:
    """load_generator for a UNet of Stable Diffusion v1.x."""
    metadata = read_header(path)[1] if file_format(path) == "safetensors" else {}
    beside, config = path.with_name("config.json"), None  # None: SD v1.5's
    if "kwargs" in metadata:
        config = json.loads(metadata["kwargs"])
    elif beside.exists() and "block_out_channels" in (found := read_json(beside)):
        config = found  # the file lies in a folder of diffusers'
    net = load_network("unet", path, config=config).requires_grad_(False)
    metadata = {"role": "generator", "dataset": "sd15"} | metadata
    check_role(metadata, path)
    return OneStepGenerator(SDDenoiser(net).eval()), metadata


def is_sd_unet(path: Path) -> bool:
    """Whether a file of weights holds a UNet under diffusers' names."""
    kind = file_format(path)
    if kind == "pickle":  # NVIDIA's
        return False
    with one_line_errors(path):
        names = read_header(path)[0] if kind == "safetensors" else torch_load(path)
    return isinstance(names, list | dict) and "down_blocks.0.resnets.0.conv1.weight" in names


def check_role(metadata: dict, path: Path) -> None:
    """Raise UserError unless the file is a generator of a known dataset."""
    if metadata.get("role") != "generator" or metadata.get("dataset") not in WORKLOADS:
        raise UserError(f"{path} is not a one-step generator; use a generator.safetensors of a run")


def dataset_of(net: EDMPrecond) -> str | None:
    """The workload for whose images and classes a network is made, None if there is none."""
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    fitting = ((w.image_shape, w.num_classes) == (shape, net.label_dim) for w in WORKLOADS.values())
    return next((name for name, fits in zip(WORKLOADS, fitting, strict=True) if fits), None)


def check_fits(dataset: str, net: EDMPrecond, path: Path) -> None:
    """Raise UserError unless the network takes the dataset's images and labels."""
    if dataset_of(net) != dataset:
        workload = get_workload(dataset)
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        raise UserError(
            f"{path} is a network for images {shape} with {net.label_dim} classes, but {dataset} "
            f"has {workload.image_shape} with {workload.num_classes}; choose the right file"
        )


def check_teaches(teacher: EDMTeacher | SDTeacher, metadata: dict, path: Path) -> None:
    """Raise UserError if a generator's file says that it was distilled from another teacher."""
    if metadata.get("teacher_sha256", teacher.record["sha256"]) != teacher.record["sha256"]:
        raise UserError(
            f"{path} was distilled from another teacher than {teacher.record['name']}; "
            "give its file with --teacher-weights"
        )


def find_generator(given: str | None) -> Path:
    """The generator to use: the one given, else the newest run's, else the shipped one (and says
    which).

    Args:
        given: a run folder, a generator's file, or an address that edm_files.fetch knows.

    Raises:
        UserError: nothing is to be had there.
    """
    if given:
        folder = Path(given)
        return folder / "generator.safetensors" if folder.is_dir() else fetch(given)
    runs = sorted(Path("runs").glob("*/generator.safetensors"), key=lambda p: p.stat().st_mtime)
    if runs:
        return runs[-1]
    print("no run in runs/: using the shipped MNIST generator")
    return MNIST_GENERATOR
