"""EDM's networks, written from the papers: DDPM++, ADM, the preconditioning and the Heun sampler.

Read it bottom up beside Karras et al. 2022 (arXiv 2206.00364, "EDM"):

    load_edm      a file, whatever its format -> EDMPrecond, ready to sample from
    EDMDenoiser   mu(x_t, t, cond): the form in which DMD uses a teacher (T = 1000 noise levels)
    heun_sample   EDM Algorithm 1 (Algorithm 2 with S_churn = 0): the teacher's ODE solution
    EDMPrecond    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM Eq. 7 and Table 1
    SongUNet      F, "DDPM++" of Song et al. 2021 (arXiv 2011.13456): MNIST and CIFAR-10
    DhariwalUNet  F, "ADM" of Dhariwal and Nichol 2021 (arXiv 2105.05233): ImageNet-64
    UNetBlock     the residual block that both are made of; Style, where the two differ

Parameter names are those of EDM's released files (`model.enc.32x32_block0.conv0.weight`, ...), so
released weights load strictly. Two things in those files have no counterpart here, because sampling
never needs them: the augmentation embedding (`map_augment`) and the constant 2x2 box filters
(`resample_filter`), which are an average pool and a pixel repetition.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd_loss import SIGMA_DATA, T
from plumbing.edm_files import read_edm_file
from plumbing.files import load_strictly, one_line_errors
from plumbing.options import UserError

SIGMA_MAX = 80.0  # EDM's largest noise level, where sampling starts


# --------------------------------------------------------------------------------------------------
# Building blocks


def positional_embedding(c_noise: Tensor, width: int, last_frequency_inclusive: bool) -> Tensor:
    """Cosines, then sines, of c_noise (B,) at geometric frequencies from 1 to 1e-4 -> (B, width).

    DDPM++ reaches 1e-4 exactly at its last frequency, ADM stops one step short of it.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=c_noise.device)
    frequencies = 10000 ** (-k / (half - 1 if last_frequency_inclusive else half))
    angles = c_noise.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation over groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Style(NamedTuple):
    """Where the residual blocks of the two architectures differ."""

    eps: float  # of the group norms
    adaptive_scale: bool  # the embedding scales and shifts the normalised features; or is added
    skip_scale: float  # after each residual sum; sqrt(1/2) keeps the variance
    resample_skip_conv: bool  # a resampling block's skip path has a 1x1 convolution in any case
    head_channels: int  # of the attention; 0: a single head
    attends_always: bool  # every decoder block at attn_resolutions; or the last of each


