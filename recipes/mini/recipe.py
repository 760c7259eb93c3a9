"""Every number of mini's shape and training in one place: the shipped weights come from these defaults."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Shape:
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
    """One stage of training. The batch counts images over all processes."""

    steps: int
    learning_rate: float
    batch: int = 32
    warmup: int = 100
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Recipe:
    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    # Step 1 of LLaVA: a vision encoder. CLIP's is bought; mini's is trained on what each patch shows.
    encoder: RecipeStage = field(default_factory=lambda: RecipeStage(steps=3600, learning_rate=1e-3, warmup=150))
    # Steps of the encoder stage from which two of three images hold more numbers and items (which are learned last),
    # from which things crowd together as in the questions' images, and from which those two hold seven numbers.
    dense_from: int = 1200
    crowded_from: int = 2000
    numbers_from: int = 2400
    # The same lessons once more from a high learning rate: reading needs it, the rest was learned before.
    detail: RecipeStage = field(default_factory=lambda: RecipeStage(steps=1800, learning_rate=7e-4, warmup=100))
    # An LLM that has never seen a word has nothing to align to: a little text without images first.
    text: RecipeStage = field(default_factory=lambda: RecipeStage(steps=60, learning_rate=1e-3, warmup=10))
    # Step 2: captions, for the projector and for an LLM that has to learn what to look for.
    projector: RecipeStage = field(default_factory=lambda: RecipeStage(steps=350, learning_rate=1.5e-3, warmup=30))
    # Step 3: projector and LLM learn to answer, the encoder is held.
    instruct: RecipeStage = field(default_factory=lambda: RecipeStage(steps=1000, learning_rate=1.2e-3, warmup=40))
    questions: int = 12  # questions about an image in one training sequence
    save_every: int = 200  # steps between checkpoints

    def scaled(self, scale: float) -> "Recipe":
        """The same recipe with fewer steps, for trials and tests."""
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
