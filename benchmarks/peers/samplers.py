"""Our samplers against k-diffusion's and diffusers', on one exact denoiser.

The data are a two-component gaussian mixture in 16 dimensions. The peers compute in
float64 with a denoiser written here in PyTorch, ours in float32 with the network
`gaussian_mixture`; same noise levels, same first latent, same noise at every step. What
is printed is the largest difference of the samples, whose entries are of order 1.

  pip install -r benchmarks/peers/requirements.txt
  python benchmarks/peers/samplers.py
"""
# ruff: noqa: E402

from __future__ import annotations

import sys
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusionlab import registry
from diffusionlab.models import analytic
from diffusionlab.samplers import base
from diffusionlab.types import Prediction

# k-diffusion imports these for training and metrics; its samplers use none of them.
_UNUSED = """
torchvision torchvision.transforms torchvision.transforms.functional torchvision.utils
torchvision.datasets clip cleanfid cleanfid.inception_torchscript dctorch
dctorch.functional kornia kornia.augmentation skimage jsonmerge accelerate
"""
# diffusers loads a module when it is first asked for, and looks for some of these.
SCHEDULERS = {
    name: getattr(diffusers, name)
    for name in (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    )
}
for _name in _UNUSED.split():
    sys.modules.setdefault(_name, mock.MagicMock())

from k_diffusion import sampling as k_sampling

NUM_STEPS, BATCH, SIZE = 20, 64, 16
RNG = np.random.default_rng(0)
MEANS = 0.4 * RNG.standard_normal((2, SIZE))
WEIGHTS, STD = np.array([0.3, 0.7]), 0.5
START, NOISE = RNG.standard_normal((2, BATCH, SIZE))


def exact_x(z, alpha, sigma):
    """E[x | z] in PyTorch, float64."""
    variance = alpha**2 * STD**2 + sigma**2
    offset = z[:, None] - alpha * torch.tensor(MEANS)
    score = torch.log(torch.tensor(WEIGHTS)) - (offset**2).sum(-1) / (2 * variance)
    share = torch.softmax(score, -1)[..., None]
    gain = alpha * STD**2 / variance
    return (share * (torch.tensor(MEANS) + gain * offset)).sum(1)


def ours(block, schedule, start, grid=None, skip_last=False):
    """Samples of a registered sampler; every draw of noise is `NOISE`.

    With `skip_last`, the latents before the last step.
    """
    process = registry.build(
        "process",
        {"name": "gaussian", "prediction": "eps", "schedule": schedule},
        "process",
    )
    sampler = registry.build(
        "sampler", {"num_steps": NUM_STEPS, "grid": grid, **block}, "sampler"
    )

    def predict(z, t):
        x, eps = analytic.denoise(
            z,
            *process.schedule.alpha_sigma(t),
            jnp.log(WEIGHTS),
            jnp.asarray(MEANS, jnp.float32),
            jnp.full(MEANS.shape, STD**2),
        )
        return Prediction(x, eps)

    fixed = jnp.asarray(NOISE, jnp.float32)
    times = sampler.times(process.schedule)
    times = times[:-1] if skip_last else times
    z = start(process, jnp.asarray(START, jnp.float32))
    keys = jax.random.split(jax.random.key(0), BATCH)
    with mock.patch.object(base, "normal", lambda keys, shape: fixed):
        state = jax.jit(
            lambda z: base.solve(sampler, process, predict, z, times, keys)
        )(z)
    return np.asarray(state.z if skip_last else sampler.final(state), np.float64)


# --- k-diffusion: noise levels of EDM's grid, from 80 to 0.002, then 0 ----------------


def k_diffusion(name, **options):
    sigmas = k_sampling.get_sigmas_karras(NUM_STEPS, 0.002, 80.0, 7.0).double()
    model = lambda z, sigma: exact_x(z, torch.ones(()), sigma[0])  # noqa: E731
    noise = torch.tensor(NOISE)
    if "sde" in name or "ancestral" in name:
        options["noise_sampler"] = lambda *_: noise
    z = 80.0 * torch.tensor(START)
    with mock.patch.object(torch, "randn_like", lambda *a, **k: noise):
        return getattr(k_sampling, name)(model, z, sigmas, disable=True, **options)


