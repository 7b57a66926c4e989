import pytest

from diffusion_jax import configuration

CONFIG = """
from ml_collections import ConfigDict

def get_config(preset="plain"):
    if preset not in ("plain", "other"):
        raise ValueError(f"unknown preset {preset!r}; known: plain, other")
    return ConfigDict({
        "name": preset,
        "train": {"steps": 10, "rate": 0.1, "flip": False, "heads": None},
        "channels": (8, 16),
        "prompts": ("a", "b"),
    })
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(CONFIG)
    return str(path)


def test_a_preset_follows_a_colon(file):
    assert configuration.load(file).name == "plain"
    assert configuration.load(file + ":other").name == "other"


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("name", "3", "3"),
        ("train.steps", "20_000", 20_000),
        ("train.rate", "1e-4", 1e-4),
        ("train.rate", "2", 2.0),
        ("train.flip", "true", True),
        ("train.heads", "8", 8),
        ("channels", "(4, 4, 4)", (4, 4, 4)),
        ("channels", "4,4", (4, 4)),
        ("channels", "4", (4,)),
        ("prompts", "('c', 'd')", ("c", "d")),
        ("prompts", "red apple", ("red apple",)),
        ("prompts", "7", ("7",)),
        ("prompts", "()", ()),
    ],
)
def test_a_field_takes_a_value_of_its_own_type(file, field, text, value):
    config = configuration.load(file, {field: text})
    for name in field.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


def test_fields_come_with_an_equals_sign_or_without():
    arguments = ["--config.a.b=1", "--config.c", "-1", "-config.d=x=y"]
    assert configuration.overrides_of(arguments) == {"a.b": "1", "c": "-1", "d": "x=y"}


@pytest.mark.parametrize(
    "field, text, message",
    [
        ("train.stepz", "1", "config.train has no field 'stepz'; known: flip, heads, rate, steps"),
        ("trane.steps", "1", "config has no field 'trane'; known: channels, name, prompts, train"),
        ("train.steps.more", "1", "config.train.steps is no section"),
        ("train", "1", "is a section"),
        ("train.steps", "many", "expected int like 10, got 'many'"),
        ("train.steps", "1.5", "expected int like 10, got '1.5'"),
        ("train.rate", "fast", "expected float like 0.1, got 'fast'"),
        ("train.flip", "1", "expected bool like False, got '1'"),
        ("channels", "(4, 'a')", "expected tuple like (8, 16)"),
        ("channels", "wide", "expected tuple like (8, 16)"),
        ("prompts", "(1, 2)", "expected tuple like ('a', 'b')"),
    ],
)
def test_wrong_fields_and_values_are_one_clear_line(file, field, text, message):
    with pytest.raises(ValueError) as error:
        configuration.load(file, {field: text})
    assert message in str(error.value) and f"--config.{field}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [["--confg=x"], ["stray"], ["--config.train.steps"], ["--x.config.y=1"]])
def test_arguments_in_another_form_are_named(arguments):
    with pytest.raises(ValueError, match=arguments[0]):
        configuration.overrides_of(arguments)


def test_wrong_files_are_one_clear_line(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file"):
        configuration.load(str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match="unknown preset 'foo'"):
        configuration.load(file + ":foo")
    for content, message in [
        ("def get_config(:", "line 1"),
        ("x = 1", "no function get_config"),
        ("def get_config(): return {}", "no presets, got 'foo'"),
    ]:
        (tmp_path / "other.py").write_text(content)
        with pytest.raises(ValueError, match=message):
            configuration.load(str(tmp_path / "other.py:foo"))
