"""Claim 1, parameter efficiency: fifteen methods on four families, on steering and on a real model's stories, accuracy against trainable parameters."""

from .engine import Claim
from .methods import METHODS, RATES, UNTRAINED, examples, score
from .report import against_parameters, differences


def verdict(found):
    """What the paper speaks of: LoRA everywhere, with LoReFT behind it on arithmetic; RED and full tuning on instructions."""
    expected = {("LoRA, all", task): "not less" for _, task in found} | {("RED", "instructions"): "not less", ("full", "instructions"): "not less"}
    expected["LoRA, all", "arithmetic"] = "less"
    return [finding for task in dict.fromkeys(task for _, task in found) for other in ("LoRA, all", "LoRA, matched", "RED", "full")
            for finding in differences(found, f"LoReFT less {other}", ("LoReFT", other), expected.get((other, task), ""), task=task)]


CLAIM = Claim(
    "efficiency", "LoReFT does as well as LoRA with 15 to 65 times fewer parameters",
    "Commonsense, LLaMA-7B, mean of 8 sets: LoReFT 80.2 (0.031 %), DiReFT 79.0, LoRA 74.7 (0.826 %), DoRA 78.1 (0.838 %). Arithmetic, mean of 4 "
    "sets: LoReFT 42.6, LoRA 46.9. Instructions, Alpaca-Eval: LoReFT 85.60 (0.0039 %), RED 81.69, LoRA 81.48 (0.1245 %), full 80.93.",
    "The base here has 1.8 million parameters and a world of some hundred words, so 8,000 trained numbers are 0.5 % of it and not 0.03 %: a rank-4 "
    "edit of 128 channels is no longer small. Facts and steering are chosen so that the base has the skill already and must only be told to use it, "
    "as large bases mostly have; where it must learn to compute, edits of the prompt should do worse, as in the paper's arithmetic. Steering asks "
    "for three to five words in another order: an edit that ends with the prompt must lay all of that down before the first word, while LoRA and its kin also act on "
    "every word they write. On stories260K a story is to be given speech within 60 steps: DiReFT, whose two matrices are free to grow, always does it and LoReFT, "
    "with R held to unit rows, only at the highest rate and not with every seed. Selection saw one seed; “(edge)” marks where a wider grid might serve a "
    "method better: (IA)³, RED, prefix and prompt tuning nearly everywhere, full tuning always. The sister's two tasks ran on two trainings of it by one recipe and "
    "seed, before and after a change of kernels. The experiment that would tell: the same grid with edits of generated tokens too, and on a base of some "
    "hundred million parameters, with ranks from 1 up.",
    (("shipped", "steering"), ("sister", "steering"), ("shipped", "facts"), ("shipped", "arithmetic"), ("shipped", "instructions"),
     ("shipped", "mood"), ("sister", "facts"), ("stories260K", "speech")),
    {method: (0.0,) if method in UNTRAINED else RATES for method in METHODS},
    score, examples, verdict, reference="LoReFT", draw=against_parameters)
