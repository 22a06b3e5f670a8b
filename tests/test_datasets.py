"""Named data formats: tiny files of each, what a user can get wrong, and every public file where those are present.

Run:  pytest tests/test_datasets.py
See:  the prompts that the papers' code writes, answers found where it looks, and errors that name file and line.
"""

import json

import pytest
import small

from minireft import Example, evaluate, read_examples
from minireft.cli import main
from minireft.formats import datasets
from minireft.formats.datasets import FORMATS

BOOLQ = {"instruction": "Is water wet?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is true", "answer": "true"}
SUM = {"instruction": "What is 7 + 1,000?", "input": "", "output": " It is 7 + 1,000 = 1,007. ", "answer": "1007.0"}
LETTER = {"instruction": "Which? A) one B) two", "input": "", "output": "so the answer is B", "answer": "B"}
TALK = {"instruction": "Greet.", "input": "", "output": "Hello."}
TALK_ABOUT = {"instruction": "Translate.", "input": "chien", "output": "dog"}
GSM = {"question": "How many legs have 3 cows?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12"}
NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 7, "label": 1}
CHOICE = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I got rich.", "question": "effect", "idx": 1, "label": 0}
REVIEW = {"sentence": "a fine film ", "label": 1, "idx": 3}


def as_list(*rows):
    return json.dumps(rows, indent=4)


