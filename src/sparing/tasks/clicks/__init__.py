"""Click prediction: which shown items are taken, from categorical and numeric features."""

from sparing.tasks.clicks.clicks import Clicks
from sparing.tasks.clicks.options import ClicksOptions

__all__ = ["Clicks", "ClicksOptions"]
