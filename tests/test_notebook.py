"""Every cell of the notebook runs, and the model it trains draws the digits that it is asked for."""

import json

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from diffusion_jax.core import solvers
from diffusion_jax.pipelines import text_to_image
from tests.command_line import ROOT


@pytest.mark.slow
def test_every_cell_of_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook, names = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text()), {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number} of the notebook", "exec"), names)

    labels, model = np.repeat(np.arange(10), 10), names["small"]
    cond = model.conditioning.of_prompts([str(digit) for digit in labels])
    keys = jax.random.split(jax.random.key(2), len(labels))
    images = text_to_image(model, cond, keys, solvers.dpmpp_2m(model.useful_schedule, 20), guidance=2.0)
    neighbours = KNeighborsClassifier(3).fit(names["images"].reshape(-1, 8 * 8 * 3) / 127.5 - 1, names["labels"])
    assert np.mean(neighbours.predict(np.asarray(images).reshape(len(labels), -1)) == labels) > 0.7
