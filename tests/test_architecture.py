"""The house rules: who may import whom, what stays out of which file, and how long a file may be.

Run:  pytest tests/test_architecture.py -s          # prints the lines of every file beside its budget
See:  imports follow the flow tokens → model (sites) → loss, and csrc → ops → adapters → train, generate, evaluate → commands.
"""

import ast
import re
from pathlib import Path

import minireft

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minireft"
# Module → the modules of minireft that it may import. A new module finds its place here first.
ARROWS = {
    "files": "", "reference": "", "positions": "", "losses": "data", "config": "", "cache": "", "geometry": "config", "model": "cache config geometry", "data": "", "tokenizer": "files",
    "ops": "reference",
    "formats": "config data files model tokenizer",
    "adapters": "files formats ops positions",
    "checkpoint": "files formats model tokenizer",
    "generation": "data model",
    "evaluation": "adapters data formats generation losses model",
    "memory": "adapters data losses model",
    "runs": "adapters files",
    "training": "adapters data losses memory model runs",
    "reading": "adapters",
    "recipes": "adapters training",
    "tasks": "data evaluation",
    "formats.convert": "adapters checkpoint formats", "formats.overview": "adapters checkpoint files formats model",
    "pretraining": "checkpoint data files model tasks tokenizer",
}
COMMANDS = {"__init__", "__main__", "cli", "demo", "doctor", "dry_run"}            # these stand on top of everything
METHODS = re.compile(r"reft|\bia3|\(ia\)|lora|neftune|noise|steering|low.rank", re.IGNORECASE)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts) if ".".join(parts) in ARROWS else parts[0]


def imported(path: Path) -> set[str]:
    """The modules of minireft that a file imports, at its top or inside a function; packages by their first name."""
    here, found = ("minireft", *path.relative_to(PACKAGE).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [base if len(base) > 1 else [*base, alias.name] for alias in node.names]
        for target in targets:
            if target[0] == "minireft" and len(target) > 1:
                found.add(".".join(target[1:3]) if ".".join(target[1:3]) in ARROWS else target[1])
    return found


def test_imports_follow_the_arrows():
    wrong, seen = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_of(path)
        seen.add(module)
        if module in COMMANDS:
            continue
        assert module in ARROWS, f"{path.relative_to(ROOT)} has no place among the arrows of this test: give it one"
        beyond = imported(path) - {module} - set(ARROWS[module].split())
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(beyond)]
    assert not wrong, wrong
    assert seen >= {"model", "adapters", "ops", "training"} and imported(PACKAGE / "training.py") >= {"runs", "model", "adapters"}


def test_the_arrows_have_no_circle():
    done = set()
    while len(done) < len(ARROWS):
        free = {name for name, targets in ARROWS.items() if name not in done and set(targets.split()) <= done}
        assert free, f"a circle among {sorted(ARROWS.keys() - done)}"
        done |= free


def test_the_model_names_no_method_and_uses_no_hooks():
    found = [line for line in (PACKAGE / "model.py").read_text().splitlines() if METHODS.search(line)]
    assert not found, found
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"register_\w*forward\w*_hook", path.read_text()), f"{path.name}: a hook is ignored once a model is compiled"


def test_torch_stays_out_of_the_kernel_files():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    sees = {path.name for path in sources if re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text())}
    assert len(sources) > 8 and sees == {"bindings.cpp"}


def test_public_names():
    names = """load LoReFT DiReFT NoReFT ConsReFT LobiReFT IA3 LoRA NEFTune Bank train TrainConfig generate evaluate load_adapter
               reference ops Example Model ModelConfig Cache Tokenizer""".split()
    assert set(names) <= set(minireft.__all__) and all(hasattr(minireft, name) for name in minireft.__all__)


def test_every_file_begins_by_saying_what_it_is():
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        assert not source or ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no head"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_line_budgets():
    """Budgets keep the product readable in an evening: raise one only with a reason."""
    budget = {"minireft/model.py": 400, "minireft/adapters/base.py": 200, "minireft/adapters/bank.py": 170}
    for path in (PACKAGE / "adapters").rglob("*.py"):
        budget.setdefault(str(path.relative_to(ROOT)), 150)
    for folder in ("cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).iterdir():
            budget[str(path.relative_to(ROOT))] = 300
    counts = {name: lines(ROOT / name) for name in budget}
    for name, most in sorted(budget.items()):
        print(f"{counts[name]:5d} of {most:4d}  {name}")
    own = [path for path in PACKAGE.rglob("*.py") if not {"formats", "tasks", "more"} & set(path.relative_to(PACKAGE).parts[:-1])]
    commands = [path for path in own if path.stem in {*COMMANDS, "pretraining", "recipes"} and path.parent == PACKAGE]
    kernels = [PACKAGE / "ops.py", PACKAGE / "reference.py"]
    # 1,180 since a dry run says what fits; 1,100 since the papers' recipes became a module of their own, and merge and inspect are commands
    # 3,060 since a base's special tokens and weights are read with all checks, one tensor at a time; 3,510 since runs survive
    # what may happen to them (runs.py, files.py) and say how much memory they will take (memory.py)
    parts = {"model, adapters, training, ...": 3510, "the kernels' Python half": 800, "commands and pre-training": 1180}
    sizes = {"the kernels' Python half": sum(map(lines, kernels)), "commands and pre-training": sum(map(lines, commands))}
    sizes["model, adapters, training, ..."] = sum(map(lines, own)) - sum(sizes.values())
    for name, most in parts.items():
        print(f"{sizes[name]:5d} of {most:4d}  {name}")
    over = [name for name in budget if counts[name] > budget[name]] + [name for name in parts if sizes[name] > parts[name]]
    assert not over, over
