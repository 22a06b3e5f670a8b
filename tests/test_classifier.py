"""Classification: the head's arithmetic, what is trained, what a file holds, and that nothing stays behind.

Run:  pytest tests/test_classifier.py
See:  a head alone, and with ReFT, (IA)³ and LoRA, on an encoder and on a decoder.
"""

import itertools

import pytest
import small
import torch

import minireft
from minireft import IA3, Bank, Classifier, Example, LoRA, LoReFT, TrainConfig

METHODS = {"none": lambda m: None, "LoReFT": lambda m: LoReFT(m, rank=1, positions="f2"), "IA3": lambda m: IA3(m), "LoRA": lambda m: LoRA(m, rank=2)}
LABELS = ("low", "high")
EXAMPLES = [Example(f"w{i} w{j} w9", LABELS[i > j]) for i, j in itertools.permutations(range(8), 2)]


@pytest.mark.parametrize("pool", ("first", "last", "mean"))
@pytest.mark.parametrize("side", ("left", "right"))
def test_scores_are_the_formula_row_by_row(pool, side):
    model, rows = small.model("modern"), small.rows([1, 6, 3])
    head = small.randomise(Classifier(model, ("a", "b", "c"), pool=pool))
    tokens, mask = small.pad(rows, side, more=2, filler=11)
    with head:
        got = model(tokens, mask)
    assert got.shape == (3, 3)
    for i, row in enumerate(rows):
        h, _ = model.stream(row[None])                                    # (1, T, C)
        pooled = {"first": h[0, 0], "last": h[0, -1], "mean": h[0].sum(0) / len(row)}[pool]
        expected = head.w2 @ torch.tanh(head.w1 @ pooled + head.b1) + head.b2
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-5)
        with head:
            torch.testing.assert_close(model(row[None])[0], expected, rtol=1e-4, atol=1e-5)


def test_the_usual_pool_is_what_the_architecture_has_read_all_in():
    assert Classifier(small.model("modern"), LABELS).pool == "mean" and Classifier(small.model("llama"), LABELS).pool == "last"


@pytest.mark.parametrize("base", ("roberta", "llama"))
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_saves_loads_and_leaves_nothing(base, method, tmp_path):
    model = small.model(base)
    before = small.bits(model)
    torch.manual_seed(0)
    made = METHODS[method](model)
    head = Classifier(model, LABELS, made)
    start = small.bits(head)
    run = minireft.train(model, [head], EXAMPLES, TrainConfig(steps=100, lr=3e-2, batch_size=56), progress=False)
    assert not head.attached and (made is None or not made.attached) and not model.adapters
    assert small.same_bits(small.bits(model), before)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in head.state_dict().items())     # head and method, both trained
    assert run.losses[0] == pytest.approx(0.693, abs=2e-3) and run.losses[-1] < 0.55                   # from even chances
    head.save(tmp_path / "head.safetensors")
    other = small.model(base)
    loaded = minireft.load_adapter(other, tmp_path / "head.safetensors")
    prompts = [e.prompt for e in EXAMPLES]
    with head, loaded:
        mine, its = (minireft.classify(m, m.tokenizer, prompts, batch_size=5) for m in (model, other))
        scores = minireft.evaluate(model, model.tokenizer, EXAMPLES)
    assert mine == its and loaded.labels == LABELS and scores.exact is None
    assert scores.rank == sum(a == e.completion for a, e in zip(mine, EXAMPLES)) / len(EXAMPLES) > 0.7


def test_training_what_the_user_attached_trains_the_method_too():
    model = small.model("roberta")
    head = Classifier(model, LABELS, LoReFT(model, rank=1, positions="f2")).attach()
    before = small.bits(head)
    minireft.train(model, [head], EXAMPLES, TrainConfig(steps=3), progress=False)
    assert head.attached and head.method.attached
    assert not torch.equal(head.state_dict()["method.w"], before["method.w"])
    head.detach()
    assert not model.adapters and not any(site.edits for site in model.sites().values())


def test_micro_batches_change_nothing():
    results = []
    for accumulate in (1, 4):
        model = small.model("roberta", dtype=torch.float32)
        torch.manual_seed(0)
        head = Classifier(model, LABELS, IA3(model))
        results.append(minireft.train(model, [head], EXAMPLES, TrainConfig(steps=5, batch_size=16, accumulate=accumulate), progress=False).losses)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_method_that_cannot_be_attached_leaves_the_head_off_too():
    model = small.model("roberta")
    standing = LoReFT(model, positions="f2").attach()
    head = Classifier(model, LABELS, LoReFT(model, positions="f1"))
    with pytest.raises(ValueError, match="another ReFT edits"):
        head.attach()
    assert model.adapters == [standing] and not head.attached and not model.head.edits


def test_mistakes_are_named():
    model, both = small.model("roberta"), small.model("two")
    attached = IA3(model).attach()
    for make, words in [(lambda: Classifier(model, "yes"), "labels are 'yes'"), (lambda: Classifier(model, ("a",)), "at least two"),
                        (lambda: Classifier(model, ("a", "a")), "each once"), (lambda: Classifier(model, LABELS, pool="max"), "pool is 'max'"),
                        (lambda: Classifier(both, LABELS), "writes its labels"), (lambda: Classifier(model, LABELS, attached), "not attached"),
                        (lambda: Classifier(model, LABELS, IA3(small.model("roberta"))), "made for this model"),
                        (lambda: Classifier(model, LABELS, Bank({"a": IA3(model)})), "no bank"),
                        (lambda: minireft.classify(model, model.tokenizer, ["w1"]), "no classifier is attached")]:
        with pytest.raises(ValueError, match=words):
            make()
    attached.detach()
    decoder = small.model("llama")
    with Classifier(decoder, LABELS), pytest.raises(ValueError, match="generates nothing"):
        minireft.generate(decoder, decoder.tokenizer, ["w1 w2"])
    head = Classifier(model, LABELS)
    with pytest.raises(ValueError, match="'middle'.*none of the classifier's labels"):
        minireft.train(model, [head], [Example("w1", "middle")], progress=False)
    for adapters, losses in (([head], ("lm", "class")), ([IA3(model)], ("class",))):
        with pytest.raises(ValueError, match="trained with"):
            minireft.train(model, adapters, EXAMPLES, TrainConfig(losses=losses), progress=False)
    with head, pytest.raises(ValueError, match="a classifier is attached already"):
        Classifier(model, LABELS).attach()
    with head, pytest.raises(ValueError, match="do not pack"):
        model(torch.tensor([[4, 5]]), torch.tensor([[1, 2]]))
