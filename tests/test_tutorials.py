"""The tutorials: every source runs, every name in its prose exists, every page is in step, every exercise tells right from wrong.

Use:  python -m pytest tests/test_tutorials.py
See:  a known wrong answer passing its check would be a check that teaches nothing.
"""

import importlib.util
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("tutorials_make", ROOT / "tutorials" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

CPU_SECONDS = 90
SOURCES = make.sources()
EXERCISES = {f"{source.name[:2]}.{i}": exercise for source in SOURCES for i, exercise in enumerate(make.exercises(source), 1)}
WRONG = {  # exercise → what people write first: why it is wrong → the answer
    "01.1": {
        "the recorder stays on": "kept = []\n"
                                 "site.edits.append(lambda op, c: lambda *x: kept.append(op(*x)) or kept[-1])\n"
                                 "model(tokens)\nreturn kept[0]",
        "what goes in, not what comes out": "kept = []\n"
                                            "site.edits.append(lambda op, c: lambda *x: kept.append(x[0]) or op(*x))\n"
                                            "model(tokens)\nsite.edits.clear()\nreturn kept[0]",
    },
    "01.2": {
        "silences the whole block": "site = model.blocks[layer].output\n"
                                    "site.edits.append(lambda op, c: lambda x: torch.zeros_like(op(x)))\n"
                                    "out = model(tokens)\nsite.edits.clear()\nreturn out",
        "silences the last token only": "def edit(op, c):\n    def edited(x):\n        y = op(x).clone()\n        y[:, -1] = 0\n"
                                        "        return y\n    return edited\nsite = model.blocks[layer].attention.output\n"
                                        "site.edits.append(edit)\nout = model(tokens)\nsite.edits.clear()\nreturn out",
        "always the first block": "site = model.blocks[0].attention.output\n"
                                  "site.edits.append(lambda op, c: lambda x: torch.zeros_like(op(x)))\n"
                                  "out = model(tokens)\nsite.edits.clear()\nreturn out",
    },
    "02.1": {
        "v is no unit vector": "return h - (h @ v)[:, None] * v",
        "subtracts v, whatever is there": "return h - v",
        "erases everything": "return 0 * h",
    },
    "02.2": {
        "pushes by the target": "return h + target * v / v.norm()",
        "measures along v, not its unit": "return h + (target - h @ v)[:, None] * v / v.norm()",
        "writes the target and drops the rest": "return (target * v / v.norm()).expand_as(h)",
    },
    "03.1": {
        "forgets what is read along R": "return W, R, b",
        "writes along W": "return W - R, W, b",
        "the sign": "return R - W, R, -b",
    },
    "03.2": {
        "the other way round": "return s + (h @ R.T - s @ R.T) @ R",
        "adds without taking away": "return h + s @ R.T @ R",
        "the whole state": "return s",
    },
    "04.1": {
        "some twice": "return list(range(min(first, n))), list(range(max(0, n - last), n))",
        "both halves rounded down": "if first + last <= n:\n    return list(range(first)), list(range(n - last, n))\n"
                                    "return list(range(min(first, n // 2))), list(range(n - min(last, n // 2), n))",
        "the prefix takes all it wants": "p = min(first, n)\ns = min(last, n - p)\nreturn list(range(p)), list(range(n - s, n))",
        "what the suffix leaves is lost": "p = min(first, n // 2)\ns = min(last, n - p)\nreturn list(range(p)), list(range(n - s, n))",
    },
    "04.2": {
        "deviations, not variances": "every = runs.std(correction=0)\n"
                                     "return runs.mean((1, 2)).std(correction=0) / every, runs.mean((0, 2)).std(correction=0) / every",
        "ranks and seeds not averaged away": "every = runs.var(correction=0)\n"
                                             "return runs.var(0, correction=0).mean() / every, runs.var(1, correction=0).mean() / every",
        "the one for the other": "every = runs.var(correction=0)\n"
                                 "return runs.mean((0, 2)).var(correction=0) / every, runs.mean((1, 2)).var(correction=0) / every",
        "within places": "every = runs.var(correction=0)\n"
                         "return runs.var((1, 2), correction=0).mean() / every, runs.var((0, 2), correction=0).mean() / every",
    },
    "05.1": {
        "from above": "L = torch.linalg.cholesky(M @ M.T)\nreturn torch.linalg.solve_triangular(L, M, upper=False)",
        "turned around before, not after": "M = M.flip(0)\nL = torch.linalg.cholesky(M @ M.T)\n"
                                           "return torch.linalg.solve_triangular(L, M, upper=False)",
        "lengths, not angles": "return M / M.norm(dim=1, keepdim=True)",
        "orthonormal, but nobody's rows": "return torch.linalg.svd(M, full_matrices=False).Vh",
    },
    "05.2": {
        "the other diagonal": "v = x + y\nreturn torch.eye(len(x)) - 2 * torch.outer(v, v) / (v @ v)",
        "flattens, mirrors not": "v = x - y\nreturn torch.eye(len(x)) - torch.outer(v, v) / (v @ v)",
        "v is no unit vector": "v = x - y\nreturn torch.eye(len(x)) - 2 * torch.outer(v, v)",
        "moves everything else as well": "v = x + y\nreturn 2 * torch.outer(v, v) / (v @ v) - torch.eye(len(x))",
    },
    "06.1": {
        "forgets the bias": "return l[:, None] * weight, bias",
        "scales the columns": "return (l * weight if weight.shape[0] == weight.shape[1] else l[:, None] * weight), l * bias",
        "divides": "return weight / l[:, None], bias / l",
    },
    "06.2": {
        "the mean": "return (1 - s) * a + s * b",
        "the wrong way round": "return (a.log() * s + b.log() * (1 - s)).exp()",
        "multiplies both": "return (a.log() + b.log()).exp() ** s",
    },
    "07.1": {
        "infinite where p rounds to 1": "return -torch.log(1 - logits.softmax(0)[token])",
        "never above 4.6": "return -torch.log(1 - logits.softmax(0)[token] + 0.01)",
        "cut off, and its gradient with it": "return -torch.log((1 - logits.softmax(0)[token]).clamp(min=1e-6))",
        "the likelihood": "return logits.logsumexp(0) - logits[token]",
    },
    "07.2": {
        "padding counts as tokens": "return -(log_p * mask).mean(1).log_softmax(0)[right]",
        "padding counts in the sum": "return -(log_p.sum(1) / mask.sum(1)).log_softmax(0)[right]",
        "not divided by length": "return -(log_p * mask).sum(1).log_softmax(0)[right]",
        "the likelihood, whatever the others": "return -((log_p * mask).sum(1) / mask.sum(1))[right]",
    },
    "08.1": {
        "the padded length": "return alpha / (eps.shape[1] * eps.shape[2]) ** 0.5 * eps * mask[:, :, None]",
        "noise on padding": "return alpha / (mask.sum(1)[:, None, None] * eps.shape[2]) ** 0.5 * eps",
        "one length for the batch": "return alpha / (mask.sum(1).float().mean() * eps.shape[2]) ** 0.5 * eps * mask[:, :, None]",
        "forgets the width": "return alpha / mask.sum(1)[:, None, None] ** 0.5 * eps * mask[:, :, None]",
    },
    "08.2": {
        "the whole row's": "return (documents > 0).sum(1, keepdim=True) * (documents > 0)",
        "numbers of all rows together": "return torch.bincount(documents.flatten())[documents] * (documents > 0)",
        "padding is a document, too": "return (documents[:, :, None] == documents[:, None, :]).sum(2)",
    },
    "09.1": {
        "the last row again": "r = max(len(b) for _, _, b in edits)\nfill = lambda w: torch.cat((w, w[-1:].repeat_interleave(r - len(w), 0)))\n"
                              "return tuple(torch.stack([fill(e[i]) for e in edits]) for i in range(3))",
        "cut to the smallest": "r = min(len(b) for _, _, b in edits)\n"
                               "return tuple(torch.stack([e[i][:r] for e in edits]) for i in range(3))",
        "ones": "r = max(len(b) for _, _, b in edits)\nfill = lambda w: torch.cat((w, w.new_ones(r - len(w), *w.shape[1:])))\n"
                "return tuple(torch.stack([fill(e[i]) for e in edits]) for i in range(3))",
    },
    "09.2": {
        "−1 is the last": "return x * l[tasks][:, None]",
        "none is the first": "return x * l[tasks.clamp(min=0)][:, None]",
        "by token": "own = torch.where(tasks[:, None] < 0, 1.0, l[tasks.clamp(min=0)])\nreturn x * own",
        "none is zero": "return x * (l[tasks.clamp(min=0)] * (tasks >= 0)[:, None])[:, None]",
    },
    "10.1": {
        "the means themselves": "return torch.linalg.qr(means.T).Q.T",
        "all but one of the means": "return torch.linalg.qr(means[1:].T).Q.T",
        "not orthonormal": "return means[1:] - means[:1]",
        "differences that go round": "return torch.linalg.qr((means - means.roll(1, 0)).T).Q.T",
    },
    "10.2": {
        "all pairs count": "return (said == third).float().mean().item()",
        "divided by all pairs": "return ((said == third) & (third != base) & (third != source)).float().mean().item()",
        "looks at the base only": "return (said == third)[third != base].float().mean().item()",
        "looks at the source only": "return (said == third)[third != source].float().mean().item()",
    },
    "11.1": {
        "forgets the sum over rows": "return g * l, g * x",
        "a mean": "return g * l, (g * x).mean(0)",
        "dx takes x": "return g * x, (g * x).sum(0)",
        "sums over channels": "return g * l, (g * x).sum(1)",
    },
    "11.2": {
        "what comes from outside twice is forgotten": "return sum(sum(step) for step in chain), 2",
        "writes everything": "return sum(sum(step) for step in chain), sum(o + w for _, o, w in chain)",
        "readings only": "return sum(i + o for i, o, _ in chain), sum(o for _, o, _ in chain)",
    },
    "12.1": {
        "first bytes only": "return len({address // 32 for address in addresses})",
        "bytes over 32": "return -(-len(addresses) * size // 32)",
        "a sector a thread": "return len(addresses)",
    },
    "12.2": {
        "no barrier": "return 'SHARED(float, s, 64); store(s + threadIdx.x, load(p.h + threadIdx.x)); float sum = 0; "
                      "for (int j = 0; j < 64; j++) sum += load(s + j); store(p.out + threadIdx.x, sum);'",
        "everybody reads memory": "return 'float sum = 0; for (int j = 0; j < 64; j++) sum += load(p.h + j); "
                                  "store(p.out + threadIdx.x, sum);'",
        "one warp only": "return 'SHARED(float, s, 64); store(s + threadIdx.x, load(p.h + threadIdx.x)); __syncthreads(); "
                         "float sum = 0; for (int j = 0; j < 32; j++) sum += load(s + j); store(p.out + threadIdx.x, sum);'",
    },
    "13.1": {
        "the weights once": "return 3 * N * C // 8 + 2 * r * C // 8",
        "rows read once": "return 2 * N * C // 8 + 2 * r * C // 8 * (N // R)",
        "the weights for every row": "return 3 * N * C // 8 + 2 * r * C // 8 * N",
    },
    "13.2": {
        "forgets the tail": "return 'for (int64_t c = lane; c + 32 <= p.C; c += 32) store(p.out + n * p.C + c, load(p.h + n * p.C + c));'",
        "every lane copies all": "return 'for (int64_t c = 0; c < p.C; c++) store(p.out + n * p.C + c, load(p.h + n * p.C + c));'",
        "a stretch for each lane": "return 'for (int64_t k = (p.C + 31) / 32, c = lane * k; c < (lane + 1) * k && c < p.C; c++) "
                                   "store(p.out + n * p.C + c, load(p.h + n * p.C + c));'",
    },
    "14.1": {
        "as it is": "return weight",
        "the other way round": "rows, C = weight.shape\n"
                               "return weight.view(heads, 2, rows // heads // 2, C).transpose(1, 2).reshape(rows, C)",
        "over all heads at once": "rows, C = weight.shape\nreturn weight.view(rows // 2, 2, C).transpose(0, 1).reshape(rows, C)",
    },
    "14.2": {
        "the first": "import re\nfound = re.findall(r'-?\\d+(?:\\.\\d+)?', text.replace(',', ''))\nreturn float(found[0]) if found else None",
        "commas part numbers": "import re\nfound = re.findall(r'-?\\d+(?:\\.\\d+)?', text)\nreturn float(found[-1]) if found else None",
        "no sign": "import re\nfound = re.findall(r'\\d+(?:\\.\\d+)?', text.replace(',', ''))\nreturn float(found[-1]) if found else None",
        "there is always one": "import re\nfound = re.findall(r'-?\\d+(?:\\.\\d+)?', text.replace(',', ''))\nreturn float(found[-1]) if found else 0.0",
    },
}


def run(exercise, cell):
    exec(compile("\n\n".join((exercise["setup"], cell, exercise["check"])), "exercise", "exec"), {})


# ---- sources

@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_source_runs_within_its_time(source):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
                   "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", str(source)], cwd=source.parent,
                          env=environment, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_form_of_a_source(source):
    """A question, predictions, short cells that show something, one picture, two changes, three lines."""
    make.head(source)
    cells = make.cells(source)
    prose = "\n\n".join(text for kind, text in cells if kind == "markdown")
    code = [text for kind, text in cells if kind == "code"]
    assert prose.count("**Predict:**") >= 5
    assert len(re.findall(r"^- ", prose.split("## Two changes to try")[1].split("\n## ")[0], re.M)) == 2
    assert len(re.findall(r"^\d\. ", prose.split("## In three lines")[1], re.M)) == 3
    assert sum("plt.show()" in text for text in code) == sum("# Picture: " in text for text in code) == 1
    for text in code:
        solved = make.SOLUTION.search(text + "\n")
        assert solved or sum(not re.fullmatch(r" *(#.*)?", line) for line in text.splitlines()) <= 12, f"a long cell:\n{text}"
        assert solved or re.search(r"^ *(print|assert)\b|plt\.show\(\)$", text, re.M), f"a cell that shows nothing:\n{text}"
    lines = source.read_text().splitlines()
    assert not [line for line in lines if len(line) > 120]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_names_of_the_library_in_the_prose_exist(source):
    prose = "\n\n".join(text for kind, text in make.cells(source) if kind == "markdown")
    names = make.NAME.findall(prose)
    assert names
    for name in names:
        make.resolve(name)
    for path in re.findall(r"\]\((\S+?)\)", make.linked(prose)):
        assert (make.RENDERED / path).exists()


