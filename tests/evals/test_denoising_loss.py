import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.evals import denoising_loss


class Numbers:
    """Example i is the number i."""

    spec = types.DataSpec((1,))

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": np.full(1, index, np.float32)}


def context(loss):
    source = Numbers()
    return types.EvalContext(
        step=1,
        spec=source.spec,
        train=source,
        test=source,
        draw=None,
        loss=loss,
        predict=None,
        compute=None,
        process=None,
        sampler=None,
    )


def test_batches_go_round_the_held_out_data_with_their_own_index():
    seen = []

    def loss(batch, index):
        seen.append((index, batch["x"].ravel().tolist()))
        return {"loss": (batch["x"].sum(), 3.0)}

    evaluator = denoising_loss.DenoisingLoss(num_batches=2, batch_size=3)
    result = evaluator(context(loss))
    assert seen == [(0, [0, 1, 2]), (1, [3, 4, 0])]
    assert result.numbers == {"loss": pytest.approx(10 / 6)}


def test_loss_by_noise_level_is_summed_before_it_is_divided():
    def loss(batch, index):
        total, count = np.zeros(10), np.zeros(10)
        total[index], count[index] = 6.0, 1.0
        total[9], count[9] = index, 1 + index
        return {"loss_by_logsnr": (total, count)}

    evaluator = denoising_loss.DenoisingLoss(num_batches=2, batch_size=3)
    numbers = evaluator(context(loss)).numbers
    assert numbers == {
        "loss_by_logsnr/-13.5": 6.0,
        "loss_by_logsnr/-10.5": 6.0,
        "loss_by_logsnr/13.5": pytest.approx(1 / 3),
    }, "empty bins are left out"


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="batch_size"):
        denoising_loss.DenoisingLoss(batch_size=0)
