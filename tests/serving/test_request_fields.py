"""The rule of both engines for what a request may set, and what neither needs of the other."""

import subprocess
import sys

import pytest

from vlmzip.errors import UserError
from vlmzip.methods import KMeans
from vlmzip.serving.request_fields import refuse_fields
from vlmzip.serving.server.choose import Methods
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.vllm import setting


def test_both_engines_refuse_with_the_same_words():
    """Each names the fields that it permits."""
    from vlmzip.runtime.loading import load

    methods = Methods(load("mini").family, KMeans())
    with pytest.raises(RequestError) as server:
        methods.choose("kmeans(iterations=999)", None)
    with pytest.raises(UserError) as vllm:
        setting.read_request("kmeans(iterations=999)")
    message = "a request can set {} of kmeans, not iterations, which is set when the server starts"
    assert server.value.message == message.format("keep, keep_per_view or layer")
    assert str(vllm.value) == message.format("keep, keep_per_view or site")


def test_a_request_can_repeat_what_the_operator_has_set():
    refuse_fields(KMeans(iterations=999), [], known=[KMeans(iterations=999)])
    refuse_fields(KMeans(iterations=999), [], is_costly=lambda value: value != 999)
    refuse_fields(KMeans(iterations=999), ["iterations"])
    refuse_fields(KMeans(keep=9), [])
    with pytest.raises(UserError, match="not iterations"):
        refuse_fields(KMeans(iterations=999), [], known=[KMeans()])


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("vlmzip.serving.request_fields", "fastapi"), ("vlmzip.serving.vllm.setting", "fastapi"),
        ("vlmzip.serving.request_fields", "vllm"), ("vlmzip.serving.server.choose", "vllm"),
    ],
)  # fmt: skip
@pytest.mark.slow  # it starts a process
def test_no_engine_needs_the_packages_of_the_other(module, package):
    code = f"import sys; sys.modules[{package!r}] = None; import {module}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
