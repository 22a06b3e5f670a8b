"""The command line: `minireft COMMAND`, or `python -m minireft COMMAND`.

Use:  minireft --help; minireft tune --task facts --out runs/facts; minireft generate --adapter FILE "a prompt"
See:  what was done and what to do next. A mistake is one line on stderr; a traceback is for bugs (MINIREFT_DEBUG=1).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import minireft
from minireft import tasks
from minireft.formats import datasets
from minireft.recipes import METHODS, RECIPES, recipe
from minireft.runs import started

PROGRAMS = {"bench": "bench.py", "profile": "profile_kernel.py", "neftune": "neftune.py", "reproduce": "reproduce/run.py"}
# What `tune` can change of a recipe or a method: an option of its adapter, or a field of TrainConfig.
SETTINGS = ("rank", "layers", "positions", "tied", "sites", "init_scale", "layer_norm", "neftune", "epochs", "steps", "batch_size", "lr",
            "optimizer", "schedule", "warmup", "weight_decay", "losses", "pack", "bucket", "recompute")


# -------------------------------------------------------------------------------------------------- the everyday verbs

def demo(args) -> None:
    """Tunes several ways and compares."""
    from . import demo
    demo.run(args.base, args.out, args.quick)


def tune(args) -> None:
    """Trains one method on a task or on the user's own file, and saves what was learned."""
    out, name = Path(args.out), args.recipe or args.method
    full = (RECIPES | METHODS)[name].kind is None
    done = out / ("base" if full else "adapter.safetensors")
    if not args.resume and (started(out) or done.exists()):
        raise ValueError(f"{out} holds a run already: add --resume to go on with it, or name another folder with --out")
    half = torch.bfloat16 if args.bf16 and not full else None             # a base that learns keeps float32 weights
    model, tokenizer = open_base(args, "meta" if args.dry_run else None, half)
    examples = read(args, "train")
    torch.manual_seed(args.seed)
    changes = {key: getattr(args, key) for key in SETTINGS if getattr(args, key) is not None}
    adapters, config = recipe(name, model, examples, args.seed, print if args.recipe else None, **changes)
    config = replace(config, bf16=args.bf16 and full, accumulate=pieces(args.micro_batch, config.batch_size))
    adapter = None if full else adapters[0]
    if args.dry_run:
        from .dry_run import show
        return show(model.to(half or torch.float32), adapters, config, [len(minireft.data.encode(tokenizer, e, model.config.context).ids) for e in examples])
    if adapter:
        adapter.print_trainable_parameters()
    else:
        print(f"trainable parameters: all {sum(p.numel() for p in model.parameters()):,} of the base")
    try:
        run = minireft.train(model, adapters, examples, config, tokenizer, out, args.resume, progress(args), args.tensorboard)
    except KeyboardInterrupt:
        again = shlex.join(["minireft", *args.argv, *([] if args.resume else ["--resume"])])
        raise KeyboardInterrupt(f"go on with\n  {again}" if started(out) else "no checkpoint had been written yet") from None
    if adapter:
        adapter.save(done)
    else:
        minireft.save(model, tokenizer, done)
    if run.losses:
        print(f"{len(run.losses)} steps in {run.seconds:.0f} s, loss {run.losses[0]:.3f} → {run.losses[-1]:.3f}")
    use = f"--adapter {done}" + (f" --base {args.base}" if args.base != "base" else "") if adapter else f"--base {done}"
    score = args.task and f"--task {args.task}" or isinstance(adapter, minireft.Classifier) and f"--data {args.data}"
    print(f"saved {done}; now: minireft {f'evaluate {score} {use}' if score else f'generate {use} {shlex.quote(examples[0].prompt)}'}")


def generate(args) -> None:
    """Continues prompts, one answer a line."""
    model, tokenizer = open_base(args)
    with adapted(model, args.adapter, args.force):
        for text in minireft.generate(model, tokenizer, args.prompt, args.max_new_tokens, args.temperature,
                                      args.top_p, args.seed):
            print(text)


def evaluate(args) -> None:
    """Scores a base, with an adapter or without, on a task's split or on the user's own file."""
    model, tokenizer = open_base(args)
    examples = read(args, args.split)
    with adapted(model, args.adapter, args.force):
        scores = minireft.evaluate(model, tokenizer, examples)
    print(scores)
    if args.task == "instructions":     # many answers are right: a program checks them
        p, n = sum(tasks.check(args.task, e, a) for e, a in zip(examples, scores.answers)) / scores.n, scores.n
        print(f"obeyed {p:.3f} ± {(p * (1 - p) / n) ** 0.5:.3f} on {n} examples")


def doctor(args) -> None:
    """Says what works here."""
    from . import doctor
    doctor.run()


# --------------------------------------------------------------------------------------------------------------- tools

