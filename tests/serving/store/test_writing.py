"""Stores are written whole, continued after any stop, and refuse to mix; damage is found."""

import hashlib
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image
from pyarrow import parquet
from safetensors.torch import load_file

from tests.families import FAMILIES
from tests.serving.store.stores import contents, loaded_of, write, write_images
from vlmzip import UserError, locks
from vlmzip.errors import Damaged, UnknownImage
from vlmzip.serving.store import Store, index, parts, reading, writing
from vlmzip.serving.store.image import checksum
from vlmzip.serving.store.reading import unused_bytes

COUNT = 9


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(FAMILIES["llava"]())


@pytest.fixture(scope="module")
def shared(tmp_path_factory, loaded):
    """A folder with images, and a store of them that was written without a stop. Tests get copies."""
    folder = tmp_path_factory.mktemp("shared")
    images = folder / "images"
    write_images(images, COUNT)
    (images / "3.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("no image either")
    (images / ".hidden.png").write_bytes(b"")
    write(images, folder / "whole", loaded)
    return folder


@pytest.fixture
def images(shared, tmp_path):
    return shutil.copytree(shared / "images", tmp_path / "images")


@pytest.fixture
def whole(shared, tmp_path):
    return shutil.copytree(shared / "whole", tmp_path / "whole")


def stop_at(monkeypatch, stop):
    """Let the write number `stop` of a run end it before the file is there; what was begun stays, as after a kill."""
    writes = iter(range(stop + 1))

    def interrupted(path, write):
        if next(writes) == stop:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.stem}-cut{path.suffix}").write_bytes(b"cut")
            raise KeyboardInterrupt
        whole(path, write)

    whole = parts.write_whole
    monkeypatch.setattr("vlmzip.serving.store.parts.write_whole", interrupted)
    monkeypatch.setattr("vlmzip.serving.store.index.write_whole", interrupted)


def refuse_wide(monkeypatch, loaded):
    """Let the processor refuse images 0 and 5."""
    process = type(loaded.processor).__call__

    def narrow(self, images=None, **settings):
        if any(image.size == (60, 40) for image in images):
            raise ValueError("images must be narrow")
        return process(self, images=images, **settings)

    monkeypatch.setattr(type(loaded.processor), "__call__", narrow)


@pytest.mark.parametrize("stop", range(11))
def test_a_run_that_was_stopped_anywhere_continues(images, whole, tmp_path, loaded, monkeypatch, stop):
    """Five parts make ten files, and the index is the last."""
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            write(images, tmp_path / "store", loaded)
    if stop < 10:
        with pytest.raises(UserError, match="is unfinished; run the same vlmzip encode again"):
            Store(tmp_path / "store")
    written = write(images, tmp_path / "store", loaded)
    assert contents(tmp_path / "store") == contents(whole)
    assert (written.stored, list(written.failed)) == (COUNT - 1, ["3.png"])


@pytest.mark.parametrize("stop", [3, 4])
def test_a_part_of_unreadable_images_keeps_its_number(images, tmp_path, loaded, monkeypatch, stop):
    """Three parts make five files, because the second has no shard, and the index is the last."""
    for number in range(6, COUNT):
        next(images.rglob(f"{number}.png")).unlink()
    (images / "2.png").write_bytes(b"no image")
    write(images, tmp_path / "whole", loaded)
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            write(images, tmp_path / "store", loaded)
    written = write(images, tmp_path / "store", loaded)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert (written.stored, list(written.failed)) == (4, ["2.png", "3.png"])
    shards = [path.name for path in sorted((tmp_path / "store" / "shards").iterdir())]
    assert shards == ["000000.safetensors", "000002.safetensors"]


