"""Progress bars say that they compile, and count time from the first update."""

import time

import pytest

from diffusion_jax.messages import Progress


@pytest.mark.parametrize("start", [0, 40])
def test_compiling_is_said_and_does_not_count_as_progress(capsys, start):
    with Progress("denoiser", 100, "step", start) as progress:
        assert "denoiser, compiling" in capsys.readouterr().err
        time.sleep(0.3)
        progress.update(0, "loading")
        assert progress.done == start
        progress.update()
        figures = progress._bar.format_dict
        assert figures["n"] == figures["initial"] == start + 1 and figures["elapsed"] < 0.2
        for _ in range(4):
            time.sleep(0.01)
            progress.update()
        figures = progress._bar.format_dict
        assert figures["elapsed"] < 0.3 and progress.done == start + 5
    shown = capsys.readouterr().err
    assert shown.rpartition("compiling")[2].count("denoiser: ") and f"{start + 5}/100" in shown


def test_a_hidden_bar_says_nothing(capsys):
    with Progress("hidden", 3, "step", shown=False) as progress:
        progress.update()
        progress.update(1, "more")
    assert capsys.readouterr().err == ""
