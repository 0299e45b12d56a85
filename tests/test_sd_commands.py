"""Stable Diffusion from prompts to one-step pictures, with scaled-down networks of its structure.

The networks lie on disk in the released files' layout and are read by the real loader.
"""

import csv
import gzip
import json
import re
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT, fails_in_one_line, pairs_config, run
from PIL import Image
from safetensors import safe_open
from test_sd_loader import relative_error, write_sd

import make_pairs
import sample
import train
from plumbing import rundir
from plumbing.devices import join_ranks
from plumbing.files import read_tensors
from plumbing.options import UserError, run_script
from plumbing.pairs import Pairs, read_prompts, sample_noise
from plumbing.rundir import SCALARS
from sd_loader import (
    GuidedUNet,
    SDDenoiser,
    load_network,
    load_sd,
    pndm_sample,
    sd_noise_table,
)
from teachers import load_generator
from workloads import ASSETS, get_workload

PROMPTS = ["the cat", "a dog's hat"]
LATENT = (4, 8, 8)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A folder like stable-diffusion-v1-5's with latents of 8x8, and one with two prompts."""
    folder = write_sd(tmp_path_factory.mktemp("sd") / "model")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": LATENT[-1]}))
    prompts = "\n".join(["", PROMPTS[0], "  a  dog's\that ", ""])
    (folder / "prompts.txt").write_text(prompts)
    (folder / "prompts.txt.gz").write_bytes(gzip.compress(prompts.encode()))
    return folder


def pairs_options(sd, out, **options):
    return {
        "dataset": "sd15", "teacher": str(sd),
        "prompts": str(sd / "prompts.txt"), "num_pairs": 5, "shard_size": 3, "batch_size": 2,
        "steps": 4, "device": "cpu", "out": str(out), **options,
    }  # fmt: skip


def train_options(sd, pairs, out, **options):
    return {
        "dataset": "sd15", "teacher": str(sd),
        "pairs": str(pairs), "out": str(out), "steps": 2, "batch_size": 3, "batch_size_ref": 2,
        "distance": "l2", "device": "cpu", "amp": "off", **options,
    }  # fmt: skip


def sample_options(sd, **options):
    return {
        "teacher_weights": str(sd), "device": "cpu",
        "seeds": "0-2", **options,
    }  # fmt: skip


def command(script, options):
    """The same options on a command line."""
    words = [script]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            words += [flag, *value] if isinstance(value, list) else [flag, value]
    return words


