"""What every config shares: the blocks in their order, with the usual decisions."""

import ml_collections

VARIANTS = ("", "smoke")


def check_variant(variant: str, accepted=VARIANTS) -> None:
    """Raises ValueError if a config has no such variant; lists those it has."""
    if variant not in accepted:
        named = ", ".join(repr(v) for v in accepted)
        raise ValueError(f"--config: no variant '{variant}'; there are: {named}.")


def get_config() -> ml_collections.ConfigDict:
    """Blocks that are the same for most runs; a config sets the others."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.process = dict(name="gaussian", prediction="v", schedule=dict(name="cosine"))
    config.objective = dict(
        name="denoising",
        weighting=dict(name="eps"),
        times=dict(name="uniform"),
        label_dropout=0.1,
    )
    config.ema = dict(main=dict(name="exponential", decay=0.999))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.precision = dict(compute="float32")
    config.guidance = dict(classifier_free=dict(guidance_scale=1.0), clip_x=dict())
    config.evals = dict(held_out=dict(name="denoising_loss"))
    return config


def steps_of_epochs(epochs: float, num_examples: int, batch_size: int) -> int:
    """Returns how many steps see every example `epochs` times."""
    return round(epochs * num_examples / batch_size)


def shrink(config: ml_collections.ConfigDict) -> None:
    """Makes a run of seconds out of a config: the same objects in toy sizes, 10 steps.

    The caller replaces data that may not be there and makes the network small.
    """
    config.data.batch_size = 16
    config.train.num_steps = 10
    for block in config.optim.values():
        rate = block.learning_rate
        for key, value in (("warmup_steps", 2), ("decay_steps", 10)):
            if key in rate:
                rate[key] = value
    config.sampler.num_steps = 4
    toy = {
        "denoising_loss": dict(num_batches=2, batch_size=16),
        "elbo": dict(num_examples=16, batch_size=16, num_times=4),
        "text_quality": dict(num_samples=20, num_train=200, num_batches=2),
        "samples": dict(num_samples=40, num_real=200),
        "sample_variance": dict(num_samples=40, num_real=200),
        "mixture": dict(num_samples=40),
        "sample_quality": dict(num_samples=60, num_reference=60, metrics=()),
    }
    for block in config.evals.values():
        block.update(toy[block.name])
        if "every" in block:
            block.every = 5
    config.checkpoint.every = 5
    config.checkpoint.keep_every = 0
    config.logging.every = 2
    config.logging.samples_every = 5
    config.logging.num_samples = 20


def distillation(
    objective: str, variant: str, num_steps: int
) -> ml_collections.ConfigDict:
    """What every config of a student shares; process, data and network are a teacher's.

    Args:
      objective: registered name.
      variant: '' for images such as the digits, 'mixture' for the 2-D mixture with its
        exact teacher, 'smoke' for the latter in toy sizes.
      num_steps: of the student; the sampler's are the same number.
    """
    check_variant(variant, ("", "mixture", "smoke"))
    config = get_config()
    del config.process
    steps = ml_collections.FieldReference(num_steps)
    config.objective = dict(name=objective, num_steps=steps)
    config.sampler = dict(name="ddim", num_steps=steps)
    # Guidance is the teacher's, and in the student already.
    config.guidance = dict()
    config.optim = dict(student=adam(2e-4, 2000))
    config.train = dict(num_steps=2000)
    config.checkpoint = dict(every=1000)
    config.logging = dict(every=50, samples_every=500, num_samples=100)
    if variant == "":
        config.teacher = dict(run="runs/digits", start="")
        config.ema.main.decay = 0.99  # runs of a thousand steps
        config.data = dict(batch_size=64)
        config.evals = dict(samples=dict(name="samples", num_samples=1500))
    else:
        config.teacher = dict(run="runs/solved", start="runs/mixture")
        config.data = dict(batch_size=256)
        config.evals = dict(mixture=dict(name="mixture", num_samples=5000))
        config.logging.num_samples = 1000
    # Warns of a student that collapses while there is time to stop.
    config.evals.variance = dict(name="sample_variance", every=500)
    return config


def token_distillation(
    objective: str, variant: str, num_steps: int
) -> ml_collections.ConfigDict:
    """What every config of a student of tokens shares.

    Args:
      objective: registered name.
      variant: '' for text, 'digits' for the digits as tokens, 'smoke' for the latter in
        toy sizes, once `shrink_student` has been called.
      num_steps: of the student; the sampler's are the same number.
    """
    check_variant(variant, ("", "digits", "smoke"))
    config = distillation(objective, "", num_steps)
    config.teacher.run = "runs/digits_tokens"
    config.sampler.name = "token_ancestral"
    config.data.batch_size = 16
    if variant == "":
        config.teacher.run = "runs/text"
        config.evals = dict(text=dict(name="text_quality"))
        config.logging.num_samples = 16
    return config


def generator(config: ml_collections.ConfigDict, first_logsnr: float) -> None:
    """Makes every answer of the student a sample, from noise at `first_logsnr` on."""
    level = ml_collections.FieldReference(first_logsnr)
    config.objective.first_logsnr = level
    config.sampler = dict(
        name="consistency",
        num_steps=config.objective.get_ref("num_steps"),
        grid=dict(name="from", first_logsnr=level),
    )
    # The score of each step's samples by itself, not of their mixture.
    config.networks = dict(denoiser=dict(conditions=("start_logsnr",)))


def discriminator(config: ml_collections.ConfigDict, variant: str) -> None:
    """A head on the features of aux: as many as the teacher's network has in width."""
    features = {"": 192, "mixture": 128, "smoke": 16}[variant]
    config.networks.discriminator = dict(
        name="discriminator", features=features, width=64
    )
    rate = config.optim.aux.learning_rate
    config.optim.discriminator = adam(rate.value, rate.decay_steps, b1=0.0)


def adam(value: float, num_steps: int, b1: float = 0.9, b2: float = 0.99) -> dict:
    """Returns Adam with a warm-up over a twentieth of the steps and a line to zero."""
    rate = dict(
        name="linear", value=value, warmup_steps=num_steps // 20, decay_steps=num_steps
    )
    return dict(name="adam", learning_rate=rate, options=dict(b1=b1, b2=b2))


def shrink_student(config: ml_collections.ConfigDict) -> None:
    """The smoke variant of a student: `shrink`, with a teacher that has to be given."""
    steps = config.objective.get("num_steps")
    shrink(config)
    config.sampler.num_steps = steps
    config.evals.variance.every = 0
    config.teacher = dict(run="", start="")
