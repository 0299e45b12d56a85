"""Is your device right? Compare it with the CPU in float32, and measure its speed.

    python benchmarks/check_device.py                  the GPU if there is one, else the CPU

It prints a table of relative errors, and exits with code 1 if a limit is broken:

    networks     the golden ones (tests/golden) in each precision, of which the worse layout is
                 shown, and compiled; against the golden outputs
    gradients    of G and mu_fake in one training step, against the CPU's
    fp16         twenty steps from a loss scale that is far too large
    runs         one that is stopped and resumed, and two ranks, against a straight one
    LPIPS        in float32, and in TF32 as training with half precision uses it
    speed        a step over its floor, and the peak of memory (see step.py), without limits

All weights are in the repository or random. A CPU compiles one network and times MNIST alone. A
check that raises an error has one row, and its traceback is printed. The last line it prints:

    all 57 limits hold (85 s)
"""

import contextlib
import gc
import io
import itertools
import math
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from golden.networks import PARTS, edm_network, edm_unet_inputs, sd_teacher, sd_vectors

import make_pairs
import train
from benchmarks import step
from benchmarks.memory import peak
from dmd_loss import l2_distance, lpips_distance
from plumbing.devices import Ranks, autocast, pick_amp, pick_device, to
from plumbing.files import torch_load
from plumbing.options import Options, one_line, option, run_script
from teachers import EDMTeacher, Teacher, load_lpips, load_teacher
from workloads import get_workload

UNIT = {"bf16": 2**-8, "fp16": 2**-11}  # the largest error of one rounding
# The networks round a hundred times, but most errors cancel: on a CPU they are up to 3 units. In
# float32, where only the order of summation differs, they are 1e-6 there. A GPU's convolutions may
# round more often, but not as TF32, which rounds like fp16.
LIMIT = {"off": 5e-5} | {amp: 5 * unit for amp, unit in UNIT.items()}
# With a smaller error, a network was not in half precision at all, or not in this one.
LEAST = {"off": 0.0} | {amp: unit / 4 for amp, unit in UNIT.items()}
# A gradient comes from three networks and goes back through one: on a CPU, up to 6 units. Some of
# it does not depend on half precision, so that it may also be better than a network.
MORE = 4
# Of the way from the teacher's weights: 5e-5 on a CPU. It is more than an error of the gradients,
# because AdamW magnifies small ones. Other samples make it more than a tenth.
OF_RUNS = 0.01
# Distance and gradient. The gradient depends on ReLUs and maxima that are almost ties, and so its
# error is large: on a CPU, 2e-3 against float64, and 3e-2 if the convolutions round as TF32.
OF_LPIPS = {"float32": (LIMIT["off"], 0.01), "TF32": (LIMIT["fp16"], 0.1)}
SCALE = 2.0**28  # of the loss in fp16, 2^12 times the usual one
START = "spawn"  # of the two ranks: a process that uses a GPU cannot be forked


class Row(NamedTuple):
    """A row of the table. Without a limit, it is only to look at."""

    name: str
    error: float | str  # or a remark
    limit: float | None = None
    least: float = 0.0

    def broken(self) -> bool:
        """Whether there is a limit and the error is not within it. NaN and remarks are not."""
        if self.limit is None or isinstance(self.error, str):
            return self.limit is not None
        return not self.least <= self.error <= self.limit

    def __str__(self) -> str:
        error = self.error if isinstance(self.error, str) else f"{self.error:.2g}"
        limit = "" if self.limit is None else f"{self.limit:.2g}"
        limit = f"{self.least:.2g} to {limit}" if self.least else limit
        return f"| {self.name} | {error} | {limit}{' BROKEN' if self.broken() else ''} |"


