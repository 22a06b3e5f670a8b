"""What an adapter costs in generation: the prompt's pass, decoding after it, and both as a user calls them, over the bare base.
Run: minireft bench generation [--quick] [--write]       (--write: results/generation.jsonl; about two minutes)
You should see LoReFT at 1.00 in decoding, where nothing is edited any more, and (IA)³ there only once it is merged.

prefill   the pass over the prompt that fills the cache     decoding   16 steps after it     generate   both, greedy, 16 new tokens
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))           # so that it also runs as a file
from benchmarks import harness, training  # noqa: E402
from benchmarks.training import POSITIONS, RANK, V  # noqa: E402
from minireft import IA3, Cache, LoRA, LoReFT, Model  # noqa: E402
from minireft.generation import generate_ids  # noqa: E402

NEW = 16
SHAPES = [(256, 4, 8, 128), (256, 4, 1, 16), (256, 4, 4, 64), (256, 4, 16, 64)]        # C, L, B, T


def adapted(model: Model) -> dict[str, Model]:
    """{name: the model with that method}."""
    models = {"floor": model, "LoReFT": LoReFT(training.twin(model), rank=RANK, positions=POSITIONS).attach().model,
              "(IA)³": IA3(training.twin(model)).attach().model, "LoRA": LoRA(training.twin(model), rank=RANK).attach().model}
    merged = Model(model.config).to(model.embed.weight.device)            # weights of its own, which merging changes
    merged.load_state_dict(model.state_dict())
    IA3(merged.eval()).merge()
    return {**models, "(IA)³ merged": merged}


def prefill(model: Model, tokens):
    B, T = tokens.shape
    return torch.no_grad()(lambda: model.stream(tokens, cache=Cache(model, B, T + NEW)))


def decoding(model: Model, tokens):
    B, T = tokens.shape
    cache, new = Cache(model, B, T + NEW), torch.randint(V, (B, 1), device=tokens.device)

    @torch.no_grad()
    def run():
        cache.length = cache.longest = T
        for _ in range(NEW):
            model(new, cache=cache)
    with torch.no_grad():
        model(tokens, cache=cache)
    return run


def generate(model: Model, tokens):
    prompts = tokens.tolist()
    return lambda: generate_ids(model, prompts, NEW, eos=None)


def providers(model: Model, B: int, T: int) -> dict[str, dict]:
    """{part: {name: a function}}."""
    tokens, models = torch.randint(V, (B, T), device=model.embed.weight.device), adapted(model)
    return {part.__name__: {name: part(each, tokens) for name, each in models.items()} for part in (prefill, decoding, generate)}


def peers(model: Model, B: int, T: int) -> dict:
    """`generate` of the other library that is installed, and of its bare base."""
    c, device, tokens = model.config, model.embed.weight.device, torch.randint(V, (B, T))
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = {"input_ids": tokens.to(device), "attention_mask": torch.ones_like(tokens).to(device)}

    def whole(model):
        return lambda: model.generate(**inputs, **settings)
    if training.installed() == "pyreft":
        reft, locations = training.pyreft_model(c, B, T, True)
        return {"pyreft's floor": whole(training.llama(c, True, device)),
                "pyreft": lambda: reft.generate(inputs, unit_locations=locations, intervene_on_prompt=True, **settings)}
    if training.installed() == "peft":
        found = {name: whole(model.eval()) for name, model in training.peft_models(c, True, device).items()}
        return {"PEFT's floor": whole(training.llama(c, True, device).eval()), **found}
    return {}


def main(argv=None) -> list[dict]:
    options = training.options_of("generation", __doc__, argv)
    clock, rows = harness.Clock(options.device), []
    for C, L, B, T in SHAPES[1:2] if options.quick else SHAPES:
        model = training.base(C, L, options.device).eval()
        parts = providers(model, B, T)
        for part, runs in ({} if options.peers else parts).items():
            rows.append(training.row(clock, part, C, L, B, T, runs, options.seconds))
        if (C, L, B, T) in SHAPES[:2] and (others := peers(model, B, T)):
            ours = {name: parts["generate"][name] for name in ("floor", "LoReFT", "(IA)³", "LoRA")}
            rows.append(training.row(clock, "generate", C, L, B, T, {**ours, **others}, options.seconds))
    if options.write:
        harness.write(rows, harness.RESULTS / "generation.jsonl")
    return rows


if __name__ == "__main__":
    main()
