"""Step 1: train the vision encoder to predict what each patch shows and where it is.

The losses use the penultimate layer, which LLaVA passes on, and CLS of the penultimate and the last layer.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from recipes.mini.loop import Run, train_stage
from recipes.mini.recipe import Recipe
from recipes.mini.targets import IGNORE, NAMES, PRESENCE, Targets, targets
from vlmzip.mini.assets import Assets, shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import Scene, make_dense_scene, make_scene
from vlmzip.mini.splits import TRAIN_ENCODER, VALIDATION, train_seed
from vlmzip.mini.words import COLORS, MOST_DIGITS

GROUND_WEIGHT = 0.3
PLACE_WEIGHT = 2.0


class EncoderHeads(nn.Module):
    """Linear heads on the encoder's features. They are discarded after training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.name = nn.Linear(hidden, len(NAMES))
        self.color = nn.Linear(hidden, len(COLORS))
        self.digits = nn.Linear(hidden, MOST_DIGITS * 11)
        self.middle = nn.Linear(hidden, 1)
        # No norm here: LLaVA's projector gets the features without a norm, too.
        self.place = nn.Linear(hidden, 4)
        self.image = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, PRESENCE))
        self.last_image = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, PRESENCE))


def pixels_of(images: list[np.ndarray], device: torch.device) -> Tensor:
    """Return pixels from -1 to 1, [batch 3 96 96], as mini's processor makes them, from images uint8 [96 96 3]."""
    stacked = torch.from_numpy(np.stack(images)).to(device)
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def stacked_targets(scenes: list[Scene], rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return the targets of several scenes as tensors, by name; shapes as in `Targets`, with a batch dimension."""
    of_scenes: list[Targets] = [targets(scene, rows) for scene in scenes]
    fields = ("name", "color", "digits", "middle", "place", "presence")
    return {f: torch.from_numpy(np.stack([getattr(scene, f) for scene in of_scenes])).to(device) for f in fields}


def encoder_losses(
    model: LlavaForConditionalGeneration, heads: EncoderHeads, pixels: Tensor, target: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the losses of a batch, by name."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    penultimate, last = states[-2], states[-1]
    raw = penultimate[:, 1:]
    patches = heads.norm(raw)
    weights = torch.ones(len(NAMES), device=pixels.device)
    weights[0] = GROUND_WEIGHT
    thing = (target["name"] > 0).float()
    place = (heads.place(raw).float() - target["place"]).square()
    digits = heads.digits(patches).unflatten(-1, (MOST_DIGITS, 11))
    return {
        "name": F.cross_entropy(heads.name(patches).flatten(0, 1).float(), target["name"].flatten(), weights),
        "color": F.cross_entropy(
            heads.color(patches).flatten(0, 1).float(), target["color"].flatten(), ignore_index=IGNORE
        ),
        "digits": _mean_known(digits.flatten(0, 2).float(), target["digits"].flatten()),
        "middle": F.binary_cross_entropy_with_logits(
            heads.middle(patches)[..., 0].float(), target["middle"], pos_weight=torch.tensor(5.0, device=pixels.device)
        ),
        "own place": PLACE_WEIGHT * place[..., :2].mean(),
        "thing's place": PLACE_WEIGHT * (place[..., 2:].mean(-1) * thing).sum() / thing.sum().clamp(min=1),
        "image": F.binary_cross_entropy_with_logits(heads.image(penultimate[:, 0]).float(), target["presence"]),
        "last image": F.binary_cross_entropy_with_logits(heads.last_image(last[:, 0]).float(), target["presence"]),
    }


def _mean_known(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over the known targets. In a batch without targets it is 0 instead of NaN."""
    known = (target != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / known


def training_scene(number: int, recipe: Recipe) -> Scene:
    """Return a training scene: one like those of the questions, or a denser one if the recipe has it at that step."""
    seed = train_seed(TRAIN_ENCODER, number)
    step = number // recipe.encoder.batch
    crowded = step >= recipe.crowded_from
    if step < recipe.dense_from or number % 3 == 0:
        return make_scene(seed, crowded)
    if step < recipe.numbers_from:
        return make_dense_scene(seed, crowded)
    return make_dense_scene(seed, crowded, numbers=7, shapes=2)


def train_encoder(run: Run, model: LlavaForConditionalGeneration, assets: Assets, stop_at: int | None = None) -> None:
    """Run the encoder and detail stages, or the rest of them after the checkpoint. `stop_at` ends the first early."""
    device, recipe = run.processes.device, run.recipe
    torch.manual_seed(recipe.seed)
    heads = EncoderHeads(recipe.shape.hidden)
    heads.to(device)
    learning = [*model.model.vision_tower.parameters(), *heads.parameters()]
    modules: dict[str, nn.Module] = {"model": model, "heads": heads}
    report = _reporter(model, heads, recipe.shape.rows, device)

    def loss_from(first: int) -> Callable[[range], Tensor]:
        def loss_of(numbers: range) -> Tensor:
            scenes = [training_scene(first + number, recipe) for number in numbers]
            pixels = pixels_of([draw(scene, assets) for scene in scenes], device)
            losses = encoder_losses(model, heads, pixels, stacked_targets(scenes, recipe.shape.rows, device))
            return torch.stack(list(losses.values())).sum()

        return loss_of

    if not run.finished("encoder"):
        train_stage(run, "encoder", modules, learning, loss_from(0), report, stop_at)
    if stop_at is None:
        seen = recipe.encoder.steps * recipe.encoder.batch
        train_stage(run, "detail", modules, learning, loss_from(seen), report)


def _reporter(
    model: LlavaForConditionalGeneration, heads: EncoderHeads, rows: int, device: torch.device
) -> Callable[[int], str]:
    """Return a function that reports the losses and the position probe on validation images."""

    def report(done: int) -> str:
        scenes = [make_scene(seed) for seed in VALIDATION[:60]]
        pixels = pixels_of([draw(scene, shipped_assets("validation")) for scene in scenes], device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            losses = encoder_losses(model, heads, pixels, stacked_targets(scenes, rows, device))
        row, column = position_probe(model, pixels)
        shown = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
        return f"{shown}; position R² row {row:.3f} column {column:.3f}"

    return report


@torch.no_grad()
def position_probe(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[float, float]:
    """Return R² of linear fits of each patch's row and column on its feature, for images that the fit has not seen."""
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[
        model.config.vision_feature_layer
    ]
    features = features[:, 1:].float().cpu()
    images, tokens, _ = features.shape
    rows = round(tokens**0.5)
    place = torch.arange(tokens).repeat(images, 1)
    target = torch.stack([place // rows, place % rows], -1).float()
    ones = torch.ones(images, tokens, 1)
    inputs = torch.cat([features, ones], -1)
    half = images // 2
    fit = torch.linalg.lstsq(inputs[:half].flatten(0, 1), target[:half].flatten(0, 1)).solution
    rest, predicted = target[half:].flatten(0, 1), inputs[half:].flatten(0, 1) @ fit
    r2 = 1 - (rest - predicted).square().mean(0) / (rest - rest.mean(0)).square().mean(0)
    return float(r2[0]), float(r2[1])
