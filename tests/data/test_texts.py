"""Conditions of prompts that are kept on disk."""

import numpy as np
import pytest

from diffusion_jax.data.texts import kept


def test_a_prompt_is_computed_once(tmp_path):
    calls = []

    def of_prompts(prompts):
        calls.append(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.float32)
        return {"text": lengths[:, None], "mask": lengths > 1}

    first = kept(of_prompts, tmp_path / "texts", "encoder")
    assert first(["a", "a/b c", "a"])["text"].tolist() == [[1], [5], [1]]
    again = kept(of_prompts, tmp_path / "texts", "encoder")
    cond = again(["a/b c", "", "a"])
    assert cond["text"].tolist() == [[5], [0], [1]] and cond["mask"].tolist() == [True, False, False]
    assert cond["text"].dtype == np.float32 and calls == [["a", "a/b c"], [""]]
    kept(of_prompts, tmp_path / "texts", "another encoder")(["a"])
    assert calls[-1] == ["a"]


def test_what_cannot_be_computed_leaves_nothing(tmp_path):
    def of_prompts(prompts):
        raise FileNotFoundError("no encoder")

    with pytest.raises(FileNotFoundError, match="no encoder"):
        kept(of_prompts, tmp_path / "texts", "")(["a"])
    assert not (tmp_path / "texts").exists()
