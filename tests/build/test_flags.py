import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

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


def parsed(monkeypatch, *overrides):
    """A config after these overrides on a command line."""
    argv, values = ["main.py", *(f"--config.{override}" for override in overrides)], flags.FlagValues()
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for fields
    config = {"text": "a", "whole": 1, "number": 0.5, "texts": ("a", "b"), "flag": True, "order": placeholder(int)}
    config_flags.DEFINE_config_dict("config", ConfigDict(config | {"eta": placeholder(float)}), flag_values=values)
    values(argv)
    return values.config


VALUES = {
    "text=None": "", "text=none": "none", "text=null": "null", "text=True": "True", "text=1e3": "1e3", "text=": "",
    "whole=1e3": 1000, "whole=2.0": 2, "whole=1_000": 1000, "whole=-3": -3, "whole=007": 7, "whole=0x10": 16,
    "whole=None": None, "number=None": None, "number=1e-3": 0.001, "number=2": 2.0, "order=None": None, "order=3": 3,
    "eta=None": None, "eta=0.5": 0.5, "texts=None": (), "texts=()": (), "texts=cat": ("cat",), "texts=('c',)": ("c",),
    "flag=false": False,
}  # fmt: skip


@pytest.mark.parametrize("override", VALUES)
def test_none_is_no_value_and_a_whole_number_may_have_an_exponent(monkeypatch, override):
    value, expected = parsed(monkeypatch, override)[override.partition("=")[0]], VALUES[override]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("whole=1.5", "expected a whole number, got"), ("whole=many", "expected a whole number, got"),
        ("whole=inf", "expected a whole number, got"), ("whole=nan", "expected a whole number, got"),
        ("whole=none", "expected a whole number, got"), ("whole=", "expected a whole number, got"),
        ("number=none", "expected a number, got"), ("flag=None", "boolean"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(monkeypatch, override, message):
    with pytest.raises(flags.Error, match=rf"--config\.{override.partition('=')[0]}=.*{message}"):
        parsed(monkeypatch, override)


def test_an_order_that_a_config_sets_can_be_left_out_again(monkeypatch):
    assert parsed(monkeypatch, "order=3", "order=None").order is None
