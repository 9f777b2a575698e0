"""Prediction with a trained model: of pictures in hand, of collections into a table, and what to look at beside it."""

from magnification_invariant.data.scale import check_mpp
from magnification_invariant.predict.classifier import BACKENDS, ONNX_FILE, Classifier
from magnification_invariant.predict.inputs import Item, find_images, items_of, patients_by_name
from magnification_invariant.predict.tables import Summary, patients_file, predict_to_file

__all__ = [
    "BACKENDS",
    "ONNX_FILE",
    "Classifier",
    "Item",
    "Summary",
    "check_mpp",
    "find_images",
    "items_of",
    "patients_by_name",
    "patients_file",
    "predict_to_file",
]
