"""The methods that the page offers: those that work on the loaded model, in groups."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from vlmzip import outline, spec
from vlmzip.compressor import BudgetError, Compressor, Profile, missed
from vlmzip.errors import UnfitMethod, UserError
from vlmzip.models.family import Family
from vlmzip.runtime.fitting import fitted
from vlmzip.runtime.inputs import compress_inputs
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt_text import special_tokens, visual_prompt
from vlmzip.runtime.resample import resampling
from vlmzip.sites import Site

#: The headings of the groups, by the kind of method.
HEADINGS = {
    "prune": "Prune: drop tokens",
    "prune and merge": "Prune and merge",
    "merge": "Merge: join similar tokens",
    "pool": "Pool: join neighbouring tokens",
    "chain": "Chain: several methods",
}
#: What a budget counts: the two choices on the page.
REMAINING, AVERAGE = "after the method has acted", "on average over the LLM's layers"
#: The size of the image on which methods are tried.
TRIAL = (160, 120)


@dataclass(frozen=True)
class Choice:
    """A method on the page."""

    name: str
    method: Compressor
    label: str
    """The name, and what the method does in one line."""


@dataclass(frozen=True)
class Group:
    """Methods of one kind."""

    heading: str
    choices: Sequence[Choice]


def groups(loaded: Loaded, default: Compressor) -> list[Group]:
    """Return the methods that work on the model by kind. The server's `default` is among them under its own settings.

    Methods that need training are left out, and so are those for videos if the model takes none.
    """
    choices = {choice.name: choice for choice in _choices(loaded)}
    usual = choices.get(default.name())
    if not default.changes_nothing and (usual is None or _without_budget(default, usual.method) != usual.method):
        name = spec.write(default)
        choices[name] = Choice(name, default, f"{name}: the method of this server")
    by_heading: dict[str, list[Choice]] = {}
    for choice in sorted(choices.values(), key=lambda choice: list(HEADINGS).index(choice.method.kind)):
        by_heading.setdefault(HEADINGS[choice.method.kind], []).append(choice)
    return [Group(heading, of_kind) for heading, of_kind in by_heading.items()]


def _without_budget(method: Compressor, usual: Compressor) -> Compressor:
    """Return the method with the budget of another one of its class: the page sets the budget."""
    return method.with_fields(**{name: getattr(usual, name) for name in method.budget_fields})


def _choices(loaded: Loaded) -> Iterable[Choice]:
    summaries = {method.name: method.summary for method in outline.methods()}
    lacking = _lacking(loaded)
    for candidate in spec.candidates(None):
        method = candidate.method
        if method is None or method.trained_weights or _key(method) in lacking or not _fits(method, loaded.family):
            continue
        facts = ["inside the LLM"] if method.layers else []
        facts += ["ignores the budget"] if _ignores_budget(method, loaded.family.profile()) else []
        about = f" ({', '.join(facts)})" if facts else ""
        yield Choice(candidate.name, method, f"{candidate.name}{about}: {summaries[candidate.name].replace('`', '')}")


def _ignores_budget(method: Compressor, profile: Profile) -> bool:
    """Return whether the image decides how many tokens remain, so that the method keeps its own settings."""
    if method.videos_only or method.tokens_by_layer(profile) is not None:
        return False
    try:
        method.at_keep(profile.size, profile)
    except BudgetError:
        return True
    return False


def _fits(method: Compressor, family: Family) -> bool:
    if method.videos_only and len(family.modalities) < 2:
        return False
    try:
        fitted(method, family)
    except UserError:
        return False
    return True


def _key(method: Compressor) -> tuple[object, ...]:
    """Return what a method asks of the model. Methods that ask the same fit the same models."""
    return tuple((stage.site, stage.needs, stage.drops_patches) for stage in method.stages())


def _lacking(loaded: Loaded) -> set[tuple[object, ...]]:
    """Return the keys of methods before the LLM whose demands the model cannot meet. One method of each key is tried.

    Many demands, such as attention from CLS, can only be checked by running the vision encoder.
    """
    prompt = visual_prompt(loaded.family, loaded.processor, "", ["image"])
    settings = special_tokens(loaded.processor.tokenizer, prompt)
    image = Image.radial_gradient("L").convert("RGB").resize(TRIAL)
    inputs = loaded.processor(images=[image], text=prompt, return_tensors="pt", **settings)
    inputs = inputs.to(loaded.model.device, loaded.model.dtype)
    tried: dict[tuple[object, ...], bool] = {}
    for candidate in spec.candidates(None):
        method = candidate.method
        if method is None or _key(method) in tried or not _fits(method, loaded.family) or method.trained_weights:
            continue
        if all(stage.site is not Site.IN_LLM for stage in method.stages()):
            tried[_key(method)] = _runs(method, loaded, dict(inputs))
    return {key for key, runs in tried.items() if not runs}


def _runs(method: Compressor, loaded: Loaded, inputs: dict[str, object]) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compress_inputs(loaded.model, inputs, method)
    except UnfitMethod:
        return False
    except UserError:  # about this image, not about the model
        pass
    return True


def configured(
    method: Compressor, keep: int, profile: Profile, *, remaining: bool, is_clip: bool
) -> tuple[Compressor, str]:
    """Return the method at a budget, and a note if it misses the budget.

    `keep` counts the visual tokens that remain after the method acts, or the average over the layers of the LLM. A
    method whose image decides how many tokens remain keeps its own settings, and so does one with trained weights.
    Raise `BudgetError` if the method cannot meet the budget; the message says what to choose on the page.
    """
    if resampling(method) is not None:
        return method, "runs with its own settings, for which its weights were trained"
    if is_clip and method.videos_only:  # `at_budget` is about images, of which these methods keep all tokens
        return method.with_keep(keep), ""
    try:
        chosen, reached = (method.at_keep if remaining else method.at_budget)(keep, profile)
    except BudgetError as error:
        if method.videos_only or method.tokens_by_layer(profile) is not None:
            raise BudgetError(error.fact, advice=_advice(method, profile, remaining=remaining)) from None
        return method.placed(profile), "ignores the budget: the image decides how many tokens remain"
    return chosen, missed(keep, reached, profile)


def _advice(method: Compressor, profile: Profile, *, remaining: bool) -> str:
    """Return which budgets the method can meet, in the words of the page."""

    def is_met(keep: int) -> bool:
        try:
            (method.at_keep if remaining else method.at_budget)(keep, profile)
        except BudgetError:
            return False
        return True

    budgets = range(1, profile.size + 1)
    least = bisect_left(budgets, True, key=is_met)
    advice = [f"give a budget of {budgets[least]:,} or more"] if least < len(budgets) else []
    if not remaining and _advice(method, profile, remaining=True):
        advice.append(f"count the tokens {REMAINING}")
    return ", or ".join(advice)