@dataclass
class Config(Options):
    """Which device."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def precisions(device: torch.device) -> list[str]:
    """The values of --amp that the device does not emulate."""
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return ["off", *["bf16"] * bf16, "fp16"]


def flat(tensors) -> Tensor:
    """The numbers of all these tensors in a row, on the CPU in float64."""
    return torch.cat([x.detach().flatten().double().cpu() for x in tensors])


def distance(found: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    """The L2 distance, divided by that of `expected` to the origin; instead of NaN, infinity."""
    found, expected = flat([found]), flat([expected])
    error = (found - expected).norm() / (expected - origin).norm()
    return math.inf if error.isnan() else error.item()


# --------------------------------------------------------------------------------------------------
# Networks


def golden_networks(device: torch.device, amp: str) -> Iterator[tuple]:
    """The networks as training has them: name, network, precision of autocast, inputs, output. Of
    EDM's, the bare U-Nets, where sigma's c_skip cannot hide an error."""
    names = {"song_int": "DDPM++", "song_eps": "DDPM++, small activations"}
    names |= {"adm_int": "ADM", "adm_eps": "ADM, small activations"}
    for file, name in names.items():
        net, _, data = edm_network(file)
        unet = EDMTeacher(net, {}).to(device, amp).mu_real.net.model
        yield name, unet, amp, edm_unet_inputs(data), data["unet_output"]
    of_unet, text, vae, tiny = (sd_vectors("rule_b", vectors) for _, vectors in PARTS.values())
    teacher, inputs = sd_teacher(), (of_unet["x"], of_unet["t"], of_unet["context"])
    student, sd = teacher.student().to(device), teacher.to(device, amp).sd
    yield "UNet", student.net, amp, inputs, of_unet["eps"]
    yield "frozen UNet", sd.unet, amp, inputs, of_unet["eps"]
    yield "text encoder", sd.text_encoder, "off", [text["input_ids"]], text["last_hidden_state"]
    yield "VAE's decoder", sd.vae, amp, [vae["latent"]], vae["image"]
    yield "tiny decoder", sd.tiny_vae, amp, [tiny["latent"]], tiny["image"]


def error_of(net: nn.Module, layout: torch.memory_format, cast: str, inputs, expected) -> float:
    """The network's error in a layout, under autocast."""
    device = next(net.to(memory_format=layout).parameters()).device
    x, *rest = to(device, *inputs)
    with autocast(device, cast):
        found = net(x.contiguous(memory_format=layout) if x.ndim == 4 else x, *rest)
    return distance(found, expected)


@torch.no_grad()
def networks(device: torch.device) -> Iterator[Row]:
    """All golden networks in all precisions."""
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    for amp in precisions(device):
        for name, net, *case in golden_networks(device, amp):
            errors = {how: error_of(net, layout, *case) for how, layout in layouts.items()}
            how = max(errors, key=errors.get)
            if errors[low := min(errors, key=errors.get)] < LEAST[amp]:
                how = low
            yield Row(f"{name}, {amp}, {how}", errors[how], LIMIT[amp], LEAST[amp])


@torch.no_grad()
def compiled(device: torch.device) -> Iterator[Row]:
    """Those that training compiles. That takes long, so the large ones are in the precision that
    training has on a GPU."""
    halves = {"ADM": pick_amp("auto", device, "bf16"), "UNet": pick_amp("auto", device, "fp16")}
    small = "DDPM++" if device.type == "cuda" else "tiny decoder"
    for amp in precisions(device) if device.type == "cuda" else ["off"]:
        for name, net, *case in golden_networks(device, amp):
            if name == small or (device.type == "cuda" and halves.get(name) == amp):
                torch._dynamo.reset()  # after some networks it would give up without a word
                net.compile()
                error = error_of(net, torch.channels_last, *case)
                yield Row(f"{name}, {amp}, compiled", error, LIMIT[amp], LEAST[amp])


# --------------------------------------------------------------------------------------------------
# Training steps


