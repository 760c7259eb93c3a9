"""Every task and metric that the suites name is in the lmms-eval that is installed."""

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from vlmzip.lab.lmms.suites import SUITES


@pytest.fixture(scope="module")
def index():
    return TaskManager("ERROR").task_index


@pytest.mark.parametrize(
    "benchmark",
    [pytest.param(one, id=f"{suite.name}-{one.name}") for suite in SUITES.values() for one in suite.benchmarks],
)
def test_every_name_is_there(index, benchmark):
    assert index[benchmark.task]["type"] == "task"
    config = load_yaml_config(index[benchmark.task]["yaml_path"], mode="simple")
    assert benchmark.metrics
    assert set(benchmark.metrics) <= {metric["metric"] for metric in config["metric_list"]}


@pytest.mark.parametrize("name", ["tgif", "msvd", "msrvtt"])
def test_the_video_tasks_that_are_said_to_be_missing_are_missing(index, name):
    assert not [task for task in index if name in task.lower().replace("_", "").replace("-", "")]
