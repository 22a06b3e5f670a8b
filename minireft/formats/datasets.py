"""Data as the papers' repositories store it: a table of named formats, each with its prompts, its answers and its metric.

Use:  examples = read_examples("boolq/test.json")           # the format is recognised, or named: format="commonsense"
See:  examples with the prompts that the methods' authors use; a malformed row is an error that names file and line.

Prompts are those of pyreft's examples/loreft (commonsense, math, alpaca, gsm8k) and of promptsource (T-Few's tasks, SST-2, TREC);
answers are found in what a model writes as LLM-Adapters' evaluation does. Of the templates those are here that suit every row of their
task and give each label a name of its own.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..data import Example

INSTRUCTION = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
               "### Instruction:\n{instruction}\n\n### Response:\n")
WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
              "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
STEP_BY_STEP = "{question}\nAnswer the above question. First think step by step and then answer the final number.\n"
# A template and what its labels 0, 1, ... are called in it.
RTE = (('Given that {premise} Does it follow that "{hypothesis}"?', "Yes", "No"),
       ("Sentence 1: {premise}\nSentence 2: {hypothesis}\nQuestion: Does Sentence 1 entail Sentence 2? Yes or no?", "Yes", "No"),
       ('{premise} Therefore, we are licensed to say that "{hypothesis}", right?', "Yes", "No"),
       ("{premise}\nQuestion: {hypothesis} True or False?", "True", "False"),
       ("Suppose {premise} Can we infer that {hypothesis}?", "Yes", "No"),
       ('{premise} Does the previous passage support the claim that "{hypothesis}"?', "Yes", "No"),
       ("{premise} Based on the previous passage, is it true that {hypothesis}?", "Yes", "No"))
CB = (("Given that {premise} Does it follow that {hypothesis}? Yes, no, or maybe?", "Yes", "No", "Maybe"),
      ("Sentence 1: {premise}\nSentence 2: {hypothesis}\nQuestion: Does Sentence 1 entail Sentence 2? Yes, No, or Neutral?",
       "Yes", "No", "Neutral"),
      ("{premise} Based on the previous passage, is it true that {hypothesis} Yes, no, or maybe?", "Yes", "No", "Maybe"),
      ("{premise}\nQuestion: {hypothesis}. True, False, or Neither?", "True", "False", "Neither"))
COPA = ('"{choice1}" or "{choice2}"? {premise} {link}',
        "{premise}\n\nI am hesitating between two options. Help me choose the more likely {question}: \n- {choice1}\n- {choice2}",
        "Exercise: choose the most plausible alternative.\n\n{premise} {link}...\n- {choice1}\n- {choice2}")
SST2 = (('{sentence}\nQuestion: Was that sentence positive or negative? Answer:', "negative", "positive"),
        ('I\'m reading a review that says "{sentence}" Do you think the review is positive or negative?', "negative", "positive"),
        ('Someone just said to me "{sentence}" Do you think they are sad or happy?', "sad", "happy"),
        ("Does the following sentence have a positive or negative sentiment?\n{sentence}", "negative", "positive"))
QUESTIONS = {                           # TREC's coarse label → what promptsource calls it, and its fine labels
    "DESC": ("Description", "def desc manner reason"),
    "ENTY": ("Entity", "animal body color cremat currency dismed event food instru lang letter other plant product religion sport "
                       "substance symbol techmeth termeq veh word"),
    "ABBR": ("Abbreviation", "abb exp"), "HUM": ("Person", "desc gr ind title"),
    "NUM": ("Quantity", "code count date dist money ord other perc period speed temp volsize weight"),
    "LOC": ("Location", "city country mount other state")}
KINDS = tuple(name for name, _ in QUESTIONS.values())
TREC = tuple((text.replace("{kinds}", ", ".join(KINDS)), *KINDS) for text in (
    "Question: {sentence}\n\nDescriptors: {kinds}\n\nBest Descriptor?", "{sentence}\n\nIs this asking about {kinds}?",
    "Categories: {kinds}\n\nWhat category best describes: {sentence} \nAnswer:"))


# ------------------------------------------------------------------------------------------------- a row → its examples

def text(row: dict, name: str, empty: bool = False) -> str:
    """The text that a row must have under this name."""
    value = row.get(name)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"{name!r} is {value!r}: a text is expected there")
    return value


def plain(row: dict) -> list[Example]:
    choices, completion = row.get("choices", []), text(row, "completion")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or choices and completion not in choices:
        raise ValueError(f"'choices' is {choices!r}: a list of texts, the completion among them, is expected there")
    return [Example(text(row, "prompt"), completion, tuple(choices))]


def commonsense(row: dict) -> list[Example]:
    """The choices are what the instruction says last: "Answer format: true/false"."""
    instruction, answer = text(row, "instruction"), text(row, "answer").strip()
    choices = instruction.rpartition("Answer format:")[2].strip().split("/")
    if answer not in choices or len(choices) < 2:
        raise ValueError(f"the answer {answer!r} is unknown to this question: expected one of {choices}, from its 'Answer format:'")
    says = "the correct answer is {}".format
    return [Example(f"{instruction}\n", says(answer), tuple(map(says, choices)), answer=answer)]


def math(row: dict) -> list[Example]:
    answer = str(row.get("answer")).strip()
    if number(answer) is None and not re.fullmatch("[A-E]", answer):
        raise ValueError(f"'answer' is {row.get('answer')!r}: a number, or a letter from A to E, is expected there")
    return [Example(INSTRUCTION.format(instruction=text(row, "instruction")), text(row, "output").strip(), answer=answer)]


def alpaca(row: dict) -> list[Example]:
    given = text(row, "input", empty=True) if "input" in row else ""
    template = WITH_INPUT if given.strip() else INSTRUCTION
    return [Example(template.format(instruction=text(row, "instruction"), input=given), text(row, "output"))]


def gsm8k(row: dict) -> list[Example]:
    reasoning, mark, answer = text(row, "answer").partition("####")
    if not mark or number(answer) is None:
        raise ValueError(f"'answer' is {row['answer']!r}: a reasoning and '#### number' are expected there")
    prompt = STEP_BY_STEP.format(question=text(row, "question"))
    return [Example(prompt, f"{reasoning}The final answer is: {answer.strip()}", answer=answer.strip())]


def labelled(row: dict, fields: tuple[str, ...], templates: tuple[tuple[str, ...], ...]) -> list[Example]:
    """One example in each template; the label is the place of the right choice."""
    values, label, count = {name: text(row, name).strip() for name in fields}, row.get("label"), len(templates[0]) - 1
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"the label {label!r} is unknown to this task: expected a number from 0 to {count - 1}")
    return [Example(template.format(**values), choices[label], choices) for template, *names in templates for choices in [tuple(names)]]


def copa(row: dict) -> list[Example]:
    if row.get("question") not in ("cause", "effect"):
        raise ValueError(f"'question' is {row.get('question')!r}: expected 'cause' or 'effect'")
    row = {**row, "link": "because" if row["question"] == "cause" else "so"}
    texts = tuple((template, text(row, "choice1"), text(row, "choice2")) for template in COPA)
    return labelled(row, ("premise", "choice1", "choice2", "question", "link"), texts)


def trec(row: dict) -> list[Example]:
    coarse, _, fine = text(row, "label").partition(":")
    if fine not in QUESTIONS.get(coarse, ("", ""))[1].split():
        raise ValueError(f"the label {row['label']!r} is unknown to TREC: expected such as 'NUM:date', of {', '.join(QUESTIONS)}")
    return labelled({**row, "label": list(QUESTIONS).index(coarse)}, ("sentence",), TREC)


def sst2(row: dict) -> list[Example]:
    if text(row, "label") not in ("0", "1"):
        raise ValueError(f"the label {row['label']!r} is unknown to SST-2: expected 0 (negative) or 1 (positive)")
    return labelled({**row, "label": int(row["label"])}, ("sentence",), SST2)


# ------------------------------------------------------------------------------------------- what is written → right or not

def number(written: str) -> float | None:
    """The last number, thousands' commas left out."""
    found = re.findall(r"-?\d+\.?\d*", written.replace(",", ""))
    return float(found[-1]) if found else None