class RandomPairs:
    """Eight pairs of random numbers, which a step uses as plumbing.pairs.Pairs."""

    def __init__(self, teacher: Teacher):
        draws = torch.Generator().manual_seed(0)
        self.z, self.y = torch.randn(2, 8, *teacher.image_shape, generator=draws)
        self.text = not teacher.num_classes

    def __len__(self) -> int:
        return len(self.z)

    def prompts(self, indices: list[int]) -> list[str]:
        return [str(k % 3) for k in indices]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor | list[str]]:
        cond = self.prompts(indices) if self.text else torch.tensor(indices)
        return self.z[indices], self.y[indices], cond


def prepare(ranks: Ranks, dataset: str, **options) -> train.Run:
    """train.py's Run of mnist or of the small sd15, two unpaired and two paired samples a step."""
    options = {"batch_size": 2, "batch_size_ref": 2, "amp": "off", **options}
    config = replace(get_workload(dataset, **options), warmup=0)
    teacher = sd_teacher() if config.latent else load_teacher(config)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(n) for n in numbers]
    run = train.prepare(ranks, config, teacher, RandomPairs(teacher), l2_distance)
    for number, handler in zip(numbers, handlers, strict=True):  # Ctrl-C ends the check
        signal.signal(number, handler)
    return run


@torch.no_grad()
def shake(network: nn.Module) -> None:
    """Change all weights by about a third: at first mu_fake is mu_real, and their difference 0."""
    draws = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p *= 1 + 0.3 * torch.randn(p.shape, generator=draws).to(p.device)


def gradients_of(device: torch.device, dataset: str, amp: str, accumulate: int) -> list[tuple]:
    """The norms and directions of the gradients of G and mu_fake in a step that changes nothing.
    With beta1 = 0, AdamW's first moment is the gradient, clipped."""
    options = {"amp": amp, "accumulate": accumulate, "beta1": 0.0, "learning_rate": 0.0}
    run = prepare(Ranks(0, 1, device), dataset, **options)
    shake(run.mu_fake.network)
    for _ in range(16):  # in fp16, until no gradient overflows
        norms = torch.stack(train.training_step(run, 0)[3:])
        if norms.isfinite().all():
            break
    found = []
    for learner, norm in zip((run.G, run.mu_fake), norms.tolist(), strict=True):
        moment = flat(learner.optimizer.state[p]["exp_avg"] for p in learner.parameters)
        found.append((norm, moment / moment.norm()))
    return found


def gradients(device: torch.device, datasets: tuple = ("mnist", "sd15")) -> Iterator[Row]:
    """The two gradients of a step, whose batch comes in one part or in two."""
    for dataset in datasets:
        reference = (torch.device("cpu"), dataset, "off", 1)
        cpu = gradients_of(*reference)
        for amp, parts in itertools.product(precisions(device), (1, 2)):
            if (device, dataset, amp, parts) == reference:
                continue
            found = gradients_of(device, dataset, amp, parts)
            for who, (norm, g), (norm_cpu, g_cpu) in zip(("G", "mu_fake"), found, cpu, strict=True):
                ratio, angle = norm / norm_cpu, 1 - (g @ g_cpu).item()
                name = f"gradient of {who}, {dataset}, {amp}, --accumulate {parts}: "
                name += f"norm x {ratio:.4f}, 1 - cosine {angle:.0e}"
                error = distance(ratio * g, g_cpu)
                yield Row(name, error, MORE * LIMIT[amp], LEAST[amp] / MORE)


