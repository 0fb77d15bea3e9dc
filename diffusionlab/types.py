"""The data types that cross the rooms of diffusionlab, and the protocols they obey.

Time `t` is float32 in [0, 1]; 0 is data, 1 is noise. It is a scalar, `[B]`, or `[B, F]`
where every frame has its own; schedules and processes broadcast it from the left.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Cond = Mapping[str, Array]
Metrics = dict[str, tuple[Array, Array]]
"""Name -> (sum, count): adds up over micro-batches, devices and steps."""


def lift(q: Array, ndim: int) -> Array:
    """Appends axes of size 1 up to `ndim`: `[B]` -> `[B, 1, 1, 1]`."""
    q = jnp.asarray(q)
    return q.reshape(q.shape + (1,) * (ndim - q.ndim))


def path_name(path) -> str:
    """'a/b/kernel' for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Network(NamedTuple):
    """Two pure functions and the logical axes of the parameters.

    Attributes:
      init: `init(key) -> Params`.
      apply: `apply(params, z, cond, *, train=False, key=None) -> Array`.
      param_axes: rules `(regex over the parameter path, logical axes)`.
      features: `features(params, z, cond) -> (output, features [B, d])`, of a network
        that names what its last layer sees; others raise ValueError.
      scores_targets: of tokens; given cond['target'], int32 tokens `[B, ...]`, it
        answers their log-probabilities `[B, ...]` under the softmax of its logits,
        which it then need not hold all at once.
      is_causal: of tokens; what it says of a position follows from those before it.
      noise_input: numbers of noise for each position that it takes as cond['noise'],
        `[B, ..., noise_input]`.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Any]
    param_axes: tuple[tuple[str, tuple[str | None, ...]], ...]
    features: Callable[..., tuple[Array, Array]] | None = None
    scores_targets: bool = False
    is_causal: bool = False
    noise_input: int = 0


class Prediction(NamedTuple):
    """What a gaussian denoiser says: clean data and noise, both shaped as z_t."""

    x: Array
    eps: Array


class CategoricalPrediction(NamedTuple):
    """What a denoiser of tokens says: log p(x_i | z_t), `[B, ..., K]` float32.

    It is normalised over the K tokens. See `processes/categorical.py` for what it is
    not: the distribution that goes into the posterior in the place of x.
    """

    logits: Array


Predict = Callable[[Array, Array], Prediction]
"""(z_t, t) -> Prediction; parameters, conditioning and guidance are already inside.

t is a scalar, or `[B]` where examples have times of their own."""

CondPredict = Callable[[Array, Array, Cond], Prediction]
"""(z_t, t, cond) -> Prediction: what guidance transforms."""


class Schedule(Protocol):
    """t -> logsnr, alpha, sigma, and back. `logsnr` is strictly decreasing in t."""

    def logsnr(self, t: Array) -> Array: ...
    def derivative(self, t: Array) -> Array: ...
    def alpha_sigma(self, t: Array) -> tuple[Array, Array]: ...
    def inverse(self, logsnr: Array) -> Array: ...


class Times(Protocol):
    """The law from which training times are drawn."""

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in [0, 1] and the importance weight of each, `[B]`."""
        ...


class Process(Protocol):
    """How data become noise, and how a raw network output becomes a prediction.

    `sigma_data` is the standard deviation that the data are taken to have. The process
    of tokens, `processes/categorical.py`, has functions of its own instead of most.
    """

    schedule: Schedule
    sigma_data: float

    def decode(self, x: Array) -> Array: ...
    def prior_from(
        self, keys: Array, shape: tuple[int, ...], t: float = 1.0
    ) -> Array: ...
    def prior_std(self, t: float = 1.0) -> Array: ...
    def corrupt(self, key: Array, x: Array, t: Array) -> tuple[Array, Array]: ...
    def mix(self, x: Array, eps: Array, t: Array) -> Array: ...
    def network_input(self, z_t: Array, t: Array) -> Array: ...
    def velocity(self, prediction: Prediction, t: Array) -> Array: ...
    def predict(self, raw: Array, z_t: Array, t: Array) -> Prediction: ...
    def target(self, x: Array, eps: Array, t: Array) -> Array: ...
    def eps_error_scale(self, t: Array) -> Array: ...
    def posterior(
        self,
        prediction: Prediction,
        z_t: Array,
        t: Array,
        s: Array,
        noise_exponent: float = 0.0,
    ) -> tuple[Array, Array]: ...


