"""Rules of selection on made-up runs whose best epochs are known, and against scikit-learn."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from magnification_invariant.metrics import SELECTION_RULES, patient_weights, select_epoch, selected_scores
from magnification_invariant.metrics.classification import brier
from magnification_invariant.metrics.selection import nested_choice


def run(epochs=4, seed=0):
    """40 images of 8 patients in each part and epoch, as a table."""
    rng, parts = np.random.default_rng(seed), ("val", "test", "test_source")
    rows = [(e, part, i % 2, f"{part}{i % 8}") for e in range(epochs) for part in parts for i in range(37)]
    epoch, part, label, patient = (list(column) for column in zip(*rows, strict=True))
    logits = rng.normal(size=(len(rows), 2)) * 2
    logits[:, 1] += 2 * np.array(label) * rng.choice([0.2, 1.0, 2.0], len(rows))
    probability = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    columns = {"epoch": epoch, "part": part, "label": label, "patient": patient, "probability": probability}
    return pa.table(columns | {"logits": list(logits)})


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_epoch_is_the_best_by_scikit_learn(seed):
    records = run(seed=seed)
    frame = records.to_pandas()

    def by_epoch(part, score):
        found = []
        for _, rows in frame[frame.part == part].groupby("epoch"):
            found.append(score(rows.label, rows.probability, sample_weight=patient_weights(rows.patient)))
        return np.array(found)

    assert select_epoch("last", records) == 3
    assert select_epoch("val_log_loss", records) == by_epoch("val", log_loss).argmin()
    assert select_epoch("val_auc", records) == by_epoch("val", roc_auc_score).argmax()
    assert select_epoch("oracle", records) == by_epoch("test", roc_auc_score).argmax()
    for form in (frame, {name: frame[name].to_numpy() for name in frame}):
        assert all(select_epoch(rule, form) == select_epoch(rule, records) for rule in SELECTION_RULES)


def test_only_the_oracle_looks_at_the_test():
    records = run()
    frame = records.to_pandas()
    tested = frame.part != "val"
    frame.loc[tested, "probability"] = np.random.default_rng(1).random(tested.sum())
    frame.loc[tested, "label"] = 1 - frame.loc[tested, "label"]
    for rule in ("last", "val_log_loss", "val_auc"):
        assert select_epoch(rule, frame) == select_epoch(rule, records)
    best = frame[frame.part == "test"].groupby("epoch").apply(lambda r: roc_auc_score(r.label, r.probability))
    assert best[select_epoch("oracle", frame)] > best.min()


def test_the_first_of_equals_and_the_order_of_rows_does_not_matter():
    frame = run(epochs=1).to_pandas()
    twice = pa.concat_tables([pa.Table.from_pandas(frame.assign(epoch=e), preserve_index=False) for e in (5, 2)])
    assert [select_epoch(rule, twice) for rule in SELECTION_RULES] == [5, 2, 2, 2]


def test_scores_under_every_rule():
    records = run()
    frame = records.to_pandas()
    found = selected_scores(records)
    assert list(found) == list(SELECTION_RULES)
    best = max(
        roc_auc_score(r.label, r.probability, sample_weight=patient_weights(r.patient))
        for _, r in frame[frame.part == "test"].groupby("epoch")
    )
    assert found["oracle"]["auc"] == pytest.approx(best)
    plain = selected_scores(records, calibrated=False)["last"]
    rows = frame[(frame.part == "test") & (frame.epoch == 3)]
    assert plain["temperature"] == 1 and plain["epoch"] == 3
    assert plain["brier"] == pytest.approx(brier(rows.label, rows.probability, patient_weights(rows.patient)))
    val = frame[(frame.part == "val") & (frame.epoch == 3)]
    z = np.stack(val.logits)
    z = z[:, 1] - z[:, 0]

    def loss(t):
        return log_loss(val.label, 1 / (1 + np.exp(-z / t)), sample_weight=patient_weights(val.patient))

    t = found["last"]["temperature"]
    assert loss(t) <= min(loss(t * 1.01), loss(t / 1.01))
    assert selected_scores(records, part="test_source")["last"]["auc"] != found["last"]["auc"]


def test_what_cannot_be_selected_is_refused():
    records = run().to_pandas()
    with pytest.raises(ValueError, match="choose from last, val_log_loss"):
        select_epoch("best", records)
    with pytest.raises(ValueError, match="val_auc compares epochs on the part 'val'"):
        select_epoch("val_auc", records[(records.part != "val") | (records.label == 1)])
    with pytest.raises(ValueError, match="no images"):
        select_epoch("oracle", records[records.part == "val"])


def patients(*settings):
    """Losses (settings, 4 patients): `base + spread` of one half of the patients, `base - spread` of the other."""
    return np.array([[base + spread, base - spread] * 2 for base, spread in settings])


def test_nested_choice_takes_the_weakest_setting_within_one_standard_error_of_the_difference():
    # Differences to the best, setting 0: +-0.03, with a standard deviation (ddof 1) of 0.03 * sqrt(4 / 3) and a
    # standard error of half of it, 0.0173, over four patients.
    strength = [3.0, 1.0, 0.1]
    within, beyond, far = (0.217, 0.03), (0.218, 0.03), (0.4, 0.0)
    assert nested_choice({("h", "a"): patients((0.2, 0), within, far)}, "h", strength) == 1
    assert nested_choice({("h", "a"): patients((0.2, 0), beyond, far)}, "h", strength) == 0
    # What all settings find hard in the same patients says nothing of their difference.
    hard = np.array([0.3, -0.1, 0.3, -0.1])
    assert nested_choice({("h", "a"): patients((0.2, 0), beyond, far) + hard}, "h", strength) == 0
    # No worse and weaker; equal strength: the lower loss.
    assert nested_choice({("h", "a"): patients((0.2, 0), within, (0.2, 0))}, "h", strength) == 2
    assert nested_choice({("h", "a"): patients((0.21, 0), (0.2, 0.0), (0.22, 0.0))}, "h", [0, 0, 0]) == 1


def test_nested_choice_averages_the_scored_domains_and_looks_at_no_score_of_the_held_out_one():
    losses = {("h", "a"): patients((0.1, 0), (0.3, 0)), ("h", "b"): patients((0.4, 0), (0.1, 0))}
    losses |= {("a", "h"): patients((0.0, 0), (0.9, 0)), ("a", "b"): patients((0.4, 0), (0.1, 0))}
    assert nested_choice(losses, "h", [1, 1]) == 1  # 0.25 against 0.2
    assert nested_choice(losses, "a", [1, 1]) == 0
    assert nested_choice(losses | {("a", "h"): patients((0.9, 0), (0.0, 0))}, "h", [1, 1]) == 1


def test_nested_choice_never_takes_what_diverged():
    diverged = np.full(4, np.inf)
    losses = {("h", "a"): np.stack([diverged, *patients((0.3, 0))]), ("h", "b"): patients((0.1, 0), (0.3, 0))}
    assert nested_choice(losses, "h", [0, 1]) == 1
    with pytest.raises(ValueError, match="diverged"):
        nested_choice({("h", "a"): np.stack([diverged, diverged])}, "h", [0, 1])
    with pytest.raises(ValueError, match="no training without 'b'"):
        nested_choice(losses, "b", [0, 1])
