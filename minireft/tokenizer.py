"""Text to token ids and back: a thin face over the `tokenizers` library.

Use:  tokenizer = Tokenizer.from_file("tokenizer.json"); tokenizer.encode("anna lives in oslo .")  # → ids
See:  `decode` gives the text back; a word that a word-level vocabulary does not have is named in a ValueError.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from . import files

SPECIAL = ("<pad>", "<eos>", "<unk>")       # the first ids of a word-level vocabulary of ours
# How published tokenizers name these tokens, asked in this order when no tokenizer_config.json stands beside the file.
USUAL = {"bos": ("<s>", "<|begin_of_text|>", "[CLS]", "<bos>"),
         "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
         "pad": ("<pad>", "[PAD]"),
         "mask": ("<mask>", "[MASK]", "<unk>")}                           # ours marks what is to be filled in as unknown


class Tokenizer:
    """Attributes: vocab_size, vocabulary (token → id), and bos_id, eos_id, pad_id, mask_id, each None where there is none."""

    def __init__(self, inner: tokenizers.Tokenizer, named: dict[str, str] | None = None):
        """inner: the library's tokenizer; named: {"bos": token, ...} for those that are known by name."""
        self.inner = inner
        self.vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocabulary.values()) + 1                # rows that an embedding needs, gaps included
        self._words = isinstance(inner.model, models.WordLevel)
        for role, usual in USUAL.items():
            tokens = [named[role]] if named and role in named else usual
            setattr(self, f"{role}_id", next((self.vocabulary[t] for t in tokens if t in self.vocabulary), None))

    @classmethod
    def from_words(cls, words: list[str]) -> Tokenizer:
        """A word-level tokenizer: lower case, punctuation apart from words, one id a word, no word twice."""
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
        if len(vocabulary) < len(SPECIAL) + len(words):
            twice = sorted({word for word in words if words.count(word) > 1 or word in SPECIAL})
            raise ValueError(f"the vocabulary names {', '.join(twice)} more than once: give each word one id")
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        return cls(inner)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Opens a tokenizer.json, ours or any of the Hugging Face kind, or the folder that holds one."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: expected a tokenizer.json or a folder that holds one")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:                                        # the library raises plain Exceptions
            raise ValueError(f"{path} is no tokenizer.json that `tokenizers` can read: {error}") from error
        beside = path.with_name("tokenizer_config.json")
        named = {}
        if beside.is_file():
            try:
                config = json.loads(beside.read_text(encoding="utf-8"))
                for role in USUAL:
                    if f"{role}_token" in config:                         # a string, an object with "content", or null
                        token = config[f"{role}_token"]
                        named[role] = token["content"] if isinstance(token, dict) else token
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{beside} cannot be read ({error!r}): fetch it again") from error
            for role, token in named.items():
                if token is not None and inner.token_to_id(token) is None:
                    raise ValueError(f"{beside} says that the {role}_token is {token!r}, which {path.name} does not have: fetch both again")
        return cls(inner, named)

    def encode(self, text: str) -> list[int]:
        """The ids of the text, without bos or eos. Raises ValueError for words that a word-level vocabulary lacks."""
        encoding = self.inner.encode(text, add_special_tokens=False)
        if self._words:
            unknown = self.vocabulary.get(self.inner.model.unk_token)
            missing = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets) if i == unknown]
            if missing:
                raise ValueError(f"{', '.join(map(repr, dict.fromkeys(missing)))} not in the vocabulary of "
                                 f"{self.vocab_size} words: this tokenizer knows whole words only, use others")
        return encoding.ids

    def decode(self, ids) -> str:
        """The text of the ids (a list or a 1-d tensor), special tokens left out."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json that `from_file`, and any program that uses `tokenizers`, can open; a tokenizer_config.json
        beside it names the special tokens."""
        names = {i: token for token, i in self.vocabulary.items()}
        roles = {f"{role}_token": names.get(getattr(self, f"{role}_id")) for role in USUAL}
        files.write_text(path, self.inner.to_str(pretty=True))
        files.write_text(Path(path).with_name("tokenizer_config.json"),
                         json.dumps({**roles, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