def as_lines(*rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
ALPACA += "### Instruction:\n{}\n\n"
FILES = {                               # format → (a file, how many examples, the first one's prompt, completion, answer)
    "prompts": (as_lines({"prompt": "a", "completion": "b"}), 1, "a", "b", None),
    "commonsense": (as_list(BOOLQ), 1, "Is water wet?\n\nAnswer format: true/false\n", "the correct answer is true", "true"),
    "math": (as_list(SUM, LETTER), 2, ALPACA.format("", "What is 7 + 1,000?") + "### Response:\n", "It is 7 + 1,000 = 1,007.", "1007.0"),
    "alpaca": (as_list(TALK_ABOUT, TALK), 2, ALPACA.format(", paired with an input that provides further context", "Translate.")
               + "### Input:\nchien\n\n### Response:\n", "dog", None),
    "gsm8k": (as_lines(GSM), 1, "How many legs have 3 cows?\nAnswer the above question. First think step by step and then answer the "
              "final number.\n", "3 * 4 = <<3*4=12>>12\nThe final answer is: 12", "12"),
    "t-few-rte": (as_lines(NLI), 7, 'Given that It rains. Does it follow that "It is wet."?', "No", None),
    "t-few-cb": (as_lines(NLI), 4, "Given that It rains. Does it follow that It is wet.? Yes, no, or maybe?", "No", None),
    "t-few-copa": (as_lines(CHOICE), 3, '"I got wet." or "I got rich."? It rained. so', "I got wet.", None),
    "t-few-sst2": (as_lines(REVIEW), 4, "a fine film\nQuestion: Was that sentence positive or negative? Answer:", "positive", None),
    "sst2": ("1 a fine film\n0 a dull one\n", 8, "a fine film\nQuestion: Was that sentence positive or negative? Answer:",
             "positive", None),
    "trec": ("NUM:date When ?\nHUM:ind Who ?\n", 6, "Question: When ?\n\nDescriptors: Description, Entity, Abbreviation, Person, Quantity, "
             "Location\n\nBest Descriptor?", "Quantity", None)}
AMBIGUOUS = ("t-few-rte", "t-few-cb")


def test_every_format_has_a_file_here():
    assert FILES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_format(name, tmp_path):
    content, count, *first = FILES[name]
    (tmp_path / "data").write_text(content)
    examples = read_examples(tmp_path / "data", name)
    assert len(examples) == count and [examples[0].prompt, examples[0].completion, examples[0].answer] == first
    assert {e.format for e in examples} == {name} and all(not e.choices or e.completion in e.choices for e in examples)
    if name in AMBIGUOUS:
        with pytest.raises(ValueError, match="which format.* Name one of t-few-rte, t-few-cb "):
            read_examples(tmp_path / "data")
    else:
        assert read_examples(tmp_path / "data") == examples
    templates = sum(e.id == 0 for e in examples)
    assert read_examples(tmp_path / "data", name, template=templates - 1)[0] == examples[templates - 1]
    with pytest.raises(ValueError, match=f"template is {templates}: {name} has {templates}"):
        read_examples(tmp_path / "data", name, template=templates)


def test_labels_are_the_publishers():
    """RTE: 0 entailment, 1 not; CB: 0 entailment, 1 contradiction, 2 neutral; COPA's label 1 is its second choice."""
    def word(name, row):
        return FORMATS[name].read(row)[0].completion
    assert [word("t-few-rte", {**NLI, "label": label}) for label in range(2)] == ["Yes", "No"]
    assert [word("t-few-cb", {**NLI, "label": label}) for label in range(3)] == ["Yes", "No", "Maybe"]
    assert [word("t-few-copa", {**CHOICE, "label": i, "question": "cause"}) for i in (0, 1)] == ["I got wet.", "I got rich."]
    assert [e.completion for e in FORMATS["trec"].read({"label": "ENTY:veh", "sentence": "What ?"})] == ["Entity"] * 3


@pytest.mark.parametrize("written, example, right", [
    ("the correct answer is true", BOOLQ, True), ("true, not false", BOOLQ, True), ("false", BOOLQ, False), ("", BOOLQ, False),
    ("7 + 1,000 = 1,007.", SUM, True), ("it is 1007.0004", SUM, True), ("1007 or 8", SUM, False), ("it is -1007", SUM, False),
    ("many", SUM, False),
    ("B, or A", LETTER, True), ("A, or B", LETTER, False), ("none", LETTER, False),
    ("so The final answer is: 12", GSM, True), ("12 cows, so 13", GSM, False)])
def test_what_counts_as_right(written, example, right):
    name = {"true": "commonsense", "1007.0": "math", "B": "math"}.get(example.get("answer"), "gsm8k")
    (read,) = FORMATS[name].read(example)
    assert FORMATS[name].right(written, read) is right


def test_the_longest_choice_that_fits_is_the_one_that_was_written():
    (read,) = FORMATS["commonsense"].read({"instruction": "Q Answer format: answer1/answer10", "output": "x", "answer": "answer10"})
    assert FORMATS["commonsense"].right("the correct answer is answer10", read) and not FORMATS["commonsense"].right("answer1", read)


BAD = [("commonsense", {**BOOLQ, "answer": "maybe"}, "'maybe' is unknown to this question: expected one of .*true"),
       ("commonsense", {**BOOLQ, "instruction": "Is it?"}, "unknown to this question"),
       ("commonsense", {**BOOLQ, "instruction": 3}, "'instruction' is 3"),
       ("math", {**SUM, "answer": "F"}, "'answer' is 'F': a number, or a letter"), ("math", {**SUM, "output": " "}, "'output' is ' '"),
       ("alpaca", {**TALK, "output": None}, "'output' is None"), ("alpaca", {**TALK, "input": ["x"]}, "'input' is"),
       ("gsm8k", {**GSM, "answer": "twelve"}, "a reasoning and '#### number'"),
       ("gsm8k", {**GSM, "answer": "so #### twelve"}, "#### number"),
       ("t-few-rte", {**NLI, "label": 2}, "label 2 is unknown to this task: expected a number from 0 to 1"),
       ("t-few-cb", {**NLI, "label": 3}, "from 0 to 2"),
       ("t-few-rte", {**NLI, "label": -1}, "label -1 is unknown"), ("t-few-rte", {**NLI, "label": True}, "label True"),
       ("t-few-copa", {**CHOICE, "question": "reason"}, "expected 'cause' or 'effect'"),
       ("t-few-sst2", {**REVIEW, "label": "1"}, "label '1' is unknown"),
       ("prompts", ["a"], "it is a list, not an object")]


@pytest.mark.parametrize("name, row, words", BAD)
def test_a_malformed_row_names_file_and_line_and_is_skipped_only_when_asked(name, row, words, tmp_path):
    good = json.loads(FILES[name][0].splitlines()[0]) if FILES[name][0].startswith("{") else json.loads(FILES[name][0])[0]
    for content, line in ((as_lines(good, row, good), 2), (f"[\n{json.dumps(good)},\n\n{json.dumps(row)}, {json.dumps(good)}]", 4)):
        path = tmp_path / "data"
        path.write_text(content)
        with pytest.raises(ValueError, match=f"data, line {line}: .*{words}"):
            read_examples(path, name)
        with pytest.warns(UserWarning, match=f"1 malformed rows were skipped; the first: .*data, line {line}"):
            examples = read_examples(path, name, skip_bad_rows=True)
        assert {e.id for e in examples} == {0, 2}                         # ids stay the rows' numbers


@pytest.mark.parametrize("name, content, words", [
    ("sst2", "1 good\n2 odd\n", "line 2: the label '2' is unknown to SST-2"), ("sst2", "1 good\n0\n", "line 2: 'sentence' is ''"),
    ("trec", "NUM:date When ?\nNUM:dates When ?\n", "line 2: the label 'NUM:dates' is unknown to TREC"),
    ("trec", "FOO:date When ?", "'FOO:date' is unknown"),
    (None, '[{"instruction": "a", "output": "b"},\n{"instruction": ', "line 2: no JSON from here on"),
    (None, '[{"instruction": "a", "output": "b"}', "no JSON"),
    (None, '[{"instruction": "a", "output": "b"}\n, 3]', "line 2: it is a int, not an object"), (None, "[]", "holds no rows"),
    (None, '{"text": "a"}', "which format. its rows have text. Name one of prompts, "),
    (None, "hello there", "which format. line 1 begins 'hello there'"),
    ("bool", "[]", "there is no format 'bool'"), ("prompts", "1 good", "'completion' is None")])
def test_what_is_wrong_with_a_file(name, content, words, tmp_path):
    path = tmp_path / "data"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_examples(path, name)


def test_broken_json_is_not_skipped(tmp_path):
    """Behind the break there may be anything: it is no row that can be left out."""
    path = tmp_path / "data"
    path.write_text('[{"instruction": "a", "output": "b"},\n{"instruction": "c" "d"}, {"instruction": "a", "output": "b"}]')
    with pytest.raises(ValueError, match="line 2: no JSON from here on"):
        read_examples(path, skip_bad_rows=True)
    path.write_text(as_lines(3, 4))
    with pytest.raises(ValueError, match="holds no rows that are good: .*line 1"):
        read_examples(path, "prompts", skip_bad_rows=True)


def test_encodings(tmp_path):
    (tmp_path / "trec").write_bytes("LOC:city Where is S\xe3o Paulo ?".encode("latin-1"))
    assert "São Paulo" in read_examples(tmp_path / "trec")[0].prompt
    (tmp_path / "alpaca").write_bytes(b"\xef\xbb\xbf" + as_list(TALK).encode())
    assert len(read_examples(tmp_path / "alpaca")) == 1
    odd = json.dumps({**GSM, "question": "caf\xe9"}, ensure_ascii=False).encode("latin-1")
    (tmp_path / "lines").write_bytes(as_lines(GSM).encode() + odd)
    with pytest.raises(ValueError, match="lines, line 2: .*utf-8"):
        read_examples(tmp_path / "lines")


# ---------------------------------------------------------------------------------------------------------------- metrics

class Writes:
    """A tokenizer of words that fills its vocabulary as it reads, as large as the tiny model's."""

    bos_id = eos_id = None

    def __init__(self):
        self.words = []

    def encode(self, text):
        self.words += [word for word in text.split() if word not in self.words]
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] if i < len(self.words) else "?" for i in ids)


