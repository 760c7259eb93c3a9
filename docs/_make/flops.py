"""Write docs/flops.md, our count of prefill FLOPs beside the papers': `python docs/_make/flops.py`."""

from functools import cache
from pathlib import Path

import torch

from vlmzip import LLaVolta, NoCompression
from vlmzip.compressor import Profile
from vlmzip.keep import A_NINTH, count_to_keep
from vlmzip.lab.bench.presets import PRESETS, Preset, make_model
from vlmzip.lab.table import markdown
from vlmzip.models import family_of
from vlmzip.models.family import Family
from vlmzip.runtime.flops import flops_inside, llavolta_flops, prefill_flops, visionzip_flops
from vlmzip.runtime.token_profile import TokenProfile

PAGE = Path(__file__).resolve().parents[1] / "flops.md"
#: LLaVolta's printed TFLOPs (arXiv:2406.20092v2, Tables 2 and 5) by K and S; stride 1: no compression.
PRINTED = {(0, 1): 8.26, (2, 8): 2.14, (2, 4): 3.02, (2, 2): 4.77, (16, 8): 5.00, (16, 4): 5.47, (16, 2): 6.40}
#: Tokens of text with which one formula gives all of LLaVolta's figures, and the tokens of text of `vlmzip bench`.
LLAVOLTA_TEXT, BENCH_TEXT = 62, 64

HEAD = """# FLOPs: three ways to count the same prefill

Compare FLOPs across papers here, and see the limits that they set. `python docs/_make/flops.py` writes this page from
shapes alone; nothing is timed. Our count (`vlmzip.runtime.flops.prefill_flops`) comes from the model's own layers. It
is within 1 % of `torch.utils.flop_counter` on `mini` and, on the meta device, at the dimensions of LLaVA-1.5-7B and
13B (`tests/runtime/test_flops.py`).

## LLaVolta's printed figures

LLaVA-1.5-7B, 576 visual tokens, pooled at layer K with stride S; TFLOPs. *CR*: Eq. 3 of arXiv:2406.20092. *printed*:
its Tables 2 and 5. *VisionZip's*: T·(4nd² + 2n²d + 2ndm) of arXiv:2412.04467, n the visual tokens of each layer.
"""

DIFFERENCES = """
- **LLaVolta** prints figures but no formula. All seven lie within {worst:.3f} of 2·(4d² + 3dm) per token and layer
  with {text} tokens of text in the prompt (*as we read it*). This counts two operations for each multiply-add and all
  three MLP matrices of Llama, but neither the products between tokens (attention scores and their application) nor
  the output head. What we read as text is a constant in all seven figures. A vision encoder in the count would look
  the same, with about 30 tokens of text left. The paper does not say.
- **Our count** on the same tokens is larger by those products: {products:.2f} TFLOPs of {ours:.2f} without compression.
- **VisionZip's** formula counts a multiply-add once, and two MLP matrices where Vicuna has three. Its {zip:.2f} for
  576 visual tokens alone becomes {doubled:.2f} when doubled and {third:.2f} with the third matrix, which is our
  {visual:.2f}; the output head for the last token is too small to show. The formula leaves open whether n includes
  text; here it does not.
- VisionZip's count and ours use the full square of attention; a causal kernel may do half.
- So figures cannot be compared across papers, and ratios only for the same text, which no method compresses. From no
  compression to K=2 S=8 the printed ratio is {printed_ratio:.2f}, ours {our_ratio:.2f} with that text and
  {visual_ratio:.2f} without.

## The limits of a ninth

The table gives what `vlmzip bench` could reach with {bench} tokens of text and a ninth of the visual tokens before
the LLM, if time were proportional to FLOPs: TFLOPs of one prompt, and plain over compressed as the limit. *TTFT* adds
vision encoder and projector, but not the selection. *at 1/8*: the preset's limits with `--scale 1/8`, where products
between tokens weigh more.
"""


def scheme(layer: int, stride: int) -> tuple[int, ...]:
    """Return the visual tokens of LLaVA-1.5-7B at each layer."""
    method = NoCompression() if stride == 1 else LLaVolta(layer=layer, stride=stride)
    return tuple(method.tokens_by_layer(Profile(adapter_of("llava-1.5-7b").profile().grid, 32)))


@cache
def adapter_of(name: str, scale: float = 1.0) -> Family:
    """Return the family of a model without weights."""
    return family_of(make_model(PRESETS[name].scaled(scale).config(), "meta", torch.bfloat16, "eager"))


