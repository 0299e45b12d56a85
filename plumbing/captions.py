"""Text-to-image models on captions: zero-shot COCO (appendix D), or your own captions and images.

Pictures are drawn once and kept as PNG at full size, named by the number of their caption. Before
they are measured, drawn and real pictures are cropped to the central square and resized to 256x256
by Lanczos' filter. Each measure needs an optional package:

    FID         clean-fid's "clean" protocol (Parmar et al. 2022, arXiv 2104.11222)
    CLIP score  mean cosine between a picture and "A photo depicts " + its caption, by OpenCLIP's
                ViT-g-14 (Hessel et al. 2021, arXiv 2104.08718, without their factor)
"""

import importlib
import statistics
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from plumbing.devices import Ranks
from plumbing.drawing import save_grid, to_uint8
from plumbing.fid import frechet_distance, list_images, mean_and_covariance, read_image
from plumbing.files import atomic_path
from plumbing.options import UserError, one_line

SIZE = 256  # pixels along each side, for both measures
CLIP = ("ViT-g-14", "laion2b_s12b_b42k")  # model and weights of OpenCLIP


def picture(folder: Path, k: int) -> Path:
    """The file of caption k's picture."""
    return folder / f"{k:06d}.png"


def draw_missing(
    folder: Path, count: int, draw: Callable[[list[int]], Tensor], batch_size: int, ranks: Ranks
) -> None:
    """Draw those of pictures 0 .. count - 1 that are missing; the ranks share them. `draw` turns
    numbers k into images (B, 3, H, W), about [-1, 1], each a function of its k alone."""
    missing = [k for k in range(count) if not picture(folder, k).exists()]
    ranks.barrier()  # no rank writes before all have listed them
    mine = missing[ranks.rank :: ranks.count]
    for start in tqdm(range(0, len(mine), batch_size), desc=folder.name, disable=ranks.rank > 0):
        numbers = mine[start : start + batch_size]
        for k, image in zip(numbers, draw(numbers), strict=True):
            # Rounded down, as in the authors' code for DMD2 (EDM's code rounds to nearest).
            pixels = to_uint8(image.cpu(), offset=127.5)
            with atomic_path(picture(folder, k)) as temporary:
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, "PNG")
    ranks.barrier()


def preview(folder: Path, count: int) -> Path:
    """Save a grid of the first 25 pictures beside their folder -> its file."""
    images = [square(picture(folder, k)) for k in range(min(count, 25))]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    save_grid(folder.with_suffix(".png"), batch, columns=5)
    return folder.with_suffix(".png")


def latency(draw: Callable[[], Tensor]) -> float:
    """Milliseconds of one `draw`, from text to image: the median of 50, after 3 to warm up."""
    seconds = timeit.repeat(lambda: draw().cpu(), number=1, repeat=53)  # .cpu() waits for the GPU
    return 1000 * statistics.median(seconds[3:])


def square(file: Path) -> np.ndarray:
    """The central square of an image file, resized -> uint8 (256, 256, 3)."""
    image = Image.fromarray(read_image(file).permute(1, 2, 0).numpy())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def load_judge(package: str, device: torch.device) -> tuple:
    """A network of an optional package, what prepares its images and, for OpenCLIP, a tokenizer."""
    try:
        if package == "clean-fid":
            fid = importlib.import_module("cleanfid.fid")
            network = fid.build_feature_extractor("clean", device, use_dataparallel=False)
            return network, fid.build_resizer("clean")
        open_clip = importlib.import_module("open_clip")
        model, _, preprocess = open_clip.create_model_and_transforms(*CLIP, device=device)
        return model.eval(), preprocess, open_clip.get_tokenizer(CLIP[0])
    except ImportError as error:
        raise UserError(f"a package is missing: pip install {package} ({error})") from None
    except Exception as error:  # whatever a download may raise
        raise UserError(one_line(f"{package} cannot be loaded; see cause ({error!r})")) from None


@torch.no_grad()
def folder_fid(drawn: Path, real: Path, device: torch.device) -> float:
    """FID between two folders of images, from clean-fid's features. The distance is ours, because
    clean-fid's fails with SciPy 1.18."""
    (network, resize), both = load_judge("clean-fid", device), []
    for folder in (drawn, real):
        files, features = list_images(folder), []
        for start in tqdm(range(0, len(files), 32), desc=f"FID, {folder.name}"):
            with ThreadPoolExecutor() as pool:
                images = list(pool.map(lambda f: resize(square(f)), files[start : start + 32]))
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            features.append(network(batch.to(device)).cpu())
        both += mean_and_covariance(torch.cat(features))
    return frechet_distance(*both)


def clip_score(drawn: Path, captions: Sequence[str], device: torch.device) -> float:
    """The mean cosine between picture k and caption k."""
    (model, preprocess, tokenize), total = load_judge("open_clip_torch", device), 0.0
    for start in tqdm(range(0, len(captions), 32), desc="CLIP score"):
        texts = [f"A photo depicts {caption}" for caption in captions[start : start + 32]]
        squares = [square(picture(drawn, k)) for k in range(start, start + len(texts))]
        images = torch.stack([preprocess(Image.fromarray(each)) for each in squares])
        with torch.inference_mode():
            of_images = model.encode_image(images.to(device))
            of_texts = model.encode_text(tokenize(texts).to(device))
        total += cosine_similarity(of_images.double(), of_texts.double()).sum().item()
    return total / len(captions)
