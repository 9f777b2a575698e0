"""Rules of selection on made-up runs whose best epochs are known, and against scikit-learn."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from magnification_invariant.metrics import SELECTION_RULES, patient_weights, select_epoch, selected_scores
from magnification_invariant.metrics.classification import brier


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
