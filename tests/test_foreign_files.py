"""Files as other programs and people make them: read as they are meant, or refused in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails_in_one_line, pairs_config, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sd_loader import write_sd

import make_pairs
import train
from edm_unet import EDMPrecond
from plumbing.drawing import save_grid, to_uint8
from plumbing.fid import (
    FEATURES,
    frechet_distance,
    list_images,
    mean_and_covariance,
    read_image,
    read_reference,
)
from plumbing.files import write_tensors
from plumbing.options import UserError
from sd_loader import find_file, load_network, load_sd
from teachers import is_sd_unet


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
    refused(lambda: save_grid(tmp_path / "a.png", torch.full((1, 3, 8, 8), torch.nan), 1), "NaN")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (6, 3)])
def test_pictures_of_any_number_of_channels(tmp_path, channels, shown):
    """The first three or the first one; no transparency."""
    images = torch.rand(1, channels, 4, 4)
    save_grid(tmp_path / "a.png", images, columns=1, gap=0)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[shown]
        pixels = torch.from_numpy(np.array(picture)).reshape(4, 4, shown)
    assert pixels.equal(to_uint8(images)[0, :shown].permute(1, 2, 0))


def test_losses_and_figures_of_other_channels(tmp_path, run_here):
    """Such a network is distilled with L2; what needs colours says so before it computes."""
    net = EDMPrecond(
        img_resolution=16, img_channels=4, label_dim=0, model_type="SongUNet", model_channels=8,
        channel_mult=[1], num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    teacher, pairs = tmp_path / "teacher.safetensors", tmp_path / "pairs"
    write_tensors(teacher, net.state_dict(), {"kwargs": json.dumps(net.kwargs), "dataset": "edm"})
    options = {"dataset": "edm", "teacher": str(teacher), "device": "cpu"}
    make_pairs.main(pairs_config(**options, num_pairs=1, steps=1, out=pairs))
    options = {"teacher": str(teacher), "pairs": str(pairs)}
    lpips = tiny_config(options, tmp_path / "run", dataset="edm", steps=1)
    refused(lambda: train.main(lpips), "1 or 3 channels; add --distance l2")
    assert not (tmp_path / "run").exists()
    train.main(replace(lpips, distance="l2"))
    result = run_here(
        "evaluate.py", "--checkpoint", tmp_path / "run", "--samples", 2, "--reference", "none.npz",
    )  # fmt: skip
    fails_in_one_line(result, "FID needs images of 1 or 3 channels")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "ppm", "tiff", "TIF"])
def test_images_that_pillow_reads(tmp_path, kind):
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    for k in range(2):
        lossless = {"lossless": True} if kind == "webp" else {}
        Image.fromarray(image).save(tmp_path / f"{k}.{kind}", **lossless)
    first, _ = list_images(tmp_path)
    found = read_image(first).permute(1, 2, 0).numpy()
    assert (found == image).all() or kind == "jpeg"


@pytest.mark.parametrize("kind", ["gif", "jp2", "eps"])
def test_images_that_would_be_left_out(tmp_path, kind):
    """FID would be that of the others. (Pillow would run Ghostscript on an EPS file.)"""
    for name in ("a.png", "b.png", f"c.{kind}"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    refused(lambda: list_images(tmp_path), f"c.{kind}: FID reads PNG, ", "convert or move")


def test_transparency_in_any_form(tmp_path):
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    image.putpixel((0, 0), (0, 0, 0))
    image.save(tmp_path / "plain.png")
    image.quantize(4).save(tmp_path / "palette.png")
    for name in ("plain", "palette"):
        assert read_image(tmp_path / f"{name}.png").shape == (3, 8, 8)
    image.save(tmp_path / "a.png", transparency=(255, 255, 255))
    image.quantize(4).save(tmp_path / "b.png", transparency=0)
    image.convert("L").save(tmp_path / "c.png", transparency=255)
    Image.new("RGBA", (8, 8)).save(tmp_path / "d.webp")
    for path in sorted(tmp_path.glob("?.*")):
        refused(lambda path=path: read_image(path), str(path), "or transparency; convert it")


def test_fid_is_a_number_from_0_on(tmp_path):
    features = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    for scale in (1, 3, 10, 100):
        statistics = mean_and_covariance(features * scale)
        assert f"{frechet_distance(*statistics, *statistics):.2f}" == "0.00"
    mu, sigma = np.zeros(FEATURES), np.zeros((FEATURES, FEATURES))
    for name, value in {"mu": mu, "sigma": sigma}.items():
        value[..., 7] = np.nan
        np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
        value[..., 7] = 0
        what = f"{name} is {value.shape} instead of {value.shape} of finite numbers"
        refused(lambda: read_reference(tmp_path / "ref.npz", None, 1, None, 1), what)


# --------------------------------------------------------------------------------------------------
# Stable Diffusion's folders


def equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Assert that two networks have the same names and bits."""
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)