def edm(block):
    """Ours start at 80 eps in EDM's variables, which the schedule scales."""
    return ours(
        block,
        {"name": "edm"},
        lambda process, eps: 80.0 * eps * process.schedule.alpha_sigma(1.0)[0],
        {"name": "rho"},
    )


CHURN = {"churn": 5.0, "churn_min": 0.05, "churn_max": 50.0, "noise_scale": 1.003}
S_CHURN = {"s_churn": 5.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
K_DIFFUSION = [
    ("euler", {}, "sample_euler", {}),
    ("euler", CHURN, "sample_euler", S_CHURN),
    ("heun", {}, "sample_heun", {}),
    ("heun", CHURN, "sample_heun", S_CHURN),
    ("ddim", {"eta": 1.0}, "sample_euler_ancestral", {}),
    ("ancestral", {"noise_exponent": 0.0}, "sample_euler_ancestral", {}),
    ("adams_bashforth", {"order": 4}, "sample_lms", {"order": 4}),
    ("dpm_solver_2s", {}, "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpm_solver_2m", {}, "sample_dpmpp_2m", {}),
    (
        "dpm_solver_2m",
        {"eta": 1.0},
        "sample_dpmpp_2m_sde",
        {"eta": 1.0, "solver_type": "midpoint"},
    ),
    (
        "dpm_solver_3m",
        {"eta": 1.0, "published": True},
        "sample_dpmpp_3m_sde",
        {"eta": 1.0},
    ),
]

# --- diffusers: 1,000 steps of DDPM, of which 20 are taken ----------------------------


def run_scheduler(scheduler, z, alpha_sigma, **step_options):
    """The usual loop of a diffusers pipeline, with an eps-prediction.

    The last step is left out: there, and just before it, each scheduler has a rule of
    its own, which does not tell whether the method is the same.
    """
    noise = torch.tensor(NOISE)

    def fixed(*args, **kwargs):
        return noise

    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", fixed, create=True):
        for t in scheduler.timesteps[:-1]:
            alpha, sigma = alpha_sigma(scheduler, t)
            model_input = scheduler.scale_model_input(z, t)
            x = exact_x(model_input, alpha, sigma)
            output = (model_input - alpha * x) / sigma
            z = scheduler.step(output, t, z, **step_options).prev_sample
    return z


def table(scheduler, t):
    """alpha and sigma of DDPM's table in float64."""
    betas = np.linspace(1e-4, 0.02, 1000)
    total = np.cumprod(1.0 - betas)[round(float(t))]
    return torch.tensor(total**0.5), torch.tensor((1.0 - total) ** 0.5)


def ddpm(scheduler_name, step_options=None, **options):
    scheduler = SCHEDULERS[scheduler_name](
        beta_schedule="linear", timestep_spacing="trailing", **options
    )
    for name in ("betas", "alphas", "alphas_cumprod"):
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        value = {"betas": betas, "alphas": 1 - betas}.get(name)
        value = torch.cumprod(1 - betas, 0) if value is None else value
        setattr(scheduler, name, value)
    for name, value in (
        ("alpha_t", scheduler.alphas_cumprod**0.5),
        ("sigma_t", (1 - scheduler.alphas_cumprod) ** 0.5),
    ):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)
    if hasattr(scheduler, "lambda_t"):
        scheduler.lambda_t = torch.log(scheduler.alpha_t / scheduler.sigma_t)
    scheduler.set_timesteps(NUM_STEPS)
    z = torch.tensor(START)
    found = run_scheduler(scheduler, z, table, **(step_options or {}))
    stops = np.asarray(scheduler.timesteps, np.float64) / 999.0
    return found, {"name": "custom", "times": [*stops.tolist(), 0.0]}


