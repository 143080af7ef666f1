"""The errors that openwork raises on purpose: each message names the value, what was expected and the remedy."""

from __future__ import annotations


class OpenworkError(Exception):
    """Base of every error that openwork raises on purpose; the command line prints it as one sentence and exits with 2."""


class MaskError(OpenworkError):
    """A mask disagrees with its model, or a score cannot be ranked."""


class PatternError(OpenworkError):
    """A sparsity pattern cannot be laid over a weight of this shape, or a mask breaks its pattern."""


class AllocationError(OpenworkError):
    """No layer-wise densities satisfy what was asked."""


class OptimizerError(OpenworkError):
    """An optimizer that cannot hold masks, or one that does not belong to the model."""


class CostError(OpenworkError):
    """The cost of a model could not be counted."""


class DataError(OpenworkError):
    """A data set is missing, unreadable, empty, or holds what the model cannot take."""


class ModelError(OpenworkError):
    """A model is missing, cannot be built, or does not fit its data."""


class LookupFailed(OpenworkError):
    """A `module:function` or `path/to/file.py:function` that does not lead to a function."""


class FormatError(OpenworkError):
    """A file is not what it claims to be: corrupted, truncated, hostile, or of another format."""


class StoreError(OpenworkError):
    """A run folder cannot be read or written."""


class RecipeError(OpenworkError):
    """A recipe, flag or setting that makes no sense, with its allowed values."""


class MethodError(OpenworkError):
    """A method that does not exist, or settings that its constructor refuses."""


class TrialError(OpenworkError):
    """One or more trials did not end well; the others are kept."""


class DivergedError(OpenworkError):
    """Training met a non-finite number; names the step and the first tensor that holds it."""


class MissingExtra(OpenworkError):
    """A library that is not installed; the message names the extra to install."""
