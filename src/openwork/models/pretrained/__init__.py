"""Pretrained models of the transformers library: loaded with strict checks from a folder or the hub, and saved again."""

from openwork.models.pretrained.loading import Pretrained, load
from openwork.models.pretrained.pooling import Pooling
from openwork.models.pretrained.writing import Written, write

__all__ = ["Pooling", "Pretrained", "Written", "load", "write"]
