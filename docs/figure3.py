"""Compute Figure 3 for many settings of Algorithm 1: docs/figure3.png, which the page plays with.

    python docs/figure3.py             about 15 minutes on a CPU

It trains the toy of toy_2d.py with every T_max, every lambda_reg, with and without the fake score.
The picture has one tile per run: its last samples over contours of the two real modes. Rows are
LAMBDA_REG with the fake score, then LAMBDA_REG without it. Columns are T_MAX. A text chunk of the
PNG has the numbers. A command that is interrupted goes on where it stopped: finished runs stay in
runs/figure3 until the picture is written. The last line it prints: wrote docs/figure3.png
"""

import json
import shutil
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

ROOT = Path(__file__).parent.parent
T_MAX = (100, 180, 260, 330, 400, 600, 980)
LAMBDA_REG = (0.0, 0.1, 0.3, 0.5, 1.0)
TILE, SMOOTH = (450, 200), 4  # pixels of a tile; it is drawn this many times larger, then reduced
SAMPLES, COLOURS = 1000, 16


@dataclass
class Config(Options):
    """The options of the command."""

    out: str = option(str(ROOT / "docs/figure3.png"), "file of the picture")
    runs: str = option(str(ROOT / "runs/figure3"), "folder of finished runs")
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
    origin = torch.tensor([width, height]) / 2
    for mode, sigmas in product(toy_2d.MODES, (1, 2, 3)):
        centre, radius = (origin + unit * mode).tolist(), unit * sigmas * toy_2d.STD
        draw.circle(centre, radius, outline="#3182bd", width=SMOOTH)
    for x, y in samples[:SAMPLES].flatten(1).tolist():
        centre = (width / 2 + unit * x, height / 2 - unit * y)
        draw.circle(centre, 1.5 * SMOOTH, fill="#d94801")
    return picture.resize(TILE, Image.Resampling.BOX)


def main(config: Config) -> None:
    """Train every setting, then draw all of them."""
    torch.set_num_threads(1)  # several would wait for each other, because the tensors are tiny
    mu_real = EDMDenoiser(toy_2d.MixtureDenoiser())
    pairs = toy_2d.make_pairs(mu_real, config.seed)
    folder = Path(config.runs)
    folder.mkdir(parents=True, exist_ok=True)
    width, height = TILE
    sprite = Image.new("RGB", (width * len(T_MAX), height * 2 * len(LAMBDA_REG)))
    numbers = []
    settings = list(product((True, False), LAMBDA_REG, T_MAX))
    for k, (use_fake_score, lambda_reg, max_step) in enumerate(settings):
        scores = "both scores" if use_fake_score else "real score"
        name = f"{k + 1} of {len(settings)}: {scores}, lambda_reg {lambda_reg}, T_max {max_step}"
        saved = folder / f"{scores} {lambda_reg} {max_step} {config.steps} {config.seed}.pt"
        if not saved.exists():
            toy_2d.PANELS[name] = (use_fake_score, lambda_reg)
            with atomic_path(saved) as temporary:
                torch.save(train(name, config, max_step, mu_real, pairs), temporary)
        samples = torch.load(saved, weights_only=True)
        row, column = divmod(k, len(T_MAX))
        sprite.paste(tile(samples), (column * width, row * height))
        share, spread = toy_2d.statistics(samples)
        numbers.append([round(n, 3) for n in (*share.tolist(), *spread.mean(dim=1).tolist())])

    about = PngInfo()
    settings = {"use_fake_score": [True, False], "lambda_reg": LAMBDA_REG, "t_max": T_MAX}
    runs = {"steps": config.steps, "seed": config.seed, "tile": TILE, **settings, "runs": numbers}
    about.add_text("runs", json.dumps(runs).replace("NaN", "null"))
    with atomic_path(Path(config.out)) as temporary:
        few = sprite.quantize(COLOURS, dither=Image.Dither.NONE)
        few.save(temporary, format="PNG", optimize=True, pnginfo=about)
    shutil.rmtree(folder)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
