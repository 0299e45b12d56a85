"""A pretrained diffusion model as every script uses it, and the file of a generator.

load_teacher returns an EDMTeacher or an sd_loader.SDTeacher. Both are used in the same way:

    mu_real(x_t, t, cond)    the frozen denoiser of Eq. 4, with guidance (Section 3.4)
    student()                a trainable copy without guidance, the start of G and mu_fake
    encode(given)            labels or prompts -> cond, the condition that the networks take
    solve(z, cond, steps)    noise z ~ N(0, I) (B, C, H, W) -> y, the ODE's solution, for the pairs
    evaluations(steps)       how many times `solve` evaluates the network
    decode(x)                -> images, about [-1, 1]; EDM's x are images already
    to(device, amp)          moves it to a device -> the teacher itself
    record                   {"name", "sha256"}, identifies the teacher of a run and of pairs
    image_shape              (C, H, W) of z, x and y
    num_classes              0 if the teacher is unconditional or takes text
    sigma_data               standard deviation of the data, for dmd_loss.denoising_weight, or None
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dmd_loss import OneStepGenerator
from edm_unet import SIGMA_MAX, EDMDenoiser, EDMPrecond, heun_sample
from plumbing.devices import to
from plumbing.downloads import fetch, in_home
from plumbing.edm_files import file_format, load_edm
from plumbing.files import file_hash, one_line_errors, read_header, torch_load
from plumbing.options import UserError
from workloads import ASSETS, WORKLOADS, Workload, get_workload

# The networks that a bare state dict may hold. Its names and shapes tell which.
ARCHITECTURES = [row.network for row in WORKLOADS.values() if row.network and not row.latent]


class EDMTeacher:
    """An EDM network: pixels, class labels or no condition, Heun's solver."""

    def __init__(self, net: EDMPrecond, record: dict[str, str]):
        self.mu_real = EDMDenoiser(net).eval().requires_grad_(False)
        self.record, self.sigma_data = record, net.sigma_data
        self.image_shape, self.num_classes = net.image_shape, net.label_dim

    def to(self, device: torch.device, amp: str = "off") -> "EDMTeacher":
        """Move it to a device. Its weights are small and stay float32 under any `amp`."""
        self.mu_real.to(device, memory_format=torch.channels_last)
        return self

    def student(self) -> EDMDenoiser:
        """A trainable copy."""
        return copy.deepcopy(self.mu_real).requires_grad_(True)

    def encode(self, labels: Tensor | None) -> Tensor | None:
        """Labels (B,) long, on the network's device; None for an unconditional network."""
        return to(self.mu_real.sigma.device, labels)[0]

    def solve(self, z: Tensor, cond: Tensor | None, steps: int) -> Tensor:
        """Heun's solver, EDM's Algorithm 1: z ~ N(0, I) -> y, (B, C, H, W)."""
        return heun_sample(self.mu_real.net, z, cond, steps)

    def evaluations(self, steps: int) -> int:
        """The number of network evaluations in `solve`: two per step, but one in the last."""
        return 2 * steps - 1

    def decode(self, x: Tensor, decoder: str | None = None) -> Tensor:
        """Return x, which holds images already."""
        return x


Teacher = EDMTeacher  # or sd_loader.SDTeacher, which is not imported here


def load_teacher(workload: Workload, with_unet: bool = True) -> Teacher:
    """Load the teacher of a workload on the CPU. It is downloaded unless it is a local file.
    with_unet=False loads only sd15's text encoder and a decoder, enough to sample from G."""
    if workload.latent:
        from sd_loader import load_sd_teacher  # here: MNIST and EDM need none of it

        decoders = (workload.decoder, *(values.get("decoder") for _, values in workload.phases))
        return load_sd_teacher(workload.teacher, workload.guidance, decoders, with_unet)
    if not workload.teacher:
        raise UserError("no network is given; add --teacher FILE or --teacher-weights FILE")
    path = fetch(workload.teacher)
    net = load_edm(path, ARCHITECTURES)
    found, wanted = (images_of(network) for network in (net.kwargs, workload.network or net.kwargs))
    if found != wanted:
        what = f"{path} makes {found}, but {workload.dataset} needs {wanted}"
        raise UserError(f"{what}; use --dataset edm for a network of your own")
    return EDMTeacher(net, {"name": path.name, "sha256": file_hash(path)})


def images_of(network: dict) -> str:
    """What a network with these arguments makes, for example "1x28x28 images of 10 classes"."""
    shape = "{img_channels}x{img_resolution}x{img_resolution}"
    return f"{shape} images of {{label_dim}} classes".format(**network)


