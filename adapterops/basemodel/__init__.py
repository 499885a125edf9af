"""Base models: their files, the names and the orientation of their weights."""

from adapterops.basemodel.model import BaseModel, open_model, same_bytes

__all__ = ["BaseModel", "open_model", "same_bytes"]