class Role(NamedTuple):
    """A place for parameters: which network, and how it starts.

    Attributes:
      network: entry of `config.networks`.
      init: 'random', 'copy:<role>', or 'teacher': what `config.teacher.start` says.
      ema: names of `config.ema` this role keeps; None keeps all of them.
      trainable: False for one that only a `Transition` changes; it has no optimiser
        and keeps no averages.
    """

    network: str
    init: str = "random"
    ema: tuple[str, ...] | None = None
    trainable: bool = True


class Transition(NamedTuple):
    """A change of the state between two steps.

    Attributes:
      copy: role -> where its new parameters come from: a role, or '<role>@<average>'.
      restart: roles whose optimiser and averages start afresh.
    """

    copy: Mapping[str, str]
    restart: tuple[str, ...] = ()


class Teacher(NamedTuple):
    """The network of another run, as its own config says.

    Attributes:
      predict: `predict(params, z_t, t, cond) -> Prediction`; `params` by role are
        `inputs.params["teacher"]`.
      has_null_label: whether it was trained without labels, too.
      cond: numbers that its network is told where nobody says otherwise; a student,
        whose network is of the same kind, is told the same.
    """

    predict: Callable[..., Prediction]
    has_null_label: bool
    cond: Mapping[str, float] = {}


class Inputs(NamedTuple):
    """What a loss sees besides the parameters of the roles it trains.

    Attributes:
      batch: leaves `[B, ...]`.
      key: the random key of this step and micro-batch.
      step: int32 scalar, finished optimiser steps.
      params: parameters of every role, no gradient flows into them. With a teacher its
        own, by role, are the entry 'teacher'; where the objective asks for them with
        `needs_second_moment`, the second moments of its Adam are 'second_moment'.
      ema: averages by name, then role.
    """

    batch: Batch
    key: Array
    step: Array
    params: Mapping[str, Params]
    ema: Mapping[str, Mapping[str, Params]]


class Phase(NamedTuple):
    """The roles one compiled step trains, and on which loss.

    Attributes:
      trains: names of the roles; each has its own optimiser.
      loss: `loss({role: params}, inputs) -> (scalar, Metrics)`.
    """

    trains: tuple[str, ...]
    loss: Callable[[Mapping[str, Params], Inputs], tuple[Array, Metrics]]


