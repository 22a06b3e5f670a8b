"""What all tests share: one thread, drawn examples that are the same on every run, and bases to test with.

Use:  def test_something(shipped_base): model, tokenizer = shipped_base
See:  a test that needs what is not here is skipped, with the reason in a line.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import minireft

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)                # the models here are small; a thread for each core only gets in the way
settings.register_profile("minireft", deadline=None, derandomize=True)
settings.load_profile("minireft")


@pytest.fixture
def shipped_base():
    """(model, tokenizer) of the base in minireft/assets, loaded afresh."""
    if not (ROOT / "minireft/assets/config.json").is_file():
        pytest.skip("no base is shipped in minireft/assets yet")
    return minireft.load("base")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """The folder of an untrained base of 0.05 M parameters that knows the words of the tasks."""
    from minireft.tasks.world import VOCABULARY
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tokenizer = minireft.Tokenizer.from_words(VOCABULARY)
    torch.manual_seed(0)
    config = minireft.ModelConfig(tokenizer.vocab_size, width=32, layers=2, heads=2, hidden=48, context=96)
    model = minireft.Model(config)
    minireft.save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Public data sets and models that are not part of the repository: MINIREFT_DATA, or ../shared/data."""
    folder = Path(os.environ.get("MINIREFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder} of public data; set MINIREFT_DATA to one")
    return folder