def load_lpips(device: torch.device) -> Callable:
    """The frozen network for dmd_loss.lpips_distance."""
    import lpips  # here: slow to import, and L2 needs none of it

    # The package adds eps outside the square root, whose gradient is infinite where features are 0.
    lpips.normalize_tensor = lambda x: x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt()
    path = in_home(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    url = f"https://download.pytorch.org/models/{path.name}"
    with one_line_errors(path, f"cannot be loaded; put {url} there, or use --distance l2"):
        network = lpips.LPIPS(net="vgg", verbose=False)
    return network.eval().requires_grad_(False).to(device)


def generator_file(
    G: OneStepGenerator, workload: Workload, record: dict[str, str], step: int
) -> tuple[dict[str, Tensor], dict]:
    """What a run's generator.safetensors holds: tensors under the teacher's names, and metadata."""
    net, teacher, by_default = G.mu.net, workload.teacher, WORKLOADS[workload.dataset].teacher
    named = teacher.isprintable() and (workload.latent or teacher != by_default)
    teacher = str(Path(teacher).resolve()) if Path(teacher).exists() else teacher
    return net.state_dict(), ({"teacher": teacher} if named else {}) | {
        "role": "generator",
        "guidance": workload.guidance,
        "dataset": workload.dataset,
        "kwargs": json.dumps(net.config if workload.latent else net.kwargs),
        "teacher_sha256": record["sha256"],
        "step": str(step),
    }


def load_generator(path: Path) -> tuple[OneStepGenerator, dict]:
    """Load G_theta and its metadata (dataset, step, ...) from a run's generator.safetensors, from
    another EDM checkpoint (the shape of the images tells the dataset), or from a Stable Diffusion
    v1.x UNet under diffusers' names."""
    if latent := is_sd_unet(path):
        from sd_loader import SDDenoiser, load_network

        with one_line_errors(path):
            metadata = read_header(path)[1] if file_format(path) == "safetensors" else {}
            # None: the config.json beside it, or else SD v1.5's.
            config = json.loads(metadata.get("kwargs", "null"))
        net = load_network("unet", path, config).requires_grad_(False)
        metadata = {"role": "generator", "dataset": "sd15"} | metadata
    else:
        net = load_edm(path, ARCHITECTURES)
        metadata = net.metadata
        if "kwargs" not in metadata:  # not one of this project's files
            images, rows = images_of(net.kwargs), WORKLOADS.items()
            fitting = (n for n, row in rows if row.network and images_of(row.network) == images)
            metadata = {"role": "generator", "dataset": next(fitting, "edm")} | metadata
    with one_line_errors(path):
        for name, value in metadata.items():
            number = name in ("guidance", "sigma")
            if not (0 < value < 1e6 if number else value.isprintable()):
                raise UserError(f"its {name} cannot be {value!r}; make it again")
    mu = SDDenoiser(net) if latent else EDMDenoiser(net, metadata.get("sigma", SIGMA_MAX))
    possible = [name for name, row in WORKLOADS.items() if row.latent == latent]
    if metadata.get("role") != "generator" or metadata.get("dataset") not in possible:
        raise UserError(f"{path} is not a one-step generator; use a run's generator.safetensors")
    return OneStepGenerator(mu).eval(), metadata


def is_sd_unet(path: Path) -> bool:
    """Whether a file holds the weights of a UNet under diffusers' names."""
    if (kind := file_format(path)) == "pickle":  # NVIDIA's
        return False
    with one_line_errors(path):
        names = read_header(path)[0] if kind == "safetensors" else torch_load(path)
        return any(name.endswith("down_blocks.0.resnets.0.conv1.weight") for name in names)


def workload_of(metadata: dict, with_teacher: bool, **given) -> Workload:
    """A generator's workload with the given values that are not None. If a teacher will be loaded
    (for sd15, always), its file and guidance default to those in the metadata."""
    if with_teacher or WORKLOADS[metadata["dataset"]].latent:
        for name in ("teacher", "guidance"):
            given[name] = given[name] or metadata.get(name)
        if (file := Path(given["teacher"] or "")).is_absolute() and not file.exists():
            raise UserError(f"the teacher, {file}, is not there; give --teacher-weights")
    return get_workload(metadata["dataset"], **given)


def origin(path: Path, metadata: dict, workload: Workload, record: dict, chosen: bool) -> str:
    """A generator's file and step, as printed. The teacher in `record` ({}: none is loaded) must be
    the one that the generator was distilled from, by the hash of its network or else by its name.
    If it is another one that the user chose, the printed text says so."""
    name, used = record.get("name"), record.get("sha256")
    taught = metadata.get("teacher_sha256" if used else "teacher")
    text = f"{path} (step {metadata.get('step', '?')})"
    if workload.latent:
        learnt = metadata.get("guidance", "unknown")
        text += f", guidance {learnt}, text encoder and decoder of {workload.teacher}"
    if name and taught not in (None, used or name, used or str(Path(name).resolve())):
        what = f"distilled from another teacher than {name}: {taught}"
        if not chosen:
            raise UserError(f"{path} was {what}; give its file with --teacher-weights")
        text += f", {what}"
    return text


def find_generator(given: str | None) -> Path:
    """The file of the given generator (a run folder, a file or an address, see downloads.fetch). By
    default, that of the newest run or, with a printed note, the shipped one."""
    if given:
        folder = Path(given)
        return folder / "generator.safetensors" if folder.is_dir() else fetch(given)
    runs = sorted(Path("runs").glob("*/generator.safetensors"), key=lambda p: p.stat().st_mtime)
    if runs:
        return runs[-1]
    print("no run in runs/: using the shipped MNIST generator")
    return ASSETS / "mnist_generator.safetensors"