DDPMPP = Style(1e-6, False, math.sqrt(0.5), True, head_channels=0, attends_always=False)
ADM = Style(1e-5, True, 1.0, False, head_channels=64, attends_always=True)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional self-attention and optional 2x resampling
    before the convolutions: `resample` is None, "down" (2x2 mean) or "up" (pixel repetition)."""

    def __init__(
        self,
        style: Style,
        c_in: int,
        c_out: int,
        emb_channels: int,
        dropout: float,
        resample: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.style, self.resample, self.dropout = style, resample, dropout
        self.num_heads = c_out // (style.head_channels or c_out) if attention else 0
        self.norm0 = group_norm(c_in, style.eps)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * c_out if style.adaptive_scale else c_out)
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
        # The channels of qkv count (head, channel, q/k/v), q/k/v fastest.
        qkv = self.qkv(self.norm2(x)).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)  # 3 x (B, heads, HW, C/heads)
        a = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C/heads)
        return self.proj(a.transpose(2, 3).reshape(b, c, h, w))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, c_in, H, W), emb (B, emb_channels) -> (B, c_out, H', W'), H' by the resampling."""
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
    style: Style,
    img_resolution: int,
    img_channels: int,
    first_width: int,
    widths: list[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    emb_channels: int,
    dropout: float,
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """The encoder and decoder tables of both networks, under EDM's names.

    With R = img_resolution, level L has resolution r = R >> L and widths[L] channels:

        enc:  {R}x{R}_conv,  then per level   [{r}x{r}_down]  {r}x{r}_block0 .. block{n-1}
        dec:  {r}x{r}_in0 _in1 at the lowest, {r}x{r}_up at every other, then  block0 .. block{n}

    Every decoder `block` takes one encoder output (from the last to the first) beside its input.
    """
    enc, dec = nn.ModuleDict(), nn.ModuleDict()

    def block(c_in, c_out, **how):
        return UNetBlock(style, c_in, c_out, emb_channels, dropout, **how)

    c = first_width
    enc[f"{img_resolution}x{img_resolution}_conv"] = nn.Conv2d(img_channels, c, 3, padding=1)
    skips = [c]
    for level, width in enumerate(widths):
        r = img_resolution >> level
        if level > 0:
            enc[f"{r}x{r}_down"] = block(c, c, resample="down")
            skips.append(c)
        for i in range(num_blocks):
            enc[f"{r}x{r}_block{i}"] = block(c, width, attention=r in attn_resolutions)
            c = width
            skips.append(c)

    for level, width in reversed(list(enumerate(widths))):
        r = img_resolution >> level
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


def run_unet(enc: nn.ModuleDict, dec: nn.ModuleDict, x: Tensor, emb: Tensor) -> Tensor:
    """Encoder, then decoder with skip connections; the head (`aux_*`) is left to the caller."""
    skips = []
    for module in enc.values():
        x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
        skips.append(x)
    for name, module in dec.items():
        if "_aux_" in name:
            continue
        if "_block" in name:
            x = torch.cat([x, skips.pop()], dim=1)
        x = module(x, emb)
    return x


def initialise(net: nn.Module, output_scale: float) -> None:
    """Xavier-uniform weights, zero biases; residual branches and the output start at ~zero, by the
    factor output_scale on every `conv1`, `proj` and output convolution."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv1", "proj", "aux_conv", "out_conv")):
                with torch.no_grad():
                    module.weight.mul_(output_scale)


# --------------------------------------------------------------------------------------------------
# The two networks F(x; c_noise, labels)


class SongUNet(nn.Module):
    """DDPM++ (Song et al. 2021, appendix C), in EDM's variant: MNIST and CIFAR-10.

    Args:
        img_resolution, img_channels: of the images, (B, img_channels, R, R).
        label_dim: number of classes, 0 for an unconditional network.
        model_channels, channel_mult: level L has model_channels * channel_mult[L] channels.
        channel_mult_emb, channel_mult_noise: widths of the embedding and of the noise encoding.
        num_blocks: residual blocks per resolution (one more in the decoder).
        attn_resolutions: resolutions with self-attention.
        dropout: rate during training of the denoiser; DMD runs every network in eval mode.
        augment_dim, embedding_type, encoder_type, decoder_type, resample_filter: recorded in EDM's
            files. The first is ignored (see the module's docstring), the others must be DDPM++'s.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions=(16,),
        dropout: float = 0.10,
        augment_dim: int = 0,
        embedding_type: str = "positional",
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter=(1, 1),
    ):
        super().__init__()
        options = (embedding_type, encoder_type, decoder_type, list(resample_filter))
        if options != ("positional", "standard", "standard", [1, 1]):
            raise UserError(
                f"this SongUNet is not a DDPM++ {options}: NCSN++ networks (EDM's '-ve' files) are "
                "not supported; use the '-vp' file of the same dataset"
            )
        self.label_dim = label_dim
        self.noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb
        self.map_label = nn.Linear(label_dim, self.noise_channels) if label_dim else None
        self.map_layer0 = nn.Linear(self.noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        R, widths = img_resolution, [model_channels * m for m in channel_mult]
        self.enc, self.dec = build_unet(
            *(DDPMPP, R, img_channels, model_channels, widths),
            *(num_blocks, attn_resolutions, emb_channels, dropout),
        )
        self.dec[f"{R}x{R}_aux_norm"] = group_norm(widths[0], DDPMPP.eps)
        self.dec[f"{R}x{R}_aux_conv"] = nn.Conv2d(widths[0], img_channels, 3, padding=1)
        initialise(self, output_scale=1e-5)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """x (B, C, R, R), c_noise (B,), class_labels (B, label_dim) or None -> (B, C, R, R)."""
        emb = positional_embedding(c_noise, self.noise_channels, last_frequency_inclusive=True)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)  # DDPM++ has the sines first
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        x = run_unet(self.enc, self.dec, x, emb)
        norm, conv = list(self.dec.values())[-2:]
        return conv(F.silu(norm(x)))


class DhariwalUNet(nn.Module):
    """ADM (Dhariwal and Nichol 2021, section 3), in EDM's variant: ImageNet-64. Args: as above."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions=(32, 16, 8),
        dropout: float = 0.10,
        augment_dim: int = 0,
    ):
        super().__init__()
        self.model_channels = model_channels
        emb_channels = model_channels * channel_mult_emb
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None

        widths = [model_channels * m for m in channel_mult]
        self.enc, self.dec = build_unet(
            *(ADM, img_resolution, img_channels, widths[0], widths),
            *(num_blocks, attn_resolutions, emb_channels, dropout),
        )
        self.out_norm = group_norm(widths[0], ADM.eps)
        self.out_conv = nn.Conv2d(widths[0], img_channels, 3, padding=1)
        initialise(self, output_scale=0.0)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """x (B, C, R, R), c_noise (B,), class_labels (B, label_dim) or None -> (B, C, R, R)."""
        emb = positional_embedding(c_noise, self.model_channels, last_frequency_inclusive=False)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        emb = F.silu(emb)

        x = run_unet(self.enc, self.dec, x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


# --------------------------------------------------------------------------------------------------
# The denoiser and its sampler


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EDM Table 1, column "Ours": c_skip, c_out, 1 / c_in (to divide by: that rounds once instead
    of twice) and c_noise, all in sigma's shape."""
    norm = (sigma**2 + sigma_data**2).sqrt()
    return (sigma_data / norm) ** 2, sigma * sigma_data / norm, norm, sigma.log() / 4


class EDMPrecond(nn.Module):
    """D(x; sigma): EDM's preconditioned denoiser (EDM Eq. 7).

    Args:
        img_resolution, img_channels, label_dim: images (B, C, R, R), number of classes or 0.
        model_type: "SongUNet" (DDPM++) or "DhariwalUNet" (ADM).
        sigma_data: standard deviation of the data, 0.5 in every EDM file.
        use_fp16, sigma_min, sigma_max: recorded in EDM's files, ignored: precision is the caller's
            choice (torch.autocast), and any sigma > 0 is accepted.
        **network: further arguments of the network class.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_type: str = "DhariwalUNet",
        sigma_data: float = SIGMA_DATA,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        **network,
    ):
        super().__init__()
        if model_type not in NETWORKS:
            raise UserError(f"unknown model_type {model_type!r}; known: {', '.join(NETWORKS)}")
        if not isinstance(sigma_data, int | float) or not 0 < sigma_data < math.inf:
            raise UserError(f"sigma_data is {sigma_data!r} instead of a number above 0")
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.sigma_data = label_dim, sigma_data
        self.kwargs = dict(  # to build this network again; goes into every file we write
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
            model_type=model_type, sigma_data=sigma_data, **network,
        )  # fmt: skip
        try:
            self.model = NETWORKS[model_type](img_resolution, img_channels, label_dim, **network)
        except TypeError as error:
            raise UserError(f"{model_type} cannot be built: {error}") from None

    def one_hot(self, class_labels: Tensor | None, batch: int, device) -> Tensor | None:
        """Labels (B,) long, (B, label_dim) one-hot or None (no class: zeros) -> (B, label_dim)."""
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros(batch, self.label_dim, device=device)
        if class_labels.ndim == 1:
            return F.one_hot(class_labels, self.label_dim).float()
        return class_labels.float()

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None):
        """Estimate the clean images, (B, C, R, R) float32.

        Args:
            x: noisy images (B, C, R, R), i.e. clean images in [-1, 1] plus sigma * N(0, I).
            sigma: noise level, a number or (B,) or (B, 1, 1, 1), > 0.
            class_labels: (B,) long, (B, label_dim) one-hot float, or None.
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
    """EDM Algorithm 1: Heun's second-order solution of the probability-flow ODE dx = (x-D)/sigma.

    Deterministic (Algorithm 2 with S_churn = 0), 2 * steps - 1 network evaluations.

    Args:
        net: D(x; sigma, class_labels), e.g. EDMPrecond, or any closed form.
        z: unit-variance noise (B, C, R, R); the start is 80 z, `steps` levels lead to 0.002 and 0.

    Returns:
        y, the ODE's solution (B, C, R, R) in float32; the state is kept in float64.
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
    """An EDM network in DMD's terms: mu(x_t, t, cond), estimate of x_0 at T discrete noise levels.

    Buffers `alpha` (T,) = 1 and `sigma` (T,) = karras_sigmas(T): the forward process of Eq. 3.
    `z_scale` = sigma_{T-1} = sigma_max: x_{T-1} is z_scale * z for z ~ N(0, I).
    """

    def __init__(self, net: nn.Module, sigma_max: float = SIGMA_MAX):
        super().__init__()
        self.net = net
        self.register_buffer("alpha", torch.ones(T), persistent=False)
        sigma = karras_sigmas(T, sigma_max=sigma_max).float()
        self.register_buffer("sigma", sigma, persistent=False)
        self.z_scale = float(self.sigma[-1])

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """x_t (B, C, R, R), t (B,) long in 0..999, cond (B,) long or None -> estimate of x_0."""
        return self.net(x_t, self.sigma[t], cond)


# --------------------------------------------------------------------------------------------------
# A network out of a file


def load_edm(path: str | Path, architectures: Sequence[dict] = ()) -> EDMPrecond:
    """A network from a file of any format that edm_files.read_edm_file knows: in eval mode,
    float32, on the CPU, without gradients.

    Args:
        architectures: arguments of EDMPrecond. A file that does not record its own must have the
            names and shapes of one of these.
    """
    return load_edm_with_metadata(path, architectures)[0]


def load_edm_with_metadata(
    path: str | Path, architectures: Sequence[dict] = ()
) -> tuple[EDMPrecond, dict]:
    """load_edm, and what the file says beside the weights."""
    tensors, kwargs, metadata = read_edm_file(path)
    with one_line_errors(Path(path)):
        what = "it"
        if kwargs is None:
            kwargs = nearest_architecture(tensors, architectures)
            size, classes = kwargs["img_resolution"], kwargs["label_dim"]
            what = (
                f"it fits no known network; beside the nearest, {kwargs['model_type']} for "
                f"{size}x{size} images with {classes} classes, it"
            )
        with torch.device("meta"):  # initialising millions of numbers would be in vain
            net = EDMPrecond(**kwargs)
        load_strictly(net.to_empty(device="cpu"), tensors, what)
    return net.eval().requires_grad_(False), metadata


def nearest_architecture(tensors: dict[str, Tensor], architectures: Sequence[dict]) -> dict:
    """The architecture that differs in the fewest names and shapes."""
    if not architectures:
        raise UserError("it does not say which network it is of; use the file of a run")
    found = {(name, value.shape) for name, value in tensors.items()}

    def differences(kwargs: dict) -> int:
        with torch.device("meta"):
            state = EDMPrecond(**kwargs).state_dict()
        return len(found ^ {(name, value.shape) for name, value in state.items()})

    return min(architectures, key=differences)