def train_to_the_end(options):
    """train.main, without the curves (half a second each), and Ctrl-C given back to pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "draw_curves", lambda *_: None)
        train.main(get_workload(**options))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def prepare(config):
    """A Run as train.main prepares it."""
    return train.prepare(config, join_ranks("cpu"))


@pytest.fixture(scope="module")
def sd_pairs(sd, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "sd15"
    make_pairs.main(pairs_config(**pairs_options(sd, out)))
    return out


@pytest.fixture(scope="module")
def sd_run(sd, sd_pairs, tmp_path_factory):
    """Two steps."""
    out = tmp_path_factory.mktemp("runs") / "sd15"
    train_to_the_end(train_options(sd, sd_pairs, out))
    return out


# --------------------------------------------------------------------------------------------------
# The whole path, by command


@pytest.mark.slow
def test_from_prompts_to_pictures_by_command(sd, tmp_path):
    options = pairs_options(sd, tmp_path / "pairs", prompts=sd / "prompts.txt.gz", guidance=3)
    result = run(*command("make_pairs.py", options), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("5 pairs of sd15 in ")
    assert Image.open(tmp_path / "pairs" / "preview.png").mode == "RGB"

    options = train_options(sd, tmp_path / "pairs", tmp_path / "runs" / "sd15")
    result = run(*command("train.py", options), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "runs" / "sd15" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(float(row[name]) > 0 for row in rows for name in SCALARS)

    options = sample_options(sd, prompt=PROMPTS, teacher=True, steps=3, seeds="0-3", columns=2)
    result = run(*command("sample.py", options), cwd=tmp_path)  # finds the run by itself
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "teacher, 8 evaluations" in lines[0] and "student, 1 evaluation" in lines[0]
    assert lines[-1] == (
        "wrote samples.png: 4 images of sd15 from runs/sd15/generator.safetensors (step 2), "
        "teacher above student"
    )
    assert Image.open(tmp_path / "samples.png").size == (2 + 2 * 66, 2 + 4 * 66)


# --------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_pairs_keep_their_prompts_and_are_guided(sd, sd_pairs, tmp_path, guidance):
    folder = sd_pairs
    if guidance != 3:
        folder = tmp_path / "pairs"
        options = pairs_options(sd, folder, guidance=guidance, prompts=str(sd / "prompts.txt.gz"))
        make_pairs.main(pairs_config(**options))
    pairs = Pairs(folder, "sd15")
    assert pairs.meta["guidance"] == guidance and pairs.prompts == (PROMPTS * 3)[:5]
    tensors, _ = read_tensors(folder / "shard_00001.safetensors")
    assert (tensors["z"].dtype, tensors["y"].dtype) == (torch.float32, torch.float16)

    z, y, prompts = pairs.batch([4, 1])
    assert prompts == PROMPTS and y.dtype == torch.float32
    torch.testing.assert_close(z, sample_noise("pairs", 0, [4, 1], LATENT), rtol=0, atol=0)
    parts = load_sd(sd)
    guided = GuidedUNet(parts.unet, parts.encode_text([""]), guidance)
    expected = pndm_sample(guided, z, parts.encode_text(prompts), steps=4)
    assert relative_error(y, expected) < 1e-3  # float16


def test_interrupted_pairs_resume_to_identical_files(sd, sd_pairs, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(sd_pairs, again)
    (again / "shard_00001.safetensors").unlink()
    make_pairs.main(pairs_config(**pairs_options(sd, again)))
    for name in ("shard_00000.safetensors", "shard_00001.safetensors", "preview.png"):
        assert (again / name).read_bytes() == (sd_pairs / name).read_bytes()
    with pytest.raises(UserError, match="another guidance, prompts;"):
        options = {"guidance": 2.0, "prompts": str(ASSETS / "prompts.txt")}
        make_pairs.main(pairs_config(**pairs_options(sd, again, **options)))


def test_prompts_of_our_own():
    prompts = read_prompts(ASSETS / "prompts.txt")
    assert len(prompts) == len(set(prompts)) >= 100
    assert all(10 < len(prompt) < 90 and prompt == prompt.strip() for prompt in prompts)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["captions.txt", "captions.txt.gz"])
def test_a_caption_may_hold_other_line_breaks(tmp_path, name, newline):
    """Pair k has line k: only a newline ends it; blank lines do not count."""
    breaks = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
    captions = [f"a{c}cat{c}" for c in breaks]
    text = "\ufeff" + newline.join(["", *captions, " \t", "a dog"])
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wb") as file:
        file.write(text.encode())
    prompts = read_prompts(tmp_path / name)
    assert prompts == ["a cat"] * len(breaks) + ["a dog"]


# --------------------------------------------------------------------------------------------------
# Training


def test_before_training_the_generator_is_the_teachers_one_step(sd, sd_pairs, tmp_path):
    G = prepare(get_workload(**train_options(sd, sd_pairs, tmp_path / "run"))).G.model
    parts, z = load_sd(sd), sample_noise("pairs", 7, [0, 1], LATENT)
    text = parts.encode_text(PROMPTS)
    alpha, sigma = (table[999].item() for table in sd_noise_table())
    with torch.no_grad():
        eps = parts.unet(z, torch.tensor([999, 999]), text)
        torch.testing.assert_close(G(z, text), (z - sigma * eps) / alpha, rtol=1e-5, atol=1e-4)


def test_kl_sees_both_halves_a_guided_teacher_and_an_unguided_fake(
    sd, sd_pairs, tmp_path, monkeypatch
):
    """Line 4 of Algorithm 1, x <- concat(x, x_ref); the regression compares decoded images."""
    seen = {}

    def kl(mu_real, mu_fake, x, cond, **options):
        seen["kl"] = {"mu_real": mu_real, "mu_fake": mu_fake, "x": x, "cond": cond, **options}
        return real_kl(mu_real, mu_fake, x, cond, **options)

    def regression(images, images_ref, distance):
        seen["images"] = images, images_ref
        return real_regression(images, images_ref, distance)

    real_kl, real_regression = train.distribution_matching_loss, train.regression_loss
    monkeypatch.setattr(train, "distribution_matching_loss", kl)
    monkeypatch.setattr(train, "regression_loss", regression)
    config = get_workload(**train_options(sd, sd_pairs, tmp_path / "run", learning_rate=0.0))
    active = prepare(config)
    for net in (active.G.network.mu.net, active.mu_fake.network.net):
        assert net.gradient_checkpointing
        assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, True)}
    shared = {p.data_ptr() for p in active.G.network.parameters()}
    assert not shared & {p.data_ptr() for p in active.mu_fake.network.parameters()}
    assert not shared & {p.data_ptr() for p in active.teacher.mu_real.parameters()}
    scalars = train.training_step(active, 0)
    assert all(value.isfinite() and value > 0 for value in scalars)

    kl, batch = seen["kl"], train.draw_batch(active, 0, range(3), range(2))
    text = batch.cond
    assert kl["x"].shape == (3 + 2, *LATENT) and kl["t"].shape == (5,)
    assert kl["noise"].shape == kl["x"].shape and torch.equal(kl["cond"], text)
    parts, x_t, t = load_sd(sd), kl["noise"], kl["t"]
    guided = GuidedUNet(parts.unet, parts.encode_text([""]), 3.0)
    with torch.no_grad():
        x = active.G.model(torch.cat([batch.z, batch.z_ref]), text)
        torch.testing.assert_close(kl["x"].detach(), x, rtol=1e-4, atol=1e-4)
        for mu, net in (("mu_real", guided), ("mu_fake", parts.unet)):
            expected = SDDenoiser(net)(x_t, t, text)
            torch.testing.assert_close(kl[mu](x_t, t, text), expected, rtol=1e-4, atol=1e-4)
        y_ref = active.teacher.decode(batch.y_ref)
    images, images_ref = seen["images"]
    assert images.shape == (2, 3, 64, 64) and torch.equal(images_ref, y_ref)


@pytest.mark.parametrize("options", [{"lambda_dm": 0.0}, {"lambda_reg": 0.0}, {"decoder": "full"}])
def test_ablations_and_the_full_decoder_train(sd, sd_pairs, tmp_path, options):
    config = get_workload(**train_options(sd, sd_pairs, tmp_path / "run", **options))
    scalars = train.training_step(prepare(config), 0)
    assert all(value.isfinite() for value in scalars)
    for value, name in zip(scalars, ("lambda_dm", "lambda_reg"), strict=False):
        assert (value > 0) == (options.get(name) != 0)


def test_a_phase_changes_the_decoder(sd, sd_pairs, tmp_path, monkeypatch):
    """As Table 5's ninth row does; the pictures of the run are always those of its own row."""
    phases, used = ((1, {}), (2, {"decoder": "full"})), []
    options = {"lambda_dm": 0.0, "num_pairs": 5, "steps": 2, "phases": phases}
    active = prepare(get_workload(**train_options(sd, sd_pairs, tmp_path / "run", **options)))
    for name in ("vae", "tiny_vae"):
        decoder = getattr(active.teacher.sd, name)
        decoder.register_forward_hook(lambda *_, name=name: used.append(name))
    for step in range(2):
        train.training_step(active, step)
    train.pictures(active)
    assert used == ["tiny_vae"] * 2 + ["vae"] * 2 + ["tiny_vae"] * 3


