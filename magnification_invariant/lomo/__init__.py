"""The protocol: leave one magnification out, patients disjoint. What a run is, how one is made, and many of them."""
