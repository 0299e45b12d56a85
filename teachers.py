"""A pretrained diffusion model, as every script uses it, whether it is EDM's or Stable Diffusion.

    teacher = load_teacher(get_workload("imagenet64"))
    teacher.mu_real(x_t, t, cond)                the teacher of Eq. 4, guided (Section 3.4)
    teacher.student()                            what G and mu_fake start as: unguided
    teacher.encode(labels or prompts) -> cond    what the networks take
    teacher.solve(z, cond, steps) -> y           its ODE solution, for the pairs
    teacher.decode(x) -> images                  in [-1, 1]; EDM's x are images already

and a generator's file: generator_file is what a run writes, load_generator reads it, and others'.
"""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dmd_loss import OneStepGenerator
from edm_unet import SIGMA_MAX, EDMDenoiser, EDMPrecond, heun_sample
from plumbing.downloads import fetch
from plumbing.edm_files import file_format, load_edm
from plumbing.files import file_hash, one_line, one_line_errors, read_header, torch_load
from plumbing.options import UserError
from workloads import ASSETS, WORKLOADS, Workload

# What a bare state dict may be: it is recognised by its names and shapes.
ARCHITECTURES = [row.network for row in WORKLOADS.values() if row.network and not row.latent]


class EDMTeacher:
    """An EDM network: pixels, class labels or nothing as condition, Heun's solver.

    Attributes:
        mu_real: the teacher as a denoiser, frozen.
        record: {"name", "sha256"}, what a run or its pairs remember it by.
        sigma_data: of the weight with which the model was trained, see dmd_loss.denoising_weight.
        image_shape: (C, H, W) of z, x and y.
        num_classes: 0: unconditional, or conditioned on text.
    """

    def __init__(self, net: EDMPrecond, record: dict[str, str]):
        self.mu_real = EDMDenoiser(net).eval().requires_grad_(False)
        self.record, self.sigma_data = record, net.sigma_data
        self.image_shape, self.num_classes = net.image_shape, net.label_dim

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

    def decode(self, x: Tensor, decoder: str | None = None) -> Tensor:
        """Samples are images already."""
        return x


Teacher = EDMTeacher  # or sd_loader.SDTeacher, which is used in the same way


def load_teacher(workload: Workload, with_unet: bool = True) -> Teacher:
    """The teacher of a workload, on the CPU; downloaded if it is neither embedded nor a file.

    with_unet: G does without that of sd15's teacher; it needs the text encoder and a decoder.
    """
    source = workload.teacher
    if workload.latent:
        from sd_loader import load_sd_teacher  # here, because MNIST and EDM do without it

        decoders = (workload.decoder, *(values.get("decoder") for _, values in workload.phases))
        return load_sd_teacher(source, workload.guidance, decoders, with_unet)
    if not source:
        raise UserError("give the file of your network: --teacher FILE, or --teacher-weights FILE")
    path = fetch(source)
    net = load_edm(path, ARCHITECTURES)
    found, wanted = (images_of(network) for network in (net.kwargs, workload.network or net.kwargs))
    if found != wanted:
        what = f"{path} makes {found}, but {workload.dataset} is {wanted}"
        raise UserError(f"{what}; any network may be distilled with --dataset edm")
    return EDMTeacher(net, {"name": path.name, "sha256": file_hash(path)})


def images_of(network: dict) -> str:
    """What a network of these arguments makes, such as "1x28x28 images of 10 classes"."""
    shape = "{img_channels}x{img_resolution}x{img_resolution}"
    return f"{shape} images of {{label_dim}} classes".format(**network)


def load_lpips(device: torch.device) -> Callable:
    """The frozen network of dmd_loss.lpips_distance."""
    from lpips import LPIPS  # slow to import, and not needed for L2

    try:
        return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"LPIPS needs VGG-16's weights ({one_line(error)}): put "
            "https://download.pytorch.org/models/vgg16-397923af.pth into "
            f"{torch.hub.get_dir()}/checkpoints, or use --distance l2"
        ) from None


# --------------------------------------------------------------------------------------------------
# Generators


def generator_file(
    G: OneStepGenerator, workload: Workload, record: dict[str, str], step: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What generator.safetensors holds: tensors under the released files' names, and metadata."""
    net = G.mu.net
    return net.state_dict(), {
        "role": "generator",
        "dataset": workload.dataset,
        "kwargs": json.dumps(net.config if workload.latent else net.kwargs),
        "teacher_sha256": record["sha256"],
        "step": str(step),
    }


def load_generator(path: Path) -> tuple[OneStepGenerator, dict[str, str]]:
    """G_theta from a run's generator.safetensors, and the file's metadata (its dataset, step, ...).
    Also from others' EDM checkpoints, whose dataset is told by the network's images, and from UNets
    of Stable Diffusion v1.x under diffusers' names."""
    if is_sd_unet(path):
        from sd_loader import SDDenoiser, load_network

        metadata = read_header(path)[1] if file_format(path) == "safetensors" else {}
        config = json.loads(metadata.get("kwargs", "null"))  # None: as beside, or SD v1.5's
        mu = SDDenoiser(load_network("unet", path, config).requires_grad_(False))
        metadata = {"role": "generator", "dataset": "sd15"} | metadata
    else:
        net = load_edm(path, ARCHITECTURES)
        metadata = net.metadata
        if "kwargs" not in metadata:  # not a file of ours
            images, rows = images_of(net.kwargs), WORKLOADS.items()
            fitting = (n for n, row in rows if row.network and images_of(row.network) == images)
            metadata = {"role": "generator", "dataset": next(fitting, "edm")} | metadata
        mu = EDMDenoiser(net, metadata.get("sigma", SIGMA_MAX))
    if metadata.get("role") != "generator" or metadata.get("dataset") not in WORKLOADS:
        raise UserError(f"{path} is not a one-step generator; use a generator.safetensors of a run")
    return OneStepGenerator(mu).eval(), metadata


def is_sd_unet(path: Path) -> bool:
    """Whether a file of weights holds a UNet under diffusers' names."""
    kind = file_format(path)
    if kind == "pickle":  # NVIDIA's
        return False
    with one_line_errors(path):
        names = read_header(path)[0] if kind == "safetensors" else torch_load(path)
        return "down_blocks.0.resnets.0.conv1.weight" in names


def check_teaches(teacher: Teacher, metadata: dict, path: Path) -> None:
    """Raise UserError if a generator's file says that it was distilled from another teacher."""
    if metadata.get("teacher_sha256", teacher.record["sha256"]) != teacher.record["sha256"]:
        raise UserError(
            f"{path} was distilled from another teacher than {teacher.record['name']}; "
            "give its file with --teacher-weights"
        )


def find_generator(given: str | None) -> Path:
    """The generator to use: the one given (a run folder, a file, or an address that downloads.fetch
    knows), else the newest run's, else the shipped one (and says so)."""
    if given:
        folder = Path(given)
        return folder / "generator.safetensors" if folder.is_dir() else fetch(given)
    runs = sorted(Path("runs").glob("*/generator.safetensors"), key=lambda p: p.stat().st_mtime)
    if runs:
        return runs[-1]
    print("no run in runs/: using the shipped MNIST generator")
    return ASSETS / "mnist_generator.safetensors"
