"""minireft beside the programs that others use: pyreft's interventions in and out, and transformers' models.

Run:  make peers-pyreft        (an environment of its own: pyreft needs an older transformers than the other peers)
See:  logits within 1e-5 in fp32, greedy generation token for token, on random tiny weights and prompts of unequal length.
"""

import json

import pytest
import torch

import minireft
import small
from minireft.formats import huggingface, pyreft as ours

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
STD = 24**-0.5                          # of weights: a Linear of that width keeps the size of what passes through it
LENGTHS = (3, 9, 5, 14)


def theirs(name: str, seed: int = 0, **changes):
    """A model of transformers' with weights large enough to matter."""
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=64, **changes)
    else:
        kind = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config}[name]
        config = kind(**{**dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                                num_key_value_heads=2, max_position_embeddings=64), **changes})
    config.bos_token_id = config.eos_token_id = None
    config._attn_implementation = "eager"
    return small.randomise(transformers.AutoModelForCausalLM.from_config(config), seed, STD).eval()


def both(name: str, folder, seed: int = 0, **changes):
    """The same weights there and here."""
    model = theirs(name, seed, **changes)
    model.save_pretrained(folder)
    return model, minireft.load(folder)[0]


def prompts(side: str, lengths=LENGTHS, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return small.pad([torch.randint(0, 61, (n,), generator=generator) for n in lengths], side)


def their_logits(model, tokens, mask):
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions).logits


FAMILIES = [("llama", {}), ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 500000.0}),
            ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}), ("mistral", {"sliding_window": None}),
            ("mistral", {"sliding_window": 32}), ("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("gpt2", {}),
            ("gpt2", {"activation_function": "gelu", "n_inner": 40}), ("gpt2", {"tie_word_embeddings": False})]


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name, changes", FAMILIES, ids=str)
@torch.no_grad()
def test_logits_of_transformers(tmp_path, name, changes, side):
    model, mine = both(name, tmp_path, **changes)
    tokens, mask = prompts(side)
    difference = (mine(tokens, mask) - their_logits(model, tokens, mask))[mask].abs().max().item()
    print(f"{name} {changes} {side}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name, changes", FAMILIES, ids=str)
@torch.no_grad()
def test_greedy_generation_of_transformers(tmp_path, name, changes):
    model, mine = both(name, tmp_path, **changes)
    tokens, mask = prompts("left")
    expected = model.generate(tokens, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, pad_token_id=0)[:, tokens.shape[1]:]
    rows = [row[real].tolist() for row, real in zip(tokens, mask)]
    assert minireft.generation.generate_ids(mine, rows, 12, None) == expected.tolist()


@pytest.mark.parametrize("name", ("llama", "qwen", "gpt2"))
@torch.no_grad()
def test_a_folder_of_ours_in_transformers(tmp_path, name):
    mine = small.model(name, **({"head_dim": 4} if name == "qwen" else {"tied": name == "gpt2"}))
    huggingface.save(mine, mine.tokenizer, tmp_path)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = small.pad(small.rows([3, 9, 5]), "right")
    difference = (mine(tokens, mask) - their_logits(model.eval(), tokens, mask))[mask].abs().max().item()
    print(f"written {name}: {difference:.1e}")
    assert difference <= TOLERANCE
    text = "w3 w7 w20"
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == mine.tokenizer.encode(text)


# ---------------------------------------------------------------------------------------------------------------- pyreft

KINDS = {"LoreftIntervention": "LoReFT", "NodireftIntervention": "DiReFT", "NoreftIntervention": "NoReFT"}
RANK, LAYERS, WIDTH = 3, (0, 2), 24


@pytest.fixture(scope="module")
def pyreft():
    return pytest.importorskip("pyreft", reason="pyreft is not installed here: make peers-pyreft")


