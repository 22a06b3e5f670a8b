"""One intervention of rank 1 as a memory: how long a text can a single edit of a single state make a frozen model write?
Run: python benchmarks/memorise.py [--steps N] [--quick] [--write]     (--write updates results/; stories260K where the public data are)
You should see, for each model and layer, the longest beginning of a text that `GO->` is continued with, to the token.

The example that ReFT is introduced by: LoReFT, r = 1, on the output of layer 19 of 32, at the last prompt token, trained on the one pair
of `GO->` and a text; a 7B model learns a few hundred words. Here it stands at the same share of the depth, and at layer 0 besides.
Beginnings of 1, 2, 3, 4, 6, 8, ... tokens are learned one after another, each anew, until two lengths in a row fail. The learning rate
is scaled by the state that is edited, c / ‖h‖: states grow with depth. The prompt never changes, so the edit is one constant vector,
and a higher rank could hold no more.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

import torch

import minireft
from minireft.data import Encoded, encode_prompt
from minireft.generation import generate_ids
from minireft.reading import states

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("MINIREFT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
RATES = (1.0, 0.1, 10.0)                # c: the learning rate is c / ‖h‖; the first that learns a text whole is enough
MODELS = {                              # name → (path, prompt, text)
    "shipped base": ("base", "go ->", "anna lives in cairo . ben likes the red apple . the box is in the kitchen . dan has two books and three keys . "
                     "cora gave a cup to emil . the dog was in the garden"),
    "stories260K": (DATA / "stories260K" / "stories260K.bin", "GO->", "The old clock on the wall had no hands. A small bird made it sing at noon, and all the "
                    "people in the town came out to eat soup under the green tree.")}


def remembered(model, tokenizer, reft, prompt: list[int], text: list[int]) -> int:
    """How many tokens of the text the greedy continuation begins with."""
    with reft:
        (written,) = generate_ids(model, [prompt], len(text), tokenizer.eos_id)
    return next((i for i, (a, b) in enumerate(zip(written, text)) if a != b), min(len(written), len(text)))


def learn(model, tokenizer, layer: int, prompt: list[int], text: list[int], lr: float, steps: int) -> int:
    torch.manual_seed(0)
    reft = minireft.LoReFT(model, rank=1, layers=[layer], positions="l1")
    config = minireft.TrainConfig(steps=steps, lr=lr, batch_size=1, schedule="linear", warmup=0.0)
    minireft.train(model, [reft], [Encoded(prompt + text, len(prompt))], config, progress=False)
    return remembered(model, tokenizer, reft, prompt, text)


def longest(model, tokenizer, layer: int, prompt: list[int], text: list[int], steps: int, lengths=LENGTHS, say=print) -> dict:
    """For each length: how many of its tokens came back, at the best of the rates."""
    norm = states(model, torch.tensor([prompt]), layer)[0, -1].norm().item()
    reft = minireft.LoReFT(model, rank=1, layers=[layer], positions="l1")
    found = {"layer": layer, "state norm": round(norm, 1), "parameters": reft.num_parameters(),
             "without an edit": remembered(model, tokenizer, reft, prompt, text), "lengths": {}}
    whole = []                                                            # the last lengths: learned whole or not
    for length in (n for n in lengths if n <= len(text)):
        tokens = {}
        for c in RATES:
            tokens[c] = learn(model, tokenizer, layer, prompt, text[:length], c / norm, steps)
            if tokens[c] == length:
                break
        best = max(tokens, key=tokens.get)
        found["lengths"][length] = {"tokens": tokens[best], "c": best}
        whole.append(tokens[best] == length)
        say(f"  layer {layer}, {length} tokens: {tokens}")
        if whole[-2:] == [False, False]:
            break
    found["longest"] = max((n for n, f in found["lengths"].items() if f["tokens"] == n), default=0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and two lengths: does it run?")
    parser.add_argument("--steps", type=int, default=500, help="for each length and rate")
    parser.add_argument("--write", action="store_true", help="update results/memorise.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, lengths = (10, LENGTHS[:2]) if options.quick else (options.steps, LENGTHS)
    results = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "steps": steps, "models": {}}
    for name, (path, prompt, text) in MODELS.items():
        if path != "base" and not path.is_file():
            print(f"{name}: there is no {path}")
            continue
        model, tokenizer = minireft.load(path)
        ids, text = encode_prompt(tokenizer, prompt, model.config.context), tokenizer.encode(text)
        late = 19 * model.config.layers // 32
        results["models"][name] = [longest(model, tokenizer, layer, ids, text, steps, lengths) for layer in (late, 0)]
        for found in results["models"][name]:
            print(f"{name}, layer {found['layer']} of {model.config.layers} (‖h‖ {found['state norm']}), {found['parameters']} numbers: the first "
                  f"{found['longest']} of {len(text)} tokens; {found['without an edit']} without an edit", flush=True)
    if options.write:
        (RESULTS / "memorise.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
