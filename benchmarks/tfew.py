"""T-Few against examples in the prompt, on the shipped base: what each loss is worth, and the bill (Liu et al. 2022).
Run: python benchmarks/tfew.py [--tasks mood,sums] [--subsets 3] [--quick] [--write | --table]     (results/tfew.json)
You should see accuracies by rank classification, medians over subsets of 16 examples and over templates, and what an
answer costs. A quarter of an hour on one thread; --quick only shows that it runs.

The recipe is `minireft.training.T_FEW` with a tenth of its steps at ten times its rate, since the base is small; both were
set once, for all tasks. The tasks themselves were reworded until the base could learn them, by scores on these very test
items: the table compares methods on learnable tasks. "pre-trained" begins with vectors that learned the other tasks.
In the prompt stand as many of the 16 examples as the context holds, in the template of the question.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minireft
from minireft.data import encode
from minireft.demo import processor
from minireft.tasks import few_shot
from minireft.training import T_FEW

RESULTS = Path(__file__).parent / "results" / "tfew.json"
CONFIG = replace(T_FEW, steps=T_FEW.steps // 10, lr=T_FEW.lr * 10)
METHODS = {  # row of the table → its losses
    "L_LM": ("lm",), "L_LM + L_UL": ("lm", "unlikelihood"), "L_LM + L_LN": ("lm", "length"), "all three": T_FEW.losses}
RELATED = {"told": "facts", "facts": "told"}    # the same lines: a mixture that one may start from leaves out the other
TEMPLATES = range(3)


# ---- accuracy

def ranked(model, tests) -> list[float]:
    """The accuracy in each template."""
    return [minireft.evaluate(model, model.tokenizer, test, metrics=("rank",)).rank for test in tests]


def tuned(model, examples, config, start=None) -> minireft.IA3:
    """(IA)³ after training, from ones or from the vectors of `start`."""
    ia3 = minireft.IA3(model)
    if start:
        ia3.load_state_dict(start.state_dict())
    minireft.train(model, [ia3], examples, config, progress=False)
    return ia3


def mixture(name: str, count: int) -> list:
    """Train items of the other tasks, each in one of its templates."""
    others = [other for other in few_shot.names() if other not in (name, RELATED.get(name))]
    return [few_shot.example(other, item, i % 3) for other in others for i, item in enumerate(few_shot.items(other, "train", count))]


def shown(model, test, shots):
    """The test's questions with examples of the same template in front."""
    return [few_shot.in_context(asked, shots, model.tokenizer, model.config.context) for asked in test]


def compare(model, name: str, subsets: int, items: int, config) -> dict:
    """Method → the accuracies of every subset, one a template."""
    tests = [few_shot.test(name, template, items) for template in TEMPLATES]
    rows = {method: [] for method in ("zero-shot", "in the prompt", *METHODS, "all three, pre-trained")}
    rows["zero-shot"].append(ranked(model, tests))
    longer = replace(config, steps=2 * config.steps, batch_size=16, losses=("lm",))
    before = tuned(model, mixture(name, longer.steps), longer)
    for subset in range(subsets):
        shots = few_shot.shots(name, subset)
        rows["in the prompt"].append(ranked(model, [shown(model, test, shots[t::3]) for t, test in zip(TEMPLATES, tests)]))
        for method in (*METHODS, "all three, pre-trained"):
            pre = method.endswith("pre-trained")
            learned = replace(config, losses=METHODS.get(method, T_FEW.losses), seed=subset)
            with tuned(model, shots, learned, before if pre else None):
                rows[method].append(ranked(model, tests))
    return rows


def median(scores: list[list[float]]) -> tuple[float, float, float]:
    """Median and quartiles over subsets and templates."""
    flat = sum(scores, [])
    low, middle, high = statistics.quantiles(flat, n=4, method="inclusive")
    return middle, low, high


# ---- the bill