class Objective(Protocol):
    """Which networks there are, which of them each phase trains, one loss per phase.

    `samples_from` names the roles whose parameters `predict` needs. An objective may
    have besides:

      transition(step): name of a change of the state before optimiser step `step`, or
        None; plain Python on the host. `transitions` has a `Transition` for each name.
      check_sampler(sampler): raises ValueError for one its samples cannot come from.
      evaluations: phase -> network evaluations of one step per example, a backward pass
        being two and a Jacobian-vector product one.
    """

    roles: Mapping[str, Role]
    phases: Mapping[str, Phase]
    samples_from: tuple[str, ...]

    def phase(self, step: int) -> str:
        """Name of the phase of optimiser step `step`; plain Python on the host."""
        ...

    def predict(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> Prediction:
        """The prediction that samplers and evaluators use.

        An objective without it has nothing to sample.
        """
        ...


class Sampler(Protocol):
    """From noise to data, given `predict(z_t, t)`; driven by `samplers/base.py`.

    `t` and `s` are scalars; `keys` has one random key per example, `[B]`. What most
    samplers answer alike is in `samplers/base.py`: times, init, final, one_per_step.

    Attributes:
      num_steps: steps from noise to t = 0.
      grid: where the stops are; None is uniform in t.
      num_evaluations: network evaluations of one sample, a Jacobian-vector product
        being one more; None where it follows from the data.
    """

    num_steps: int
    grid: Any
    num_evaluations: int | None

    def times(self, schedule: Schedule) -> np.ndarray: ...
    def init(self, z: Array, t: Array) -> Any: ...
    def step(
        self, process: Process, predict: Predict, state: Any, t: Array, s: Array, keys
    ) -> Any: ...
    def final(self, state: Any) -> Array: ...


class DataSpec(NamedTuple):
    """What a data source yields, without looking at its elements.

    Attributes:
      shape: of one example `x`, without the batch axis.
      num_classes: 0 when there are no labels.
      class_names: as many names as classes.
      num_tokens: x are int32 tokens below this number; 0 where x are float32 numbers.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    num_tokens: int = 0


class Source(Protocol):
    """Random access to examples: dictionaries of numpy arrays ('x' and 'label').

    A source that can answer for many indices at once does so faster with
    `__getitems__(indices) -> dict of stacked arrays`.
    """

    spec: DataSpec

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class EvalContext(NamedTuple):
    """What an evaluator may use; it sees no network, state or mesh.

    Attributes:
      step: finished optimiser steps of the parameters under evaluation.
      spec: shape and classes of the data.
      train: the source that was trained on.
      test: the held-out source.
      draw: `draw(num_samples, sampler=None) -> (x [N, ...] float32, label [N] int32)`;
        classes in turn (label i is i mod num_classes), sample i a function of (seed, i)
        alone; another sampler than the config's where one is given.
      loss: `loss(batch, index) -> Metrics`: the training loss and its metrics on a
        batch of numpy arrays, with the randomness of stream 'eval' at `index`.
      predict: `predict(z_t, t, label) -> Prediction`, jitted, t and label `[B]`.
      compute: `compute(function, *arrays, guided=False) -> numpy`: the jitted
        `function(predict, *arrays)`, with `predict(z_t, t, cond) -> Prediction` to call
        and to differentiate. It is compiled once per function object and shapes.
      process: the process under which the network was trained.
      sampler: of the config.
      stream: `stream(num_samples, start=0, sampler=None, sobol=False)` yields the same
        samples as `draw` in batches `(x, label)`, from sample `start` on: any number of
        them, without ever holding them all. With `sobol` the noise that a deterministic
        sampler starts from is a scrambled Sobol sequence.
      apply: `apply(function, params, x) -> numpy`: the jitted `function(params, x)`
        with the rows of x `[B, ...]` split over all devices; compiled once per function
        object and shapes.
      room: what feature networks are loaded with, see `features/base.py`.
      scratch: a folder that belongs to this evaluation of these parameters alone: what
        an interrupted one left there is what this one would make again.
      about: JSON that says where the samples come from.
    """

    step: int
    spec: DataSpec
    train: Source
    test: Source
    draw: Callable[..., tuple[np.ndarray, np.ndarray]]
    loss: Callable[[Batch, int], Metrics]
    predict: Callable[..., Prediction]
    compute: Callable[..., Any]
    process: Any
    sampler: Any
    stream: Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]] | None = None
    apply: Callable[..., Any] | None = None
    room: Any = None
    scratch: pathlib.Path | None = None
    about: Mapping[str, Any] = {}


class EvalResult(NamedTuple):
    """What an evaluator found.

    Attributes:
      numbers: metric name -> value.
      notes: name -> text that says what the numbers were computed from.
      pictures: file stem -> uint8 array `[H, W, 3]`.
      intervals: metric name -> (low, high), for some of the numbers: 95 %.
      provenance: JSON about the samples, reference and network behind the numbers.
    """

    numbers: dict[str, float]
    notes: dict[str, str] = {}
    pictures: dict[str, np.ndarray] = {}
    intervals: dict[str, tuple[float, float]] = {}
    provenance: Mapping[str, Any] = {}


class Evaluator(Protocol):
    """From (samples, data, losses) to named numbers and pictures.

    `every` is in steps; 0 runs it only at the end of training and in mode eval. One
    that does not suit every data source has `check(source)`, one that does not suit
    every process `check_process(process)`; they raise ValueError.
    """

    every: int

    def __call__(self, context: EvalContext) -> EvalResult: ...
