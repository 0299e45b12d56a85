"""Stable Diffusion v1.5 by hand: its four networks, tokenizer, guidance, sampler and weights.

Read it beside Rombach et al. 2022 (arXiv 2112.10752, latent diffusion). A picture is made in three
steps. DMD replaces the many UNet calls of the second step with one:

    prompts -> CLIPTokenizer -> ids (B, 77) -> TextEncoder -> text states (B, 77, 768)
    z ~ N(0, I) (B, 4, 64, 64), text states -> UNet, many times -> latents (B, 4, 64, 64)
    latents -> VAEDecoder, or the 40 times smaller TinyDecoder -> images (B, 3, 512, 512)

    sd_noise_table                alpha_t, sigma_t of the T = 1000 noise levels
    UNet                          eps(x_t, t, text), the noise prediction
    CLIPTokenizer                 byte-pair encoding of the prompts
    TextEncoder                   CLIP ViT-L/14's text half (Radford et al. 2021, arXiv 2103.00020)
    VAEDecoder, TinyDecoder       latents to images (TinyDecoder: TAESD of O. Boer Bohan, 2023)
    GuidedUNet                    classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)
    SDDenoiser                    mu(x_t, t, cond), the form that DMD uses, Eq. 11
    pndm_sample                   the teacher's ODE solution (Liu et al. 2022, arXiv 2202.09778)
    load_sd                       weights, from a folder in the diffusers layout or from the Hub
    SDTeacher, load_sd_teacher    all of this as the teacher that the scripts use

Parameter names are those of the released files (`down_blocks.0.resnets.0.conv1.weight`, ...), so
released weights load strictly, and a distilled UNet can replace the original.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dmd_loss import T
from plumbing.devices import DTYPES, to
from plumbing.downloads import find_on_hub
from plumbing.files import (
    file_hash,
    load_strictly,
    one_line_errors,
    read_json,
    read_tensors,
    torch_load,
)
from plumbing.options import UserError

# The fields that are read from the config files. The defaults are SD v1.5's values.
SD15 = {
    "unet": dict(
        sample_size=64,  # of the latents, pixels along each side
        block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, norm_num_groups=32,
        cross_attention_dim=768, attention_head_dim=8,  # misnamed: the *number* of heads
    ),
    "text_encoder": dict(
        vocab_size=49408, max_position_embeddings=77, hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12,
    ),
    "vae": dict(
        block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32,
        scaling_factor=0.18215,  # latents of the UNet / latents of the autoencoder
    ),
    "tiny_vae": dict(decoder_block_out_channels=[64, 64, 64, 64], num_decoder_blocks=[3, 3, 3, 1]),
}  # fmt: skip


def sd_noise_table() -> tuple[Tensor, Tensor]:
    """The "scaled linear" schedule of Stable Diffusion v1.x, alpha and sigma, (T,) float64 each:
    alpha_t^2 = 1 - sigma_t^2 = prod_{i <= t} (1 - beta_i), where sqrt(beta_i) is linear in i."""
    beta = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), T, dtype=torch.float64) ** 2
    alpha_squared = (1 - beta).cumprod(0)
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


# --------------------------------------------------------------------------------------------------
# Building blocks

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def named(modules: dict) -> nn.Sequential:
    """nn.Sequential with the released files' names; a dict in `modules` becomes a nested one."""
    pairs = [(name, named(m) if isinstance(m, dict) else m) for name, m in modules.items()]
    return nn.Sequential(OrderedDict(pairs))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(C / heads)) v per head; q (B, N, C), k and v (B, M, C) -> (B, N, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # (B, heads, N, C/heads)
    return a.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Queries from x (B, N, C), keys and values from context (B, M, C') -> (B, N, C)."""

    def __init__(self, width: int, context_width: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(q, k, v, self.heads))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, MLP; x (B, N, C), text (B, 77, 768) -> (B, N, C)."""

    def __init__(self, width: int, text_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, text_width, heads)
        self.norm3 = nn.LayerNorm(width)
        linear_1, linear_2 = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.ff = named({"net": {"0": {"proj": linear_1}, "1": nn.Identity(), "2": linear_2}})

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), text)
        # GEGLU (Shazeer 2020, arXiv 2002.05202): two linear maps of the input, value * GELU(gate).
        value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff.net[2](value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """A TransformerBlock over the pixels: x (B, C, H, W), text (B, 77, 768) -> (B, C, H, W)."""

    def __init__(self, width: int, text_width: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)  # 1e-5 in the resnets
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, text_width, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, HW, C)
        tokens = self.transformer_blocks[0](tokens, text)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip path. The time embedding is added in between.
    x (B, c_in, H, W), emb (B, emb_width) after its SiLU -> (B, c_out, H, W); the VAE has no emb."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, emb_width: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = conv3x3(c_in, c_out)
        self.time_emb_proj = nn.Linear(emb_width, c_out) if emb_width else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = conv3x3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Stage(nn.Module):
    """The layers at one resolution, then downsampling, upsampling or neither: x (B, C, H, W) ->
    (B, width, H, W), with H/2, W/2 if down, or 2H, 2W if up. Layer i is a ResnetBlock, inputs[i] to
    width channels, with the settings `resnet`, followed by attentions[i] if there is one."""

    def __init__(self, inputs: list, width: int, resnet: dict, attentions=(), down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in, width, **resnet) for c_in in inputs])
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = named({"0": {"conv": conv3x3(width, width, stride=2)}} if down else {})
        double = nn.Upsample(scale_factor=2)
        self.upsamplers = named({"0": {"up": double, "conv": conv3x3(width, width)}} if up else {})

    def layer(self, i: int, x: Tensor, emb=None, text=None, skip=None) -> Tensor:
        """Layer i, applied to x (B, C, H, W), or to x and skip (B, C', H, W) concatenated."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, text) if i < len(self.attentions) else x

    def forward(self, x: Tensor, emb: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text)
        return self.upsamplers(self.downsamplers(x))


# --------------------------------------------------------------------------------------------------
# The UNet


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t (B,) at geometric frequencies from 1 towards 1e-4 -> (B, width)."""
    k = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * k / len(k))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def in_float32(layers: nn.Module, x: Tensor) -> Tensor:
    """layers(x) in float32, even under autocast or with half-precision weights: at t = 999, mu has
    sigma / alpha = 14.6 times the error of eps."""
    weights = {name: weight.float() for name, weight in layers.named_parameters()}
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return functional_call(layers, weights, x.float())


@torch.compiler.disable  # or the flag would be set when a network is compiled, not when it runs
def without_tf32(layer: nn.Module, x: Tensor) -> Tensor:
    """in_float32 with TF32 off, because it rounds as float16 does. The backward pass may use it."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return in_float32(layer, x)


class UNet(nn.Module):
    """eps(x_t, t, text): predicts the noise in x_t. For SD v1.5, 859,520,964 parameters:

        name                 layers                            channels       resolution
        conv_in                                                4 -> 320       64
        down_blocks.0        2 x (resnet, attention), down     320            64 -> 32
        down_blocks.1        2 x (resnet, attention), down     640            32 -> 16
        down_blocks.2        2 x (resnet, attention), down     1280           16 -> 8
        down_blocks.3        2 x  resnet                       1280           8
        mid_block            resnet, attention, resnet         1280           8
        up_blocks.0          3 x  resnet, up                   1280           8 -> 16
        up_blocks.1          3 x (resnet, attention), up       1280           16 -> 32
        up_blocks.2          3 x (resnet, attention), up       640            32 -> 64
        up_blocks.3          3 x (resnet, attention)           320            64
        conv_norm_out, SiLU, conv_out                          320 -> 4       64

    conv_in, the down layers and the downsamplers have twelve outputs in all. The twelve up layers
    take one each, last in, first out.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = dict(config)  # UNet(config) builds this network again
        self.image_shape = (4, config["sample_size"], config["sample_size"])
        self.gradient_checkpointing = False  # True: a third more time, a fraction of the memory
        widths, depth = config["block_out_channels"], config["layers_per_block"]
        groups, emb_width = config["norm_num_groups"], 4 * widths[0]
        resnet = {"groups": groups, "eps": 1e-5, "emb_width": emb_width}
        sizes = (config["cross_attention_dim"], config["attention_head_dim"], groups)

        self.conv_in = conv3x3(4, widths[0])
        linear_1, linear_2 = nn.Linear(widths[0], emb_width), nn.Linear(emb_width, emb_width)
        self.time_embedding = named({"linear_1": linear_1, "act": nn.SiLU(), "linear_2": linear_2})

        last = len(widths) - 1  # the lowest resolution, where there is no attention
        self.down_blocks = nn.ModuleList()
        c, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            inputs, down = [c] + [width] * (depth - 1), level < last
            attentions = [SpatialTransformer(width, *sizes) for _ in inputs if down]
            self.down_blocks.append(Stage(inputs, width, resnet, attentions, down=down))
            skips += [width] * (depth + down)
            c = width

        self.mid_block = Stage([c, c], c, resnet, [SpatialTransformer(c, *sizes)])

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            inputs = [c_in + skips.pop() for c_in in [c] + [width] * depth]
            attentions = [SpatialTransformer(width, *sizes) for _ in inputs if level < last]
            self.up_blocks.append(Stage(inputs, width, resnet, attentions, up=level > 0))
            c = width

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = conv3x3(widths[0], 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x_t (B, 4, H, W), t (B,) long in 0 .. 999, text (B, N, 768) -> eps (B, 4, H, W) float32.
        H and W are multiples of 8. There is no mask: the text's padding is attended to."""
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        text = text.to(x.dtype)
        emb = in_float32(self.time_embedding, timestep_embedding(t, self.conv_in.out_channels))
        emb = F.silu(emb).to(x.dtype)

        skips = [x]
        for stage in self.down_blocks:
            for i in range(len(stage.resnets)):
                x = self.run(stage.layer, i, x, emb, text)
                skips.append(x)
            if stage.downsamplers:
                x = stage.downsamplers(x)
                skips.append(x)
        x = self.run(self.mid_block, x, emb, text)
        for stage in self.up_blocks:
            for i in range(len(stage.resnets)):
                x = self.run(stage.layer, i, x, emb, text, skips.pop())
            x = stage.upsamplers(x)

        return without_tf32(self.conv_out, F.silu(self.conv_norm_out(x)))

    def run(self, layer: Callable, *inputs) -> Tensor:
        """layer(*inputs); with checkpointing, the backward pass recomputes its activations."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # No layer draws random numbers, so the random state need not be kept.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)


# --------------------------------------------------------------------------------------------------
# Text: the tokenizer and the encoder


class CLIPTokenizer:
    """CLIP's byte-pair encoding. A prompt becomes 77 ids: a start, up to 75 tokens, then ends.

    The text is normalised (NFC) and lower-cased. It is split into runs of letters, single digits,
    runs of other characters and a few English endings. In each piece, UTF-8 bytes are merged by a
    ranked list of pairs, so every word can be encoded.
    """

    START, END, ROOM = "<|startoftext|>", "<|endoftext|>", 75
    PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

    def __init__(self, vocab_file: Path, merges_file: Path):
        with one_line_errors(vocab_file.parent):
            if merges_file.name == "tokenizer.json":  # has the contents of both files
                vocab, merges = (read_json(merges_file)["model"][k] for k in ("vocab", "merges"))
                merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
            else:
                vocab, merges = models.BPE.read_file(str(vocab_file), str(merges_file))
        if len(vocab) != 2 * 256 + len(merges) + 2:  # all bytes, twice; start, end
            raise UserError(f"{vocab_file} does not match its merges; replace both")
        self.start, self.end = vocab[self.START], vocab[self.END]
        self.bpe = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
        self.bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        pieces = pre_tokenizers.Split(Regex(self.PIECES), behavior="removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
        self.bpe.add_special_tokens([self.START, self.END])  # one token each, even in a prompt
        self.too_long = {}  # prompts that did not fit -> the ends that were cut off

    def __call__(self, prompts: list[str]) -> Tensor:
        """Prompts -> ids (B, 77) long."""
        rows = []
        for prompt in prompts:
            encoding = self.bpe.encode(prompt)
            ids = [self.start, *encoding.ids[: self.ROOM], self.end]
            rows.append(ids + [self.end] * (self.ROOM + 2 - len(ids)))
            if len(encoding.ids) > self.ROOM:
                self.too_long[prompt] = prompt[encoding.offsets[self.ROOM][0] :]
        return torch.tensor(rows, dtype=torch.long).reshape(-1, self.ROOM + 2)


class TextLayer(nn.Module):
    """Causal self-attention and an MLP with quick GELU, (B, 77, 768) -> (B, 77, 768)."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(width)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = named({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = named({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        h, attn = self.layer_norm1(x), self.self_attn
        q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
        x = x + attn.out_proj(attention(q, k, v, self.heads, is_causal=True))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """CLIP ViT-L/14's text transformer, 123,060,480 parameters."""

    def __init__(self, config: dict):
        super().__init__()
        width, heads = config["hidden_size"], config["num_attention_heads"]
        sizes = (width, config["intermediate_size"], heads)
        layers = [TextLayer(*sizes) for _ in range(config["num_hidden_layers"])]
        tokens = nn.Embedding(config["vocab_size"], width)
        positions = nn.Embedding(config["max_position_embeddings"], width)
        self.text_model = named({
            "embeddings": {"token_embedding": tokens, "position_embedding": positions},
            "encoder": {"layers": nn.Sequential(*layers)},
            "final_layer_norm": nn.LayerNorm(width),
        })  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, 77) long -> text states (B, 77, 768), those of the last layer."""
        tokens, positions = self.text_model.embeddings
        x = tokens(ids) + positions.weight[: ids.shape[1]]
        return self.text_model.final_layer_norm(self.text_model.encoder(x))


# --------------------------------------------------------------------------------------------------
# The decoders


class PixelAttention(Attention):
    """Self-attention over the pixels, with one head and without text, (B, C, H, W) -> the same."""

    def __init__(self, width: int, groups: int):
        super().__init__(width, width, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)

    def forward(self, x: Tensor, text: None) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        return x + super().forward(tokens, tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class VAEDecoder(nn.Module):
    """The decoder of SD v1.5's autoencoder, 49,490,199 parameters:

    name                       layers                         channels     resolution
    post_quant_conv (1x1)                                     4 -> 4       64
    decoder.conv_in                                           4 -> 512     64
    decoder.mid_block          resnet, attention, resnet      512          64
    decoder.up_blocks.0, .1    3 x resnet, up                 512          64 -> 256
    decoder.up_blocks.2        3 x resnet, up                 256          256 -> 512
    decoder.up_blocks.3        3 x resnet                     128          512
    decoder.conv_norm_out, SiLU, decoder.conv_out             128 -> 3     512
    """

    def __init__(self, config: dict):
        super().__init__()
        self.scaling_factor = config["scaling_factor"]
        widths, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        resnet, c = {"groups": groups, "eps": 1e-6}, widths[0]
        mid_block, up_blocks = Stage([c, c], c, resnet, [PixelAttention(c, groups)]), []
        for level, width in enumerate(widths):
            inputs = [c] + [width] * config["layers_per_block"]
            up_blocks.append(Stage(inputs, width, resnet, up=level < len(widths) - 1))
            c = width
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.decoder = named({
            "conv_in": conv3x3(4, widths[0]),
            "mid_block": mid_block, "up_blocks": nn.Sequential(*up_blocks),
            "conv_norm_out": nn.GroupNorm(groups, c, eps=1e-6), "conv_act": nn.SiLU(),
            "conv_out": conv3x3(c, 3),
        })  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        """The UNet's latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about [-1, 1], not clamped."""
        x = latents.to(self.post_quant_conv.weight.dtype) / self.scaling_factor
        return self.decoder(self.post_quant_conv(x))


class TinyBlock(nn.Module):
    """Three 3x3 convolutions beside a skip path, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        convs = [conv3x3(width, width) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """TAESD's decoder, 1,222,531 parameters: the VAE's decoder, distilled into 3x3 convolutions."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["decoder_block_out_channels"][0]
        layers = [conv3x3(4, width), nn.ReLU()]
        for level, count in enumerate(config["num_decoder_blocks"]):
            if level > 0:
                layers += [nn.Upsample(scale_factor=2), conv3x3(width, width, bias=False)]
            layers += [TinyBlock(width) for _ in range(count)]
        self.decoder = named({"layers": nn.Sequential(*layers, conv3x3(width, 3))})

    def forward(self, latents: Tensor) -> Tensor:
        """The UNet's latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about [-1, 1], not clamped."""
        x = 3 * torch.tanh(latents / 3)  # a soft clamp to -3 .. 3
        return 2 * self.decoder(x.to(self.decoder.layers[0].weight.dtype)) - 1


# --------------------------------------------------------------------------------------------------
# Guidance, the denoiser and its sampler


class GuidedUNet(nn.Module):
    """A UNet with classifier-free guidance: eps = eps_u + scale (eps_c - eps_u), scale > 0. eps_u
    takes null_text, the text states of the empty prompt (1, 77, 768); scale 1 does not need it."""

    def __init__(self, unet: nn.Module, null_text: Tensor, scale: float):
        super().__init__()
        self.unet, self.scale = unet, scale
        self.register_buffer("null_text", null_text, persistent=False)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """As UNet.forward."""
        if self.scale == 1:
            return self.unet(x, t, text)
        null = self.null_text.expand_as(text)
        both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, text]))
        eps_u, eps_c = both.chunk(2)
        return eps_u + self.scale * (eps_c - eps_u)


