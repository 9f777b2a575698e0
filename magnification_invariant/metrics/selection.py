"""Which epoch of a run counts, and which setting of a method: rules over recorded predictions, applied after training.

The primary rule for epochs is "last": the same number of steps for every method. The rules by source validation are
rows of sensitivity. The oracle looks at the test and is there to show how much any rule could gain; it is never a
result.
"""

from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from magnification_invariant.metrics.calibration import apply_temperature, fit_temperature
from magnification_invariant.metrics.classification import METRICS, auc, log_loss, patient_weights

# part that is looked at, and what is to be large there
SELECTION_RULES = {
    "last": None,
    "val_log_loss": ("val", lambda *columns: -log_loss(*columns)),
    "val_auc": ("val", auc),
    "oracle": ("test", auc),
}


def nested_choice(
    losses: Mapping[tuple[Hashable, Hashable], ArrayLike], held_out: Hashable, strength: ArrayLike
) -> int:
    """The setting of a method that nested leave-one-domain-out chooses for a held-out domain, without looking at it.

    Every other domain is scored by trainings that saw neither of the two. The setting of the least mean loss is the
    best; the weakest counts of those that are worse by at most one standard error of the difference over patients. The
    trainings without domains a and b serve twice: scored on b for a held out, on a for b held out.

    Args:
        losses: For (held-out domain, scored domain) the losses (settings, patients) of trainings that saw neither, the
            same patients for all of them; infinite where a setting diverged.
        held_out: The domain to choose for.
        strength: (settings,) how far each departs from plain training, such as the coefficient of an adversary; of
            equal ones the lower mean loss counts.

    Returns:
        Index of the setting.

    Raises:
        ValueError: No other domain is scored, or every setting diverged.

    Source: the one-standard-error rule of Breiman et al., "Classification and Regression Trees" (1984), section 3.4.3,
    with the standard error of paired differences.
    """
    scored = [np.asarray(loss, np.float64) for (unseen, _), loss in losses.items() if unseen == held_out]
    if not scored:
        raise ValueError(f"no training without {held_out!r} is scored on another domain")
    loss = np.mean(scored, axis=0)
    mean = loss.mean(1)
    best = mean.argmin()
    if not np.isfinite(mean[best]):
        raise ValueError(f"every setting diverged in a training without {held_out!r}")
    with np.errstate(invalid="ignore"):  # of what diverged, the error is no number, and the comparison false
        worse = loss - loss[best]
        as_good = worse.mean(1) <= worse.std(1, ddof=1) / np.sqrt(loss.shape[1])
    return int(next(i for i in np.lexsort((mean, strength)) if as_good[i]))


def select_epoch(rule: str, records: Mapping[str, ArrayLike]) -> int:
    """The epoch that a rule chooses by patient-balanced scores before any temperature; of equally good ones the first.

    Args:
        rule: "last"; "val_log_loss" or "val_auc", the best on validation patients at the training magnifications; or
            "oracle", the best AUC of the test itself.
        records: columns epoch, part, label, probability and patient of one run, `records.Run.predictions`.

    Raises:
        ValueError: unknown rule, or the part that it looks at has no rows or one class.
    """
    if rule not in SELECTION_RULES:
        raise ValueError(f"unknown selection rule {rule!r}: choose from {', '.join(SELECTION_RULES)}")
    epoch, part = np.asarray(records["epoch"]), np.asarray(records["part"])
    epochs = np.unique(epoch)
    if rule == "last":
        return int(epochs[-1])
    where, score = SELECTION_RULES[rule]
    label, probability, patient = (np.asarray(records[name]) for name in ("label", "probability", "patient"))
    scores = []
    for each in epochs:
        rows = (epoch == each) & (part == where)
        if len(np.unique(label[rows])) < 2:
            raise ValueError(f"the rule {rule} compares epochs on the part {where!r}: no images of two classes")
        scores.append(score(label[rows], probability[rows], patient_weights(patient[rows])))
    return int(epochs[np.argmax(scores)])


def selected_scores(
    records: Mapping[str, ArrayLike], *, calibrated: bool = True, part: str = "test"
) -> dict[str, dict]:
    """What the test says of a run under every rule.

    For each rule ``epoch``, ``temperature`` and the patient-balanced `METRICS` of a `part`; `records` as for
    `select_epoch`, with the column logits too. The temperature is fitted on the validation patients of the chosen
    epoch, or 1 if not `calibrated`.
    """
    columns = {name: np.asarray(records[name]) for name in ("epoch", "part", "label", "patient")}
    logits = np.stack([np.asarray(row, np.float64) for row in np.asarray(records["logits"])])
    scores = {}
    for rule in SELECTION_RULES:
        epoch = select_epoch(rule, records)
        val, test = ((columns["epoch"] == epoch) & (columns["part"] == name) for name in ("val", part))
        label, weight = columns["label"][test], patient_weights(columns["patient"][test])
        validation = logits[val], columns["label"][val], patient_weights(columns["patient"][val])
        temperature = fit_temperature(*validation) if calibrated else 1.0
        probability = apply_temperature(logits[test], temperature)[:, 1]
        of_rule = {name: metric(label, probability, weight) for name, metric in METRICS.items()}
        scores[rule] = {"epoch": epoch, "temperature": temperature, **of_rule}
    return scores
