"""One playground on mini for the tests of a file."""

import pytest

from tests.serving.server.running import engine_of, image_url
from vlmzip.runtime.loading import load
from vlmzip.serving.playground.play import Playground
from vlmzip.serving.server.settings import Settings


@pytest.fixture(scope="session")
def mini():
    return load("mini")


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
