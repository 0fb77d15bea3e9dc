"""Installs diffusionlab: `pip install -e .`, for tests `pip install -e '.[test]'`."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
LAUNCH = ["optuna>=5.0", "pandas>=2.2", "submitit>=1.5.4"]


def requirements() -> list[str]:
    """Returns the lines of requirements.txt without comments."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    stripped = (line.partition("#")[0].strip() for line in lines)
    return [line for line in stripped if line]


setuptools.setup(
    name="diffusionlab",
    version="0.1.0",
    description="Diffusion models in JAX: train, sample, evaluate and distil",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["diffusionlab*", "configs*", "launch*"]),
    package_data={"diffusionlab": ["assets/*"], "launch": ["assets/*"]},
    install_requires=requirements(),
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "tf": ["tensorflow"],
        # Runs and sweeps on several machines; see the README.
        "launch": LAUNCH,
        # Files of tokenizers, for the data source "text".
        "text": ["sentencepiece>=0.2", "tokenizers>=0.21"],
        "wandb": ["wandb"],
        # What tests/peers and benchmarks/peers compare with.
        "peers": [
            "clean-fid>=0.1.35",
            "lpips>=0.1.4",
            "pytorch-fid>=0.3",
            "scikit-image>=0.25",
            "torch-fidelity>=0.4",
            "torchmetrics>=1.9",
            "transformers>=4.50",
        ],
        "test": [
            *LAUNCH,
            "kubeflow-trainer-api>=2.3",
            "kubernetes-validate>=1.37",
            "prdc>=0.2",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "tensorboard>=2.18",
            "wandb>=0.19",
        ],
    },
    entry_points={"console_scripts": ["diffusionlab=diffusionlab.main:main"]},
)
