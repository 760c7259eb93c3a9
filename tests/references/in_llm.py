"""A reference for compressors inside the LLM: one row, no cache, and dropped tokens are masked instead of removed."""

import torch


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def queries_and_keys(layer, hidden, cos, sin):
    """Return the rotated queries and keys of a layer, shape [heads, length, head_dim]."""
    attention = layer.self_attn
    x = layer.input_layernorm(hidden[None])[0]
    query, key = (proj(x).unflatten(-1, (-1, attention.head_dim)) for proj in (attention.q_proj, attention.k_proj))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return rotated(query.transpose(0, 1), cos, sin), rotated(key.transpose(0, 1), cos, sin)


def attention_of(layer, hidden, cos, sin, mask):
    """Return the attention matrix of a layer, mean over heads, shape [length, length]."""
    query, key = queries_and_keys(layer, hidden, cos, sin)
    key = key.repeat_interleave(len(query) // len(key), 0)
    return ((query @ key.transpose(1, 2)) * layer.self_attn.head_dim**-0.5 + mask).softmax(-1).mean(0)


@torch.no_grad()
def logits_of(model, inputs, new_tokens, placeholder, images, rules, bidirectional=False, separators=()):
    """Return the logits at all positions of a row's prompt and `new_tokens`, and a mask of the remaining positions.

    `images` has the columns of each image. `separators` has the columns of newlines among them; they remain as long as
    all of the image's tokens do. `rules` has a function for each layer with a compressor. It gets the hidden states of
    an image's remaining tokens, the question's attention to them in the layer before, the image and the question at the
    input of the LLM, and then for both the keys in the layer before, with positions from 0, and the states after the
    LLM's norm. It returns groups, which are lists of (index, weight) with the anchor first. A rule that has
    `asks_next_layer` gets the attention of the layer itself, before its compressor drops tokens.
    """
    hidden, entered, cos, sin, seen = start(model, inputs, new_tokens)
    prompt, length = len(entered), len(hidden)
    allowed = torch.ones(length, length).tril().bool()
    if bidirectional:
        allowed[:prompt, :prompt] = True
    alive = torch.ones(length, dtype=torch.bool)
    places = [list(columns) for columns in images]
    visual = {column for columns in images for column in columns}
    attention = keys = None
    llm = model.model.language_model
    positions = seen["all_positions"]
    from_zero = [table[0] for table in llm.rotary_emb(hidden[None], position_ids=positions - positions[..., :1])]
    for number, layer in enumerate(llm.layers):
        if number in rules:
            hidden = hidden.clone()
            states = llm.norm(hidden)
            if getattr(rules[number], "asks_next_layer", False):
                attention = attention_of(layer, hidden, cos, sin, closed(allowed, alive))
            for image, columns in enumerate(places):
                last = int(alive[:prompt].nonzero()[-1])
                questions = [q for q in range(images[image][0], prompt) if q not in visual] or [last]
                whole = entered[list(images[image])]
                tokens = [column for column in columns if column not in separators]
                groups = rules[number](
                    hidden[tokens], attention[questions][:, tokens], whole, entered[questions],
                    keys[tokens], states[tokens], keys[questions], states[questions],
                )  # fmt: skip
                merged = {tokens[g[0][0]]: sum(w * hidden[tokens[i]] for i, w in g) for g in groups}
                newlines = [] if len(merged) < len(tokens) else [c for c in columns if c in separators]
                alive[columns] = False
                for anchor, state in merged.items():
                    hidden[anchor] = state
                places[image] = sorted([*merged, *newlines])
                alive[places[image]] = True
        mask = closed(allowed, alive)
        attention = attention_of(layer, hidden, cos, sin, mask)
        keys = queries_and_keys(layer, hidden, *from_zero)[1].transpose(0, 1).flatten(1)
        out = layer(hidden[None], attention_mask=mask[None, None], position_embeddings=(cos[None], sin[None]))
        hidden = (out if isinstance(out, torch.Tensor) else out[0])[0]
        hidden = with_stream(hidden, seen, number, prompt)
    return model.lm_head(llm.norm(hidden[None]))[0], alive


def closed(allowed, alive):
    """Return the values to add to attention logits. Tokens that are gone only see themselves and what remains."""
    seen = allowed & (alive | torch.eye(len(alive)).bool())
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def start(model, inputs, new_tokens):
    """Return the input of the LLM for a row with and without `new_tokens`, position tables, and the LLM's arguments."""
    seen = {}

    def capture(_module, _args, kwargs):
        seen.update(kwargs)

    llm = model.model.language_model
    handle = llm.register_forward_pre_hook(capture, with_kwargs=True)
    model(**inputs)
    handle.remove()
    entered, positions = seen["inputs_embeds"][0], seen["position_ids"]
    hidden = entered
    if positions is None:
        positions = torch.arange(len(hidden))[None]
    if len(new_tokens):
        hidden = torch.cat([hidden, model.get_input_embeddings()(new_tokens) * embedding_scale(model, inputs, hidden)])
        further = positions[..., -1:] + torch.arange(1, len(new_tokens) + 1)
        positions = torch.cat([positions, further], -1)
    cos, sin = (table[0] for table in llm.rotary_emb(hidden[None], position_ids=positions))
    seen["all_positions"] = positions
    return hidden, entered, cos, sin, seen


def with_stream(hidden, seen, number, prompt):
    """Return hidden states after layer `number` with what deepstack adds to the visual tokens there."""
    streams = seen.get("deepstack_visual_embeds") or []
    if number >= len(streams):
        return hidden
    hidden = hidden.clone()
    hidden[:prompt][seen["visual_pos_masks"][0]] += streams[number]  # features of an earlier layer of the encoder
    return hidden


def embedding_scale(model, inputs, hidden):
    """Return the factor by which the LLM scales embeddings; some families do so."""
    text = (inputs["input_ids"][0] != model.config.image_token_id).nonzero()[-1]
    plain = model.get_input_embeddings()(inputs["input_ids"][0, text])[0]
    return (hidden[text][0] @ plain) / (plain @ plain)
