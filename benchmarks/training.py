"""What an adapter costs in training: a step with it, over the same step of the frozen base without it, other libraries beside.
Run: minireft bench training [--quick] [--write]       (--write: results/training.jsonl; about two minutes)
You should see each provider's time as a multiple of its floor's: 1.00 would be an adapter that costs nothing.

floor   the frozen base with gradients of its activations down to the lowest edited site (the first block's output), no adapter
inner   the same down to the first block's input, where (IA)³ and LoRA begin
The floors of other libraries are transformers' Llama of the same shape, likewise. pyreft needs an environment of its own:
`make peers-pyreft`, then PYTHONPATH=. .venv/pyreft/bin/python benchmarks/training.py (`minireft bench` looks for it there).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))           # so that it also runs as a file
from benchmarks import harness  # noqa: E402
from minireft import IA3, Bank, DiReFT, LoRA, LoReFT, Model, ModelConfig, NEFTune, ops  # noqa: E402
from minireft.losses import cross_entropy  # noqa: E402

V, RANK, POSITIONS, TASKS = 1024, 8, "f4+l4", (1, 4, 16, 64)
STEPS = [(256, 4, 8, 128), (256, 4, 1, 16), (256, 4, 1, 128), (1024, 8, 2, 128)]       # C, L, B, T
PHASES = ("forward", "backward", "update")
FLOORS = {"(IA)³": "inner floor", "LoRA": "inner floor", "pyreft": "pyreft's floor", "PEFT LoRA": "PEFT's floor", "PEFT (IA)³": "PEFT's floor",
          "full, NEFTune": "full"}                                         # what a ratio is to; all others: floor
OURS = ("LoReFT", "LoReFT, plain PyTorch", "DiReFT", "LoReFT, Householder", "(IA)³", "LoRA", "full", "full, NEFTune")


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
        return lambda *x: operation(*x).requires_grad_()


def base(C: int, L: int, device: str = "cpu") -> Model:
    torch.manual_seed(0)
    config = ModelConfig(V, width=C, layers=L, heads=C // 64, hidden=C * 8 // 3 // 32 * 32, context=512, tied=False)
    return Model(config).requires_grad_(False).to(device)


def twin(model: Model) -> Model:
    """Another model object with the same weights, so that what is attached to one is not on the other."""
    with torch.device("meta"):
        other = Model(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False).train(model.training)


class Step:
    """A training step in its phases; the last loss stays for whoever compares."""

    def __init__(self, parameters, run, tokens, answer):
        self.run, self.tokens, self.answer = run, tokens, answer
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None

    def forward(self):
        self.loss = cross_entropy(self.run(self.tokens), self.tokens, self.answer)

    def backward(self):
        self.loss.backward()

    def update(self):
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def phases(self) -> tuple:
        return self.forward, self.backward, self.update


def step_providers(model: Model, B: int, T: int, names) -> dict[str, Step]:
    """{name: a training step}, floors first."""
    device = model.embed.weight.device
    tokens, answer = torch.randint(V, (B, T), device=device), torch.ones(B, T, dtype=torch.bool, device=device)

    def floor(site):
        bare = twin(model)
        bare.get_submodule(site).edits.append(Floor())
        return Step([], bare, tokens, answer)

    def adapted(kind, **options):
        adapter = kind(twin(model), **options).attach()
        return Step(list(adapter.parameters()), adapter.model, tokens, answer)

    def plain():
        step = adapted(LoReFT, rank=RANK, positions=POSITIONS)
        run, backward = step.run, step.backward

        def on_reference(function):
            def called(*arguments):
                with ops.use("reference"):
                    return function(*arguments)
            return called
        step.run, step.backward = on_reference(run), on_reference(backward)
        return step

    def full(*noise):
        other = Model(model.config).to(device)
        for kind in noise:
            kind(other).attach()
        return Step(list(other.parameters()), other, tokens, answer)
    makers = {"LoReFT": lambda: adapted(LoReFT, rank=RANK, positions=POSITIONS), "LoReFT, plain PyTorch": plain,
              "DiReFT": lambda: adapted(DiReFT, rank=RANK, positions=POSITIONS),
              "LoReFT, Householder": lambda: adapted(Householder, rank=RANK, positions=POSITIONS),
              "(IA)³": lambda: adapted(IA3), "LoRA": lambda: adapted(LoRA, rank=RANK), "full": full, "full, NEFTune": lambda: full(NEFTune)}
    inner = {"inner floor": lambda: floor("embed")} if {"(IA)³", "LoRA"} & {*names} else {}
    made = {"floor": lambda: floor("blocks.0.output"), **inner, **{name: makers[name] for name in names}}
    return {name: make() for name, make in made.items()}


def task_providers(model: Model, B: int = 64, T: int = 32) -> dict[str, Step]:
    """A batch of 64 rows whose rows belong to 1, 4, … 64 adapters of a bank of as many."""
    device = model.embed.weight.device
    tokens, answer = torch.randint(V, (B, T), device=device), torch.ones(B, T, dtype=torch.bool, device=device)
    made = {}
    for K in TASKS:
        other = twin(model)
        members = {str(k): LoReFT(other, rank=RANK, positions=POSITIONS) for k in range(K)}
        bank = Bank(members).attach()
        tasks = bank.ids([str(row % K) for row in range(B)])
        parameters = [p for member in members.values() for p in member.parameters()]
        made["floor" if K == 1 else f"{K} tasks"] = Step(parameters, lambda x, other=other, tasks=tasks: other(x, tasks=tasks), tokens, answer)
    return made


# ---- other libraries, where they are installed ---------------------------------------------------------------------------


def llama(c: ModelConfig, cached: bool, device):
    """transformers' Llama of the same shape, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        max_position_embeddings=c.context, use_cache=cached)).requires_grad_(False).to(device)