def flops(call) -> int:
    """Multiplications and additions in the matrix products of a call, attention's among them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def by_hand(model, rows: list[int]) -> int:
    """The same for a forward pass over rows of these lengths: 2·parameters a token, and 4·C for each pair of tokens a layer."""
    c = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)      # the tied head counts once
    return sum(2 * weights * T + 4 * c.layers * c.heads * c.head_dim * T * T for T in rows)


def answering(model, examples) -> tuple[float, float]:
    """FLOPs to rank the choices of one of these examples: measured, and by hand. Each choice is a row by itself."""
    rows = [[encode(model.tokenizer, replace(e, completion=choice), model.config.context) for choice in e.choices] for e in examples]

    @torch.no_grad()
    def call():
        for choices in rows:
            for row in choices:
                model(torch.tensor([row.ids]))
    n = len(examples)
    return flops(call) / n, by_hand(model, [len(row.ids) for choices in rows for row in choices]) / n


def answering_cached(model, examples, fronts) -> float:
    """The same by hand where keys and values of what stands in front, `fronts` tokens long, are kept for all questions."""
    c, total = model.config, 0.0
    for e, front in zip(examples, fronts):
        for choice in e.choices:
            T = len(encode(model.tokenizer, replace(e, completion=choice), c.context).ids)
            total += by_hand(model, [T]) - by_hand(model, [front]) - 4 * c.layers * c.heads * c.head_dim * (T - front) * front
    return total / len(examples)


def training(model, examples, config) -> float:
    """FLOPs of all steps, from those of the first ten."""
    ia3 = minireft.IA3(model)
    few = replace(config, steps=10, warmup=0.0)
    return flops(lambda: minireft.train(model, [ia3], examples, few, progress=False)) / 10 * config.steps


def bill(model, name: str, config) -> dict:
    """What a task costs either way, over 20 questions in its first template."""
    c, shots = model.config, few_shot.shots(name, 0)
    test = few_shot.test(name, 0, 20)
    behind = shown(model, test, shots[::3])
    fronts = [len(model.tokenizer.encode(b.prompt)) - len(model.tokenizer.encode(t.prompt)) for b, t in zip(behind, test)]
    tuned_flops, tuned_by_hand = answering(model, test)
    prompt_flops, prompt_by_hand = answering(model, behind)
    with tempfile.TemporaryDirectory() as folder:
        minireft.IA3(model).save(Path(folder) / "adapter")
        on_disk = (Path(folder) / "adapter").stat().st_size
    texts = "\n".join(f"{shot.prompt} {shot.completion}" for shot in shots[::3])
    per_token = 2 * c.layers * c.kv_heads * c.head_dim * 4
    return {"tokens in front": round(statistics.mean(fronts)), "flops, training": training(model, shots, config),
            "flops, T-Few": tuned_flops, "by hand, T-Few": tuned_by_hand, "disk bytes, T-Few": on_disk,
            "flops, in the prompt": prompt_flops, "by hand, in the prompt": prompt_by_hand, "disk bytes, in the prompt": len(texts),
            "flops, in the prompt, cached": answering_cached(model, behind, fronts), "cache bytes, in the prompt": max(fronts) * per_token}


# ---- tables

def accuracy_table(results: dict) -> str:
    """Markdown: a row for each method, a column for each task; median (quartiles)."""
    names = list(results["accuracy"])
    lines = [["method", *names], ["---"] * (1 + len(names))]
    for method in next(iter(results["accuracy"].values())):
        cells = [median(results["accuracy"][name][method]) for name in names]
        lines.append([method, *(f"{middle:.2f} ({low:.2f}–{high:.2f})" for middle, low, high in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bill_table(results: dict) -> str:
    """Markdown: a row for each task. FLOPs as counted, and in parentheses by hand where that differs."""
    head = ["task", "MFLOP an answer: T-Few", "in the prompt", "cache kept", "KiB of cache", "GFLOP of training", "= answers in the prompt",
            "KiB on disk: T-Few", "in the prompt"]
    lines = [head, ["---"] * len(head)]
    for name, b in results["bill"].items():
        even = b["flops, training"] / (b["flops, in the prompt"] - b["flops, T-Few"])
        ways = [(b[f"flops, {way}"], b[f"by hand, {way}"]) for way in ("T-Few", "in the prompt")]
        cells = [f"{seen / 1e6:.0f}" + (f" ({hand / 1e6:.0f})" if seen != hand else "") for seen, hand in ways]
        lines.append([name, *cells, f"{b['flops, in the prompt, cached'] / 1e6:.0f}", f"{b['cache bytes, in the prompt'] / 1024:.0f}",
                      f"{b['flops, training'] / 1e9:.0f}", f"{even:.0f}", f"{b['disk bytes, T-Few'] / 1024:.1f}",
                      f"{b['disk bytes, in the prompt'] / 1024:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(results: dict) -> list[str]:
    """For each task, which way is better and at what share of the cost."""
    found = []
    for name, rows in results["accuracy"].items():
        tuned_at, prompt_at = median(rows["all three"])[0], median(rows["in the prompt"])[0]
        best = max(METHODS, key=lambda method: median(rows[method])[0])
        share = results["bill"][name]["flops, T-Few"] / results["bill"][name]["flops, in the prompt"]
        word = "beats" if tuned_at > prompt_at else "equals" if tuned_at == prompt_at else "loses to"
        found.append(f"{name}: T-Few {word} the prompt, {tuned_at:.2f} to {prompt_at:.2f}, at {share:.0%} of its FLOPs an answer; "
                     f"the best losses are {best}, {median(rows[best])[0]:.2f}")
    return found


def show(results: dict) -> None:
    print(*verdicts(results), "", accuracy_table(results), "", bill_table(results), "", sep="\n")
    r = results
    print(f"{r['date']}, {r['machine']}, torch {r['torch']}: {r['cpu_seconds']} CPU seconds on one thread; {r['subsets']} subsets of "
          f"{r['shots']}, {r['templates']} templates, {r['items']} questions;\n{r['config']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(few_shot.names()))
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 steps, 10 items, one subset")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return show(json.loads(RESULTS.read_text()))
    torch.set_num_threads(1)
    model, _ = minireft.load("base")
    config, subsets, items = (replace(CONFIG, steps=4), 1, 10) if options.quick else (CONFIG, options.subsets, 100)
    started, results = time.process_time(), {"accuracy": {}, "bill": {}}
    for name in options.tasks.split(","):
        results["accuracy"][name] = compare(model, name, subsets, items, config)
        results["bill"][name] = bill(model, name, config)
        print(f"{name}: done", flush=True)
    told = ("steps", "batch_size", "lr", "optimizer", "warmup", "schedule", "clip")
    results.update(date=datetime.date.today().isoformat(), machine=processor(), torch=torch.__version__, shots=16, items=items,
                   cpu_seconds=round(time.process_time() - started), subsets=subsets, templates=len(TEMPLATES),
                   config={key: getattr(config, key) for key in told})
    show(results)
    if options.write:
        RESULTS.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
