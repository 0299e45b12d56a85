"""Files as other programs and people make them: read as they are meant, or refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails_in_one_line
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sd_loader import write_sd

from plumbing.drawing import save_grid
from plumbing.options import UserError
from sd_loader import load_sd


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture
def sd(sd_folder, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(sd_folder, tmp_path / "sd")


def change(path: Path, **fields) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(call, *words: str) -> None:
    """Assert a UserError of one line with these words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


# --------------------------------------------------------------------------------------------------
# Pictures


def overflowing(sd: Path, factor: float = 1e5):
    """A Stable Diffusion whose decoder leaves float16's range and comes back to it."""
    path = sd / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".conv_in." in name:
            tensors[name] *= factor
    save_file(tensors, path)
    return load_sd(sd, ["vae"])


def test_pictures_are_decoded_in_float32(sd):
    loaded, latents = overflowing(sd), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = loaded.decode(latents)
        with torch.autocast("cpu", torch.float16):
            assert not loaded.vae(latents).isfinite().any()
            assert loaded.decode(latents).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):  # training's is cheap
        assert loaded.decode(latents.requires_grad_()).equal(loaded.vae(latents).float())
        assert loaded.vae(latents).dtype == torch.bfloat16


def test_no_picture_of_nan(tmp_path):
    refused(lambda: save_grid(tmp_path / "a.png", torch.full((1, 3, 8, 8), torch.nan), 1), "a.png")
    assert not list(tmp_path.iterdir())
