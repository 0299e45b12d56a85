"""The whole paper on one screen: a teacher, its pairs, Algorithm 1, and a one-step generator.

`python minimal.py` distils the MNIST teacher (FD 0.99) in 6 minutes on 2 CPU cores, or on a GPU,
and writes minimal.png. Three seeds give FD 1.04 to 1.15, accuracy 98.2 to 98.5 %, diversity 0.98.
"""

import copy

import torch
from torchvision.utils import save_image
from tqdm import tqdm

from dmd_loss import (
    OneStepGenerator,
    all_noise_levels,
    denoising_loss,
    distribution_matching_loss,
    dm_noise_levels,
    l2_distance,
    regression_loss,
)
from edm_unet import EDMDenoiser, heun_sample
from plumbing.edm_files import load_edm

# Change a constant and see what happens. To distil a class-conditional EDM network, download it
# and set TEACHER = "edm-cifar10-32x32-cond-vp.pkl", LEARNING_RATE = 5e-5, STEPS = 300_000.
TEACHER = "assets/mnist_teacher.safetensors"
NUM_PAIRS = 1000
STEPS = 1000  # training steps
B, R = 16, 4  # unpaired and paired samples per step
LEARNING_RATE = 6e-4  # of G; mu_fake's is five times as high, so that it keeps up with G
LAMBDA_REG, T_MAX = 0.5, 600  # in the paper 0.25, with LPIPS instead of L2, and 980
SEED = 0

torch.manual_seed(SEED)
device = "cuda" if torch.cuda.is_available() else "cpu"
autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

# Algorithm 1, line 1: G and mu_fake start as copies of the frozen teacher, without its dropout.
mu_real = EDMDenoiser(load_edm(TEACHER)).eval().to(device)
G = OneStepGenerator(copy.deepcopy(mu_real)).eval().requires_grad_(True)
mu_fake = copy.deepcopy(mu_real).requires_grad_(True)
average = copy.deepcopy(G).requires_grad_(False)  # of G's weights, late ones counting most
adam_G = torch.optim.AdamW(G.parameters(), LEARNING_RATE, betas=(0.0, 0.999))  # no momentum
adam_fake = torch.optim.AdamW(mu_fake.parameters(), 5 * LEARNING_RATE, betas=(0.0, 0.999))

# Section 3.3: pairs of noise z and the teacher's ODE solution y for it, by 35 evaluations each.
shape, classes = mu_real.net.image_shape, mu_real.net.label_dim
pairs_z = torch.randn(NUM_PAIRS, *shape, device=device)
pairs_cond = torch.arange(NUM_PAIRS, device=device) % classes
batches = zip(tqdm(pairs_z.split(100), "pairs"), pairs_cond.split(100), strict=True)
pairs_y = torch.cat([heun_sample(mu_real.net, z, cond, steps=18) for z, cond in batches])

for step in tqdm(range(STEPS), "train"):
    # 1. Sample z ~ N(0, I) with its condition, and pairs (z_ref, y_ref) ~ D.
    z, noise, noise_fake = torch.randn(3, B, *shape, device=device)
    u, u_fake = torch.rand(2, B, device=device)
    t, t_fake = dm_noise_levels(u, T_MAX), all_noise_levels(u_fake)
    cond = torch.randint(classes, (B,), device=device)
    k = torch.randint(NUM_PAIRS, (R,), device=device)
    z_ref, y_ref, cond_ref = pairs_z[k], pairs_y[k], pairs_cond[k]

    with autocast:
        # 2. Generate x = G(z) and x_ref = G(z_ref) in one call.
        x, x_ref = G(torch.cat([z, z_ref]), torch.cat([cond, cond_ref])).split([B, R])

        # 3. Distribution-matching gradient (Eq. 7) and regression (Eq. 9); step G.
        loss_kl = distribution_matching_loss(mu_real, mu_fake, x, cond, t=t, noise=noise)
        loss_reg = regression_loss(x_ref, y_ref, l2_distance)
    (loss_kl + LAMBDA_REG * loss_reg).backward()
    torch.nn.utils.clip_grad_norm_(G.parameters(), 10)  # Appendix B
    adam_G.step()
    adam_G.zero_grad()
    for mean, weight in zip(average.parameters(), G.parameters(), strict=True):
        mean.lerp_(weight.detach(), 1 - (1 - 1 / (step + 1)) ** 4)  # step k weighs k**3

    # 4. Denoise the generated samples (Eq. 6): the same x, detached.
    with autocast:
        loss_fake = denoising_loss(mu_fake, x.detach(), cond, t=t_fake, noise=noise_fake)

    # 5. Step mu_fake.
    loss_fake.backward()
    torch.nn.utils.clip_grad_norm_(mu_fake.parameters(), 10)
    adam_fake.step()
    adam_fake.zero_grad()

# Rows: the teacher's solutions, G of the same noise, G of fresh noise.
z, y, cond = pairs_z[:20], pairs_y[:20], pairs_cond[:20]
rows = torch.cat([y, average(z, cond), average(torch.randn_like(z), cond)])
save_image(rows, "minimal.png", nrow=20, normalize=True, value_range=(-1, 1))
