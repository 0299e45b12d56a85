"""Compute Figure 3 for many settings of Algorithm 1: docs/figure3.png, which the page plays with.

    python docs/figure3.py             about 15 minutes on a CPU

It trains the toy of toy_2d.py with every T_max, every lambda_reg, with and without the fake score.
The picture has one tile per run: its last samples over contours of the two real modes. Rows are
LAMBDA_REG with the fake score, then LAMBDA_REG without it. Columns are T_MAX. A text chunk of the
PNG has the numbers. A command that is interrupted goes on where it stopped: finished runs stay in
runs/figure3 until the picture is written. The last line it prints: wrote docs/figure3.png
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import toy_2d
from edm_unet import EDMDenoiser
from plumbing.files import atomic_path
from plumbing.options import Options, option, run_script

T_MAX = (100, 180, 260, 330, 400, 600, 980)
FAKE_SCORE = (True, False)
LAMBDA_REG = (0.0, 0.1, 0.3, 0.5, 1.0)
TILE, SMOOTH = (450, 200), 4  # pixels of a tile; it is drawn this many times larger, then reduced
SAMPLES, COLOURS = 1000, 16  # of a tile


@dataclass
class Config(Options):
    """The options of the command."""

    out: str = option("docs/figure3.png", "file of the picture")
    runs: str = option("runs/figure3", "folder of finished runs")
    steps: int = option(3000, "training steps per run", least=1)
    seed: int = option(0, "seed of everything random", least=0, below=2**63)


def train(name: str, config: Config, max_step: int, mu_real: EDMDenoiser, pairs) -> Tensor:
    """Train one entry of toy_2d.PANELS with this T_max -> samples (5000, 2, 1, 1)."""
    toy = toy_2d.Config(steps=config.steps, max_step=max_step, seed=config.seed)
    *_, (G, _) = toy_2d.train_panel(name, toy, mu_real, pairs)
    return toy_2d.generate(G, config.seed)


def tile(samples: Tensor) -> Image.Image:
    """Draw samples (B, 2, 1, 1) over contours of the modes at 1, 2 and 3 standard deviations."""
    width, height = (SMOOTH * side for side in TILE)
    picture = Image.new("RGB", (width, height), "white")
    draw, unit = ImageDraw.Draw(picture), width / 1.8  # the plane from -0.9 to 0.9, as in toy_2d.py

    def circle(x: float, y: float, radius: float, **style) -> None:
        x, y = width / 2 + unit * x, height / 2 - unit * y
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), **style)

    for (x, y), sigmas in product(toy_2d.MODES.tolist(), (1, 2, 3)):
        circle(x, y, sigmas * toy_2d.STD * unit, outline="#3182bd", width=SMOOTH)
    for x, y in samples[:SAMPLES].flatten(1).tolist():
        circle(x, y, 1.5 * SMOOTH, fill="#d94801")
    return picture.resize(TILE, Image.Resampling.BOX)


def statistics(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Samples (B, 2, 1, 1) -> the share within 3 standard deviations of each mode, and the spread
    of these. (The shares of toy_2d.py also count what lies between the modes.)"""
    inside = torch.cdist(samples.flatten(1), toy_2d.MODES) < 3 * toy_2d.STD
    spread = toy_2d.statistics(samples[inside.any(dim=1)])[1]
    return inside.float().mean(dim=0), spread.mean(dim=1)


def write(path: Path, runs: list[Tensor], config: Config) -> None:
    """Write the tiles of all runs as one PNG, with their shares and spreads as text."""
    width, height = TILE
    sprite = Image.new("RGB", (width * len(T_MAX), height * len(runs) // len(T_MAX)))
    numbers = []
    for k, samples in enumerate(runs):
        row, column = divmod(k, len(T_MAX))
        sprite.paste(tile(samples), (column * width, row * height))
        share, spread = statistics(samples)
        found = (*share.tolist(), *spread.tolist())
        numbers.append([None if math.isnan(n) else round(n, 3) for n in found])
    about = {"steps": config.steps, "seed": config.seed, "tile": TILE, "t_max": T_MAX,
             "lambda_reg": LAMBDA_REG, "use_fake_score": FAKE_SCORE, "runs": numbers}  # fmt: skip
    text = PngInfo()
    text.add_text("runs", json.dumps(about))
    few = sprite.quantize(COLOURS, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        few.save(temporary, format="PNG", optimize=True, pnginfo=text)


def main(config: Config) -> None:
    """Train every setting, then draw all of them."""
    torch.set_num_threads(1)  # several would wait for each other, because the tensors are tiny
    mu_real = EDMDenoiser(toy_2d.MixtureDenoiser())
    pairs = toy_2d.make_pairs(mu_real, config.seed)
    settings, finished = list(product(FAKE_SCORE, LAMBDA_REG, T_MAX)), []
    for k, (use_fake_score, lambda_reg, max_step) in enumerate(settings, start=1):
        scores = "both scores" if use_fake_score else "real score"
        name = f"{k} of {len(settings)}: {scores}, lambda_reg {lambda_reg}, T_max {max_step}"
        file = f"{scores} {lambda_reg} {max_step} {config.steps} {config.seed}.pt"
        finished.append(Path(config.runs) / file)
        if not finished[-1].exists():
            toy_2d.PANELS[name] = (use_fake_score, lambda_reg)
            samples = train(name, config, max_step, mu_real, pairs)
            with atomic_path(finished[-1]) as temporary:
                torch.save(samples, temporary)
    write(Path(config.out), [torch.load(path, weights_only=True) for path in finished], config)
    for path in finished:
        path.unlink()
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
