"""Pictures: grids, films, curves, and Figure 3."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from plumbing.files import atomic_path
from plumbing.options import UserError, one_line


@contextlib.contextmanager
def only_to_look_at(name: str) -> Iterator[None]:
    """Whatever goes wrong while this is drawn and written is printed, and the work goes on."""
    try:
        yield
    except Exception as error:  # of Pillow, matplotlib, the disk, the GPU
        tqdm.write(one_line(f"{name} cannot be written ({type(error).__name__}: {error})"))


def write_figure(path: Path, figure) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_film(path: Path, frames: list[Image.Image]) -> None:
    """Write pictures as a GIF that repeats, atomically: 0.2 seconds each, and 2 for the last."""
    how = {"save_all": True, "append_images": frames[1:], "loop": 0, "optimize": True}
    how["duration"] = [200] * (len(frames) - 1) + [2000]  # milliseconds
    with atomic_path(path) as temporary:
        frames[0].save(temporary, format="GIF", **how)


def to_uint8(images: Tensor, offset: float = 128) -> Tensor:
    """Images in [-1, 1] -> uint8, by EDM's rule x * 127.5 + 128, clamped. All must be numbers."""
    if not images.isfinite().all():
        raise UserError("the model gives NaN or infinity; check its weights, or try --amp off")
    return (images.float() * 127.5 + offset).clamp(0, 255).to(torch.uint8)


def save_grid(path: Path, images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> None:
    """Write images (B, C, H, W) in [-1, 1] row by row as one PNG, with `gap` pixels of light grey
    between them: their first three channels or the first one. `scale` magnifies the picture."""
    from torchvision.utils import make_grid  # slow to import

    images = to_uint8(images[:, : 3 if images.shape[1] >= 3 else 1].detach().cpu())
    grid = make_grid(images, columns, gap, pad_value=200)[: images.shape[1]]  # not three for one
    picture = Image.fromarray(grid.permute(1, 2, 0).squeeze(2).numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


@only_to_look_at("curves.png")
def draw_curves(path: Path, rows: list[dict]) -> None:
    """Plot every logged scalar except the learning rate against the step."""
    from matplotlib.figure import Figure  # imported late, see options.py

    steps = [int(row["step"]) for row in rows]
    names = [name for name in rows[0] if name not in ("step", "learning_rate")]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3, sharex=True).flat, names, strict=True):
        values = [float(row[name]) for row in rows]
        axis.plot(steps, values, linewidth=0.8)
        axis.set(title=name, yscale="log" if max(values) > 0 else "linear", xlabel="step")
        axis.grid(alpha=0.3)
    write_figure(path, figure)


def draw_panels(
    panels: dict[str, Tensor], labels: list[str], real: Tensor, modes: Tensor, std: float, size
):
    """Draw samples in the plane -> a matplotlib figure with one panel per entry of `panels`.

    Args:
        panels: title -> generated samples (B, 2, 1, 1); labels: a line below each panel.
        real: real samples (N, 2), drawn behind the others; modes (M, 2), std: the Gaussians that
            they come from, drawn as contours at 1, 2 and 3 standard deviations.
        size: width and height of the figure in inches.
    """
    from matplotlib.figure import Figure  # imported late, see options.py

    x, y = torch.linspace(-0.9, 0.9, 181), torch.linspace(-0.4, 0.4, 81)
    distance = torch.cdist(torch.cartesian_prod(x, y), modes).reshape(181, 81, len(modes))
    density = (-((distance / std) ** 2) / 2).exp().sum(dim=2).T
    levels = [math.exp(-(k**2) / 2) for k in (3, 2, 1)]
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, samples), label in zip(axes, panels.items(), labels, strict=True):
        axis.scatter(*real.T, s=2, color="#9ecae1", label="real")
        axis.contour(x, y, density, levels, colors="#3182bd", linewidths=0.8)
        axis.scatter(*samples[:1400].flatten(1).T, s=2, color="#d94801", label="generated")
        axis.set(title=title, xlabel=label, xticks=[], yticks=[])
        axis.set(xlim=(-0.9, 0.9), ylim=(-0.4, 0.4), aspect="equal")
    axes[0].legend(loc="lower center", ncols=2, markerscale=4, frameon=False)
    return figure


def draw_film(path: Path, films: dict[str, list[tuple]], steps: list[int], draw: Callable) -> None:
    """Write the panels at several steps as a film, with the scores as arrows.

    The real score (blue) pulls samples towards real data. The negative fake score (brown) pushes
    them apart. Their sum (black) points against the gradient of Eq. 7.

    Args:
        films: panel -> for every step, samples (B, 2, 1, 1) and the real and the fake score
            (A, 2, 1, 1) of the first A of them.
        draw: {panel: samples}, size -> a figure like that of draw_panels.
    """
    pictures = []
    for k, step in enumerate(tqdm(steps, desc="film")):
        figure = draw({panel: film[k][0] for panel, film in films.items()}, (12, 2.4))
        for axis, film in zip(figure.axes, films.values(), strict=True):
            samples, real, fake = film[k]
            at = samples[: len(real)].flatten(1).T
            for arrows, colour, width in (
                (real, "#08519c", 0.004), (-fake, "#7f2704", 0.004), (real - fake, "black", 0.006),
            ):  # fmt: skip
                how = {"angles": "xy", "scale_units": "xy", "scale": 1, "zorder": 3}
                axis.quiver(*at, *arrows.flatten(1).T, color=colour, width=width, **how)
        figure.suptitle(f"step {step}", x=0.005, ha="left")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=80)
        pictures.append(Image.open(picture).convert("RGB").quantize(48))
    write_film(path, pictures)
