"""Checks, by running it, that an unknown model is what the default family takes it for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmzip.errors import UnfitMethod, UserError
from vlmzip.models.encoder_run import flat, token_field
from vlmzip.models.llm_attention import Recorded
from vlmzip.models.recording import Recording, record
from vlmzip.models.towers.merging import BEHIND, Merging, layers_of, merging_inside
from vlmzip.models.towers.tower import OTHER_METHODS, Tower
from vlmzip.processor import InputDict
from vlmzip.visual_tokens import Grid

#: Number of queries whose attention is compared.
QUERIES = 8
#: The largest difference of a decoder layer's attention that rounding explains, as a share of the largest value.
TOLERANCE = 0.01
#: The rounding of TF32, in which GPUs may multiply float32 (`torch.set_float32_matmul_precision("high")`).
TF32_EPS = 2.0**-10


def maps_each_token(
    projector: nn.Module, recording: Recording, projected: Float[Tensor, "tokens llm_dim"]
) -> bool | None:
    """Return True if the projector maps each token by itself, and its output is what the model returns, `projected`.

    `recording` has input and output of the projector. The projector must compute the same for every other token alone
    as for all tokens. Return `None` if there is only one token, with which this cannot be checked.
    """
    features, output = recording.inputs.get("projector"), recording.outputs.get("projector")
    if not isinstance(features, Tensor) or not isinstance(output, Tensor) or min(features.ndim, output.ndim) < 2:
        return False
    features, output = features.flatten(0, -2), output.flatten(0, -2)
    if len(features) != len(projected) or not _are_close(output, projected):
        return False
    if len(features) == 1:
        return None
    every_other = slice(1, None, 2)
    try:
        with torch.no_grad(), evaluating(projector):
            together, alone = projector(features), projector(features[every_other])
    except Exception:  # the projector takes whole images or further arguments
        return False
    return isinstance(alone, Tensor) and _are_close(alone, together[every_other])


@dataclass(frozen=True)
class Behind:
    """A run of the model's own `get_image_features`, whose part behind one layer of the encoder has gradients."""

    recording: Recording
    """The queries, keys, values and arguments of the layer."""
    states: Tensor
    """The output of the layer: the features of patches."""
    features: Float[Tensor, "tokens llm_dim"]
    """The visual tokens of all images."""

    def touched(self, chosen: Bool[Tensor, " tokens"]) -> Bool[Tensor, "rows length"]:
        """Return True for the patches on which one of the chosen visual tokens depends."""
        weights = torch.randn(self.features.shape, generator=torch.Generator().manual_seed(0)) * chosen[:, None]
        total = (self.features * weights.to(self.features)).sum()
        (gradient,) = torch.autograd.grad(total, self.states, retain_graph=True)
        marks = gradient.abs().amax(-1).gt(0)
        return marks if marks.ndim == 2 else marks[None]

    def some(self) -> Bool[Tensor, " tokens"]:
        """Return a random half of the visual tokens, the first among them."""
        chosen = torch.rand(len(self.features), generator=torch.Generator().manual_seed(0)) < 0.5
        chosen[0] = True
        return chosen


@contextmanager
def run_behind(get_image_features: Any, tower: Tower, arguments: InputDict, layer: int) -> Iterator[Behind]:
    """Run `get_image_features` with gradients from the output of a layer on, inside the block."""
    attention = tower.attentions[layer]
    outputs, called = tower.modules([layer], values=True)
    if attention.output is not None:
        called["after"] = attention.output
    states: list[Tensor] = []
    thread = get_ident()

    def cut(
        _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...] | None:
        if get_ident() != thread:
            return None
        states[:] = [(output if isinstance(output, Tensor) else output[0]).detach().requires_grad_()]
        torch.set_grad_enabled(True)  # from here on; the context below turns it off
        return states[0] if isinstance(output, Tensor) else (states[0], *output[1:])

    handle = attention.layer.register_forward_hook(cut, prepend=True)  # before hooks that keep hidden states
    try:
        # Tensors made in inference mode take no part in gradients, but their copies do.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            evaluating(tower.encoder),
            record(outputs, called) as recording,
        ):
            copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
            output = get_image_features(**copies, return_dict=True)
            yield Behind(recording, states[0], flat(output[token_field(output)]))
    finally:
        handle.remove()