def test_a_name_that_is_gone_is_noticed():
    for name in ("minireft.model.Nothing", "minireft.no_module", "minireft.LoReFT.no_method"):
        with pytest.raises((AttributeError, ImportError)):
            make.resolve(name)


# ---- pages

def test_pages_exercises_and_index_are_in_step():
    assert make.stale() == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_pages_show_one_picture_and_no_wall_of_output(source):
    text = (make.RENDERED / f"{source.stem}.md").read_text()
    assert re.findall(r"!\[.+?\]\((\S+)\)", text) == [f"{source.stem}.png"]
    assert (make.RENDERED / f"{source.stem}.png").read_bytes().startswith(b"\x89PNG")
    for output in re.findall(r"```text\n(.*?)```", text, re.S):
        assert len(output.splitlines()) <= 16 and max(map(len, output.splitlines())) <= 130, output


def test_what_changed_is_stale(monkeypatch, tmp_path):
    source = tmp_path / "01_a.py"
    source.write_text("one")
    before = make.stamp(source)
    source.write_text("two")
    assert make.stamp(source) != before
    monkeypatch.setattr(make, "RENDERED", tmp_path / "empty")
    assert all(any(f"rendered/{source.stem}.md" in line for line in make.stale()) for source in SOURCES)


# ---- exercises

def test_every_exercise_has_wrong_answers():
    assert EXERCISES.keys() == WRONG.keys() and all(len(answers) >= 2 for answers in WRONG.values())


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes_and_the_blank_fails(name):
    exercise = EXERCISES[name]
    assert re.search(r"^### \d · .+ \(\d+ minutes\)$", exercise["text"], re.M) and "*Hint:*" in exercise["text"]
    run(exercise, exercise["cell"])
    blank = make.blank(exercise["cell"])
    assert make.BLANK in blank and "# solution" not in blank
    with pytest.raises(NotImplementedError):
        run(exercise, blank)


@pytest.mark.parametrize("name, why", [(name, why) for name, answers in WRONG.items() for why in answers])
def test_wrong_answers_fail_their_check(name, why):
    exercise = EXERCISES[name]
    with pytest.raises(AssertionError):
        run(exercise, make.answered(exercise["cell"], WRONG[name][why]))
