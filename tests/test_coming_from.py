"""The page for those who come from other libraries: its Python runs from top to bottom, the names in its tables exist.

Run:  pytest tests/test_coming_from.py
See:  a snippet that has rotted shows Python's own message.
"""

import os
import re
import subprocess
import sys

import minireft

from conftest import ROOT

TEXT = (ROOT / "tutorials" / "coming_from.md").read_text()


def test_its_python_runs_from_top_to_bottom(shipped_base, tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S))
    assert code.count("minireft.train(") >= 5
    check = """
import torch
tokens = minireft.data.collate([minireft.data.encode(tokenizer, examples[0], 96)]).tokens
assert not model.adapters and not torch.equal(logits, model(tokens)) and minireft.load_adapter(model, "for-peft").num_parameters()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code + check], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "for-pyreft" / "config.json").is_file() and (tmp_path / "for-peft" / "adapter_config.json").is_file()


def test_what_its_tables_call_exists():
    columns = [row.split(" | ")[-1] for row in re.findall(r"^\| .* \|$", TEXT, re.M)]
    names = re.findall(r"minireft\.(\w+)", " ".join(columns))
    assert len(set(names)) >= 10 and all(hasattr(minireft, name) for name in names)
    for name in re.findall(r"`(\w+ReFT)`", " ".join(columns)):
        assert hasattr(minireft, name)
