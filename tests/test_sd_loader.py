"""Stable Diffusion's networks against golden vectors; tokenizer, sampler and weights' files."""

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from golden.networks import (
    CONFIGS,
    GOLDEN,
    PARTS,
    RULES,
    relative_error,
    sd_fill,
    sd_network,
    sd_vectors,
)
from huggingface_hub import errors
from safetensors.torch import save_file

from plumbing.options import UserError
from sd_loader import (
    NETWORKS,
    SD15,
    CLIPTokenizer,
    GuidedUNet,
    SDDenoiser,
    load_network,
    load_sd,
    pndm_sample,
    sd_noise_table,
    timestep_embedding,
    without_tf32,
)

FULL_SIZE = json.loads((GOLDEN / "sd" / "keys_sd15.json").read_text())


@pytest.mark.parametrize("rule", RULES)
def test_unet_matches_golden_vectors(rule):
    net, data = sd_network("unet", rule), sd_vectors(rule, "unet")
    with torch.no_grad():
        assert relative_error(net(data["x"], data["t"], data["context"]), data["eps"]) < 1e-5
        if rule == "eps_probe":
            return
        eps = net(data["x2"], data["t2"].reshape(1), data["context2"])  # not square
    assert relative_error(eps, data["eps2"]) < 1e-5

    x, context = (data[name][1:2].requires_grad_() for name in ("x", "context"))
    (net(x, data["grad_t"].reshape(1), context) * data["grad_w"]).sum().backward()
    assert relative_error(x.grad, data["grad_x"]) < 2e-5
    assert relative_error(context.grad, data["grad_context"]) < 2e-5


@pytest.mark.parametrize(
    ("part", "rule"),
    [(part, rule) for part in list(PARTS)[1:] for rule in ("rule_a", "rule_b")]
    + [("vae", "eps_probe")],
)
@torch.no_grad()
def test_other_networks_match_golden_vectors(part, rule):
    data = sd_vectors(rule, PARTS[part][1])
    text = part == "text_encoder"
    given, expected = ("input_ids", "last_hidden_state") if text else ("latent", "image")
    assert relative_error(sd_network(part, rule)(data[given]), data[expected]) < 1e-5


@pytest.mark.parametrize("part", PARTS)
def test_full_size_names_shapes_and_counts(part):
    with torch.device("meta"):
        net = NETWORKS[part](SD15[part])
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert shapes == FULL_SIZE[part]
    assert sum(p.numel() for p in net.parameters()) == FULL_SIZE["counts"][part]


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    net, data, calls, gradients = sd_network("unet"), sd_vectors("rule_b", "unet"), [], []
    net.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True):
        net.gradient_checkpointing = on
        net.zero_grad()
        x = data["x"].clone().requires_grad_()
        (net(x, data["t"], data["context"]) ** 2).sum().backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    assert len(calls) == 1 + 2  # forward; forward and again for the backward pass
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("name", ["time_embedding", "conv_out"])
@torch.no_grad()
def test_the_unets_first_and_last_layers_are_in_float32(how, name):
    """Whatever the rest is: at t = 999, their rounding errors count 14.6 times."""
    net, data, seen = sd_network("unet"), sd_vectors("rule_b", "unet"), {}
    layers = net.get_submodule(name)
    net.conv_norm_out.register_forward_hook(lambda *given: seen.update(x=given[2]))
    layers.register_forward_hook(lambda *given: seen.update(found=given[2]))
    net = net.bfloat16() if how == "weights" else net
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        eps = net(data["x"], data["t"], data["context"])
    if name == "conv_out":
        x = torch.nn.functional.silu(seen["x"]).float()
    else:
        x = timestep_embedding(data["t"], net.conv_in.out_channels)
    assert seen["found"].dtype == eps.dtype == torch.float32
    assert relative_error(seen["found"], layers.float()(x)) < 1e-6
    assert relative_error(eps, data["eps"]) < 0.1


@torch.library.custom_op("dmd::tf32", mutates_args=())
def tf32(x: torch.Tensor) -> torch.Tensor:
    """Whether convolutions may use TF32 when this runs, in a compiled network as well."""
    return torch.tensor(torch.backends.cudnn.allow_tf32)


tf32.register_fake(lambda x: x.new_empty((), dtype=torch.bool))


