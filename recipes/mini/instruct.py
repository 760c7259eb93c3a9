"""Steps 2 and 3: train the LLM on a little text, then the projector, then both on questions. The encoder is frozen."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from recipes.mini.encoder import pixels_of
from recipes.mini.loop import Run, train_stage
from recipes.mini.model import visual_features
from recipes.mini.packing import IGNORE, Packed, Packer
from recipes.mini.tokenizer import make_tokenizer
from vlmzip.mini.assets import Assets, shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.questions import ask, ask_all
from vlmzip.mini.rng import Rng
from vlmzip.mini.scene import SIDE, Scene, Thing, make_scene
from vlmzip.mini.splits import TRAIN_LANGUAGE, VALIDATION, questions_of, train_seed
from vlmzip.mini.words import TYPES

CAPTION_QUESTION = "what do you see ?"
MOST_IN_CAPTION = 6


def training_questions(scene: Scene, most: int) -> list[tuple[str, str]]:
    """Return up to `most` different (question, answer) pairs: one of each type, then more of any type."""
    rng = Rng(scene.seed * 2 + 2_000_003)
    questions = ask_all(scene, rng, most)
    more = (ask(scene, rng, rng.pick(TYPES)) for _ in range(most - len(questions)))
    questions += [question for question in more if question]
    return list({question.text: (question.text, question.answer) for question in questions}.values())


def captions(scene: Scene, count: int) -> list[tuple[str, str]]:
    """Return captions such as 'red circle top left , dress blue bottom right .'.

    Things come in any order, and their words in several orders. Each word is about the thing that the word before it
    names, which is the easiest way to learn to look things up.
    """
    rng = Rng(scene.seed * 2 + 4_000_003)
    return [(CAPTION_QUESTION, _caption(scene, rng)) for _ in range(count)]


def _caption(scene: Scene, rng: Rng) -> str:
    shown = rng.shuffled(scene.things)[:MOST_IN_CAPTION]
    return " , ".join(_described(thing, rng) for thing in shown) + " ."


def _described(thing: Thing, rng: Rng) -> str:
    x, y = thing.center
    place = f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"
    name = f"number {thing.name}" if thing.kind == "number" else thing.name
    order = rng.below(5)
    if order < 2:
        return f"{thing.color} {name} {place}"
    if order < 4:
        # "number red 347": first the word that identifies the thing, last the digits to read.
        first, *rest = name.split()
        return " ".join([first, thing.color, *rest, place])
    return f"{thing.color} {thing.kind} {place}"


def answer_states(model: LlavaForConditionalGeneration, packed: Packed, visual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits [answers words] and labels [answers] at the tokens that have a label."""
    inner = model.model
    embeddings = inner.get_input_embeddings()(packed.ids)
    if visual is not None:
        projected = inner.multi_modal_projector(visual)
        at = packed.ids == model.config.image_token_id
        embeddings = embeddings.masked_scatter(at[..., None], projected.to(embeddings.dtype))
    states = inner.language_model(
        inputs_embeds=embeddings,
        attention_mask=packed.mask(embeddings.dtype),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    known = packed.labels != IGNORE
    return model.lm_head(states[known]), packed.labels[known]


class Lessons:
    """The losses of the stages, on images with packed questions."""

    def __init__(self, run: Run, model: LlavaForConditionalGeneration, assets: Assets) -> None:
        self.model, self.assets = model, assets
        self.device = run.processes.device
        self.most = run.recipe.questions
        tokenizer = make_tokenizer()
        self.with_image = Packer(tokenizer, run.recipe.shape.visual_tokens)
        self.without_image = Packer(tokenizer, 0)

    def features(self, scenes: list[Scene], assets: Assets) -> Tensor:
        with torch.no_grad():
            return visual_features(self.model, pixels_of([draw(scene, assets) for scene in scenes], self.device))

    def text_loss(self, numbers: range) -> Tensor:
        """Return the loss of predicting every word of questions, answers and captions, without images."""
        pairs = [[*captions(scene, 1), *training_questions(scene, self.most)] for scene in _scenes(numbers)]
        return self._loss(self.without_image.pack(pairs, True, self.device), None)

    def caption_loss(self, numbers: range) -> Tensor:
        scenes = _scenes(numbers)
        return self._seen_loss(scenes, [captions(scene, 2) for scene in scenes])

    def answer_loss(self, numbers: range) -> Tensor:
        scenes = _scenes(numbers)
        return self._seen_loss(scenes, [training_questions(scene, self.most) for scene in scenes])

    def _seen_loss(self, scenes: list[Scene], pairs: list[list[tuple[str, str]]]) -> Tensor:
        return self._loss(self.with_image.pack(pairs, False, self.device), self.features(scenes, self.assets))

    def _loss(self, packed: Packed, visual: Tensor | None) -> Tensor:
        logits, labels = answer_states(self.model, packed, visual)
        return F.cross_entropy(logits.float(), labels)


def _scenes(numbers: range) -> list[Scene]:
    return [make_scene(train_seed(TRAIN_LANGUAGE, number)) for number in numbers]


def train_language(run: Run, model: LlavaForConditionalGeneration, assets: Assets, stop_at: int | None = None) -> None:
    """Run the stages after the encoder, without finished ones. `stop_at` ends the instruct stage early."""
    lessons = Lessons(run, model, assets)
    train_before_questions(run, model, lessons)
    learning, report = _llm_and_projector(model), _reporter(lessons)
    train_stage(run, "instruct", {"model": model}, learning, lessons.answer_loss, report, stop_at)


def train_before_questions(run: Run, model: LlavaForConditionalGeneration, lessons: Lessons) -> None:
    """Run the text and projector stages, without finished ones."""
    if not run.finished("text"):
        train_stage(run, "text", {"model": model}, _llm(model), lessons.text_loss)
    if not run.finished("projector"):
        # LLaVA freezes its LLM here. This LLM is new and must learn what to look for, together with the projector.
        train_stage(run, "projector", {"model": model}, _llm_and_projector(model), lessons.caption_loss)


def _llm(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    return [*model.model.language_model.parameters(), *model.lm_head.parameters()]


def _llm_and_projector(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    return [*_llm(model), *model.model.multi_modal_projector.parameters()]


def _reporter(lessons: Lessons) -> Callable[[int], str]:
    """Return a function that reports the accuracy by type on validation images.

    Greedy decoding gives the right answer exactly if each of its words is the most likely one after the words before.
    """
    scenes = [make_scene(seed) for seed in VALIDATION[:90]]
    assets = shipped_assets("validation")

    @torch.no_grad()
    def report(done: int) -> str:
        right: dict[str, list[bool]] = {question_type: [] for question_type in TYPES}
        for start in range(0, len(scenes), 15):
            some = scenes[start : start + 15]
            by_scene = [questions_of(scene) for scene in some]
            pairs = [[(question.text, question.answer) for question in questions] for questions in by_scene]
            packed = lessons.with_image.pack(pairs, False, lessons.device)
            with torch.autocast(lessons.device.type, torch.bfloat16):
                logits, labels = answer_states(lessons.model, packed, lessons.features(some, assets))
            hits = torch.ones_like(packed.ids, dtype=torch.bool)
            hits[packed.labels != IGNORE] = logits.argmax(-1) == labels
            for row, questions in enumerate(by_scene):
                for number, question in enumerate(questions, 1):
                    right[question.type].append(bool(hits[row][packed.part[row] == number].all()))
        everything = [hit for hits_of_type in right.values() for hit in hits_of_type]
        shown = " ".join(f"{name} {100 * sum(hits) / max(1, len(hits)):.0f}" for name, hits in right.items())
        return f"validation {100 * sum(everything) / len(everything):.1f} % ({shown})"

    return report
