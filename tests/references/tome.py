"""A reference for ToMe: loops over the tokens of one image and the layers of an encoder, from the paper, section 3."""

import math

import torch
from torch.nn.functional import layer_norm, linear


def matching(keys, alone, merges):
    """Return the tokens that one matching leaves: lists of the places that become one token, in their order.

    `keys` are lists of numbers. The first `alone` tokens are not merged. Each of the `merges` most similar tokens at
    even places joins the token at an odd place that is most similar to it.
    """
    edges = {}
    for a in range(0, len(keys), 2):
        if a < alone:
            continue
        similar = {b: round(cosine(keys[a], keys[b]) * 2**20) for b in range(1, len(keys), 2) if b >= alone}
        best = max(similar, key=lambda b: (similar[b], -b))
        edges[a] = similar[best], best
    joining = sorted(edges, key=lambda a: (-edges[a][0], a))[:merges]
    left = [[a] for a in range(0, len(keys), 2) if a not in joining]
    return left + [[b, *(a for a in joining if edges[a][1] == b)] for b in range(1, len(keys), 2)]


def cosine(x, y):
    return sum(p * q for p, q in zip(x, y, strict=True)) / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


def mean(vectors, sizes):
    """Return the mean of tensors, weighted by sizes."""
    return sum(v * s for v, s in zip(vectors, sizes, strict=True)) / sum(sizes)


def in_rounds(keys, sizes, alone, count):
    """Return the groups of places after as many matchings as it takes to leave `count` tokens beside those alone.

    Each round merges at most half. Later rounds compare the means of the keys.
    """
    groups = [[n] for n in range(len(keys))]
    while len(groups) - alone > count:
        left = len(groups) - alone
        of_groups = [mean([torch.tensor(keys[n]) for n in g], [sizes[n] for n in g]).tolist() for g in groups]
        groups = [
            [n for g in joined for n in groups[g]]
            for joined in matching(of_groups, alone, min(left - count, left // 2))
        ]
    return groups


def tome(layers, states, counts, alone):
    """Run encoder layers on the tokens of one image; return the final tokens, and of which first tokens each consists.

    `states` is [tokens, dim]. After layer n, `counts[n]` tokens are left beside the first `alone` ones.
    """
    members = [[n] for n in range(len(states))]
    for layer, count in zip(layers, counts, strict=True):
        attention = layer.self_attn
        x = normed(states, layer.layer_norm1)
        q, k, v = (linear(x, p.weight, p.bias) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        sizes = [len(m) for m in members]
        heads = [part.chunk(attention.num_heads, dim=-1) for part in (q, k, v)]
        out = []
        for qh, kh, vh in zip(*heads, strict=True):
            scores = qh @ kh.T / math.sqrt(qh.shape[-1])
            scores = scores + torch.tensor([math.log(s) for s in sizes])
            out.append(scores.softmax(-1) @ vh)
        states = states + linear(torch.cat(out, -1), attention.out_proj.weight, attention.out_proj.bias)
        keys = (sum(heads[1]) / attention.num_heads).tolist()
        groups = in_rounds(keys, sizes, alone, count)
        states = torch.stack([mean([states[n] for n in g], [sizes[n] for n in g]) for g in groups])
        members = [[m for n in g for m in members[n]] for g in groups]
        mlp = layer.mlp
        hidden = mlp.activation_fn(linear(normed(states, layer.layer_norm2), mlp.fc1.weight, mlp.fc1.bias))
        states = states + linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
    return states, members


def normed(x, norm):
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