def check_attention(tower: Tower, recording: Recording, layer: int) -> None:
    """Raise `UserError` unless queries, keys, values and mask of a layer, as recorded, give what the layer computes."""
    if not _computes_the_same(tower, recording, layer):
        raise UnfitMethod(
            f"the attention of {type(tower.encoder).__name__} is of a kind that vlmzip does not know: {OTHER_METHODS}"
        )


def check_merging(tower: Tower, run: Callable[[], object], tokens: int) -> None:
    """Raise `UserError` unless the layers of the encoder work as `Merging` takes them.

    `run` runs the encoder on one view, which has `tokens` tokens. The first layer must add to the scores what it gets
    as a mask, and must return the input of the norm before the MLP plus the output of the MLP. All layers must be of
    its kind.
    """
    layers = layers_of(tower, tower.depth)
    first = layers[0]
    outputs, called = tower.modules([0], values=True)
    outputs |= {"mlp": first.mlp, "layer": first.module}
    called |= {"between": first.between}
    if first.attention.output is not None:
        called["after"] = first.attention.output
    if len(layers) > 1:
        called["second"] = layers[1].module  # the run ends here
    # Sizes of 1 and 2, but nothing is merged.
    sizes = torch.arange(tokens, dtype=torch.float32)[None] % 2 + 1
    merging = Merging([tokens], _join_none, torch.arange(tokens), sizes=sizes)
    with (
        torch.no_grad(),
        evaluating(tower.encoder),
        record(outputs, called, stop_at="second") as recording,
        merging_inside(tower, merging),
    ):
        run()
    check_attention(tower, recording, 0)
    expected = recording.inputs["between"] + recording["mlp"]
    if any(type(layer.module) is not type(first.module) for layer in layers) or not _are_close(
        expected, recording["layer"]
    ):
        raise UnfitMethod(f"vlmzip does not know the layers of {type(tower.encoder).__name__}: {BEHIND}")


def _join_none(keys: Tensor, sizes: Tensor, prefix: int, count: int) -> Tensor:
    return torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])


def makes_squares(behind: Behind, tower: Tower, grids: Sequence[Grid]) -> bool:
    """Return True if the patches of each visual token are those that `tower.by_token` takes."""
    chosen = behind.some()
    by_token = tower.by_token(behind.touched(chosen).float(), grids, 0).cpu()
    return torch.equal(by_token, chosen.float())


def tokens_of_patches(behind: Behind, tower: Tower) -> Int[Tensor, "rows length"]:
    """Return the number of the visual token that each patch makes, or -1 for CLS, registers and padding.

    Gradients show it. The numbers of the tokens are written in bits, and for each bit the tokens that have it are
    chosen: a patch gets the bits of its token. Raise `UserError` if a patch makes several tokens, or if no patch makes
    a token.
    """
    count = len(behind.features)
    numbers = torch.arange(count)
    of_patch = behind.touched(torch.ones(count, dtype=torch.bool)).long() - 1  # 0 for patches of some token
    for bit in range((count - 1).bit_length()):
        of_patch += behind.touched((numbers >> bit) % 2 == 1).long() << bit
    made = of_patch[of_patch >= 0]
    lacking = count - len(made.unique())
    chosen = behind.some().to(of_patch.device)
    if int(made.max()) >= count or not torch.equal((of_patch >= 0) & chosen[of_patch], behind.touched(chosen.cpu())):
        raise UnfitMethod(
            f"{type(tower.encoder).__name__} gives patches that make several visual tokens each, as cross-attention"
            f" does: {OTHER_METHODS}"
        )
    if lacking:
        raise UnfitMethod(
            f"{lacking} of {count} visual tokens are made of no patch of {type(tower.encoder).__name__}, such as the"
            f" ends of rows: {OTHER_METHODS}"
        )
    return of_patch


