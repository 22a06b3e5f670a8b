"""minireft beside transformers on the same weights: a training step of all of them, and greedy decoding with a cache.
Run: python benchmarks/transformers_peer.py [--quick] [--write]       (--write: results/transformers_peer.jsonl; two minutes)
You should see transformers' CPU time as a multiple of ours: 1.00 would be a tie, above it we are faster.

The step: forward, loss on every token, backward, AdamW. Decoding: each side's own generate from a prompt of 16 tokens. Before
anything is timed, both sides must find the same loss, and write the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))           # so that it also runs as a file
import minireft  # noqa: E402
from benchmarks import harness  # noqa: E402
from minireft.generation import generate_ids  # noqa: E402
from minireft.losses import cross_entropy  # noqa: E402

V, PROMPT = 1024, 16
STEPS = [(128, 4, 8, 64), (256, 4, 8, 128), (512, 4, 4, 128)]            # C, L, B, T
DECODING = [(128, 4, 1, 32), (256, 4, 8, 32), (512, 4, 1, 32)]           # C, L, B, new tokens


def configuration(family: str, C: int, L: int, T: int):
    if family == "llama":
        return transformers.LlamaConfig(vocab_size=V, hidden_size=C, num_hidden_layers=L, num_attention_heads=C // 32, num_key_value_heads=C // 64,
                                        intermediate_size=C * 8 // 3 // 32 * 32, max_position_embeddings=T)
    return transformers.GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=C // 32, n_positions=T, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)


def pair(family: str, C: int, L: int, T: int):
    """transformers' model and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(configuration(family, C, L, T))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, minireft.load(folder)[0]


def steps(family: str, C: int, L: int, B: int, T: int) -> dict:
    """{name: a function that makes one training step and returns its loss}"""
    theirs, mine = pair(family, C, L, T)
    tokens, answer = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)

    def learn(model, loss):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> float:
            optimizer.zero_grad()
            found = loss()
            found.backward()
            optimizer.step()
            return found.item()
        return step
    return {"minireft": learn(mine.requires_grad_().train(), lambda: cross_entropy(mine(tokens), tokens, answer)),
            "transformers": learn(theirs.train(), lambda: theirs(tokens, labels=tokens, use_cache=False).loss)}


def decoders(family: str, C: int, L: int, B: int, new: int) -> dict:
    """{name: a function that writes new tokens after each prompt and returns them}"""
    theirs, mine = pair(family, C, L, PROMPT + new)
    prompts = torch.randint(V, (B, PROMPT))
    settings = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"minireft": lambda: generate_ids(mine, prompts.tolist(), new, eos=None),
            "transformers": lambda: theirs.eval().generate(prompts, **settings)[:, PROMPT:].tolist()}


def agree(sides: dict) -> None:
    mine, theirs = (sides[name]() for name in ("minireft", "transformers"))
    if mine != theirs if isinstance(mine, list) else not abs(mine - theirs) < 1e-4 * abs(theirs):
        raise harness.Wrong(f"the two sides disagree, {mine} and {theirs}: not timed")


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest shapes alone")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row (default: 4)")
    options = parser.parse_args(argv)
    clock, rows = harness.Clock(), []
    for part, shapes, make in (("step", STEPS, steps), ("decoding", DECODING, decoders)):
        for family in ("llama", "gpt2"):
            for shape in shapes[:1] if options.quick else shapes:
                sides = make(family, *shape)
                agree(sides)
                times = clock.interleaved(sides, options.seconds)
                row = {"part": part, "family": family, **dict(zip(("C", "L", "B", "T" if part == "step" else "new"), shape)), "dtype": "float32", "threads": 1,
                       "rounds": len(times["minireft"]), "versions": f"transformers {transformers.__version__}", **harness.machine(),
                       "providers": {name: {"ms": harness.percentiles(taken, unit=1e3), "ratio": harness.ratios(taken, times["minireft"])}
                                     for name, taken in times.items()}}
                rows.append(row)
                (low, ratio, high), own = row["providers"]["transformers"]["ratio"], row["providers"]["minireft"]["ms"][1]
                print(f"{part:8} {family:5} {shape}: minireft {own:8.1f} ms, transformers {ratio:.2f} times that ({low:.2f}–{high:.2f})", flush=True)
    if options.write:
        harness.write(rows, harness.RESULTS / "transformers_peer.jsonl")
    return rows


if __name__ == "__main__":
    main()
