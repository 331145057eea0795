"""Adafactor: the second moment of a matrix as the product of its rows' and columns' means.

    R = mean of g^2 over columns,  C = over rows       kept as running means, weight of the new w = t^decay
    u = g / sqrt(R C / mean(R))                        vectors: g / sqrt(nu)
    u = u / max(1, rms(u) / clip_rms)                      p = p - max(eps, rms(p)) min(rate, 1/sqrt(t)) u - rate weight_decay p

As torch.optim.Adafactor, each layer's matrix by itself. State: {"count", "rows", "cols", "nu"}: rows and cols have size 1 in
the dims that they are means over, nu is of leaves that are not matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.nn import param
from fmegatron.nn.param import Matrix
from fmegatron.optim.adam import Moving
from fmegatron.optim.base import LOCAL, Over, Transform, Tree, chain
from fmegatron.optim.decay import Mask, add_decayed_weights
from fmegatron.optim.elementwise import plain, zero
from fmegatron.optim.rate import scale_by_learning_rate
from fmegatron.optim.schedules import schedule


def adafactor(
    learning_rate: Moving = 1e-2, decay: float = -0.8, floor: float | None = None, eps: float = 1e-3,
    clip_rms: float = 1.0, weight_decay: Moving = 0.0, declare: Tree = None, mask: Mask = None,
) -> Transform:
    """Adafactor (Shazeer and Stern 2018). floor: of the moments' mean; None: the dtype's eps. eps: of a parameter's rms.

    declare: the model's declarations, which say which dims are rows; None: the first after the layers.
    """
    rate, wanted = schedule(learning_rate), schedule(weight_decay)
    step = scale_by_learning_rate(lambda count: torch.minimum(rate(count), (count + 1).double().rsqrt()))
    return chain(scale_by_factored(decay, floor, eps, clip_rms, declare), step,
                 add_decayed_weights(lambda count: -rate(count) * wanted(count), mask))


def scale_by_factored(decay: float, floor: float | None, eps: float, clip_rms: float, declare: Tree = None) -> Transform:
    """The update without its rate."""

    def views_of(params: Tree) -> dict[str, Matrix | None]:
        if declare is not None:
            of = tree.to_paths(declare)
            return {path: param.matrix(of[path]) for path in tree.to_paths(params)}
        stacked = {path: int("layers" in path.split(".")) for path in tree.to_paths(params)}
        return {path: Matrix(stacked[path], 1) if p.dim() - stacked[path] >= 2 else None
                for path, p in tree.to_paths(params).items()}

    def init(params: Tree) -> Tree:
        views = views_of(params)

        paths = tree.to_paths(params)

        def means(path: str, gone: tuple[int, ...]) -> Tensor:
            return paths[path].new_zeros([1 if dim in gone else n for dim, n in enumerate(paths[path].shape)])

        matrices = {path: view for path, view in views.items() if view is not None}
        return {"count": zero(params),
                "rows": tree.from_paths({path: means(path, outputs(v, paths[path].dim())) for path, v in matrices.items()}),
                "cols": tree.from_paths({path: means(path, inputs(v)) for path, v in matrices.items()}),
                "nu": tree.from_paths({path: torch.zeros_like(p) for path, p in paths.items() if path not in matrices})}

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        views = views_of(params)
        w = (state["count"] + 1).double() ** decay
        paths = tree.to_paths(params)
        g = {path: x.to(paths[path].dtype) for path, x in tree.to_paths(grads).items()}
        least = {path: torch.finfo(x.dtype).eps if floor is None else floor for path, x in g.items()}
        matrices = {path: view for path, view in views.items() if view is not None}
        rows_of = {path: inputs(view) for path, view in matrices.items()}
        cols_of = {path: outputs(view, g[path].dim()) for path, view in matrices.items()}

        def mean(values: dict[str, Tensor], dims: dict[str, tuple[int, ...]], square: bool = True) -> dict[str, Tensor]:
            return tree.to_paths(over.mean(tree.from_paths(values), dims, square)) if values else {}

        def toward(slot: str, new: dict[str, Tensor]) -> dict[str, Tensor]:
            return {path: old + (new[path] - old) * w for path, old in tree.to_paths(state[slot]).items()}

        rows = toward("rows", mean({path: g[path] for path in matrices}, cols_of))
        cols = toward("cols", mean({path: g[path] for path in matrices}, rows_of))
        nu = toward("nu", {path: x * x for path, x in g.items() if path not in matrices})
        scale = mean(rows, rows_of, square=False)

        def moment(path: str) -> Tensor:
            return rows[path] / scale[path].clamp(min=least[path]) * cols[path] if path in matrices else nu[path].clone()

        # Each leaf's temporaries lie in one array: on a CPU a new one costs its pages, more than what is done with it.
        u = {path: by(root(moment(path), least[path] ** 2), x) for path, x in g.items()}

        def rms(values: dict[str, Tensor]) -> dict[str, Tensor]:
            every = {path: tuple(range(views_batch(path, views[path]), x.dim())) for path, x in values.items()}
            return {path: x.sqrt() for path, x in mean(values, every).items()}

        size, length = rms(paths), rms(u)
        u = {path: by(x, size[path].clamp(min=eps) / (length[path] / clip_rms).clamp(min=1)) for path, x in u.items()}

        new = {"rows": tree.from_paths(rows), "cols": tree.from_paths(cols), "nu": tree.from_paths(nu)}
        return tree.map_with_path(lambda path, _: u[path], params), {"count": state["count"] + 1} | new

    return Transform(init, update)


def alone() -> bool:
    """Whether a temporary may be written over: nobody differentiates, maps or traces."""
    return plain() and not torch.is_grad_enabled()


def root(x: Tensor, floor: float) -> Tensor:
    """max(x, floor)^(-1/2), in the memory of x where it may be."""
    return x.clamp_(min=floor).rsqrt_() if alone() else x.clamp(min=floor).rsqrt()


def by(x: Tensor, other: Tensor) -> Tensor:
    """x times another tensor, in the memory of x where it may be."""
    return x.mul_(other) if alone() else x * other


def inputs(view: Matrix) -> tuple[int, ...]:
    """The dims of a matrix's rows."""
    return tuple(range(view.batch, view.batch + view.rows))


def outputs(view: Matrix, dims: int) -> tuple[int, ...]:
    """The dims of a matrix's columns."""
    return tuple(range(view.batch + view.rows, dims))


def views_batch(path: str, view: Any) -> int:
    """How many leading dims number a leaf's vectors or matrices."""
    return view.batch if view is not None else int("layers" in path.split("."))
