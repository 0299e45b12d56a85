"""EDM's networks, written from the papers: DDPM++, ADM, the preconditioning and the Heun sampler.

Read it bottom up beside Karras et al. 2022 (arXiv 2206.00364, "EDM"):

    EDMDenoiser   mu(x_t, t, cond): the form in which DMD uses a teacher (T = 1000 noise levels)
    heun_sample   EDM Algorithm 1 (Algorithm 2 with S_churn = 0): the teacher's ODE solution
    EDMPrecond    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7 and Table 1
    UNet          F, in two styles, both in EDM's variant:
        DDPMPP    "DDPM++" of Song et al. 2021 (arXiv 2011.13456, appendix H): MNIST, CIFAR-10
        ADM       of Dhariwal and Nichol 2021 (arXiv 2105.05233, section 3): ImageNet-64
    UNetBlock     the residual block of both

Parameter names are EDM's (`model.enc.32x32_block0.conv0.weight`, ...), so its files load strictly.
Two parts of these files are left out: the augmentation embedding, which sampling never uses, and
the constant 2x2 box filters, which average pooling and pixel repetition replace.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd_loss import SIGMA_DATA, T

SIGMA_MAX = 80.0  # EDM's largest noise level, where sampling starts


# --------------------------------------------------------------------------------------------------
# Building blocks


def positional_embedding(c_noise: Tensor, width: int, ddpmpp: bool) -> Tensor:
    """Sines and cosines of c_noise (B,) at geometric frequencies from 1 to 1e-4 -> (B, width).
    DDPM++ puts the sines first and reaches 1e-4. ADM puts the cosines first and ends above it."""
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=c_noise.device)
    angles = c_noise.float()[:, None] * 10000 ** (-k / (half - 1 if ddpmpp else half))
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([sin, cos] if ddpmpp else [cos, sin], dim=1)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with up to 32 groups of at least four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Style(NamedTuple):
    """Where the two architectures differ."""

    ddpmpp: bool  # DDPM++'s embedding and parameter names; else ADM's, see UNet
    eps: float  # of the group norms
    adaptive_scale: bool  # the embedding scales and shifts the features; else it is added to them
    skip_scale: float  # factor after each residual sum; sqrt(1/2) keeps the variance
    resample_skip_conv: bool  # every resampling block has a 1x1 convolution in its skip path
    head_channels: int  # channels per attention head; 0: a single head
    attends_always: bool  # every decoder block at attn_resolutions attends; else only the last


DDPMPP = Style(True, 1e-6, False, math.sqrt(0.5), True, head_channels=0, attends_always=False)
ADM = Style(False, 1e-5, True, 1.0, False, head_channels=64, attends_always=True)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional self-attention and optional 2x resampling.
    `resample` is None, "down" (2x2 mean) or "up" (pixel repetition)."""

    def __init__(
        self, style: Style, c_in: int, c_out: int, c_emb: int, dropout: float,
        resample: str | None = None, attention: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.style, self.resample, self.dropout = style, resample, dropout
        self.num_heads = c_out // (style.head_channels or c_out) if attention else 0
        self.norm0 = group_norm(c_in, style.eps)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, 2 * c_out if style.adaptive_scale else c_out)
        self.norm1 = group_norm(c_out, style.eps)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        needs_conv = c_in != c_out or (resample and style.resample_skip_conv)
        self.skip = nn.Conv2d(c_in, c_out, 1) if needs_conv else nn.Identity()
        if self.num_heads:
            self.norm2 = group_norm(c_out, style.eps)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def _attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # EDM's qkv has its channels in the order (head, channel, q/k/v).
        qkv = self.qkv(self.norm2(x)).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        # Fused kernels need contiguous channels; the others store HW x HW matrices.
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # 3 x (B, heads, HW, C/heads)
        a = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C/heads)
        return self.proj(a.transpose(2, 3).reshape(b, c, h, w))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, c_in, H, W), emb (B, c_emb) -> (B, c_out, H', W'), resampled."""
        h = self.conv0(self._resample(F.silu(self.norm0(x))))
        embedded = self.affine(emb)[:, :, None, None]
        if self.style.adaptive_scale:
            scale, shift = embedded.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + embedded))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + self.skip(self._resample(x))) * self.style.skip_scale
        if self.num_heads:
            x = (self._attention(x) + x) * self.style.skip_scale
        return x


def build_unet(
    style: Style, R: int, stem: nn.Conv2d, widths: list, num_blocks: int, attn_resolutions, **how
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Build the encoder and the decoder of either style, as tables under EDM's names.

    Level L has resolution r = R >> L and widths[L] channels, where R is img_resolution:

        enc:  {R}x{R}_conv,  then per level   [{r}x{r}_down]  {r}x{r}_block0 .. block{n-1}
        dec:  {r}x{r}_in0 _in1 at the lowest, {r}x{r}_up at every other, then  block0 .. block{n}

    Every decoder `block` also takes one of the encoder's outputs, last in, first out.
    """
    block = partial(UNetBlock, style, **how)
    enc, dec = nn.ModuleDict({f"{R}x{R}_conv": stem}), nn.ModuleDict()
    c = stem.out_channels
    skips = [c]
    for level, width in enumerate(widths):
        r = R >> level
        if level > 0:
            enc[f"{r}x{r}_down"] = block(c, c, resample="down")
            skips.append(c)
        for i in range(num_blocks):
            enc[f"{r}x{r}_block{i}"] = block(c, width, attention=r in attn_resolutions)
            c = width
            skips.append(c)

    for level, width in reversed(list(enumerate(widths))):
        r = R >> level
        if level == len(widths) - 1:
            dec[f"{r}x{r}_in0"] = block(c, c, attention=True)
            dec[f"{r}x{r}_in1"] = block(c, c)
        else:
            dec[f"{r}x{r}_up"] = block(c, c, resample="up")
        for i in range(num_blocks + 1):
            attends = r in attn_resolutions and (style.attends_always or i == num_blocks)
            dec[f"{r}x{r}_block{i}"] = block(c + skips.pop(), width, attention=attends)
            c = width
    return enc, dec


