"""One server for the tests of a file."""

import httpx
import openai
import pytest

from tests.serving.server.running import engine_of, serving
from vlmzip.runtime.loading import load
from vlmzip.serving.server.settings import Settings


@pytest.fixture(scope="session")
def mini():
    return load("mini")


@pytest.fixture(scope="module")
def engine(mini):
    return engine_of(mini, Settings())


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine, Settings()) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