class AsksForTF32(torch.nn.Module):
    def forward(self, x):
        return tf32(x)


def test_the_unets_last_convolution_alone_does_not_use_tf32(monkeypatch):
    """After an error as well, the flag is as it was; a compiled network sets it in every call."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net, data, layer, seen = sd_network("unet"), sd_vectors("rule_b", "unet"), AsksForTF32(), []
    for part in (net.conv_in, net.conv_out):
        part.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    net(data["x"], data["t"], data["context"])
    assert seen == [True, False] and torch.backends.cudnn.allow_tf32
    compiled = torch.compile(lambda x: (layer(x), without_tf32(layer, x)), backend="eager")
    assert [compiled(torch.ones(k)) for k in (1, 2)] == [(True, False)] * 2
    with pytest.raises(RuntimeError):
        without_tf32(net.conv_out, torch.ones(2))
    assert torch.backends.cudnn.allow_tf32


def test_noise_table():
    alpha, sigma = sd_noise_table()
    expected = sd_vectors("rule_b", "sampler")["alphas_cumprod"]
    torch.testing.assert_close((alpha**2).float(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert alpha[999].item() == pytest.approx(0.06827, abs=1e-5)


@pytest.mark.parametrize("rule", ["rule_a", "rule_b"])
@torch.no_grad()
def test_guidance_and_one_step_match_golden_vectors(rule):
    net, data = sd_network("unet", rule), sd_vectors(rule, "sampler")
    z, cond = data["z"], data["cond"]
    for scale in (3, 8):
        guided = GuidedUNet(net, data["uncond"], scale)(z, data["cfg_t"].reshape(1), cond)
        assert relative_error(guided, data[f"cfg{scale}"]) < 5e-5
    one_step = SDDenoiser(net)(z, torch.tensor([999]), cond)
    assert relative_error(one_step, data["one_step_t999"]) < 1e-5


class Echo(torch.nn.Module):
    """A UNet's stand-in: eps is the mean of each sample's text, and every call's t is kept."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype, self.times = dtype, []

    def forward(self, x, t, text):
        self.times.append(t.tolist())
        return text.mean(dim=(1, 2))[:, None, None, None].expand_as(x).to(self.dtype)


def test_pndm_trajectory_matches_golden_vectors():
    net, data = sd_network("unet"), sd_vectors("rule_b", "sampler")
    for steps in (10, 50):
        end = pndm_sample(GuidedUNet(net, data["uncond"], 3), data["z"], data["cond"], steps)
        assert relative_error(end, data[f"plms{steps}"]) < 1e-5 and not end.requires_grad
        # Three samples at once.
        unet, text = Echo(), data["cond"].expand(3, -1, -1)
        pndm_sample(unet, data["z"].expand(3, -1, -1, -1), text, steps)
        assert unet.times == [[t] * 3 for t in data[f"timesteps{steps}"].tolist()]


def test_guidance_is_per_sample_and_one_is_no_guidance():
    x, t, text = torch.zeros(2, 4, 8, 8), torch.tensor([3, 5]), torch.ones(2, 77, 6)
    text[1] = 2
    null, unet = torch.full((1, 77, 6), 0.5), Echo()
    for scale, expected in ((3.0, [2.0, 5.0]), (0.5, [0.75, 1.25]), (1.0, [1.0, 2.0])):
        found = GuidedUNet(unet, null, scale)(x, t, text)
        assert found[:, 0, 0, 0].tolist() == expected
    assert unet.times == [[3, 5, 3, 5], [3, 5, 3, 5], [3, 5]]
    assert not SDDenoiser(GuidedUNet(unet, null, 3.0)).state_dict()  # only a UNet's own weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denoiser_inverts_the_forward_process_in_float32(dtype):
    # Where eps is the noise that was added, the estimate of x_0 is x_0: Eq. 3 and 11.
    mu = SDDenoiser(Echo(dtype))
    assert mu.z_scale == 1 and mu.alpha.shape == mu.sigma.shape == (1000,)
    x_0, t = torch.randn(4, 4, 8, 8), torch.tensor([0, 400, 980, 999])
    noise, text = 0.75, torch.full((4, 77, 6), 0.75)  # exact in bfloat16
    alpha, sigma = (table[t][:, None, None, None] for table in sd_noise_table())
    estimate = mu((alpha * x_0 + sigma * noise).float(), t, text)
    torch.testing.assert_close(estimate, x_0, rtol=0, atol=3e-5)
    assert mu(x_0.to(dtype), t, text).dtype == mu.alpha.dtype == mu.sigma.dtype == torch.float32