def intervene(pyreft, model, kind: str, tied: bool):
    """Their model with fresh fp32 interventions on LAYERS; all prefixes first, then all suffixes, as their data classes order them."""
    def fresh():
        extra = {"add_bias": False} if kind != "LoreftIntervention" else {}
        return getattr(pyreft, kind)(embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32, **extra)
    representations = [{"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": fresh()}
                       for _ in range(1 if tied else 2) for layer in LAYERS]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    reft.eval()                                                           # returns nothing there
    return reft


def locations(pyreft, starts, lengths, positions: str, tied: bool):
    """Their positions (interventions, B, P), moved to where each row begins."""
    n = len(LAYERS) * (1 if tied else 2)
    rows = [pyreft.get_intervention_locations(last_position=length, positions=positions, num_interventions=n, share_weights=tied)
            for length in lengths]
    return [[[p + start for p in row[i]] for row, start in zip(rows, starts)] for i in range(n)]


def reft_logits(pyreft, reft, tokens, mask, positions, tied):
    at = locations(pyreft, mask.long().argmax(1).tolist(), mask.sum(1).tolist(), positions, tied)
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    return reft(inputs, unit_locations={"sources->base": (None, at)})[1].logits


def train(pyreft, reft, positions, tied, steps: int = 4):
    """A few steps, so that nothing is as it was drawn."""
    tokens, mask = prompts("right", (8, 11, 9), seed=5)
    optimizer = torch.optim.Adam(reft.get_trainable_parameters(), lr=3e-2)
    for _ in range(steps):
        logits = reft_logits(pyreft, reft, tokens, mask, positions, tied)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


PROMPTS = (8, 15, 9, 12)                # long enough for f4+l4: where they are not, pyreft leaves an odd middle token out
BOTH = [(name, kind, tied) for name in ("llama", "gpt2") for kind in KINDS for tied in (True, False)]


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name, kind, tied", BOTH)
def test_trained_there_and_imported_here(pyreft, tmp_path, name, kind, tied, side):
    model, mine = both(name, tmp_path / "base")
    reft = intervene(pyreft, model, kind, tied)
    train(pyreft, reft, "f4+l4", tied)
    reft.save(str(tmp_path / "reft"))
    adapter = minireft.load_adapter(mine, tmp_path / "reft", positions="f4+l4")
    assert type(adapter).__name__ == KINDS[kind] and adapter.tied == tied and adapter.layers == list(LAYERS) and adapter.base is None
    tokens, mask = prompts(side, PROMPTS)
    with torch.no_grad(), adapter:
        edited = mine(tokens, mask)
        expected = reft_logits(pyreft, reft, tokens, mask, "f4+l4", tied)
    plain = their_logits(model, tokens, mask)
    difference = (edited - expected)[mask].abs().max().item()
    print(f"{name} {kind} {'tied' if tied else 'untied'} {side}: {difference:.1e}, the edit's own effect {(plain - expected)[mask].abs().max():.2f}")
    assert difference <= TOLERANCE and (plain - expected)[mask].abs().max() > 0.1


