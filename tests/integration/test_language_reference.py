"""A language model of this program as the reference that text is measured with."""

import signal

import jax
import numpy as np
import pytest

from diffusionlab import config as config_lib
from diffusionlab import experiment, inference, settings, sharding, train
from diffusionlab.features import language_model

BARE = (
    "train.num_steps=0",
    "checkpoint.best=",
    "evals={}",
    "logging.tensorboard=False",
)


def test_a_run_is_opened_with_its_tokens(root, tmp_path):
    config = config_lib.load(f"{root}/configs/text/language_model.py:smoke")
    config_lib.override(config, BARE)
    config, folder = config_lib.resolve(config), tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    assert train.train(config, folder) == train.DONE
    signal.signal(signal.SIGTERM, handler)
    built = experiment.build(config)
    mesh = sharding.make_mesh(settings.Mesh(**config["mesh"]))
    room = inference.make_room(mesh, 60.0)
    model = language_model.load(str(folder), room)
    assert (model.context, model.first) == (built.spec.shape[0], 0)
    assert model.about["step"] == 0
    text = built.test_source.decode(built.test_source[0]["x"])
    (encoded,) = model.encode([text])
    np.testing.assert_array_equal(encoded, built.test_source[0]["x"])
    tokens, mask, cut = language_model.tokens_of(
        model, built.train_source, encoded[None]
    )
    assert mask.all() and not cut
    np.testing.assert_array_equal(tokens[0], encoded)
    log_p = np.asarray(jax.jit(model.log_probs)(model.params, tokens))
    # Before the first step all tokens are as probable.
    assert log_p.shape == tokens.shape
    np.testing.assert_allclose(log_p, -np.log(built.spec.num_tokens), rtol=1e-5)
    with pytest.raises(ValueError, match="reference_step: no checkpoint of step 7 in"):
        language_model.load(str(folder), room, 7)
