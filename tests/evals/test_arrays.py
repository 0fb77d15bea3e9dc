import numpy as np

from diffusionlab.evals import arrays


class Squares:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": np.float32(index**2)}


class Batched(Squares):
    def __getitem__(self, index):
        raise AssertionError("the batched access is there to be used")

    def __getitems__(self, indices):
        return {"x": np.square(indices)}


def test_both_kinds_of_access_agree():
    for source in (Squares(), Batched()):
        assert arrays.take(source, np.array([3, 1]))["x"].tolist() == [9, 1]


def test_a_limit_takes_evenly():
    assert arrays.spread(Squares(), 5)["x"].tolist() == [0, 4, 16, 36, 64]
    assert len(arrays.spread(Squares(), 50)["x"]) == 10