def right_word(written: str, example: Example) -> bool:
    """The first of the choices' last words that occurs is the answer."""
    words = sorted((choice.split()[-1] for choice in example.choices), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, words)), written)
    return bool(found) and found[0] == example.answer


def right_result(written: str, example: Example) -> bool:
    """The last number is the answer within 0.001; where the answer is a letter, the first of A to E is it."""
    if re.fullmatch("[A-E]", example.answer):
        found = re.search("[A-E]", written)
        return bool(found) and found[0] == example.answer
    found = number(written)
    return found is not None and abs(found - number(example.answer)) <= 1e-3


# -------------------------------------------------------------------------------------------------------------- the table

class Format(NamedTuple):
    read: Callable[[dict], list[Example]]               # a row → its examples, one in each template; ValueError for a bad row
    metrics: tuple[str, ...] | None                     # for `evaluate`: its own metric; None = rank and exact, as the examples allow
    keys: frozenset[str]                                # by which it is recognised: the names that its rows have at least
    unless: frozenset[str] = frozenset()                # and have not
    about: str = ""                                     # what a row looks like
    right: Callable[[str, Example], bool] | None = None # for the metric "answer"
    max_new_tokens: int = 0                             # how long a model may write for it


def named(text: str) -> frozenset[str]:
    return frozenset(text.split())


