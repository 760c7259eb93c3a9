"""A reference for VisionZip: loops over one image, from the paper and a description of the authors' code."""

import torch


def visionzip(features, attention, keys, dominant, contextual, merge, cls=1):
    """Return the output tokens: the dominant ones, then the contextual ones.

    `features` is [cls + patches, dim], with CLS first if `cls` is 1 and without CLS if it is 0. `attention` is
    [heads, cls + patches], the row of CLS or the attention that each patch receives. `keys` is [cls + patches, key].
    """
    return torch.stack([token for _, token in placed(features, attention, keys, dominant, contextual, merge, cls)])


def visionzip_in_place(features, attention, keys, dominant, contextual, merge="reference"):
    """Return places and tokens of the variant for Qwen2.5-VL, with each contextual token at its target's place."""
    tokens = dict(placed(features, attention, keys, dominant, contextual, merge, cls=0))
    return sorted(tokens), torch.stack([tokens[place] for place in sorted(tokens)])


def placed(features, attention, keys, dominant, contextual, merge, cls):
    """Return the output tokens of `visionzip`, each with the index of its patch."""
    patches = range(cls, len(features))
    score = {j: sum(float(head[j]) for head in attention) for j in patches}
    best = sorted(patches, key=lambda j: score[j], reverse=True)[: dominant - cls]
    kept = sorted([*range(cls), *best])
    rest = [j for j in patches if j not in kept]
    out = [(j, features[j]) for j in kept]
    if contextual == 0:
        return out

    step = max(1, len(rest) // contextual)
    targets = [rest[k] for k in range(0, len(rest), step)][:contextual]
    clusters = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            similarity = {t: float(torch.cosine_similarity(keys[j], keys[t], dim=0)) for t in targets}
            clusters[max(targets, key=lambda t: similarity[t])].append(j)
    for t in targets:
        members = [features[j] for j in clusters[t]]
        if merge == "reference":
            out.append((t, features[t] + (torch.stack(members).mean(0) if members else 0)))
        else:
            out.append((t, torch.stack([features[t], *members]).mean(0)))
    return out


def visionzip_tiles(views, dominant, contextual, cols, merge="reference"):
    """Return the output tokens of an image with tiles: the base image first, then rows of `cols` tiles, all with a CLS.

    Each view is (features, attention, keys), as `placed` takes them. Behind the base image's tokens come the dominant
    patches of all tiles, in raster order over the whole image, then each tile's CLS, then each tile's contextual
    tokens. No row ends with a newline, and the padding of tiles counts as image.
    """
    side = round((len(views[0][0]) - 1) ** 0.5)
    base, *tiles = [placed(*view, dominant, contextual, merge, cls=1) for view in views]
    patches, contextual_tokens = [], []
    for number, tile in enumerate(tiles):
        for place, token in tile[1:dominant]:
            row = number // cols * side + (place - 1) // side
            col = number % cols * side + (place - 1) % side
            patches.append((row * cols * side + col, token))
        contextual_tokens += [token for _, token in tile[dominant:]]
    ordered = [token for _, token in sorted(patches, key=lambda one: one[0])]
    cls = [tile[0][1] for tile in tiles]
    return torch.stack([token for _, token in base] + ordered + cls + contextual_tokens)
