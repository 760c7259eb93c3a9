"""A reference for BLIP-2's Q-Former: loops over queries, heads and tokens, from section 3.1 and BERT's layer."""

import math

import torch
from torch.nn.functional import gelu


def qformer(weights, queries, features, depth, heads, cross_every):
    """Return the output of each query, shape [queries, width], for an image's `features` [tokens, dim]."""
    w = {name.removeprefix("qformer."): value for name, value in weights.items()}
    x = [norm(q, w, "layernorm") for q in queries]
    for n in range(depth):
        layer = f"encoder.layer.{n}"
        x = attend(x, x, w, f"{layer}.attention", heads)
        if n % cross_every == 0:
            x = attend(x, list(features), w, f"{layer}.crossattention", heads)
        x = [feed_forward(q, w, layer) for q in x]
    return torch.stack(x)


def attend(queries, tokens, w, name, heads):
    keys = [linear(t, w, f"{name}.attention.key") for t in tokens]
    values = [linear(t, w, f"{name}.attention.value") for t in tokens]
    out = []
    for q in queries:
        query = linear(q, w, f"{name}.attention.query")
        size = len(query) // heads
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = [math.exp(float(query[part] @ key[part]) / math.sqrt(size)) for key in keys]
            total = sum(scores)
            mixed.append(sum(score / total * value[part] for score, value in zip(scores, values, strict=True)))
        out.append(norm(linear(torch.cat(mixed), w, f"{name}.output.dense") + q, w, f"{name}.output.LayerNorm"))
    return out


def feed_forward(x, w, layer):
    hidden = gelu(linear(x, w, f"{layer}.intermediate_query.dense"))
    return norm(linear(hidden, w, f"{layer}.output_query.dense") + x, w, f"{layer}.output_query.LayerNorm")


def linear(x, w, name):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def norm(x, w, name):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]