def loss_scaling(device: torch.device, steps: int = 20) -> Iterator[Row]:
    """fp16 steps on the same batch, of which those that overflow are skipped."""
    run = prepare(Ranks(0, 1, device), "mnist", amp="fp16", learning_rate=1e-3)
    learners, losses, moved = {"G": run.G, "mu_fake": run.mu_fake}, [], [0.0]
    for learner in learners.values():
        learner.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    for _ in range(steps):
        before = [flat(learner.parameters) for learner in learners.values()]
        _, loss, _, *norms = torch.stack(train.training_step(run, 0)).tolist()
        losses.append(loss)
        for learner, norm, weights in zip(learners.values(), norms, before, strict=True):
            if not math.isfinite(norm):  # the step was skipped
                moved.append(distance(flat(learner.parameters), weights))
    for who, learner in learners.items():
        scale = learner.scaler.get_scale() / SCALE  # some steps were skipped, not all
        yield Row(f"fp16, loss scale of {who}, last over first", scale, 1 / 2, 2.0 ** (2 - steps))
    yield Row("fp16, change of the weights in a skipped step", max(moved), 0)
    yield Row("fp16, regression loss, last over first", losses[-1] / losses[0], 0.99)


# --------------------------------------------------------------------------------------------------
# Runs


def start_weights() -> Tensor:
    """Where the weights of G and mu_fake start."""
    return flat(load_teacher(get_workload()).mu_real.parameters()).repeat(2)


def resuming(device: torch.device, **options) -> Iterator[Row]:
    """train.py, with pairs of make_pairs.py, without and with a stop after two of four steps."""
    weights, printed, options = [], io.StringIO(), {"device": str(device), **options}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        options["pairs"] = str(Path(folder, "pairs"))
        make_pairs.main(get_workload(num_pairs=8, solver_steps=4, **options))
        for run, steps in (("straight", 4), ("resumed", 2), ("resumed", 4)):
            out = Path(folder, run)
            of_run = {"out": str(out), "steps": steps, "batch_size": 4, "amp": "off"}
            train.main(get_workload(**options, **of_run))
            state = torch_load(out / "checkpoint.pt")
            networks = [state[who]["network"].values() for who in ("G", "mu_fake")]
            weights.append(flat(itertools.chain(*networks)))
    # No bit changes on a CPU. cuDNN's backward may add in any order.
    limit = 0 if device.type == "cpu" else OF_RUNS
    yield Row("a run resumed", distance(weights[2], weights[0], start_weights()), limit)


def four_steps(ranks: Ranks, **options) -> Tensor:
    """The weights of G and mu_fake after four steps."""
    run = prepare(ranks, "mnist", **options)
    for k in range(4):
        train.training_step(run, k)
    return flat([*run.G.parameters, *run.mu_fake.parameters])


def as_rank(rank: int, folder: str, devices: list[str], backend: str) -> None:
    """One of two ranks, in a process of its own."""
    device, where = pick_device(devices[rank]), (Path(folder) / "meet").as_uri()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    how = {"rank": rank, "world_size": 2, "timeout": timedelta(minutes=2)}
    dist.init_process_group(backend, init_method=where, **how)
    ranks = Ranks(rank, 2, device)
    weights = [four_steps(ranks, shard_optimizer=shard) for shard in (False, True)]
    torch.save(weights, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def two_ranks(device: torch.device) -> Iterator[Row]:
    """On two GPUs with NCCL, as train.py does it. Where there are not two, both ranks are on the
    one device with gloo, which train.py refuses."""
    devices, backend, count = [str(device)] * 2, "gloo", torch.cuda.device_count()
    if device.type == "cuda" and count > 1:
        devices[1], backend = f"cuda:{(device.index + 1) % count}", "cpu:gloo,cuda:nccl"
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, devices, backend)
        torch.multiprocessing.start_processes(as_rank, given, nprocs=2, start_method=START)
        found = [torch_load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]
    one, origin = four_steps(Ranks(0, 1, device)), start_weights()
    for i, how in enumerate(("", ", --shard-optimizer")):
        error = max(distance(weights[i], one, origin) for weights in found)
        yield Row(f"two ranks on {' and '.join(devices)} ({backend}){how}", error, OF_RUNS)


# --------------------------------------------------------------------------------------------------
# LPIPS, speed and memory