@pytest.mark.parametrize("merges", [list, " ".join])  # of newer files, of older ones
def test_a_tokenizer_in_one_file(sd, merges):
    prompts, tokenizer = ["The cat's 12 dogs!", "##"], sd / "tokenizer"
    expected = load_sd(sd, ["text_encoder"]).tokenizer(prompts)
    lines = (tokenizer / "merges.txt").read_text().splitlines()[1:]
    model = {"type": "BPE", "vocab": json.loads((tokenizer / "vocab.json").read_text())}
    model["merges"] = [merges(line.split(" ")) for line in lines]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": model}))
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink()
    assert load_sd(sd, ["text_encoder"]).tokenizer(prompts).equal(expected)
    del model["merges"][0]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": model}))
    refused(lambda: load_sd(sd, ["text_encoder"]), "tokenizer.json does not match its merges")


def test_a_learnt_token(sd):
    path = sd / "text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = torch.cat([tensors[name], torch.ones(1, 20)])
    save_file(tensors, path)
    change(sd / "text_encoder/config.json", vocab_size=len(tensors[name]))
    refused(lambda: load_sd(sd, ["text_encoder"]), "tokens were added to CLIP's 526")


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 1000}, "trained_betas must"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr must be"),
        ("unet/config.json", {"flip_sin_to_cos": False}, "flip_sin_to_cos must be True"),
        ("unet/config.json", {"attention_head_dim": [4, 4, 2, 4]}, "attention_head_dim must be"),
        ("unet/config.json", {"layers_per_block": []}, "config"),
        ("unet/config.json", {"sample_size": [16, 24]}, "sample_size must be like 64: [16, 24]"),
        ("unet/config.json", {"sample_size": 20}, "sample_size must be a multiple of 8"),
    ],
)
def test_configs_that_are_refused(sd, file, fields, words):
    change(sd / file, **fields)
    refused(lambda: load_sd(sd, ["unet"]), str(sd), words)


def test_configs_with_lists(sd):
    """Of a number for each resolution, as newer models have."""
    change(sd / "unet/config.json", attention_head_dim=[4, 4, 4, 4])
    refused(lambda: load_sd(sd, ["unet"]), "attention_head_dim must be like 8: [4, 4, 4, 4]")


def test_weights_in_several_files(sd):
    (sd / "unet/diffusion_pytorch_model.safetensors").rename(sd / "unet/part-1.safetensors")
    refused(lambda: load_sd(sd, ["unet"]), "holds none of unet/", "(weights: one file)")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_names_of_wrapped_networks(sd, part, prefix):
    """And a VAE's attention of 1x1 convolutions."""
    path = next((sd / part).glob("*.safetensors"))
    expected, tensors = load_network(part, sd), load_file(path)
    for name in tensors if part == "vae" else ():
        if ".to_" in name and name.endswith("weight"):
            tensors[name] = tensors[name][:, :, None, None]
    save_file({prefix + name: value for name, value in tensors.items()}, path)
    equal(load_network(part, path), expected)
    if part == "unet":
        assert is_sd_unet(path)


@pytest.mark.parametrize("name", ["there/file", "./none", "../none", "/none", "~/x"])
def test_a_path_is_no_repository_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sd_loader.find_on_hub", lambda *_: pytest.fail("the Hub was asked"))
    Path("there").mkdir()
    Path("there/file").touch()
    refused(lambda: find_file(name, "unet/config.json"), name, "neither a folder nor a Hub")
