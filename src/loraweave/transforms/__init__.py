"""Transforms: bank -> bank, or bank -> plain weights. One file a method."""
