"""A reference for VCC: one row without a cache, layer by layer, from the paper, with a loop for each of its sums."""

import math

import torch

from tests.references.in_llm import rotated, start, with_stream


def chosen(scores, fine):
    """Return the numbers of the `fine` blocks with the highest scores; of equal scores, the first."""
    best = []
    while len(best) < min(fine, len(scores)):
        best.append(max((j for j in range(len(scores)) if j not in best), key=lambda j: (scores[j], -j)))
    return best


def blocks_of(tokens, b):
    """Return the whole blocks of b neighbours, and the tokens after them."""
    whole = len(tokens) // b
    return [tokens[j * b : (j + 1) * b] for j in range(whole)], tokens[whole * b :]


def coarse(hidden, members):
    """Return the coarse token of a block of more than one token."""
    total = torch.zeros_like(hidden[0])
    for member in members:
        total = total + hidden[member]
    return total / (len(members) + 1e-4)


def scores_of(layer, states, cos, sin, asking, blocks):
    """Return the attention of the tokens `asking` to each of `blocks`, softmax over these, mean over heads and tokens.

    `states`, `cos` and `sin` have the states and the tables of positions of all of them, by name.
    """
    attention = layer.self_attn

    def by_head(name, projection, norm):
        x = getattr(attention, projection)(layer.input_layernorm(states[name][None])[0])
        heads = x.unflatten(-1, (-1, attention.head_dim))
        heads = getattr(attention, norm)(heads) if hasattr(attention, norm) else heads
        return rotated(heads, cos[name], sin[name])

    keys = [by_head(block, "k_proj", "k_norm") for block in blocks]
    total = [0.0] * len(blocks)
    for name in asking:
        queries = by_head(name, "q_proj", "q_norm")
        for head, query in enumerate(queries):
            shared = len(queries) // len(keys[0])
            logits = [(query @ key[head // shared]).item() / math.sqrt(attention.head_dim) for key in keys]
            largest = max(logits)
            norm = sum(math.exp(logit - largest) for logit in logits)
            for j, logit in enumerate(logits):
                total[j] += math.exp(logit - largest) / norm / len(queries) / len(asking)
    return total


def logits_of(model, inputs, new_tokens, images, separators, method, bidirectional=False):
    """Return the logits at all positions of a row's prompt and `new_tokens`, and how many tokens each layer saw.

    `images` has the columns of each image, and `separators` those of newlines among them.
    """
    hidden, entered, cos, sin, seen = start(model, inputs, new_tokens)
    hidden, prompt = list(hidden), len(entered)
    visual = {column for columns in images for column in columns}
    llm, saw = model.model.language_model, []
    for number, layer in enumerate(llm.layers):
        groups = [[column] for column in range(len(hidden)) if column not in visual]
        for columns in images:
            tokens = [column for column in columns if column not in separators]
            blocks, rest = blocks_of(tokens, method.block)
            fine = range(len(blocks))
            if number >= method.layer and method.fine < len(blocks):
                middle = [members[(len(members) - 1) // 2] for members in blocks]
                asking = [column for column in range(columns[-1] + 1, prompt) if column not in visual] or [prompt - 1]
                states = {f"block {j}": coarse(hidden, members) for j, members in enumerate(blocks)}
                states |= {column: hidden[column] for column in asking}
                names = [f"block {j}" for j in range(len(blocks))]
                place = dict(zip(names, middle, strict=True)) | {column: column for column in asking}
                tables = ({name: table[column] for name, column in place.items()} for table in (cos, sin))
                fine = chosen(scores_of(layer, states, *tables, asking, names), method.fine)
            for j, members in enumerate(blocks):
                groups += [[member] for member in members] if j in fine else [members]
            groups += [[column] for column in rest]
            if len(fine) == len(blocks):
                groups += [[column] for column in columns if column in separators]
        # The layer sees a token for each group, in the order of the middle members.
        groups.sort(key=lambda members: members[(len(members) - 1) // 2])
        places = [members[(len(members) - 1) // 2] for members in groups]
        before = torch.stack([hidden[g[0]] if len(g) == 1 else coarse(hidden, g) for g in groups])
        mask = torch.full((len(groups), len(groups)), -torch.inf)
        for i, query in enumerate(places):
            for k, key in enumerate(places):
                if key <= query or (bidirectional and max(query, key) < prompt):
                    mask[i, k] = math.log(len(groups[k]))
        out = layer(
            before[None], attention_mask=mask[None, None], position_embeddings=(cos[places][None], sin[places][None])
        )
        after = (out if isinstance(out, torch.Tensor) else out[0])[0]
        for members, old, new in zip(groups, before, after, strict=True):
            for member in members:
                hidden[member] = new if len(members) == 1 else hidden[member] + (new - old)
        saw.append(len(groups))
        hidden = list(with_stream(torch.stack(hidden), seen, number, prompt))
    return model.lm_head(llm.norm(torch.stack(hidden)[None]))[0], saw
