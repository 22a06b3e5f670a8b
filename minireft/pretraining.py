"""Trains a base from nothing: the generator of tasks/corpus.py writes, a model reads, the skill gates decide.

Use:  python -m minireft pretrain --quick my-base              # or pretrain("my-base", quick=True); --arch encoder
See:  a falling loss, then the gates' scores; the folder then loads with minireft.load("my-base").

Matrices are trained by Muon (each update orthogonalised), the rest by AdamW. Processes share the work: each reads its
own stream, gradients are averaged, and each process orthogonalises its share of the matrices.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from . import checkpoint
from .data import padded
from .files import write_text
from .model import Model, ModelConfig
from .tasks import gates
from .tasks.corpus import Corpus
from .tasks.world import VOCABULARY
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """One way to make a base. Tokens read: steps × rows × context."""

    width: int = 128
    layers: int = 8
    heads: int = 4
    hidden: int = 384
    context: int = 128
    steps: int = 7500
    rows: int = 32                  # rows of `context` tokens in one step, over all processes
    peak: float = 4e-3              # learning rate of both optimisers
    warmup: int = 50                # steps
    # Shares of the steps, and the share of the peak there; straight lines between. Raised again when checking begins,
    # and when counting does.
    rates: tuple = (0, 0.224, 0.40, 0.424, 0.56, 0.80, 0.81, 1), (1, 1, 0.492, 0.8, 0.8, 0.03, 0.6, 0.03)
    weight_decay: float = 0.1       # on matrices: it bounds the states' norm, which tuning likes
    compile: bool = True            # torch.compile pays from some thousand steps on; without a compiler it is left out
    arch: str = "decoder"           # a key of OBJECTIVES

    @property
    def encoder_layers(self) -> int:
        return {"decoder": 0, "encoder": self.layers, "encoder-decoder": self.layers // 2}[self.arch]


def go_on(model, tokens: torch.Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> torch.Tensor:
    """A decoder's objective, −log p of every next token: tokens (B, T + 1)."""
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def fill_in(model, tokens: torch.Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> torch.Tensor:
    """An encoder's (Devlin et al. 2018, section 3.1), with more to fill in: of the 30 % of tokens that it is asked for, 8 of 10
    are shown as <unk>, one as any token, and one as it is."""
    tokens = tokens[:, :-1]                                               # (B, T)
    chance = torch.rand(tokens.shape, generator=generator)
    shown = torch.where(chance < 0.24, tokenizer.mask_id, tokens)
    anything = torch.randint(tokenizer.vocab_size, tokens.shape, generator=generator)
    shown = torch.where((chance >= 0.24) & (chance < 0.27), anything, shown)
    return F.cross_entropy(model(shown)[chance < 0.3].float(), tokens[chance < 0.3])


def answer(model, tokens: torch.Tensor, tokenizer: Tokenizer, generator: torch.Generator, most: int = 12) -> torch.Tensor:
    """An encoder–decoder's: the encoder reads a row up to a mark that an answer follows, with some spans of one to three tokens
    shown as <unk>; the decoder writes the next `most` tokens, then each <unk> and what it hides (Raffel et al. 2020, section 3.1.4)."""
    marks, prompts, answers = {tokenizer.vocabulary[mark] for mark in (":", "->", "=", "?", ".")}, [], []
    for row in tokens.tolist():
        places = [t for t in range(len(row) // 4, len(row) - most) if row[t - 1] in marks] or [len(row) // 2]
        cut, *draws = torch.randint(2**31, (1 + len(row),), generator=generator).tolist()
        cut, t, prompt = places[cut % len(places)], 0, []
        written = row[cut : cut + most]
        while t < cut:
            span = draws[t] % 3 + 1 if draws[t] % 10 == 0 and t + 4 < cut else 0           # never the last words before the answer
            prompt.append(tokenizer.mask_id if span else row[t])
            written += [tokenizer.mask_id, *row[t : t + span]] if span else []
            t += max(1, span)
        prompts.append(prompt), answers.append([model.config.start, *written])
    (read, real), (given, wanted) = padded(prompts, 0), padded(answers, 0)                  # (B, S), (B, U) twice each
    logits = model(read, real, decoder_tokens=given[:, :-1])              # (B, U − 1, V)
    return F.cross_entropy(logits[wanted[:, 1:]].float(), given[:, 1:][wanted[:, 1:]])


OBJECTIVES = {"decoder": go_on, "encoder": fill_in, "encoder-decoder": answer}
QUICK = Recipe(width=96, layers=6, heads=3, hidden=288, steps=1800, rates=((0, 0.6, 1), (1, 1, 0.03)), compile=False)
OTHERS = {arch: Recipe(width=96, layers=layers, heads=3, hidden=288, steps=steps, rates=((0, 0.6, 1), (1, 1, 0.03)), compile=False, arch=arch)
          for arch, layers, steps in (("encoder", 6, 2000), ("encoder-decoder", 8, 4000))}


def pretrain(out: str | Path, quick: bool = False, seed: int = 0, processes: int = 2, progress: bool = True,
             recipe: Recipe | None = None, arch: str = "decoder") -> dict:
    """Trains a base; the new folder `out` gets config.json, model.safetensors (bf16), tokenizer.json and a model card.

    seed: of the weights and the corpus (the world itself is always the same); processes: one thread each; arch: "decoder",
    "encoder" or "encoder-decoder", small ones that take minutes.
    Returns {"gates": {name: score}, "cpu_seconds": ..., "loss": ..., ...}. Raises ValueError if `out` exists already,
    OSError if it cannot be written. Nothing appears at `out` before all of it is there.
    """
    if arch not in OBJECTIVES:
        raise ValueError(f"arch is {arch!r}: expected one of {', '.join(OBJECTIVES)}")
    out, recipe = Path(out), recipe or (OTHERS[arch] if arch in OTHERS else QUICK if quick else Recipe())
    if out.exists():
        raise ValueError(f"{out} exists already: name a new folder, or remove that one first")
    if processes < 1 or recipe.rows % processes:
        raise ValueError(f"{recipe.rows} rows a step cannot be shared by {processes} processes: choose a divisor of it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))       # tells now whether it can be written
    try:
        _together(_work, processes, recipe, seed, str(folder), progress)
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").unlink()
        shutil.rmtree(folder / "meeting", ignore_errors=True)
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _together(work, processes: int, *arguments) -> None:
    """Runs work(rank, processes, *arguments) in that many processes; if one fails or Ctrl-C comes, none is left behind."""
    if processes == 1:
        return work(0, 1, *arguments)
    team = torch.multiprocessing.start_processes(_member, (work, processes, *arguments), processes, join=False)
    try:
        while not team.join():
            pass
    except torch.multiprocessing.ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        if last.startswith("OSError: "):                                  # a full disk, say: no traceback for that
            raise OSError(last.partition(": ")[2]) from None
        raise
    finally:
        for process in team.processes:
            process.kill()
            process.join()                                                # what it wrote to can be removed now


def _member(rank: int, work, *arguments) -> None:
    """One of the processes. It ends without the interpreter's teardown, in which a thread of gloo or autograd that still wants
    the interpreter's lock aborts the process now and then (pytorch/pytorch#190489), when all its work is done."""
    work(rank, *arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then along the recipe's `rates`."""
    return recipe.peak * min(1.0, (step + 1) / recipe.warmup) * float(np.interp(step / recipe.steps, *recipe.rates))


def _work(rank: int, processes: int, recipe: Recipe, seed: int, folder: str, progress: bool) -> None:
    """One process of the training; process 0 also measures and saves."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if processes > 1:
        meeting = Path(folder, "meeting")
        meeting.mkdir(exist_ok=True)
        dist.init_process_group("gloo", init_method=f"file://{meeting.resolve()}/point", rank=rank,
                                world_size=processes, timeout=timedelta(minutes=30))
    tokenizer = Tokenizer.from_words(VOCABULARY)
    model = Model(ModelConfig(tokenizer.vocab_size, recipe.width, recipe.layers, recipe.heads, recipe.hidden,
                              recipe.context, encoder_layers=recipe.encoder_layers))
    corpus, generator = Corpus(f"{seed} {rank}"), torch.Generator().manual_seed(seed * processes + rank)

    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    optimisers = [torch.optim.Muon(matrices[rank::processes], weight_decay=recipe.weight_decay,
                                   adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    run = torch.compile(model) if recipe.compile and (shutil.which("c++") or shutil.which("g++")) else model
    # bf16 halves the time of the matrix products where the processor has it. The fused attention's backward is slower
    # in bf16 than plain softmax on CPUs (measured), hence MATH.
    half = torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())
    began, average = time.time(), None
    bar = tqdm(range(recipe.steps), disable=not progress or rank > 0, unit="step")
    for step in bar:
        rows = corpus.batch(tokenizer, recipe.rows // processes, recipe.context + 1, step / recipe.steps)
        tokens = torch.from_numpy(rows)                                   # (B, T + 1)
        with half, sdpa_kernel(SDPBackend.MATH):
            loss = OBJECTIVES[recipe.arch](run, tokens, tokenizer, generator)
        loss.backward()
        average_gradients(model, processes)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate(step, recipe)
            optimiser.step()
        share_matrices(matrices, processes)
        model.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}")
    seconds = torch.tensor(time.process_time())
    if processes > 1:
        dist.all_reduce(seconds)
        dist.destroy_process_group()
    if rank == 0:
        report = {"loss": average, "cpu_seconds": seconds.item(), "wall_seconds": time.time() - began, "seed": seed,
                  "processes": processes, "tokens": recipe.steps * recipe.rows * recipe.context, "recipe": asdict(recipe)}
        save_base(folder, model, tokenizer, report)


def average_gradients(model: Model, processes: int) -> None:
    """One all-reduce of all gradients, laid end to end."""
    if processes > 1:
        gradients = [p.grad for p in model.parameters()]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat / processes, gradients)):
            gradient.copy_(mean)


@torch.no_grad()
def share_matrices(matrices: list[torch.Tensor], processes: int) -> None:
    """Every process sends the matrices that it has updated to the others."""
    if processes > 1:
        for owner in range(processes):
            owned = matrices[owner::processes]
            flat = torch._utils._flatten_dense_tensors(owned)
            dist.broadcast(flat, owner)
            for matrix, value in zip(owned, torch._utils._unflatten_dense_tensors(flat, owned)):
                matrix.copy_(value)


def save_base(folder: str | Path, model: Model, tokenizer: Tokenizer, report: dict) -> None:
    """Rounds the model to bf16, scores the gates on what is saved, and writes the folder and its model card."""
    folder, model = Path(folder), model.bfloat16().float().eval()
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["gates"] = gates.score(model, tokenizer)
    checkpoint.save(model, tokenizer, folder, dtype=torch.bfloat16)
    write_text(folder / "README.md", model_card(report))
    write_text(folder / "report.json", json.dumps(report))


def model_card(report: dict) -> str:
    """The model card in Markdown, from the report of the run that made the base."""
    r, rows = Recipe(**report["recipe"]), []
    for name, score in report["gates"].items():
        least = gates.PASS.get(name)
        verdict = "" if least is None else "passes" if score >= least else "**fails**"
        rows.append(f"| {name} | {score:.3f} | {gates.CHANCE[name]:.2f} | {least or ''} | {verdict} |")
    rates = ", ".join(f"{share:.3g} at {step:.2g}" for step, share in zip(*r.rates))
    names = {"decoder": "A decoder", "encoder": "An encoder", "encoder-decoder": "An encoder–decoder"}
    return f"""# A base of minireft

{names[r.arch]} of {report["parameters"]:,} parameters, trained from nothing on a corpus that a program wrote
(minireft/tasks/corpus.py) about a tiny world (minireft/tasks/world.py). It knows that world and nothing else.

- Shape: {r.layers} layers of {r.width}, {r.heads} heads, SwiGLU {r.hidden}, RMSNorm, rotary, tied output, context
  {r.context}, {len(VOCABULARY) + 3} words; stored in bf16.
- Recipe: {r.steps:,} steps of {r.rows} × {r.context} = {report["tokens"] / 1e6:.1f} M tokens; Muon on matrices (weight
  decay {r.weight_decay}), AdamW on the rest; learning rate {r.peak} after {r.warmup} steps of warm-up, in shares of the
  run, straight lines between: {rates}.
- Seed: {report["seed"]} for weights and corpus, 0 for the world; {report["processes"]} processes of one thread.
- Cost: {report["cpu_seconds"]:,.0f} CPU-seconds in {report["wall_seconds"] / 60:.0f} minutes, {platform.machine()}, torch
  {torch.__version__}. Training loss at the end: {report["loss"]:.3f}.
{report.get("note", "")}
Skill gates (200 items each; standard error at most 0.035):

| gate | score | chance | to pass | |
|---|---|---|---|---|
{chr(10).join(rows)}
"""