@pytest.mark.parametrize("mended", [False, True])
def test_an_image_that_was_refused_is_tried_again_after_the_others(images, tmp_path, loaded, monkeypatch, mended):
    """A continued run tries it in a part of its own: the others are as without the stop."""
    (images / "3.png").unlink()
    with monkeypatch.context() as refusing:
        refuse_wide(refusing, loaded)
        (images / "0.png").rename(images / "1a.png")  # the first image is tried before the run
        write(images, tmp_path / "whole", loaded)
        with monkeypatch.context() as patch:
            stop_at(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                write(images, tmp_path / "store", loaded)
        if not mended:
            write(images, tmp_path / "store", loaded)
            assert contents(tmp_path / "store") == contents(tmp_path / "whole")
            return
    assert write(images, tmp_path / "store", loaded).failed == {}
    shards = [contents(tmp_path / name) for name in ("whole", "store")]
    assert all(shards[1][name] == content for name, content in shards[0].items() if "000001" in name)
    assert Store(tmp_path / "store").row("1a.png")["shard"] == "shards/000004.safetensors"


def test_a_second_run_changes_nothing_and_encodes_nothing(images, whole, loaded):
    before = contents(whole)
    written = write(images, whole, loaded)
    assert contents(whole) == before
    assert (written.stored, written.encoded) == (COUNT - 1, 0)


def test_parts_that_were_finished_in_another_order_give_the_same_store(images, whole, tmp_path, loaded, monkeypatch):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        stop_at(patch, 8)  # of five parts, four are done
        with pytest.raises(KeyboardInterrupt):
            write(images, store, loaded)
    (store / "unfinished" / "000001.parquet").unlink()  # as if other processes had been quicker
    write(images, store, loaded)
    assert contents(store) == contents(whole)


def test_new_images_are_added_and_mended_ones_tried_again(images, whole, loaded):
    before = contents(whole)
    Image.new("RGB", (48, 48), "red").save(images / "3.png")
    Image.new("RGB", (48, 48), "blue").save(images / "new.png")
    written = write(images, whole, loaded)
    assert (written.stored, written.encoded, written.failed) == (COUNT + 1, 2, {})
    after = contents(whole)
    assert {name for name in before if before[name] != after[name]} == {"index.parquet"}
    assert {"3.png", "new.png"} < set(Store(whole))


@pytest.mark.parametrize("size", [(60, 40), (50, 50)])
def test_an_image_that_changed_is_found(images, tmp_path, loaded, size):
    """It is found even if the file has the same length and the same time."""
    path = images / "0.bmp"
    Image.new("RGB", (60, 40), "red").save(path)
    write(images, tmp_path / "store", loaded)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    Image.new("RGB", size, "blue").save(path)
    os.utime(path, ns=times)
    assert write(images, tmp_path / "store", loaded).changed == ["0.bmp"]


def size(stored):
    return sum(values.nbytes for values in stored.tensors().values())


def change(images):
    """Change two images, remove two, of which one is alone in its shard, and add one."""
    for name in ("0.png", "4.png"):
        Image.new("RGB", (48, 48), "red").save(images / name)
    (images / "1.png").unlink()
    (images / "more" / f"{COUNT - 1}.png").unlink()
    Image.new("RGB", (48, 48), "blue").save(images / "new.png")


def test_images_that_changed_or_are_gone_keep_their_tokens(images, whole, loaded):
    before = {name: Store(whole).row(name) for name in Store(whole)}
    change(images)
    written = write(images, whole, loaded)
    assert (written.changed, written.gone) == (["0.png", "4.png"], ["1.png", f"more/{COUNT - 1}.png"])
    assert (written.encoded, written.removed, written.unused_bytes) == (1, 0, 0)
    after = Store(whole)
    assert {name: after.row(name) for name in before} == before
    assert set(after) == {*before, "new.png"}


def test_an_update_brings_the_store_to_the_state_of_the_folder(images, whole, tmp_path, loaded):
    before = contents(whole)
    unused = size(Store(whole)["4.png"])
    change(images)
    shard = whole / "shards" / "000002.safetensors"
    assert Store(whole).row("4.png")["shard"] == "shards/000002.safetensors"
    damage(whole / "shards" / "000003.safetensors", -1)
    mended = damaged(whole)
    assert len(mended) == 1
    written = write(images, whole, loaded, update=True)
    assert (written.changed, written.gone, written.encoded, written.removed) == ([], [], 4, 2)
    unused += size(Store(whole)[mended[0]])
    assert written.unused_bytes == unused
    assert damaged(whole) == []
    write(images, tmp_path / "fresh", loaded)
    store, fresh = Store(whole), Store(tmp_path / "fresh")
    assert set(store) == set(fresh)
    for name in fresh:
        assert store.row(name)["sha256"] == fresh.row(name)["sha256"]
        assert torch.allclose(store[name].features, fresh[name].features, atol=1e-5)
    assert shard.read_bytes() == before["shards/000002.safetensors"]  # its other image stays
    for number in (0, 4):  # no image uses them
        assert not (whole / "shards" / f"00000{number}.safetensors").exists()
    after = contents(whole)
    written = write(images, whole, loaded, update=True)
    assert (contents(whole), written.encoded, written.unused_bytes) == (after, 0, unused)


def test_shards_whose_images_are_all_in_use_are_not_opened_to_count_unused_bytes(whole, monkeypatch):
    rows = [Store(whole).row(name) for name in Store(whole)]
    opened, open_shard = [], reading.safe_open

    def counting(path, framework):
        opened.append(path.name)
        return open_shard(path, framework)

    monkeypatch.setattr(reading, "safe_open", counting)
    assert unused_bytes(whole, rows, 2) == 0
    assert opened == ["000001.safetensors", "000004.safetensors"]  # of 3.png, which cannot be read, and the last one
    opened.clear()
    (gone,) = (row for row in rows if row["path"] == "0.png")
    rows.remove(gone)
    assert unused_bytes(whole, rows, 2) == size(Store(whole)["0.png"])
    assert sorted(set(opened)) == ["000000.safetensors", "000001.safetensors", "000004.safetensors"]


@pytest.mark.parametrize("stop", range(5))
def test_an_update_that_was_stopped_anywhere_continues(images, whole, tmp_path, loaded, monkeypatch, stop):
    """Two parts make four files, and the index is the last."""
    change(images)
    store = shutil.copytree(whole, tmp_path / "store")
    write(images, whole, loaded, update=True)
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            write(images, store, loaded, update=True)
    assert set(Store(store)) == {f"{n}.png" for n in range(COUNT - 1) if n != 3} | {f"more/{COUNT - 1}.png"}
    write(images, store, loaded, update=True)
    assert contents(store) == contents(whole)


@pytest.mark.parametrize("left", ["unfinished", "unused shard"])
def test_an_update_that_was_stopped_after_the_index_continues(images, whole, tmp_path, loaded, monkeypatch, left):
    change(images)
    store = shutil.copytree(whole, tmp_path / "store")
    write(images, whole, loaded, update=True)
    unlink, wanted = Path.unlink, {"unfinished": "unfinished", "unused shard": "shards"}[left]

    def interrupted(path, **settings):
        if path.parent.name == wanted:
            raise KeyboardInterrupt
        unlink(path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(images, store, loaded, update=True)
    assert contents(store) != contents(whole)
    write(images, store, loaded, update=True)
    assert contents(store) == contents(whole)


def test_an_image_that_changes_again_after_its_part_was_finished(images, whole, loaded, monkeypatch):
    """The newer part gets a lower number, because an earlier update has removed a shard."""
    change(images)
    write(images, whole, loaded, update=True)
    assert not (whole / "shards" / "000000.safetensors").exists()
    kept = {name: (images / name).read_bytes() for name in ("2.png", "5.png")}
    for name in ("2.png", "5.png", "6.png"):
        Image.new("RGB", (48, 48), "green").save(images / name)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            write(images, whole, loaded, update=True)
    (whole / "unfinished" / "000000.parquet").unlink()  # as if another process had been slower
    for name, content in kept.items():
        (images / name).write_bytes(content)
    Image.new("RGB", (48, 48), "yellow").save(images / "6.png")
    assert write(images, whole, loaded, update=True).encoded == 1
    row = Store(whole).row("6.png")
    assert row["sha256"] == hashlib.sha256((images / "6.png").read_bytes()).hexdigest()
    assert row["shard"] == "shards/000000.safetensors"
    assert damaged(whole) == []


def test_an_update_forgets_an_image_that_cannot_be_read_any_more(images, whole, loaded):
    (images / "0.png").write_bytes(b"no image")
    written = write(images, whole, loaded, update=True)
    assert list(written.failed) == ["0.png", "3.png"]
    assert "0.png" not in Store(whole)


def test_a_store_below_the_images_is_allowed_and_one_around_them_is_not(images, loaded):
    write(images, images / "store", loaded)
    assert write(images, images / "store", loaded).encoded == 0
    for store in (images, images.parent, images / "store" / ".."):
        with pytest.raises(UserError, match="has the images in it"):
            write(images, store, loaded)


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_an_image_that_changes_while_it_is_encoded(images, tmp_path, loaded, monkeypatch, change):
    """The index describes the file whose tokens are stored."""
    path, encode = images / "2.png", parts.Encoder.encode
    before = path.read_bytes()

    def changing(self, of_batch):
        if of_batch[0].size == (30, 90):
            path.unlink(missing_ok=True)
            if change == "edit":
                Image.new("RGB", (48, 48)).save(path)
        return encode(self, of_batch)

    with monkeypatch.context() as patch:
        patch.setattr(parts.Encoder, "encode", changing)
        written = write(images, tmp_path / "store", loaded)
    assert (written.stored, list(written.failed)) == (COUNT - 1, ["3.png"])
    row = Store(tmp_path / "store").row("2.png")
    assert (row["sha256"], row["bytes"]) == (hashlib.sha256(before).hexdigest(), len(before))


def test_a_stored_image_that_cannot_be_read_any_more(images, whole, loaded, monkeypatch):
    (images / "1.png").unlink()
    monkeypatch.setattr(writing, "image_names", lambda folder: ["0.png", "1.png"])  # removed after this
    with pytest.raises(UserError, match=r"1\.png' cannot be read: No such file or directory"):
        write(images, whole, loaded)


def test_files_that_are_not_encoded(images, tmp_path, loaded, monkeypatch, caplog):
    """Hidden files and folders are left out, and files that only rarely used decoders read."""
    (images / "3.png").unlink()
    for name in (".thumbs/t.png", "more/.thumbs/deep/t.png", "page.pdf", "scan.TIF"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 48)).save(images / name)
    Image.new("RGB", (48, 48)).save(images / "drawing.png", format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # a call would raise an error
    written = write(images, tmp_path / "store", loaded)
    assert written.failed == {"drawing.png": "'drawing.png' is not a PNG, JPEG, WEBP, GIF or BMP image"}
    assert written.stored == COUNT - 1
    assert "encode takes PNG, JPEG, WEBP, GIF or BMP files; others are left out, such as 'page.pdf'" in caplog.text


def test_the_index_is_read_by_other_tools(images, whole):
    rows = {row["path"]: row for row in parquet.read_table(whole / "index.parquet").to_pylist()}
    assert sorted(rows) == list(rows)
    assert len(rows) == COUNT
    assert rows["3.png"]["error"] == "'3.png' is not a PNG, JPEG, WEBP, GIF or BMP image"
    name = f"more/{COUNT - 1}.png"
    row = rows[name]
    assert row["sha256"] == hashlib.sha256((images / name).read_bytes()).hexdigest()
    assert row["bytes"] == (images / name).stat().st_size
    assert (row["width"], row["height"]) == Image.open(images / name).size
    assert (row["tokens_before"], row["tokens_after"], row["error"]) == (36, 8, None)
    features = load_file(whole / row["shard"])[f"{row['name']}.features"]
    assert features.nbytes == row["token_bytes"]
    assert torch.equal(features, Store(whole)[name].features)


@pytest.mark.parametrize("method", ["visionzip(keep=9)", "kmeans(keep=8)"])
def test_another_method_is_refused(images, whole, loaded, method):
    with pytest.raises(
        UserError,
        match=r"was made with visionzip\(keep=8\), not with .*; give --method 'visionzip.*' and no --keep, or",
    ):
        write(images, whole, loaded, method)


def test_another_model_is_refused(images, whole, tmp_path):
    other = FAMILIES["llava"]()
    other.model.get_input_embeddings().weight.data[0] += 1
    with pytest.raises(UserError, match="made with another version of the model, not with llava: weights differ"):
        write(images, whole, loaded_of(other))
    with pytest.raises(UserError, match="weights differ; give the model of the store"):
        Store(whole).attach(loaded_of(other))


@pytest.mark.parametrize(("setting", "message"), [({"batch": 3}, "--batch 2"), ({"shard": 4}, "--shard 2")])
def test_other_groups_of_images_are_refused(images, whole, loaded, setting, message):
    with pytest.raises(UserError, match=f"was made with {message}; give it, or another --out"):
        write(images, whole, loaded, **setting)


def test_a_second_process_is_refused(images, whole, loaded, monkeypatch):
    monkeypatch.setattr(locks.FileLock, "acquire", lambda self: (_ for _ in ()).throw(locks.Timeout("")))
    with pytest.raises(UserError, match="another run is writing"):
        write(images, whole, loaded)


def test_images_that_the_method_refuses_are_left_out(tmp_path, images, loaded, monkeypatch):
    """One of the images of a batch cannot be encoded: the others can."""
    encode = parts.Encoder.encode

    def picky(self, of_batch):
        if any(image.size == (60, 40) for image in of_batch) and len(of_batch) != 1:
            raise UserError("too wide")
        if of_batch[0].size == (60, 40) and hasattr(self, "checked"):
            raise UserError("too wide")
        self.checked = True
        return encode(self, of_batch)

    monkeypatch.setattr(parts.Encoder, "encode", picky)
    written = write(images, tmp_path / "store", loaded)
    assert written.failed == {"0.png": "too wide", "5.png": "too wide", "3.png": written.failed["3.png"]}
    assert written.stored == COUNT - 3


def test_images_that_the_processor_refuses_are_left_out(tmp_path, images, loaded, monkeypatch):
    (images / "0.png").rename(images / "z.png")  # the first image is tried before the run
    refuse_wide(monkeypatch, loaded)
    written = write(images, tmp_path / "store", loaded)
    reason = "llava's processor refuses the image: failed with ValueError: images must be narrow"
    assert {name: written.failed[name] for name in ("z.png", "5.png")} == {"z.png": reason, "5.png": reason}
    assert written.stored == COUNT - 3


def test_no_image_that_can_be_read(tmp_path, loaded):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="there are no images in"):
        write(tmp_path / "images", tmp_path / "store", loaded)
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"can be read \(1 image found\)"):
        write(tmp_path / "images", tmp_path / "store", loaded)
    with pytest.raises(UserError, match="there is no folder"):
        write(tmp_path / "nothing", tmp_path / "store", loaded)


