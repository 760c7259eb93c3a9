"""The training command in miniature: it resumes exactly, exports, and what it exports loads."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.mini.encoder import position_probe, train_encoder
from recipes.mini.instruct import answer_states, train_language, training_questions
from recipes.mini.loop import CHECKPOINT, Run, learning_rate
from recipes.mini.model import make_model, plane_waves, visual_features
from recipes.mini.packing import IGNORE, Packer
from recipes.mini.processes import join_processes, share
from recipes.mini.recipe import STAGES, Recipe, RecipeStage, Shape
from recipes.mini.sources import find_fashion_mnist
from recipes.mini.tokenizer import make_tokenizer
from recipes.mini.train import train
from vlmzip.errors import UserError
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.scene import make_scene


def tiny_recipe() -> Recipe:
    stage = RecipeStage(steps=4, learning_rate=1e-3, batch=2, warmup=1)
    shape = Shape(hidden=32, heads=1, vision_layers=2, vision_mlp=32, text_layers=1, text_mlp=32)
    stages = dict.fromkeys(STAGES, stage)
    return replace(Recipe(), shape=shape, questions=3, save_every=1, dense_from=1, crowded_from=2, **stages)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder: Path, stop_encoder: int | None = None, stop_language: int | None = None) -> dict[str, torch.Tensor]:
    """One call of the training, as from the command line; leaves early where told to."""
    recipe = tiny_recipe()
    folder.mkdir(exist_ok=True)
    run = Run(folder, recipe, join_processes())
    model = make_model(recipe.shape, recipe.seed)
    run.load_model(model)
    if not run.finished("detail"):
        train_encoder(run, model, shipped_assets("validation"), stop_encoder)
    if stop_encoder is None:
        train_language(run, model, shipped_assets("validation"), stop_language)
    return model.state_dict()


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "killed", stop_encoder=2)
    trained(tmp_path / "killed", stop_language=3)
    resumed = trained(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    trained(tmp_path, stop_encoder=2)
    (tmp_path / CHECKPOINT).with_suffix(".partial").write_bytes(b"half")
    run = Run(tmp_path, tiny_recipe(), join_processes())
    assert run.saved is not None
    assert run.saved["step"] == 2


def test_another_recipe_does_not_resume_in_the_same_folder(tmp_path: Path) -> None:
    trained(tmp_path, stop_encoder=1)
    other = replace(tiny_recipe(), encoder=RecipeStage(steps=9, learning_rate=1e-3, batch=2))
    with pytest.raises(UserError, match="another encoder"):
        Run(tmp_path, other, join_processes())
    later = replace(tiny_recipe(), instruct=RecipeStage(steps=9, learning_rate=1e-3, batch=2))
    assert Run(tmp_path, later, join_processes()).saved is not None


@pytest.mark.slow
def test_training_exports_a_model_that_loads(tmp_path: Path) -> None:
    folder = train(tmp_path, tiny_recipe(), shipped_assets("validation"))
    model, about = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert model.dtype == torch.float32
    assert AutoProcessor.from_pretrained(folder).image_token == "<image>"


def test_each_process_takes_its_share_of_a_step() -> None:
    processes = [SimpleNamespace(num_processes=2, process_index=index) for index in (0, 1)]
    assert [number for process in processes for number in share(process, 8, 3)] == list(range(24, 32))


def test_learning_rate_rises_then_falls() -> None:
    stage = RecipeStage(steps=100, learning_rate=1.0, warmup=10)
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02


def test_packed_questions_get_the_logits_they_get_alone() -> None:
    """A question in a pack must not see the others, and must stand where it would stand alone."""
    recipe = tiny_recipe()
    model = make_model(recipe.shape, 1).eval()
    scenes = [make_scene(seed) for seed in range(2)]
    pairs = [training_questions(scene, 4) for scene in scenes]
    visual = torch.randn(2, 144, 32, generator=torch.Generator().manual_seed(0))
    packer = Packer(make_tokenizer(), recipe.shape.visual_tokens)
    device = torch.device("cpu")
    with torch.no_grad():
        together, _ = answer_states(model, packer.pack(pairs, False, device), visual)
        alone = [
            answer_states(model, packer.pack([[pair]], False, device), visual[row : row + 1])[0]
            for row in range(2)
            for pair in pairs[row]
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_packed_question_is_what_the_processor_would_make() -> None:
    tokenizer = make_tokenizer()
    packed = Packer(tokenizer, 144).pack([[("what item is there ?", "bag")]], False, torch.device("cpu"))
    prompt = "USER: " + "<image>" * 144 + "\nwhat item is there ? ASSISTANT:"
    wanted = tokenizer(f"{prompt} bag</s>")["input_ids"]
    assert packed.ids[0].tolist() == wanted
    assert packed.positions[0].tolist() == list(range(len(wanted)))
    told = [(place, label) for place, label in enumerate(packed.labels[0].tolist()) if label != IGNORE]
    assert [label for _, label in told] == wanted[-2:]
    assert told[0][0] == len(wanted) - 3


def test_probe_finds_position_only_where_it_is() -> None:
    model = make_model(tiny_recipe().shape, 0)
    pixels = torch.rand(8, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert min(position_probe(model, pixels)) > 0.5  # the start already carries plane waves
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.zero_()
    assert max(position_probe(model, pixels)) < 0.2


def test_plane_waves_tell_all_places_apart() -> None:
    waves = plane_waves(12, 192)
    assert waves.shape == (144, 192)
    assert (torch.cdist(waves, waves) + torch.eye(144)).min() > 0.5


def test_features_are_the_ones_llava_projects() -> None:
    model = make_model(tiny_recipe().shape, 0).eval()
    pixels = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        mine = model.model.multi_modal_projector(visual_features(model, pixels))
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(mine, torch.stack(list(theirs)))


def test_missing_fashion_mnist_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_fashion_mnist(tmp_path, None)
    assert "\n" not in str(error.value)
