"""make_pairs.py: the pairs are the ODE's solutions; neither interruptions nor ranks change them."""

import shutil

import pytest
import torch
from conftest import files, flags, kill_in_write, pairs_config, run_on_two_ranks

import make_pairs
from edm_unet import heun_sample
from plumbing.files import read_tensors, write_tensors
from plumbing.options import UserError
from plumbing.pairs import Pairs, sample_noise
from teachers import load_teacher
from workloads import get_workload


def test_pairs_are_the_teachers_ode_solutions(pairs):
    teacher = load_teacher(get_workload())
    opened = Pairs(pairs, "mnist")
    opened.check_teacher(teacher.record)
    z, y, cond = opened.batch([17, 3, 8])
    assert len(opened) == 20 and cond.tolist() == [7, 3, 8]
    torch.testing.assert_close(z, sample_noise("pairs", 0, [17, 3, 8], (1, 28, 28)), rtol=0, atol=0)
    # Another batch size and another order give the same samples up to rounding.
    expected = heun_sample(teacher.mu_real.net, z, cond, steps=6)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(teacher.solve(z, cond, 6), expected)


def test_noise_is_drawn_again(pairs, tmp_path):
    """A shard holds that of its first pair, as a check. In older folders it holds that of all."""
    indices, folder = range(20), shutil.copytree(pairs, tmp_path / "pairs")
    expected = Pairs(pairs, "mnist").batch(indices)
    for i, path in enumerate(sorted(folder.glob("shard_*"))):
        tensors, metadata = read_tensors(path)
        assert len(tensors["z"]) == 1
        if i == 1:
            tensors["z"] = expected[0][8:16]
        write_tensors(path, tensors, metadata)
    for found, wanted in zip(Pairs(folder, "mnist").batch(indices), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    write_tensors(path, tensors | {"z": -tensors["z"]}, metadata)
    with pytest.raises(UserError, match=r"shard_00002.* NumPy draws other noise"):
        Pairs(folder, "mnist").batch(indices)


def test_interrupted_pairs_and_those_of_two_ranks_are_the_same_files(small, tmp_path):
    """Byte by byte: at one go, killed in the third shard and resumed, and in two processes."""
    options = {"num_pairs": 22, "steps": 3, "shard_size": 4, "device": "cpu"}
    options |= {"teacher": small["teacher"], "out": tmp_path / "whole"}
    make_pairs.main(pairs_config(**options))
    whole = files(tmp_path / "whole")
    assert whole.keys() == {
        "meta.json", "preview.png", *(f"shard_{k:05d}.safetensors" for k in range(6))
    }  # fmt: skip

    resumed = tmp_path / "resumed"
    few = pairs_config(**options | {"out": resumed, "num_pairs": 9})
    kill_in_write(make_pairs.main, few, "shard_00002.safetensors")
    assert {name for name in files(resumed) if name[0] != "."} == {
        "meta.json", "shard_00000.safetensors", "shard_00001.safetensors",
    }  # fmt: skip
    (resumed / "shard_00000.safetensors").unlink()  # a gap is filled as well
    make_pairs.main(few)
    # Of nine pairs, the third shard holds one. It is made anew for more.
    make_pairs.main(pairs_config(**options | {"out": resumed}))
    assert files(resumed) == whole

    result = run_on_two_ranks("make_pairs.py", *flags(options | {"out": tmp_path / "two"}))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("22 pairs of mnist in ") == 1
    assert files(tmp_path / "two") == whole


def test_pairs_of_other_settings_are_never_mixed(pairs):
    before = files(pairs)
    with pytest.raises(UserError, match="another seed"):
        make_pairs.main(pairs_config(num_pairs=20, steps=6, shard_size=8, seed=1, out=pairs))
    assert files(pairs) == before
