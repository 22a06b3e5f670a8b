"""Trained (IA)³ vectors: what they amplify and what they inhibit, as a table and a picture; and several made one.

Use:  report = reading.vectors(ia3); print(report); report.picture("vectors.png")      # compose.weighted_sum puts several together
See:  a line for each vector and layer: mean, spread, least, most, and the units that were turned down and up the furthest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..ia3 import IA3, sites_of


@dataclass(frozen=True)
class VectorRow:
    """One vector l of one layer; std over its units; `inhibited` and `amplified` are (unit, l) pairs, the furthest first."""

    name: str                           # "key", "value", "ffn", "cross_key" ...
    layer: int                          # of those that have it: the row of the stack
    mean: float
    std: float
    least: float
    most: float
    inhibited: list[tuple[int, float]]
    amplified: list[tuple[int, float]]


@dataclass(frozen=True)
class VectorReport:
    """rows, and l itself: {name: (L, width)}. `str(report)` is the table."""

    rows: list[VectorRow]
    l: dict[str, torch.Tensor]

    def __str__(self) -> str:
        def units(pairs):
            return "  ".join(f"{unit:>5} {l:6.3f}" for unit, l in pairs)
        count = max(len(row.inhibited) for row in self.rows)
        lines = [f"{'vector':16}{'layer':>5}{'mean':>8}{'std':>8}{'min':>8}{'max':>8}   {'most inhibited':{14 * count}}{'most amplified'}"]
        for row in self.rows:
            numbers = "".join(f"{x:8.3f}" for x in (row.mean, row.std, row.least, row.most))
            lines.append(f"{row.name:16}{row.layer:5}{numbers}   {units(row.inhibited):{14 * count}}{units(row.amplified)}".rstrip())
        return "\n".join(lines)

    def draw(self, axes, names=None) -> None:
        """A panel for each vector (of these names): layers across, a dot for each unit at its l, bars for mean ± std."""
        for panel, name in zip(axes, names or self.l):
            l, (layers, width) = self.l[name], self.l[name].shape
            across = torch.arange(layers)[:, None] + torch.linspace(-0.3, 0.3, width)                # (L, width)
            panel.scatter(across, l, s=3, c=l, cmap="coolwarm", vmin=0.5, vmax=1.5, linewidths=0)
            panel.errorbar(range(layers), l.mean(1), l.std(1, correction=0), fmt="_k", capsize=2, lw=1, ms=6)
            panel.axhline(1, color="0.6", lw=0.8, zorder=0)
            panel.set(title=f"{name}, {width} units", xlabel="layer", xticks=range(layers))

    def picture(self, path) -> None:
        """Writes it as a picture. ImportError without matplotlib."""
        from matplotlib.figure import Figure
        figure = Figure(figsize=(1 + 3.4 * len(self.l), 3.6), layout="constrained")
        axes = figure.subplots(1, len(self.l), sharey=True, squeeze=False)[0]
        self.draw(axes)
        axes[0].set_ylabel("l (1 changes nothing)")
        figure.savefig(Path(path), dpi=130)


@torch.no_grad()
def vectors(ia3: IA3, count: int = 3) -> VectorReport:
    """What was learned: every vector in every layer, with its `count` units that are furthest below 1 and above it.

    A unit that stayed at 1 was neither: fewer are named then. Raises ValueError for other adapters.
    """
    if not isinstance(ia3, IA3):
        raise ValueError(f"a {type(ia3).__name__} has no vectors to report: expected an IA3")
    every, rows = {name: l.detach().cpu() for name, l in ia3.vectors().items()}, []
    for name, stack in every.items():
        for layer, l in enumerate(stack):                                 # (width,)
            order = [(unit, l[unit].item()) for unit in l.argsort(stable=True).tolist()]
            rows.append(VectorRow(name, layer, l.mean().item(), l.std(correction=0).item(), l.min().item(), l.max().item(),
                                  [(unit, x) for unit, x in order[:count] if x < 1],
                                  [(unit, x) for unit, x in order[::-1][:count] if x > 1]))
    return VectorReport(rows, every)


@torch.no_grad()
def mixed_vectors(adapters: list[IA3], weights: list[float], space: str) -> IA3:
    """Several (IA)³ as one: see `compose.weighted_sum`, which calls this."""
    model, total = adapters[0].model, {}
    for i, (adapter, weight) in enumerate(zip(adapters, weights)):
        if not isinstance(adapter, IA3) or adapter.model is not model:
            raise ValueError(f"adapter {i} is a {type(adapter).__name__}: expected (IA)³ alone, all made for one model object")
        for name, l in adapter.named_parameters():                        # (L, width) what is stored: the vector less 1
            if space == "log" and not l.min() > -1:
                raise ValueError(f"adapter {i} has {1 + l.min():.3g} among its vectors of {name!r}: logarithms need them above 0; "
                                 "space='linear' takes any")
            total[name] = total.get(name, 0) + weight * (l.log1p() if space == "log" else l)
    together = IA3(model, sites_of(model, total), layer_norm=any(name.endswith("norm") for name in total))
    for name, x in total.items():
        together.get_parameter(name).copy_(x.expm1() if space == "log" else x)
    return together
