"""Writes measured results into README.md and benchmarks/README.md, between markers; numbers there come from files, never from a keyboard.
Run: python benchmarks/readme.py [runs/demo]     (with a folder: first takes the results and the picture of that demo)
You should see the pages' tables change where the results have; `python benchmarks/readme.py` again changes nothing.
"""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.tfew import accuracy_table, bill_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def demo_table(results: dict) -> str:
    """The demo's table in Markdown, and where it was measured."""
    rows = [["task", *results["header"]], *([row["task"], *row["cells"]] for row in results["rows"])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    losses = [f"{row['name']} {row['test_loss']:.2f}" for row in results["rows"] if row["task"] == "instructions"]
    return (f"{text}\n\nAccuracies on {results['rows'][0]['items']} held-out items, ± their standard error. Loss on the "
            f"instructions' test items, in nats a token: {', '.join(losses)}.\n"
            f"Measured {results['date']} on {results['machine']}, torch {results['torch']}, {results['backend']}.")


def tfew_table(results: dict) -> str:
    """Accuracies by rank classification, and what an answer costs."""
    bills = results["bill"].values()
    share = [b["flops, T-Few"] / b["flops, in the prompt"] for b in bills]
    kept = [b["flops, T-Few"] / b["flops, in the prompt, cached"] for b in bills]
    return (f"{accuracy_table(results)}\n\nMedians (and quartiles) over {results['subsets']} subsets of {results['shots']} examples and "
            f"{results['templates']} templates, {results['items']} questions each; an answer costs {min(share):.0%} to {max(share):.0%} of the FLOPs of one "
            f"with the examples in the prompt, and {min(kept):.0%} to {max(kept):.0%} where the prompt's cache is kept. The bill:\n\n"
            f"{bill_table(results)}\n\n"
            f"Measured {results['date']} on {results['machine']}, one thread, torch {results['torch']}.")


def neftune_table(results: dict) -> str:
    """Each measure's mean and 95 % interval over seeds, one row a way of training."""
    names = list(next(iter(results["summary"].values())))
    lines = [["trained with", *names], ["---"] * (1 + len(names))]
    for way, found in results["summary"].items():
        lines.append([way, *(f"{found[name][0]:.2f} ± {found[name][1]:.2f}" if name in found else "" for name in names)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (f"{text}\n\nMeans and 95 % intervals over {results['seeds']} seeds; all weights tuned on {results['training_items']} instructions, "
            f"{results['test_items']} test items. Measured {results['date']} on {results['machine']}, torch {results['torch']}.")


def classification_table(results: dict) -> str:
    """Test accuracy of a head beside each method, a column for each data set and what the head scores; empty where it was not run."""
    results = dict(sorted(results.items()))
    lines = [["beside the head", "numbers", *(f"{name} ({found['items']['test']} items)" for name, found in results.items())]]
    lines.append(["---"] * len(lines[0]))
    for method in next(iter(results.values()))["methods"]:
        each = [found["methods"].get(method) for found in results.values()]
        cells = [f"{mean(m['test']):.3f} ± {stdev(m['test']) / len(m['test']) ** 0.5:.3f}" if m else "" for m in each]
        lines.append([method, " / ".join(dict.fromkeys(f"{m['parameters']:,}" for m in each if m)), *cells])
    always = ", ".join(dict.fromkeys(f"{name.partition(',')[0]} {found['majority']:.3f}" for name, found in results.items()))
    dates = " and ".join(dict.fromkeys(sorted(found["date"] for found in results.values())))
    return ("\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nMeans over {next(iter(results.values()))['seeds']} seeds ± standard error; the head "
            f"and the learning rate are each method's own, chosen on validation items. Always the commonest label: {always}. Measured {dates}.")


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def measured(rows: list[dict]) -> str:
    """Where and when, one thread's rows."""
    newest = max(rows, key=lambda row: row["date"])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"Measured {newest['date']} on {newest['device']}, one thread, torch {newest['torch']}, {newest['compiler']}, commit {commits}."


def kernels_table(rows: list[dict]) -> str:
    """Every operation at one shape, the real ReFT shape first: microseconds, and how many times faster than the others."""
    lines = [["operation, forward and backward", "dtype", "as usually written", "well-written eager", "torch.compile", "ours", "ours faster ×",
              "of what memory can do", "launches: ours / eager / as written"]]
    for op, N in (("low_rank_edit_at_", 448), *((op, 4096) for op in ("low_rank_edit", "scale", "gelu_scale", "swiglu_scale", "noisy_embedding"))):
        for row in rows:
            if (row["op"], row["N"], row["C"], row["pass"], row["cache"], row["threads"], row["tasks"]) != (op, N, 1024, "both", "hot", 1, 0) or row["r"] not in (0, 8):
                continue
            found = row["providers"]
            ours, best = found["ours"], min(found[name]["us"][1] for name in ("eager", "compiled"))
            cells = [f"{found[name]['us'][1]:,.0f}" if name in found else "" for name in ("common", "eager", "compiled", "ours")]
            lines.append([f"`{op}`, N {N}, C 1024" + f", r {row['r']}" * (row["r"] > 0), row["dtype"], *cells, f"{best / ours['us'][1]:.1f}", f"{row['share']:.0%}",
                          " / ".join(str(found[name]["launches"]) for name in ("ours", "eager", "common") if name in found)])
    one = [row for row in rows if row["threads"] == 1]
    behind = Counter(f"`{row['op']}` {row['pass']} {row['dtype']}" for row in one if row["providers"]["ours"]["us"][1] >
                     min(found["us"][1] for name, found in row["providers"].items() if name in ("eager", "compiled")))
    limits = {name: max(row["ceilings"]["operations"].get(name, 0) for row in one) for name in ("float32", "bfloat16")}
    tasks = {(row["op"], row["pass"], row["dtype"], row["tasks"]): row["providers"]["ours"]["us"][1] for row in one if row["tasks"] and row["cache"] == "hot"}
    mixed = ", ".join(f"`{op}` {tasks[op, which, 'float32', 64] / tasks[op, which, 'float32', 1]:.2f}× {which}"
                      for op in ("low_rank_edit_at_", "scale") for which in ("forward", "backward") if (op, which, "float32", 64) in tasks)
    return (f"{markdown(lines)}\n\nMicroseconds, medians with the inputs in cache; the first line is the real ReFT shape, 14 positions in each of 32 "
            f"sequences, in place. Of {len(one)} rows measured, ours is behind eager or torch.compile in {behind.total()}: "
            f"{', '.join(f'{what} ({n})' for what, n in behind.most_common())}. A copy here moves "
            f"{max(row['ceilings']['copy'] for row in one):.0f} GB/s, arithmetic reaches {limits['float32']:.0f} (float32) and {limits['bfloat16']:.0f} "
            f"(bfloat16) GFLOP/s. 64 tasks in a batch of 64 rows, over one task: {mixed}.\n{measured(one)}")


def gpu_table(rows: list[dict]) -> str:
    """The same on a GPU, cold: empty until there was one."""
    lines = [["operation", "shape", "dtype", "ours, µs", "of copy bandwidth, forward", "backward", "eager, compiled, Triton over ours, forward and backward", "launches"]]
    wanted = [("low_rank_edit", "N 16384, C 4096, r 8"), ("low_rank_edit_at_", "N 448, C 4096, r 8"), ("scale", "N 16384, C 4096"), ("gelu_scale", "N 16384, C 4096"),
              ("swiglu_scale", "N 16384, C 4096"), ("noisy_embedding", "N 16384, C 4096")]
    for op, shape in wanted:
        mine = {row["pass"]: row for row in rows if row["op"] == op and row["dtype"] == "bfloat16" and row["tasks"] == 0
                and shape == f"N {row['N']}, C {row['C']}" + f", r {row['r']}" * (row["r"] > 0)}
        if not mine:
            lines.append([f"`{op}`", shape, "bfloat16", *[""] * 5])
            continue
        both = mine["both"]["providers"]
        shares = [f"{mine[which]['bytes'] / mine[which]['providers']['ours']['us'][1] / 1e3 / mine[which]['ceilings']['copy']:.0%}" for which in ("forward", "backward")]
        gains = ", ".join(f"{both[name]['us'][1] / both['ours']['us'][1]:.1f}" if name in both else "–" for name in ("eager", "compiled", "triton"))
        lines.append([f"`{op}`", shape, "bfloat16", f"{both['ours']['us'][1]:.0f}", *shares, gains, str(both["ours"].get("launches") or "")])
    where = (f"Measured {rows[-1]['date']} on {rows[-1]['device']}, torch {rows[-1]['torch']}, {rows[-1]['compiler']}, commit {rows[-1]['commit']}." if rows
             else "No GPU was at hand: never run, so the cells are empty. `make gpu` measures them.")
    return f"{markdown(lines)}\n\n{where}"


def cost_table(training: list[dict], generation: list[dict]) -> str:
    """What each method costs in a step and in generation, as multiples of its floor."""
    columns = [("step, 8 × 128", "step", 256, 8), ("step, 1 × 16", "step", 256, 1), ("step at C 1024, 8 layers, 2 × 128", "step", 1024, 2),
               ("prefill, 8 × 128", "prefill", 256, 8), ("decoding", "decoding", 256, 8), ("generate", "generate", 256, 8)]
    lines = [["over its floor", *(name for name, *_ in columns)]]
    rows, first = [*training, *generation], {1: 16, 8: 128, 2: 128}
    for method in ("LoReFT", "LoReFT, plain PyTorch", "LoReFT, Householder", "DiReFT", "(IA)³", "(IA)³ merged", "LoRA", "pyreft", "PEFT (IA)³", "PEFT LoRA"):
        cells = []
        for _, part, C, B in columns:
            here = [row["providers"][method]["ratio"] for row in rows if (row["part"], row["C"], row["batch"], row["tokens"]) == (part, C, B, first[B])
                    and method in row["providers"] and (row["beside"] != "") == method.startswith(("pyreft", "PEFT"))]
            cells.append(f"{here[0][1]:.2f} ({here[0][0]:.2f}–{here[0][2]:.2f})" if here else "")
        lines.append([method, *cells])
    wide = next(row["providers"] for row in training if row["part"] == "step" and row["C"] == 1024)
    mixed = {row["part"]: row["providers"]["64 tasks"]["ratio"][1] for row in training if "tasks" in row["part"]}
    versions = "; ".join(dict.fromkeys(row["versions"] for row in rows if row["versions"]))
    return (f"{markdown(lines)}\n\nMedians of CPU time over rounds (20th–80th percentile). The floor of a step is the frozen base with gradients of its activations "
            f"down to the lowest edited site; C 256, 4 layers, r 8, f4+l4 on all layers where nothing else is said. At C 1024 a step with LoReFT costs "
            f"{wide['LoReFT']['us'][1] / wide['DiReFT']['us'][1]:.2f}× one with DiReFT. A batch of 64 rows that belong to 64 adapters of a bank costs "
            f"{mixed['prefill, tasks']:.2f}× the same batch with one in prefill, {mixed['step, tasks']:.2f}× in a training step of all of them. Beside: {versions}.\n"
            f"{measured(rows)}")


RUNS = {"kernels": (kernels_table, "kernels"), "gpu": (gpu_table, "gpu"), "cost": (cost_table, "training", "generation")}


def stories_table(results: dict) -> str:
    """What a real small model does before and after tuning, a column for each purpose."""
    purposes = list(results.values())
    chance = [f"{p['before']:.3f} ± {(p['before'] * (1 - p['before']) / p['items']['test']) ** 0.5:.3f}" for p in purposes]
    lines = [["stories260K", "numbers", *(f"{name} ({p['items']['test']} items)" for name, p in results.items())], ["before", "0", *chance]]
    for method in purposes[0]["methods"]:
        each = [p["methods"][method] for p in purposes]
        cells = [f"{mean(m['test']):.3f} ± {stdev(m['test']) / len(m['test']) ** 0.5:.3f}" for m in each]
        lines.append([method, f"{each[0]['parameters']:,}", *cells])
    dates = " and ".join(dict.fromkeys(p["date"] for p in purposes))
    return (f"{markdown(lines)}\n\nMeans over {purposes[0]['seeds']} seeds ± standard error (before: of the items); "
            f"{' and '.join(str(p['steps']) for p in purposes)} steps of {purposes[0]['batch']}, the learning rate chosen on validation items. Measured {dates}.")


def memorise_table(results: dict) -> str:
    """The longest beginning of a text that one edit of rank 1 makes each model write."""
    lines = [["model", "edited after layer", "numbers", "without an edit", "longest exact beginning"]]
    for name, layers in results["models"].items():
        lines += [[name, str(found['layer']), str(found["parameters"]), f"{found['without an edit']} tokens",
                   f"{found['longest']} tokens"] for found in layers]
    return f"{markdown(lines)}\n\n{results['steps']} steps for each length, one seed, the best of three learning rates. Measured {results['date']}."


def tables() -> dict[str, str]:
    """Every table by the name in its markers."""
    makers = {"demo": demo_table, "tfew": tfew_table, "neftune": neftune_table, "classification": classification_table,
              "stories": stories_table, "memorise": memorise_table}
    made = {name: maker(json.loads((RESULTS / f"{name}.json").read_text())) for name, maker in makers.items()}
    for name, (maker, *files) in RUNS.items():
        made[name] = maker(*(harness.read(path) if (path := RESULTS / f"{file}.jsonl").exists() else [] for file in files))
    return made


def filled(pages: dict[Path, str]) -> dict[Path, str]:
    """The pages' texts with every table between markers written anew: each stands on one of them, once."""
    for name, table in tables().items():
        place = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.S)
        there = [path for path, text in pages.items() for _ in place.findall(text)]
        assert len(there) == 1, f"the table {name!r} has {len(there)} places on {', '.join(map(str, pages))}, expected one"
        pages = {path: place.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text) for path, text in pages.items()}
    return pages


def main(argv: list[str]) -> None:
    if argv:
        shutil.copy(Path(argv[0]) / "results.json", RESULTS / "demo.json")
        shutil.copy(Path(argv[0]) / "demo.png", RESULTS / "demo.png")
    for path, text in filled({path: path.read_text() for path in PAGES}).items():
        path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
