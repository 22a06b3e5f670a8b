"""The transformer once more, one row, one head, one pair of channels at a time, in numpy and float64: shares no code with the model.

Use:  plain.logits(model, ids) (T, V); `scale`, `delta` and `edit` add what (IA)³, LoRA and ReFT add
See:  the model's logits, but for rounding.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def logits(model, ids, scale=None, delta=None, edit=None, decoder_ids=None) -> np.ndarray:
    """ids: a list of real tokens, decoder_ids another where there are an encoder and a decoder. scale: {site name: factors (L, width)}; delta: {linear name: (L, out, in)} added to its
    weight; edit(layer, h) → h, called on each block's output h (T, C)."""
    c = model.config
    W = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    scale, delta = scale or {}, delta or {}

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

    def slowed(frequency):                                                # Llama 3.1's, by wavelength, in its three cases
        if c.rotary_scaling is None:
            return frequency
        factor, low, high, original = c.rotary_scaling
        wavelength = 2 * math.pi / frequency
        if original == 0 or wavelength > original / low:
            return frequency / factor
        if wavelength < original / high:
            return frequency
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    def rotate(x, position):                                              # x (D,): channels i and i + D/2 are one complex number
        if c.positions != "rotary":
            return x
        half, y = c.head_dim // 2, x.copy()
        for i in range(half):
            z = complex(x[i], x[i + half]) * np.exp(1j * position * slowed(c.rotary_base ** (-2 * i / c.head_dim)))
            y[i], y[i + half] = z.real, z.imag
        return y

    def activation(u):
        if c.activation == "relu":
            return np.maximum(u, 0)
        if c.activation == "gelu":
            return 0.5 * u * (1 + erf(u / math.sqrt(2)))
        return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    def bias(prefix, head, query, key, causal):                           # T5's relative positions, bucket by bucket
        if c.positions != "relative":
            return 0.0
        buckets, distance, bucket = c.relative_buckets, abs(key - query), 0
        if not causal:
            buckets //= 2
            bucket = buckets if key > query else 0
        near = buckets // 2
        if distance >= near:
            far = int(math.log(distance / near) / math.log(c.relative_furthest / near) * (buckets - near))
            distance = min(near + far, buckets - 1)
        return W[f"{prefix}relative.weight"][bucket + distance, head]

    def attention(name, x, source, layer, visible, bias_of, site=""):
        """x (T, C) looks at source (S, C): query t at the keys visible(t). `site` leads its sites' names."""
        position = rotate if not site else lambda x, position: x          # cross-attention has no positions
        q = scaled(linear(f"{name}.query", x, layer, f"{site}query"), layer, f"{site}query")
        k = scaled(linear(f"{name}.key", source, layer, f"{site}key"), layer, f"{site}key")
        v = scaled(linear(f"{name}.value", source, layer, f"{site}value"), layer, f"{site}value")
        if c.qk_norm:
            q, k = (norm(f"{name}.{which}_norm", y.reshape(-1, c.head_dim)).reshape(y.shape) for which, y in (("query", q), ("key", k)))
        out = np.zeros((len(x), c.heads * c.head_dim))
        for head in range(c.heads):
            mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
            group = head // (c.heads // c.kv_heads)
            its = slice(group * c.head_dim, (group + 1) * c.head_dim)
            for t in range(len(x)):
                query = position(q[t, mine], t)
                weights = np.array([math.exp(query @ position(k[s, its], s) / math.sqrt(c.head_dim) + bias_of(head, t, s)) for s in visible(t)])
                out[t, mine] = sum(w * v[s, its] for w, s in zip(weights / weights.sum(), visible(t)))
        return scaled(linear(f"{name}.output", out, layer, f"{site}attention_output"), layer, f"{site}attention_output")

    def ffn(name, x, layer):
        u = linear(f"{name}.up", x, layer, "up")
        if c.activation in ("swiglu", "geglu_tanh"):
            gate = linear(f"{name}.gate", x, layer, "gate")
            u = (gate / (1 + np.exp(-gate)) if c.activation == "swiglu" else activation(gate)) * u
        else:
            u = activation(u)
        return scaled(linear(f"{name}.down", scaled(u, layer, "ffn"), layer, "ffn_output"), layer, "ffn_output")

    def stack(prefix, ids, layers, causal, memory=None):
        def add(h, name, part, layer):                                    # the sum, normed where the configuration says
            known_as = name.rsplit(".", 1)[-1]
            if c.norm_first:
                return h + part(scaled(norm(name, h), layer, known_as))
            return scaled(norm(name, h + part(h)), layer, known_as)
        T = len(ids)
        h = np.stack([W["embed.weight"][i] for i in ids])                 # (T, C)
        if c.positions == "learned":
            h = h + W[f"{prefix}position.weight"][:T]
        h = h if c.norm_first else norm(f"{prefix}norm", h)
        visible = (lambda t: range(t + 1)) if causal else (lambda t: range(T))
        near = lambda head, t, s: bias(prefix, head, t, s, causal)
        for layer in layers:
            block = f"blocks.{layer}"
            h = add(h, f"{block}.attention_norm", lambda x: attention(f"{block}.attention", x, x, layer, visible, near), layer)
            if memory is not None:
                look = lambda x: attention(f"{block}.cross", x, memory, layer, lambda t: range(len(memory)), lambda *_: 0.0, "cross_")
                h = add(h, f"{block}.cross_norm", look, layer)
            h = add(h, f"{block}.ffn_norm", lambda x: ffn(f"{block}.ffn", x, layer), layer)
            h = edit(layer, h) if edit else h
        return norm(f"{prefix}norm", h) if c.norm_first else h

    n, L = c.encoder_layers, c.layers
    if n == 0 or n == L:
        h = stack("", ids, range(L), causal=n == 0)
    else:
        h = stack("", decoder_ids, range(n, L), True, stack("encoder_", ids, range(n), False))
    if c.masked_head:
        h = activation(h @ W["head.dense.weight"].T + W["head.dense.bias"])
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + c.norm_eps) * W["head.norm.weight"] + W["head.norm.bias"]
    return h @ W["embed.weight" if c.tied else "head.weight"].T + W.get("head.bias", 0)    # (T, V)
