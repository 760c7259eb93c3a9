"""Steps 2 and 3: a little text for the LLM, then the projector, then answering questions. The encoder is held."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vlmzip.mini.assets import Assets, shipped_assets
from vlmzip.mini.dice import Dice
from vlmzip.mini.drawing import draw
from vlmzip.mini.encoder import pixels_of
from vlmzip.mini.loop import Run, train_stage
from vlmzip.mini.model import visual_features
from vlmzip.mini.packing import IGNORE, Packed, Packer
from vlmzip.mini.questions import ask, ask_all
from vlmzip.mini.scene import Scene, make_scene
from vlmzip.mini.splits import TRAIN_LANGUAGE, VALIDATION, questions_of, train_seed
from vlmzip.mini.tokenizer import make_tokenizer
from vlmzip.mini.words import TYPES, with_article

CAPTION_QUESTION = "what do you see ?"
MOST_IN_CAPTION = 6


def training_questions(scene: Scene, most: int) -> list[tuple[str, str]]:
    """Up to `most` different (question, answer) pairs: one of each type, then more of any."""
    dice = Dice(scene.seed * 2 + 2_000_003)
    asked = ask_all(scene, dice, most)
    asked += [again for again in (ask(scene, dice, dice.pick(TYPES)) for _ in range(most - len(asked))) if again]
    return list({question.text: (question.text, question.answer) for question in asked}.values())


def caption(scene: Scene) -> str:
    """'a red circle , the number 34 , a blue dress .' from top to bottom."""
    shown = sorted(scene.things, key=lambda thing: thing.top)[:MOST_IN_CAPTION]
    return " , ".join(_described(thing.kind, thing.color, thing.name) for thing in shown) + " ."


def _described(kind: str, color: str, name: str) -> str:
    return f"the {color} number {name}" if kind == "number" else with_article(f"{color} {name}")


def answer_states(model: LlavaForConditionalGeneration, packed: Packed, visual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logits [answers words], wanted [answers]) at the tokens that have a label."""
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
    """Pictures with their packed questions, ready for the model."""

    def __init__(self, run: Run, model: LlavaForConditionalGeneration, assets: Assets) -> None:
        self.model, self.assets = model, assets
        self.device = run.processes.device
        self.most = run.recipe.questions
        tokenizer = make_tokenizer()
        self.with_picture = Packer(tokenizer, run.recipe.shape.visual_tokens)
        self.without_picture = Packer(tokenizer, 0)

    def features(self, scenes: list[Scene], assets: Assets) -> Tensor:
        with torch.no_grad():
            return visual_features(self.model, pixels_of([draw(scene, assets) for scene in scenes], self.device))

    def text_loss(self, numbers: range) -> Tensor:
        """Questions, answers and captions as text: every word is to be foretold from those before it."""
        scenes = _scenes(numbers)
        pairs = [[(CAPTION_QUESTION, caption(scene)), *training_questions(scene, self.most)] for scene in scenes]
        return self._loss(self.without_picture.pack(pairs, True, self.device), None)

    def caption_loss(self, numbers: range) -> Tensor:
        scenes = _scenes(numbers)
        pairs = [[(CAPTION_QUESTION, caption(scene))] for scene in scenes]
        return self._loss(self.with_picture.pack(pairs, False, self.device), self.features(scenes, self.assets))

    def answer_loss(self, numbers: range) -> Tensor:
        scenes = _scenes(numbers)
        pairs = [training_questions(scene, self.most) for scene in scenes]
        return self._loss(self.with_picture.pack(pairs, False, self.device), self.features(scenes, self.assets))

    def _loss(self, packed: Packed, visual: Tensor | None) -> Tensor:
        logits, wanted = answer_states(self.model, packed, visual)
        return F.cross_entropy(logits.float(), wanted)


def _scenes(numbers: range) -> list[Scene]:
    return [make_scene(train_seed(TRAIN_LANGUAGE, number)) for number in numbers]


def train_language(run: Run, model: LlavaForConditionalGeneration, assets: Assets, stop_at: int | None = None) -> None:
    """The stages after the encoder, each skipped if the run is past it. `stop_at` leaves within the instruct stage."""
    lessons = Lessons(run, model, assets)
    language: list[nn.Parameter] = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    projector: list[nn.Parameter] = list(model.model.multi_modal_projector.parameters())
    modules: dict[str, nn.Module] = {"model": model}
    if not run.finished("text"):
        train_stage(run, "text", modules, language, lessons.text_loss)
    if not run.finished("projector"):
        train_stage(run, "projector", modules, projector, lessons.caption_loss)
    report = _reporter(lessons)
    train_stage(run, "instruct", modules, [*language, *projector], lessons.answer_loss, report, stop_at)


def _reporter(lessons: Lessons) -> Callable[[int], str]:
    """Accuracy by type on validation pictures.

    Greedy decoding is right exactly if every word of the answer is the likeliest after the right words before it.
    """
    scenes = [make_scene(seed) for seed in VALIDATION[:90]]
    assets = shipped_assets("validation")

    @torch.no_grad()
    def report(done: int) -> str:
        right: dict[str, list[bool]] = {question_type: [] for question_type in TYPES}
        for start in range(0, len(scenes), 15):
            some = scenes[start : start + 15]
            asked = [questions_of(scene) for scene in some]
            pairs = [[(question.text, question.answer) for question in questions] for questions in asked]
            packed = lessons.with_picture.pack(pairs, False, lessons.device)
            with torch.autocast(lessons.device.type, torch.bfloat16):
                logits, wanted = answer_states(lessons.model, packed, lessons.features(some, assets))
            hits = torch.ones_like(packed.ids, dtype=torch.bool)
            hits[packed.labels != IGNORE] = logits.argmax(-1) == wanted
            for row, questions in enumerate(asked):
                for number, question in enumerate(questions, 1):
                    right[question.type].append(bool(hits[row][packed.part[row] == number].all()))
        everything = [hit for hits_of_type in right.values() for hit in hits_of_type]
        shown = " ".join(f"{name} {100 * sum(hits) / max(1, len(hits)):.0f}" for name, hits in right.items())
        return f"validation {100 * sum(everything) / len(everything):.1f} % ({shown})"

    return report
