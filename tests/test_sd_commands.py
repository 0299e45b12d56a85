"""Stable Diffusion from prompts to one-step pictures, with scaled-down networks of its structure.

The networks lie on disk in the released files' layout and are read by the real loader. The scripts
run in this process with the words of a command line, except where two ranks share the work.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import shutil
import signal
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, run_on_two_ranks, start
from golden.networks import relative_error
from PIL import Image
from safetensors import safe_open
from test_sd_loader import write_sd

import evaluate
import make_pairs
import sample
import train
from plumbing import rundir
from plumbing.devices import join_ranks
from plumbing.files import read_tensors, write_tensors
from plumbing.options import UserError, run_script
from plumbing.pairs import Pairs, read_prompts, sample_noise
from plumbing.rundir import SCALARS
from sd_loader import GuidedUNet, SDDenoiser, load_network, load_sd, pndm_sample
from teachers import load_generator
from workloads import ASSETS, get_workload

PROMPTS = ["the cat", "a dog's hat"]
LATENT = (4, 8, 8)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A folder like stable-diffusion-v1-5's with latents of 8x8, two prompts, five captions."""
    folder = write_sd(tmp_path_factory.mktemp("sd") / "model")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": LATENT[-1]}))
    prompts = "\n".join(["", PROMPTS[0], "  a  dog's\that ", ""])
    (folder / "prompts.txt.gz").write_bytes(gzip.compress(prompts.encode()))
    (folder / "captions.txt").write_text("a cat\na dog\n\na hat\nthe cat\nthe dog's hat\n")
    return folder


def pairs_options(sd, out, **options):
    return {
        "dataset": "sd15", "teacher": sd, "prompts": sd / "prompts.txt.gz", "num_pairs": 5,
        "shard_size": 3, "batch_size": 2, "steps": 4, "device": "cpu", "out": out, **options,
    }  # fmt: skip


def train_options(sd, pairs, out, **options):
    return {
        "dataset": "sd15", "teacher": str(sd), "pairs": str(pairs), "out": str(out), "steps": 2,
        "batch_size": 3, "batch_size_ref": 2, "distance": "l2", "device": "cpu", "amp": "off",
        **options,
    }  # fmt: skip


def sample_options(sd, **options):
    return {"teacher_weights": sd, "device": "cpu", "seeds": "0-2", **options}


def evaluate_options(sd, **options):
    captions = sd / "captions.txt"
    return {"teacher_weights": sd, "device": "cpu", "captions": captions, **options}


def call(module, options, fails=False):
    """Run a script in this process -> what it prints, or the one line by which it fails."""
    words = [module.__name__]
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    make, flags = getattr(module, "Config", get_workload), getattr(module, "FLAGS", None)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sys, "argv", words)
        patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C remains pytest's
        patch.setattr(rundir, "draw_curves", lambda *_: None)  # half a second each
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        error = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        end = stack.enter_context(pytest.raises(SystemExit)) if fails else None
        run_script(module.main, make, module.__doc__, flags)
    if not fails:
        return out.getvalue()
    (line,) = error.getvalue().strip().splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    return line


def prepare(sd, pairs, out, **options):
    """A Run as train.main prepares it."""
    options = train_options(sd, pairs, out, **options)
    return start(get_workload(**options), join_ranks("cpu"))