def test_half_precision_is_the_teachers_alone(sd, sd_pairs, tmp_path):
    """With bf16, mu_real and the text encoder are halved; what learns stays float32, and so do the
    noise tables, the decoder and all that comes out of a denoiser."""
    scalars = {}
    for amp in ("off", "bf16"):
        config = get_workload(**train_options(sd, sd_pairs, tmp_path / amp, amp=amp))
        active = prepare(config)
        assert not torch.backends.cudnn.allow_tf32  # or the last convolution would not be float32
        scalars[amp] = torch.stack(train.training_step(active, 0))
    teacher = active.teacher
    for module, dtype in (
        (teacher.mu_real.net, torch.bfloat16), (teacher.sd.text_encoder, torch.bfloat16),
        (active.G.network, torch.float32), (active.mu_fake.network, torch.float32),
        (teacher.sd.tiny_vae, torch.float32),
    ):  # fmt: skip
        assert {p.dtype for p in module.parameters()} == {dtype}
    assert teacher.mu_real.sigma.dtype == teacher.mu_real.alpha.dtype == torch.float32
    with active.autocast(), torch.no_grad():
        assert teacher.mu_real(torch.zeros(1, *LATENT), torch.tensor([5]),
                               teacher.encode(["cat"])).dtype == torch.float32  # fmt: skip
    torch.testing.assert_close(scalars["bf16"], scalars["off"], rtol=0.3, atol=0)


