"""A visit: count the tokens of an image, and answer a question with several methods one after another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.methods import FastV, NoCompression, VisionZip
from vlmzip.serving.playground.answering import Answer, Answerer
from vlmzip.serving.playground.cards import PLAIN, Card, Results, timing
from vlmzip.serving.playground.choices import Choice, configured, groups
from vlmzip.serving.playground.question import Asked, Reader
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.worker import HuggingFaceEngine

log = logging.getLogger(__name__)

#: Methods that are asked at a time at most.
MOST_METHODS = 8
#: The methods that are chosen at first, where they work: one before the LLM and one inside.
CHOSEN = (VisionZip.name(), FastV.name())
#: The share of the tokens that the budget has at first.
SHARE = 1 / 3
#: What a visitor reads of a defect.
FAILED = "failed with this image; the server's log says where"


@dataclass(frozen=True)
class Budget:
    """A budget in visual tokens."""

    keep: int
    remaining: bool
    """Whether it counts the tokens that remain after the method acts; otherwise the average over the LLM's layers."""


class Playground:
    """What the page does. It knows nothing of the page."""

    def __init__(self, engine: HuggingFaceEngine, settings: Settings) -> None:
        self.engine = engine
        self.groups = groups(engine.loaded, engine.methods.default)
        self.reader = Reader(engine, settings)
        self._answerer = Answerer(engine, settings)
        self._choices: dict[str, Choice] = {choice.name: choice for group in self.groups for choice in group.choices}

    @property
    def chosen(self) -> list[str]:
        """Return the methods that are chosen at first."""
        return [name for name in CHOSEN if name in self._choices] or list(self._choices)[:1]

    @property
    def usual_tokens(self) -> int:
        """Return the visual tokens of a common image of the model."""
        return self.engine.loaded.family.profile().size

    def count(self, url: str) -> int:
        """Return the visual tokens of an image or a clip. Raise `UserError` or `RequestError` if it cannot be used."""
        try:
            return self.reader.read(url, "").visual_tokens
        except (UserError, RequestError):
            raise
        except Exception as error:  # Gradio would print its text, which can quote the request
            log.error("counting failed in the playground", exc_info=error)
            raise RequestError(FAILED, 500) from None

    def run(self, url: str, question: str, budget: Budget, names: Sequence[str]) -> Iterator[Results]:
        """Yield the results so far: after each answer, those that are there, and empty cards for the others."""
        yield Results([Card(PLAIN), *map(Card, names)])
        try:
            asked = self._read(url, question, budget, names)
            plain = self._answerer.answer(asked, NoCompression())
        except (UserError, RequestError) as error:
            yield Results([Card("nothing to show", error=str(error))])
            return
        except Exception as error:  # as above
            log.error("the model failed in the playground", exc_info=error)
            yield Results([Card("nothing to show", error=FAILED)])
            return
        model = self.engine.loaded.model
        notes = [timing(model.device, model.dtype), *filter(None, [asked.note])]
        cards = [Card(PLAIN, plain), *map(Card, names)]
        yield Results(cards, notes)
        for place, name in enumerate(names, 1):
            cards[place] = self._card(asked, self._choices[name], budget, plain)
            yield Results(list(cards), notes)

    def _read(self, url: str, question: str, budget: Budget, names: Sequence[str]) -> Asked:
        for name in names:
            if name not in self._choices:
                raise UserError(f"there is no method {name[:100]!r} here")
        if len(names) > MOST_METHODS:
            raise UserError(f"{len(names)} methods are chosen; choose at most {MOST_METHODS} at a time")
        if not question.strip():
            raise UserError("type a question first")
        asked = self.reader.read(url, question)
        if not 1 <= budget.keep <= (most := asked.visual_tokens):
            raise UserError(f"the budget is {budget.keep:,} visual tokens; give 1 to {most:,}, as the image has")
        return asked

    def _card(self, asked: Asked, choice: Choice, budget: Budget, plain: Answer) -> Card:
        """Return the card of a method. An error in one method does not stop the others."""
        card = Card(choice.name, plain=plain)
        try:
            method, note = self._configured(asked, choice.method, budget)
            return replace(card, answer=self._answerer.answer(asked, method), note=note)
        except (UserError, RequestError) as error:
            return replace(card, error=str(error))
        except Exception as error:
            log.error("%s failed in the playground", choice.name, exc_info=error)
            return replace(card, error=FAILED)

    def _configured(self, asked: Asked, method: Compressor, budget: Budget) -> tuple[Compressor, str]:
        for stage in method.stages():
            if stage.sees_clip and asked.is_clip and asked.family.modality != "video":
                raise UserError(
                    f"{stage.name()} compares the frames of a video, and this model takes each frame as an image"
                )
        return configured(method, budget.keep, asked.profile, remaining=budget.remaining, is_clip=asked.is_clip)