def initialise(net: nn.Module, output_scale: float) -> None:
    """Xavier-uniform weights, zero biases; residual branches and the output start near zero."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv1", "proj", "aux_conv", "out_conv")):
                with torch.no_grad():
                    module.weight.mul_(output_scale)


class UNet(nn.Module):
    """F(x; c_noise, labels), DDPM++ or ADM.

    Args:
        style: DDPMPP or ADM.
        img_resolution, img_channels: of the images, (B, img_channels, R, R).
        label_dim: number of classes, 0 for an unconditional network.
        model_channels, channel_mult: level L has model_channels * channel_mult[L] channels.
        num_blocks: residual blocks per resolution (one more in the decoder).
        attn_resolutions: resolutions with self-attention.
        channel_mult_emb, channel_mult_noise: widths of the embedding and of the noise encoding.
        dropout: rate in training mode; DMD runs every network in eval mode.
        **variant: other arguments in EDM's files; each must be as in VARIANT.
    """

    def __init__(
        self, style: Style, img_resolution: int, img_channels: int, label_dim: int,
        model_channels: int, channel_mult: Sequence[int], num_blocks: int,
        attn_resolutions: Sequence[int], channel_mult_emb: int = 4, channel_mult_noise: int = 1,
        dropout: float = 0.10, **variant,
    ):  # fmt: skip
        super().__init__()
        if other := {k: v for k, v in variant.items() if (k, v) not in VARIANT.items()}:
            raise ValueError(
                f"unknown architecture {other}: NCSN++ networks (EDM's '-ve' files) are not "
                "supported; use the '-vp' file of the same dataset"
            )
        self.ddpmpp, self.label_dim = style.ddpmpp, label_dim
        self.width, c_emb = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        if style.ddpmpp:  # EDM's order of the parameters
            self.map_label = nn.Linear(label_dim, self.width) if label_dim else None
        self.map_layer0 = nn.Linear(self.width, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)
        if not style.ddpmpp:
            self.map_label = nn.Linear(label_dim, c_emb, bias=False) if label_dim else None

        R, widths = img_resolution, [model_channels * m for m in channel_mult]
        first = model_channels if style.ddpmpp else widths[0]
        stem = nn.Conv2d(img_channels, first, 3, padding=1)
        self.enc, self.dec = build_unet(
            style, R, stem, widths, num_blocks, attn_resolutions, c_emb=c_emb, dropout=dropout
        )
        norm = group_norm(widths[0], style.eps)
        conv = nn.Conv2d(widths[0], img_channels, 3, padding=1)
        if style.ddpmpp:
            self.dec[f"{R}x{R}_aux_norm"], self.dec[f"{R}x{R}_aux_conv"] = norm, conv
        else:
            self.out_norm, self.out_conv = norm, conv
        initialise(self, output_scale=1e-5 if style.ddpmpp else 0.0)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """c_noise (B,), class_labels (B, label_dim) or None -> (B, c_emb). DDPM++ adds the class
        to the encoded noise level before the two layers, ADM after them."""
        emb = positional_embedding(c_noise, self.width, self.ddpmpp)
        if self.ddpmpp and self.label_dim:
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if not self.ddpmpp and self.label_dim:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """x (B, C, R, R), c_noise (B,), class_labels (B, label_dim) or None -> (B, C, R, R)."""
        emb, skips = self.embed(c_noise, class_labels), []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(module, UNetBlock):
                x = module(x, emb)
        norm, conv = list((self.dec if self.ddpmpp else self).children())[-2:]  # the head
        return conv(F.silu(norm(x)))


# The networks by their names in EDM's files, with defaults for arguments that the files may omit.
NETWORKS = {
    "SongUNet": (DDPMPP, dict(
        model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16],
    )),
    "DhariwalUNet": (ADM, dict(
        model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8],
    )),
}  # fmt: skip

# Arguments in EDM's files that must have these values.
VARIANT = dict(
    embedding_type="positional", encoder_type="standard", decoder_type="standard",
    resample_filter=[1, 1],
)  # fmt: skip
# Arguments in EDM's files that do not matter here: the caller chooses the precision by autocast,
# any sigma > 0 is accepted, and sampling neither augments nor drops labels.
IGNORED = ("use_fp16", "sigma_min", "sigma_max", "augment_dim", "label_dropout")


# --------------------------------------------------------------------------------------------------
# The denoiser and its sampler


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EDM Table 1, column "Ours": c_skip, c_out, 1 / c_in and c_noise, all in sigma's shape.
    (Dividing x by 1 / c_in rounds once; multiplying it by c_in would round twice.)"""
    norm = (sigma**2 + sigma_data**2).sqrt()
    return (sigma_data / norm) ** 2, sigma * sigma_data / norm, norm, sigma.log() / 4


