"""Model FLOPs of a traced function: its matrix products and convolutions.

A product [m, k] x [k, n] counts 2 m k n, a convolution 2 (output elements) (kernel
elements per output). Scans count as often as they run, which the compiler's own
estimate does not. Element-wise work is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.extend import core


def count(function: Callable, *args) -> int:
    """Returns the FLOPs of one call of `function`; `args` may be shapes."""
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn) -> int:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
        taps = math.prod(kernel) // kernel[out_axis]
        # Dilating the input inserts zeros, and products with them are no work.
        zeros = math.prod(eqn.params["lhs_dilation"])
        return 2 * math.prod(eqn.outvars[0].aval.shape) * taps // zeros
    inner = [_jaxpr(sub) for sub in _sub_jaxprs(eqn)]
    if eqn.primitive.name == "scan":
        return eqn.params["length"] * sum(inner)
    if eqn.primitive.name == "cond":
        return max(inner)
    return sum(inner)


def _sub_jaxprs(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
