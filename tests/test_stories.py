"""A real pretrained model, llama2.c's stories260K, read from its own files: what it writes, and its loss on real text.

Run:  pytest tests/test_stories.py                # skipped where the public data are absent
See:  the golden values that an independent implementation found in float32.
"""

import pytest
import torch

import minireft
from benchmarks import memorise
from benchmarks import stories as benchmark
from minireft import Example
from minireft.data import Encoded, collate
from minireft.evaluation import mean_log_likelihoods
from minireft.generation import generate_ids

WRITES = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
          "She wanted to play with it, but it was too high.")


@pytest.fixture(scope="module")
def stories(data_folder):
    path = data_folder / "stories260K" / "stories260K.bin"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return minireft.load(path)


def test_it_is_what_its_card_says(stories):
    model, tokenizer = stories
    assert sum(p.numel() for p in model.parameters()) == 260_032 and tokenizer.vocab_size == 512 and tokenizer.bos_id == 1


def test_it_writes_the_story_that_it_always_writes(stories):
    model, tokenizer = stories
    (ids,) = generate_ids(model, [[tokenizer.bos_id]], 80, eos=None)
    assert tokenizer.decode(ids).startswith(WRITES)


def test_its_end_of_text_is_kept_in_every_form(stories, tmp_path):
    """<s> ends its stories, which nobody could guess from the vocabulary: it has a </s> too."""
    model, tokenizer = stories
    minireft.save(model, tokenizer, tmp_path / "ours")
    minireft.formats.huggingface.save(model, tokenizer, tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = minireft.load(tmp_path / folder)[1]
        assert (again.bos_id, again.eos_id, again.pad_id, again.mask_id) == (1, 1, tokenizer.pad_id, tokenizer.mask_id)
        assert again.encode("Once upon a time") == tokenizer.encode("Once upon a time")


def test_its_loss_on_real_stories(stories, data_folder):
    """60,000 characters, each line encoded apart and followed by the newline token, in windows of 511 led by BOS."""
    model, tokenizer = stories
    text = (data_folder / "tinystories" / "valid.txt").read_text(encoding="utf-8")[:60_000]
    ids = [i for line in text.split("\n") for i in [*tokenizer.encode(line), 13]]
    windows = [Encoded([tokenizer.bos_id, *ids[first : first + 511]], 1) for first in range(0, len(ids), 511)]
    counts = torch.tensor([len(window.ids) - 1 for window in windows], dtype=torch.float64)
    loss = -(torch.tensor(mean_log_likelihoods(model, windows, 8), dtype=torch.float64) * counts).sum() / counts.sum()
    assert abs(loss - 1.5038) < 5e-5 and counts.sum() == 28_546


def test_reading_twice_is_reading_once(stories):
    """A cache, padding on the left and a batch change nothing for a real model either."""
    model, tokenizer = stories
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("Once upon a time", "The big dog ran to the park. He")]
    together = generate_ids(model, rows, 20, eos=None)
    assert together == [generate_ids(model, [row], 20, eos=None)[0] for row in rows]
    batch = collate([Encoded(row + new, len(row)) for row, new in zip(rows, together)])
    picked = model(batch.tokens, batch.mask).argmax(-1)
    for i, (row, new) in enumerate(zip(rows, together)):
        assert picked[i, len(row) - 1 : len(row) + 19].tolist() == new


# ---- the programs that tune it, and that let one edit remember (no data needed)

def test_where_somebody_begins_to_speak():
    story = 'One day Tom sat. He was sad.\nAnn came and said, "Hi, Tom!" They played. "Bye!" said Ann.'
    assert benchmark.spoken(story) == Example("One day Tom sat. He was sad.", 'Ann came and said, "Hi, Tom!"')
    for other in ("Tom sat. He was sad.", '"Hi!" said Tom. He sat.', "A. B. C. D. E. " + 'He said, "Hi."', 'Tom sat. He said, "I am sad. You are not."'):
        assert benchmark.spoken(other) is None


def test_what_is_remembered_ends_at_the_first_other_token(shipped_base):
    model, tokenizer = shipped_base
    prompt = tokenizer.encode("anna lives")
    (text,) = generate_ids(model, [prompt], 4, tokenizer.eos_id)
    reft = minireft.LoReFT(model, rank=1, layers=[4], positions="l1")     # the identity
    other = (text[2] + 1) % tokenizer.vocab_size
    for wanted, count in ((text, len(text)), (text[:2] + [other] + text[3:], 2), ([other] + text, 0), (text[:1], 1)):
        assert memorise.remembered(model, tokenizer, reft, prompt, wanted) == count


def test_one_edit_remembers_a_token_that_the_model_would_not_write(shipped_base):
    model, tokenizer = shipped_base
    prompt, text = tokenizer.encode("go ->"), tokenizer.encode("kitchen")
    found = memorise.longest(model, tokenizer, 4, prompt, text, steps=40, lengths=(1, 2))
    assert found["without an edit"] == 0 and found["longest"] == 1 and found["parameters"] == 2 * model.config.width + 1