def test_evaluate_takes_the_formats_own_metric(monkeypatch):
    model, tokenizer = small.model(), Writes()
    said = {"w1": "so true", "w2": "so false", "w3": "true false", "w4": "nothing"}
    monkeypatch.setattr("minireft.evaluation.generate_ids",
                        lambda model, prompts, *_, **__: [tokenizer.encode(said[tokenizer.decode(p)]) for p in prompts])
    examples = [Example(prompt, "true", ("true", "false"), answer="true", format="commonsense") for prompt in said]
    scores = evaluate(model, tokenizer, examples)
    assert (scores.answer, scores.rank, scores.exact) == (0.5, None, None) and str(scores) == "answer 0.500 ± 0.250 on 4 examples"
    assert scores.answers == tuple(said.values())
    with pytest.raises(ValueError, match="'w1' has no answer to look for"):
        evaluate(model, tokenizer, [Example("w1", "w2")], ("answer",))


def test_the_loss_of_instructions_is_the_mean_over_examples():
    model = small.model()
    examples = [Example(p, c, format="alpaca") for p, c in (("w1 w2", "w3 w4 w5"), ("w3", "w1"), ("w7", "w7 w8"))]
    scores = evaluate(model, model.tokenizer, examples)
    each = [evaluate(model, model.tokenizer, [e]).loss for e in examples]
    mean = sum(each) / 3
    assert scores.loss == pytest.approx(mean) and max(each) - min(each) > 0.01
    assert scores.errors["loss"] == pytest.approx((sum((x - mean) ** 2 for x in each) / 3) ** 0.5 / 3**0.5)
    both = evaluate(model, model.tokenizer, [*examples, Example("w1", "w2")])                # of two formats: what every example allows
    assert both.loss is None and both.exact is not None


