"""Megatron's interleaving of data sets: at time t the one that lags most behind its weight is read.

    counts = 0;  for t = 0, 1, …:   i = argmax_i (weight_i * max(t, 1) - counts_i);   read sample counts_i of i;   counts_i += 1

The loop is one after another by nature, and native.py runs it as it stands. Where there is no compiler it starts at
many times at once, each time from a guess of its counts, and these runs advance together, one numpy operation for all. A
run that began where the run before it ended is the loop itself; the others begin again from there. Neighbouring runs fall
into the same steps after a few, whatever the guess, so two or three rounds do; in the worst case there are as many rounds
as runs. No floating-point operation differs from the loop's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fmegatron.data import native

LIMIT = 32767  # data sets: their numbers are int16
CELLS = 2**16  # runs * data sets at once: what a second-level cache holds
STEPS = 128  # of a run, at least
SMALL = 2**14  # samples that numpy interleaves before a library is loaded

Ints = npt.NDArray[np.int64]
Blended = tuple[npt.NDArray[np.int16], Ints]


def blend_index(weights: Sequence[float] | npt.ArrayLike, size: int | None = None) -> Blended:
    """For each of `size` samples of a blend the number of its data set, int16, and the sample's number in it, int64.

    `weights` are divided by their sum, if it is not 1 already. Without `size` they are whole numbers, the sizes of the data
    sets: each is read to its end (megatron-core's exhaustive blend). Longer blends begin like shorter ones. Raises
    ValueError for weights that are not above 0.
    """
    given = np.asarray(weights)
    if given.ndim != 1 or not 1 <= len(given) < LIMIT:
        raise ValueError(f"a blend has 1 to {LIMIT - 1} weights in a list, got shape {given.shape}")
    values = given.astype(np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        at = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
        raise ValueError(f"weight {at} of the blend is {given[at]}: weights are above 0; leave out what is not to be read")
    if size is None:
        if (values != np.floor(values)).any():
            raise ValueError(f"weights {given.tolist()}: without a size they are the sizes of the data sets, whole numbers")
        limits = given.astype(np.int64)
        return _interleave(limits / float(limits.sum()), int(limits.sum()), limits)
    if size < 0:
        raise ValueError(f"size {size} of a blend: at least 0")
    return _interleave(normalized(values), size, None)


def normalized(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights over their sum; weights that were normalized before stay as they are, to the last bit."""
    total = np.sum(weights)
    return weights if abs(total - 1) < 1e-9 else weights / total


def _interleave(weights: npt.NDArray[np.float64], size: int, limits: Ints | None) -> Blended:
    number, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    loops = native.loops() if size > SMALL else None
    if loops is not None:
        loops.blend(weights, limits, number, sample)
    else:
        _by_runs(weights, limits, number, sample)
    return number, sample


def _by_runs(
    weights: npt.NDArray[np.float64], limits: Ints | None, number: npt.NDArray[np.int16], sample: Ints
) -> None:
    """Fill both with array operations."""
    size = len(number)
    span = _steps(weights) * max(CELLS // len(weights), 1)
    counts = np.zeros(len(weights), np.int64)
    for first in range(0, size, span):
        stop = min(first + span, size)
        counts = _runs(weights, limits, counts, first, number[first:stop], sample[first:stop])


def _runs(
    weights: npt.NDArray[np.float64], limits: Ints | None, counts: Ints, first: int,
    number: npt.NDArray[np.int16], sample: Ints,
) -> Ints:  # fmt: skip
    """Fill a span of time from its first counts, by runs of equal length side by side; the counts at its end."""
    steps = min(_steps(weights), len(number))
    runs = len(number) // steps
    whole = runs * steps
    times = first + steps * np.arange(runs)
    begins = _guess(weights, limits, times)
    begins[0] = counts
    numbers, samples = number[:whole].reshape(runs, steps), sample[:whole].reshape(runs, steps)
    ends, todo = np.empty_like(begins), np.arange(runs)
    while len(todo):
        numbers[todo], samples[todo], ends[todo] = _advance(weights, limits, begins[todo], times[todo], steps)
        todo = 1 + np.flatnonzero((begins[1:] != ends[:-1]).any(1))
        begins[todo] = ends[todo - 1]
    if whole == len(number):
        return ends[-1]
    number[whole:], sample[whole:], last = _advance(weights, limits, ends[-1:], times[-1:] + steps, len(number) - whole)
    return last[0]


def _steps(weights: npt.NDArray[np.float64]) -> int:
    return max(STEPS, 2 * len(weights))  # of a run: long enough to fall into step with its neighbour


def _advance(
    weights: npt.NDArray[np.float64], limits: Ints | None, begins: Ints, times: Ints, steps: int
) -> tuple[npt.NDArray[np.int16], Ints, Ints]:
    """`steps` steps of the loop in every run: (data sets [runs, steps], samples [runs, steps], counts at the end)."""
    counts = begins.astype(np.float64)  # whole numbers below 2 ** 53: the loop converts them at each step
    numbers, samples = np.empty((steps, len(times)), np.int16), np.empty((steps, len(times)), np.int64)
    lag, flat, rows = np.empty_like(counts), counts.reshape(-1), np.arange(len(times)) * len(weights)
    for step in range(steps):
        now = np.maximum(times + step, 1).astype(np.float64)
        np.multiply(now[:, None], weights, out=lag)
        lag -= counts
        if limits is not None:
            lag[counts == limits] = -np.inf
        chosen = lag.argmax(1)  # of equals the first
        numbers[step] = chosen
        chosen += rows
        samples[step] = flat[chosen]
        flat[chosen] += 1
    return numbers.T, samples.T, counts.astype(np.int64)


def _guess(weights: npt.NDArray[np.float64], limits: Ints | None, times: Ints) -> Ints:
    """Counts that sum to each time and are nearest to the weights: [runs, data sets]."""
    exact = times[:, None] * weights
    counts = np.floor(exact).astype(np.int64)
    if limits is not None:
        counts = np.minimum(counts, limits)
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return counts + (rank < (times - counts.sum(1))[:, None])
