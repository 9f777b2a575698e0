"""Probe and similarity find what was put there, and nothing where nothing was put."""

import numpy as np
import pytest

from magnification_invariant import metrics


def embeddings(shift: float, seed: int = 0, n_patients: int = 30, images: int = 4):
    """Rows of patients at three domains; each domain moves its own dimension by `shift`."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), 3 * images)
    domain = np.tile(np.repeat([0, 1, 2], images), n_patients)
    x = rng.standard_normal((len(patient), 6)) + rng.standard_normal((n_patients, 6))[patient]
    x[np.arange(len(x)), domain] += shift
    return x, patient % 2, np.array([40, 100, 400])[domain], patient


def test_a_probe_is_at_chance_on_what_holds_no_domain_and_above_it_on_what_does():
    x, _, domain, patient = embeddings(0)
    blind = metrics.domain_probe(x, domain, patient, n_draws=200)
    assert blind.chance == pytest.approx(1 / 3)
    assert blind.low < blind.chance < blind.high
    x, _, domain, patient = embeddings(4)
    seeing = metrics.domain_probe(x, domain, patient, n_draws=200)
    assert seeing.low > 0.6 and seeing.low < seeing.balanced_accuracy < seeing.high


def test_a_probe_cannot_use_who_the_patient_is():
    # Each patient was acquired in one domain, and only patients can be told from the rows.
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 5)
    x = rng.standard_normal((60, 80))[patient] * 10 + rng.standard_normal((300, 80))
    result = metrics.domain_probe(x, patient % 2, patient, n_draws=200)
    assert result.balanced_accuracy == pytest.approx(0.5, abs=0.2)


def test_cka_ignores_rotation_and_scale_and_finds_nothing_between_strangers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 8))
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    assert metrics.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    strangers = [metrics.linear_cka(rng.standard_normal((30, 200)), rng.standard_normal((30, 300))) for _ in range(30)]
    assert np.mean(strangers) == pytest.approx(0, abs=0.05)
    assert np.isnan(metrics.linear_cka(x, np.ones((50, 2))))


def test_bad_input_is_refused():
    x, _, domain, patient = embeddings(0)
    with pytest.raises(ValueError, match="there is one"):
        metrics.domain_probe(x, np.zeros(len(x)), patient)
    with pytest.raises(ValueError, match="finite"):
        metrics.domain_probe(x * np.nan, domain, patient)
    with pytest.raises(ValueError, match="as many labels"):
        metrics.domain_probe(x, domain[1:], patient)
    with pytest.raises(ValueError, match="same rows"):
        metrics.linear_cka(x, x[1:])


def test_cka_by_the_definition():
    """U-statistics over distinct rows (Song et al. 2012), summed one by one."""
    from itertools import permutations

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 3)), rng.standard_normal((6, 2))
    b[:, 0] += a[:, 0]

    def hsic(k, m):
        pairs = np.mean([k[i, j] * m[i, j] for i, j in permutations(range(6), 2)])
        triples = np.mean([k[i, j] * m[i, q] for i, j, q in permutations(range(6), 3)])
        return pairs + np.mean([k[i, j] * m[q, r] for i, j, q, r in permutations(range(6), 4)]) - 2 * triples

    k, m = a @ a.T, b @ b.T
    assert metrics.linear_cka(a, b) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))
    assert metrics.linear_cka(a, b) == pytest.approx(metrics.linear_cka(b, a))


def test_the_difference_of_two_probes_is_paired_by_patients():
    x, y, domain, patient = embeddings(0)
    shifted, blind = metrics.domain_probe(embeddings(4)[0], domain, patient), metrics.domain_probe(x, domain, patient)
    assert shifted.right.mean() > 0.6 and blind.right.shape == y.shape
    result = metrics.probe_difference(shifted, blind, y, domain, patient, n_draws=400)
    assert result.difference == pytest.approx(shifted.balanced_accuracy - blind.balanced_accuracy)
    assert 0 < result.low < result.difference < result.high and result.p_value < 0.01
    none = metrics.probe_difference(blind, blind, y, domain, patient, n_draws=50)
    assert none[:3] == (0, 0, 0) and none.p_value == 1
    # Rows that a domain has more of, and patients with more rows, do not count for more.
    some = np.flatnonzero((domain != 40) | (patient % 3 == 0) | (np.arange(len(domain)) % 4 == 0))
    parts = [metrics.domain_probe(e[some], domain[some], patient[some]) for e in (embeddings(4)[0], x)]
    result = metrics.probe_difference(*parts, y[some], domain[some], patient[some], n_draws=50)
    assert result.difference == pytest.approx(parts[0].balanced_accuracy - parts[1].balanced_accuracy)


def neighbourhood(by_class, by_domain, n=240):
    rng = np.random.default_rng(0)
    patient, domain = np.arange(n) // 6, rng.integers(0, 4, n)
    x = rng.normal(size=(n, 8))
    x[:, 0] += by_class * (2 * (patient % 2) - 1)
    x[:, 1:5] += by_domain * np.eye(4)[domain]
    return x, patient % 2, domain, patient


def test_neighbours_of_other_patients_name_the_domain_where_it_shows_and_not_where_it_does_not():
    x, _, domain, patient = neighbourhood(0, 6)
    assert metrics.knn_reading(x, domain, patient) > 0.95
    x, _, domain, patient = neighbourhood(3, 0)
    assert metrics.knn_reading(x, domain, patient) == pytest.approx(0.25, abs=0.1)


def test_neighbours_by_hand():
    """A patient's own images are nearest and do not count; of equal votes the nearest wins."""
    x = [[1, 0], [1, 0.01], [1, 0.1], [1, 0.2], [0, 1]]
    groups, domains = ["a", "a", "b", "c", "d"], [0, 1, 1, 0, 0]
    # nearest of other patients: b (1, wrong), b (1, right), a1 (1, right), b (1, wrong), c (0, right)
    assert metrics.knn_reading(x, domains, groups, k=1) == pytest.approx((1 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="there is one patient"):
        metrics.knn_reading(x, domains, ["a"] * 5)


def test_the_robustness_index_is_cromas():
    croma, pd = pytest.importorskip("croma"), pytest.importorskip("pandas")
    for by_class, by_domain in ((0, 0), (0.5, 0.2), (1, 2), (4, 0)):
        x, label, domain, patient = neighbourhood(by_class, by_domain)
        manifest = pd.DataFrame({"label": label, "domain": domain, "group_id": patient}).astype(str)
        manifest["sample_id"] = manifest["image_path"] = [str(i) for i in range(len(x))]
        reference = croma.RI.compute(
            x, manifest.assign(dataset="all"), confounder_column="domain", k_candidates=[5, 11, 21, 51]
        )
        index = metrics.robustness_index(x, label, domain, patient)
        assert index == pytest.approx((reference.value, reference.support, reference.k), abs=1e-12)


def test_the_robustness_index_tells_class_from_domain():
    by_class = metrics.robustness_index(*neighbourhood(4, 0))
    by_domain = metrics.robustness_index(*neighbourhood(0, 6))
    assert by_class.value > 0.9 > 0.1 > by_domain.value and min(by_class.support, by_domain.support) > 0.3


def test_cka_of_other_fields_is_no_similarity_even_of_a_network_that_says_one_thing():
    """The cosine of random pairs rises where embeddings collapse; unbiased CKA of shuffled fields stays at 0."""
    rng = np.random.default_rng(0)
    collapsed = 10 + rng.normal(size=(60, 16)) * 0.1
    unit = collapsed / np.linalg.norm(collapsed, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > 0.99
    assert abs(metrics.linear_cka(collapsed, collapsed[rng.permutation(60)])) < 0.1
