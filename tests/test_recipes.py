"""The papers' recipes: their values, how they fit another base, and what can be changed.

Run:  pytest tests/test_recipes.py
See:  what a recipe prints is what it sets, from Python and from the command line alike.
"""

import re

import pytest
import small
import torch

import minireft
from minireft import Example, recipe
from minireft.cli import main
from minireft.model import Model, ModelConfig
from minireft.recipes import METHODS, RECIPES
from minireft.training import T_FEW

EXAMPLES = [Example(f"w{i} w2 w3", ("w4", "w5")[i % 2], ("w4", "w5")) for i in range(10)]


def shape_of(layers):
    """A model of that many layers, without its numbers."""
    with torch.device("meta"):
        return Model(ModelConfig(16, width=16, layers=layers, heads=2, hidden=16, context=16))


def test_the_values_are_the_papers():
    """REFERENCE: 4 for ReFT and the examples of (IA)³, T-Few section 3.4; the parameter counts that they publish."""
    def made(name, **changes):
        (first, *rest), config = recipe(name, small.model(), EXAMPLES * 16, show=None, **changes)
        return first, rest, config
    for name, epochs in (("reft-commonsense", 6), ("reft-math", 12)):
        reft, _, config = made(name)
        assert {key: reft.options[key] for key in ("rank", "positions", "tied")} == {"rank": 8, "positions": "f7+l7", "tied": True}
        assert (config.lr, config.batch_size, config.warmup, config.steps) == (9e-4, 32, 0.1, 5 * epochs)       # 160 examples
    head, _, config = made("reft-glue")
    assert head.labels == ("w4", "w5") and (head.method.options["rank"], head.method.options["positions"]) == (1, "f1")
    _, _, config = made("t-few")
    assert config == T_FEW and type(made("t-few")[0]) is minireft.IA3
    noise, _, config = made("neftune-alpaca")
    assert type(noise) is minireft.NEFTune and noise.options["alpha"] == 5 and config.full
    basic, advanced = made("ia3-basic")[0], made("ia3-advanced")[0]
    assert set(basic.options["sites"]) == {"key", "value", "ffn"} and basic.options["init_scale"] == 0
    assert set(advanced.options["sites"]) == {*basic.options["sites"], "ffn_output", "attention_output"}
    assert advanced.options["init_scale"] == 0.1 and advanced.options["layer_norm"] and not basic.options["layer_norm"]


@pytest.mark.parametrize("depth, expected", [
    (32, [3, 9, 18, 24]), (40, [3, 11, 22, 30]), (12, [1, 3, 6, 9]), (8, [0, 2, 4, 6]), (4, [0, 1, 2, 3])])
def test_layers_keep_their_share_of_the_depth(depth, expected):
    said = []
    (reft,), _ = recipe("reft-instruct", shape_of(depth), EXAMPLES, show=said.append)
    assert reft.layers == expected and reft.options["tied"] is False and reft.options["positions"] == "f5+l5"
    assert any(str(expected) in line for line in said) and any("3, 9, 18, 24 of 32" in line for line in said)
    assert recipe("reft-instruct", shape_of(depth), EXAMPLES, show=None, layers=[1])[0][0].layers == [1]


def test_a_base_too_shallow_for_them_is_an_error():
    for depth in (2, 3):
        with pytest.raises(ValueError, match=f"layers 3, 9, 18, 24 of 32 fall together on a base of {depth}: choose layers"):
            recipe("reft-instruct", shape_of(depth), EXAMPLES)
    with pytest.raises(ValueError, match="from 0 to 1"):
        recipe("reft-instruct", shape_of(2), EXAMPLES, layers="3,9")


def test_changes_win_and_are_said():
    said = []
    (reft, noise), config = recipe("reft-math", small.model(), EXAMPLES, seed=3, show=said.append,
                                     rank=2, epochs=1, batch_size=4, neftune=2.0)
    assert reft.options["rank"] == 2 and noise.options == noise.options | {"alpha": 2.0, "seed": 3}
    assert (config.steps, config.batch_size, config.seed, config.lr) == (3, 4, 3, 9e-4)      # 10 examples, 4 at a time
    text = "\n".join(said)
    assert re.search(r"yours: .*rank 2", text) and "rank 2, layers all" in text and "steps 3" in text and "1 epochs of 10 examples" in text
    assert recipe("reft-math", small.model(), EXAMPLES, show=None, steps=7)[1].steps == 7
    assert recipe("neftune-alpaca", small.model(), EXAMPLES, show=None, neftune=None)[0] == []
    for changes, words in (({"sites": "key"}, "sites means nothing to reft-math: expected rank, layers"),
                           ({"steps": 1, "epochs": 1}, "both given"),
                           ({"lr": 0}, "lr is 0"), ({"seeds": 1}, "seeds means nothing")):
        with pytest.raises(ValueError, match=words):
            recipe("reft-math", small.model(), EXAMPLES, **changes)
    with pytest.raises(ValueError, match="there is no recipe 'reft': choose from reft-commonsense, "):
        recipe("reft", small.model(), EXAMPLES)


@pytest.mark.parametrize("name", [*RECIPES, *METHODS])
def test_every_recipe_trains(name):
    model = small.model()
    changes = {"layers": [0]} if name == "reft-instruct" else {}
    adapters, config = recipe(name, model, EXAMPLES, show=None, steps=2, batch_size=4, **changes)
    trained = [p for a in adapters for p in a.parameters()] or list(model.parameters())
    before = [p.detach().clone() for p in trained]
    run = minireft.train(model, adapters, EXAMPLES, config, progress=False)
    assert len(run.losses) == 2 and any(not torch.equal(p, q) for p, q in zip(trained, before))


def test_on_the_command_line(tiny_base, tmp_path, capsys):
    base = ["--base", str(tiny_base), "--task", "mood", "--limit", "12"]
    tune = ["tune", *base, "--steps", "2", "--quiet", "--batch-size", "4"]
    assert main([*tune, "--recipe", "reft-glue", "--positions", "f2", "--out", str(tmp_path / "head")]) == 0
    out = capsys.readouterr().out
    assert "recipe reft-glue: " in out and "positions f2" in out and "yours: " in out
    model, _ = minireft.load(tiny_base)
    head = minireft.load_adapter(model, tmp_path / "head" / "adapter.safetensors")
    assert head.method.options["positions"] == "f2" and head.method.options["rank"] == 1
    assert main(["evaluate", *base, "--adapter", str(tmp_path / "head" / "adapter.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("rank 0.")
    assert main([*tune, "--recipe", "ia3-advanced", "--init-scale", "0.2", "--schedule", "constant", "--out", str(tmp_path / "ia3")]) == 0
    assert minireft.load_adapter(model, tmp_path / "ia3" / "adapter.safetensors").options["init_scale"] == 0.2
    assert main([*tune, "--recipe", "t-few", "--losses", "lm,length", "--out", str(tmp_path / "few")]) == 0
    assert main([*tune, "--recipe", "neftune-alpaca", "--out", str(tmp_path / "noise")]) == 0 and (tmp_path / "noise" / "base").is_dir()
    capsys.readouterr()
    assert main([*tune, "--recipe", "reft-instruct", "--out", str(tmp_path / "deep")]) == 1
    assert "fall together on a base of 2" in capsys.readouterr().err and not (tmp_path / "deep").exists()