def lpips_of(device: torch.device) -> tuple[Tensor, Tensor]:
    """LPIPS of two random images, with a random VGG -> the distance, the gradient."""
    import lpips  # slow

    torch.manual_seed(0)
    with mock.patch.object(lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True)):
        network = load_lpips(device)
    x, y = to(device, *torch.randn(2, 1, 3, 64, 64))
    distances = lpips_distance(network, x.requires_grad_(), x.detach() + 0.3 * y)
    distances.sum().backward()
    return distances, x.grad


def lpips_rows(device: torch.device) -> Iterator[Row]:
    """float32 against the CPU's, and TF32 against that."""
    found = {"CPU": lpips_of(torch.device("cpu")), "float32": lpips_of(device)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        torch.backends.cudnn.allow_tf32 = True  # as train.prepare does
        found["TF32"] = lpips_of(device)
    else:
        yield Row("LPIPS in TF32", "the device has no TF32")
    for name, before in zip(list(found)[1:], found, strict=False):
        for i, what in enumerate(("distance", "gradient")):
            error = distance(found[name][i], found[before][i])
            yield Row(f"LPIPS in {name}, {what}", error, OF_LPIPS[name][i])


def speed(device: torch.device) -> Iterator[Row]:
    """Steps of random networks of full size, each with its floor and its memory."""
    sizes, amp = {"mnist": 8}, pick_amp("auto", device)
    if device.type == "cuda":
        sizes = {"mnist": 64, "cifar10": 16, "imagenet64": 4}
    for dataset, B in sizes.items():
        workload = get_workload(dataset, batch_size=B)
        R = workload.batch_size_ref
        name = f"{dataset}, {amp}, {B} + {R} images"
        config = step.Config(dataset, B, repeats=5, amp=amp, device=str(device))
        try:
            free_memory()  # of the data set before
            with tempfile.TemporaryDirectory() as folder:
                found = step.measure(config, Path(folder), workload)
        except torch.OutOfMemoryError:
            yield Row(name, "does not fit into memory")
            break
        yield Row(f"{name}: step over its floor", found["step"] / found["floor"])
        what = f"{name}: GiB at the peak"
        if device.type == "cuda":
            what += f" (memory.py: {peak(dataset, B, R, distance='l2'):.2g})"
        yield Row(what, found["GiB"])


# --------------------------------------------------------------------------------------------------

CHECKS = [networks, compiled, gradients, loss_scaling, resuming, two_ranks, lpips_rows, speed]


def free_memory() -> None:
    """Free what nothing uses."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def rows_of(check: Callable, device: torch.device) -> Iterator[Row]:
    """A check's rows, or an exception as one. What train.py sets for its process is undone."""
    cudnn, numbers = torch.backends.cudnn, (signal.SIGINT, signal.SIGTERM)
    flags, handlers = (cudnn.allow_tf32, cudnn.benchmark), [signal.getsignal(n) for n in numbers]
    try:
        yield from check(device)
    except Exception as error:
        traceback.print_exc()
        name, text = getattr(check, "func", check).__name__, f"{type(error).__name__}: {error}"
        yield Row(name, one_line(text, 200), 0)
    finally:
        cudnn.allow_tf32, cudnn.benchmark = flags
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        free_memory()


def main(config: Config) -> None:
    """Print the table."""
    start, device, limits, broken = time.perf_counter(), pick_device(config.device), 0, 0
    title = f"{device}, PyTorch {torch.__version__}"
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # the one whose memory step.py measures
        title += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}: "
        title += f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} GPUs"
    if device.type == "cpu":
        torch.set_num_threads(1)  # several wait for each other, since the networks are small
    print(f"{title}\n\n| check | error | limit |\n|---|---|---|")
    for check in CHECKS:
        for row in rows_of(check, device):
            limits, broken = limits + (row.limit is not None), broken + row.broken()
            print(row, flush=True)
    result = f"{broken} of {limits} limits are broken" if broken else f"all {limits} limits hold"
    print(f"\n{result} ({time.perf_counter() - start:.0f} s)")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