def test_pndms_rounding_errors_do_not_add_up():
    """Without noise, every step is a factor; the state is in float64, whatever eps gives."""
    z, (alpha, _) = torch.randn(1, 4, 8, 8), sd_noise_table()
    end = pndm_sample(Echo(), z, torch.zeros(1, 77, 6), steps=999)
    assert relative_error(end, (z.double() * alpha[0] / alpha[999]).float()) < 1e-7


def pndm_error(mean, std, steps):
    """PNDM's largest error on N(mean, std^2) data, whose eps and ODE solution are known.

    x_t has mean alpha mean and variance V = alpha^2 std^2 + sigma^2, eps = -sigma * score, and the
    ODE keeps (x_t - alpha mean) / sqrt(V).
    """
    alpha, sigma = sd_noise_table()
    deviation = (alpha**2 * std**2 + sigma**2).sqrt()

    def eps(x, t, text):
        assert x.dtype == torch.float32
        t = t[0]
        return sigma[t] * (x.double() - alpha[t] * mean) / deviation[t] ** 2

    z, t = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(1, 1, 4, 5), 1
    t += (steps - 1) * (1000 // steps)
    exact = alpha[0] * mean + deviation[0] * (z - alpha[t] * mean) / deviation[t]
    return (pndm_sample(eps, z, None, steps) - exact).abs().max().item()


@pytest.mark.parametrize("steps", [2, 7, 50, 999])
def test_pndm_is_exact_where_all_data_are_one_point(steps):
    assert pndm_error(mean=0.3, std=0.0, steps=steps) < 1e-5


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_pndm_converges_with_second_order(std):
    # A quarter of the stride divides the error by 16. (Strides below 10 gain no more: the last
    # step, from t = 1 to 0, is shorter than the others whatever the stride, and then decides.)
    coarse, fine = (pndm_error(mean=0.3, std=std, steps=steps) for steps in (20, 80))
    assert fine < coarse / 16 and fine < 2e-3


MERGES = ["c a", "ca t</w>", "# #", "# #</w>", "a t</w>", "t h", "th e</w>", "d o", "do g</w>"]
MERGES += ["' s</w>", "1 2", "1 2</w>"]


def write_tokenizer(folder):
    """A CLIP vocabulary with a dozen merges; the last two ids are the marks, as in the real one."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    words = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in MERGES]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *MERGES]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    return vocab


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = write_tokenizer(folder)
    tokenizer = CLIPTokenizer(folder / "vocab.json", folder / "merges.txt")
    tokenizer.words = {i: word for word, i in vocab.items()}
    return tokenizer


@pytest.mark.parametrize(("prompt", "pieces"), [
    ("cat", "cat</w>"),
    ("  The CAT\t\n dog ", "the</w> cat</w> dog</w>"),
    ("cat\u3000dog\u00a0cat\u2028dog", "cat</w> dog</w> cat</w> dog</w>"),
    ("cats bat", "ca t s</w> b at</w>"),
    ("dog's CAT'S", "dog</w> 's</w> cat</w> 's</w>"),  # 's is a piece of its own
    ("1212", "1</w> 2</w> 1</w> 2</w>"),  # digits stand alone, whatever the merges say
    ("## ###", "##</w> ## #</w>"),  # merges that begin with # are no comments
    ("cat!?dog", "cat</w> ! ?</w> dog</w>"),  # other signs run together
    ("_cat-", "_</w> cat</w> -</w>"),
    ("caf\u00e9", "ca f Ã ©</w>"),  # UTF-8 bytes
    ("CAFE\u0301", "ca f Ã ©</w>"),  # composed first
    ("\u00bdcat", "Â ½</w> cat</w>"),  # one half is a number, not a letter
    ("", ""),
    ("cat <|endoftext|> dog", "cat</w> <|endoftext|> dog</w>"),
])  # fmt: skip
def test_tokenizer_cuts_and_merges(tokenizer, prompt, pieces):
    (row,) = tokenizer([prompt]).tolist()
    expected = ["<|startoftext|>", *pieces.split()]
    expected += ["<|endoftext|>"] * (77 - len(expected))
    assert [tokenizer.words[i] for i in row] == expected


def test_long_prompts_are_cut_and_what_is_lost_is_kept(tokenizer, recwarn):
    full = tokenizer(["cat " * 75, "dog"])
    assert full.shape == (2, 77) and full.dtype == torch.long and not tokenizer.too_long
    ends = {"cat " * 75 + end: end for end in ("The DOG", "DOG")}
    for _ in range(2):  # the second time is no other prompt
        cut = tokenizer([*ends, "dog"])
    assert tokenizer.too_long == ends and not recwarn.list
    assert torch.equal(cut, full[[0, 0, 1]])
    assert tokenizer.words[cut[0, 76].item()] == "<|endoftext|>"
    assert tokenizer([]).shape == (0, 77)


def released(part):
    """A tiny network's tensors, with what else the released files of that network hold."""
    tensors = {name: value.detach().clone() for name, value in sd_network(part).named_parameters()}
    if part == "text_encoder":
        # The test's vocabulary, which is longer than the golden one.
        words, shape = "text_model.embeddings.token_embedding.weight", (514 + len(MERGES), 20)
        tensors[words] = torch.from_numpy(sd_fill(words, shape, "rule_b")).float()
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif part == "vae":
        tensors["encoder.conv_in.weight"] = torch.ones(8, 3, 3, 3)
        tensors["quant_conv.weight"] = torch.ones(8, 8, 1, 1)
    elif part == "tiny_vae":
        tensors["encoder.layers.0.weight"] = torch.ones(12, 3, 3, 3)
    return tensors


def write_sd(folder, dtype=torch.float32, suffix=".safetensors"):
    """A whole tiny Stable Diffusion and its tiny decoder in the released files' layout."""
    binary = suffix.endswith(".bin")
    configs = {part: dict(CONFIGS[config]) for part, (config, _) in PARTS.items()}
    configs["text_encoder"]["vocab_size"] = 514 + len(MERGES)
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        tensors = released(part)
        for name, value in tensors.items():
            tensors[name] = value.to(dtype) if value.is_floating_point() else value
        stem = "diffusion_pytorch_model"
        if part == "text_encoder":
            stem = "pytorch_model" if binary else "model"
        (torch.save if binary else save_file)(tensors, folder / part / (stem + suffix))
    (folder / "scheduler").mkdir()
    scheduler = json.dumps(CONFIGS["scheduler"])
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("sd") / "float32")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"])
@torch.no_grad()
def test_every_kind_of_file_gives_the_same_networks(sd_folder, tokenizer, tmp_path, suffix):
    dtype, tolerance = (torch.float16, 5e-3) if "fp16" in suffix else (torch.float32, 1e-5)
    sd = load_sd(write_sd(tmp_path / "sd", dtype, suffix), tuple(NETWORKS))
    unet, vae, taesd = (
        sd_vectors("rule_b", name) for name in ("unet", "vae_decoder", "taesd_decoder")
    )
    encoder = load_network("text_encoder", sd_folder)
    for found, expected in (
        (sd.unet(unet["x"], unet["t"], unet["context"]), unet["eps"]),
        (sd.decode(vae["latent"]), vae["image"]),
        (sd.decode(taesd["latent"], tiny=True), taesd["image"]),
        (sd.encode_text(["the cat", ""]), encoder(tokenizer(["the cat", ""]))),
    ):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < tolerance