def peft_models(c: ModelConfig, cached: bool, device) -> dict:
    """{name: model} of PEFT."""
    import peft
    kinds = {"PEFT (IA)³": peft.IA3Config(task_type="CAUSAL_LM"),
             "PEFT LoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"])}
    return {name: peft.get_peft_model(llama(c, cached, device), kind) for name, kind in kinds.items()}


def pyreft_model(c: ModelConfig, B: int, T: int, cached: bool):
    """pyreft's model, and its name for the positions."""
    import pyreft
    reft = pyreft.get_reft_model(llama(c, cached, "cpu"), pyreft.ReftConfig(representations=[
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK,
         "intervention": pyreft.LoreftIntervention(embed_dim=c.width, low_rank_dimension=RANK, dtype=torch.float32)}
        for layer in range(c.layers)]))
    at = pyreft.get_intervention_locations(last_position=T, positions=POSITIONS, num_interventions=c.layers, share_weights=True)
    return reft, {"sources->base": (None, [[row] * B for row in at])}


def installed() -> str:
    """Of "pyreft" and "peft" the one that is here, or nothing; they do not live together."""
    return next((name for name in ("pyreft", "peft") if importlib.util.find_spec(name) and importlib.util.find_spec("transformers")), "")


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", installed()) if installed())


def peers(c: ModelConfig, B: int, T: int, device: str) -> dict[str, Step]:
    """The other library's training steps, and its floors."""
    if not installed():
        return {}
    tokens, answer = torch.randint(V, (B, T), device=device), torch.ones(B, T, dtype=torch.bool, device=device)

    def floor(site, output):
        model = llama(c, False, device)
        model.get_submodule(site).register_forward_hook(output)
        return Step([], lambda x: model(input_ids=x).logits, tokens, answer)
    if installed() == "pyreft":
        reft, locations = pyreft_model(c, B, T, False)
        return {"pyreft's floor": floor("model.layers.0", lambda module, inputs, out: (out[0].requires_grad_(), *out[1:])),
                "pyreft": Step(list(reft.get_trainable_parameters()),
                               lambda x: reft({"input_ids": x}, unit_locations=locations)[1].logits, tokens, answer)}
    made = {"PEFT's floor": floor("model.embed_tokens", lambda module, inputs, out: out.requires_grad_())}
    for name, model in peft_models(c, False, device).items():
        made[name] = Step([p for p in model.parameters() if p.requires_grad], lambda x, model=model: model(input_ids=x).logits, tokens, answer)
    return made


