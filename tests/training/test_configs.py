"""The configurations that are shipped can be read, and say what the papers say."""

from pathlib import Path

import pytest

from vlmzip import VisionZip
from vlmzip.training.config import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path):
    config = read_config(path)
    config.schedule_for(32)
    for name in config.trainer.values():
        assert (CONFIGS.parent / name).exists()


def test_llavoltas_recipe_is_that_of_the_authors_script():
    config = read_config(CONFIGS / "llava-1.5-7b-llavolta.yaml")
    assert (config.batch, config.learning_rate, config.warmup, config.weight_decay) == (128, 2e-5, 0.03, 0)
    stages = [stage.compressor for stage in config.schedule_for(32).stages]
    assert [(getattr(one, "layer", None), getattr(one, "stride", None)) for one in stages] == [
        (2, 8), (2, 2), (16, 2), (None, None)
    ]  # fmt: skip


def test_visionzips_tuning_is_the_projector_on_a_tenth_of_the_data():
    config = read_config(CONFIGS / "llava-1.5-7b-visionzip-tuning.yaml")
    assert (config.learn, config.share) == (("projector",), 0.1)
    assert config.schedule_for(32).afterwards == VisionZip(keep=64)