def test_the_readmes_lines_for_diffusers(sd, sd_run, tmp_path):
    """In full, with our paths and the small model's size: they draw what our code draws."""
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason=f"{package} is an optional package")
    from diffusers import DDIMScheduler

    text = (ROOT / "docs/large-runs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    changes = {
        "runs/sd15/unet": str(sd_run / "unet"), "4, 64, 64": "4, 8, 8",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(tmp_path / "pipe"),
    }  # fmt: skip
    for one, other in changes.items():
        assert one in code
        code = code.replace(one, other)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = tmp_path / "pipe"
    shutil.copytree(sd, pipe)
    parts = {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler",
        "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
    }  # fmt: skip
    scheduler = DDIMScheduler(**schedule, clip_sample=False, steps_offset=1)
    scheduler.save_pretrained(pipe / "scheduler")
    tokens = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
    (pipe / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokens))
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    for name, kind in parts.items():
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, kind]
    index |= {name: [None, None] for name in ("safety_checker", "feature_extractor")}
    (pipe / "model_index.json").write_text(json.dumps(index))
    names = {"__name__": "snippet"}
    exec(code, names)
    G, _ = load_generator(sd_run / "generator.safetensors")
    ours = load_sd(str(sd), ["text_encoder", "vae"])
    text = ours.encode_text(["a red bicycle"])
    with torch.no_grad():
        expected = ours.decode(G(names["z"], text), tiny=False)
    assert relative_error(names["image"], expected) < 1e-3


def test_the_generator_is_a_drop_in_unet(sd, sd_run, tmp_path):
    path = sd_run / "generator.safetensors"
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        names = set(file.keys())
    assert names == read_tensors(sd / "unet" / "diffusion_pytorch_model.safetensors")[0].keys()
    # In the place of the teacher's UNet, as diffusers would read it.
    (tmp_path / "unet").mkdir()
    shutil.copy(path, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    shutil.copy(sd / "unet" / "config.json", tmp_path / "unet")
    net, (G, metadata) = load_network("unet", tmp_path), load_generator(path)
    for name, value in G.mu.net.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    assert metadata["dataset"] == "sd15" and metadata["step"] == "2"


def test_diffusers_reads_the_generator(sd, sd_run, tmp_path):
    """The file under the UNet's name in a folder of diffusers' gives the same one-step sample."""
    diffusers = pytest.importorskip("diffusers")
    shutil.copy(sd / "unet" / "config.json", tmp_path)
    target = tmp_path / "diffusion_pytorch_model.safetensors"
    shutil.copy(sd_run / "generator.safetensors", target)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    (G, _), z = (
        load_generator(sd_run / "generator.safetensors"),
        sample_noise("pairs", 3, [0, 1], LATENT),
    )
    text, t = load_sd(sd).encode_text(PROMPTS), torch.tensor([999, 999])
    scheduler = diffusers.DDPMScheduler.from_pretrained(sd / "scheduler")
    with torch.no_grad():
        eps = theirs(z, t, text).sample
        alpha_squared = scheduler.alphas_cumprod[999]
        expected = (z - (1 - alpha_squared).sqrt() * eps) / alpha_squared.sqrt()
        assert relative_error(G(z, text), expected) < 1e-4


def test_resume_is_exact(sd, sd_pairs, sd_run, tmp_path):
    for steps in (1, 2):
        train_to_the_end(train_options(sd, sd_pairs, tmp_path / "run", steps=steps))
    name = "samples_000002.png"
    assert (tmp_path / "run" / name).read_bytes() == (sd_run / name).read_bytes()
    one, two = (read_tensors(run / "generator.safetensors") for run in (sd_run, tmp_path / "run"))
    assert one[1] == two[1] and one[0].keys() == two[0].keys()
    assert all(torch.equal(value, two[0][name]) for name, value in one[0].items())


def test_pairs_of_another_teacher(sd, sd_pairs, tmp_path):
    shutil.copytree(sd, tmp_path / "other")
    shutil.copy(
        sd_pairs / "shard_00000.safetensors",
        tmp_path / "other" / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )  # is not read: the first name wins
    options = train_options(tmp_path / "other", sd_pairs, tmp_path / "run")
    prepare(get_workload(**options))  # the same files elsewhere: the same teacher
    path = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="were made with another teacher than"):
        prepare(get_workload(**options))


