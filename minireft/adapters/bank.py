"""A bank: adapters of one kind side by side, and every row of a batch uses its own.

Use:  bank = Bank({"mood": reft_a, "facts": reft_b}); model(tokens, tasks=bank.ids(["facts", None, "mood"]))
See:  each row's logits are those of its adapter alone; one launch a site, however many tasks are in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..positions import demand
from .base import Adapter
from .edits import Edit, PlainEdit, Prepared, by_site
from .ia3 import IA3, scales
from .lora import BesideEach, LoRA, linears
from .more.dora import DoRA
from .reft import ReFT


class Bank(Adapter):
    """adapters: {task: adapter}, all ReFTs of one site, all (IA)³ or all LoRA, made for one model and not attached. Ranks,
    layers, positions and sites may differ: the weights are padded to the widest. Training a bank trains its members.
    Raises ValueError for a mixture of kinds, or members that need more than the fused operations.
    """

    def __init__(self, adapters: dict[str, Adapter]):
        members = list(adapters.values())
        if not members:
            raise ValueError("the bank is empty: expected {task: adapter, ...}")
        kind = next((kind for kind in (ReFT, IA3, LoRA) if all(isinstance(m, kind) and not isinstance(m, DoRA) for m in members)), None)
        if kind is None:
            raise ValueError(f"a bank holds one kind of adapter: got {', '.join(sorted({type(m).__name__ for m in members}))}, "
                             "expected ReFTs, (IA)³ or LoRA")
        for name, member in adapters.items():
            if member.model is not members[0].model:
                raise ValueError(f"the adapter of {name!r} was made for another model object than the others")
            if member.attached:
                raise ValueError(f"the adapter of {name!r} is attached by itself: detach it first")
            if kind is ReFT and (member.edit is PlainEdit or member.site != members[0].site):
                raise ValueError(f"the ReFT of {name!r} has dropout, an activation or another site: a bank holds plain ones of one site")
        super().__init__(members[0].model, members={name: [type(m).__name__, m.options] for name, m in adapters.items()})
        self.names, self.kind = tuple(adapters), kind
        self.members = nn.ModuleList(members)
        self.layers = sorted({layer for m in members for layer in m.layers}) if kind is ReFT else None
        if kind is ReFT:                                                  # rules of place, and whose is which
            self.rules = list(dict.fromkeys((m.where, m.tied) for m in members))
            sizes = [1 if m.tied else 2 for m in members]                 # sets of weights
            for name, numbers in (("rule", [self.rules.index((m.where, m.tied)) for m in members]),
                                  ("least", [m.where.least for m in members]),
                                  ("first_set", [sum(sizes[:i]) for i in range(len(members))])):
                self.register_buffer(name, torch.tensor(numbers, device=self.model.embed.weight.device), persistent=False)
        else:                                                             # the vectors or Linears that any member has
            known = dict.fromkeys(name for m in members for name in (m.sites if kind is LoRA else dict(m.named_parameters())))
            self.sites = list(known)

    @classmethod
    def rebuild(cls, model, options):
        from . import KINDS                                               # the kinds know the bank, and the bank the kinds
        return cls({name: KINDS[kind].rebuild(model, inner) for name, (kind, inner) in options["members"].items()})

    def ids(self, names: list[str | None]) -> Tensor:
        """(B,) int64: each row's place in the bank, −1 for None. ValueError for a task that is not there."""
        for name in names:
            if name is not None and name not in self.names:
                raise ValueError(f"task {name!r} is not in this bank: expected one of {', '.join(self.names)}, or None")
        ids = [-1 if name is None else self.names.index(name) for name in names]
        return torch.tensor(ids, device=self.model.embed.weight.device)

    def standing(self):
        return list(self.members)

    def attach(self):
        if not self.attached and any(isinstance(other, Bank) for other in self.model.adapters):
            raise ValueError("another bank is attached: tasks would mean two things at once; detach it first")
        for name, member in zip(self.names, self.members):
            if member.attached or self.kind is IA3 and member._kept is not None:
                raise ValueError(f"the adapter of {name!r} is attached or merged by itself, and would work twice: undo that first")
        return super().attach()

    def save(self, path):
        from . import KINDS
        for name, member in zip(self.names, self.members):
            if type(member).__name__ not in KINDS:
                raise ValueError(f"the adapter of {name!r} is a {type(member).__name__}, which no file holds by itself: save its parent")
        super().save(path)

    def edits(self):
        if self.kind is IA3:
            return scales(self, self.sites)
        if self.kind is LoRA:
            return [(linear, BesideEach(self, name, slot)) for linear, name, slot in linears(self.model, self.sites)]
        return [(place, Edit(self, slot)) for slot, place in enumerate(self.members[0].places(self.layers))]

    def prepare(self, tokens, mask, prompt_lengths, tasks, past):
        if tasks is None:
            raise ValueError("a bank is attached, and no tasks are given: pass tasks=bank.ids([...]), None for rows without an adapter")
        if tasks.device.type == "cpu" and not torch.compiler.is_compiling() and tasks.numel():
            if not -1 <= int(tasks.min()) <= int(tasks.max()) < len(self.members):
                raise ValueError(f"tasks are {tasks.tolist()}: expected ids from −1 to {len(self.members) - 1}; bank.ids() makes them")
        if self.kind is not ReFT:
            return self.ready(self.vectors if self.kind is IA3 else self.factors), tasks
        return self.places_of_rows(tokens, mask, prompt_lengths, tasks, past)

    def places_of_rows(self, tokens, mask, prompt_lengths, tasks, past) -> Prepared | None:
        """Every row's positions and sets by the rules of its own member; a rule that several members share is read once."""
        if past and not any(where.generated for where, _ in self.rules):
            return None
        none, found = tokens.new_full((tokens.shape[0], 0), -1), []
        for where, tied in self.rules:
            at = none if past and not where.generated else where.find(tokens, mask, prompt_lengths)     # (B, P of this rule)
            found.append((at, torch.zeros_like(at) if tied else where.groups(tokens.device).expand_as(at)))
        P, row, task = max(at.shape[1] for at, _ in found), torch.arange(tokens.shape[0], device=tokens.device), tasks.clamp(min=0)
        each = ([F.pad(x, (0, P - x.shape[1]), value=-1) for x in xs] for xs in zip(*found))
        positions, group = (torch.stack(xs)[self.rule[task], row] for xs in each)          # (B, P) both
        positions = torch.where(tasks[:, None] < 0, -1, positions)
        if not past and any(where.strict for where, _ in self.rules):
            demand(positions, torch.where(tasks < 0, 0, self.least[task]))
        sets = torch.where(positions < 0, -1, self.first_set[task][:, None] + group)
        return Prepared(positions, sets, self.ready(lambda: by_site(self.weights(), False)))

    # -- the members' weights, padded and stacked

    def weights(self) -> tuple[Tensor, ...]:
        """down, up (S, ΣK, r, C) and bias (S, ΣK, r) over the union of layers; zeros where a member edits nothing."""
        r, S, stacks = max(m.options.get("rank", 1) for m in self.members), len(self.layers), ([], [], [])
        for m in self.members:
            slots = torch.tensor([self.layers.index(layer) for layer in m.layers], device=m.model.embed.weight.device)
            for stack, w, tail in zip(stacks, m.weights(), ((0, 0), (0, 0), ())):
                w = F.pad(w, (*tail, 0, r - w.shape[2]))                  # (S_m, K_m, r[, C])
                stack.append(w.new_zeros(S, *w.shape[1:]).index_copy(0, slots, w))
        down, up, bias = (torch.cat(stack, 1) for stack in stacks)
        return down, up if self.strength == 1.0 else up * self.strength, bias

    def vectors(self) -> dict:
        """(IA)³: {site: (L, M, width)}, ones where a member has no vector."""
        own = [m.vectors() for m in self.members]
        like = {name: next(o[name] for o in own if name in o) for name in self.sites}
        return {name: torch.stack([o.get(name, torch.ones_like(like[name])) for o in own], 1) for name in self.sites}

    def factors(self) -> dict:
        """LoRA: {site: A (L, M, r, in), B (L, M, out, r)}, zeros where a member has none."""
        r, own, found = max(m.options["rank"] for m in self.members), [m.factors() for m in self.members], {}
        for name in self.sites:
            like = next(o[name] for o in own if name in o)
            pairs = [o.get(name, [torch.zeros_like(w) for w in like]) for o in own]
            found[name] = (torch.stack([F.pad(a, (0, 0, 0, r - a.shape[1])) for a, _ in pairs], 1),
                           torch.stack([F.pad(b, (0, r - b.shape[2])) for _, b in pairs], 1))
        return found
