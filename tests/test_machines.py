"""Other people's machines: readers that have gone, missing homes, compilers and networks."""

import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, fails_in_one_line, pairs_config, tiny_config
from huggingface_hub.errors import LocalEntryNotFoundError

import evaluate
import make_pairs
import train
from assets.mnist import load_mnist
from plumbing import drawing, fid, rundir
from plumbing.downloads import fetch, find_on_hub
from plumbing.files import read_tensors
from plumbing.options import UserError
from teachers import load_lpips
from workloads import WORKLOADS

CPU = torch.device("cpu")


def broken(*_, **__):
    raise ValueError("broken\nhere")


def test_pictures_cost_no_run(small, tmp_path, monkeypatch, capsys):
    """None can be drawn: one line each, and everything else is written."""
    monkeypatch.setattr(rundir, "draw_curves", drawing.draw_curves)  # see conftest.py
    for module, name in (
        (rundir, "save_grid"), (rundir, "write_film"), (drawing, "write_figure"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, broken)
    train.main(tiny_config(small, tmp_path, steps=2, save_every=1))
    assert read_tensors(tmp_path / "generator.safetensors")[1]["step"] == "2"
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
    names = [f"samples_{k:06d}.png" for k in range(3)]
    names = [names[0], "curves.png", names[1], "curves.png", names[2], "training.gif"]
    assert lines == [f"{name} cannot be written (ValueError: broken here)" for name in names]


def test_a_preview_costs_no_pairs(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_pairs, "save_grid", broken)
    options = {"teacher": small["teacher"], "num_pairs": 2, "steps": 1, "device": "cpu"}
    make_pairs.main(pairs_config(out=tmp_path, **options))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "preview.png cannot be written (ValueError: broken here)"
    assert said[1].startswith("2 pairs of mnist in ")


def test_unet_folder_costs_no_run(tmp_path, capsys):
    (tmp_path / "unet").touch()  # in place of the folder
    rundir.save_unet_folder(tmp_path, {})
    assert capsys.readouterr().out.startswith("unet/ cannot be written (UserError: ")


PRINTS = """
import dataclasses, sys, tqdm
from plumbing.options import Options, run_script

@dataclasses.dataclass
class Config(Options):
    pass

def main(config):
    for _ in tqdm.tqdm(range(3), mininterval=0, desc="\U0001f408"):
        print("\U0001f408 \\udc80")
        tqdm.tqdm.write("\U0001f408" * 10_000)
    open("done", "x").close()

run_script(main, Config, "")
"""


def test_printing_ends_no_work(tmp_path):
    """To closed streams, a full disk, readers that have gone, and in an alphabet without cats."""
    processes = {}
    for to in (">&-", "2>&-", "> /dev/full", "| true", "2>&1 | true", "> said"):
        folder = tmp_path / str(len(processes))
        folder.mkdir()
        (folder / "script.py").write_text(PRINTS, encoding="utf-8")
        command = ["bash", "-c", f"{sys.executable} script.py {to}; exit ${{PIPESTATUS[0]}}"]
        about = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
        about["PYTHONUNBUFFERED"] = "1" if "2" in to else ""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes[to] = folder, subprocess.Popen(command, cwd=folder, env=about, **streams)
    for to, (folder, process) in processes.items():
        _, said = process.communicate()
        assert (process.returncode, (folder / "done").exists()) == (0, True), (to, said)
        assert b"Error" not in said, to
    assert (folder / "said").read_text("cp1252").startswith("\\U0001f408 \\udc80\n")


# --------------------------------------------------------------------------------------------------
# Networks, homes, compilers


class LostConnection(Exception):
    """No OSError, like those of the Hub's client."""


def of_the_hub(cause: Exception) -> Exception:
    """What the Hub's client raises for an answer that is neither the file nor 401 nor 404."""
    error = LocalEntryNotFoundError("please check your connection")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LostConnection("received 5 of\n9 bytes"), "the Hub says: received 5 of 9 bytes; check"),
        (LostConnection(), "the Hub says: LostConnection(); check"),
        (
            of_the_hub(OSError("503 Unavailable")),
            "the Hub gives none of one, two (503 Unavailable); check",
        ),
        (
            of_the_hub(OSError("429 Too Many")),
            "the Hub gives none of one, two (429 Too Many); check",
        ),
    ],
)
def test_a_hub_that_fails(monkeypatch, error, said):
    asked = []

    def download(repo, name, local_files_only):
        asked.append(local_files_only)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError) as caught:
        find_on_hub("owner/name", ["one", "two"])
    assert said in str(caught.value) and "or try later" in str(caught.value)
    assert asked in ([False], [False, True])  # one wait for the network


@pytest.mark.parametrize(
    "load",
    [
        lambda: fetch("https://example.com/weights.pkl"),
        lambda: find_on_hub("owner/name", ["file"]),
        lambda: fid.inception(CPU),
        lambda: load_lpips(CPU),
    ],
    ids=["address", "hub", "inception", "lpips"],
)
def test_a_user_without_a_home(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "DMD_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a number that /etc/passwd lacks
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(UserError, match=r"no home folder; set HOME, .* DMD_CACHE, HF_HOME and"):
        load()
    assert not os.listdir(tmp_path)  # no folder called ~


def test_compile_without_a_compiler(small, tmp_path, run_here, monkeypatch):
    import torch._inductor.config  # takes seconds

    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/compiler"))
    words = ["--teacher", small["teacher"], "--pairs", small["pairs"], "--device", "cpu"]
    result = run_here("train.py", "--compile", *words, "--out", tmp_path / "run")
    fails_in_one_line(result, "--compile cannot be used; install a C++ compiler", "/no/compiler")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("change", [{"clip_score": True}, {"reference": "images"}])
def test_judges_are_loaded_before_pictures_are_drawn(tmp_path, monkeypatch, change):
    (tmp_path / "captions.txt").write_text("a cat\na dog")
    stand_in = SimpleNamespace(
        create_model_and_transforms=broken, build_feature_extractor=broken, __path__=[]
    )
    for name in ("open_clip", "cleanfid", "cleanfid.fid"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(fid, "list_images", lambda folder: [])
    config = evaluate.Config(captions=str(tmp_path / "captions.txt"), **change)
    with pytest.raises(UserError, match=r"cannot be loaded; see cause .*broken"):
        evaluate.complete(config, WORKLOADS["sd15"], CPU)


def test_web_pages_in_place_of_mnist(tmp_path):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"MNIST/raw/{name}-ubyte").write_text("<html>Forbidden</html>")
    with pytest.raises(UserError, match=r"put MNIST's four files into .*/MNIST/raw: those there"):
        load_mnist(str(tmp_path), train=True)