# --------------------------------------------------------------------------------------------------
# Sampling


def test_one_step_pictures_in_a_folder(sd, sd_run, tmp_path, capsys):
    options = sample_options(sd, checkpoint=str(sd_run), prompt=PROMPTS, out=str(tmp_path / "all"))
    sample.main(sample.Config(**options))
    assert "wrote " in (line := capsys.readouterr().out) and "/: 3 images of sd15 from" in line
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "000000.png", "000001.png", "000002.png"
    }  # fmt: skip
    # By hand: image 2 has the third noise and the first prompt.
    (G, _), parts = load_generator(sd_run / "generator.safetensors"), load_sd(sd)
    with torch.no_grad():
        x = G(sample_noise("samples", 0, [2], LATENT), parts.encode_text(PROMPTS[:1]))
        image = (parts.decode(x)[0] * 127.5 + 128).clamp(0, 255).byte()
    found = torch.frombuffer(
        bytearray(Image.open(tmp_path / "all" / "000002.png").tobytes()), dtype=torch.uint8
    )
    difference = found.reshape(64, 64, 3).int() - image.permute(1, 2, 0).int()
    assert difference.abs().max() <= 1
    assert not torch.equal(
        sample_noise("samples", 0, [0], LATENT), sample_noise("pairs", 0, [0], LATENT)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_others_unets_can_be_sampled(sd, tmp_path, dtype, monkeypatch):
    """A bare .bin under diffusers' names: of SD v1.5's size, or with its config.json beside it."""
    tensors = read_tensors(sd / "unet" / "diffusion_pytorch_model.safetensors")[0]
    path = tmp_path / "pytorch_model.bin"
    torch.save({name: value.to(dtype) for name, value in tensors.items()}, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds another architecture"):
        load_generator(path)  # 860 million parameters are expected
    shutil.copy(sd / "unet" / "config.json", tmp_path)
    options = sample_options(sd, checkpoint=str(path), prompt=["the cat"], amp="bf16", seeds="0,4")
    out = tmp_path / "x.png"
    sample.main(sample.Config(**options, out=str(out), decoder="tiny", teacher=True, steps=2))
    assert Image.open(out).size == (2 + 2 * 66, 2 + 2 * 66)
    G, metadata = load_generator(path)
    assert {p.dtype for p in G.parameters()} == {torch.float32} and metadata["dataset"] == "sd15"
    for name, value in G.mu.net.state_dict().items():
        assert torch.equal(value, tensors[name].to(dtype).float())


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written


def refused(monkeypatch, capsys, module, options):
    """Start a script in this process as by command -> its one line on stderr."""
    words = [str(word) for word in command(f"{module.__name__}.py", options)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        make, flags = getattr(module, "Config", get_workload), getattr(module, "FLAGS", None)
        run_script(module.main, make, module.__doc__, flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": "none.txt"}, "none.txt cannot be read as UTF-8 text, a prompt a line"),
        ({"prompts": "empty.txt"}, "empty.txt holds no prompt"),
        ({"prompts": "noise.gz"}, "noise.gz cannot be read as UTF-8 text"),
        ({"guidance": 0}, "--guidance must be above 0, not 0.0"),
        ({"steps": 1}, "--steps of sd15 must be 2 to 999, not 1"),
        ({"dataset": "mnist", "guidance": 3}, "--guidance is for sd15"),
        ({"teacher": "nowhere"}, "nowhere is neither a folder here nor a Hub repository"),
    ],
)
def test_bad_options_of_make_pairs(sd, tmp_path, monkeypatch, capsys, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "noise.gz").write_bytes(b"no gzip")
    options = pairs_options(sd, "pairs", **change)
    assert words in refused(monkeypatch, capsys, make_pairs, options)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "give --prompt"),
        ({"prompt": [" "]}, "give --prompt"),
        ({"prompt": list("abcd")}, "4 prompts need as many --seeds, not 3"),
        ({"prompt": ["cat"], "labels": "3"}, "no --labels; omit them"),
        ({"prompt": ["cat"], "teacher": True, "steps": 1}, "2 to 999"),
        ({"prompt": ["cat"], "guidance": 0}, "--guidance must be above 0"),
        ({"prompt": ["cat"], "out": "x.jpg"}, "--out must be a .png or a folder"),
        ({"prompt": ["cat"], "out": "x", "seeds": "0-2,1"}, "--seeds lists a seed twice"),
        ({"checkpoint": "cut.bin"}, "cut.bin is damaged or of another kind"),
        ({"checkpoint": "empty"}, "empty/generator.safetensors does not exist"),
    ],
)
def test_bad_options_of_sample(sd, sd_run, tmp_path, monkeypatch, capsys, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save({"down_blocks.0.resnets.0.conv1.weight": torch.ones(9)}, "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:-50])
    options = sample_options(sd, **{"checkpoint": sd_run, "out": "x.png", **change})
    assert words in refused(monkeypatch, capsys, sample, options)
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "x").exists()


def test_a_prompt_for_a_generator_of_digits(tmp_path, monkeypatch, capsys):
    options = {"prompt": ["cat"], "out": tmp_path / "x.png"}
    options["checkpoint"] = ASSETS / "mnist_generator.safetensors"
    line = refused(monkeypatch, capsys, sample, options)
    assert "--prompt is for sd15; this is a generator of mnist" in line


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("unet/diffusion_pytorch_model.safetensors", None, "holds none of unet/diffusion_pytorch"),
        ("tiny_vae/diffusion_pytorch_model.safetensors", None, "holds none of tiny_vae/diff"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"},
         "prediction_type = 'v_prediction' is not supported, only 'epsilon'"),
    ],
)  # fmt: skip
def test_incomplete_or_other_models(sd, tmp_path, monkeypatch, capsys, file, change, words):
    folder = tmp_path / "model"
    shutil.copytree(sd, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change:
        (folder / file).write_text(json.dumps(json.loads(content) | change))
    line = refused(monkeypatch, capsys, make_pairs, pairs_options(folder, tmp_path / "pairs"))
    assert words in line and not (tmp_path / "pairs").exists()


@pytest.mark.slow
def test_without_network_and_cache_the_missing_file_is_named(sd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    arguments = ["--dataset", "sd15", "--prompts", sd / "prompts.txt"]
    result = run("make_pairs.py", *arguments, cwd=tmp_path)
    fails_in_one_line(
        result, "stable-diffusion-v1-5/stable-diffusion-v1-5 holds none of scheduler/"
    )
    assert not (tmp_path / "pairs").exists()


def test_prompts_that_are_cut_are_told_of_once(sd, tmp_path, capsys, recwarn):
    """By make_pairs.py their number and an example, by sample.py each; train.py says nothing."""
    prompts = ["cat " * 75 + end for end in ("dog dog", "the dog", "")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    pairs = tmp_path / "pairs"
    options = pairs_options(sd, pairs, prompts=str(tmp_path / "prompts.txt"), num_pairs=9)
    make_pairs.main(pairs_config(**options))
    said = "2 prompts were too long, and their ends are cut off: 'dog dog', for example"
    assert capsys.readouterr().out.splitlines()[:-1] == [said]

    train_to_the_end(train_options(sd, pairs, tmp_path / "run"))
    out, error = capsys.readouterr()
    assert "too long" not in out + error and not recwarn.list

    options = sample_options(sd, checkpoint=str(tmp_path / "run"), prompt=prompts)
    sample.main(sample.Config(**options, out=str(tmp_path / "x.png"), teacher=True, steps=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("'")[1] for line in lines if "is cut off" in line] == ["dog dog", "the dog"]