def test_a_full_disk_is_one_line_for_every_file(images, whole, tmp_path, loaded):
    """The limit of a file's length grows from run to run; each file is once the one that does not fit."""
    store, refused, sizes = tmp_path / "store", [], sorted({len(content) for content in contents(whole).values()})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, *sizes):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            write(images, store, loaded)
        except UserError as error:
            refused.append(re.fullmatch(rf"cannot write '{store}/(.+)': .*File too large", str(error))[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {Path(name).suffix for name in refused} == {".json", ".safetensors", ".parquet"}
    assert "index.parquet" in refused
    assert contents(store) == contents(whole)


# --- damage ------------------------------------------------------------------------------------------------------


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def damaged(store):
    return [damage.path for damage in Store(store).damaged() if damage is not None]


def test_a_flipped_byte_of_an_image_is_found(whole):
    assert damaged(whole) == []
    row = Store(whole).row("4.png")
    shard = whole / row["shard"]
    place = shard.read_bytes().index(load_file(shard)[f"{row['name']}.features"].numpy().tobytes())
    damage(shard, place + row["token_bytes"] // 2)
    assert damaged(whole) == ["4.png"]
    store = Store(whole)
    with pytest.raises(Damaged, match=r"'4.png' is damaged: its checksum is wrong"):
        store["4.png"]
    assert len(store["5.png"].places) == 8


def test_a_flipped_byte_anywhere_in_a_shard_is_found_or_harmless(whole, tmp_path):
    """Header, numbers and tokens: an image is as before, or damaged."""
    before = {name: image.tensors() for name, image in Store(whole).items()}
    shard = whole / "shards" / "000000.safetensors"
    content, found = shard.read_bytes(), 0
    store = Store(whole)
    for place in range(0, len(content), 37):
        damage(shard, place)
        bad = []
        for name in ("0.png", "1.png"):
            try:
                tensors = store[name].tensors()
            except Damaged:
                bad.append(name)
            else:
                assert all(torch.equal(value, before[name][key]) for key, value in tensors.items())
        found += bool(bad)
        shard.write_bytes(content)
    assert found > len(content) / 37 * 0.9


def test_a_flipped_byte_of_the_index_is_found_or_harmless(whole):
    path = whole / "index.parquet"
    content, before = path.read_bytes(), Store(whole)
    rows = [before.row(name) for name in before]
    found = 0
    places = range(4, len(content), 61)
    for place in places:
        damage(path, place)
        try:
            after = Store(whole)
        except UserError:
            found += 1
        else:
            bad = bool(damaged(whole))
            found += bad
            assert bad or [after.row(name) for name in after] == rows
        path.write_bytes(content)
    assert len(places) / 2 < found < len(places)


@pytest.mark.parametrize("content", [b"no index", None])
def test_a_damaged_index_is_refused_with_advice(whole, content):
    path = whole / "index.parquet"
    if content is None:
        parquet.write_table(parquet.read_table(path).drop_columns(["sha256"]), path)
    else:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"index\.parquet' .* the index of a store; encode the images into another store"
    ):
        Store(whole)


@pytest.mark.parametrize("place", ["{outside}", "../outside.safetensors", "shards/../../outside.safetensors"])
def test_an_index_cannot_name_a_file_outside_the_store(whole, tmp_path, place):
    """Even a file with the right tokens and a row with the right checksum are refused."""
    outside = tmp_path / "outside.safetensors"
    rows = index.read_rows(whole / "index.parquet")
    row = next(row for row in rows if row["path"] == "4.png")
    (whole / row["shard"]).rename(outside)
    tensors = {
        name.removeprefix(f"{row['name']}."): values
        for name, values in load_file(outside).items()
        if name.startswith(f"{row['name']}.")
    }
    row["shard"] = place.format(outside=outside)
    row["checksum"] = checksum(index.signed(row), tensors)
    index.write_rows(whole / "index.parquet", rows)
    with pytest.raises(Damaged, match=r"'4.png' is damaged: its shard .* is not a file of the store; encode it again"):
        Store(whole)["4.png"]


def test_a_shard_that_is_cut_or_missing_damages_its_images(whole):
    shard = whole / "shards" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert damaged(whole) == ["2.png"]
    shard.unlink()
    assert damaged(whole) == ["2.png"]


def test_a_damaged_description_is_refused(whole, images, loaded):
    path = whole / "store.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "batch": 3}))
    for use in (lambda: Store(whole), lambda: write(images, whole, loaded)):
        with pytest.raises(UserError, match=r"store\.json' is damaged: .* encode the images into another store"):
            use()
    path.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(UserError, match=r"newer than .*; update vlmzip"):
        Store(whole)


def test_names_that_the_store_does_not_have(whole, tmp_path):
    store = Store(whole)
    for name, message in {
        "4.pn": "did you mean '4.png'",
        "3.png": "is not in the store: ",
        "../x.png": "has no",
    }.items():
        assert name not in store
        with pytest.raises(UnknownImage, match=message):
            store[name]
        assert store.get(name) is None
    with pytest.raises(UnknownImage, match=r"has no image 'x{200}'$"):  # comparing long names with many takes long
        store["x" * 10**6]
    with pytest.raises(UserError, match=r"there is no folder .*; make a store with vlmzip encode"):
        Store(tmp_path / "nothing")
    shutil.rmtree(whole / "shards")
    assert len(store) == COUNT - 1


def test_a_folder_with_other_files_does_not_become_a_store(images, tmp_path, loaded):
    other = tmp_path / "model" / "shards" / "weights.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"weights")
    for update in (False, True):
        with pytest.raises(UserError, match=r"model' is no store, and it has 'shards' in it; give a new folder"):
            write(images, tmp_path / "model", loaded, update=update)
    assert contents(tmp_path / "model") == {"shards/weights.safetensors": b"weights"}
    (tmp_path / "empty").mkdir()
    write(images, tmp_path / "empty", loaded)


def test_an_open_store_says_that_another_run_has_changed_it(whole, images, loaded):
    store = Store(whole)
    for name in store:
        Image.open(images / name).rotate(180).save(images / name)
    write(images, whole, loaded, update=True)
    with pytest.raises(Damaged, match="has changed the store since it was opened; open it again"):
        store["4.png"]
    assert Store(whole)["4.png"].features.ndim == 2


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(whole, images, loaded):
    (images / "link.png").symlink_to(images / "nothing.png")
    written = write(images, whole, loaded)
    assert "link.png" in written.failed
    assert "link.png" not in Store(whole)
