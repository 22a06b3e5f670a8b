"""The papers' settings by name: what to train and how, printed, and open to changes.

Use:  adapters, config = recipe("reft-math", model, examples, epochs=3); minireft.train(model, adapters, examples, config)
See:  what the recipe sets, what you changed, and for how many steps that is.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, field, fields

from .adapters import KINDS, Adapter, Classifier, NEFTune
from .training import T_FEW, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """What to train: an adapter of `kind` with `options`, or the base (None); how: `training`, a TrainConfig's fields."""

    about: str
    kind: str | None = None
    options: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    epochs: float | None = None         # instead of training's steps
    neftune: float | None = None        # α of noise beside it
    depth: int | None = None            # `options` count layers of a base this deep: others take the same shares of theirs
    head: bool = False                  # a Classifier over the examples' completions is trained as well


REASONING = {"rank": 8, "layers": "all", "positions": "f7+l7", "tied": True}
ADAMW = {"lr": 9e-4, "batch_size": 32, "warmup": 0.1, "schedule": "linear"}
COSINE = {"lr": 3e-3, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.01}
ALL_SITES = ("key", "value", "ffn", "attention_output", "ffn_output")
RECIPES = {
    "reft-commonsense": Recipe("ReFT, section 4.2 (LLaMA-7B)", "LoReFT", REASONING, ADAMW, epochs=6),
    "reft-math": Recipe("ReFT, section 4.3 (LLaMA-7B)", "LoReFT", REASONING, ADAMW, epochs=12),
    "reft-instruct": Recipe("ReFT, section 4.4 (Llama-2 7B)", "LoReFT",
                            {"rank": 4, "layers": (3, 9, 18, 24), "positions": "f5+l5", "tied": False},
                            {**ADAMW, "batch_size": 128, "warmup": 0.0}, epochs=9, depth=32),
    "reft-glue": Recipe("ReFT, section 4.5 (RoBERTa-base), the settings of CoLA in its code; there each task has its own "
                        "positions (f1 to f11), rate and epochs", "LoReFT", {"rank": 1, "layers": "all", "positions": "f1", "dropout": 0.05},
                        {**ADAMW, "lr": 6e-4, "warmup": 0.09}, epochs=3, head=True),
    "t-few": Recipe("T-Few, section 3.4 (T0): for every task alike", "IA3", {},
                    {name: value for name, value in asdict(T_FEW).items() if value != getattr(TrainConfig, name)}),
    "neftune-alpaca": Recipe("NEFTune (LLaMA-2 7B), rate and batch as in its code", None, {}, {"lr": 5e-5, "batch_size": 128},
                             epochs=3, neftune=5.0),
    "ia3-basic": Recipe("(IA)³ on keys, values and the feed-forward; rate from a published sweep, articles advise 1e-4 to 5e-4",
                        "IA3", {"sites": ("key", "value", "ffn"), "init_scale": 0.0}, COSINE, epochs=3),
    "ia3-advanced": Recipe("(IA)³ on all sites that articles name, and on layer norms", "IA3",
                           {"sites": ALL_SITES, "init_scale": 0.1, "layer_norm": True}, COSINE, epochs=3),
}
# What `tune --method` takes: our own defaults, with the learning rate that suits the shipped base, chosen on validation items.
METHODS = {name: Recipe("minireft's defaults", kind, {}, {"lr": lr}) for name, kind, lr in (
    ("loreft", "LoReFT", 1.5e-2), ("direft", "DiReFT", 1.5e-2), ("ia3", "IA3", 5e-2), ("lora", "LoRA", 6e-3), ("full", None, 5e-4))}


def options_of(kind: str | None) -> tuple[str, ...]:
    """The options that an adapter of this kind takes."""
    return tuple(inspect.signature(KINDS[kind]).parameters)[1:] if kind else ()


def spread(layers, depth: int, model) -> list[int]:
    """Layers of a base of `depth` → those at the same share of this one's depth. ValueError where two fall together."""
    most = model.config.encoder_layers or model.config.layers
    found = [layer * most // depth for layer in layers]
    if len(set(found)) < len(found):
        raise ValueError(f"layers {', '.join(map(str, layers))} of {depth} fall together on a base of {most}: "
                         f"choose layers (from 0 to {most - 1}) yourself")
    return found


def recipe(name: str, model, examples, seed: int = 0, show=print, **changes) -> tuple[list[Adapter], TrainConfig]:
    """The adapters (new, not attached) and the configuration of a recipe or plain method, for `train`.

    changes: any option of the recipe's adapter, field of TrainConfig, epochs (over len(examples)) or neftune (α; None = no
    noise) instead of the recipe's own. What was set is given to `show`, a line at a time (None: to nobody). Raises ValueError
    for an unknown recipe or option, and layers that this base is too shallow for.
    """
    known = RECIPES | METHODS
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}: choose from {', '.join(known)}")
    it = known[name]
    mine, training = options_of(it.kind), [f.name for f in fields(TrainConfig) if f.name not in ("full", "seed")]
    for change in changes.keys() - {*mine, *training, "epochs", "neftune"}:
        raise ValueError(f"{change} means nothing to {name}: expected {', '.join((*mine, *training, 'epochs', 'neftune'))}")
    if changes.keys() >= {"steps", "epochs"}:
        raise ValueError("steps and epochs are both given: one follows from the other, leave one out")
    options = it.options | {key: changes[key] for key in mine if key in changes}
    settings = it.training | {key: changes[key] for key in training if key in changes}
    if it.depth and "layers" not in changes:
        options["layers"] = spread(options["layers"], it.depth, model)
    epochs, noise = changes.get("epochs", it.epochs if "steps" not in changes else None), changes.get("neftune", it.neftune)
    if epochs is not None:
        settings["steps"] = math.ceil(epochs * len(examples) / settings.get("batch_size", TrainConfig.batch_size))
    config = TrainConfig(**settings, full=it.kind is None, seed=seed)
    adapter = KINDS[it.kind](model, **options) if it.kind else None
    if it.head:
        adapter = Classifier(model, tuple(dict.fromkeys(e.completion for e in examples)), adapter)
    adapters = ([adapter] if adapter else []) + ([NEFTune(model, alpha=noise, seed=seed)] if noise is not None else [])
    for line in described(name, it, options, config, epochs, noise, changes, len(examples)) if show else ():
        show(line)
    return adapters, config


def described(name, it, options, config, epochs, noise, changes, count) -> list[str]:
    """What was set, what the user changed, and what is left at TrainConfig's own values."""
    say = lambda values: ", ".join(f"{key} {value}" for key, value in values.items())
    own = {key: value for key, value in asdict(config).items() if key in (*it.training, *changes, "steps") and key != "full"}
    lines = [f"recipe {name}: {it.about}", f"  trains {it.kind or 'all weights'}" + (f" ({say(options)})" if options else "")]
    if it.depth and "layers" not in changes:
        lines.append(f"    where it has layers {', '.join(map(str, it.options['layers']))} of {it.depth}")
    lines += ["    and a classification head"] if it.head else []
    lines += [f"    with NEFTune's noise, alpha {noise:g}"] if noise is not None else []
    lines.append(f"  {say(own)}" + (f": {epochs:g} epochs of {count} examples" if epochs is not None else f", {count} examples"))
    return lines + ([f"  yours: {say(changes)}"] if changes else [])