def discrete(block, grid):
    schedule = {"name": "discrete_beta"}
    return ours(block, schedule, lambda process, eps: eps, grid, skip_last=True)


DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FULL = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
DIFFUSERS = [
    ("ddim", {"eta": eta}, "DDIMScheduler", {"clip_sample": False}, {"eta": eta})
    for eta in (0.0, 0.5, 1.0)
]
DIFFUSERS += [
    (
        "ancestral",
        {"noise_exponent": exponent},
        "DDPMScheduler",
        {"clip_sample": False, "variance_type": name},
        {},
    )
    for exponent, name in ((0.0, "fixed_small"), (1.0, "fixed_large"))
]
DIFFUSERS += [
    (f"dpm_solver_{kind}", options, DPM, {"solver_order": order, **FULL}, {})
    for order, kind, options in (
        (1, "1s", {}),
        (2, "2m", {}),
        (3, "3m", {"published": True}),
    )
]
DIFFUSERS += [
    (
        f"dpm_solver_{order}{kind}",
        {"eta": 1.0},
        DPM,
        {"solver_order": order, "algorithm_type": "sde-dpmsolver++", **FULL},
        {},
    )
    for order, kind in ((1, "s"), (2, "m"))
]
DIFFUSERS += [
    (
        "unipc",
        {"order": order, "variant": variant},
        UNIPC,
        {"solver_order": order, "solver_type": variant, **FULL},
        {},
    )
    for variant in ("bh1", "bh2")
    for order in (1, 2, 3)
]
DIFFUSERS += [
    (
        "deis",
        {"order": order, "variable": "log_rho"},
        "DEISMultistepScheduler",
        {"solver_order": order, "lower_order_final": False},
        {},
    )
    for order in (1, 2, 3)
]


def flow(shift):
    """Rectified flow: diffusers takes Euler steps of the velocity."""
    scheduler = SCHEDULERS["FlowMatchEulerDiscreteScheduler"](shift=shift)
    # From noise level 1 in equal steps to 0, before the shift.
    scheduler.set_timesteps(sigmas=(1 - np.arange(NUM_STEPS) / NUM_STEPS).tolist())
    z = torch.tensor(START)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        sigma = sigma.double()
        x = exact_x(z, 1 - sigma, sigma)
        z = scheduler.step((z - x) / sigma, t, z, return_dict=False)[0].double()
    grid = {"name": "shifted", "shift": shift}
    block = {"name": "ddim"}
    schedule = {"name": "flow", "logsnr_min": -34.0, "logsnr_max": 34.0}
    return z, ours(block, schedule, lambda process, eps: eps, grid)


def show(label, options, peer, peer_options, a, b):
    stated = " ".join(f"{k}={v}" for k, v in options.items())
    peers = " ".join(f"{k}={v}" for k, v in peer_options.items())
    difference = float(np.abs(a - np.asarray(b, np.float64)).max())
    print(f"{difference:9.1e}  {label} {stated:<28} | {peer} {peers}", flush=True)
    return difference


def main() -> None:
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
    print("largest difference, our sampler, the peer")
    for name, options, peer, peer_options in K_DIFFUSION:
        theirs = k_diffusion(peer, **dict(peer_options))
        mine = edm({"name": name, **options})
        show(name, options, f"k-diffusion {peer}", peer_options, mine, theirs)
    for name, options, peer, peer_options, step_options in DIFFUSERS:
        theirs, grid = ddpm(peer, step_options, **peer_options)
        mine = discrete({"name": name, **options}, grid)
        show(name, options, f"diffusers {peer}", peer_options, mine, theirs)
    for shift in (1.0, 3.0):
        theirs, mine = flow(shift)
        peer = "diffusers FlowMatchEulerDiscreteScheduler"
        show("ddim", {"shift": shift}, peer, {}, mine, theirs)


if __name__ == "__main__":
    main()