def printed_beside_ours() -> tuple[str, float]:
    """Return the table, and the largest error of our reading of LLaVolta's count."""
    family, preset, rows, worst = adapter_of("llava-1.5-7b"), PRESETS["llava-1.5-7b"], [], 0.0
    for (layer, stride), printed in PRINTED.items():
        profile = TokenProfile(576, scheme(layer, stride), LLAVOLTA_TEXT)
        read = llavolta_flops(profile.all, preset.width, preset.mlp) / 1e12
        ours, visual = (prefill_flops(family, tokens) / 1e12 for tokens in (profile.all, profile.visual))
        theirs = visionzip_flops(profile.visual, preset.width, preset.mlp) / 1e12
        worst = max(worst, abs(read - printed))
        name = "none" if stride == 1 else f"K={layer} S={stride}"
        cells = (printed, read, ours, visual, theirs)
        rows.append(
            [name, f"{sum(profile.visual):,}", f"{profile.compression_ratio:.2f}x", *(f"{c:.2f}" for c in cells)]
        )
    columns = ["scheme", "tokens over layers", "CR", "printed", "as we read it", "ours, with that text"]
    return markdown([*columns, "ours, visual tokens alone", "VisionZip's"], rows), worst


def differences(worst: float) -> str:
    family, preset, plain, pooled = adapter_of("llava-1.5-7b"), PRESETS["llava-1.5-7b"], [576] * 32, scheme(2, 8)
    zip_flops = visionzip_flops(plain, preset.width, preset.mlp)
    third = 2 * zip_flops + 2 * preset.width * preset.mlp * sum(plain)
    visual, with_text = prefill_flops(family, 576), prefill_flops(family, 576 + LLAVOLTA_TEXT)
    assert third + 2 * preset.width * family.llm_config.vocab_size == visual  # the page's steps must add up
    pooled_with_text = prefill_flops(family, TokenProfile(576, pooled, LLAVOLTA_TEXT).all)
    figures = dict(
        zip=zip_flops,
        doubled=2 * zip_flops,
        third=third,
        visual=visual,
        ours=with_text,
        products=4 * (576 + LLAVOLTA_TEXT) ** 2 * preset.width * 32,
    )
    return DIFFERENCES.format(
        worst=worst,
        text=LLAVOLTA_TEXT,
        bench=BENCH_TEXT,
        printed_ratio=PRINTED[0, 1] / PRINTED[2, 8],
        our_ratio=with_text / pooled_with_text,
        visual_ratio=visual / prefill_flops(family, pooled),
        **{name: value / 1e12 for name, value in figures.items()},
    )


def scopes(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return the FLOPs of LLM prefill and of TTFT, plain and at a ninth."""
    preset = PRESETS[name].scaled(scale)
    inputs = on_meta(preset)
    (family,) = adapter_of(name, scale).present_in(inputs)
    kept = preset.images * count_to_keep(A_NINTH, preset.grid.size)
    encoder = encoder_flops(family, inputs)
    out = []
    for tokens in (preset.visual_tokens, kept):
        prefill = prefill_flops(family, tokens + BENCH_TEXT)
        out.append((prefill, prefill + encoder + projector_flops(family, tokens)))
    return out


def on_meta(preset: Preset) -> dict[str, torch.Tensor]:
    """Return a prompt without values, except for the sizes of images, which a model reads."""
    inputs = preset.inputs(1, BENCH_TEXT, "cpu", torch.bfloat16)
    return {name: value if name.endswith("_grid_thw") else value.to("meta") for name, value in inputs.items()}


def encoder_flops(family: Family, inputs: dict[str, torch.Tensor]) -> int:
    """Return the FLOPs of the encoder, with its projector if that is a part of it."""
    encoder = family.vision_encoder
    for module in encoder.modules():
        if hasattr(module, "inv_freq"):  # its positions come from the sizes, which are on the CPU
            module.register_forward_pre_hook(lambda _, arguments: tuple(each.to("meta") for each in arguments))
    with torch.no_grad():  # eager attention: the counter sees its products on every device
        return flops_inside([encoder], lambda: family.get_features(**family.feature_arguments(inputs)))


def projector_flops(family: Family, tokens: int) -> int:
    """Return the FLOPs of a projector behind the encoder. One that joins patches is a part of it: 0."""
    projector = family.projector
    if projector in family.vision_encoder.modules():
        return 0
    features = torch.empty(tokens, family.vision_config.hidden_size, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        return flops_inside([projector], lambda: projector(features))


def limits() -> str:
    rows = []
    for name, preset in PRESETS.items():
        whole, eighth = scopes(name), scopes(name, 1 / 8)
        cells = [name, f"{preset.visual_tokens:,}"]
        for plain, compressed in zip(*whole, strict=True):
            cells += [f"{plain / 1e12:.2f}", f"{compressed / 1e12:.2f}", f"{plain / compressed:.2f}x"]
        rows.append(cells + [f"{plain / compressed:.2f}x" for plain, compressed in zip(*eighth, strict=True)])
    scope = ["compressed", "limit"]
    columns = ["preset", "visual tokens", "prefill", *scope, "TTFT", *scope, "prefill at 1/8", "TTFT at 1/8"]
    return markdown(columns, rows)


def page() -> str:
    table, worst = printed_beside_ours()
    return "\n".join([HEAD, table + differences(worst), limits()])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