def check_llm_attention(layer: nn.Module, record: Recorded, mask: Tensor | None) -> None:
    """Raise `UserError` unless a layer computes its attention from recorded queries and keys, and from `mask`, alone.

    The layer's own attention function gets what was recorded. Some add terms to the scores, or take fewer tokens than
    the mask allows. `mask` is the mask that the layer gets. Run this without tokens in the KV cache.
    """
    attention: Any = layer.self_attn
    source, implementation = vars(sys.modules[type(attention).__module__]), attention.config._attn_implementation
    known = source.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = known.get_interface(implementation, source.get("eager_attention_forward"))
    query, key, value = record.query, record.key, record.value
    is_flash = "flash" in (implementation or "")
    if not is_flash:  # only FlashAttention needs half precision
        query, key, value = query.float(), key.float(), value.float()
    options = {**record.options, "dropout": 0.0}
    try:
        with torch.autocast(query.device.type, enabled=False):
            expected = function(attention, query, key, value, record.mask, scaling=record.scale, **options)[0]
    except torch.OutOfMemoryError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError):
        expected = None
    if expected is not None:
        computed, real = _last_queries(query.float(), key.float(), value.float(), mask, record.scale)
        expected = expected[:, -QUERIES:].float()
        bound = (10 if is_flash else 1) * TOLERANCE * expected.abs().amax()
        if expected.shape == computed.shape and bool(((computed - expected).abs()[real] <= bound).all()):
            return
    raise UnfitMethod(
        f"the attention of {type(layer).__name__} is more than a softmax of queries and keys: choose a method that does"
        " not look at the question's attention, or a site before the LLM"
    )


def _last_queries(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Float[Tensor, "batch queries heads dim"], Bool[Tensor, "batch queries"]]:
    """Return the attention outputs of the last queries, and True for the queries that may attend to a token."""
    length = key.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()[-QUERIES:]
    if mask is None:
        allowed = causal.expand(len(key), 1, -1, -1)
    elif mask.ndim == 2:  # FlashAttention's mask of padding
        allowed = causal & mask.bool()[:, None, None]
    else:
        mask = mask.expand(len(key), -1, -1, -1)[:, :, -QUERIES:]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    shared = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = (query[:, :, -QUERIES:] @ keys.transpose(2, 3) * scale).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ values).transpose(1, 2), allowed.any(-1).all(1)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradient checkpointing in these modules, whose results could not be compared otherwise."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _computes_the_same(tower: Tower, recording: Recording, layer: int) -> bool:
    """Return True if queries, keys, values and mask give the recorded input of the projection after the attention."""
    attention = tower.attentions[layer]
    if "after" not in recording.inputs:
        return False
    query, key = tower.queries_and_keys(recording, layer)
    length = tower.sequences(recording, layer, key.shape[1])[0]
    queries = min(length, QUERIES)
    by_head = (
        states[:, :count].float().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for states, count in ((query, queries), (key, length), (tower.part(recording, layer, 2), length))
    )
    query, key, value = by_head
    scores = query @ key.transpose(2, 3) * attention.scale
    mask = tower.mask(recording, layer)
    if mask is not None:
        scores = scores + mask[..., :queries, :length].to(scores.dtype)
    expected = recording.inputs["after"]
    expected = (expected if expected.ndim == 3 else expected[None])[:, :queries]
    computed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return _are_close(computed.to(expected.dtype), expected)


def _are_close(computed: Tensor, expected: Tensor) -> bool:
    """Return True if two results differ only by rounding. Raise `UserError` if the expected one is not finite."""
    if computed.shape != expected.shape:
        return False
    tolerance = _rounding(expected.dtype) * expected.abs().max().item()
    if not math.isfinite(tolerance):
        raise UserError(
            "the vision encoder gives values that are infinite or not a number, so vlmzip cannot check what it"
            " computes: check the pixels, and load the model in bfloat16 or float32"
        )
    return torch.allclose(computed, expected, rtol=0, atol=tolerance)


def _rounding(dtype: torch.dtype) -> float:
    """Return how far results in `dtype` may be apart, relative to the largest.

    In half precision, the last rounding is larger than all others together. Sums in float32 differ by their order.
    Results in float64 are compared with ours in float32.
    """
    if dtype.itemsize < torch.float32.itemsize:
        return 4 * torch.finfo(dtype).eps
    matmul = torch.backends.cuda.matmul
    has_precision = hasattr(matmul, "fp32_precision")  # since torch 2.9, where the old name warns beside the new one
    uses_tf32 = matmul.fp32_precision == "tf32" if has_precision else matmul.allow_tf32
    return 4 * TF32_EPS if uses_tf32 else 32 * torch.finfo(torch.float32).eps
