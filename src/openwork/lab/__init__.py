"""Comparisons and studies: plan trials, run them apart, keep their results, judge them."""
