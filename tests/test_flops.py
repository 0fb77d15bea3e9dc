import jax
import jax.numpy as jnp
import pytest
from jax import lax

from diffusionlab import flops

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 16), jnp.float32)
DENSE = 2 * 4 * 8 * 16


def square(w, x):
    return jnp.sum((x @ w) ** 2)


def test_dense_layer():
    assert flops.count(lambda x, w: x @ w, X, W) == DENSE


def test_batched_product_counts_its_batch():
    a, b = jnp.ones((3, 4, 8)), jnp.ones((3, 8, 5))
    assert flops.count(lambda a, b: a @ b, a, b) == 3 * 2 * 4 * 8 * 5


def test_gradient_with_respect_to_the_weights_is_twice_the_forward():
    assert flops.count(jax.value_and_grad(square), W, X) == 2 * DENSE


def test_gradient_with_respect_to_weights_and_input_is_three_times_the_forward():
    both = jax.value_and_grad(square, argnums=(0, 1))
    assert flops.count(both, W, X) == 3 * DENSE


def test_chain_of_layers_costs_three_forwards_less_the_first_input_gradient():
    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x.sum()

    ws, one = [jnp.ones((8, 8))] * 3, 2 * 4 * 8 * 8
    assert flops.count(loss, ws, X) == 3 * one
    assert flops.count(jax.grad(loss), ws, X) == (3 * 3 - 1) * one


def conv(x, k, stride=1, groups=1):
    return lax.conv_general_dilated(
        x, k, (stride, stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_convolution(stride, groups):
    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 8))
    by_hand = 2 * (2 * (8 // stride) ** 2 * 8) * (3 * 3 * 4 // groups)
    counted = flops.count(lambda x, k: conv(x, k, stride, groups), x, k)
    assert counted == by_hand


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_of_a_convolution_is_three_times_the_forward(stride):
    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    forward = flops.count(lambda x, k: conv(x, k, stride), x, k)

    def loss(x, k):
        return (conv(x, k, stride) ** 2).sum()

    assert flops.count(jax.value_and_grad(loss, argnums=(0, 1)), x, k) == pytest.approx(
        3 * forward, rel=0.0 if stride == 1 else 0.2
    )


@pytest.mark.parametrize("unroll", [1, 5])
def test_scan_counts_as_often_as_it_runs(unroll):
    w = jnp.ones((8, 8))

    def run(x, w):
        return lax.scan(lambda h, _: (h @ w, None), x, length=5, unroll=unroll)[0]

    assert flops.count(run, X, w) == 5 * 2 * 4 * 8 * 8


def test_nested_scans_multiply():
    def inner(h, _):
        return lax.scan(lambda g, _: (g @ g, None), h, length=3)

    def run(x):
        return lax.scan(inner, x, length=4)[0]

    assert flops.count(run, jnp.ones((8, 8))) == 3 * 4 * 2 * 8**3


def test_cond_counts_its_dearest_branch():
    def run(p, a):
        return lax.cond(p, lambda a: a @ a @ a, lambda a: a, a)

    assert flops.count(run, True, jnp.ones((8, 8))) == 2 * 2 * 8**3


def test_jit_remat_and_custom_rules_are_looked_into():
    @jax.custom_vjp
    def f(a):
        return a @ a

    f.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a.T + a.T @ g,))
    a = jnp.ones((8, 8))
    assert flops.count(jax.jit(f), a) == 2 * 8**3
    assert flops.count(jax.checkpoint(lambda a: a @ a), a) == 2 * 8**3
    assert flops.count(jax.grad(lambda a: f(a).sum()), a) == 3 * 2 * 8**3


def test_elementwise_work_is_not_counted():
    assert flops.count(lambda x: jnp.tanh(x) * 2 + x.sum(), X) == 0