def test_loaded_networks_are_in_eval_mode_and_all_but_the_unet_frozen(sd_folder):
    sd = load_sd(sd_folder, tuple(NETWORKS))
    for part in PARTS:
        net = getattr(sd, part)
        assert not net.training
        assert {p.requires_grad for p in net.parameters()} == {part == "unet"}
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        net.half()
    latents = sd_vectors("rule_b", "vae_decoder")["latent"]
    for tiny_decoder in (False, True):
        assert sd.decode(latents, tiny_decoder).dtype == torch.float32
    assert not sd.encode_text(["cat"]).requires_grad
    only = load_sd(sd_folder, parts=["vae"])
    assert only.unet is only.text_encoder is only.tokenizer is only.tiny_vae is None


def test_other_names_for_the_same_tensors(sd_folder, tmp_path):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = released("vae")
    for name in list(vae):
        for new, old in older.items():
            if f".attentions.0.{new}." in name:
                vae[name.replace(new, old)] = vae.pop(name)
    attention = {name for name in vae if ".attentions." in name}
    assert attention == FULL_SIZE["vae_older_attention"].keys()
    text = {k.removeprefix("text_model."): v for k, v in released("text_encoder").items()}
    assert FULL_SIZE["text_encoder_older_files"].keys() <= released("text_encoder").keys()

    for part, tensors in (("vae", vae), ("text_encoder", text)):
        path = tmp_path / f"{part}.safetensors"
        save_file(tensors, path)
        shutil.copy(sd_folder / part / "config.json", tmp_path)  # is read beside a single file
        found = load_network(part, path).state_dict()
        for name, value in load_network(part, sd_folder).state_dict().items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("part", "name", "shape", "words"), [
    ("unet", "mid_block.resnets.1.conv2.bias", None, "1 missing ({name})"),
    ("unet", "extra", (1,), "1 surplus ({name})"),
    # Other models are recognised by their shapes: inpainting; SD 2.x and XL; 16 channels.
    ("unet", "conv_in.weight", (16, 9, 3, 3), "{shape} instead of (16, 4, 3, 3))"),
    ("unet", "mid_block.attentions.0.proj_in.weight", (32, 32), "instead of (32, 32, 1, 1))"),
    ("vae", "decoder.conv_in.weight", (16, 16, 3, 3), "{shape} instead of (16, 4, 3, 3))"),
    ("tiny_vae", "decoder.layers.0.weight", (12, 16, 3, 3), "instead of (12, 4, 3, 3))"),
])  # fmt: skip
def test_every_difference_of_the_weights_is_named(tmp_path, part, name, shape, words):
    path, tensors = tmp_path / "other.safetensors", released(part)
    tensors.pop(name, None)
    save_file(tensors if shape is None else tensors | {name: torch.ones(shape)}, path)
    # What a config says beyond the fields of SD15 does not matter.
    config = CONFIGS[PARTS[part][0]] | {"in_channels": 9, "attention_head_dim": [5, 10, 20, 20]}
    with pytest.raises(UserError) as caught:
        load_network(part, path, config=config)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    assert name in line and line.endswith(words.format(name=name, shape=shape))


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", ["bomb", "nested", "text", "cut"])
def test_damaged_or_dangerous_files_are_refused(tmp_path, content, capsys):
    path, whole = tmp_path / "unet.bin", {"x": torch.ones(9)}
    torch.save({"bomb": {"x": Bomb()}, "nested": {"x": {}}}.get(content, whole), path)
    if content == "text":
        path.write_text("no weights")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"unet.bin is (damaged|refused)") as caught:
        load_network("unet", path, config=CONFIGS["unet"])
    assert "\n" not in str(caught.value) and "executed" not in capsys.readouterr().out


