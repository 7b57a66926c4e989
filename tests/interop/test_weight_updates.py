"""Updates of one map: the weights that peft merges, and the published formulas where peft has none."""

import functools
import json

import numpy as np
import pytest

from diffusion_jax.interop.lora import load_lora
from diffusion_jax.interop.tensors import write_file
from diffusion_jax.interop.weight_updates import updated

LINEAR, CONV = (12, 8), (12, 8, 3, 3)


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ours(tmp_path, weight, tensors, metadata=None, strength=1.0):
    """The weight of the map "map" after the updates in a file of these tensors."""
    write_file(tmp_path / "x.safetensors", tensors, metadata=metadata)
    ((part, updates),) = load_lora(tmp_path / "x.safetensors").items()
    assert part == "unet"
    assert list(updates) == ["map"]
    return updated(weight, updates["map"], strength)


def peer_adapter(weight, config, spread=0.5):
    """(the tensors and settings that peft saves for an adapter of one map, the weight that it merges)."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    out, into, *kernel = weight.shape
    layer = torch.nn.Conv2d(into, out, kernel, bias=False) if kernel else torch.nn.Linear(into, out, bias=False)
    layer.weight.data = torch.tensor(weight)
    model = peft.get_peft_model(torch.nn.ModuleDict({"map": layer}), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += spread * torch.randn_like(parameter) * (0.1 if "magnitude" in name else 1)
    tensors = {name: tensor.numpy() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return tensors, settings, model.merge_and_unload()["map"].weight.detach().numpy()


CASES = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns": ("LoraConfig", {"r": 4, "lora_alpha": 3, "rank_pattern": {"map": 2}, "alpha_pattern": {"^map": 7}}),
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 6, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2, "init_weights": False}),
    "loha core": ("LoHaConfig", {"r": 3, "alpha": 2, "init_weights": False, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 2, "init_weights": False}),
    "lokr core": ("LoKrConfig", {"r": 1, "alpha": 2, "init_weights": False, "use_effective_conv2d": True}),
    "lokr both": ("LoKrConfig", {"r": 1, "alpha": 2, "init_weights": False, "decompose_both": True}),
    "lokr whole": ("LoKrConfig", {"r": 9, "alpha": 2, "init_weights": False}),
}


@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("case", CASES)
def test_is_what_peft_merges(case, shape, tmp_path):
    kind, arguments = CASES[case]
    config = getattr(pytest.importorskip("peft"), kind)(target_modules=["map"], **arguments)
    weight = numbers(0, *shape)
    tensors, settings, merged = peer_adapter(weight, config)
    assert np.abs(merged - weight).max() > 0.01
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    np.testing.assert_allclose(ours(tmp_path, weight, tensors, metadata), merged, rtol=1e-4, atol=1e-5)
    in_memory = {  # how a whole model's state_dict names the tensors of the adapter "default"
        name + ".default" if "hada" in name or "lokr" in name else name.replace(".weight", ".default.weight"): tensor
        for name, tensor in tensors.items()
    }
    np.testing.assert_allclose(ours(tmp_path, weight, in_memory, metadata), merged, rtol=1e-4, atol=1e-5)


def test_settings_in_a_file_beside(tmp_path):
    config = pytest.importorskip("peft").LoraConfig(target_modules=["map"], r=4, lora_alpha=8, use_rslora=True)
    tensors, settings, merged = peer_adapter(numbers(0, *LINEAR), config)
    write_file(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    update = load_lora(tmp_path / "adapter_model.safetensors")["unet"]["map"]
    np.testing.assert_allclose(updated(numbers(0, *LINEAR), update, 1.0), merged, rtol=1e-5, atol=1e-6)


def test_pickles_are_read_if_they_are_allowed(tmp_path):
    """As older versions of diffusers and peft write them."""
    torch = pytest.importorskip("torch")
    held = {name: torch.tensor(tensor) for name, tensor in LORA.items()}
    torch.save(held, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    update = load_lora(tmp_path / "adapter_model.bin", allow_pickle=True)["unet"]["map"]
    expected = 3 * LORA["map.lora_B.weight"] @ LORA["map.lora_A.weight"]
    np.testing.assert_allclose(updated(np.zeros(LINEAR, np.float32), update, 1.0), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"is a pickle, .* set allow_pickle"):
        load_lora(tmp_path / "adapter_model.bin")


def test_a_tucker_core_is_three_convolutions(tmp_path):
    torch = pytest.importorskip("torch")
    down, mid, up = numbers(1, 4, 8, 1, 1), numbers(2, 4, 4, 3, 3), numbers(3, 12, 4, 1, 1)
    held = {"map.lora_down.weight": down, "map.lora_mid.weight": mid, "map.lora_up.weight": up}
    held["map.alpha"] = np.float32(2).reshape(())
    change = ours(tmp_path, np.zeros(CONV, np.float32), held)
    x, conv = torch.tensor(numbers(4, 2, 8, 5, 5)), torch.nn.functional.conv2d
    expected = conv(conv(conv(x, torch.tensor(down)), torch.tensor(mid), padding=1), torch.tensor(up)) * 2 / 4
    np.testing.assert_allclose(conv(x, torch.tensor(change), padding=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "convolution"])
def test_the_magnitudes_of_lycoris_are_lengths_after_the_update(shape, axis, tmp_path):
    """Its dora_scale has one number for each output, or for each input (wd_on_output false)."""
    weight, down, up = numbers(0, *shape), numbers(1, 2, *shape[1:]), numbers(2, 12, 2, *(1,) * (len(shape) - 2))
    length = np.abs(numbers(3, *(n if i == axis else 1 for i, n in enumerate(shape)))) + 0.5
    held = {"map.lora_down.weight": down, "map.lora_up.weight": up, "map.dora_scale": length}
    plain = ours(tmp_path, weight, {name: held[name] for name in list(held)[:2]})
    after = ours(tmp_path, weight, held)
    others = tuple(i for i in range(len(shape)) if i != axis)
    np.testing.assert_allclose(np.sqrt(np.sum(after**2, others, keepdims=True)), length, rtol=1e-5)
    ratio = after / plain  # the direction stays
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio.mean(others, keepdims=True), shape), rtol=1e-3)


def test_alpha_of_a_whole_lokr_is_ignored_as_its_authors_do(tmp_path):
    held = {"map.lokr_w1": numbers(0, 3, 2), "map.lokr_w2": numbers(1, 4, 4), "map.alpha": np.float32(7).reshape(())}
    change = ours(tmp_path, np.zeros(LINEAR, np.float32), held)
    np.testing.assert_allclose(change, np.kron(held["map.lokr_w1"], held["map.lokr_w2"]), rtol=1e-6)


LORA = {"map.lora_A.weight": numbers(0, 2, 8), "map.lora_B.weight": numbers(1, 12, 2)}
LOHA = {f"map.hada_w{i}_{half}": numbers(i, *shape) for i in (1, 2) for half, shape in (("a", (12, 2)), ("b", (2, 8)))}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({**LORA, "map.alpha": np.ones(3, np.float32)}, "alpha of shape .3,.; expected one number"),
        ({**LORA, "map.alpha": np.float32(np.nan).reshape(())}, "map.alpha has 1 of 1 values that are NaN or infinite"),
        (
            {**LORA, "map.lora_A.weight": np.full((2, 8), np.inf, np.float16)},
            "map.lora_A.weight has 16 of 16 values that",
        ),
        (
            {**LORA, "map.dora_scale": np.float32([[np.nan], *11 * [[1]]])},
            "map.dora_scale has 1 of 12 values that are NaN",
        ),
        ({**LORA, "map.dora_scale": np.ones(5, np.float32)}, "a magnitude of shape .5,., the map has"),
        ({**LORA, "map.lora_down.weight": numbers(0, 2, 8)}, "two tensors of lora_down"),
        ({**LORA, "map.lora_mid.weight": numbers(0, 3, 3, 3, 3)}, "needs factors of one rank, got lora_down .2, 8."),
        ({**LOHA, "map.hada_w2_b": numbers(0, 2, 7)}, "needs factors of one rank"),
        ({**LOHA, "map.hada_t1": numbers(0, 2, 2, 3, 3)}, "needs factors of one rank"),
        ({"map.hada_w1_a": numbers(0, 12, 2)}, "needs both halves of an update, .* such as hada_w1_a, hada_w1_b"),
        ({"map.lokr_w1": numbers(0, 3, 2)}, "such as lokr_w1, lokr_w2; got lokr_w1"),
        ({"map.lokr_w1": numbers(0, 3, 2), "map.lokr_w2": numbers(0, 5, 4)}, "makes .15, 8., the map has .12, 8."),
        ({"map.lokr_w1": numbers(0, 3), "map.lokr_w2": numbers(0, 5, 4)}, "lokr_w1 of shape .3,.; expected a matrix"),
        ({"map.alpha": np.ones((), np.float32)}, "such as lora_down, lora_up; got none"),
        ({}, "expected the updates of a LoRA, got a file without tensors"),
        ({**LORA, **LOHA}, "needs both halves of an update"),
        ({**LORA, "map.lora_A.weight": numbers(0, 2, 3, 8)}, "makes .12, 3, 8., the map has"),
    ],
)
def test_what_does_not_fit_is_one_line(held, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        ours(tmp_path, numbers(0, *LINEAR), held)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"use_next_lora": 0.5}, "use_next_lora = 0.5 is not supported"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; supported: True, False, gaussian"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; supported: none"),
        ({"peft_type": "OFT"}, "peft_type is 'OFT'; supported: LORA, LOHA, LOKR"),
        ({"use_dora": True}, "map has no magnitude, but the setting use_dora of the file is True"),
        ({"use_next_lora": 0.5, "peft_type": "VERA"}, "peft_type is 'VERA'; supported: LORA, LOHA, LOKR"),
        ({"lora_alpha": "many"}, "malformed settings .*: lora_alpha: expected a finite number, got 'many'"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number, got None"),
        ({"alpha": True}, ": alpha: expected a finite number, got True"),
        ({"r": None}, ": r: expected a whole number, at least 1, got None"),
        ({"r": "16"}, ": r: expected a whole number, at least 1, got '16'"),
        ({"r": 2.5}, ": r: expected a whole number, at least 1, got 2.5"),
        ({"alpha_pattern": [1]}, r"alpha_pattern: expected an object from maps to numbers, got \[1\]"),
        ({"alpha_pattern": {"map": "8"}}, "alpha_pattern of map: expected a finite number, got '8'"),
        ({"rank_pattern": {"map": None}}, "rank_pattern of map: expected a whole number, at least 1, got None"),
        ({"alpha_pattern": {"(": 1}}, "malformed pattern of maps"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"r": 0}, ": r: expected a whole number, at least 1, got 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
    ],
)
def test_settings_that_are_not_supported_are_named(settings, message, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    with pytest.raises(ValueError, match=message):
        ours(tmp_path, numbers(0, *LINEAR), LORA, metadata)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 100_000])
def test_settings_that_are_no_object_are_one_line(text, tmp_path):
    with pytest.raises(ValueError, match="malformed lora_adapter_metadata in its header"):
        ours(tmp_path, numbers(0, *LINEAR), LORA, {"lora_adapter_metadata": text})


def test_settings_of_training_and_new_ones_that_are_off_change_nothing(tmp_path):
    settings = {
        "unet.lora_dropout": 0.1,
        "unet.use_next_lora": False,
        "unet.next_config": None,
        "r": 2,
        "lora_alpha": 4,
    }
    weight = numbers(0, *LINEAR)
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    np.testing.assert_allclose(
        ours(tmp_path, weight, LORA, metadata),
        weight + 2 * LORA["map.lora_B.weight"] @ LORA["map.lora_A.weight"],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("map.diff", "full differences"),
        ("map.diff_b", "full differences"),
        ("map.w_norm", "updates of norms"),
        ("bundle_emb.word.string_to_param.*", "textual inversion"),
        ("emb_params", "textual inversion"),
        ("clip_g", "textual inversion"),
        ("map.oft_blocks", "OFT"),
        ("map.oft_R.default.weight", "OFT"),
        ("map.boft_R", "BOFT"),
        ("map.a1.weight", "GLoRA"),
        ("map.on_input", "IA3"),
        ("map.ia3_l", "IA3"),
        ("map.lora_embedding_A", "embedding"),
        ("map.lora_E.default", "AdaLoRA"),
        ("map.vera_lambda_b", "VeRA"),
        ("map.lora_B.bias", "biases"),
        ("map.scalar", "scalars"),
        ("map.modules_to_save.weight", "modules_to_save"),
        ("lora_controlnet", "Control-LoRA"),
        ("map.reshape_weight", "another shape"),
        ("map.processor.to_k_custom_diffusion.weight", "Custom Diffusion"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("map.weight", "not a tensor of a LoRA, LoHa or LoKr"),
    ],
)
def test_other_kinds_are_refused_by_name(name, kind, tmp_path):
    with pytest.raises(ValueError, match=kind) as raised:
        ours(tmp_path, numbers(0, *LINEAR), {**LORA, name: numbers(0, 3)})
    assert name in str(raised.value)


def peft_adapters():
    """The kinds of adapters in peft, with a function from a config of the kind for one map to its tensors."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    def tensors(config):
        model = torch.nn.ModuleDict({"map": torch.nn.Linear(*LINEAR[::-1], bias=False)})
        held = peft.get_peft_model_state_dict(peft.get_peft_model(model, config(target_modules=["map"])))
        return {name: tensor.numpy() for name, tensor in held.items() if tensor.ndim}

    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    return {kind.value: functools.partial(tensors, config) for kind, config in kinds.items()}


@pytest.mark.filterwarnings("ignore")  # peft's about its own kinds
def test_all_other_adapters_of_peft_are_refused_by_name(tmp_path):
    """By the setting peft_type in the file beside them, and by the names of their tensors alone."""
    named = 0
    for kind, tensors in peft_adapters().items():
        if kind in ("LORA", "LOHA", "LOKR"):
            continue
        (tmp_path / "adapter_config.json").write_text(json.dumps({"a_field": 1, "peft_type": kind}))
        write_file(tmp_path / "adapter_model.safetensors", {"map.any": numbers(0, 3)})
        with pytest.raises(ValueError, match=f"its setting peft_type is '{kind}'; supported: LORA, LOHA, LOKR"):
            load_lora(tmp_path / "adapter_model.safetensors")
        try:
            held = tensors()
        except Exception:  # not every kind can update one small map alone
            continue
        write_file(tmp_path / "x.safetensors", held)
        with pytest.raises(ValueError, match=rf"belongs to updates of (?i:{kind})"):
            load_lora(tmp_path / "x.safetensors")
        named += 1
    assert named > 15
