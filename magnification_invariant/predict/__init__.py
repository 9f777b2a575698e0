"""Prediction with a trained model: of pictures in hand, and of collections into a table."""

from magnification_invariant.predict.classifier import BACKENDS, ONNX_FILE, Classifier, Network
from magnification_invariant.predict.inputs import Item, check_mpp, find_images, items_of
from magnification_invariant.predict.tables import Summary, predict_to_file

__all__ = [
    "BACKENDS",
    "ONNX_FILE",
    "Classifier",
    "Item",
    "Network",
    "Summary",
    "check_mpp",
    "find_images",
    "items_of",
    "predict_to_file",
]