class EDMPrecond(nn.Module):
    """D(x; sigma): EDM's preconditioned denoiser (EDM Eq. 7).

    Args:
        img_resolution, img_channels, label_dim: images (B, C, R, R), number of classes or 0.
        model_type: "SongUNet" (DDPM++) or "DhariwalUNet" (ADM).
        sigma_data: standard deviation of the data, 0.5 in every EDM file.
        **network: further arguments of UNet, and those in IGNORED.
    """

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0,
        model_type: str = "DhariwalUNet", sigma_data: float = SIGMA_DATA, **network,
    ):  # fmt: skip
        super().__init__()
        if model_type not in NETWORKS:
            raise ValueError(f"unknown model_type {model_type!r}; known: {', '.join(NETWORKS)}")
        if not isinstance(sigma_data, int | float) or not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a number above 0, not {sigma_data!r}")
        self.image_shape = (img_channels, img_resolution, img_resolution)
        self.label_dim, self.sigma_data = label_dim, sigma_data
        network = {name: value for name, value in network.items() if name not in IGNORED}
        self.kwargs = dict(  # rebuilds this network; stored in every file we write
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
            model_type=model_type, sigma_data=sigma_data, **network,
        )  # fmt: skip
        style, defaults = NETWORKS[model_type]
        self.model = UNet(style, img_resolution, img_channels, label_dim, **(defaults | network))

    def one_hot(self, class_labels: Tensor | None, batch: int, device) -> Tensor | None:
        """Labels (B,) long, (B, label_dim) one-hot or None (no class: zeros) -> (B, label_dim)."""
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros(batch, self.label_dim, device=device)
        if class_labels.ndim == 1:
            class_labels = F.one_hot(class_labels, self.label_dim)
        return class_labels.float()

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None):
        """Estimate the clean images, (B, C, R, R) float32.

        Args:
            x: clean images in [-1, 1] plus sigma * N(0, I), (B, C, R, R).
            sigma: a number, (B,) or (B, 1, 1, 1), above 0; class_labels: see one_hot.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        c_skip, c_out, norm, c_noise = preconditioning(sigma, self.sigma_data)
        labels = self.one_hot(class_labels, len(x), x.device)
        F_x = self.model(x / norm, c_noise.flatten().expand(len(x)), labels).float()
        return c_skip * x + c_out * F_x


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = SIGMA_MAX, rho: float = 7.0):
    """EDM Eq. 5: n noise levels from sigma_min up to sigma_max (ascending), float64 (n,). No zero
    is appended. n = 1 gives sigma_max alone."""
    if n == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + ramp * (high - low)) ** rho


@torch.no_grad()
def heun_sample(net, z: Tensor, class_labels: Tensor | None = None, steps: int = 18) -> Tensor:
    """EDM Algorithm 1, which is Algorithm 2 with S_churn = 0: Heun's second-order method for the
    probability-flow ODE dx/dsigma = (x - D) / sigma, with 2 * steps - 1 network evaluations.

    Args:
        net: D(x; sigma, class_labels), such as EDMPrecond or a closed form.
        z: N(0, I), (B, C, R, R). x starts at 80 z; `steps` levels go from 80 to 0.002, then to 0.

    Returns:
        y, the ODE's solution (B, C, R, R) in float32; x is float64 in between.
    """
    sigmas = [*karras_sigmas(steps).flip(0).tolist(), 0.0]
    x = z.double() * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - net(x.float(), sigma, class_labels).double()) / sigma
        x_euler = x + (sigma_next - sigma) * slope
        if sigma_next == 0:  # the slope is undefined at 0: the last step is Euler's
            return x_euler.float()
        slope_next = x_euler - net(x_euler.float(), sigma_next, class_labels).double()
        x = x + (sigma_next - sigma) * (slope + slope_next / sigma_next) / 2


class EDMDenoiser(nn.Module):
    """An EDM network in DMD's terms: mu(x_t, t, cond) estimates x_0 at T discrete noise levels.

    Buffers `alpha` (T,) = 1 and `sigma` (T,) = karras_sigmas(T): the forward process of Eq. 3.
    `z_scale` = sigma_{T-1} = sigma_max: x_{T-1} is z_scale * z for z ~ N(0, I).
    """

    def __init__(self, net: nn.Module, sigma_max: float = SIGMA_MAX):
        super().__init__()
        self.net, self.z_scale = net, sigma_max
        self.register_buffer("alpha", torch.ones(T), persistent=False)
        sigma = karras_sigmas(T, sigma_max=sigma_max).float()
        self.register_buffer("sigma", sigma, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """x_t (B, C, R, R), t (B,) long in 0..999, cond (B,) long or None -> estimate of x_0."""
        return self.net(x_t, self.sigma[t], cond)