@pytest.fixture(scope="module")
def sd_pairs(sd, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "sd15"
    call(make_pairs, pairs_options(sd, out))
    return out


@pytest.fixture(scope="module")
def sd_run(sd, sd_pairs, tmp_path_factory):
    """Two steps, saved after each, in runs/sd15 of a folder."""
    out = tmp_path_factory.mktemp("training") / "runs" / "sd15"
    call(train, train_options(sd, sd_pairs, out, save_every=1))
    return out


def test_from_prompts_to_pictures(sd, sd_pairs, sd_run, monkeypatch):
    assert Image.open(sd_pairs / "preview.png").mode == "RGB"
    with open(sd_run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(float(row[name]) > 0 for row in rows for name in SCALARS)

    monkeypatch.chdir(sd_run.parent.parent)  # sample.py finds the run by itself
    options = sample_options(sd, prompt=PROMPTS, teacher=True, steps=3, seeds="0-3", columns=2)
    lines = call(sample, options).splitlines()
    assert "teacher, 8 evaluations" in lines[0] and "student, 1 evaluation" in lines[0]
    assert lines[-1] == (
        "wrote samples.png: 4 images of sd15 from runs/sd15/generator.safetensors (step 2), "
        f"guidance 3.0, text encoder and decoder of {sd}, teacher above student"
    )
    assert Image.open("samples.png").size == (2 + 2 * 66, 2 + 4 * 66)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_pairs_keep_their_prompts_and_are_guided(sd, sd_pairs, tmp_path, guidance):
    folder = sd_pairs
    if guidance != 3:
        folder = tmp_path / "pairs"
        options = pairs_options(sd, folder, guidance=guidance)
        assert call(make_pairs, options).splitlines()[-1].startswith("5 pairs of sd15 in ")
        options |= {"guidance": 2.0, "prompts": ASSETS / "prompts.txt"}
        assert "another guidance, prompts;" in call(make_pairs, options, fails=True)
    pairs = Pairs(folder, "sd15")
    assert pairs.meta["guidance"] == guidance and pairs.prompts(range(5)) == (PROMPTS * 3)[:5]
    tensors, _ = read_tensors(folder / "shard_00001.safetensors")
    assert (tensors["z"].dtype, tensors["y"].dtype) == (torch.float32, torch.float16)

    z, y, prompts = pairs.batch([4, 1])
    assert prompts == PROMPTS and y.dtype == torch.float32
    torch.testing.assert_close(z, sample_noise("pairs", 0, [4, 1], LATENT), rtol=0, atol=0)
    parts = load_sd(sd)
    shutil.copytree(folder, tmp_path / "older")  # with the prompts in the metadata
    for path in (tmp_path / "older").glob("shard_*"):
        tensors, metadata = read_tensors(path)
        lines = bytes(tensors.pop("prompts").numpy()).decode().split("\n")
        write_tensors(path, tensors, metadata | {"prompts": lines})
    assert Pairs(tmp_path / "older", "sd15").prompts(range(5)) == (PROMPTS * 3)[:5]
    guided = GuidedUNet(parts.unet, parts.encode_text([""]), guidance)
    expected = pndm_sample(guided, z, parts.encode_text(prompts), steps=4)
    assert relative_error(y, expected) < 1e-3  # float16


def test_prompts_of_our_own():
    prompts = read_prompts(ASSETS / "prompts.txt")
    assert len(prompts) == len(set(prompts)) >= 100
    assert all(10 < len(prompt) < 90 and prompt == prompt.strip() for prompt in prompts)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("opener", [open, gzip.open])
def test_a_caption_may_hold_other_line_breaks(tmp_path, opener, newline):
    """Pair k has line k: only a newline ends it, and blank lines do not count."""
    captions = [f"a{c}cat{c}" for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    path = tmp_path / ("captions.txt" if opener is open else "captions.txt.gz")
    with opener(path, "wb") as file:
        file.write(("\ufeff" + newline.join(["", *captions, " \t", "a dog"])).encode())
    assert read_prompts(path) == ["a cat"] * len(captions) + ["a dog"]


def test_kl_sees_both_halves_and_a_guided_teacher(sd, sd_pairs, tmp_path, monkeypatch):
    """Line 4 of Algorithm 1, x <- concat(x, x_ref); the regression compares decoded images. Before
    training, G is the teacher's one step and mu_fake the teacher, both without guidance."""
    kl = Mock(wraps=train.distribution_matching_loss)
    regression = Mock(wraps=train.regression_loss)
    monkeypatch.setattr(train, "distribution_matching_loss", kl)
    monkeypatch.setattr(train, "regression_loss", regression)
    active = prepare(sd, sd_pairs, tmp_path / "run", learning_rate=0.0)
    for net in (active.G.network.mu.net, active.mu_fake.network.net):
        assert net.gradient_checkpointing
        assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, True)}
    shared = {p.data_ptr() for p in active.G.network.parameters()}
    for other in (active.mu_fake.network, active.teacher.mu_real):
        assert not shared & {p.data_ptr() for p in other.parameters()}
    scalars = train.training_step(active, 0)
    assert all(value.isfinite() and value > 0 for value in scalars)

    batch, parts = train.draw_batch(active, 0, range(3), range(2)), load_sd(sd)
    (mu_real, mu_fake, x, text), options = kl.call_args
    x_t, t = options["noise"], options["t"]
    assert x.shape == x_t.shape == (3 + 2, *LATENT) and t.shape == (5,)
    assert torch.equal(text, batch.cond)
    mu, guided = SDDenoiser(parts.unet), GuidedUNet(parts.unet, parts.encode_text([""]), 3.0)
    z, last = torch.cat([batch.z, batch.z_ref]), torch.full((5,), 999)
    with torch.no_grad():
        for found, expected in (
            (x, mu(z, last, text)),
            (mu_real(x_t, t, text), SDDenoiser(guided)(x_t, t, text)),
            (mu_fake(x_t, t, text), mu(x_t, t, text)),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        y_ref = active.teacher.decode(batch.y_ref)
    (images, images_ref, _), _ = regression.call_args
    assert images.shape == (2, 3, 64, 64) and torch.equal(images_ref, y_ref)


def test_a_phase_changes_the_decoder(sd, sd_pairs, tmp_path):
    """As in the ninth row of Table 5. The pictures of the run keep the decoder of its own row."""
    phases, used = ((1, {}), (2, {"decoder": "full"})), []
    active = prepare(sd, sd_pairs, tmp_path / "run", lambda_dm=0.0, num_pairs=5, phases=phases)
    for name in ("vae", "tiny_vae"):
        decoder = getattr(active.teacher.sd, name)
        decoder.register_forward_hook(lambda *_, name=name: used.append(name))
    for step in range(2):
        loss_kl, loss_reg, *_ = train.training_step(active, step)
        assert loss_kl == 0 and loss_reg.isfinite() and loss_reg > 0
    train.pictures(active)
    assert used == ["tiny_vae"] * 2 + ["vae"] * 2 + ["tiny_vae"] * 3


def test_half_precision_is_the_teachers_alone(sd, sd_pairs, tmp_path):
    """With bf16, mu_real and the text encoder are in half precision. What learns stays float32, and
    so do the noise tables, the decoder and all outputs of a denoiser."""
    scalars = {}
    for amp in ("off", "bf16"):
        active = prepare(sd, sd_pairs, tmp_path / amp, amp=amp)
        assert torch.backends.cudnn.allow_tf32 == (amp != "off")  # float32 is float32
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
        text = teacher.encode(["cat"])
        x = teacher.mu_real(torch.zeros(1, *LATENT), torch.tensor([5]), text)
    assert x.dtype == text.dtype == torch.float32
    torch.testing.assert_close(scalars["bf16"], scalars["off"], rtol=0.3, atol=0)


def test_the_readmes_lines_for_diffusers(sd, sd_run, tmp_path):
    """In full, with our paths and the small model's size: they draw what our code draws."""
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason=f"{package} is an optional package")
    from diffusers import DDIMScheduler

    text = (ROOT / "docs/large-runs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pipe = shutil.copytree(sd, tmp_path / "pipe")
    changes = {
        "runs/sd15/unet": str(sd_run / "unet"), "4, 64, 64": "4, 8, 8",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(pipe),
    }  # fmt: skip
    for one, other in changes.items():
        assert one in code
        code = code.replace(one, other)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, steps_offset=1)
    scheduler.save_pretrained(pipe / "scheduler")
    tokens = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
    (pipe / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokens))
    index = {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    (pipe / "model_index.json").write_text(json.dumps(index))
    names = {"__name__": "snippet"}
    exec(code, names)
    G, _ = load_generator(sd_run / "generator.safetensors")
    ours = load_sd(sd, ["text_encoder", "vae"])
    with torch.no_grad():
        expected = ours.decode(G(names["z"], ours.encode_text(["a red bicycle"])))
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
    (G, metadata), found = load_generator(path), load_network("unet", tmp_path).state_dict()
    for name, value in G.mu.net.state_dict().items():
        assert torch.equal(found[name], value)
    assert metadata["dataset"] == "sd15" and metadata["step"] == "2"


def test_one_step_pictures_in_a_folder(sd, sd_run, tmp_path):
    out = tmp_path / "all"
    said = call(sample, sample_options(sd, checkpoint=sd_run, prompt=PROMPTS, out=out))
    assert f"wrote {out}/: 3 images of sd15 from" in said
    assert {path.name for path in out.iterdir()} == {f"00000{k}.png" for k in range(3)}
    # By hand: image 2 has the third noise and the first prompt.
    (G, _), parts = load_generator(sd_run / "generator.safetensors"), load_sd(sd)
    z = sample_noise("samples", 0, [0, 2], LATENT)
    with torch.no_grad():
        x = G(z[1:], parts.encode_text(PROMPTS[:1]))
        image = (parts.decode(x)[0] * 127.5 + 128).clamp(0, 255).byte()
    found = torch.from_numpy(np.array(Image.open(out / "000002.png")))
    assert (found.int() - image.permute(1, 2, 0).int()).abs().max() <= 1
    assert not torch.equal(z[:1], sample_noise("pairs", 0, [0], LATENT))


@pytest.fixture(scope="module")
def others(sd, sd_run, tmp_path_factory):
    """The run's generator as if distilled with guidance 5; its teacher, moved; another teacher."""
    folder = tmp_path_factory.mktemp("others")
    tensors, metadata = read_tensors(sd_run / "generator.safetensors")
    assert metadata["teacher"] == str(sd) and metadata["guidance"] == 3
    generator = folder / "generator.safetensors"
    write_tensors(generator, tensors, metadata | {"guidance": 5.0})
    moved, another = (shutil.copytree(sd, folder / name) for name in ("moved", "another"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    (another / weights).write_bytes((sd / weights).read_bytes()[:-4] + bytes(4))
    # This file is not read, because the first name wins.
    shutil.copy(generator, (moved / weights).with_suffix(".fp16.safetensors"))
    return generator, moved, another


def test_pairs_of_another_teacher(others, sd_pairs, tmp_path):
    _, moved, another = others
    prepare(moved, sd_pairs, tmp_path / "run")
    with pytest.raises(UserError, match="were made with another teacher than"):
        prepare(another, sd_pairs, tmp_path / "run")


@pytest.mark.parametrize(("given", "options", "said"), [
    (None, {}, ""), ("moved", {}, "from another teacher than {given}: {sd}"),
    (None, {"teacher": True}, "guidance 5.0"), ("moved", {"teacher": True}, ""),
    ("another", {"teacher": True}, "from another teacher than {given}: "),
    (None, {"teacher": True, "guidance": 2.0}, "guidance 5.0"),
])  # fmt: skip
def test_a_generator_remembers_its_teacher(sd, others, tmp_path, monkeypatch, given, options, said):
    """Source and guidance are defaults. Others are printed: by the UNet's hash, if it is loaded."""
    monkeypatch.setattr(sample, "load_teacher", load := Mock(wraps=sample.load_teacher))
    where = others[0].with_name(given) if given else sd
    options = {"prompt": "the cat", "device": "cpu", "seeds": "1", "out": tmp_path / "x"} | options
    options |= {"steps": 2} if "teacher" in options else {}
    options |= {"teacher_weights": where} if given else {}
    last = call(sample, {"checkpoint": others[0], **options}).splitlines()[-1]
    workload = load.call_args[0][0]
    assert (workload.teacher, workload.guidance) == (str(where), options.get("guidance", 5.0))
    assert f"text encoder and decoder of {where}" in last
    assert said.format(given=where, sd=sd) in last and ("distilled" in last) == ("from" in said)


def test_the_evaluation_uses_the_remembered_teacher(sd, others, tmp_path):
    """A teacher that has changed in its place is refused."""
    options = {"checkpoint": others[0], "captions": sd / "captions.txt", "samples": 2, "steps": 2}
    options |= {"device": "cpu", "out": tmp_path, "json": tmp_path / "n.json"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "latency", lambda draw: 0)
        said = call(evaluate, options | {"rows": ["student", "teacher"]})
    assert f"guidance 5.0, text encoder and decoder of {sd}: " in said and "guidance 5:" in said
    assert json.loads((tmp_path / "n.json").read_text())["student"]["encoder"] == str(sd)
    tensors, metadata = read_tensors(others[0])
    for change, words in (
        ({"teacher": str(others[2])}, "from another teacher than"), ({"kwargs": "3"}, "damaged"),
        ({"guidance": [5]}, "damaged"), ({"dataset": "mnist"}, "not a one-step generator"),
        ({"kwargs": json.dumps(json.loads(metadata["kwargs"]) | {"sample_size": "8"})}, "like 64"),
    ):  # fmt: skip
        write_tensors(tmp_path / "other.safetensors", tensors, metadata | change)
        how = {"checkpoint": tmp_path / "other.safetensors", "rows": ["teacher", "student"]}
        assert words in call(evaluate, options | how, fails=True)


def test_others_unets_can_be_sampled(sd, tmp_path):
    """A .bin under diffusers' names: of SD v1.5's size, or with its config.json beside it."""
    tensors = read_tensors(sd / "unet" / "diffusion_pytorch_model.safetensors")[0]
    tensors = {name: value.half() for name, value in tensors.items()}
    path, out = tmp_path / "pytorch_model.bin", tmp_path / "x.png"
    torch.save(tensors, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds another architecture"):
        load_generator(path)  # 860 million parameters are expected
    shutil.copy(sd / "unet" / "config.json", tmp_path)
    options = {"checkpoint": path, "prompt": ["the cat"], "amp": "bf16", "seeds": "0,4", "out": out}
    options |= {"decoder": "tiny", "teacher": True, "steps": 2}
    call(sample, sample_options(sd, **options))
    assert Image.open(out).size == (2 + 2 * 66, 2 + 2 * 66)
    G, metadata = load_generator(path)
    assert metadata["dataset"] == "sd15"
    for name, value in G.mu.net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, tensors[name].float())


@pytest.fixture(scope="module")
def pictures(sd, sd_run, tmp_path_factory):
    """The folder of student's and teacher's pictures, what was printed, and the options."""
    folder = tmp_path_factory.mktemp("captions")
    options = evaluate_options(
        sd, checkpoint=sd_run, rows=["student", "teacher"], guidance=2.0, steps=2, batch_size=2,
        out=folder / "pictures", json=folder / "numbers.json",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "latency", lambda draw: 1.5 if draw().shape[0] == 1 else 0)
        return options["out"], call(evaluate, options), options


def difference(one, two):
    """The largest difference between two pictures' pixels; another batch size rounds otherwise."""
    return np.abs(np.asarray(Image.open(one), int) - np.asarray(Image.open(two), int)).max()


def test_pictures_of_captions(pictures, tmp_path, monkeypatch):
    folder, said, options = pictures
    lines = [line for line in said.splitlines() if "ms per image" in line]
    assert lines == [f"{row}: 1.5 ms per image (batch 1) (5 images)" for row in options["rows"]]
    found = json.loads(options["json"].read_text())
    assert found["teacher"]["evaluations"] == 6 and "guidance 2" in found["teacher"]["source"]
    files = sorted(folder.glob("*/*.png"))
    assert len({path.read_bytes() for path in files}) == 10
    assert Image.open(folder / "teacher.png").size == (5 * 258 + 2, 260)
    assert Image.open(folder / "student/000003.png").size == (64, 64)

    # A picture is a function of (seed, k, caption): alone, and after an interruption, the same.
    again = shutil.copytree(folder, tmp_path / "again")
    for path in files[::3]:
        (again / path.relative_to(folder)).unlink()
    monkeypatch.setattr(evaluate, "latency", lambda draw: 0)
    call(evaluate, options | {"batch_size": 1, "out": again})
    assert all(difference(path, again / path.relative_to(folder)) <= 1 for path in files)
    line = call(evaluate, options | {"seed": 1}, fails=True)
    assert "made with another seed;" in line


@pytest.mark.slow
def test_two_ranks_draw_what_one_does(pictures, sd, sd_run, tmp_path):
    """In processes of their own; rank 0 alone measures and prints."""
    options = evaluate_options(sd, checkpoint=sd_run, batch_size=1, samples=5, out=tmp_path)
    words = [w for name, value in options.items() for w in ("--" + name.replace("_", "-"), value)]
    result = run_on_two_ranks("evaluate.py", *words)
    assert result.returncode == 0, result.stderr
    for said in ("ms per image (batch 1) (5 images)", "wrote"):
        assert result.stdout.count(said) == 1
    for k in range(5):
        one, two = (f / "student" / f"{k:06d}.png" for f in (pictures[0], options["out"]))
        assert difference(one, two) <= 1


@pytest.mark.parametrize(("module", "change", "said"), [
    (make_pairs, {"prompts": "none.txt"}, "none.txt does not exist"),
    (make_pairs, {"prompts": "empty.txt"}, "empty.txt holds no prompt"),
    (make_pairs, {"prompts": "noise.gz"}, "noise.gz is no UTF-8 text"),
    (make_pairs, {"guidance": 0}, "--guidance must be above 0, not 0.0"),
    (make_pairs, {"steps": 1}, "--steps of sd15 must be 2 to 999, not 1"),
    (make_pairs, {"dataset": "mnist", "guidance": 3}, "--guidance is for sd15"),
    (make_pairs, {"teacher": "nowhere"}, "nowhere is neither a local folder nor a Hub"),
    (make_pairs, {"teacher": "empty"}, "empty holds none of scheduler/scheduler_config.json"),
    (sample, {}, "give --prompt"),
    (sample, {"prompt": [" "]}, "give --prompt"),
    (sample, {"prompt": list("abcd")}, "4 prompts need as many --seeds, not 3"),
    (sample, {"prompt": ["cat"], "labels": "3"}, "no --labels; omit them"),
    (sample, {"prompt": ["cat"], "teacher": True, "steps": 1}, "2 to 999"),
    (sample, {"prompt": ["cat"], "guidance": 0}, "--guidance must be above 0"),
    (sample, {"prompt": ["cat"], "out": "x.jpg"}, "--out must be a .png or a folder"),
    (sample, {"prompt": ["cat"], "out": "x", "seeds": "0-2,1"}, "--seeds lists a seed twice"),
    (sample, {"checkpoint": "cut.bin"}, "cut.bin is damaged or of another kind"),
    (sample, {"checkpoint": "empty"}, "empty/generator.safetensors does not exist"),
    (sample, {"prompt": ["cat"], "checkpoint": ASSETS / "mnist_generator.safetensors"},
     "--prompt is for sd15; this is a generator of mnist"),
    (evaluate, {"samples": 6}, "holds 5 captions, not 6"),
    (evaluate, {"reference": "empty"}, "holds 0 images"),
    (evaluate, {"rows": ["untrained"]}, "not untrained"),
    (evaluate, {"captions": None}, "give a file of --captions"),
    (evaluate, {"dataset": "mnist", "checkpoint": None}, "--captions is for text-to-image"),
    (evaluate, {"reference": "real"}, "pip install clean-fid"),
    (evaluate, {"clip_score": True}, "pip install open_clip"),
])  # fmt: skip
def test_bad_options(sd, sd_run, tmp_path, monkeypatch, module, change, said):
    monkeypatch.chdir(tmp_path)
    for name in ("cleanfid", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr(evaluate, "load_teacher", None)  # evaluate.py notices all before it loads
    for name in ("empty", "real"):
        (tmp_path / name).mkdir()
    for name in "ab":
        Image.new("RGB", (9, 9)).save(f"real/{name}.png")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "noise.gz").write_bytes(b"no gzip")
    torch.save({"down_blocks.0.resnets.0.conv1.weight": torch.ones(9)}, "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:-50])
    options = {
        make_pairs: pairs_options(sd, "x"),
        sample: sample_options(sd, checkpoint=sd_run, out="x.png"),
        evaluate: evaluate_options(sd, checkpoint=sd_run, out="x"),
    }[module]
    given = {name: value for name, value in (options | change).items() if value is not None}
    assert said in call(module, given, fails=True)
    assert not list(tmp_path.glob("x*"))


def test_without_network_and_cache_the_missing_file_is_named(sd, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = pairs_options(sd, tmp_path / "pairs")
    del options["teacher"]
    line = call(make_pairs, options, fails=True)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5 is not a local folder" in line
    assert "gives none of scheduler/" in line and not (tmp_path / "pairs").exists()


def test_prompts_that_are_cut_are_reported_once(sd, sd_run, tmp_path, capsys, recwarn):
    """By make_pairs.py, like those used more than once, and by sample.py; not by train.py."""
    prompts = ["cat " * 75 + end for end in ("dog dog", "the dog", "")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = {"prompts": tmp_path / "prompts.txt", "num_pairs": 6, "steps": 2}
    few, said, _ = call(make_pairs, pairs_options(sd, tmp_path / "pairs", **options)).splitlines()
    assert few == "6 pairs share 3 prompts; --prompts gives others"
    assert said.startswith("2 prompts were too long") and ": 'dog dog'" in said

    capsys.readouterr()
    train.training_step(prepare(sd, tmp_path / "pairs", tmp_path / "run"), 0)
    assert capsys.readouterr() == ("", "") and not recwarn.list

    options = sample_options(sd, checkpoint=sd_run, prompt=prompts, out=tmp_path / "x.png")
    lines = call(sample, options | {"teacher": True, "steps": 2}).splitlines()
    assert [line.split("'")[1] for line in lines if "cut off" in line] == ["dog dog", "the dog"]
