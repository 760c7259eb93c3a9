"""One playground on mini for the tests of a file."""

import pytest

from tests.clips import with_videos
from tests.families.qwen2_5_vl import Qwen25VL
from tests.serving.server.running import engine_of, image_url
from vlmzip.models import family_of
from vlmzip.runtime.loading import Loaded, load
from vlmzip.serving.playground.play import Playground
from vlmzip.serving.server.settings import Settings


@pytest.fixture(scope="session")
def mini():
    return load("mini")


@pytest.fixture(scope="session")
def qwen():
    """A tiny model that takes clips."""
    family = Qwen25VL()
    return Loaded("tiny", family.model, with_videos(family, grid=(4, 4)), family_of(family.model))


@pytest.fixture(scope="module")
def engine(mini):
    engine = engine_of(mini, Settings())
    engine.start(lambda: None)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def playground(engine):
    return Playground(engine, Settings())


@pytest.fixture(scope="session")
def image():
    return image_url("flat")