@pytest.mark.parametrize("name, kind, tied", BOTH)
def test_made_here_and_exported_there(pyreft, tmp_path, name, kind, tied):
    model, mine = both(name, tmp_path / "base")
    adapter = small.randomise(getattr(minireft, KINDS[kind])(mine, rank=RANK, layers=LAYERS, positions="f4+l4", tied=tied), std=STD)
    ours.write(adapter, tmp_path / "reft")
    reft = intervene(pyreft, model, kind, tied)
    for key, intervention in reft.interventions.items():
        intervention.load_state_dict(torch.load(tmp_path / "reft" / f"intkey_{key}.bin", weights_only=True))
    tokens, mask = prompts("right", PROMPTS)
    with torch.no_grad(), adapter:
        difference = (mine(tokens, mask) - reft_logits(pyreft, reft, tokens, mask, "f4+l4", tied))[mask].abs().max().item()
    print(f"exported {name} {kind} {'tied' if tied else 'untied'}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("tied", (True, False))
def test_their_own_load_takes_our_folder(pyreft, tmp_path, tied):
    """It reads W and b into bf16 whatever was stored: equal to that rounding, and equal in fp32 once they are loaded again so."""
    model, mine = both("llama", tmp_path / "base")
    adapter = small.randomise(minireft.LoReFT(mine, rank=RANK, layers=LAYERS, positions="f4+l4", tied=tied), std=STD)
    ours.write(adapter, tmp_path / "reft")
    reft = pyreft.ReftModel.load(str(tmp_path / "reft"), model)
    reft.eval()
    for key, intervention in reft.interventions.items():
        assert intervention.learned_source.weight.dtype == torch.bfloat16
        intervention.learned_source.float()
        intervention.load_state_dict(torch.load(tmp_path / "reft" / f"intkey_{key}.bin", weights_only=True))
    tokens, mask = prompts("right", PROMPTS)
    with torch.no_grad(), adapter:
        difference = (mine(tokens, mask) - reft_logits(pyreft, reft, tokens, mask, "f4+l4", tied))[mask].abs().max().item()
    assert difference <= TOLERANCE


def test_a_rotation_that_lost_its_orthonormality_there(pyreft, tmp_path):
    """Their load keeps R in the first columns of a basis whose others do not fit it, so training on bends R."""
    model, mine = both("llama", tmp_path / "base")
    reft = intervene(pyreft, model, "LoreftIntervention", True)
    train(pyreft, reft, "f4+l4", True)
    reft.save(str(tmp_path / "first"))
    for key, intervention in reft.interventions.items():
        intervention.load_state_dict(torch.load(tmp_path / "first" / f"intkey_{key}.bin", weights_only=True))
    train(pyreft, reft, "f4+l4", True)
    reft.save(str(tmp_path / "second"))
    adapter = minireft.load_adapter(mine, tmp_path / "second", positions="f4+l4")
    assert type(minireft.load_adapter(mine, tmp_path / "first")).__name__ == "LoReFT" and type(adapter).__name__ == "NoReFT"
    tokens, mask = prompts("right", PROMPTS)
    with torch.no_grad(), adapter:
        difference = (mine(tokens, mask) - reft_logits(pyreft, reft, tokens, mask, "f4+l4", True))[mask].abs().max().item()
    assert difference <= TOLERANCE


@pytest.mark.parametrize("positions", ("l1", "f1", "f2+l1"))
def test_short_prompts_and_other_positions(pyreft, tmp_path, positions):
    model, mine = both("llama", tmp_path / "base")
    reft = intervene(pyreft, model, "LoreftIntervention", True)
    reft.save(str(tmp_path / "reft"))
    tokens, mask = prompts("right", (4, 6, 12))
    with torch.no_grad(), minireft.load_adapter(mine, tmp_path / "reft", positions=positions):
        difference = (mine(tokens, mask) - reft_logits(pyreft, reft, tokens, mask, positions, True))[mask].abs().max().item()
    assert difference <= TOLERANCE


def test_the_folder_is_written_as_theirs_is(pyreft, tmp_path):
    model, mine = both("llama", tmp_path / "base")
    for kind in KINDS:
        for tied in (True, False):
            theirs_, ours_ = tmp_path / f"{kind}{tied}theirs", tmp_path / f"{kind}{tied}ours"
            intervene(pyreft, model, kind, tied).save(str(theirs_))
            ours.write(getattr(minireft, KINDS[kind])(mine, rank=RANK, layers=LAYERS, tied=tied), ours_)
            a, b = (json.loads((folder / "config.json").read_text()) for folder in (theirs_, ours_))
            a.pop("transformers_version")
            assert a == b
            assert {p.name for p in theirs_.iterdir()} == {p.name for p in ours_.iterdir()}
            for path in theirs_.glob("*.bin"):
                x, y = (torch.load(folder / path.name, weights_only=True) for folder in (theirs_, ours_))
                assert x.keys() == y.keys() and all(x[n].shape == y[n].shape and x[n].dtype == y[n].dtype for n in x)
