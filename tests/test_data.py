"""Examples into batches: what is prompt, what is answer, what is padding; and the losses that read them.

Run:  pytest tests/test_data.py
See:  every token of a completion and its end predicted once, nothing else.
"""

import json

import pytest
import small
import torch

from minireft import Example, Tokenizer, data, read_examples
from minireft.data import Encoded, collate, encode, encode_prompt
from minireft.losses import cross_entropy, token_losses

TOKENIZER = Tokenizer.from_words(small.WORDS)


def test_prompt_and_completion_are_encoded_apart_and_joined():
    row = encode(TOKENIZER, Example("w0 w1 w2", "w3 w4", task="a"), 24)
    assert row == Encoded([3, 4, 5, 6, 7, TOKENIZER.eos_id], 3, "a")


def test_a_beginning_of_text_leads_the_prompt_where_there_is_one():
    class Led:
        bos_id, eos_id = 1, None

        def encode(self, text):
            return [len(word) + 10 for word in text.split()]
    assert encode(Led(), Example("a bb", "ccc"), 24) == Encoded([1, 11, 12, 13], 3)


def test_lengths_up_to_the_context_fit():
    words = "w0 " * 20
    assert len(encode(TOKENIZER, Example(words, "w1 w2 w3"), 24).ids) == 24 and len(encode_prompt(TOKENIZER, words, 20)) == 20
    for call in (lambda: encode(TOKENIZER, Example(words, "w1 w2 w3 w4"), 24), lambda: encode_prompt(TOKENIZER, words, 19)):
        with pytest.raises(ValueError, match="(25|20) tokens does not fit the context of (24|19)"):
            call()


def test_collate_marks_prompt_answer_and_padding():
    batch = collate([Encoded([5, 6, 7, 8], 1), Encoded([9, 10], 1), Encoded([11, 12, 13], 2)], pad=2)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 10, 2, 2], [11, 12, 13, 2]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.answer.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert batch.prompt_lengths.tolist() == [1, 1, 2] and batch.tokens.dtype == torch.int64 and batch.mask.dtype == torch.bool


def test_losses_against_a_loop():
    rows = [Encoded([5, 6, 7, 8], 1), Encoded([9, 10], 1), Encoded([11, 12, 13], 2)]
    batch, generator = collate(rows), torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, small.V, generator=generator).bfloat16()
    terms = [-logits[b, t - 1].double().log_softmax(-1)[row.ids[t]] for b, row in enumerate(rows) for t in range(row.prompt_length, len(row.ids))]
    assert len(terms) == 5
    assert cross_entropy(logits, batch.tokens, batch.answer).item() == pytest.approx(sum(terms).item() / 5, rel=1e-5)
    assert cross_entropy(logits, batch.tokens, batch.answer, 20).item() == pytest.approx(sum(terms).item() / 20, rel=1e-5)
    each = token_losses(logits, batch.tokens)
    assert each.shape == (3, 3) and each.dtype == torch.float32
    assert each[0, 1].item() == pytest.approx(-logits[0, 1].double().log_softmax(-1)[7].item(), rel=1e-5)


def test_examples_from_a_file(tmp_path):
    path = tmp_path / "e.jsonl"
    lines = [{"prompt": "w1", "completion": "w2"}, {"prompt": "w3 ä", "completion": "w4", "choices": ["w4", "w5"]}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_examples(path) == [Example("w1", "w2", id=0), Example("w3 ä", "w4", ("w4", "w5"), id=1)]


@pytest.mark.parametrize("line", ["{", "3", '{"prompt": "a"}', '{"prompt": " ", "completion": "b"}', '{"prompt": "a", "completion": 3}',
                                  '{"prompt": "a", "completion": "b", "choices": ["c"]}', '{"prompt": "a", "completion": "b", "choices": "b"}'])
def test_a_malformed_row_is_named(tmp_path, line):
    path = tmp_path / "e.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match="e.jsonl, line 2"):
        read_examples(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_examples(tmp_path / "e.jsonl")


def test_buckets_hold_like_lengths_and_every_example_as_often():
    lengths = [3 + (7 * i) % 19 for i in range(24)]
    steps = [data.batch_at(step, lengths, 5, 4, bucket=3) for step in range(12)]
    stream = data.order(24, 5, 0, 48)
    for first in range(0, 12, 3):                                         # three steps share what came to them, sorted and dealt out
        assert sorted(sum(steps[first : first + 3], [])) == sorted(stream[first * 4 : first * 4 + 12])
        spans = sorted((min(lengths[i] for i in step), max(lengths[i] for i in step)) for step in steps[first : first + 3])
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert all(sorted(sum(steps[first : first + 6], [])) == list(range(24)) for first in (0, 6))          # two whole passes
    assert [data.batch_at(step, lengths, 5, 4) for step in range(12)] == [stream[i : i + 4] for i in range(0, 48, 4)]
    by_size = [[sum(lengths[i] for i in step) for step in steps[first : first + 3]] for first in range(0, 12, 3)]
    assert any(sizes != sorted(sizes) for sizes in by_size)               # the short ones do not always come first
    assert data.batch_at(0, lengths[:5], 5, 4, bucket=9) == data.order(5, 5, 0, 4)          # no more than one pass is sorted
