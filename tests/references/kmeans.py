"""A reference for k-means: loops over one image with an even start; empty clusters take the farthest token."""

import torch


def kmeans(features, clusters, iterations):
    """Return the token indices of each cluster, sorted by first member. `features` has shape [tokens, dim]."""
    tokens = range(len(features))
    centroids = [features[(2 * i + 1) * len(features) // (2 * clusters)] for i in range(clusters)]
    for _ in range(iterations):
        away = {t: [float((features[t] - c).square().sum()) for c in centroids] for t in tokens}
        members = [[] for _ in range(clusters)]
        for t in tokens:
            members[min(range(clusters), key=lambda i: away[t][i])].append(t)
        home = {t: i for i in range(clusters) for t in members[i]}
        stay = {min(own, key=lambda t: away[t][home[t]]) for own in members if own}
        for own in members:
            if not own:
                far = max((t for t in tokens if t not in stay), key=lambda t: away[t][home[t]])
                members[home[far]].remove(far)
                stay.add(far)
                own.append(far)
        centroids = [torch.stack([features[t] for t in own]).mean(0) for own in members]
    return sorted(members, key=min)
