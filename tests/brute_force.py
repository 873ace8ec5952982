"""An independent statement of the paper's Eq. 3, in causal order and plain Python: the tests' own oracle."""

import numpy as np


def interleaved_tokens(ratio, num_sinks, num_units):
    """Every token in causal order: ("sink", index, unit -1), ("raw", index, unit), ("gist", unit, unit)."""
    tokens = [("sink", a, -1) for a in range(num_sinks)]
    for unit in range(num_units):
        tokens += [("raw", unit * ratio + j, unit) for j in range(ratio)]
        tokens.append(("gist", unit, unit))
    return tokens


def causal_order(layout, num_units):
    """Index into the gist-shifted segment of each of its positions in causal order, x … x g x … x g …."""
    raws = np.arange(num_units * layout.ratio).reshape(num_units, layout.ratio)
    gists = num_units * layout.ratio + np.arange(num_units)[:, None]
    return np.concatenate([raws, gists], axis=1).reshape(-1)


def sees(query, key, k, document):
    """Eq. 3 for two tokens of `interleaved_tokens`, given that the key is not after the query."""
    if key[0] == "sink":
        return True
    if query[0] == "sink":
        return False
    if document[query[2]] != document[key[2]]:
        return False
    return key[0] == "gist" or query[2] - k <= key[2] <= query[2]


def interleaved_mask(ratio, num_sinks, window, num_units, document=None):
    """bool [N, N] over `interleaved_tokens`."""
    document = [0] * num_units if document is None else list(document)
    tokens = interleaved_tokens(ratio, num_sinks, num_units)
    mask = np.zeros((len(tokens), len(tokens)), bool)
    for i, query in enumerate(tokens):
        for j in range(i + 1):
            mask[i, j] = sees(query, tokens[j], window // ratio, document)
    return mask


def interleaved_positions(ratio, num_sinks, num_units, document=None):
    """Rotary positions over `interleaved_tokens`: a counter over sinks and raws; a gist shares its successor's."""
    document = [0] * num_units if document is None else list(document)
    positions, raws = [], 0
    for kind, index, unit in interleaved_tokens(ratio, num_sinks, num_units):
        if kind == "sink":
            positions.append(index)
            continue
        if kind == "raw" and index % ratio == 0 and (unit == 0 or document[unit] != document[unit - 1]):
            raws = 0
        positions.append(num_sinks + raws)
        raws += kind == "raw"
    return np.array(positions)


def dense_attention(q, k, v, mask):
    """float64 softmax attention, q [N, Hq, D], k and v [M, Hkv, D], mask [N, M]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[-1])
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
    return out