class SDDenoiser(nn.Module):
    """A UNet, or the teacher's GuidedUNet, in DMD's terms: mu(x_t, t, cond) estimates x_0.

    Buffers `alpha` and `sigma` (T,): the forward process of Eq. 3, alpha^2 + sigma^2 = 1. Convert
    only `net` to half precision: .half() on the whole module would round these tables.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.z_scale = net, 1.0  # the sampler starts from z ~ N(0, I) itself
        alpha, sigma = sd_noise_table()
        self.register_buffer("alpha", alpha.float(), persistent=False)
        self.register_buffer("sigma", sigma.float(), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Eq. 11: mu = (x_t - sigma_t eps) / alpha_t, in float32 whatever the UNet's dtype.
        x_t (B, 4, H, W), t (B,) long in 0 .. 999, text states cond (B, 77, 768) -> (B, 4, H, W)."""
        eps = self.net(x_t, t, cond)
        alpha_t, sigma_t = (table[t][:, None, None, None] for table in (self.alpha, self.sigma))
        return (x_t - sigma_t * eps) / alpha_t  # float32, since the tables are


ADAMS_BASHFORTH = {  # weights of the latest noise predictions, newest first
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def pndm_sample(eps: Callable, z: Tensor, text: Tensor | None, steps: int) -> Tensor:
    """PNDM without Runge-Kutta steps ("PLMS"; Liu et al. 2022), with SD v1.5's settings.

    eps(x_t, t, text), with t (B,) long, is a UNet, a GuidedUNet or a closed form. z ~ N(0, I)
    (B, C, H, W), 2 .. 999 steps -> the ODE's solution y (B, C, H, W) in float32.

    Each step is a deterministic DDIM step with a combination of up to four noise predictions. The
    times are ..., 1 + 2r, 1 + r, 1 with r = 1000 // steps, and 0, where slight noise remains. The
    first step is redone with the mean prediction of both ends, so eps is called steps + 1 times.
    """
    alpha, sigma = (table.tolist() for table in sd_noise_table())
    x, stride, history = z, T // steps, []  # x becomes float64 with the first step

    def predict(x, t):
        return eps(x.float(), torch.full((len(x),), t, device=x.device), text).double()

    def ddim_step(e, t, t_next):
        x_0 = (x - sigma[t] * e) / alpha[t]
        return alpha[t_next] * x_0 + sigma[t_next] * e

    for t in range(1 + (steps - 1) * stride, 0, -stride):
        t_next = max(t - stride, 0)
        history = [predict(x, t), *history[:3]]
        if len(history) == 1:
            e = (history[0] + predict(ddim_step(history[0], t, t_next), t_next)) / 2
        else:
            weights = ADAMS_BASHFORTH[len(history)]
            e = sum(w * past for w, past in zip(weights, history, strict=True))
        x = ddim_step(e, t, t_next)
    return x.float()


# --------------------------------------------------------------------------------------------------
# Weights, and the teacher that the scripts use


@dataclass
class StableDiffusion:
    """What load_sd returns. Parts that were not asked for are None."""

    unet: UNet | None = None
    tokenizer: CLIPTokenizer | None = None
    text_encoder: TextEncoder | None = None
    vae: VAEDecoder | None = None
    tiny_vae: TinyDecoder | None = None

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> text states (B, 77, 768), in the text encoder's dtype."""
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(*to(device, self.tokenizer(prompts)))

    def decode(self, latents: Tensor, tiny: bool = False) -> Tensor:
        """Latents (B, 4, H, W) -> images (B, 3, 8H, 8W) float32, about [-1, 1], not clamped. Only
        training decodes in half precision: some models' VAEs overflow in fp16 (black pictures)."""
        half = torch.is_grad_enabled() and torch.is_autocast_enabled(latents.device.type)
        with torch.autocast(latents.device.type, enabled=half):  # in the dtype of the one around it
            return (self.tiny_vae if tiny else self.vae)(latents).float()


NETWORKS = {"unet": UNet, "text_encoder": TextEncoder, "vae": VAEDecoder, "tiny_vae": TinyDecoder}


def load_sd(
    source: str | Path, parts: Sequence[str] = ("unet", "text_encoder", "vae")
) -> StableDiffusion:
    """Load parts: "unet", "text_encoder" (with the tokenizer), "vae" and "tiny_vae".

    `source` is a folder in the diffusers layout or a repository of the Hugging Face Hub, from which
    only the needed files are downloaded. All networks are in eval mode, all but the UNet frozen.
    """
    if "unet" in parts:
        read_config(find_file(source, "scheduler/scheduler_config.json"))
    sd = StableDiffusion(**{part: load_network(part, source) for part in parts})
    if sd.text_encoder:
        names, either = ("tokenizer/vocab.json", "tokenizer/merges.txt"), "tokenizer/tokenizer.json"
        sd.tokenizer = CLIPTokenizer(*(find_file(source, name, either) for name in names))
        size, rows = sd.tokenizer.bpe.get_vocab_size(), sd.text_encoder.text_model.embeddings[0]
        if size != len(rows.weight):
            raise UserError(f"{source}: tokens were added to CLIP's {size}; this is unsupported")
    return sd


def load_network(part: str, source: str | Path, config: dict | None = None) -> nn.Module:
    """Load one of NETWORKS in float32, from a source as for load_sd or a weights file. `config`
    replaces the config.json beside the weights. Missing fields are SD v1.5's."""
    weights_file, config_file = find_weights(part, source)
    if config is None:
        config = read_config(config_file) if config_file else {}
    with one_line_errors(weights_file, "has a damaged or unknown config"), torch.device("meta"):
        net = NETWORKS[part](SD15[part] | config)  # no memory: it takes over the file's tensors
    load_strictly(net, read_weights(part, weights_file), weights_file, assign=True)
    for field, like in SD15[part].items():
        if type(value := config.get(field, like)) is not type(like):
            raise UserError(f"{weights_file}: its config's {field} must be like {like}: {value!r}")
    if part == "unet" and net.image_shape[1] % (factor := 2 ** (len(net.down_blocks) - 1)):
        raise UserError(f"{weights_file}: its config's sample_size must be a multiple of {factor}")
    return net.eval().requires_grad_(part == "unet")


# Names and shapes of weights do not tell other models apart, but these fields do.
SUPPORTED = dict(
    hidden_act="quick_gelu", layer_norm_eps=1e-5, prediction_type="epsilon", num_train_timesteps=T,
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, trained_betas=None,
    rescale_betas_zero_snr=False, norm_eps=1e-5, freq_shift=0, flip_sin_to_cos=True,
)  # fmt: skip


def read_config(path: Path) -> dict:
    """Read a config file, and refuse fields that are not as in SUPPORTED."""
    config = read_json(path)
    for field, only in SUPPORTED.items():
        if (value := config.get(field, only)) != only:
            raise UserError(f"{path}: {field} must be {only!r}, as in SD v1.x, not {value!r}")
    return config


def find_weights(part: str, source: str | Path) -> tuple[Path, Path | None]:
    """The weights and the config.json of a network; None if a weights file has none beside it."""
    if Path(source).is_file():
        beside = Path(source).with_name("config.json")
        return Path(source), beside if beside.is_file() else None
    kinds = ("diffusion_pytorch_model{}.safetensors", "diffusion_pytorch_model{}.bin")
    if part == "text_encoder":  # transformers' names instead of diffusers'
        kinds = ("model{}.safetensors", "pytorch_model{}.bin")
    names = [f"{part}/{kind.format(precision)}" for precision in ("", ".fp16") for kind in kinds]
    return find_file(source, *names), find_file(source, f"{part}/config.json")


def find_file(source: str | Path, *names: str) -> Path:
    """The first of `names` in a folder or a repository; TAESD has its own repository."""
    if names[0].startswith("tiny_vae/") and not Path(source, "tiny_vae").is_dir():
        return find_on_hub("madebyollin/taesd", [name.removeprefix("tiny_vae/") for name in names])
    if not (path := Path(source)).is_dir():
        if path.exists() or str(source)[:1] in "./~":
            raise UserError(f"{source} is neither a folder nor a Hub repository (owner/name)")
        return find_on_hub(str(source), names)
    for name in names:
        if (path := Path(source, name)).is_file():
            return path
    raise UserError(f"{source} holds none of {', '.join(names)}; complete it (weights: one file)")


# Tensors in the released files that are not needed; older names in the VAE's attention.
NOT_NEEDED = ("encoder.", "quant_conv.", "text_model.embeddings.position_ids")
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_weights(part: str, path: Path) -> dict[str, Tensor]:
    """Read a .safetensors or .bin file -> the tensors that are needed, under our names, float32."""
    tensors = {}
    with one_line_errors(path):
        found = read_tensors(path)[0] if path.suffix == ".safetensors" else torch_load(path)
        for name, tensor in found.items():
            name = name.replace("_orig_mod.", "").removeprefix("module.")  # compiled, in DDP
            if part == "text_encoder":
                name = "text_model." + name.removeprefix("text_model.")  # newer files omit it
            for older, newer in OLDER.items():
                name = name.replace(f".{older}.", f".{newer}.")
            if not name.startswith(NOT_NEEDED):
                tensor = torch.as_tensor(tensor)  # an error if it is not a tensor
                # The attention of some VAEs is stored as 1x1 convolutions.
                tensors[name] = tensor.flatten(1) if ".to_" in name and tensor.ndim > 2 else tensor
    return {name: tensor.float() for name, tensor in tensors.items()}


class SDTeacher:
    """Stable Diffusion v1.x as a teacher: latents, prompts as condition, guidance, PNDM solver.

    It has EDMTeacher's attributes and methods. Without the UNet, mu_real is None and there is no
    image_shape. `guidance` is the scale in mu_real and `solve`; `decoder` is `decode`'s default.
    """

    def __init__(self, sd: StableDiffusion, record: dict, guidance: float, decoder: str = "tiny"):
        self.sd, self.record, self.decoder = sd, record, decoder
        self.mu_real, self.sigma_data, self.num_classes = None, None, 0
        if sd.unet is not None:
            self.image_shape = sd.unet.image_shape
            guided = GuidedUNet(sd.unet, sd.encode_text([""]), guidance)
            self.mu_real = SDDenoiser(guided).eval().requires_grad_(False)

    def to(self, device: torch.device, amp: str = "off") -> "SDTeacher":
        """Move it to a device, with the UNet and the text encoder in the precision `amp`."""
        for net in filter(None, (self.mu_real, self.sd.vae, self.sd.tiny_vae)):
            net.to(device, memory_format=torch.channels_last)
        if self.mu_real is not None:
            self.mu_real.net.to(DTYPES[amp])  # not the noise table, which belongs to mu_real
        self.sd.text_encoder.to(device, DTYPES[amp])
        return self

    def student(self) -> SDDenoiser:
        """A trainable copy without guidance; make it before `to` if it is to be float32."""
        unet = copy.deepcopy(self.sd.unet)
        unet.gradient_checkpointing = True
        return SDDenoiser(unet).eval().requires_grad_(True)

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> text states (B, 77, 768) float32."""
        return self.sd.encode_text(prompts).float()

    def solve(self, z: Tensor, cond: Tensor, steps: int) -> Tensor:
        """PNDM with guidance: z ~ N(0, I) (B, 4, H, W) -> latents y (B, 4, H, W)."""
        return pndm_sample(self.mu_real.net, z, cond, steps)

    def evaluations(self, steps: int) -> int:
        """The number of network evaluations in `solve`; guidance doubles it."""
        return (steps + 1) * (1 if self.mu_real.net.scale == 1 else 2)

    def decode(self, x: Tensor, decoder: str | None = None) -> Tensor:
        """Latents (B, 4, H, W) -> images (B, 3, 8H, 8W), by the "tiny" or the "full" decoder."""
        return self.sd.decode(x, tiny=(decoder or self.decoder) == "tiny")


def load_sd_teacher(source: str, guidance: float, decoders: Sequence, with_unet=True) -> SDTeacher:
    """Load the teacher from a source as for load_sd. `decoders` are "tiny", "full" or None: first
    the default of `decode`, then any others to be used. Sampling from G needs no UNet."""
    parts = ["text_encoder", *{"tiny_vae" if d == "tiny" else "vae" for d in decoders if d}]
    sd = load_sd(source, ["unet", *parts] if with_unet else parts)
    record = {"name": source}
    if with_unet:
        record["sha256"] = file_hash(find_weights("unet", source)[0])
    return SDTeacher(sd, record, guidance, decoders[0])
