"""A run becomes a Hub repository: its files, its card, one commit."""

from magnification_invariant.hub.card import render_card
from magnification_invariant.hub.publish import fetch, publish, released, stage

__all__ = ["fetch", "publish", "released", "render_card", "stage"]
