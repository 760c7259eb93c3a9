"""Put the playground on a server. This module imports Gradio only when it is needed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from fastapi import FastAPI

from vlmzip.errors import UserError, how_to_install
from vlmzip.serving.playground.examples import Example
from vlmzip.serving.playground.play import Playground
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.worker import HuggingFaceEngine


def mount(app: FastAPI, engine: HuggingFaceEngine, settings: Settings, examples: Sequence[Example] = ()) -> None:
    """Put the playground at /playground of a server. Call it before the engine starts: it tries methods on the model.

    Raise `UserError` if Gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise UserError(f"the playground needs Gradio: {how_to_install('playground')}")
    # Gradio reads both when it is imported. It makes an empty folder, which the end of the server removes.
    app.state.playground_folder = folder = TemporaryDirectory(prefix="vlmzip-playground-")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder.name}
    from vlmzip.serving.playground.page import put_on  # imports Gradio, an optional package that takes seconds

    put_on(app, Playground(engine, settings), settings, examples)
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def removing(app: FastAPI) -> AsyncIterator[Any]:
        try:
            async with lifespan(app) as state:
                yield state
        finally:
            folder.cleanup()

    app.router.lifespan_context = removing
