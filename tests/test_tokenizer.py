"""The tokenizer: text to ids and back, no silent unknown word, and other people's files.

Run:  pytest tests/test_tokenizer.py
See:  unknown words named, and a byte-pair file of the Hugging Face kind opened like ours.
"""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from minireft.tasks.world import VOCABULARY
from minireft.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_words(VOCABULARY)


@given(st.lists(st.sampled_from([word for word in VOCABULARY if word.isalnum()])))
def test_words_come_back(words):
    text = " ".join(words)
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(words) and TOKENIZER.decode(ids) == text


def test_natural_writing_is_read_as_the_corpus_writes_it():
    assert TOKENIZER.encode("Where does Anna live?") == TOKENIZER.encode("where does anna live ?")
    assert TOKENIZER.decode(TOKENIZER.encode("3 + 4 = 7 ; dog -> cat .")) == "3 + 4 = 7 ; dog -> cat ."
    assert TOKENIZER.encode("") == []


def test_every_word_is_one_id_and_the_special_tokens_are_known():
    assert TOKENIZER.vocab_size == len(VOCABULARY) + 3
    assert [len(TOKENIZER.encode(word)) for word in VOCABULARY] == [1] * len(VOCABULARY)
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.bos_id) == (0, 1, None)
    assert TOKENIZER.encode("anna <eos>")[-1] == TOKENIZER.eos_id
    assert TOKENIZER.decode([*TOKENIZER.encode("anna"), 1, 0, 0]) == "anna"


def test_unknown_words_are_named_each_once():
    with pytest.raises(ValueError, match="'wizard', 'Hexe' not in the vocabulary of"):
        TOKENIZER.encode("anna is a wizard and a Hexe , a wizard")
    with pytest.raises(ValueError, match="<unk>"):
        TOKENIZER.encode("anna <unk>")


def test_save_and_open(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = Tokenizer.from_file(path)
        assert again.vocabulary == TOKENIZER.vocabulary and again.eos_id == TOKENIZER.eos_id
        with pytest.raises(ValueError, match="'wizard'"):
            again.encode("wizard")


def test_special_tokens_travel_with_the_file_and_must_be_in_it(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "<end>": 1, "a": 2}, unk_token="</s>"))
    Tokenizer(inner, {"eos": "<end>", "bos": None}).save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(tmp_path).eos_id == 1 and Tokenizer(inner).eos_id == 0
    for text, words in (('{"eos_token": "<stop>"}', "eos_token is '<stop>', which tokenizer.json does not have"), ("{", "cannot be read"),
                        ('{"eos_token": {"text": "a"}}', "cannot be read")):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            Tokenizer.from_file(tmp_path)


def test_words_given_twice_are_refused():
    with pytest.raises(ValueError, match="dog.* more than once"):
        Tokenizer.from_words(["dog", "cat", "dog"])


def test_files_that_are_missing_or_no_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3')
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        Tokenizer.from_file(tmp_path)


def byte_pairs(folder, special):
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(["some text to learn pairs from"], trainer)
    inner.save(str(folder / "tokenizer.json"))


def test_a_published_kind_of_file_opens_and_loses_nothing(tmp_path):
    byte_pairs(tmp_path, ["<|endoftext|>"])
    tokenizer = Tokenizer.from_file(tmp_path)
    text = "Any text, even ünknown words — and\nlines."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 0, None)


def test_the_configuration_beside_the_file_names_the_special_tokens(tmp_path):
    byte_pairs(tmp_path, ["<|start|>", "<|stop|>", "<|endoftext|>"])
    config = {"bos_token": {"content": "<|start|>"}, "eos_token": "<|stop|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
