"""Bits per character: a run of text diffusion against n-gram models of the same split.

Interpolated Witten-Bell models of order 1 to 6: with c counts of the training split, h
the last n - 1 tokens, h' without the first of them, and T(h) how many different tokens
follow h,

    p_n(x | h) = (c(h x) + T(h) p_(n-1)(x | h')) / (c(h) + T(h)),   p_0 = 1 / K      (1)

Source: Witten and Bell 1991, "The zero-frequency problem"; as interpolated by Chen and
Goodman 1998. Every held-out token is scored with all that comes before it; the bound of
a run is that of windows, which know nothing of each other.

  python benchmarks/text_bound.py --run=runs/text

The bound is the run's newest evaluation by `elbo`; without one it is evaluated first.
With no --run the table is that of the n-gram models of Python's help.
"""

import argparse
import pathlib

import numpy as np

from diffusionlab import evaluate, experiment, registry, restore, sharding, workdir

PYDOC = {"name": "text", "corpus": "pydoc"}
_MAX_CODE = 2**62


class Counts:
    """Counts of one order: of grams h x, and of the histories h they begin with.

    Args:
      tokens: `[N]` below `num_tokens`.
      order: n, the length of a gram.
      num_tokens: K; K to the power of n must fit into 62 bits.
    """

    def __init__(self, tokens: np.ndarray, order: int, num_tokens: int):
        if num_tokens**order > _MAX_CODE:
            raise ValueError(
                f"order: grams of {order} out of {num_tokens} tokens are too many to "
                "count; this is for characters and bytes."
            )
        self._num_tokens = num_tokens
        grams = codes(tokens, order, num_tokens)
        self._grams, self._counts = np.unique(grams, return_counts=True)
        self._histories, where = np.unique(
            self._grams // num_tokens, return_inverse=True
        )
        self._totals = np.bincount(where, self._counts)
        self._kinds = np.bincount(where)

    def mix(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Returns equation 1 for codes of grams, `shorter` being p_(n-1)."""
        count = _look_up(self._grams, self._counts, grams)
        history = grams // self._num_tokens
        total = _look_up(self._histories, self._totals, history)
        kinds = _look_up(self._histories, self._kinds, history)
        seen = total > 0
        mixed = (count + kinds * shorter) / np.where(seen, total + kinds, 1)
        return np.where(seen, mixed, shorter)


def codes(tokens: np.ndarray, order: int, num_tokens: int) -> np.ndarray:
    """Returns each gram of `order` tokens as one number, `[N - order + 1]` int64."""
    tokens = np.asarray(tokens, np.int64)
    found = np.zeros(len(tokens) - order + 1, np.int64)
    for i in range(order):
        found = found * num_tokens + tokens[i : i + len(found)]
    return found


def _look_up(keys, values, wanted):
    """Values at sorted keys; 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def probabilities(
    train: np.ndarray, grams: np.ndarray, num_tokens: int
) -> list[np.ndarray]:
    """Returns p_n of the last token of each gram given those before, for n = 1 ... N.

    Args:
      train: tokens `[M]`.
      grams: `[B, N]` tokens.
      num_tokens: K.
    """
    found, p = [], np.full(len(grams), 1 / num_tokens)
    for order in range(1, grams.shape[1] + 1):
        own = np.zeros(len(grams), np.int64)
        for column in grams[:, -order:].T:
            own = own * num_tokens + column
        p = Counts(train, order, num_tokens).mix(own, p)
        found.append(p)
    return found


def bits(
    train: np.ndarray, test: np.ndarray, num_tokens: int, max_order: int = 6
) -> list[float]:
    """Returns the bits per token of the held-out tokens for order 1 ... max_order.

    Args:
      train, test: tokens `[M]` and `[N]`; what comes before the first of `test` is the
        end of `train`.
    """
    stream = np.concatenate([train[len(train) - max_order + 1 :], test])
    grams = np.lib.stride_tricks.sliding_window_view(stream, max_order)
    grams = grams.astype(np.int64)
    return [float(-np.log2(p).mean()) for p in probabilities(train, grams, num_tokens)]


def bound(run: pathlib.Path) -> tuple[float, int]:
    """Returns bits per token and the step of the newest `elbo` of a run."""
    found = _evaluated(run)
    if not found:
        _evaluate(run)
        found = _evaluated(run)
    newest = max(found, key=lambda record: record["step"])
    return newest["numbers"]["bits_per_token"], newest["step"]


def _evaluated(run: pathlib.Path) -> list[dict]:
    records = map(workdir.read_json, sorted((run / "evals").glob("step_*.json")))
    return [r for r in records if r["settings"]["name"] == "elbo"]


def _evaluate(run: pathlib.Path) -> None:
    """Evaluates the newest checkpoint by `elbo`, whatever evaluators the run has."""
    import jax

    evals = {"elbo": registry.check("evaluator", {"name": "elbo"}, "config.evals.elbo")}
    built = experiment.build({**workdir.read_config(run), "evals": evals})
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        average = restore.default_ema(built)
        evaluate.evaluate(built, mesh, run, step=None, ema=average, follow=False)


def table(block: dict, run: pathlib.Path | None, max_order: int) -> str:
    """Returns the whole comparison as lines of text."""
    if max_order < 1:
        raise ValueError(f"--max_order: must be at least 1, got {max_order}.")
    splits = [
        registry.build("source", {**block, "split": split}, "config.data.source")
        for split in ("train", "test")
    ]
    if not hasattr(splits[0], "tokens"):
        raise ValueError(f"--run: its data are '{block['name']}', and no text.")
    # Before the counting: a run that has no bound is refused at once.
    reached = None if run is None else bound(run)
    train, test = (source.tokens for source in splits)
    num_tokens = splits[0].spec.num_tokens
    letters = block.get("tokenizer", "characters") == "characters"
    lines = [
        f"{len(train):,} training and {len(test):,} held-out tokens out of "
        f"{num_tokens}; bits per {'character' if letters else 'token'}:"
    ]
    found = bits(train, test, num_tokens, max_order)
    lines += [f"  {n}-gram      {b:.3f}" for n, b in enumerate(found, 1)]
    if reached is not None:
        (number, step), best = reached, min(found)
        word = "below" if number < best else "above"
        lines.append(f"  {run}  at most {number:.3f}, at step {step:,}")
        lines.append(f"  {abs(best - number):.3f} {word} the best of the n-grams")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, help="directory of a run of text")
    parser.add_argument("--max_order", type=int, default=6)
    args = parser.parse_args()
    block = PYDOC
    if args.run is not None:
        block = workdir.read_config(args.run)["data"]["source"]
    print(table(block, args.run, args.max_order))


if __name__ == "__main__":
    main()
