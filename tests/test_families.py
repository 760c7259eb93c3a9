"""Every family has a file in tests/families, and quick runs stay quick with many of them."""

import pytest
from PIL import Image

from tests.families import ALL, FAMILIES
from tests.tiny import IMAGE_TOKEN, SIDE, Family
from vlmzip import models

#: Each costs quick runs about 15 seconds of computing.
MOST_THAT_LEAD = 5


def test_every_family_is_tested():
    tested = {family.model_class.config_class.model_type for family in ALL.values()}
    assert {name for family in models.FAMILIES for name in family.model_types} == tested


def test_few_families_lead_and_one_of_them_has_every_case():
    assert all(issubclass(family, Family) for family in FAMILIES.values())
    leading = [family for family in FAMILIES.values() if vars(family).get("leads")]
    assert len(leading) <= MOST_THAT_LEAD
    assert sum(vars(family).get("every_case", False) for family in leading) == 1


@pytest.mark.every_family
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's, beside NumPy 2
def test_batches_are_made_of_what_the_processor_makes(family):
    image = Image.new("RGB", (SIDE, SIDE), "red")
    inputs = family.processor()(images=image, text="w5 <image> w6", return_tensors="pt")
    assert family.batch([5, "image", 6]).keys() == inputs.keys() - {"labels"}
    assert (inputs["input_ids"] == IMAGE_TOKEN).any()
