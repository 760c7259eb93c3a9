"""All numbers of mini's shape and training. The shipped weights were trained with these defaults."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Shape:
    """The sizes of the model; images and patches are in pixels."""

    image: int = 96
    patch: int = 8
    hidden: int = 192
    heads: int = 6
    vision_layers: int = 6
    vision_mlp: int = 768
    text_layers: int = 8
    text_mlp: int = 512
    positions: int = 1024

    @property
    def rows(self) -> int:
        return self.image // self.patch

    @property
    def visual_tokens(self) -> int:
        return self.rows**2


@dataclass(frozen=True)
class RecipeStage:
    """A stage of training. `batch` is the number of images per step over all processes."""

    steps: int
    learning_rate: float
    batch: int = 32
    warmup: int = 100
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """The stages of the training, in order."""

    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    # Step 1: a vision encoder. LLaVA takes CLIP's; mini's is trained to predict what each patch shows.
    encoder: RecipeStage = field(default_factory=lambda: RecipeStage(steps=3600, learning_rate=1e-3, warmup=150))
    # Changes during the encoder stage, by first step:
    # dense_from: two of three images have more numbers and items, which are learned last;
    # crowded_from: things are close together, as in the images with questions;
    # numbers_from: the two of three images have seven numbers.
    dense_from: int = 1200
    crowded_from: int = 2000
    numbers_from: int = 2400
    # The same training again from a high learning rate. Reading numbers needs it; the rest is learned before.
    detail: RecipeStage = field(default_factory=lambda: RecipeStage(steps=1800, learning_rate=7e-4, warmup=100))
    # A little text without images: an untrained LLM has nothing that the projector could align to.
    text: RecipeStage = field(default_factory=lambda: RecipeStage(steps=60, learning_rate=1e-3, warmup=10))
    # Step 2: captions, for the projector and for the LLM, which must learn what to look for.
    projector: RecipeStage = field(default_factory=lambda: RecipeStage(steps=350, learning_rate=1.5e-3, warmup=30))
    # Step 3: projector and LLM learn to answer questions; the encoder is frozen.
    instruct: RecipeStage = field(default_factory=lambda: RecipeStage(steps=1000, learning_rate=1.2e-3, warmup=40))
    questions: int = 12  # questions per image in a training sequence
    save_every: int = 200  # steps between checkpoints

    def scaled(self, scale: float) -> "Recipe":
        """Return the same recipe with fewer steps, for trials and tests."""
        if scale == 1:
            return self
        stages = {name: getattr(self, name) for name in STAGES}
        shorter = {
            name: replace(stage, steps=max(2, round(stage.steps * scale)), warmup=max(1, round(stage.warmup * scale)))
            for name, stage in stages.items()
        }
        turns = {name: round(getattr(self, name) * scale) for name in ENCODER_TURNS}
        return replace(self, **shorter, **turns, save_every=max(1, round(self.save_every * scale)))


ENCODER_TURNS = ("dense_from", "crowded_from", "numbers_from")
STAGES = ("encoder", "detail", "text", "projector", "instruct")
