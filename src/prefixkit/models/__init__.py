"""Base models: finding, loading and inspecting them."""

from prefixkit.models.base import Base, load_base_model

__all__ = ["Base", "load_base_model"]