def test_commands_read_them(tiny_base, tmp_path, capsys, monkeypatch):
    towns = ("oslo", "rome")                                              # the tiny base knows its own words only
    monkeypatch.setitem(FORMATS, "t-few-sst2", FORMATS["t-few-sst2"]._replace(
        read=lambda row: datasets.labelled(row, ("sentence",), (("{sentence}", *towns), ("{sentence} :", *towns)))))
    data, row = tmp_path / "data.jsonl", {"sentence": "anna lives in", "label": 1}
    data.write_text(as_lines(row, {**row, "label": 5}, {**row, "label": 0}))
    arguments = ["--data", str(data), "--base", str(tiny_base)]
    assert main(["evaluate", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("minireft: ") and "data.jsonl, line 2: the label 5 is unknown" in said and said.count("\n") == 1
    assert main(["evaluate", *arguments, "--skip-bad-rows"]) == 0
    out, err = capsys.readouterr()
    assert out == "rank 0.500 ± 0.354 on 2 examples\n" and err.startswith("minireft: skipped 1 malformed rows; the first: ")
    assert main(["tune", *arguments, "--skip-bad-rows", "--template", "2", "--out", str(tmp_path / "run")]) == 1
    assert "template is 2: t-few-sst2 has 2" in capsys.readouterr().err
    assert main(["tune", *arguments, "--skip-bad-rows", "--steps", "2", "--quiet", "--out", str(tmp_path / "run")]) == 0


# ------------------------------------------------------------------------------------------------------------- public files

PUBLIC = {"gsm8k/test.jsonl": ("gsm8k", 1319, 1), "instructions/instruction-data.json": ("alpaca", 1100, 1),
          "llm_adapters/ARC-Easy/test.json": ("commonsense", 2376, 1), "llm_adapters/boolq/test.json": ("commonsense", 3270, 1),
          "llm_adapters/openbookqa/test.json": ("commonsense", 500, 1), "sst2/stsa.binary.train": ("sst2", 6920, 4),
          "sst2/stsa.binary.dev": ("sst2", 872, 4), "sst2/stsa.binary.test": ("sst2", 1821, 4), "trec/TREC.train": ("trec", 5452, 3),
          "trec/TREC.test": ("trec", 500, 3), "tfew/rte/0_seed.jsonl": ("t-few-rte", 32, 7), "tfew/cb/0_seed.jsonl": ("t-few-cb", 32, 4),
          "tfew/copa/0_seed.jsonl": ("t-few-copa", 32, 3), "tfew/sst2/0_seed.jsonl": ("t-few-sst2", 32, 4)}


@pytest.mark.parametrize("file", PUBLIC)
def test_public_files_load_whole(file, data_folder):
    name, count, templates = PUBLIC[file]
    path = data_folder / file
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    examples = read_examples(path, name if name in AMBIGUOUS else None)
    assert {e.format for e in examples} == {name} and len(examples) == count * templates
    assert [e.id for e in examples] == [i for i in range(count) for _ in range(templates)]
    if FORMATS[name].right:                                               # what the file gives for an answer is found in it
        assert all(FORMATS[name].right(e.completion, e) for e in examples)
