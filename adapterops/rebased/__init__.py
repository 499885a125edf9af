"""Adapters that are relative to their base model become ordinary ones when the base is given."""

from adapterops.rebased.dora import Dora, Residual
from adapterops.rebased.rebase import rebase

__all__ = ["Dora", "Residual", "rebase"]