def pretrain(args) -> None:
    """Trains a base from nothing."""
    from .pretraining import pretrain
    signal.signal(signal.SIGTERM, signal.default_int_handler)             # a polite kill is a Ctrl-C: nothing half-made stays behind
    report = pretrain(args.out, quick=args.quick, seed=args.seed, processes=args.processes, progress=progress(args), arch=args.arch)
    for name, score in report["gates"].items():
        print(f"{name:24} {score:.3f}")
    print(f"saved {args.out}; now: minireft generate --base {args.out} \"question : where does anna live ? answer :\"")


def convert(args) -> None:
    """Writes a base or an adapter in another program's form."""
    from .formats.convert import convert
    foreign = {"positions": args.positions} if args.positions else {}
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(f"wrote {args.dst} ({args.to}): {convert(args.src, args.dst, args.base, args.to, dtype, **foreign)}")


def merge(args) -> None:
    """Writes a base with an adapter folded into its weights."""
    from .formats.convert import merge
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(f"wrote {args.dst} ({args.to}): the base with {merge(args.base, args.adapter, args.dst, args.to, dtype, args.force)}")


def inspect(args) -> None:
    """Prints what lies at a path."""
    from .formats.overview import overview
    print(overview(args.path, args.base))


def bench(args) -> None:
    """Runs the program in benchmarks/, outside the package, that belongs to this command, with its own options."""
    name = PROGRAMS[getattr(args, "what", args.command)]
    program = Path(minireft.__file__).parent.parent / "benchmarks" / name
    if not program.is_file():
        raise ValueError(f"`minireft {args.command}` needs benchmarks/{name}, which is not installed: "
                         "run it in a clone of the source")
    sys.exit(subprocess.call([sys.executable, str(program), *args.options]))


def profile(args) -> None:
    """A program in benchmarks/, too."""
    bench(args)


def analyse(args) -> None:
    """Again, one for each thing to analyse."""
    bench(args)


def reproduce(args) -> None:
    """And the papers' claims."""
    bench(args)


# -------------------------------------------------------------------------------------------------------------- shared

