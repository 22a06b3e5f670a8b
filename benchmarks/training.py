"""What an adapter costs: training steps and generation with it, over the same frozen base without it.
Run: python benchmarks/training.py [--quick] [--write]       (--write appends to results/training.jsonl; pyreft takes part where it is)
You should see each provider's CPU time as a multiple of the floor's: 1.00 would be an adapter that costs nothing.

The floor of a training step is the frozen base with gradients of its activations down to the lowest edited site, and no
adapter. One process, one thread; every round runs each provider once, in turn, and its ratios are to the floor of that round:
medians over rounds, with 20th and 80th percentiles. What is counted is CPU time, so that a busy machine does not count.
pyreft edits transformers' Llama of the same shape, and its floor is that model: see `make peers-pyreft` for its environment,
then PYTHONPATH=. .venv/pyreft/bin/python benchmarks/training.py.
"""

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import nn

from minireft import Cache, DiReFT, LoReFT, Model, ModelConfig, ops
from minireft.generation import generate_ids
from minireft.losses import cross_entropy

RESULTS = Path(__file__).parent / "results"
V, RANK = 1024, 8
STEPS = [(256, 4, 8, 128), (256, 4, 1, 16), (1024, 8, 2, 128)]           # C, L, B, T
ALL = ("LoReFT", "LoReFT, plain PyTorch", "DiReFT", "LoReFT, Householder", "pyreft")


class Householder(LoReFT):
    """LoReFT with R from torch's orthogonal parametrization of (C, r), as it is usually written; read once a pass."""

    def start(self, S, K, r, C, paper):
        super().start(S, K, r, C, paper)
        del self.m
        self.rotate = nn.ModuleList(nn.utils.parametrizations.orthogonal(nn.Linear(r, C, bias=False)) for _ in range(S))
        with torch.no_grad():
            self.w.copy_(self.parts()[1])

    def parts(self):
        R = torch.stack([layer.weight.T[None] for layer in self.rotate])  # (S, 1, r, C)
        return self.w, R, R, self.b


class Floor:
    """An edit that only lets gradients begin here."""

    adapter = None

    def __call__(self, operation, context):
        return lambda x: operation(x).requires_grad_()


