"""The card of a model's repository, rendered from its records: no number in it is typed by hand."""

from importlib.resources import files
from pathlib import Path

from magnification_invariant.data.splits import domain_name
from magnification_invariant.files import read_json
from magnification_invariant.model_folder import read_model_config
from magnification_invariant.records import NORMALISED, OUT_OF_FOLD
from magnification_invariant.report import pictures
from magnification_invariant.report.contents import NAMES
from magnification_invariant.report.page import number
from magnification_invariant.tasks import TASKS

COMPARED = NAMES  # what has intervals in the records
PICTURES = {
    "calibration.png": ("Reliability before and after temperature scaling", pictures.reliability),
    "roc.png": ("ROC curve", pictures.roc),
}
_ON_THE_HUB = {"auc": "roc_auc", "f1": "f1", "brier": "brier_score"}
_DATA = {
    "virtual": (
        "Virtual slides",
        "Procedural drawings of breast H&E in micrometres, made by `load_virtual_slides` of the package: a seeded "
        "patient has a stain, a tissue and a class. No tissue, no people, no licence needed. Results on them say that "
        "the method works on drawings, and nothing about breast cancer.",
    ),
    "breakhis": (
        "BreaKHis",
        "BreaKHis: breast tumour biopsies, H&E, at 40, 100, 200 and 400X (Spanhol et al., IEEE TBME 63(7), 2016). "
        "Third parties state CC BY 4.0 (doi 10.17632/jxwvdwhpc2.1); the wording of the authors themselves is not "
        "verified. Get the images from them.",
    ),
    "other": ("other data", "Images of whoever trained the model; ask them for a description and for the licence."),
}


def tested_part(results: dict) -> str:
    """The part that a model is judged by: the unseen magnification, where one was held out."""
    return next(part for part in ("test", OUT_OF_FOLD, "test_source", "val") if part in results["parts"])


def render_card(folder: Path, repo: str) -> str:
    """README.md of the repository `repo`, from ``config.json`` and ``results.json`` in `folder`.

    What the records say is escaped: a name or label stays text, whatever it holds.

    Raises:
        ValueError: A record is of the wrong kind.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    config, results = read_model_config(str(folder)), read_json(Path(folder) / "results.json")
    record = results["record"]
    data, about_data = _DATA[config["trained_on"]]
    held_out = record["cell"]["held_out"] if "test" in results["parts"] else None
    parts = _part_names(results["parts"], held_out)
    method = record["cell"]["method"]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"f": number, "interval": _interval, "unit": lambda m: f"{m:.3g}", "domain": domain_name}
    template = environment.from_string(files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        metadata=Markup(_metadata(config, results, data, parts)),
        about_data=Markup(about_data),
        about_method=Markup((TASKS[method].__doc__ or "").splitlines()[0]) if method in TASKS else method,
        repo=repo,
        config=config,
        size=config["pretrained_cfg"]["input_size"][-1],
        results=results,
        record=record,
        cell=record["cell"],
        settings=record["settings"],
        machine=record["machine"],
        method=method,
        held_out=held_out,
        parts=parts,
        tested=tested_part(results),
        compared=COMPARED,
        pictures={file: title for file, (title, _) in PICTURES.items()},
    )


def _part_names(parts: dict, held_out: int | str | None) -> dict[str, str]:
    """Part to what it is, in words; the tested ones first."""
    named = {"test": f"patients and {domain_name(held_out)} never seen" if held_out is not None else ""}
    named[NORMALISED] = "the same images, scale-normalised"
    named["test_source"] = "patients never seen" if held_out is None else "the same patients, at what was seen"
    named[OUT_OF_FOLD] = "patients never seen, by models of the same recipe that did not see them"
    for whole in ("test_source", OUT_OF_FOLD):
        of_these = (part for part in parts if part.startswith(f"{whole}_"))
        named |= {part: f"of these, {part.removeprefix(f'{whole}_')}" for part in of_these}
    named["val"] = "validation patients (the temperature is theirs)"
    return {part: name for part, name in named.items() if part in parts}


def _metadata(config: dict, results: dict, data: str, parts: dict[str, str]) -> str:
    """YAML with a model-index, as the Hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    evaluated = [
        EvalResult(
            task_type="image-classification",
            task_name="benign or malignant",
            dataset_type=config["trained_on"],
            dataset_name=f"{data}: {name}",
            dataset_split=part,
            metric_type=_ON_THE_HUB[metric],
            metric_name=f"{title}, patient-balanced",
            metric_value=round(value, 4),
        )
        for part, name in parts.items()
        for metric, title in COMPARED.items()
        if part != "val" and (value := results["parts"][part]["patient_balanced"][metric]) is not None
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=config["pretrained_cfg"]["license"],
        tags=["timm", "transformers", "image-classification", "histopathology", "domain-generalization"],
        datasets=[config["trained_on"]],
        metrics=list(_ON_THE_HUB.values()),
        model_name=config["name"],
        eval_results=evaluated,
    ).to_yaml()


def _interval(ends: list[float] | None) -> str:
    return " [{:.3f}, {:.3f}]".format(*ends) if ends and None not in ends else ""
