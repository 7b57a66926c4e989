"""Generated pictures beside held-out ones."""

import tracemalloc

import numpy as np
import pytest

from diffusion_jax.evaluation import comparison
from diffusion_jax.evaluation.batches import map_over_hosts
from diffusion_jax.evaluation.comparison import Collected, alignment, compare, load_reference, save_reference
from diffusion_jax.evaluation.distances import frechet, guesses, inception_score, moments


def collected(features, logits=None, size=7):
    result = Collected()
    for start in range(0, len(features), size):
        batch = {"features": features[start : start + size]}
        result.add(batch if logits is None else batch | {"logits": logits[start : start + size]})
    return result


def random_features(seed, count=300, shift=0.0):
    return np.random.default_rng(seed).normal(size=(count, 6)) + shift


@pytest.fixture
def real(tmp_path):
    save_reference(tmp_path / "real.npz", "net", collected(random_features(0)), range(100, 400))
    return load_reference(tmp_path / "real.npz", "net", 6)


def test_an_interrupted_save_leaves_no_reference(tmp_path, monkeypatch):
    def interrupted(out, **arrays):
        out.write(b"the first bytes")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_reference(tmp_path / "real.npz", "net", collected(random_features(0)), range(300))
    assert not (tmp_path / "real.npz").exists()


def test_the_report_is_that_of_all_pictures(real):
    generated, held_out = random_features(1, shift=0.5), random_features(2)
    report = compare({"generated": collected(generated), "held_out": collected(held_out)}, real)
    expected = frechet(moments(generated), moments(random_features(0)))
    assert report["frechet"]["generated"]["value"] == pytest.approx(expected, rel=1e-6)
    below = report["frechet"]["held_out"]["value"]
    assert report["frechet"]["ratio"]["value"] == pytest.approx(expected / below, rel=1e-6)
    assert report["kernel"].keys() == {"generated", "held_out"}, "the kernel distance of real pictures is 0 to rounding"
    assert report["coverage"]["held_out"]["mean"] > report["coverage"]["generated"]["mean"]
    assert real.count == 300 and real.indices[0] == 100


def test_as_good_as_real_is_a_ratio_of_one(real):
    """Within its own standard error, over many sets."""
    reports = [
        compare(
            {"generated": collected(random_features(2 * i + 5)), "held_out": collected(random_features(2 * i + 6))},
            real,
        )["frechet"]
        for i in range(20)
    ]
    ratios = [estimate["ratio"] for estimate in reports if "ratio" in estimate]
    scores = [(estimate["value"] - 1) / estimate["standard_error"] for estimate in ratios]
    assert len(ratios) > 15 and abs(np.mean(scores)) < 1 and 0.4 < np.std(scores) < 2


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(comparison, "MAX_FEATURES", 50)
    pictures = collected(random_features(0), logits=random_features(1))
    assert len(pictures.features) == 50 and pictures.count == 300
    assert [group.count for group in pictures.moments] == [30] * 10 == [group.count for group in pictures.guesses]
    report = compare({"generated": pictures, "held_out": pictures}, comparison.Reference("net", 0, *gaussian_alone()))
    assert report["inception_score"]["generated"]["value"] == pytest.approx(
        inception_score(guesses(random_features(1)))
    )
    assert report.keys() == {"frechet", "inception_score"}


def test_memory_does_not_grow_with_the_number_of_pictures(monkeypatch):
    """Pictures are made, shared and collected as in --mode=eval."""
    monkeypatch.setattr(comparison, "MAX_FEATURES", 64)

    def peak(count):
        tracemalloc.start()
        result = Collected()
        for picture in map_over_hosts(lambda some: (np.full(5000, i, np.float64) for i in some), range(count), 32, 8):
            result.add({"features": picture[None, :16]})
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    peak(64)  # imports
    few, many = peak(640), peak(2560)
    assert many < 1.05 * few


def gaussian_alone():
    whole = moments(random_features(3))
    return comparison.gaussian(whole.mean, whole.covariance), np.zeros((0, 6)), np.zeros(0, int)


def test_statistics_of_others_are_read(tmp_path):
    whole = moments(random_features(0))
    np.savez(tmp_path / "theirs.npz", mu=whole.mean, sigma=whole.covariance, mu_s=whole.mean)
    read = load_reference(tmp_path / "theirs.npz", "inception-v3", 6)
    assert frechet(whole, read.gaussian) == pytest.approx(0, abs=1e-9) and read.count == 0 and not len(read.features)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(6)}, "has no mu and sigma"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu of shape \(5,\) and sigma of \(5, 5\), but net has 6 features"),
        ({"mu": np.zeros(6), "sigma": np.eye(6) * np.nan}, "not finite"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "network": np.array("vgg16")}, "in the features of vgg16, and .* net"),
        ({"mu": np.array([{}]), "sigma": np.eye(6)}, "is no .npz file of statistics"),
        (None, "is no .npz file of statistics"),
    ],
)
def test_statistics_that_do_not_fit_are_named(arrays, message, tmp_path):
    file = tmp_path / "bad.npz"
    if arrays is None:
        file.write_bytes(b"torn")
    else:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=message):
        load_reference(file, "net", 6)


def test_bad_sets_are_named(real):
    with pytest.raises(ValueError, match="at least 20 pictures in each set, got 19 of generated"):
        compare({"generated": collected(random_features(1, 19)), "held_out": collected(random_features(2, 20))}, real)
    with pytest.raises(ValueError, match="1 of 7 pictures have features that are not finite"):
        collected(np.where(np.arange(60).reshape(10, 6) == 8, np.nan, 1.0))


def test_alignment_laws():
    texts = random_features(0, 250)
    assert alignment(texts * 3, texts)["clip_score"]["mean"] == pytest.approx(100)
    assert alignment(texts * 3, texts)["retrieval"]["mean"] == 1
    assert alignment(-texts, texts)["clip_score"]["mean"] == 0
    assert alignment(random_features(1, 250), texts)["retrieval"]["mean"] == pytest.approx(0.01, abs=0.03)
    same = np.repeat(texts[:1], 250, axis=0)
    assert alignment(same, same)["retrieval"]["mean"] == 1