def base(C: int, L: int) -> Model:
    torch.manual_seed(0)
    config = ModelConfig(V, width=C, layers=L, heads=C // 64, hidden=C * 8 // 3 // 32 * 32, context=512, tied=False)
    return Model(config).requires_grad_(False)


def twin(model: Model) -> Model:
    """Another model object with the same weights, so that what is attached to one is not on the other."""
    with torch.device("meta"):
        other = Model(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False).train(model.training)


def learn(parameters, run, tokens, answer):
    """A training step: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None

    def step():
        loss = cross_entropy(run(tokens), tokens, answer)
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()
    return step


def step_providers(model: Model, B: int, T: int, positions: str, names) -> dict:
    """{name: a function that makes one training step}; pyreft comes with a floor of its own."""
    c, tokens, answer = model.config, torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    tokens[:, 0] = 0

    def adapted(kind):
        adapter = kind(twin(model), rank=RANK, positions=positions).attach()
        return learn(list(adapter.parameters()), adapter.model, tokens, answer)
    bare = twin(model)
    bare.blocks[0].output.edits.append(Floor())
    plain = adapted(LoReFT)

    def reference():
        with ops.use("reference"):
            return plain()
    made = {"LoReFT": lambda: adapted(LoReFT), "LoReFT, plain PyTorch": lambda: reference, "DiReFT": lambda: adapted(DiReFT),
            "LoReFT, Householder": lambda: adapted(Householder)}
    providers = {"floor": learn([], bare, tokens, answer), **{name: make() for name, make in made.items() if name in names}}
    if "pyreft" in names:
        providers.update(peers(c, tokens, answer, positions))
    return providers


def peer_models(c: ModelConfig, B: int, T: int, positions: str, cached: bool):
    """transformers' Llama of the same shape, without and with pyreft, and pyreft's name for the positions; None where they are
    not installed."""
    try:
        import pyreft
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(vocab_size=V, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
                         num_attention_heads=c.heads, max_position_embeddings=c.context, use_cache=cached)
    torch.manual_seed(0)
    bare, edited = (LlamaForCausalLM(config).requires_grad_(False) for _ in range(2))
    reft = pyreft.get_reft_model(edited, pyreft.ReftConfig(representations=[
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK,
         "intervention": pyreft.LoreftIntervention(embed_dim=c.width, low_rank_dimension=RANK, dtype=torch.float32)}
        for layer in range(c.layers)]))
    at = pyreft.get_intervention_locations(last_position=T, positions=positions, num_interventions=c.layers, share_weights=True)
    return bare, reft, {"sources->base": (None, [[row] * B for row in at])}


def peers(c: ModelConfig, tokens, answer, positions) -> dict:
    """pyreft's training step, and its floor."""
    made = peer_models(c, *tokens.shape, positions, cached=False)
    if made is None:
        return {}
    bare, reft, locations = made
    bare.model.layers[0].register_forward_hook(lambda module, inputs, out: (out[0].requires_grad_(), *out[1:]))

    def with_edits(tokens):
        return reft({"input_ids": tokens}, unit_locations=locations)[1].logits
    return {"pyreft's floor": learn([], lambda tokens: bare(input_ids=tokens).logits, tokens, answer),
            "pyreft": learn(list(reft.get_trainable_parameters()), with_edits, tokens, answer)}


def generation_providers(model: Model, B: int, T: int, positions: str) -> dict:
    """{part: {name: a function}}: the prompt's pass, 16 decoding steps after it, and both as a user calls them."""
    tokens, new = torch.randint(V, (B, T)), torch.randint(V, (B, 1))
    adapter = LoReFT(twin(model), rank=RANK, positions=positions).attach()

    def prefill(model):
        return torch.no_grad()(lambda: model.stream(tokens, cache=Cache(model, B, T + 16)))

    def decoding(model):
        cache = Cache(model, B, T + 16)

        @torch.no_grad()
        def run():
            cache.length = cache.longest = T
            for _ in range(16):
                model(new, cache=cache)
        with torch.no_grad():
            model(tokens, cache=cache)
        return run
    def generate(model):
        prompts = tokens.tolist()
        return lambda: generate_ids(model, prompts, 16, eos=None)
    parts = {run.__name__: {"floor": run(model), "LoReFT": run(adapter.model)} for run in (prefill, decoding, generate)}
    made = peer_models(model.config, B, T, positions, cached=True)
    if made is not None:
        bare, reft, locations = made
        settings = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        parts["generate"]["pyreft's floor"] = lambda: bare.generate(**inputs, **settings)
        parts["generate"]["pyreft"] = lambda: reft.generate(inputs, unit_locations=locations, intervene_on_prompt=True, **settings)
    return parts


# ---- how it is timed -------------------------------------------------------------------------------------------------


def measure(providers: dict, seconds: float) -> dict:
    """{name: {"milliseconds": 20th, 50th, 80th percentile, "ratio": the same}} for providers that run in turn."""
    times, start = {name: [] for name in providers}, time.perf_counter()
    for run in providers.values():
        for _ in range(2):
            run()
    while time.perf_counter() - start < seconds or len(times["floor"]) < 7:
        for name, run in providers.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    spread, found = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), {}
    for name, taken in times.items():
        floor = times["pyreft's floor" if name == "pyreft" else "floor"]
        taken, floor = torch.tensor(taken, dtype=torch.float64), torch.tensor(floor, dtype=torch.float64)
        found[name] = {"milliseconds": [round(1e3 * x, 3) for x in taken.quantile(spread).tolist()],
                       "ratio": [round(x, 3) for x in (taken / floor).quantile(spread).tolist()]}
    return {"rounds": len(floor), "providers": found}


def machine() -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if platform.system() == "Linux" else [platform.processor()]
    return {"device": f"{names[0]}, 1 thread", "torch": torch.__version__, "date": datetime.date.today().isoformat(),
            "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
            "backend": "cpu" if ops.backends()["cpu"] else "reference"}


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    parser.add_argument("--seconds", type=float, default=20, help="for each table")
    parser.add_argument("--positions", default="f4+l4")
    parser.add_argument("--write", action="store_true", help="append the rows to results/training.jsonl")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables = []
    for C, L, B, T in [STEPS[1]] if options.quick else STEPS:
        names = ALL if C == 256 else ("LoReFT", "DiReFT")                 # a C × C buffer a layer is no fun at 1024
        tables.append(("step", C, L, B, T, step_providers(base(C, L), B, T, options.positions, names)))
    for C, L, B, T in [STEPS[1]] if options.quick else STEPS[:2]:
        for part, providers in generation_providers(base(C, L).eval(), B, T, options.positions).items():
            tables.append((part, C, L, B, T, providers))
    rows = []
    for part, C, L, B, T, providers in tables:
        rows.append({**machine(), "part": part, "C": C, "layers": L, "batch": [B, T], "r": RANK, "positions": options.positions,
                     **measure(providers, options.seconds)})
        print(f"\n{part}, C {C}, {L} layers, batch {B} × {T}, r {RANK}, {options.positions} on all layers, {rows[-1]['rounds']} rounds")
        for name, found in rows[-1]["providers"].items():
            low, middle, high = found["ratio"]
            print(f"  {name:24} {found['milliseconds'][1]:9.2f} ms   {middle:6.3f} × its floor   ({low:.3f} … {high:.3f})", flush=True)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / "training.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


if __name__ == "__main__":
    main()
