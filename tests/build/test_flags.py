import pytest
from ml_collections import ConfigDict

from diffusion_jax.build.flags import check_field


@pytest.mark.parametrize(
    "field, message",
    [
        ("train.stepz", "config.train has no field 'stepz'; known: rate, steps"),
        ("trane.steps", "config has no field 'trane'; known: name, train"),
        ("train.steps.more", "config.train.steps has no fields, its value is 10"),
    ],
)
def test_unknown_fields_come_with_the_known_ones(field, message):
    config = ConfigDict({"name": "x", "train": {"steps": 10, "rate": 0.1}})
    with pytest.raises(ValueError) as error:
        check_field(config, field)
    assert message in str(error.value) and f"--config.{field}" in str(error.value)


def test_known_fields_pass():
    check_field(ConfigDict({"train": {"steps": 10}}), "train.steps")
