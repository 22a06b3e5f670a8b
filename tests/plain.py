"""The transformer once more, one row, one head, one pair of channels at a time, in numpy and float64: shares no code with the model.

Use:  plain.logits(model, ids) (T, V); `scale`, `delta` and `edit` add what (IA)³, LoRA and ReFT add
See:  the model's logits, but for rounding.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def logits(model, ids, scale=None, delta=None, edit=None) -> np.ndarray:
    """ids: a list of real tokens. scale: {site name: factors (L, width)}; delta: {linear name: (L, out, in)} added to its
    weight; edit(layer, h) → h, called on each block's output h (T, C)."""
    c = model.config
    W = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    scale, delta, T = scale or {}, delta or {}, len(ids)

    def linear(name, x, layer, known_as):
        weight = W[f"{name}.weight"] + (delta[known_as][layer] if known_as in delta else 0)
        y = np.stack([weight @ row for row in x])                         # (T, out)
        return y + W[f"{name}.bias"] if f"{name}.bias" in W else y

    def scaled(x, layer, name):
        return x * scale[name][layer] if name in scale else x

    def norm(name, x):
        rows = []
        for row in x:
            if c.norm == "rms":
                rows.append(row / math.sqrt((row * row).mean() + c.norm_eps) * W[f"{name}.weight"])
            else:
                centred = row - row.mean()
                rows.append(centred / math.sqrt((centred * centred).mean() + c.norm_eps) * W[f"{name}.weight"] + W[f"{name}.bias"])
        return np.stack(rows)

    def rotate(x, position):                                              # x (D,): channels i and i + D/2 are one complex number
        if c.positions != "rotary":
            return x
        half, y = c.head_dim // 2, x.copy()
        for i in range(half):
            z = complex(x[i], x[i + half]) * np.exp(1j * position * c.rotary_base ** (-2 * i / c.head_dim))
            y[i], y[i + half] = z.real, z.imag
        return y

    def activation(u):
        if c.activation == "gelu":
            return 0.5 * u * (1 + erf(u / math.sqrt(2)))
        return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    h = np.stack([W["embed.weight"][i] for i in ids])                     # (T, C)
    if c.positions == "learned":
        h = h + W["position.weight"][:T]
    for layer in range(c.layers):
        block = f"blocks.{layer}"
        x = scaled(norm(f"{block}.attention_norm", h), layer, "attention_norm")
        q = scaled(linear(f"{block}.attention.query", x, layer, "query"), layer, "query")
        k = scaled(linear(f"{block}.attention.key", x, layer, "key"), layer, "key")
        v = scaled(linear(f"{block}.attention.value", x, layer, "value"), layer, "value")
        out = np.zeros((T, c.heads * c.head_dim))
        for head in range(c.heads):
            mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
            group = head // (c.heads // c.kv_heads)
            its = slice(group * c.head_dim, (group + 1) * c.head_dim)
            for t in range(T):
                query = rotate(q[t, mine], t)
                weights = np.array([math.exp(query @ rotate(k[s, its], s) / math.sqrt(c.head_dim)) for s in range(t + 1)])
                out[t, mine] = sum(w * v[s, its] for s, w in enumerate(weights / weights.sum()))
        h = h + scaled(linear(f"{block}.attention.output", out, layer, "attention_output"), layer, "attention_output")
        x = scaled(norm(f"{block}.ffn_norm", h), layer, "ffn_norm")
        u = linear(f"{block}.ffn.up", x, layer, "up")
        if c.activation == "swiglu":
            gate = linear(f"{block}.ffn.gate", x, layer, "gate")
            u = gate / (1 + np.exp(-gate)) * u
        else:
            u = activation(u)
        u = scaled(u, layer, "ffn")
        h = h + scaled(linear(f"{block}.ffn.down", u, layer, "ffn_output"), layer, "ffn_output")
        h = edit(layer, h) if edit else h
    head = W["embed.weight"] if c.tied else W["head.weight"]
    return norm("norm", h) @ head.T                                       # (T, V)
