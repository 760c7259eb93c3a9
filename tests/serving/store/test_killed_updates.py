"""Runs of `vlmzip encode --update` that are killed between any two changes of the store's files."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tests.serving.store.stores import contents
from vlmzip.cli.main import main
from vlmzip.mini.examples import CHOSEN, image
from vlmzip.serving.store import Store

pytestmark = pytest.mark.slow  # starts processes

#: The changes of the update's files: before each of them, a run is killed.
CHANGES = (
    "first shard",
    "rows of the first shard",
    "second shard",
    "rows of the second shard",
    "index",
    "first rows removed",
    "second rows removed",
    "folder of rows removed",
    "first unused shard removed",
    "second unused shard removed",
)
INDEX = CHANGES.index("index")
#: A question about `0.png`, and the answers before and after the update.
QUESTION, OLD_ANSWER, NEW_ANSWER = "what is the color of the boot ?", "yellow", "red"
SEED_OF_ANOTHER_BOOT = 3_000_015


def command(images, store, *more):
    """Return the arguments of a run. Images go through the encoder alone, so that their tokens are exactly the same."""
    return ["encode", str(images), "--out", str(store), "--keep", "16", "--batch", "1", "--shard", "2", *more]


def change(images):
    """Change two images, remove two, of which one is alone in its shard, and add one."""
    image(SEED_OF_ANOTHER_BOOT).save(images / "0.png")
    image(CHOSEN["cluttered"]).rotate(90).save(images / "4.png")
    (images / "1.png").unlink()
    (images / "6.png").unlink()
    image(CHOSEN["cluttered"]).rotate(180).save(images / "new.png")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A folder of images before and after changes, a store of each, and a store of the first that was updated."""
    root = tmp_path_factory.mktemp("stores")
    for state in ("old images", "new images"):
        (root / state).mkdir()
        image(CHOSEN["flat"]).save(root / state / "0.png")
        for number in range(1, 7):
            image(CHOSEN["cluttered"] + number).save(root / state / f"{number}.png")
    change(root / "new images")
    for state in ("old", "new"):
        assert main(command(root / f"{state} images", root / state)) == 0
    shutil.copytree(root / "old", root / "updated")
    assert main(command(root / "new images", root / "updated", "--update")) == 0
    return root


@pytest.fixture
def store(stores, tmp_path):
    return shutil.copytree(stores / "old", tmp_path / "store")


@pytest.fixture(scope="module")
def kill():
    """A function that runs an update, which is killed before a change, and returns its exit code."""
    words = [sys.executable, "-m", "tests.serving.store.killed"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as runs:

        def run(number, images, store):
            print(json.dumps([number, str(store), command(images, store, "--update")]), file=runs.stdin, flush=True)
            return int(runs.stdout.readline())

        yield run


def tokens(store):
    """Return the tensors of each image, and the checksum of its file."""
    store = Store(store)
    return {name: (store.row(name)["sha256"], store[name].tensors()) for name in store}


def assert_same(ours, theirs):
    """Compare images and tensors of two stores, exactly."""
    assert ours.keys() == theirs.keys()
    for name, (sha256, tensors) in theirs.items():
        assert ours[name][0] == sha256
        assert ours[name][1].keys() == tensors.keys()
        assert all(torch.equal(ours[name][1][key], values) for key, values in tensors.items())


def answer(store, capsys):
    capsys.readouterr()
    assert main(["ask", "--store", str(store), "0.png", QUESTION, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["answer"]


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=CHANGES)
def test_a_killed_update_leaves_a_right_store_and_continues(stores, kill, store, capsys, number):
    assert kill(number, stores / "new images", store) == -signal.SIGKILL
    state, expected = ("old", OLD_ANSWER) if number <= INDEX else ("new", NEW_ANSWER)
    assert_same(tokens(store), tokens(stores / state))
    assert main(["encode", "--verify", str(store)]) == 0
    assert answer(store, capsys) == expected
    assert main(command(stores / "new images", store, "--update")) == 0
    assert contents(store) == contents(stores / "updated")
    assert_same(tokens(store), tokens(stores / "new"))
    assert answer(store, capsys) == NEW_ANSWER


def test_a_run_is_killed_before_each_change_above(stores, kill, store):
    """No change is missing from the list: an update that is to be killed at the next one ends."""
    assert kill(len(CHANGES), stores / "new images", store) == 0
    assert contents(store) == contents(stores / "updated")


@pytest.mark.parametrize("number", [INDEX, INDEX + 1])
@pytest.mark.parametrize("more", [[], ["--update"]])
def test_images_that_change_back_after_the_kill(stores, kill, store, number, more):
    """Neither the finished parts of the killed run nor its index bring back what the folder does not have any more."""
    assert kill(number, stores / "new images", store) == -signal.SIGKILL
    assert main(command(stores / "old images", store, *more)) == 0
    if not more:  # images whose files differ keep their tokens, until an update
        assert set(Store(store)) == {*tokens(stores / "old"), "new.png"}
        assert main(command(stores / "old images", store, "--update")) == 0
    assert_same(tokens(store), tokens(stores / "old"))
    assert main(["encode", "--verify", str(store)]) == 0
    assert not (store / "unfinished").exists()