FORMATS = {
    "prompts": Format(plain, None, named("prompt completion"), about='{"prompt": "some text", "completion": "some text"}'),
    "commonsense": Format(commonsense, ("answer",), named("instruction output answer choose"),
                          about="LLM-Adapters' JSON, an answer of a few", right=right_word, max_new_tokens=32),
    "math": Format(math, ("answer",), named("instruction output answer"), named("choose"),
                   "LLM-Adapters' JSON, a number or letter for an answer", right_result, 512),
    "alpaca": Format(alpaca, ("loss",), named("instruction output"), named("answer"), "instruction, input (may be empty) and output"),
    "gsm8k": Format(gsm8k, ("answer",), named("question answer"), about="question, and an answer that ends in '#### number'",
                    right=right_result, max_new_tokens=256),
    **{f"t-few-{name}": Format(partial(labelled, fields=("premise", "hypothesis"), templates=texts), ("rank",),
                               named("premise hypothesis label"), about="premise, hypothesis, label")
       for name, texts in (("rte", RTE), ("cb", CB))},
    "t-few-copa": Format(copa, ("rank",), named("premise choice1 choice2 question label"),
                         about="premise, choice1, choice2, question, label"),
    "t-few-sst2": Format(partial(labelled, fields=("sentence",), templates=SST2), ("rank",), named("sentence label"), named("line"),
                         "sentence, label"),
    "sst2": Format(sst2, ("rank",), named("line sentence label") | {"0 or 1"}, about="a line: label 0 or 1, a space, a sentence"),
    "trec": Format(trec, ("rank",), named("line sentence label") | {"A:b"}, about="a line: COARSE:fine label, a space, a question"),
}


def traits(row: dict) -> set[str]:
    """A row's names, and what else tells formats apart."""
    label = row["label"] if "line" in row else ""
    found = {"choose": "Answer format:" in str(row.get("instruction")), "0 or 1": label in ("0", "1"),
             "A:b": bool(re.fullmatch("[A-Z]+:[a-z]+", label))}
    return {*row, *(name for name, there in found.items() if there)}


def rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """(line, what reads the row there): a JSON list's elements, JSON objects of a line each, or lines of a label and a sentence."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    first = data.lstrip()[:1]
    if first == b"[":
        yield from elements(path, data)
        return
    if first != b"{":
        try:
            data.decode()
        except UnicodeDecodeError:                                        # TREC's training questions are ISO-8859-1
            data = data.decode("latin-1").encode()
    for line, row in enumerate(data.split(b"\n"), start=1):
        if row.strip():
            yield line, partial(as_object if first == b"{" else as_line, row)


def elements(path: Path, data: bytes) -> Iterator[tuple[int, Callable[[], dict]]]:
    """The elements of a JSON list, with the lines that they begin on. ValueError where the JSON breaks: what follows cannot be read."""
    line, counted = 1, 0
    try:
        text = data.decode()
        decoder, at = json.JSONDecoder(), text.index("[") + 1
        while True:
            at = re.compile(r"[\s,]*").match(text, at).end()
            line, counted = line + text.count("\n", counted, at), at
            if text[at] == "]":
                return
            value, at = decoder.raw_decode(text, at)
            yield line, partial(checked, value)
    except (ValueError, IndexError) as error:                             # wrong JSON or encoding; an end without ]
        raise ValueError(f"{path}, line {line}: no JSON from here on ({error}): mend the file, or fetch it again") from error


def checked(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def as_object(line: bytes) -> dict:
    return checked(json.loads(line))


def as_line(line: bytes) -> dict:
    label, _, sentence = line.decode().strip().partition(" ")
    return {"line": line.decode(), "label": label, "sentence": sentence}


def recognise(path) -> str:
    """The format of a file, by the names in its first readable row. ValueError where none, or more than one, fits."""
    error = None
    for line, read in rows(Path(path)):
        try:
            row = read()
        except ValueError as e:
            error = error or f"line {line}: {e}"
            continue
        fits = [name for name, f in FORMATS.items() if f.keys <= traits(row) and not f.unless & traits(row)]
        if len(fits) == 1:
            return fits[0]
        seen = f"its rows have {', '.join(row)}" if "line" not in row else f"line {line} begins {row['line'][:40]!r}"
        raise ValueError(f"{path}, line {line}: which format? {seen}. Name one of {', '.join(fits or FORMATS)} (format=, --format)")
    raise ValueError(f"{path}, {error}" if error else f"{path} holds no rows: expected examples in one of the formats {', '.join(FORMATS)}")


def read(path, format: str | None = None, template: int | None = None, skip_bad_rows: bool = False) -> tuple[list[Example], list[str]]:
    """`read_examples`, and what was wrong with each row that was skipped."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: expected examples in one of the formats {', '.join(FORMATS)}")
    if format is not None and format not in FORMATS:
        raise ValueError(f"there is no format {format!r}: choose from {', '.join(FORMATS)}")
    name = format or recognise(path)
    examples, bad = [], []
    for i, (line, row) in enumerate(rows(Path(path))):
        try:
            found = FORMATS[name].read(row())
        except ValueError as error:
            bad.append(f"{path}, line {line}: {error}; expected {FORMATS[name].about} (format {name})")
            if not skip_bad_rows:
                raise ValueError(bad[0]) from error
            continue
        if template is not None and not 0 <= template < len(found):
            raise ValueError(f"template is {template}: {name} has {len(found)}, numbered from 0")
        examples += [replace(e, id=i, format=name) for e in (found if template is None else [found[template]])]
    if not examples:
        why = f" that are good: {bad[0]}" if bad else f": expected {FORMATS[name].about} (format {name})"
        raise ValueError(f"{path} holds no rows{why}")
    return examples, bad


def read_examples(path, format: str | None = None, template: int | None = None, skip_bad_rows: bool = False) -> list[Example]:
    """The examples of a file in one of the FORMATS, recognised by its first row where format is None; id: the row's number.

    template: which of a task's wordings, from 0; None takes each row in every one. skip_bad_rows leaves malformed rows out
    and warns of how many. Raises FileNotFoundError; ValueError for a malformed row (naming file and line), a label that the
    task does not know, an unknown or ambiguous format, and a file without rows.
    """
    examples, bad = read(path, format, template, skip_bad_rows)
    if bad:
        warnings.warn(f"{len(bad)} malformed rows were skipped; the first: {bad[0]}", stacklevel=2)
    return examples
