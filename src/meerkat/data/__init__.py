"""Rows → examples → tokens → packed batches; which client holds which, in which order."""
