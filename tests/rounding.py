"""How far rounding alone may take a float32 kernel: bounds that are derived, not measured."""

import math

U = 2.0**-24  # what rounding to float32 changes at most, relative to the value

# Of runs that add the same hundred terms of size 1 in another order: 32 roundings.
REORDERED = dict(atol=32 * U, rtol=32 * U)
# Of a handful of terms, each of a few operations.
FEW = dict(atol=16 * U, rtol=16 * U)


def lse_error(size, terms, steps=1):
    """Return how far an lse may be off, in nats, after `steps` from exact scores.

    size is that of the largest score or lse, terms the number of keys. A score comes to base 2 by a
    rounded factor and a rounded product: 2 U. A step brings its state there likewise, 2 U, adds the
    log of the sum of the weights, U, and goes back, 2 U. The sum is off by U per term, and a power
    or log of two by 4 U on a GPU.
    """
    return (2 + 5 * steps) * U * size + (terms + 8 * steps) * U


def mean_error(nats, v):
    """Return how far a weighted mean of v's rows may be off, where the logs of weights are by nats.

    Of weights off by a factor of exp(nats), those normalised are by its square at most, and what
    they move lies between the smallest value and the largest.
    """
    return math.expm1(2 * nats) * float(v.max() - v.min())