def open_base(args, device=None, dtype=None):
    """The base and its tokenizer on the device asked for."""
    device = device or args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch sees no GPU; `minireft doctor` says why, --device cpu works")
    model, tokenizer = minireft.load(args.base, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{args.base} has no tokenizer.json: put the base's own one there, commands speak in text")
    if "OMP_NUM_THREADS" not in os.environ and model.config.width <= 512:
        torch.set_num_threads(1)        # a small model's operations are too short to share
    return model, tokenizer


def pieces(micro_batch: str | None, batch: int) -> int | str:
    """--micro-batch as TrainConfig's `accumulate`."""
    if micro_batch in (None, "auto"):
        return micro_batch or 1
    if not micro_batch.isdigit() or int(micro_batch) < 1 or batch % int(micro_batch):
        raise ValueError(f"--micro-batch {micro_batch}: expected auto, or a number that divides the batch of {batch}")
    return batch // int(micro_batch)


def read(args, split: str):
    """The examples asked for: a task's split, or a file."""
    if args.task:
        return tasks.load(args.task, split, args.limit)
    examples, bad = datasets.read(args.data, args.format, args.template, args.skip_bad_rows)
    if bad:
        print(f"minireft: skipped {len(bad)} malformed rows; the first: {bad[0]}", file=sys.stderr)
    return examples[: args.limit] if args.limit else examples


def adapted(model, path, force: bool):
    """The adapter at `path`, to stand in a `with`; nothing without a path."""
    return minireft.load_adapter(model, path, force) if path else nullcontext()


@contextmanager
def reader_may_leave():
    """Around a program, or its decorator: it ends quietly, with status 1, when whoever reads its output, such as `head`, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for what is still to be flushed
        sys.exit(1)


def progress(args) -> bool:
    return not args.quiet and sys.stderr.isatty()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"minireft: {message}; see `{self.prog} --help`\n")


def number(kind, least, above=False):
    """An argparse type: a finite number of at least (or above) `least`."""
    def parse(text: str):
        value = kind(text)
        if not (value > least if above else value >= least) or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: expected {'more than' if above else 'at least'} {least}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


COMMANDS = {                            # in the order of --help
    "everyday": {demo: "tune the shipped base in several ways and see what changed",
                 tune: "train one method on a task or on your own file",
                 generate: "continue a prompt",
                 evaluate: "score a base or an adapter",
                 doctor: "what is installed here, and what is missing"},
    "tools": {pretrain: "train a base from nothing",
              convert: "write a base or an adapter in another program's form",
              merge: "write a base with a LoRA or (IA)3 folded into its weights",
              inspect: "what a base or an adapter is, and what each method would train on it",
              bench: "time kernels, training and generation beside others (in a clone)",
              profile: "count what a CUDA kernel does, without a GPU (in a clone)",
              analyse: "fine-tune with noise and without, and see what changes (in a clone)",
              reproduce: "run the papers' claims in miniature (in a clone)"},
}


def build_parser() -> argparse.ArgumentParser:
    lines = [[f"{group}:", *(f"  {command.__name__:10} {text}" for command, text in commands.items())]
             for group, commands in COMMANDS.items()]
    parser = Parser(prog="minireft", usage="minireft COMMAND [options]     (minireft COMMAND --help explains one)",
                    formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(sum(lines, [])),
                    description="Tune language models by LoReFT, (IA)3 and NEFTune.")
    commands = parser.add_subparsers(dest="command", required=True, prog="minireft", metavar="COMMAND",
                                     help=argparse.SUPPRESS)
    p = {}
    for group in COMMANDS.values():
        for command, text in group.items():
            p[command] = commands.add_parser(command.__name__, add_help=command not in (bench, profile, reproduce),
                                             description=text[0].upper() + text[1:] + ".")
            p[command].set_defaults(run=command)

    for command in (tune, generate, evaluate, demo):
        p[command].add_argument("--base", default="base", metavar="FOLDER",
                                help="a base's folder (default: the one that is shipped)")
    for command in (tune, generate, evaluate):
        p[command].add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    for command in (generate, evaluate):
        p[command].add_argument("--adapter", metavar="FILE", help="what `tune` saved: adapter.safetensors")
        p[command].add_argument("--force", action="store_true", help="load an adapter that was made for another base")
    for command, what in ((tune, "train on"), (evaluate, "score")):
        source = p[command].add_mutually_exclusive_group(required=True)
        source.add_argument("--task", metavar="NAME", help=f"{what} a task: {', '.join(tasks.names())}")
        source.add_argument("--data", metavar="FILE",
                            help=f'{what} a file: a line is {{"prompt": "...", "completion": "..."}}; or see --format')
        p[command].add_argument("--format", choices=datasets.FORMATS, metavar="NAME",
                                help=f"of --data, where its first row does not tell: {', '.join(datasets.FORMATS)}")
        p[command].add_argument("--template", type=number(int, 0), metavar="N", default=0 if command is evaluate else None,
                                help="of --data with several wordings: which, from 0 (default: tune takes all, evaluate the first)")
        p[command].add_argument("--skip-bad-rows", action="store_true", help="leave malformed rows of --data out, and say how many")
        p[command].add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N examples")
    for command in (tune, pretrain):
        p[command].add_argument("--quiet", action="store_true", help="no progress bar")

    add = p[demo].add_argument
    add("--out", default="runs/demo", metavar="FOLDER", help="for the adapters and the picture (default: runs/demo)")
    add("--quick", action="store_true", help="few steps and few items: whether it runs, not what it shows")

    add = p[tune].add_argument
    way = p[tune].add_mutually_exclusive_group()
    way.add_argument("--method", choices=METHODS, default="loreft", help="default: loreft; full trains the base itself")
    way.add_argument("--recipe", choices=RECIPES, metavar="NAME",
                     help=f"a paper's settings, printed; the options below change them: {', '.join(RECIPES)}")
    add("--out", required=True, metavar="FOLDER", help="for adapter.safetensors (or base), log.jsonl, checkpoint.pt")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, to the same bits as without a stop")
    add("--rank", type=int, metavar="N", help="loreft, direft (default 4), lora (default 8)")
    add("--layers", metavar="LIST", help="loreft, direft: all, or numbers from 0 such as 3,5 (default: all)")
    add("--positions", metavar="WHERE", help="loreft, direft: which prompt tokens are edited, fN+lM (default: f7+l7)")
    add("--untied", action="store_false", default=None, dest="tied", help="loreft, direft: own weights for first and last tokens")
    add("--tied", action="store_true", default=None, help="the same weights for both (default, but of reft-instruct)")
    add("--sites", metavar="LIST", help="ia3 (default key,value,ffn), lora (default query,value; or all)")
    add("--init-scale", type=float, metavar="X", help="ia3: vectors start at 1 + X (default: 0)")
    add("--layer-norm", action="store_true", default=None, help="ia3: scales the layer norms as well")
    add("--neftune", type=number(float, 0), metavar="ALPHA", help="noise on the embeddings while training; 5 is usual")
    add("--pack", action="store_true", default=None, help="several examples to a row of the context: the same training, fewer rows")
    add("--steps", type=number(int, 1), metavar="N", help="default: 200")
    add("--epochs", type=number(float, 0, above=True), metavar="N", help="instead of --steps: passes over the examples")
    add("--batch-size", type=number(int, 1), metavar="N", help="examples in a step (default: 16)")
    add("--lr", type=number(float, 0, above=True), metavar="X",
        help="learning rate (default: what suits the shipped base)")
    add("--optimizer", choices=("adamw", "adafactor"), metavar="NAME", help="adamw (default) or adafactor")
    add("--schedule", choices=("linear", "cosine", "constant"), metavar="NAME", help="to zero: linear (default), cosine; or constant")
    add("--warmup", type=number(float, 0), metavar="X", help="share of the steps over which the rate rises (default: 0.1)")
    add("--weight-decay", type=number(float, 0), metavar="X", help="default: 0")
    add("--losses", type=lambda names: tuple(names.split(",")), metavar="LIST",
        help="lm (default); unlikelihood, length where there are choices")
    add("--dry-run", action="store_true", help="estimate the memory, say what fits 8 to 24 GB, and load nothing")
    add("--bf16", action="store_true", help="weights in bfloat16, adapters in float32; with full, products in bfloat16")
    add("--recompute", action="store_true", default=None, help="run blocks again in the backward pass: less memory, more time")
    add("--micro-batch", metavar="N", help="examples at a time, or auto: as many as fit (default: the whole batch)")
    add("--tensorboard", action="store_true", help="the log as TensorBoard events too, where that package is installed")
    add("--bucket", type=number(int, 1), metavar="N", help="sort the examples of N steps by length: less padding")
    add("--seed", type=int, default=0, metavar="N", help="of the start, the order and the noise (default: 0)")

    add = p[generate].add_argument
    add("prompt", nargs="+", metavar="PROMPT", help="each in quotes")
    add("--max-new-tokens", type=number(int, 1), default=64, metavar="N", help="default: 64")
    add("--temperature", type=number(float, 0), default=0.0, metavar="X", help="0 takes the likeliest token (default)")
    add("--top-p", type=number(float, 0, above=True), default=1.0, metavar="X",
        help="draw among the likeliest tokens that hold this share")
    add("--seed", type=int, default=0, metavar="N", help="of the draw (default: 0)")

    p[evaluate].add_argument("--split", default="test", metavar="NAME", help="train, validation or test (default)")

    add = p[pretrain].add_argument
    add("out", metavar="FOLDER", help="a new folder for the base")
    add("--quick", action="store_true", help="a smaller one, in under ten minutes")
    add("--arch", choices=("decoder", "encoder", "encoder-decoder"), default="decoder", metavar="NAME",
        help="decoder (default), encoder or encoder-decoder; the last two are small and take some minutes")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the corpus (default: 0)")
    add("--processes", type=number(int, 1), default=2, metavar="N", help="of one thread each (default: 2)")

    p[analyse].add_argument("what", choices=("neftune",), help="its options: --seeds N, --quick, --out FOLDER (runs/neftune)")

    add = p[merge].add_argument
    add("adapter", metavar="ADAPTER", help="a LoRA or an (IA)3 (ours, PEFT's, T-Few's)")
    add("dst", metavar="TO", help="a new folder")
    add("--base", default="base", metavar="FOLDER", help="the base that it is for (default: the one that is shipped)")
    add("--to", choices=("huggingface", "minireft"), default="huggingface", metavar="FORM", help="huggingface (default) or minireft")
    add("--force", action="store_true", help="merge an adapter that was made for another base")

    add = p[inspect].add_argument
    add("path", metavar="PATH", help="a base or an adapter, in any form that `convert` reads")
    add("--base", metavar="FOLDER", help="the base of an adapter that does not describe it: pyreft's, PEFT's, T-Few's")

    add = p[convert].add_argument
    add("src", metavar="FROM", help="a base (ours, Hugging Face's folder, llama2.c's .bin) or, with --base, an adapter "
        "(ours, pyreft's, PEFT's)")
    add("dst", metavar="TO", help="a new file or folder")
    add("--to", choices=("minireft", "huggingface", "pyreft", "peft"), default="minireft", metavar="FORM",
        help="minireft (default) or huggingface for a base; minireft, pyreft or peft for an adapter")
    add("--base", metavar="FOLDER", help="the base that the adapter is for")
    add("--positions", metavar="WHERE", help="of a pyreft folder, which does not say: fN+lM (default: f7+l7)")
    for command in (convert, merge):
        p[command].add_argument("--dtype", choices=("float32", "bfloat16", "float16"), metavar="NAME",
                                help="of a base's stored weights: float32 (default), bfloat16, float16")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args, args.options = parser.parse_known_args(argv)
    if args.options and args.run not in (bench, profile, analyse, reproduce):
        parser.error(f"unrecognized arguments: {' '.join(args.options)}")
    args.argv = argv
    try:
        with reader_may_leave():
            args.run(args)
        return 0
    except KeyboardInterrupt as stop:
        if os.environ.get("MINIREFT_DEBUG"):
            raise
        print(f"minireft: interrupted; {stop}" if str(stop) else "minireft: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("MINIREFT_DEBUG"):
            raise
        print(f"minireft: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
