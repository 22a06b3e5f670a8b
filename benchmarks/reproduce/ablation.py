"""Claim 3, ablation of the formula: Rᵀb, Rᵀ(b − Rh), Rᵀ(Wh + b), NoReFT and LoReFT, with the same rank, layers and positions."""

import torch

from minireft import ConsReFT, LobiReFT, LoReFT, NoReFT

from .engine import Claim
from .methods import RATES, examples, score
from .report import differences


class Unsubtracted(LoReFT):
    """h + Rᵀ(W h + b): orthonormal R, nothing subtracted; W = 0 at the start."""

    def start(self, S, K, r, C, paper):
        super().start(S, K, r, C, paper)
        with torch.no_grad():
            self.w.zero_()

    def parts(self):
        W, R, _, b = super().parts()
        return W, torch.zeros_like(R), R, b


FORMULAS = {"Rᵀb": LobiReFT, "Rᵀ(b − Rh)": ConsReFT, "Rᵀ(Wh + b)": Unsubtracted, "NoReFT": NoReFT, "LoReFT": LoReFT}


def measure(base, task, method, value, seed, items, scale):
    return score(base, task, method, value, seed, items, scale, make=lambda m: [FORMULAS[method](m, rank=4, positions="f7+l7")])


def verdict(found):
    """The paper: +11.3, +5.5, −0.3 and +0.2 points for LoReFT."""
    return [finding for other, expected in zip(FORMULAS, ("more", "more", "same", "same"))
            for finding in differences(found, f"LoReFT less {other}", ("LoReFT", other), expected)]


CLAIM = Claim(
    "ablation", "What matters is that the edit depends on the state; subtracting Rh and orthogonality matter little",
    "Arithmetic, LLaMA-7B, mean of 4 sets: Rᵀb 31.3; Rᵀ(b − Rh) 37.1; Rᵀ(Wh + b) 42.9; NoReFT 42.4; LoReFT 42.6.",
    "Steering asks for the same change of every prompt, so that writing constants into a subspace, Rᵀ(b − Rh), does there what on arithmetic needs an edit that "
    "depends on the state; adding a constant, Rᵀb, leaves what stood there. On arithmetic runs differ so much by seed that five of them cannot place the middle "
    "three. The constant formulas mostly prefer the grid's highest rate, so a higher one might help them. On stories260K, within 60 steps, the one formula whose "
    "matrices may grow, NoReFT, gives every story its speech with every seed, and those with orthonormal R do not: there the constraint costs speed. The "
    "experiment that would tell: more seeds and steps on arithmetic, then the five formulas at growing width with r fixed.",
    (("shipped", "steering"), ("shipped", "facts"), ("shipped", "arithmetic"), ("sister", "steering"),
     ("stories260K", "speech")), {method: RATES for method in FORMULAS},
    measure, examples, verdict, reference="LoReFT")