# ---- rows --------------------------------------------------------------------------------------------------------------------


def row(clock: harness.Clock, part: str, C: int, L: int, B: int, T: int, providers: dict, seconds: float) -> dict:
    """Times providers (functions, or steps in phases) side by side: milliseconds, tokens a second, ratios to their floors."""
    runs = {name: p.phases() if isinstance(p, Step) else p for name, p in providers.items()}
    times = clock.interleaved(runs, seconds)
    whole = {name: [sum(t) for t in taken] if isinstance(runs[name], tuple) else taken for name, taken in times.items()}
    found = {}
    for name, taken in whole.items():
        floor = FLOORS.get(name, "floor") if FLOORS.get(name) in providers else "floor"
        found[name] = {"us": harness.percentiles(taken), "ratio": harness.ratios(taken, whole[floor]), "floor": floor}
        if isinstance(runs[name], tuple):
            found[name]["phases_us"] = {phase: harness.percentiles([t[i] for t in times[name]])[1] for i, phase in enumerate(PHASES)}
    beside = installed() if any("floor" in name and "'s" in name for name in providers) else ""
    result = {**harness.machine(str(clock.device)), "threads": torch.get_num_threads(), "part": part, "C": C, "layers": L, "batch": B, "tokens": T,
              "r": RANK, "positions": POSITIONS, "beside": beside, "versions": versions() if beside else "", "rounds": len(whole["floor"]),
              "providers": found}
    show(result)
    return result


def show(row: dict) -> None:
    print(f"\n{row['part']}, C {row['C']}, {row['layers']} layers, batch {row['batch']} × {row['tokens']}, r {row['r']}, {row['positions']} "
          f"on all layers, {row['rounds']} rounds{', ' + row['versions'] if row['beside'] else ''}")
    for name, found in row["providers"].items():
        low, middle, high = found["ratio"]
        print(f"  {name:24} {found['us'][1] / 1e3:9.2f} ms   {middle:6.3f} × {found['floor']}   ({low:.3f} … {high:.3f})", flush=True)


def options_of(program: str, description: str, argv):
    parser = argparse.ArgumentParser(prog=f"minireft bench {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest shape alone")
    parser.add_argument("--seconds", type=float, default=8, help="for each table (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--peers", action="store_true", help="only the tables in which another library takes part")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in results/{program}.jsonl")
    return parser.parse_args(argv)


def main(argv=None) -> list[dict]:
    options = options_of("training", __doc__, argv)
    clock, rows = harness.Clock(options.device), []
    for C, L, B, T in STEPS[1:2] if options.quick else STEPS:
        model = base(C, L, options.device)
        if not options.peers:
            names = OURS if C == 256 else ("LoReFT", "DiReFT", "LoReFT, Householder")
            rows.append(row(clock, "step", C, L, B, T, step_providers(model, B, T, names), options.seconds))
        if (C, L, B, T) in STEPS[:2] and (others := peers(model.config, B, T, options.device)):
            both = {**step_providers(model, B, T, ("LoReFT", "(IA)³", "LoRA")), **others}
            rows.append(row(clock, "step", C, L, B, T, both, options.seconds))
    if not options.peers and not options.quick:
        providers = task_providers(base(256, 4, options.device))
        rows.append(row(clock, "step, tasks", 256, 4, 64, 32, providers, options.seconds))
        forwards = {name: torch.no_grad()(lambda step=step: step.run(step.tokens)) for name, step in providers.items()}
        rows.append(row(clock, "prefill, tasks", 256, 4, 64, 32, forwards, options.seconds))
    if options.write:
        harness.write(rows, harness.RESULTS / "training.jsonl")
    return rows


if __name__ == "__main__":
    main()
