"""Features per second of our FID network against torch-fidelity's, on this CPU.

Both run in one process on the same random weights and the same random images, in
alternating rounds, each with as many threads as it takes by itself. What counts is the
ratio. `--memory` runs one of the two alone and prints the peak of its process.

  pip install -r benchmarks/peers/requirements.txt
  PYTHONPATH=. python benchmarks/peers/features.py
  PYTHONPATH=. python benchmarks/peers/features.py --memory ours
  PYTHONPATH=. python benchmarks/peers/features.py --memory theirs
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import jax
import numpy as np
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as peer

from diffusionlab.features import inception


def random_peer():
    """torch-fidelity's extractor with the parameters that torch starts it from."""
    load, state = torch.load, nn.Module.load_state_dict
    torch.load, nn.Module.load_state_dict = lambda *a, **k: {}, lambda *a, **k: None
    try:
        return peer.FeatureExtractorInceptionV3(
            "random", ["2048", "logits_unbiased"], feature_extractor_weights_path="-"
        )
    finally:
        torch.load, nn.Module.load_state_dict = load, state


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=["ours", "theirs"])
    flags = parser.parse_args()

    network = random_peer()
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    params = jax.device_put(inception.convert(state))
    apply = jax.jit(inception.APPLY["legacy_tf"])
    shape = (flags.batch, flags.size, flags.size, 3)
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    z = torch.tensor(x.transpose(0, 3, 1, 2).copy())

    def ours():
        return np.asarray(apply(params, x)["features"])

    def theirs():
        return network(z)[0].numpy()

    if flags.memory:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        {"ours": ours, "theirs": theirs}[flags.memory]()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{flags.memory}: {before >> 10} MB before, {after >> 10} MB at the peak")
        return

    a, b = ours(), theirs()
    print(f"largest difference: {np.abs(a - b).max() / np.abs(b).max():.1e} of the max")
    ratios = []
    for _ in range(flags.rounds):
        seconds = []
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        rates = [flags.batch / s for s in seconds]
        ratios.append(rates[0] / rates[1])
        print(f"ours {rates[0]:.2f}/s  theirs {rates[1]:.2f}/s  {ratios[-1]:.2f} times")
    print(
        f"median {statistics.median(ratios):.2f} times, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