def test_an_error_in_converting_weights_is_not_their_files(tmp_path, monkeypatch):
    """Such as full memory: the file is whole."""
    save_file(released("unet"), tmp_path / "unet.safetensors")
    monkeypatch.setattr(torch.Tensor, "float", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        load_network("unet", tmp_path / "unet.safetensors", config=CONFIGS["unet"])


def test_what_a_config_lacks_is_as_in_sd15(sd_folder):
    """Only what differs from SD v1.5 need be given; the network keeps the whole config."""
    config = {name: CONFIGS["unet"][name] for name in SD15["unet"]}
    short = {name: value for name, value in config.items() if value != SD15["unet"][name]}
    assert len(short) < len(config)
    path = sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert load_network("unet", path, config=short).config == config


@pytest.mark.parametrize(("file", "change", "words"), [
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"},
     "scheduler_config.json: prediction_type must be 'epsilon', as in SD v1.x, not 'v_pred"),
    ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end must be 0.012"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "config.json: hidden_act must be"),
    ("text_encoder/config.json", {"vocab_size": 100}, "misshapen"),
    ("unet/config.json", None, "holds none of unet/config.json"),
    ("unet/diffusion_pytorch_model.safetensors", None, "diffusion_pytorch_model.fp16.bin"),
    ("text_encoder/model.safetensors", None, "holds none of text_encoder/model.safetensors"),
    ("tokenizer/merges.txt", None, "holds none of tokenizer/merges.txt"),
    ("tokenizer/merges.txt", "\n".join(["#version: 0.2", *MERGES[:-3]]),
     "vocab.json does not match its merges"),
    ("tokenizer/merges.txt", "#version: 0.2\nx y z", "tokenizer is damaged"),
    ("tiny_vae/config.json", None, "holds none of tiny_vae/config.json"),
])  # fmt: skip
def test_incomplete_or_altered_folders(sd_folder, tmp_path, file, change, words):
    path = shutil.copytree(sd_folder, tmp_path / "sd") / file
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.unlink()
    if change:
        path.write_text(change)
    with pytest.raises(UserError) as caught:
        load_sd(tmp_path / "sd", tuple(NETWORKS))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch, sd_folder):
    """A Hub with sd_folder's files and TAESD's, and what was asked of it."""

    state = SimpleNamespace(missing=[], cached={}, online=True, asked=[])
    folders = {"owner/sd": sd_folder, "madebyollin/taesd": sd_folder / "tiny_vae"}

    def download(repo, path, local_files_only):
        if not local_files_only:
            state.asked.append(f"{repo}/{path}")
        if local_files_only or not state.online:
            raise errors.LocalEntryNotFoundError("no connection")
        if repo not in folders:
            raise ValueError("401\nno such repository")
        file = folders[repo] / path
        if path in state.missing or not file.is_file():
            raise errors.EntryNotFoundError("404")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    cache = "huggingface_hub.try_to_load_from_cache"
    monkeypatch.setattr(cache, lambda repo, path: state.cached.get(path))
    return state


