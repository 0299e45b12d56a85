"""Text-to-image models on captions: zero-shot COCO (appendix D), or anyone's captions and images.

Pictures are drawn once, kept as PNG at full size, and named by the number of their caption. For
every figure, drawn and real ones alike are cropped to their central square and brought to 256x256
by Lanczos' filter. Then

    FID         is clean-fid's (Parmar et al. 2022, arXiv 2104.11222), by its "clean" protocol
    CLIP score  is the mean cosine of OpenCLIP's ViT-g-14 between a picture and "A photo depicts "
                with its caption (Hessel et al. 2021, arXiv 2104.08718, without their factor)

Both packages are optional, and imported where they are needed.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from plumbing.devices import Ranks
from plumbing.drawing import save_grid
from plumbing.fid import read_image
from plumbing.files import atomic_path, one_line, one_line_errors
from plumbing.options import UserError

SIZE = 256  # pixels along each side, for every figure
CLIP = ("ViT-g-14", "laion2b_s12b_b42k")  # model and weights of OpenCLIP


def picture(folder: Path, k: int) -> Path:
    """The file of caption k's picture."""
    return folder / f"{k:06d}.png"


def draw_missing(
    folder: Path, count: int, draw: Callable[[list[int]], Tensor], batch_size: int, ranks: Ranks
) -> None:
    """Draw the pictures 0 .. count - 1 that are not there yet; the ranks share them. `draw` turns
    numbers k into images (B, 3, H, W) in about [-1, 1], each a function of its k alone."""
    missing = [k for k in range(count) if not picture(folder, k).exists()]
    ranks.barrier()  # all have looked before the first one is written
    mine = missing[ranks.rank :: ranks.count]
    with tqdm(total=len(mine), desc=folder.name, unit="image", disable=ranks.rank > 0) as bar:
        for start in range(0, len(mine), batch_size):
            numbers = mine[start : start + batch_size]
            for k, image in zip(numbers, draw(numbers), strict=True):
                # Rounded down, as in the authors' code of DMD2; EDM's rule is another.
                pixels = ((image.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
                with atomic_path(picture(folder, k)) as temporary:
                    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(temporary, "PNG")
            bar.update(len(numbers))
    ranks.barrier()


def preview(folder: Path, count: int) -> Path:
    """A grid of the first pictures, beside their folder -> its file."""
    files = [picture(folder, k) for k in range(min(count, 25))]
    images = [square(read_image(file).permute(1, 2, 0).numpy()) for file in files]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    save_grid(folder.with_suffix(".png"), batch, columns=5)
    return folder.with_suffix(".png")


def latency(draw: Callable[[], Tensor]) -> float:
    """Milliseconds of `draw`, from text to image: the median of 50, after three to warm up."""
    times = []
    for _ in range(53):
        clock = time.perf_counter()
        draw().cpu()  # waits for the GPU
        times.append((time.perf_counter() - clock) * 1000)
    return statistics.median(times[3:])


def square(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> its central square, resized: uint8 (256, 256, 3)."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def optional(module: str, package: str) -> ModuleType:
    """An optional package's module."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs another package: pip install {package} ({error})") from None


def folder_fid(drawn: Path, real: Path, device: torch.device) -> float:
    """FID between two folders of images, by the Inception that clean-fid downloads."""
    fid = optional("cleanfid.fid", "clean-fid")
    try:
        network = fid.build_feature_extractor("clean", device, use_dataparallel=False)
    except Exception as error:  # whatever a download may raise
        raise UserError(one_line(f"clean-fid cannot load its Inception ({error})")) from None
    with one_line_errors(real):
        return float(
            fid.compare_folders(
                str(drawn), str(real), network, "clean", num_workers=0, batch_size=32,
                device=device, verbose=True, custom_image_tranform=square,
            )
        )  # fmt: skip


def clip_score(drawn: Path, captions: Sequence[str], device: torch.device) -> float:
    """Mean cosine between pictures and captions, picture k belonging to caption k."""
    open_clip, total = optional("open_clip", "open_clip_torch"), 0.0
    model, _, preprocess = open_clip.create_model_and_transforms(*CLIP, device=device)
    model, tokenize = model.eval(), open_clip.get_tokenizer(CLIP[0])
    for start in tqdm(range(0, len(captions), 32), desc="CLIP score"):
        texts = [f"A photo depicts {caption}" for caption in captions[start : start + 32]]
        files = [picture(drawn, k) for k in range(start, start + len(texts))]
        pixels = [read_image(file).permute(1, 2, 0).numpy() for file in files]
        squares = [Image.fromarray(square(each)) for each in pixels]
        images = torch.stack([preprocess(each) for each in squares])
        with torch.inference_mode():
            of_images = model.encode_image(images.to(device))
            of_texts = model.encode_text(tokenize(texts).to(device))
        total += cosine_similarity(of_images.double(), of_texts.double()).sum().item()
    return total / len(captions)
