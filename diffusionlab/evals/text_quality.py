"""Samples of text: varied, not copied, and likely to a reference language model.

A name that ends in `_real`, up to a slash, is the same figure of held-out data in the
place of samples: what a perfect sampler would reach. See `metrics/text.py` and
`metrics/gradient_moment.py` for what the numbers are.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from diffusionlab import types
from diffusionlab.evals import arrays
from diffusionlab.features import language_model
from diffusionlab.features.language_model import LanguageModel
from diffusionlab.metrics import gradient_moment, text

_Z = 1.959964  # 97.5 % of a normal variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextQuality:
    """Entropy, distinct-n and copies; with a reference, perplexity and Gradient Moment.

    Numbers, with `_real` ones beside them:

      entropy: mean over samples of the entropy of their tokens, in nats.
      distinct/<n>: share of different ones among all n-grams.
      overlap/<n>: share of n-grams that occur in the training examples looked at.
      longest_copy: mean over samples of the longest run that occurs there;
        longest_copy_max is the longest of all.
      perplexity: under the reference, with its 95 % interval over samples.
      gradient_moment: with its interval; gradient_norm is the uncentred norm.

    Attributes:
      num_samples: samples drawn, and held-out examples at most.
      distinct: lengths n of distinct-n, at most the length of an example.
      ngrams: lengths n of overlap.
      num_train: training examples that copies are looked for in, at most, evenly
        spaced; runs across the ends of examples are not found.
      reference: '' for none; a run of the objective `language_model`; or a GPT-2, the
        folder with its model.safetensors and tokenizer.json.
      reference_step: of the run's checkpoint; None is the newest.
      num_batches: independent batches of the samples, and of held-out data, for the
        Gradient Moment; a gradient of each is held. 0 leaves it out.
      batch_size: examples that the reference sees at a time.
      every: steps between evaluations; 0 is at the end only.

    Raises:
      ValueError: a number is too small.
    """

    num_samples: int = 256
    distinct: tuple[int, ...] = (1, 2, 3)
    ngrams: tuple[int, ...] = (4, 8, 16)
    num_train: int = 10_000
    reference: str = ""
    reference_step: int | None = None
    num_batches: int = 8
    batch_size: int = 16
    every: int = 0

    processes = ("categorical",)
    takes_tokens = True
    compares_splits = True

    def __post_init__(self):
        for name in ("num_samples", "num_train", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: must be at least 1, got {getattr(self, name)}."
                )
        for name in ("distinct", "ngrams"):
            if any(n < 1 for n in getattr(self, name)):
                raise ValueError(
                    f"{name}: lengths are at least 1, got {getattr(self, name)}."
                )
        batches = self.num_batches if self.reference else 0
        if batches and not 2 <= batches <= self.num_samples:
            raise ValueError(
                "num_batches: must be from 2 to num_samples, or 0 for none, got "
                f"{self.num_batches}."
            )
        if self.reference_step is not None and not self.reference:
            raise ValueError("reference_step: there is no reference; name its run.")

    def check(self, source: types.Source) -> None:
        """Raises ValueError or FileNotFoundError where it cannot work on these data."""
        spec = source.spec
        if not spec.num_tokens or len(spec.shape) != 1:
            raise ValueError(
                "name: the evaluator 'text_quality' takes text, tokens (L,), and the "
                f"data are {'tokens' if spec.num_tokens else 'numbers'} {spec.shape}."
            )
        for name in ("distinct", "ngrams"):
            if any(n > spec.shape[0] for n in getattr(self, name)):
                raise ValueError(
                    f"{name}: examples have {spec.shape[0]} tokens, and it asks for "
                    f"{max(getattr(self, name))} in a row."
                )
        if self.reference:
            language_model.check(self.reference)

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        samples = np.asarray(context.draw(self.num_samples)[0], np.int32)
        real = np.asarray(arrays.spread(context.test, self.num_samples)["x"], np.int32)
        train = np.asarray(arrays.spread(context.train, self.num_train)["x"], np.int32)
        result = types.EvalResult({}, {}, {}, {}, {})
        result.notes["data"] = (
            f"{len(samples)} samples, {len(real)} held-out and {len(train)} training "
            f"examples of {samples.shape[1]} tokens"
        )
        for x, ending in ((samples, ""), (real, "_real")):
            result.numbers.update(self._plain(x, train, ending))
        if not self.reference:
            return result
        model = language_model.load(
            self.reference, context.room, self.reference_step, "reference"
        )
        provenance = {"reference": self.reference, **model.about}
        found = _Reference(model, context.train, self.batch_size)
        groups = {"": found.tokens(samples), "_real": found.tokens(real)}
        for ending, group in groups.items():
            found.perplexity(result, group, ending)
        if self.num_batches:
            found.moment(result, groups[""], groups["_real"], self.num_batches)
        found.note(result, *groups[""][1:])
        return result._replace(provenance=provenance)

    def _plain(self, x, train, ending: str) -> dict[str, float]:
        numbers = {f"entropy{ending}": float(text.unigram_entropy(x).mean())}
        for n in self.distinct:
            numbers[f"distinct{ending}/{n}"] = text.distinct(x, n)
        runs = text.copied_runs(x, train)
        for n in self.ngrams:
            begins = runs[:, : x.shape[1] - n + 1]
            numbers[f"overlap{ending}/{n}"] = float(np.mean(begins >= n))
        longest = runs.max(axis=1)
        numbers[f"longest_copy{ending}"] = float(longest.mean())
        numbers[f"longest_copy_max{ending}"] = float(longest.max())
        return numbers


class _Reference:
    """A reference model at work; each of several processes does all of it."""

    def __init__(self, model: LanguageModel, source: types.Source, batch_size: int):
        self._model, self._source, self._rows = model, source, batch_size
        self._params = jax.device_put(model.params)
        self._log_probs = jax.jit(model.log_probs)
        self._gradient = gradient_moment.make_gradient(model.log_probs)

    def tokens(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        return language_model.tokens_of(self._model, self._source, x)

    def perplexity(self, result, group, ending: str) -> None:
        tokens, mask, _ = group
        found = []
        for start in range(0, len(tokens), self._rows):
            chosen = np.arange(start, start + self._rows)
            some = tokens[np.minimum(chosen, len(tokens) - 1)]
            found.append(jax.device_get(self._log_probs(self._params, some)))
        log_p = np.concatenate(found)[: len(tokens)]
        mean, error = text.mean_and_error(log_p, mask)
        name = f"perplexity{ending}"
        result.numbers[name] = math.exp(mean)
        if math.isfinite(error):
            ends = (mean - _Z * error, mean + _Z * error)
            result.intervals[name] = tuple(math.exp(end) for end in ends)

    def moment(self, result, samples, real, num_batches: int) -> None:
        fewest = min(len(samples[0]), len(real[0]))
        if fewest < num_batches:
            raise ValueError(
                f"num_batches: {num_batches} of them need as many held-out examples, "
                f"and there are {fewest}."
            )
        gradients = [self._gradients(group, num_batches) for group in (samples, real)]
        for name, moment in gradient_moment.gradient_moment(*gradients).items():
            result.numbers[name] = moment.value
            if math.isfinite(moment.error):
                width = _Z * moment.error
                result.intervals[name] = moment.value - width, moment.value + width

    def _gradients(self, group, num_batches: int) -> np.ndarray:
        tokens, mask, _ = group
        rows = min(self._rows, -(-len(tokens) // num_batches))
        size = sum(leaf.size for leaf in jax.tree.leaves(self._params))
        found = np.empty((num_batches, size), np.float32)
        for i in range(num_batches):
            # Neighbours are alike in held-out text: batches take turns.
            own = slice(i, None, num_batches)
            found[i] = self._gradient(self._params, tokens[own], mask[own], rows)
        return found

    def note(self, result, mask: np.ndarray, cut: int) -> None:
        model = self._model
        own = language_model.same_tokens(self._source, model.source)
        how = "tokens as they are" if own else "decoded and encoded by its tokenizer"
        first = "" if model.first == 0 else "; the first token is not scored"
        longer = f"; {cut} samples cut to its context" if cut else ""
        longer += "; of the ends of a text the first" if model.end is not None else ""
        if silent := int(np.sum(~mask.any(axis=1))):
            longer += f"; {silent} samples without a token to score"
        result.notes["perplexity"] = (
            f"{how}, context {model.context}{first}{longer}; under another reference "
            "it is another number, and so is the Gradient Moment"
        )