def test_a_hub_repository_gives_only_the_files_needed(hub, sd_folder, tmp_path):
    sd = load_sd("owner/sd", parts=("text_encoder", "tiny_vae"))
    assert sd.encode_text(["cat"]).shape == (1, 77, 20) and sd.unet is None
    text = [f"owner/sd/text_encoder/{name}" for name in ("model.safetensors", "config.json")]
    names = ("diffusion_pytorch_model.safetensors", "config.json")
    taesd = [f"madebyollin/taesd/{name}" for name in names]
    tokenizer = [f"owner/sd/tokenizer/{name}" for name in ("vocab.json", "merges.txt")]
    assert hub.asked == text + taesd + tokenizer

    hub.asked = []
    shutil.copytree(sd_folder / "vae", tmp_path / "vae")  # a folder has no tiny decoder either
    assert load_sd(tmp_path, parts=("vae", "tiny_vae")).tiny_vae is not None
    assert hub.asked == taesd


def test_a_hub_repository_without_safetensors_is_asked_for_the_others(hub):
    hub.missing = ["vae/diffusion_pytorch_model.safetensors"]
    with pytest.raises(UserError, match=r"owner/sd .* none of vae/diff.*, vae/.*fp16\.bin"):
        load_sd("owner/sd", parts=("vae",))
    kinds = [path.partition(".")[2] for path in hub.asked]
    assert kinds[:4] == ["safetensors", "bin", "fp16.safetensors", "fp16.bin"]


def test_without_a_network_the_hubs_cache_will_do(hub, sd_folder):
    hub.online = False
    weights = "vae/diffusion_pytorch_model.safetensors"
    hub.cached["vae/config.json"] = str(sd_folder / "vae/config.json")
    hub.cached["vae/diffusion_pytorch_model.fp16.safetensors"] = str(sd_folder / weights)
    assert load_sd("owner/sd", parts=("vae",)).vae is not None
    assert hub.asked == [f"owner/sd/{weights}"]  # one wait for the network, not one for each name


def test_neither_folder_nor_repository(hub, tmp_path):
    for source in (tmp_path / "nothing", "nothing"):
        with pytest.raises(UserError, match="nor a Hub repository \\(owner/name\\)"):
            load_sd(source)
    with pytest.raises(UserError, match=r"owner/other is not a local folder, .* says: 401 no"):
        load_sd("owner/other")
    hub.online = False
    with pytest.raises(UserError, match="; check the name and the network"):
        load_sd("owner/other")
